"""``python -m trtllm_vattn.trtllm.probe MODEL KIND`` runs a few prompts through one LLM and prints JSON.

`selfcheck` runs it once with the stock KV cache and once with the fixed-address one, each in a process of its own.
"""

from __future__ import annotations

import json
import sys
from statistics import median
from time import perf_counter
from typing import Any

PROMPTS = [
    "The capital of France is",
    "In the beginning there was",
    "def fibonacci(n):",
    "Water boils at a temperature of",
]
TOKENS = 64
ROUNDS = 3


def measure(model: str, kind: str) -> dict[str, Any]:
    """Greedy tokens of `PROMPTS`, milliseconds a step, and bytes of GPU memory in use after start and after the runs.

    Parameters
    ----------
    kind : str
        ``stock`` or ``fixed``.
    """
    from trtllm_vattn.trtllm.installation import install

    if kind == "fixed" and not install():
        raise SystemExit("tensorrt_llm is not installed")
    from tensorrt_llm import LLM, SamplingParams
    from tensorrt_llm.llmapi import KvCacheConfig

    started = perf_counter()
    llm = LLM(model=model, max_batch_size=8, max_seq_len=2048, kv_cache_config=KvCacheConfig(enable_block_reuse=False))
    start_s = perf_counter() - started
    idle = _gpu_bytes()
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0)
    tokens: list[list[int]] = []
    seconds = []
    for _ in range(ROUNDS):
        started = perf_counter()
        outputs = llm.generate(PROMPTS, params)
        seconds.append(perf_counter() - started)
        tokens = [list(each.outputs[0].token_ids) for each in outputs]
    steps = max(map(len, tokens))
    found = {"kind": kind, "tokens": tokens, "start_s": start_s, "step_ms": 1e3 * median(seconds) / steps}
    found.update(idle_bytes=idle, busy_bytes=_gpu_bytes())
    llm.shutdown()
    return found


def _gpu_bytes() -> int:
    """Memory in use on the first GPU, by all processes."""
    import pynvml

    pynvml.nvmlInit()
    used = int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
    pynvml.nvmlShutdown()
    return used


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:3])))
