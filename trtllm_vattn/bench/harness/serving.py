"""Requests served by an engine as they arrive, and what is reported of it, in the words of vLLM's `bench serve`.

Latencies count from the moment at which a request was due, whoever serves it, so that what it waits before anybody
looks at it counts too.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter, sleep
from typing import Any

import numpy as np

from trtllm_vattn.bench.harness.timing import summarise
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.progress import Progress
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams

SUBMITTED_AT_ONCE = 16
"""Requests between two steps at most, so that the device has something to do while the others are submitted."""
LATENCIES = ("ttft", "tpot", "itl", "e2el")
PERCENTILES = (90, 99)


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which `count` requests arrive, as vLLM's `bench serve` defines them.

    Gaps are gamma-distributed with shape `burstiness` and scale ``1 / (rate * burstiness)``: 1 is a Poisson process,
    less comes in bursts, more is even, infinity exactly so. The times are then scaled so that the last request
    arrives at ``count / rate``. An infinite rate is all at once.
    """
    if math.isinf(rate):
        return [0.0] * count
    if math.isinf(burstiness):
        gaps = np.full(count, 1 / rate)
    else:
        gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), count)
    times = gaps.cumsum()
    # A shape near 0 makes gaps that are all 0.
    return (times * (count / rate / times[-1]) if times[-1] else times).tolist()  # type: ignore[no-any-return]


class Clock:
    """Seconds since it was made. Where nothing runs, the next arrival is slept for, or with `virtual` skipped to."""

    def __init__(self, virtual: bool = False) -> None:
        self._virtual = virtual
        self._started = perf_counter()

    def now(self) -> float:
        return perf_counter() - self._started

    def wait_until(self, time_s: float) -> None:
        left = max(0.0, time_s - self.now())
        if self._virtual:
            self._started -= left
        else:
            sleep(left)


@dataclass(frozen=True)
class Load:
    """Requests to serve: token ids, how many tokens each asks for, and when each arrives, in order."""

    prompts: Sequence[Sequence[int]]
    outputs: Sequence[int]
    arrivals: Sequence[float]


@dataclass
class Served:
    """When each request's tokens came, in seconds from the start, and which requests failed, in the load's order."""

    times: list[list[float]]
    failed: list[bool]
    seconds: float
    running: list[int] = field(default_factory=list)
    """Sequences that decoded after each step; nobody can look into a peer."""


@contextmanager
def quiet_heap() -> Iterator[None]:
    """What was there before is not looked at for garbage meanwhile: of a process that has loaded a model that takes
    hundreds of milliseconds, which would be some step's."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def serve(engine: Engine, load: Load, virtual: bool = False, label: str = "") -> Served:
    """Submit requests as they arrive and step until all have ended; `virtual` as `Clock` has it."""
    count = len(load.prompts)
    numbers: dict[int, int] = {}
    served = Served([[] for _ in range(count)], [False] * count, 0.0)
    with quiet_heap(), Progress(label, count, "request") as bar:
        # Not before: looking through the heap takes longer than a first token.
        clock = Clock(virtual)
        while len(numbers) < count or engine.busy:
            most = min(count, len(numbers) + SUBMITTED_AT_ONCE)
            while len(numbers) < most and load.arrivals[len(numbers)] <= clock.now():
                index = len(numbers)
                wanted = SamplingParams(max_tokens=load.outputs[index], ignore_eos=True)
                numbers[engine.submit(load.prompts[index], wanted)] = index
            if not engine.busy:
                clock.wait_until(load.arrivals[len(numbers)])
                continue
            events = engine.step()
            now = clock.now()
            for event in events:
                if event.token is None:
                    served.failed[numbers[event.request]] = True
                else:
                    served.times[numbers[event.request]].append(now)
                bar.update(event.finish_reason is not None)
            served.running.append(len(engine.scheduler.decoding))
        served.seconds = clock.now()
    return served


def report(load: Load, served: Served, goodput: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What vLLM's `bench serve` reports, by its names, and each latency's whole summary as ``ttft_ms`` and so on.

    Parameters
    ----------
    goodput : mapping of str to float, or None
        Milliseconds by latency (ttft, tpot, e2el); ``request_goodput`` is the requests a second that are within all of
        them, where TPOT of a single token is 0; None where nothing is asked for.
    """
    whole = [i for i, failed in enumerate(served.failed) if not failed and served.times[i]]
    samples: dict[str, list[float]] = {name: [] for name in LATENCIES}
    good = 0
    for i in whole:
        seen, due = served.times[i], load.arrivals[i]
        each = {
            "ttft": 1e3 * (seen[0] - due),
            "tpot": 1e3 * (seen[-1] - seen[0]) / (len(seen) - 1) if len(seen) > 1 else 0.0,
            "e2el": 1e3 * (seen[-1] - due),
        }
        good += all(each[name] <= most for name, most in (goodput or {}).items())
        for name, value in each.items():
            if name != "tpot" or len(seen) > 1:
                samples[name].append(value)
        samples["itl"] += (1e3 * np.diff(seen)).tolist()
    tokens = sum(len(served.times[i]) for i in whole)
    prompt_tokens = sum(len(load.prompts[i]) for i in whole)
    found: dict[str, Any] = {
        "duration": served.seconds,
        "completed": len(whole),
        "failed": len(served.failed) - len(whole),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": tokens,
        "request_throughput": len(whole) / served.seconds,
        "request_goodput": good / served.seconds if goodput else None,
        "output_throughput": tokens / served.seconds,
        "total_token_throughput": (tokens + prompt_tokens) / served.seconds,
    }
    for name, values in samples.items():
        found.update(_named(name, values))
        found[f"{name}_ms"] = summarise(values)
    return found


def _named(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean, median, deviation and percentiles by vLLM's names; 0 without samples, as there."""
    values = values or [0.0]
    found = {
        f"mean_{name}_ms": float(np.mean(values)),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(np.std(values)),
    }
    return found | {f"p{p}_{name}_ms": float(np.percentile(values, p)) for p in PERCENTILES}


def over_time(load: Load, served: Served, most: int = 400) -> dict[str, list[float]]:
    """Output tokens a second, and requests that have arrived and not ended, over the run: in stretches of a second, or
    of longer where there would be more than `most`, or of a hundredth of a run that is short."""
    width = max(min(1.0, served.seconds / 100), served.seconds / most)
    edges = np.arange(0, served.seconds + width, width)
    tokens = np.concatenate([np.asarray(seen) for seen in served.times]) if served.times else np.empty(0)
    came = np.sort(load.arrivals)
    ended = np.sort([seen[-1] for seen in served.times if seen])
    middles = edges[:-1] + width / 2
    return {
        "time_s": middles.tolist(),
        "output_tokens_per_s": (np.histogram(tokens, edges)[0] / width).tolist(),
        "concurrent_requests": (np.searchsorted(came, middles) - np.searchsorted(ended, middles)).tolist(),
    }


def check_goodput(objectives: Sequence[tuple[str, float]] | None) -> dict[str, float]:
    """Objectives by name, out of ``--goodput``. Raises ConfigError where one comes twice."""
    objectives = objectives or []
    found = dict(objectives)
    if len(found) < len(objectives):
        raise ConfigError(f"--goodput has {', '.join(name for name, _ in objectives)}; give each of them once")
    return found
