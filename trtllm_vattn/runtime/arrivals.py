"""Requests submitted at the times of a trace, in real time or in virtual time, which is deterministic."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.request import TokenEvent
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.tokens import TokenIds
from trtllm_vattn.values import finite

if TYPE_CHECKING:
    from trtllm_vattn.runtime.engine import Engine


@dataclass(frozen=True)
class Arrival:
    """A request that comes `at_s` seconds after the replay begins; the rest as `Engine.submit` takes it."""

    at_s: float
    prompt: TokenIds
    params: SamplingParams | None = None
    priority: int = 0
    deadline_s: float | None = None


class VirtualClock:
    """Seconds that pass only as somebody says: give it to `Engine` as `clock`, and to `replay_arrivals`.

    Parameters
    ----------
    step_s : float
        Seconds that a step of the engine takes.
    """

    def __init__(self, step_s: float = 0.01) -> None:
        if finite("step_s", step_s) <= 0:
            raise ConfigError(f"step_s is {step_s}; it is a positive number of seconds")
        self.now, self.step_s = 0.0, float(step_s)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


def replay_arrivals(
    engine: Engine, arrivals: Iterable[Arrival], clock: VirtualClock | None = None
) -> Iterator[tuple[float, TokenEvent]]:
    """Submit requests at their times and run the engine to the end of the last; yields each event with the seconds
    since the beginning.

    In virtual time each step takes `VirtualClock.step_s`, so that the same arrivals give the same events at the same
    times. The engine has to be built with the same clock. Without one, time is real.

    Raises ConfigError where an arrival's time is not a finite number, or comes before the one before it; and what
    `Engine.submit` raises.
    """
    if engine.clock is not (clock or engine.clock) or (clock is None and isinstance(engine.clock, VirtualClock)):
        raise ConfigError("the engine counts time by another clock; give the same one to both, or to neither")
    coming = list(arrivals)
    times = [finite("at_s", each.at_s) for each in coming]
    if times != sorted(times) or (times and times[0] < 0):
        raise ConfigError("arrivals are not in the order of their times, from 0 on; sort them by at_s")
    return _replay(engine, coming, clock)


def _replay(engine: Engine, coming: list[Arrival], clock: VirtualClock | None) -> Iterator[tuple[float, TokenEvent]]:
    now, sleep = engine.clock, time.sleep if clock is None else clock.sleep
    began, place = now(), 0
    while place < len(coming) or engine.busy:
        while place < len(coming) and now() >= began + coming[place].at_s:
            each = coming[place]
            engine.submit(each.prompt, each.params, priority=each.priority, deadline_s=each.deadline_s)
            place += 1
        if not engine.busy:
            sleep(max(0.0, coming[place].at_s - (now() - began)))
            # Seconds do not add up exactly.
            if clock is not None:
                clock.now = max(clock.now, began + coming[place].at_s)
            continue
        events = engine.step()
        if clock is not None:
            clock.sleep(clock.step_s)
        at = now() - began
        yield from ((at, event) for event in events)
