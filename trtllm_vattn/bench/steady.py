"""Steady decode: all combinations of cache and mode side by side, in turns, on one card."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean, median

import numpy as np
import torch
from tqdm import tqdm

from trtllm_vattn.bench.bandwidth import attention_bandwidth
from trtllm_vattn.bench.busy import Busy, device_busy
from trtllm_vattn.bench.machine import summarise
from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.request import StepRecord
from trtllm_vattn.runtime.sampling import SamplingParams

PROFILED = 4
"""Steps of each combination that the profiler looks at, after all that are timed."""


@dataclass
class Lane:
    """One combination under measurement; `rounds` holds the step records of each turn, `tokens` how long its sequences
    were in the middle of it, `critical_path_maps` those of its cache by the end of the last."""

    cache: str
    mode: str
    engine: Engine
    rounds: list[list[StepRecord]] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    critical_path_maps: int = 0

    def samples(self, name: str) -> list[float]:
        return [getattr(record, name) for records in self.rounds for record in records]

    def medians(self) -> list[float]:
        return [median(record.wall_s for record in records) for records in self.rounds]


def fill(engine: Engine, batch: int, context: int, tokens: int, seed: int) -> None:
    """Prefill `batch` random prompts of `context` tokens and leave them decoding."""
    random = np.random.default_rng(seed)
    vocab_size = engine.model.config.get_text_config().vocab_size
    for _ in range(batch):
        engine.submit(
            random.integers(0, vocab_size, context).tolist(), SamplingParams(max_tokens=tokens, ignore_eos=True)
        )
    while engine.prefilling:
        engine.step()


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
    """Time decode steps of `batch` sequences around `context` tokens, `rounds` turns of `steps` steps a combination.

    ``make(name, num_slots, max_seq_len)`` builds a cache, ``make_engine(cache, **options)`` an engine over it. Returns
    ``runs`` (a row a combination), ``ratios`` (vattn's captured step over the others', round by round), ``attention``
    (bandwidth of the attention kernels alone), and with `audit` ``audits``, whose the addresses are that captured
    graphs hold.
    """
    # The first sequence decodes while the others are prefilled, one a step; each turn has two untimed steps. Half of
    # what is decoded comes before the middle of the timed steps, where sequences have `context` tokens.
    most = batch + 2 * rounds * (steps + 4) + 2 * (PROFILED + 4) + 40
    start = max(1, context - batch // 2 - rounds * (steps + 2))
    lanes: list[Lane] = []
    engines = []
    try:
        for name in caches:
            cache = make(name, batch, start + most)
            engine = make_engine(cache, attention=attention, buckets=[batch], chunk=max(2048, start))
            engines.append(engine)
            fill(engine, batch, start, most, seed)
            lanes += [Lane(name, mode, engine) for mode in ("captured", "eager")]
        take_turns(lanes, rounds, steps, f"batch {batch}")
        captured = {lane.cache: lane for lane in lanes if lane.mode == "captured"}
        busy = [_busy(lane) for lane in lanes]
        device = {name: settle_device_ms(lane.engine) for name, lane in captured.items()}
        audits = {name: lane.engine.audit().as_dict() for name, lane in captured.items()} if audit else {}
        return {
            "runs": [
                _row(lane, batch, context, device[lane.cache], one) for lane, one in zip(lanes, busy, strict=True)
            ],
            "audits": [{"cache": name, "batch": batch, **report} for name, report in audits.items()],
            "ratios": _ratios(captured, batch),
            "attention": [
                {
                    "cache": name,
                    "batch": batch,
                    **attention_bandwidth(lane.engine.attention, lane.engine.decode.lengths),
                }
                for name, lane in captured.items()
            ],
        }
    finally:
        for engine in engines:
            engine.close()


def take_turns(lanes: Sequence[Lane], rounds: int, steps: int, label: str, untimed: int = 2) -> None:
    """Let each combination decode `steps` steps a round, after a few that are not timed."""
    for number in tqdm(range(rounds), desc=label, unit="round", disable=None):
        # Turned about, so that no combination always follows the same one.
        for lane in [*lanes[number % len(lanes) :], *lanes[: number % len(lanes)]]:
            with _mode_of(lane):
                # What was under way in another mode, and what was started beside it.
                _decode(lane.engine, untimed)
                before = lane.engine.decode.lengths.mean()
                lane.rounds.append(_decode(lane.engine, steps))
                lane.tokens.append(float(before + lane.engine.decode.lengths.mean()) / 2)
    # Counted now: what is measured next may prepare more steps at once than any engine would.
    for lane in lanes:
        lane.critical_path_maps = lane.engine.cache.stats().critical_path_maps


@contextmanager
def _mode_of(lane: Lane) -> Iterator[None]:
    captured = lane.mode == "captured"
    with torch.compiler.set_stance("default" if captured else "force_eager"):
        lane.engine.decode.captured = captured
        yield


def _busy(lane: Lane) -> Busy | None:
    """The device's work in a few steps more; each of them is submitted while the one before is read."""
    with _mode_of(lane):
        _decode(lane.engine, 2)
        return device_busy(
            lambda: sum(record.steps for record in _decode(lane.engine, PROFILED)), lane.engine.cache.device
        )


