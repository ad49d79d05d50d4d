"""Engines that decode the same sequences in turns on one device, so that changes of its clock affect all alike."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from trtllm_vattn.bench.harness.timing import fill_flat, summarise
from trtllm_vattn.progress import counting, is_quiet, say
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.request import StepRecord
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.values import counted

PROFILED = 4
"""Steps of each contender that the profiler looks at, after all that are timed."""


@dataclass
class Contender:
    """One engine under measurement, in one mode.

    Attributes
    ----------
    name : str
        What distinguishes it: its cache, its table, its policy.
    mode : str
        ``captured`` or ``eager``.
    rounds : list
        Step records of each turn.
    tokens : list of float
        How long its sequences were in the middle of each turn.
    critical_path_maps : int
        Of its cache, by the end of the last turn.
    """

    name: str
    mode: str
    engine: Engine
    rounds: list[list[StepRecord]] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    critical_path_maps: int = 0

    def samples(self, name: str) -> list[float]:
        """A field of all step records, in seconds."""
        return [getattr(record, name) for records in self.rounds for record in records]

    def times(self) -> dict[str, Any]:
        """What every case reports of its steps."""
        return {
            "step_ms": summarise([1e3 * value for value in self.samples("wall_s")]),
            "kv_host_us": summarise([1e6 * value for value in self.samples("kv_s")]),
            "map_ahead_us": summarise([1e6 * value for value in self.samples("ahead_s")]),
            "critical_path_maps": self.critical_path_maps,
        }

    def over(self, other: Contender) -> tuple[float, dict[str, float]]:
        """The median of its steps over the other's: of all rounds, and round by round."""
        by_round = [
            median(record.wall_s for record in ours) / median(record.wall_s for record in theirs)
            for ours, theirs in zip(self.rounds, other.rounds, strict=True)
        ]
        return median(self.samples("wall_s")) / median(other.samples("wall_s")), summarise(by_round)


class Contest(ExitStack):
    """Contenders with the same sequences; leaving it closes their engines.

    Parameters
    ----------
    batch, context, tokens : int
        Sequences of each engine, the tokens of their prompts, and those that they may decode.
    """

    def __init__(self, batch: int, context: int, tokens: int, seed: int) -> None:
        super().__init__()
        self.batch, self.context, self.tokens, self.seed = batch, context, tokens, seed
        self.contenders: list[Contender] = []

    def add(self, name: str, engine: Engine, modes: Sequence[str] = ("captured",)) -> None:
        """Fill an engine, which is closed at the end, and let it take part."""
        self.callback(engine.close)
        fill(engine, [self.context] * self.batch, self.tokens, np.random.default_rng(self.seed))
        self.contenders += [Contender(name, mode, engine) for mode in modes]


def fill(engine: Engine, lengths: Sequence[int], tokens: int, random: np.random.Generator) -> list[int]:
    """Prefill random prompts of so many tokens each and leave them decoding; the numbers of their requests."""
    vocab_size = engine.model.config.get_text_config().vocab_size
    wanted = SamplingParams(max_tokens=tokens, ignore_eos=True)
    numbers = [engine.submit(random.integers(0, vocab_size, length).tolist(), wanted) for length in lengths]
    while engine.prefilling:
        engine.step()
        if is_quiet():
            say(f"prompts go in: {counted(len(lengths), 'sequence')}, {len(engine.decode.lanes):,} of them decode")
    return numbers


def take_turns(contenders: Sequence[Contender], rounds: int, steps: int, label: str, untimed: int = 2) -> None:
    """Let each contender decode `steps` steps a round, after a few that are not timed."""
    for number in counting(range(rounds), label, "round"):
        # Rotated, so that no contender always follows the same one.
        for each in [*contenders[number % len(contenders) :], *contenders[: number % len(contenders)]]:
            with _mode_of(each):
                # What was under way in another mode, and what was started beside it.
                decode_steps(each.engine, untimed)
                before = each.engine.decode.lengths.mean()
                each.rounds.append(decode_steps(each.engine, steps))
                each.tokens.append(float(before + each.engine.decode.lengths.mean()) / 2)
    # Counted now: what is measured next may prepare more steps at once than any engine would.
    for each in contenders:
        each.critical_path_maps = each.engine.cache.stats().critical_path_maps


@contextmanager
def _mode_of(contender: Contender) -> Iterator[None]:
    captured = contender.mode == "captured"
    with torch.compiler.set_stance("default" if captured else "force_eager"):
        contender.engine.decode.captured = captured
        yield


def utilization(contender: Contender) -> DeviceUtilization | None:
    """The device's work in a few steps more; each of them is submitted while the one before is read."""
    with _mode_of(contender):
        decode_steps(contender.engine, 2)
        return device_utilization(
            lambda: sum(record.steps for record in decode_steps(contender.engine, PROFILED)),
            contender.engine.cache.device,
        )


