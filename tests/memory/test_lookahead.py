"""Which slots are due follows from what is left in them and from what steps and mappings take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from trtllm_vattn.memory.arena import Arena
from trtllm_vattn.memory.lookahead import LEAST, Lookahead, StepTimingModel


def lookahead(left: list[int], fixed: int | None = None) -> Lookahead:
    """Over slots of 100 tokens that have so many left; a negative number is a slot without a sequence."""
    lengths = np.where(np.array(left) < 0, 0, 100)
    frontiers = np.where(np.array(left) < 0, 0, 100 + np.array(left))
    layout = SimpleNamespace(num_ranges=4, max_seq_len=1000)
    return Lookahead(cast(Arena, SimpleNamespace(frontiers=frontiers, layout=layout)), lengths, fixed)


def paced(step_s: float, mapping_s: float, launch: int = 1) -> StepTimingModel:
    timing = StepTimingModel()
    timing.step_s, timing.mapping_s, timing.launch = step_s, mapping_s, launch
    return timing


@pytest.mark.parametrize(
    ("step_ms", "mapping_us", "launch", "due"),
    [
        # A slot takes 2 x 4 mappings of 125 us: a tenth of a step of 10 ms, one of 1 ms, five of 0.2 ms.
        (10.0, 125, 1, []),
        (1.0, 125, 1, [4, 1, 2]),
        (0.2, 125, 1, [4, 1, 2, 3]),
        # Slower calls are as good as faster steps.
        (10.0, 125 * 10, 1, [4, 1, 2]),
        # A launch of 4 steps wants 8 tokens there, whatever mapping takes.
        (10.0, 1, 4, [4, 1, 2]),
    ],
)
def test_slots_are_due_as_late_as_mapping_allows(
    step_ms: float, mapping_us: float, launch: int, due: list[int]
) -> None:
    ahead = lookahead([-1, 6, 6, 20, LEAST + 1, 300])
    ahead.timing = paced(step_ms / 1e3, mapping_us / 1e6, launch)
    assert ahead.due().tolist() == due


def test_who_would_be_late_is_served_after_those_with_fewer_left() -> None:
    """Nobody is late alone, but the third one would be if the two before it were not served now."""
    ahead = lookahead([9, 11, 11, 60])
    ahead.timing = paced(1e-3, 250e-6)  # two steps a slot
    assert ahead.due().tolist() == []
    ahead = lookahead([9, 9, 9, 60])
    ahead.timing = paced(1e-3, 250e-6)
    assert ahead.due().tolist() == [0, 1, 2]


def test_with_so_many_served_in_a_step_the_turns_are_theirs() -> None:
    ahead = lookahead([5, 5, 5, 5, 6, 6])
    ahead.timing = paced(1.0, 1e-6)
    assert ahead.due(at_once=100).tolist() == []
    assert ahead.due(at_once=2).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_fixed_lookahead_minds_no_pace() -> None:
    ahead = lookahead([-1, 19, 20, 5], fixed=40)
    ahead.timing = paced(1.0, 1.0)
    assert ahead.due().tolist() == [3, 1]
    assert ahead.tokens == 40


def test_a_slot_that_does_not_get_on_is_left_alone() -> None:
    """Who tries it for ever holds the cache's lock; one whose memory became visible gives way to the next."""
    ahead = lookahead([1, 2])
    tried: list[int] = []

    def grow(wants: dict[int, int], wait: bool, ahead: bool) -> int:
        (slot,) = wants
        tried.append(slot)
        assert len(tried) < 9
        if visible:
            frontiers[slot] += 500
        return 0

    frontiers = ahead.arena.frontiers
    ahead.arena.slots = [SimpleNamespace(broken=False)] * 2  # type: ignore[list-item]
    ahead.arena.grow = grow  # type: ignore[method-assign, assignment]
    visible = False
    assert ahead.map_due() == 0
    assert tried == [0]
    visible = True
    assert ahead.map_due() == 0
    assert tried == [0, 0, 1]
