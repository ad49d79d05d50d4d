"""How well does memory lie? Neighbours in a slot that were created one after another tend to be neighbours in physical
memory, which random reads over more than about 64 GB feel (README, TLB reach)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trtllm_vattn.memory.arena import Arena


@dataclass(frozen=True)
class Placement:
    """`neighbours` are pairs of mappings that follow one another in a slot; `ascending` of them are in the order of
    their creation, `adjacent` were created one right after the other."""

    mappings: int
    neighbours: int
    ascending: int
    adjacent: int


def placement(arena: Arena) -> Placement:
    """Of all that is mapped in slots, parked ones too."""
    mappings = 0
    steps = []
    for slot in arena.slots[:-1]:
        for row in zip(*slot.columns, strict=True):
            mappings += len(row)
            steps += [after.extent.serial - before.extent.serial for before, after in pairwise(row)]
    return Placement(mappings, len(steps), sum(step > 0 for step in steps), sum(step == 1 for step in steps))