def _decode(engine: Engine, steps: int) -> list[StepRecord]:
    """At least so many decode steps."""
    records: list[StepRecord] = []
    engine.observer = records.append
    while sum(record.steps for record in records) < steps:
        engine.step()
    engine.observer = None
    return records


@torch.inference_mode()
def settle_device_ms(engine: Engine, replays: int = 10) -> float | None:
    """Milliseconds of the device for one captured step of the sequences that an engine is decoding, replayed without
    a pause; None on the host. Their steps are real, but nobody reads their tokens."""
    cache, decode = engine.cache, engine.decode
    if cache.device.type != "cuda":
        return None
    engine.pipeline.forget()
    cache.prepare_step(decode.lengths_after(2 * replays + 2))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]  # type: ignore[no-untyped-call]
    decode.launch(1)
    for event in events[:-1]:
        event.record()
        decode.runner.replay(decode.bucket)
    events[-1].record()
    torch.cuda.synchronize(cache.device)
    return float(median(start.elapsed_time(end) for start, end in pairwise(events)))


def _row(lane: Lane, batch: int, context: int, device_ms: float | None, busy: Busy | None) -> dict[str, object]:
    step = summarise([1e3 * value for value in lane.samples("wall_s")])
    return {
        "cache": lane.cache,
        "mode": lane.mode,
        "batch": batch,
        "context": context,
        "mean_length": mean(lane.tokens),
        "step_ms": step,
        # Of captured steps replayed without a pause; eager steps have other kernels.
        "device_step_ms": device_ms if lane.mode == "captured" else None,
        "device_busy_ms": busy and busy.device_busy_ms,
        "device_work_a_step": busy and busy.work_a_step,
        "profiled_step_ms": busy and busy.profiled_step_ms,
        # Of the steps as they are timed; a profiler makes the host slower, and with it the pauses longer.
        "idle_share": busy and 1 - busy.device_busy_ms / step["p50"],
        "kv_host_us": summarise([1e6 * value for value in lane.samples("kv_s")]),
        "map_ahead_us": summarise([1e6 * value for value in lane.samples("ahead_s")]),
        "critical_path_maps": lane.critical_path_maps,
    }


def _ratios(captured: dict[str, Lane], batch: int) -> list[dict[str, object]]:
    ours = captured.get("vattn")
    rows: list[dict[str, object]] = []
    for name, other in captured.items():
        if ours is not None and name != "vattn":
            by_round = [a / b for a, b in zip(ours.medians(), other.medians(), strict=True)]
            whole = median(ours.samples("wall_s")) / median(other.samples("wall_s"))
            rows.append({"over": name, "batch": batch, "ratio": whole, "by_round": summarise(by_round)})
    return rows
