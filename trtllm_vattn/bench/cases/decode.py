"""`bench graph`: what do graphs gain, and what does a fixed-address cache cost?

The same requests through {eager, captured} × {contiguous, paged, vattn}, on one model, with one attention library.
Two parts: a trace of requests, whose tokens are compared and whose memory is recorded over time; and, on a GPU, steady
decode at given batch sizes, with the six combinations taking turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from trtllm_vattn.arguments import adder, non_negative, numbers_or_none
from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.bench.cases import step_peer
from trtllm_vattn.bench.cases.steady import run_steady, time_prompts
from trtllm_vattn.bench.harness import flags
from trtllm_vattn.bench.harness.case import Part, Recording, model_of
from trtllm_vattn.bench.harness.identity import RequestTokens, compare
from trtllm_vattn.bench.harness.peer import add_peer
from trtllm_vattn.bench.harness.timing import attention_bandwidth, fill_random, read_limit, summarise
from trtllm_vattn.bench.harness.traces import Request, fit, generate_trace, load_trace
from trtllm_vattn.bench.harness.workload import TracedRun, prompts_of, run_traced
from trtllm_vattn.bench.publish.plots import plot_graph
from trtllm_vattn.cache.base import CacheShape, KVCache
from trtllm_vattn.cache.select import CACHES, COMPARED, make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.plugins.session import EngineSession, LoadedEngine
from trtllm_vattn.progress import counting
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.prefill import LONGEST_CAPTURED
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.table import tabulate

MODES = ("eager", "captured")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench graph`."""
    add = adder(parser, gpu := flags.add_device(parser))
    flags.add_model(parser, default="llama-3-8b" if gpu else "tiny-llama")
    add("--engine", "FOLDER", "built by `trtllm-vattn plugin build` (default: run --model)", type=Path)
    flags.add_attention(parser)
    text = f"of {', '.join(CACHES)}; the first is the reference (default: {','.join(COMPARED)}; with --engine vattn)"
    add("--caches", "CACHES", text, type=flags.caches)
    flags.add_trace(parser)
    add("--requests", "REQUESTS", "requests taken from the trace; 0 is steady decode alone", 32, 24, type=non_negative)
    add("--max-output", "TOKENS", flags.MAX_OUTPUT, 64, 24)
    add("--max-seqs", "SEQUENCES", flags.MAX_SEQS, 16, 8)
    add("--max-seq-len", "TOKENS", flags.MAX_SEQ_LEN, 8192, 512)
    text = "layers that share a token's row in the vattn cache (default: as many as make rows of 64 KiB)"
    add("--layers-per-range", "LAYERS", text)
    text = "measure attention alone at these layers a range too, as 1,8,32 (default: none)"
    add("--sweep-layers", "LAYERS,...", text, "none", type=numbers_or_none)
    text = "sequences in steady decode steps, which are timed on a GPU; none is the trace alone"
    usual = "1,8,32,128" if gpu else "none"
    parser.add_argument("--batch-sizes", type=numbers_or_none, default=usual, metavar="SEQUENCES,...", help=text)
    flags.add_steady(parser, "combination of cache and mode in steady decode", context=2048, rounds=5, steps=10)
    add("--tie-tolerance", "LOGITS", flags.TIE_TOLERANCE, 0.25, 0.0)
    add_peer(parser, "time steady decode beside it, in turns, and nothing else")
    parser.add_argument(
        "--audit", action="store_true", help="list whose addresses captured graphs hold; exit 1 if a stranger's"
    )
    flags.add_results(parser, plots=True)


def settle(args: argparse.Namespace) -> None:
    """Fill in and check what depends on other flags. Raises ConfigError."""
    args.caches = args.caches or (["vattn"] if args.engine else list(COMPARED))
    if args.peer is not None and (args.engine or not args.batch_sizes):
        raise ConfigError("--peer times steady decode of --model: give --batch-sizes, and no --engine")
    if args.batch_sizes and args.device == "cpu" and args.peer is None:
        raise ConfigError("--batch-sizes times steps on a GPU and the device is the CPU: leave it out or give --device")
    if not args.batch_sizes and not args.requests:
        raise ConfigError("--requests is 0 and --batch-sizes is none: there is nothing to do; give one of them")


