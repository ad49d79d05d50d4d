"""Whose turn it is: priorities, deadlines, and that nobody waits for ever; arrivals in virtual time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache as remember
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.arrivals import Arrival, VirtualClock, replay_arrivals
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.request import RequestState
from trtllm_vattn.runtime.request_queue import RequestQueue
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.scheduler import choose_preemption

PROMPTS = [np.random.default_rng(n).integers(0, 512, n).tolist() for n in (5, 30, 12, 20, 9, 17)]


@remember
def model_of() -> PreTrainedModel:
    return load_model("tiny-llama", "cpu", torch.float32)


Build = Callable[..., Engine]


@pytest.fixture
def build() -> Iterator[Build]:
    with ExitStack() as closing:

        def make(slots: int = 1, budget: int | None = None, **options: Any) -> Engine:
            cache = make_cache("vattn", shape_of(model_of(), slots, 64), "cpu", budget)
            closing.callback(cache.close)
            engine = Engine(model_of(), cache, **{"compile": False, "capture": False, "chunk": 16, **options})
            closing.callback(engine.close)
            return engine

        yield make


def ends(engine: Engine) -> list[int]:
    """Requests in the order in which they end."""
    return [event.request for event in engine.run() if event.finish_reason]


def test_higher_priorities_and_earlier_deadlines_go_first(build: Build) -> None:
    engine = build()
    params = SamplingParams(3)
    running = engine.submit(PROMPTS[0], params)
    engine.step()
    usual = engine.submit(PROMPTS[1], params)
    later = engine.submit(PROMPTS[2], params, deadline_s=2000)
    sooner = engine.submit(PROMPTS[3], params, deadline_s=1000)
    high = engine.submit(PROMPTS[4], params, priority=np.int64(5))
    low = engine.submit(PROMPTS[5], params, priority=-1, deadline_s=10)
    assert ends(engine) == [running, high, sooner, later, usual, low]


def test_a_prompt_of_higher_priority_overtakes_those_that_go_in(build: Build) -> None:
    engine = build(slots=4, chunk=8)
    long = [engine.submit(PROMPTS[1], SamplingParams(1)) for _ in range(3)]
    engine.step()
    high = engine.submit(PROMPTS[4], SamplingParams(1), priority=1)
    assert ends(engine)[0] == high
    assert not engine.scheduler.requests
    assert len(long) == 3


def test_who_would_be_last_is_preempted(build: Build) -> None:
    engine = build(slots=3)
    numbers = [engine.submit(PROMPTS[0], SamplingParams(30), priority=priority) for priority in (1, 0, 2)]
    for _ in range(4):
        engine.step()
    order = []
    while engine.scheduler.holders:
        before = {request.id for request in engine.scheduler.holders}
        engine.scheduler.preempt_youngest()
        order += before - {request.id for request in engine.scheduler.holders}
    assert order == [numbers[1], numbers[0], numbers[2]]
    request = engine.scheduler.requests[numbers[0]]
    assert choose_preemption(request) == "recompute"
    assert request.prefilled == 0


def test_a_passed_deadline_ends_who_waits_and_who_runs(build: Build) -> None:
    clock = VirtualClock()
    engine = build(clock=clock)
    runs = engine.submit(PROMPTS[0], SamplingParams(50), deadline_s=5)
    tokens = [event for _ in range(4) for event in engine.step()]
    waits = engine.submit(PROMPTS[1], SamplingParams(3), deadline_s=2)
    stays = engine.submit(PROMPTS[2], SamplingParams(3))
    clock.now = 2.0
    events = engine.step()
    assert [(e.request, e.token, e.finish_reason) for e in events if e.finish_reason] == [(waits, None, "deadline")]
    tokens += [event for event in events if event.request == runs]
    clock.now = 5.0
    rest = list(engine.run())
    (end,) = [event for event in rest if event.request == runs and event.finish_reason]
    assert (end.token, end.finish_reason, end.index) == (None, "deadline", len(tokens))
    assert [event.finish_reason for event in rest if event.request == stays] == [None, None, "length"]
    assert engine.cache.stats().sequences == 0
    assert not engine.busy
    # One that ended in time is not heard of again.
    engine.submit(PROMPTS[2], SamplingParams(2), deadline_s=1)
    assert [event.finish_reason for event in engine.run()] == [None, "length"]
    clock.now = 100.0
    assert engine.step() == []


@given(
    loads=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 3)), min_size=40, max_size=60),
    max_wait=st.floats(1.0, 20.0),
    slots=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_nobody_waits_for_ever_under_endless_load(
    loads: list[tuple[int, int, int]], max_wait: float, slots: int
) -> None:
    """A server of a few slots, each step of which takes a second; requests of higher priority never end."""
    clock = VirtualClock(1.0)
    queue = RequestQueue(clock, max_wait)
    ids = iter(range(1 << 30))
    running: list[int] = []

    def come(priority: int, steps: int, within: int) -> RequestState:
        deadline = clock() + within if within else math.inf
        made = RequestState(next(ids), [1], SamplingParams(), steps, priority=priority, deadline=deadline)
        made.arrived = clock()
        queue.add(made)
        return made

    low = come(0, 1, 0)
    served: list[float] = []
    turn = 0
    while low in queue:
        for _ in range(slots + 1):
            priority, steps, within = loads[turn % len(loads)]
            come(priority, steps, within)
            turn += 1
        running = [left - 1 for left in running if left > 1]
        while len(running) < slots and queue:
            first = queue.first
            queue.remove(first)
            served.append(clock())
            running.append(first.max_tokens)
        clock.sleep(1.0)
        assert clock() < 1000
    # It is the oldest: it goes with the first slot that is free behind its wait.
    assert max_wait <= clock() <= max_wait + 6
    assert served


def test_a_request_of_low_priority_is_served_while_higher_ones_come_for_ever(build: Build) -> None:
    clock = VirtualClock(1.0)
    engine = build(clock=clock, max_wait_s=20)
    low = engine.submit(PROMPTS[0], SamplingParams(2))
    numbers = []
    for _ in range(100):
        numbers.append(engine.submit(PROMPTS[4], SamplingParams(2), priority=1))
        events = engine.step()
        clock.sleep(clock.step_s)
        if any(event.request == low and event.finish_reason for event in events):
            break
    else:
        pytest.fail("it was never served")
    assert clock() >= 20
    assert engine.scheduler.waiting


def test_arrivals_come_at_their_times_and_give_the_same_events_each_time(build: Build) -> None:
    arrivals = [
        Arrival(0.0, PROMPTS[1], SamplingParams(6, temperature=0.9, seed=3)),
        Arrival(0.005, PROMPTS[0], SamplingParams(4)),
        Arrival(0.02, PROMPTS[2], SamplingParams(9), deadline_s=0.03),
        Arrival(5.0, PROMPTS[3], SamplingParams(3), priority=2),
    ]
    seen = []
    for _ in range(2):
        clock = VirtualClock(0.01)
        engine = build(slots=2, clock=clock)
        seen.append(list(replay_arrivals(engine, arrivals, clock)))
    assert seen[0] == seen[1]
    first = {event.request: at for at, event in reversed(seen[0])}
    assert all(first[number] > each.at_s for number, each in enumerate(arrivals) if number != 2)
    assert first[3] >= 5.0
    assert {event.request: event.finish_reason for _, event in seen[0] if event.finish_reason} == {
        0: "length",
        1: "length",
        2: "deadline",
        3: "length",
    }
    real = build(slots=2)
    events = list(replay_arrivals(real, [Arrival(0.0, PROMPTS[0], SamplingParams(4)), Arrival(0.05, PROMPTS[0])][:1]))
    assert [event.token for _, event in events] == [e.token for _, e in seen[0] if e.request == 1]
    assert [at for at, _ in events] == sorted(at for at, _ in events)


def test_what_cannot_work_is_refused(build: Build) -> None:
    engine = build()
    for options, message in (
        ({"priority": 0.5}, "priority is 0.5; it is a whole number"),
        ({"deadline_s": 0}, "deadline_s is 0; it is a positive number of seconds"),
        ({"deadline_s": math.nan}, "deadline_s is nan"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine.submit([1], **options)  # type: ignore[arg-type]
    assert not engine.busy
    for options, message in (
        ({"max_step_tokens": 0}, "max_step_tokens is 0; it is a whole number"),
        ({"target_itl_ms": -1}, "target_itl_ms is -1.0; it is a positive number of milliseconds"),
        ({"max_wait_s": 0}, "max_wait_s is 0.0; it is a positive number of seconds"),
        ({"clock": 3}, r"clock is an int \(3\); give a function"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(**options)
    with pytest.raises(ConfigError, match="counts time by another clock"):
        replay_arrivals(engine, [], VirtualClock())
    with pytest.raises(ConfigError, match="counts time by another clock"):
        # Which nobody would move on.
        replay_arrivals(build(clock=VirtualClock()), [Arrival(1.0, [1])])
    for times in ([1.0, 0.5], [-1.0]):
        with pytest.raises(ConfigError, match="not in the order of their times"):
            replay_arrivals(engine, [Arrival(at, [1]) for at in times])
    with pytest.raises(ConfigError, match="step_s is 0"):
        VirtualClock(0)
