"""Times of calls on a device, and the device's clock rate meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import ParamSpec, TypeVar

import numpy as np
import torch

from trtllm_vattn.graphs.capture import captured, replays_ms

P = ParamSpec("P")
T = TypeVar("T")

SPIN_CYCLES = 100_000
"""About 0.05 ms: long beside an event, short beside a step."""


class Timer:
    """Times calls, each without what was submitted before: on a GPU from event to event, on the host by its clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._milliseconds: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, call: Callable[P, T]) -> Callable[P, T]:
        """The same, timed."""

        def by_clock(*arguments: P.args, **options: P.kwargs) -> T:
            started = perf_counter()
            done = call(*arguments, **options)
            self._milliseconds.append(1e3 * (perf_counter() - started))
            return done

        def by_events(*arguments: P.args, **options: P.kwargs) -> T:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            done = call(*arguments, **options)
            end.record()
            self._events.append((start, end))
            return done

        return by_clock if self.device.type == "cpu" else by_events

    def take(self) -> list[float]:
        """Milliseconds of the calls since the last time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        taken = self._milliseconds + [start.elapsed_time(end) for start, end in self._events]
        self._milliseconds, self._events = [], []
        return taken


class Clock:
    """How fast a GPU's multiprocessors run right before calls, which is slower at its limit of power; nothing on the
    host."""

    def __init__(self, device: torch.device) -> None:
        self._spins = Timer(device)

    def before(self, call: Callable[P, T]) -> Callable[P, T]:
        """The same, behind a kernel that spins for a number of cycles."""
        if self._spins.device.type == "cpu":
            return call
        spin = self._spins.timed(lambda: torch.cuda._sleep(SPIN_CYCLES))  # type: ignore[no-untyped-call]

        def behind(*arguments: P.args, **options: P.kwargs) -> T:
            spin()
            return call(*arguments, **options)

        return behind

    def take(self) -> list[float]:
        """Megahertz at the calls since the last time."""
        return [SPIN_CYCLES / (1e3 * ms) for ms in self._spins.take()]


def summarise(samples: Sequence[float]) -> dict[str, float]:
    """Count, mean, standard deviation, extremes and percentiles; all but the count are missing without samples."""
    if not len(samples):
        return {"count": 0}
    values = np.asarray(samples, np.float64)
    p50, p90, p99, p999 = np.percentile(values, [50, 90, 99, 99.9])
    return {
        "count": len(values),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "p99.9": float(p999),
        "max": float(values.max()),
    }


def timed_ms(work: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `repeats` repetitions: of replays of the captured work by CUDA events, or on the host."""
    if device.type == "cuda":
        return replays_ms(captured(work), repeats)
    work()
    took = []
    for _ in range(repeats):
        started = perf_counter()
        work()
        took.append(1e3 * (perf_counter() - started))
    return took


@torch.inference_mode()
def read_limit(size: int = 4 << 30, repeats: int = 30) -> float:
    """Bytes a second that the current card reads: the best of plain reductions over `size` bytes of memory."""
    data = torch.empty(size // 4, dtype=torch.float32, device="cuda").normal_()
    return max(size / (min(replays_ms(captured(work), repeats)) / 1e3) for work in (data.sum, data.amax))