class GraphBenchmark:
    """One invocation: the model, and how its caches are made."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.loaded = LoadedEngine.load(args.engine, args.device) if args.engine else None
        if self.loaded is None:
            self.model: PreTrainedModel = model_of(args)
        config = self.model.config.get_text_config() if self.loaded is None else self.loaded.config
        self.vocab, self.heads = config.vocab_size, config.num_attention_heads

    def shape(self, num_slots: int, max_seq_len: int) -> CacheShape:
        if self.loaded is not None:
            return self.loaded.cache_shape(num_slots, max_seq_len)
        return shape_of(self.model, num_slots, max_seq_len)

    def engine(self, cache: KVCache, **options: Any) -> Engine:
        """An Engine over the model, or a session over the TensorRT engine."""
        if self.loaded is not None:
            return EngineSession(self.loaded, cache, **options)
        return Engine(self.model, cache, prefix_cache=False, **options)

    def make(self, name: str, num_slots: int, max_seq_len: int) -> KVCache:
        shape = self.shape(num_slots, max_seq_len)
        return make_cache(name, shape, self.args.device, layers_per_range=self.args.layers_per_range)

    # -- the trace -------------------------------------------------------------------------------------------------

    def requests(self) -> list[Request]:
        args = self.args
        asked = load_trace(args.trace, args.requests) if args.trace else generate_trace(args.requests, args.seed)
        return fit(asked, args.max_seq_len, args.max_output)

    def trace(self) -> dict[str, Any]:
        """All combinations over the trace, teacher-forced with the first one's tokens where kernels differ.

        Each mode's first cache is the reference whose tokens the others must give in that mode; how the modes
        differ, which have other kernels where layers are compiled, is reported apart.
        """
        args = self.args
        requests = self.requests()
        prompts = prompts_of(requests, self.vocab, args.seed)
        outputs = [request.output_tokens for request in requests]
        forcing = args.tie_tolerance > 0
        references: dict[str, RequestTokens] = {}
        fed: RequestTokens | None = None
        rows = []
        combinations = [(name, mode) for name in args.caches for mode in MODES]
        if forcing:
            # The reference once more: what differs then is what its own kernels leave to chance.
            combinations.insert(1, combinations[0])
        for name, mode in combinations:
            cache = self.make(name, args.max_seqs, args.max_seq_len)
            with (
                torch.compiler.set_stance("default" if mode == "captured" else "force_eager"),
                self.engine(
                    cache, attention=args.attention, capture=mode == "captured", record_margins=forcing
                ) as engine,
            ):
                run = run_traced(engine, prompts, outputs, fed if forcing else None, f"{name}, {mode}")
                start_up = engine.startup.capture_s
                audited = args.audit and mode == "captured"
                audit = engine.audit().as_dict() if audited else None
            fed = fed or run.tokens
            reference = references.setdefault(mode if forcing else "all", run.tokens)
            rows.append({**self._trace_row(name, mode, run, reference, start_up), "audit": audit})
        return {
            "runs": [rows[0], *rows[2:]] if forcing else rows,
            "control": rows[1] if forcing else None,
            "requests": len(requests),
            "prompt_tokens": sum(map(len, prompts)),
            "output_tokens": sum(outputs),
            "teacher_forced": args.tie_tolerance > 0,
            "tie_tolerance": args.tie_tolerance,
            "modes": vars(compare(references["eager"], references["captured"], args.tie_tolerance))
            if forcing
            else None,
        }

    def _trace_row(
        self, name: str, mode: str, run: TracedRun, reference: RequestTokens, capture_s: float
    ) -> dict[str, Any]:
        identity = compare(reference, run.tokens, self.args.tie_tolerance)
        return {
            "cache": name,
            "mode": mode,
            "tokens_identical": identity.identical,
            **vars(identity),
            "seconds": run.seconds,
            "capture_s": capture_s,
            "output_throughput": identity.tokens / run.seconds,
            "step_ms": summarise([1e3 * record.wall_s for record in run.steps if not record.prefilled]),
            "step_with_prefill_ms": summarise([1e3 * record.wall_s for record in run.steps if record.prefilled]),
            "kv_host_us": summarise([1e6 * record.kv_s for record in run.steps]),
            "map_ahead_us": summarise([1e6 * record.ahead_s for record in run.steps]),
            "critical_path_maps": run.critical_path_maps,
            "memory": run.memory.thinned(),
        }

    # -- steady decode ---------------------------------------------------------------------------------------------

    def steady(self) -> dict[str, Any]:
        """All combinations in turns, at each batch size; and the read limit of the card in the same run."""
        args = self.args
        limit = read_limit()
        parts = [
            run_steady(
                self.engine,
                args.caches,
                self.make,
                attention=args.attention,
                batch=batch,
                context=args.context,
                rounds=args.rounds,
                steps=args.steps,
                seed=args.seed,
                audit=args.audit,
            )
            for batch in counting(args.batch_sizes, "batch sizes", "batch size")
        ]
        whole: dict[str, Any] = {key: [row for part in parts for row in part[key]] for key in parts[0]}
        # Before and after, because the card's clocks move.
        whole["read_limit_bytes_per_s"] = max(limit, read_limit())
        whole["layers"] = [self._layout(g, batch) for batch in args.batch_sizes for g in args.sweep_layers]
        whole["prompts"] = self._prompts() if self.loaded is None else []
        return whole

    def _prompts(self) -> list[dict[str, Any]]:
        """Short prompts by captured replays and by eager passes, over the last cache."""
        cache = self.make(self.args.caches[-1], 1, min(2 * LONGEST_CAPTURED, self.args.max_seq_len))
        with self.engine(cache, attention=self.args.attention) as engine:
            return time_prompts(engine, self.args.rounds * self.args.steps, self.args.seed)

    def audit_launches(self) -> list[dict[str, Any]]:
        """Audits of the other kinds of captured step: with sampling, several steps in a launch, and a loop."""
        rows = []
        for name, loop in [(name, loop) for name in self.args.caches for loop in (False, True)]:
            cache = self.make(name, 2, min(256, self.args.max_seq_len))
            with self.engine(cache, attention=self.args.attention, buckets=[2], steps=4, loop=loop) as engine:
                for temperature in (0.0, 0.8):
                    engine.generate([[1], [2, 3]], SamplingParams(9, temperature, ignore_eos=True))
                rows.append({"cache": name, "loop": loop, **engine.audit().as_dict()})
        return rows

    def _layout(self, layers_per_range: int, batch: int) -> dict[str, Any]:
        """Attention's bandwidth alone in the vattn cache with so many layers a range."""
        shape = self.shape(batch, self.args.context + 16)
        with make_cache("vattn", shape, self.args.device, layers_per_range=layers_per_range) as cache:
            attention = make_attention(self.args.attention, cache, self.heads)
            lengths = np.full(batch, self.args.context)
            fill_random(attention, lengths)
            measured = attention_bandwidth(attention, lengths)
        return {"layers_per_range": layers_per_range, "batch": batch, "context": self.args.context, **measured}


