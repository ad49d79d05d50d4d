"""Steady decode: all combinations of cache and mode side by side, in turns, on one card."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel

from trtllm_vattn.bench.bandwidth import attention_bandwidth
from trtllm_vattn.bench.machine import summarise
from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.runtime.engine import Engine, StepRecord
from trtllm_vattn.runtime.sampling import SamplingParams


@dataclass
class Lane:
    """One combination under measurement; `rounds` holds the step records of each turn."""

    cache: str
    mode: str
    engine: Engine
    rounds: list[list[StepRecord]] = field(default_factory=list)

    def samples(self, name: str) -> list[float]:
        return [getattr(record, name) for records in self.rounds for record in records]

    def medians(self) -> list[float]:
        return [median(record.wall_s for record in records) for records in self.rounds]


def _fill(engine: Engine, batch: int, context: int, vocab_size: int, tokens: int, seed: int) -> None:
    """Prefill `batch` random prompts of `context` tokens and leave them decoding."""
    random = np.random.default_rng(seed)
    for _ in range(batch):
        engine.submit(random.integers(0, vocab_size, context).tolist(), SamplingParams(max_tokens=tokens))
    while engine.prefilling:
        engine.step()


def run_steady(
    model: PreTrainedModel,
    caches: Iterable[str],
    make: Callable[[str, int, int], KVCache],
    *,
    attention: str,
    batch: int,
    context: int,
    rounds: int,
    steps: int,
    seed: int,
) -> dict[str, list[dict[str, object]]]:
    """Time decode steps of `batch` sequences around `context` tokens, `rounds` turns of `steps` steps a combination.

    ``make(name, num_slots, max_seq_len)`` builds a cache. Returns ``runs`` (a row a combination), ``ratios`` (vattn's
    captured step over the others', round by round) and ``attention`` (bandwidth of the attention kernels alone).
    """
    # The first sequence decodes while the others are prefilled, one a step; each turn has one untimed step.
    most = batch + 2 * rounds * (steps + 1) + 8
    start = max(1, context - most // 2)
    lanes: list[Lane] = []
    engines = []
    try:
        for name in caches:
            cache = make(name, batch, start + most)
            engine = Engine(model, cache, attention=attention, buckets=[batch], chunk=max(2048, start))
            engines.append(engine)
            _fill(engine, batch, start, model.config.get_text_config().vocab_size, most, seed)
            lanes += [Lane(name, mode, engine) for mode in ("captured", "eager")]
        _take_turns(lanes, rounds, steps, f"batch {batch}")
        captured = {lane.cache: lane for lane in lanes if lane.mode == "captured"}
        return {
            "runs": [_row(lane, batch, context) for lane in lanes],
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


def _take_turns(lanes: Sequence[Lane], rounds: int, steps: int, label: str) -> None:
    for number in tqdm(range(rounds), desc=label, unit="round", disable=None):
        # Turned about, so that no combination always follows the same one.
        for lane in [*lanes[number % len(lanes) :], *lanes[: number % len(lanes)]]:
            records: list[StepRecord] = []
            lane.engine.decode.captured = lane.mode == "captured"
            lane.engine.step()
            lane.engine.observer = records.append
            for _ in range(steps):
                lane.engine.step()
            lane.engine.observer = None
            lane.rounds.append(records)


def _row(lane: Lane, batch: int, context: int) -> dict[str, object]:
    return {
        "cache": lane.cache,
        "mode": lane.mode,
        "batch": batch,
        "context": context,
        "step_ms": summarise([1e3 * value for value in lane.samples("wall_s")]),
        "kv_host_us": summarise([1e6 * value for value in lane.samples("kv_s")]),
        "map_ahead_us": summarise([1e6 * value for value in lane.samples("ahead_s")]),
        "critical_path_maps": lane.engine.cache.stats().critical_path_maps,
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
