"""Taking memory back: from slots without a sequence, from running ones what their sequence does not need, for somebody
who needs it now, for a smaller budget, or for the driver. Nothing is unmapped before its fence is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import monotonic
from typing import TYPE_CHECKING

from trtllm_vattn.errors import ConfigError, OutOfPages
from trtllm_vattn.memory.slot import RUNNING

if TYPE_CHECKING:
    from trtllm_vattn.memory.arena import Arena
    from trtllm_vattn.vmm.base import Fence
    from trtllm_vattn.vmm.owners import Mapping


HEADROOM = 8
"""Memory is short where less than this part of the budget would be free."""


def is_short_for(arena: Arena, need: int) -> bool:
    """Whether little would be free once a sequence has so many bytes in each range."""
    free = arena.pool.available_bytes + arena.parked_bytes - need * arena.layout.num_ranges
    return free < arena.pool.budget // HEADROOM


def make_available(arena: Arena, size: int, wait: bool = True) -> None:
    """Have the pool able to hand out `size` bytes, by unmapping what is leaving or parked. Raises OutOfPages.

    Without `wait`, only what no fence holds back.
    """
    pool = arena.pool
    short = size - pool.available_bytes
    if short > 0:
        arena.settle(wait)
        short = size - pool.available_bytes
    if short <= 0:
        return
    parked = sum(arena.slots[index].mapped for index in _reclaimable(arena, wait)) * arena.layout.num_ranges
    if short > parked:
        raise OutOfPages(
            f"{size:,} bytes asked for; of a budget of {pool.budget:,} only {pool.available_bytes:,} are free and "
            f"{parked:,} parked; release or preempt a sequence, or raise the budget"
        )
    reclaim(arena, short, wait)


def reclaim(arena: Arena, size: int, wait: bool = True) -> int:
    """Unmap at least `size` bytes of parked slots if there are so many, the longest-parked first; returns the bytes
    given to the pool."""
    given = 0
    for index in _reclaimable(arena, wait):
        slot = arena.slots[index]
        while slot.columns and given < size:
            if slot.fence is not None:
                slot.fence.wait()
            given += arena.unmap_tail(index)
    return given


def _reclaimable(arena: Arena, wait: bool) -> list[int]:
    idle = arena.idle_slots()
    if wait:
        return idle
    fences = {index: arena.slots[index].fence for index in idle if arena.slots[index].columns}
    return [index for index, fence in fences.items() if fence is None or fence.done()]


def take_surplus(arena: Arena, size: int, needed: Sequence[int], fence: Fence) -> bool:
    """Unmap at least `size` bytes that running slots have beyond the tokens they need, from the longest-running first,
    once `fence` is done; nothing where there are not so many. Returns whether there were.

    Parameters
    ----------
    needed : sequence of int
        Tokens, of each slot but the dummy.
    fence : Fence
        Recorded after all work that was submitted with the present frontiers.
    """
    plan = []
    found = 0
    for index, column in _surplus(arena, needed):
        if found >= size:
            break
        found += _own_bytes(column)
        plan.append(index)
    if found < size:
        return False
    fence.wait()
    for index in plan:
        arena.unmap_tail(index)
    return True


def drop_surplus(arena: Arena, needed: Sequence[int], fence: Fence) -> int:
    """Unmap, once `fence` is done, all that running slots have in whole mappings beyond the tokens they need; returns
    the bytes given to the pool."""
    plan = [index for index, _ in _surplus(arena, needed)]
    if plan:
        fence.wait()
    return sum(arena.unmap_tail(index) for index in plan)


def trim(arena: Arena, most: int = 1) -> bool:
    """Unmap what slots withhold from their sequences, `most` extents a range, where the fence is done that was recorded
    when it was parked: nobody has touched it since. Returns whether there was any."""
    left = most
    for index in sorted(arena.withheld):
        slot = arena.slots[index]
        if slot.fence is None or slot.fence.done():
            while left and slot.columns and slot.mapped - slot.columns[-1][0].size >= (slot.offered or slot.mapped):
                arena.unmap_tail(index)
                left -= 1
            if not left:
                break
            arena.offer(index, slot.mapped)
    return left < most


def fit(arena: Arena, index: int, tokens: int) -> int:
    """Leave a slot that was just occupied exactly the memory of `tokens`; returns the mappings made.

    What lies in it is nobody's yet. Raises OutOfPages or DriverError; the slot is free then.
    """
    slot, need = arena.slots[index], arena.layout.bytes_for(tokens)
    if slot.mapped > need and slot.fence is not None:
        slot.fence.wait()
    while slot.mapped > need:
        arena.unmap_tail(index)
    try:
        return arena.grow({index: tokens})
    except BaseException:
        arena.set_idle(index)
        raise


def surplus_bytes(arena: Arena, needed: Sequence[int]) -> int:
    """Bytes that running slots have beyond the tokens they need, for `take_surplus` to take."""
    return sum(_own_bytes(column) for _, column in _surplus(arena, needed))


def _surplus(arena: Arena, needed: Sequence[int]) -> Iterator[tuple[int, list[Mapping]]]:
    running = [index for index, slot in enumerate(arena.touched) if slot.state is RUNNING]
    for index in sorted(running, key=lambda index: arena.slots[index].since):
        left, least = arena.slots[index].mapped, arena.layout.bytes_for(max(1, int(needed[index])))
        for column in reversed(arena.slots[index].columns):
            left -= column[0].size
            if left < least:
                break
            yield index, column


def _own_bytes(column: list[Mapping]) -> int:
    """Of what no other slot shares."""
    return sum(mapping.size for mapping in column if mapping.extent.mappings == 1)


def set_budget(arena: Arena, budget: int) -> None:
    """Raise or lower the bytes held; parked memory beyond it is unmapped and released.

    Raises ConfigError for less than the dummy slot has, OutOfPages where running slots have more; nothing changed.
    """
    pool, least = arena.pool, arena.layout.least_bytes
    if budget < least:
        raise ConfigError(f"the budget is {budget:,} bytes, the dummy slot alone takes {least:,}; raise the budget")
    if budget < pool.held_bytes:
        arena.settle(wait=True)
        stuck = sum(extent.size for extent in pool.quarantine)
        used = pool.held_bytes - pool.stock_bytes - arena.parked_bytes
        if used > budget:
            raise OutOfPages(
                f"a budget of {budget:,} bytes asked for, but running slots hold {used - stuck:,} and {stuck:,} "
                "could not be released; release or preempt a sequence first"
            )
        reclaim(arena, pool.held_bytes - pool.stock_bytes - budget)
    pool.set_budget(budget)


def return_idle(arena: Arena, older_than_s: float, floor: int) -> bool:
    """Give one extent a range, or one of the stock, back to the driver, if it has been idle for long; whether it did.

    Stock beyond what is kept on purpose goes first, then the tail of the longest-parked slot, if that has been parked
    for `older_than_s` seconds; parked and stocked memory of `floor` bytes in all stays.
    """
    pool = arena.pool
    if arena.parked_bytes + pool.stock_bytes <= floor:
        return False
    if pool.shrink():
        return True
    for index in _reclaimable(arena, wait=False):
        slot = arena.slots[index]
        if monotonic() - slot.since > older_than_s:
            arena.unmap_tail(index)
            return True
    return False
