"""The former place of `bench.harness.traces`; an alias for 0.1."""

from trtllm_vattn.bench.harness.traces import Request, fit, generate_trace, load_trace

__all__ = ["Request", "fit", "generate_trace", "load_trace"]
