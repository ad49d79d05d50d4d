"""Memory of running slots beyond their need: what is adopted or mapped ahead, and somebody else is promised.

An arena leaves it where it is while memory is plenty. Who answers "how many blocks are free?" from the needs of
sequences alone, as TensorRT-LLM's scheduler must be answered, has to be able to take it back.
"""

from __future__ import annotations

from collections.abc import Mapping as MappingType

from trtllm_vattn.memory.arena import Arena
from trtllm_vattn.vmm.base import Fence


def fit(arena: Arena, slot: int, tokens: int) -> int:
    """Leave a slot that was just occupied exactly the memory of `tokens`; returns the mappings made.

    What lies in it is nobody's yet. Raises OutOfPages or DriverError; the slot is free then.
    """
    need, fence = arena.layout.bytes_for(tokens), arena.slots[slot].fence
    if arena.slots[slot].mapped > need and fence is not None:
        fence.wait()
    while arena.slots[slot].mapped > need:
        arena.unmap_tail(slot)
    try:
        return arena.grow({slot: tokens})
    except BaseException:
        arena.set_idle(slot)
        raise


def drop_tails(arena: Arena, needs: MappingType[int, int], fence: Fence) -> int:
    """Unmap, once `fence` is done, what slots have in whole extents behind the tokens they need; returns the bytes."""
    given = 0
    for slot, tokens in needs.items():
        need = arena.layout.bytes_for(tokens)
        columns = arena.slots[slot].columns
        while columns and arena.slots[slot].mapped - columns[-1][0].size >= need:
            fence.wait()
            given += arena.unmap_tail(slot)
    return given