def summary(
    trace: dict[str, Any] | None, steady: dict[str, Any] | None, launches: list[dict[str, Any]]
) -> dict[str, Any]:
    """The figures that are quoted."""
    out: dict[str, Any] = {}
    audits = [row["audit"] for row in (trace["runs"] if trace else []) if row["audit"]]
    audits += [*(steady["audits"] if steady else []), *launches]
    if audits:
        out["audited_graphs"] = sum(len(audit["graphs"]) for audit in audits)
        out["audit_findings"] = sum(len(audit["findings"]) for audit in audits)
        out["audit_lookalikes"] = sum(audit["lookalikes"] for audit in audits)
    if trace:
        out.update(
            tokens_identical=all(row["tokens_identical"] for row in trace["runs"]),
            tokens_compared=sum(row["tokens"] for row in trace["runs"]),
            ties=sum(row["ties"] for row in trace["runs"]),
            widest_tie=max(row["widest_tie"] for row in trace["runs"]),
        )
        if trace["control"]:
            out["ties_of_reference_with_itself"] = trace["control"]["ties"] + trace["control"]["mismatches"]
            out["captured_against_eager_ties"] = trace["modes"]["ties"]
            out["captured_against_eager_mismatches"] = trace["modes"]["mismatches"]
    if steady:
        for other in ("contiguous", "paged"):
            ratios = [row["ratio"] for row in steady["ratios"] if row["over"] == other]
            if ratios:
                out[f"vattn_over_{other}_step_ratio"] = max(ratios)
        step = {(row["cache"], row["mode"], row["batch"]): row for row in steady["runs"]}
        if ("vattn", "eager", 1) in step:
            eager, captured = (step["vattn", mode, 1]["step_ms"]["p50"] for mode in MODES)
            out["graph_speedup_batch1"] = eager / captured
        ours = [row for row in steady["runs"] if row["cache"] == "vattn" and row["mode"] == "captured"]
        if ours:
            largest = max(ours, key=lambda row: row["batch"])
            out["kv_host_us_p99"] = largest["kv_host_us"]["p99"]
            out["kv_host_batch"] = largest["batch"]
            out["critical_path_maps"] = sum(row["critical_path_maps"] for row in ours)
        limit = steady["read_limit_bytes_per_s"]
        out["read_limit_gb_per_s"] = limit / 1e9
        for row in steady["attention"]:
            if row["cache"] == "vattn":
                out[f"attention_of_read_limit_batch{row['batch']}"] = row["bytes_per_s"]["p50"] / limit
    return out


