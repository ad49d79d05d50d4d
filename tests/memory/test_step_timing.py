"""How far ahead to map follows from what steps and mappings take."""

from __future__ import annotations

import numpy as np

from trtllm_vattn.memory.lookahead import LEAST, StepTimingModel


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(timing: StepTimingModel, clock: Clock, steps: int, seconds: float, each: int = 1) -> None:
    lengths = np.array([10, 0, 30])
    timing.observe_lengths(lengths)
    for _ in range(steps):
        clock.now += seconds
        lengths = np.where(lengths > 0, lengths + each, 0)
        timing.observe_lengths(lengths)


def test_steps_are_timed_by_what_sequences_grow() -> None:
    clock = Clock()
    timing = StepTimingModel(clock)
    run(timing, clock, 20, 0.02)
    assert abs(timing.step_s - 0.02) < 1e-9
    run(timing, clock, 20, 0.02, each=4)
    assert abs(timing.step_s - 0.005) < 1e-9
    assert timing.launch == 4


def test_a_prompt_is_not_a_step() -> None:
    clock = Clock()
    timing = StepTimingModel(clock)
    run(timing, clock, 20, 0.02)
    before = timing.step_s
    clock.now += 1e-6
    timing.observe_lengths(np.array([30, 2000, 50]))
    assert timing.step_s == before


def test_one_short_or_long_step_changes_nothing() -> None:
    clock = Clock()
    timing = StepTimingModel(clock)
    run(timing, clock, 20, 0.02)
    run(timing, clock, 1, 1e-5)
    run(timing, clock, 1, 5.0)
    assert abs(timing.step_s - 0.02) < 1e-9


def test_mapping_is_counted_in_steps_with_something_to_spare() -> None:
    clock = Clock()
    timing = StepTimingModel(clock)
    run(timing, clock, 20, 0.01)
    for _ in range(20):
        timing.observe_mappings(4, 4 * 100e-6)
    assert abs(timing.steps_to_map(128 * 4) - 2 * 5.12) < 1e-9
    assert timing.least == LEAST


def test_slow_mappings_count() -> None:
    timing = StepTimingModel(Clock())
    for _ in range(20):
        timing.observe_mappings(1, 100e-6)
    fast = timing.steps_to_map(4)
    for _ in range(3):
        timing.observe_mappings(1, 400e-6)
    assert abs(timing.steps_to_map(4) - 4 * fast) < 1e-9
    timing.observe_mappings(0, 1.0)
    assert timing.mapping_s == 400e-6


def test_launches_of_many_steps_are_covered() -> None:
    clock = Clock()
    timing = StepTimingModel(clock)
    run(timing, clock, 3, 1.0, each=16)
    assert timing.least == 2 * 16
