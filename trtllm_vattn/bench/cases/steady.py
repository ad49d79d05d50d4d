"""The parts of `bench graph` that time steady decode, every cache, captured and eager, in turns on one card; and short
prompts: is one replay of a captured graph faster than an eager pass?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import mean
from time import perf_counter
from typing import Any

import numpy as np
import torch

from trtllm_vattn.bench.harness.contenders import (
    PROFILED,
    Contender,
    Contest,
    DeviceUtilization,
    device_step_ms,
    take_turns,
    utilization,
)
from trtllm_vattn.bench.harness.timing import attention_bandwidth, summarise
from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.progress import counting
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.prefill import PromptChunk
from trtllm_vattn.runtime.request import RequestState
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.step_plan import StepPlan


def run_steady(
    make_engine: Callable[..., Engine],
    caches: Iterable[str],
    make: Callable[[str, int, int], KVCache],
    *,
    attention: str,
    batch: int,
    context: int,
    rounds: int,
    steps: int,
    seed: int,
    audit: bool = False,
) -> dict[str, list[dict[str, object]]]:
    """Time decode steps of `batch` sequences around `context` tokens, `rounds` turns of `steps` steps a contender.

    ``make(name, num_slots, max_seq_len)`` builds a cache, ``make_engine(cache, **options)`` an engine over it. Returns
    ``runs`` (a row a cache and mode), ``ratios`` (vattn's captured step over the others', round by round),
    ``attention`` (bandwidth of the attention kernels alone), and with `audit` ``audits``, whose the addresses are that
    captured graphs hold.
    """
    # The first sequence decodes while the others are prefilled, one a step; each turn has two untimed steps. Half of
    # what is decoded comes before the middle of the timed steps, where sequences have `context` tokens.
    most = batch + 2 * rounds * (steps + 4) + 2 * (PROFILED + 4) + 40
    start = max(1, context - batch // 2 - rounds * (steps + 2))
    with Contest(batch, start, most, seed) as contest:
        for name in caches:
            cache = make(name, batch, start + most)
            engine = make_engine(cache, attention=attention, buckets=[batch], chunk=max(2048, start))
            contest.add(name, engine, ("captured", "eager"))
        take_turns(contest.contenders, rounds, steps, f"batch {batch}")
        captured = {each.name: each for each in contest.contenders if each.mode == "captured"}
        worked = [utilization(each) for each in contest.contenders]
        device_ms = {name: device_step_ms(each.engine) for name, each in captured.items()}
        audits = {name: each.engine.audit().as_dict() for name, each in captured.items()} if audit else {}
        return {
            "runs": [
                _row(each, batch, context, device_ms[each.name], one)
                for each, one in zip(contest.contenders, worked, strict=True)
            ],
            "audits": [{"cache": name, "batch": batch, **report} for name, report in audits.items()],
            "ratios": _ratios(captured, batch),
            "attention": [
                {
                    "cache": name,
                    "batch": batch,
                    **attention_bandwidth(each.engine.attention, each.engine.decode.lengths),
                }
                for name, each in captured.items()
            ],
        }


def _row(
    contender: Contender, batch: int, context: int, device_ms: float | None, worked: DeviceUtilization | None
) -> dict[str, object]:
    times = contender.times()
    return {
        "cache": contender.name,
        "mode": contender.mode,
        "batch": batch,
        "context": context,
        "mean_length": mean(contender.tokens),
        # Of captured steps replayed without a pause; eager steps have other kernels.
        "device_step_ms": device_ms if contender.mode == "captured" else None,
        "device_busy_ms": worked and worked.device_busy_ms,
        "device_work_a_step": worked and worked.work_a_step,
        "profiled_step_ms": worked and worked.profiled_step_ms,
        # Of the steps as they are timed; a profiler makes the host slower, and with it the pauses longer.
        "idle_share": worked and 1 - worked.device_busy_ms / times["step_ms"]["p50"],
        **times,
    }


def _ratios(captured: dict[str, Contender], batch: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name, other in captured.items():
        if name != "vattn" and "vattn" in captured:
            ratio, by_round = captured["vattn"].over(other)
            rows.append({"over": name, "batch": batch, "ratio": ratio, "by_round": by_round})
    return rows


@torch.inference_mode()
def time_prompts(engine: Engine, repeats: int, seed: int) -> list[dict[str, Any]]:
    """Milliseconds until a prompt's logits are there, by replay and by pass, of each size that was captured; in turns.

    The engine has nothing else to do, and a free slot.
    """
    cache, prefill, passes = engine.cache, engine.prefill, engine.passes
    # Prompts alone are captured, or whole passes.
    graphs = passes.graphs
    sizes = (prefill if graphs is None else graphs).runner.buckets
    slot = cache.admit("prompt", min(sizes[-1], cache.shape.max_seq_len))
    random = np.random.default_rng(seed)

    def once(chunk: PromptChunk, captured: bool) -> float:
        prefill.captured, passes.graphs = captured and graphs is None, graphs if captured else None
        # Of a prompt that is longer, so that no sequence begins to decode.
        request = RequestState(0, [*chunk.tokens, 0], SamplingParams(1), 1, slot=slot)
        started = perf_counter()
        passes.launch(StepPlan(1, ((request, chunk),)))
        if cache.device.type == "cuda":
            torch.cuda.synchronize(cache.device)
        return 1e3 * (perf_counter() - started)

    rows = []
    try:
        for size in counting(sizes, "prompts", "size"):
            length = min(size, cache.shape.max_seq_len)
            ids = random.integers(0, engine.model.config.get_text_config().vocab_size, length).tolist()
            chunk = PromptChunk(slot, ids, 0)
            took: dict[bool, list[float]] = {True: [], False: []}
            for captured in took:
                once(chunk, captured)  # The first of each may have to plan and allocate.
            for _ in range(repeats):
                for captured, milliseconds in took.items():
                    milliseconds.append(once(chunk, captured))
            rows.append({"tokens": length, "replay_ms": summarise(took[True]), "pass_ms": summarise(took[False])})
    finally:
        prefill.captured, passes.graphs = graphs is None, graphs
        cache.release("prompt")
    return rows