def show(trace: dict[str, Any] | None, steady: dict[str, Any] | None, times: bool = True) -> str:
    """The results as text; of a trace, steps' times only where they are asked for."""
    parts, step = [], "step_ms.p50 step_ms.p90 step_ms.p99 kv_host_us.p99"
    if trace:
        columns = f"cache mode tokens_identical ties {step if times else 'kv_host_us.p99'}"
        parts.append(tabulate(trace["runs"], columns))
    if steady:
        parts.append(tabulate(steady["runs"], f"batch cache mode {step} device_busy_ms idle_share"))
    return "\n\n".join(parts)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 where tokens were not identical, or a graph holds an address that nobody declared."""
    settle(args)
    if args.peer is not None:
        return step_peer.run(args)
    recording, benchmark = Recording("graph", args), GraphBenchmark(args)
    results = recording.results
    results.update(trace=None, steady=None, audited_launches=[])

    def measured(name: str, measure: Callable[[], Any]) -> Part:
        def part(recording: Recording) -> list[dict[str, Any]]:
            results[name] = measure()
            return [summary(results["trace"], results["steady"], results["audited_launches"])]

        return part

    parts = {"trace": measured("trace", benchmark.trace)} if args.requests else {}
    if args.batch_sizes:
        parts["steady"] = measured("steady", benchmark.steady)
    if args.audit:
        parts["launches"] = measured("audited_launches", benchmark.audit_launches)
    recording.measure(parts)
    shown, found = show(results["trace"], results["steady"], times=args.device != "cpu"), recording.summary
    if args.device == "cpu":
        shown += "\nOn the host Python replays a captured step, so that times are not shown: compare them on a GPU."
    wrong = []
    if not found.get("tokens_identical", True):
        wrong.append("tokens differ between combinations")
    if found.get("audit_findings"):
        wrong.append(f"captured graphs hold {found['audit_findings']} addresses of nobody we know")
    return recording.conclude(shown, plot_graph, wrong)
