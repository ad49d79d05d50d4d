"""How long calls take on a device, and how fast its clock runs meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import ParamSpec, TypeVar

import torch

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
