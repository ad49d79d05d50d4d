"""Taking memory back that is parked, or that running sequences do not need: for a smaller budget, for a sequence that
needs it now, or for the driver. Nothing is unmapped before its fence is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import monotonic

from trtllm_vattn.errors import ConfigError, KVCacheOutOfMemory
from trtllm_vattn.memory.arena import Arena
from trtllm_vattn.memory.slot import RUNNING, RangeGroup, Stripe
from trtllm_vattn.vmm.base import Fence


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
    for index, group, stripe in _surplus(arena, needed):
        if found >= size:
            break
        found += _unshared_bytes(stripe)
        plan.append((index, group))
    if found < size:
        return False
    fence.wait()
    for index, group in plan:
        arena.unmap_tail(index, group)
    return True


def drop_surplus(arena: Arena, needed: Sequence[int], fence: Fence) -> int:
    """Unmap, once `fence` is done, all stripes that running slots have beyond the tokens they need; returns the bytes
    released to the pool."""
    plan = [(index, group) for index, group, _ in _surplus(arena, needed)]
    if plan:
        fence.wait()
    return sum(arena.unmap_tail(index, group) for index, group in plan)


def surplus_bytes(arena: Arena, needed: Sequence[int]) -> int:
    """Bytes that running slots have beyond the tokens they need, for `take_surplus` to take."""
    return sum(_unshared_bytes(stripe) for _, _, stripe in _surplus(arena, needed))


def _surplus(arena: Arena, needed: Sequence[int]) -> Iterator[tuple[int, RangeGroup, Stripe]]:
    running = [index for index, slot in enumerate(arena.used_slots) if slot.state is RUNNING]
    for index in sorted(running, key=lambda index: arena.slots[index].since):
        for group in arena.slots[index].groups:
            least = arena.layout.bytes_for(max(1, group.held(int(needed[index]))))
            left = group.frontier
            for stripe in reversed(group.stripes):
                left -= stripe[0].size
                if left < least:
                    break
                yield index, group, stripe


def _unshared_bytes(stripe: Stripe) -> int:
    return sum(mapping.size for mapping in stripe if mapping.extent.mappings == 1)


def trim(arena: Arena, most: int = 1) -> bool:
    """Unmap what is not visible to sequences, at most `most` stripes, of slots whose fence is done that was recorded
    when the memory was parked: nobody has touched it since. Returns whether there was any."""
    left = most
    for index in sorted(arena.trim_pending):
        slot = arena.slots[index]
        if slot.fence is None or slot.fence.done():
            visible = slot.frontier if slot.visible_bytes is None else slot.visible_bytes
            for group in slot.groups:
                while left and group.ends_behind(visible):
                    arena.unmap_tail(index, group)
                    left -= 1
            if not left:
                break
            arena.extend_visible(index, slot.frontier)
    return left < most


def set_budget(arena: Arena, budget: int) -> None:
    """Raise or lower the bytes held; parked memory beyond it is unmapped and given back to the driver.

    Raises ConfigError for less than the dummy slot has, KVCacheOutOfMemory where running slots have more; nothing
    changed.
    """
    pool, least = arena.pool, arena.layout.least_bytes
    if budget < least:
        raise ConfigError(f"the budget is {budget:,} bytes, the dummy slot alone takes {least:,}; raise the budget")
    if budget < pool.held_bytes:
        arena.complete_pending_unmaps(wait=True)
        stuck, used = pool.quarantined_bytes, arena.used_bytes - arena.evictable_bytes
        if used > budget:
            raise KVCacheOutOfMemory(
                f"a budget of {budget:,} bytes asked for, but running slots, and what they read, hold "
                f"{used - stuck:,} and {stuck:,} could not be released; release or preempt a sequence first"
            )
        arena.reclaim(pool.held_bytes - pool.free_bytes - budget)
    pool.set_budget(budget)


def give_part(arena: Arena, size: int, retained: bool) -> int:
    """Give parked memory, and `retained` memory too, of some `size` bytes back to the driver, and have the budget be
    what is held then; returns the bytes given back, 0 where there are none.

    Small extents are kept for running sequences to grow into, two for each of their ranges, as long as there is
    anything else: no other can be had of a broker that wants memory back. Waits for the fences of what it unmaps.
    """
    pool, given = arena.pool, 0
    running = sum(slot.state is RUNNING for slot in arena.used_slots)
    spare = 2 * running * arena.layout.num_ranges
    arena.complete_pending_unmaps(wait=True)
    while given < size:
        given += (now := pool.give_back(size - given, spare))
        if given >= size or now:
            continue
        # Of one slot after another: what is released is looked at before more is.
        reclaim = arena.reclaim if retained else arena.reclaim_parked
        if not reclaim(size - given):
            # Where retained memory may be given back later, who runs needs its small extents until then.
            return given or (pool.give_back(size, 0) if retained or not arena.retained_slots else 0)
    return given


def release_idle(arena: Arena, older_than_s: float, floor: int) -> bool:
    """Give one free extent back to the driver, or release the last stripe of a slot to the pool, where that was idle
    for long; returns whether it did.

    Free extents beyond their targets go first, then the tail of the longest-parked slot, if that has been parked for
    `older_than_s` seconds; parked and free memory of `floor` bytes in all stays.
    """
    pool = arena.pool
    if arena.parked_bytes + pool.free_bytes <= floor:
        return False
    if pool.shrink():
        return True
    for index in arena.reclaimable(wait=False):
        if monotonic() - arena.slots[index].since > older_than_s:
            arena.unmap_tail(index)
            return True
    return False
