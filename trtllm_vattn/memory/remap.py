"""Changing the memory beneath a sequence: moving it to another slot, sharing its beginning with a new sequence, putting
other physical memory under it.

Nothing here waits for the device but `replace`, and nothing unmaps before a fence. Every operation succeeds whole or
leaves the state as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack

from trtllm_vattn.errors import ConfigError, DriverError, MemoryQuarantined
from trtllm_vattn.memory.arena import ATTEMPTS, Arena
from trtllm_vattn.memory.slot import Stripe
from trtllm_vattn.vmm.base import Fence
from trtllm_vattn.vmm.owners import RollbackFailed

logger = logging.getLogger(__name__)


def move(arena: Arena, source: int, target: int, record: Callable[[], Fence]) -> int:
    """Give a running slot's memory, and its state, to a free slot; returns the mappings made.

    The memory is mapped at both addresses for a while (rule R5); the old ones are unmapped once `record()`'s fence is
    done. Raises ConfigError where the target is not free, or DriverError; nothing changed.
    """
    _empty(arena, target)
    slot = arena.slots[source]
    (group,) = slot.groups
    lower, visible = group.lower, slot.visible_bytes
    fence = record()
    with ExitStack() as undo:
        stripes = _alias(arena, group.stripes, target, lower, undo)
        undo.pop_all()
    for mapping in slot.mappings():
        arena.incref(mapping.extent)
    arena.stop(source)
    arena.begin_unmap(source, fence)
    arena.start(target, stripes, lower)
    arena.set_visible(target, visible)
    return len(stripes) * len(group.ranges)


def fork(arena: Arena, source: int, tokens: int, target: int) -> int:
    """Have a free slot back `tokens` tokens: by the mappings of a running slot that lie wholly below them, which both
    share then, and by memory of its own behind those. Returns up to which byte of a range the memory is shared.

    Where the source's lower edge is raised, so is the target's.
    Raises ConfigError where the target is not free or all of `tokens` lie below the lower edge, KVCacheOutOfMemory or
    DriverError; nothing changed.
    """
    (group,) = arena.slots[source].groups
    if tokens <= (edge := arena.lower_edge(source)):
        raise ConfigError(f"slot {source} backs tokens from {edge} on, so its first {tokens} cannot be forked")
    _empty(arena, target)
    shared: list[Stripe] = []
    end = group.lower
    for stripe in group.stripes:
        if end + stripe[0].size > arena.layout.whole_bytes(tokens):
            break
        shared.append(stripe)
        end += stripe[0].size
    extents = [mapping.extent for stripe in shared for mapping in stripe]
    with ExitStack() as undo:
        stripes = _alias(arena, shared, target, group.lower, undo)
        for extent in extents:
            arena.incref(extent)
        arena.start(target, stripes, group.lower)

        def part() -> None:
            for each in arena.slots[target].groups:
                each.clear()
            arena.stop(target)
            for extent in extents:
                arena.decref(extent)

        undo.callback(part)
        arena.grow({target: tokens})
        undo.pop_all()
    return end


def replace(
    arena: Arena, index: int, first: int, copy: Callable[[int, int, int], None], record: Callable[[], Fence]
) -> int:
    """Put other extents with the same bytes under a slot, from its stripe `first` on; returns the mappings replaced.

    Waits for the device: the bytes are copied behind all work submitted before, and none runs while addresses change.

    Parameters
    ----------
    copy : callable
        ``copy(to, from, nbytes)`` between addresses of the device, on the stream that `record` records.

    Raises
    ------
    KVCacheOutOfMemory, DriverError
        The old memory is in place; where the driver refuses even that, the slot is broken and ends before `first`.
    """
    (group,) = arena.slots[index].groups
    stripes = group.stripes[first:]
    if not stripes:
        return 0
    start, size = stripes[0][0].offset, sum(stripe[0].size for stripe in stripes)
    arena.make_available(size * len(arena.reservations))
    arena.check_ceiling(len(arena.pool.split(size)))
    scratch = arena.scratch()
    rows = []
    with ExitStack() as undo:
        for where, reservation in enumerate(arena.reservations):
            extents = arena.pool.acquire(size)
            undo.callback(arena.release_unmapped, extents)
            at = where * arena.layout.slot_stride
            with ExitStack() as aside:
                aside.callback(arena.unmap, None, arena.map_extents(None, scratch, at, extents)[::-1])
                copy(scratch.base + at, reservation.base + start, size)
                record().wait()
            rows.append(extents)
        made = []
        for where, reservation in enumerate(arena.reservations):
            closed: list[Stripe] = []
            undo.callback(_put_back, arena, index, first, where, closed)
            for stripe in stripes:
                stripe[where].close()
                closed.append(stripe)
            fresh = arena.map_extents(index, reservation, start, rows[where])
            undo.callback(arena.unmap, index, fresh[::-1])
            made.append(fresh)
        undo.pop_all()
    old = [mapping.extent for stripe in stripes for mapping in stripe]
    for extent in old:
        arena.decref(extent)
    group.stripes[first:] = [list(stripe) for stripe in zip(*made, strict=True)]
    arena.release_unmapped(old)
    return len(made) * len(made[0])


def _empty(arena: Arena, target: int) -> None:
    """Make sure that a slot is free and nothing is parked in it."""
    free = arena.free_slots()
    if target not in free:
        some = f"free are {free[:8]}" if free else "none is"
        raise ConfigError(f"slot {target} is not free; {some}")
    arena.unmap_parked(target)
    if arena.slots[target].broken:
        raise MemoryQuarantined(f"an unmap failed in slot {target}, so it cannot be used; take another one")


def _alias(arena: Arena, stripes: list[Stripe], target: int, lower: int, undo: ExitStack) -> list[Stripe]:
    """Map the extents of stripes in a slot as well, from byte `lower` on; `undo` gets what reverts it."""
    if not stripes:
        return []
    arena.check_ceiling(len(stripes) * len(arena.reservations))
    rows = []
    for where, reservation in enumerate(arena.reservations):
        extents = [stripe[where].extent for stripe in stripes]
        made = arena.map_extents(target, reservation, target * arena.layout.slot_stride + lower, extents)
        undo.callback(arena.unmap, target, made[::-1])
        rows.append(made)
    return [list(stripe) for stripe in zip(*rows, strict=True)]


def _put_back(arena: Arena, index: int, first: int, where: int, closed: list[Stripe]) -> None:
    """Map what was closed in a range again where it was; where the driver refuses, the slot ends before `first`."""
    if len(arena.slots[index].stripes) == first:
        # It does already, since another range could not be put back: the old memory is in the pool.
        return
    for stripe in closed:
        extent, offset = stripe[where].extent, stripe[where].offset
        for _ in range(ATTEMPTS):
            try:
                (stripe[where],) = arena.map_extents(index, arena.reservations[where], offset, [extent])
            except DriverError as error:
                failed = error
                if isinstance(error, RollbackFailed):
                    break
            else:
                break
        if not stripe[where].is_open:
            # What is raised is why the memory was to be put back.
            logger.warning("slot %d loses its memory from mapping %d on: %s", index, first, failed)
            arena.truncate_broken(index, first)
            return