@contextmanager
def observed(engine: Engine) -> Iterator[list[StepRecord]]:
    """Launches meanwhile."""
    records: list[StepRecord] = []
    engine.observer = records.append
    try:
        yield records
    finally:
        engine.observer = None


def decode_steps(engine: Engine, steps: int) -> list[StepRecord]:
    """At least so many decode steps."""
    with observed(engine) as records:
        while sum(record.steps for record in records) < steps:
            engine.step()
    return records


def steps_and_tokens(engine: Engine, steps: int) -> tuple[list[StepRecord], float]:
    """Decode steps behind a few that are not timed, and how many tokens of KV they read in the middle."""
    decode_steps(engine, 4)
    before = float(engine.decode.lengths.sum())
    records = decode_steps(engine, steps)
    return records, (before + float(engine.decode.lengths.sum())) / 2


def cancel_all(engine: Engine) -> None:
    """End all requests; their slots are free afterwards."""
    for number in list(engine.scheduler.requests):
        engine.abort(number)
    while engine.busy:
        engine.step()


@torch.inference_mode()
def device_step_ms(engine: Engine, replays: int = 10) -> float | None:
    """Milliseconds of the device for one captured step of the sequences that an engine is decoding, replayed without
    a pause; None on the host. Their steps are real, but nobody reads their tokens."""
    device = engine.cache.device
    if device.type != "cuda":
        return None
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]  # type: ignore[no-untyped-call]
    for number, _ in enumerate(replayed_steps(engine, replays)):
        events[number].record()
    torch.cuda.synchronize(device)
    return float(median(start.elapsed_time(end) for start, end in pairwise(events)))


@torch.inference_mode()
def replayed_steps(engine: Engine, replays: int) -> Iterator[None]:
    """Replay a captured step of all lanes so many times, each behind a yield; the engine goes on from its records."""
    cache, decode = engine.cache, engine.decode
    engine.pipeline.forget()
    # Lanes of no request, too, begin where the host has them: the device took more steps than it knows of.
    decode.resend()
    cache.prepare_step(decode.lengths_after(2 * replays + 2))
    decode.launch(1)
    for _ in range(replays):
        yield
        decode.runner.replay(decode.bucket)
    engine.pipeline.forget()
    yield


@torch.inference_mode()
def fill_lanes(engine: Engine, context: int, seed: int) -> None:
    """Admit a sequence of `context` tokens for each slot, with random keys and values, and have it decode. Sequences
    are numbered from 0."""
    cache = engine.cache
    torch.manual_seed(seed)
    fill_flat(cache, np.full(cache.shape.num_slots, context))
    for sequence in range(cache.shape.num_slots):
        engine.decode.set_lane(cache.slot_of(sequence), sequence, context + 1, cache.shape.max_seq_len)


def empty_lanes(engine: Engine) -> None:
    """Undo `fill_lanes`."""
    for sequence in range(engine.cache.shape.num_slots):
        engine.decode.clear_lane(engine.cache.slot_of(sequence))
        engine.cache.release(sequence)


# -- the device, by the profiler's record of its kernels and copies ----------------------------------------------------

WORK = {"kernel", "gpu_memcpy", "gpu_memset"}
"""Categories of events, in the profiler's trace, in which the device works."""


@dataclass(frozen=True)
class DeviceUtilization:
    """Milliseconds a step in which the device worked, and pieces of work a step.

    `profiled_step_ms` is how long a step took meanwhile, longer than without a profiler.
    """

    device_busy_ms: float
    work_a_step: float
    profiled_step_ms: float


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the spans, from beginning to end, was under way; some run beside others."""
    whole, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        whole += max(0.0, end - max(begin, until))
        until = max(until, end)
    return whole


def work_of(events: Iterable[dict[str, Any]]) -> list[tuple[float, float]]:
    """Beginnings and ends, in microseconds, of the device's work among the events of a Chrome trace."""
    return [(event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in WORK]


def device_utilization(decode: Callable[[], int], device: torch.device) -> DeviceUtilization | None:
    """Profile `decode`, which returns how many steps it took; None on the host, or where the profiler saw no work.

    As many steps must be submitted meanwhile as it returns.
    """
    if device.type != "cuda":
        return None
    # What is under way already is not of these steps.
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        started = perf_counter()
        steps = decode()
        torch.cuda.synchronize(device)
        wall_s = perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        spans = work_of(json.loads(trace.read_text())["traceEvents"])
    if not spans:
        return None
    return DeviceUtilization(covered(spans) / 1e3 / steps, len(spans) / steps, 1e3 * wall_s / steps)
