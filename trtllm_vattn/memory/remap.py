"""Changing the memory beneath a sequence: moving it to another slot, beginning a sequence with the tokens of another
slot, putting other physical memory under it.

Nothing here waits for the device but `replace` and `own_from`, and nothing unmaps before a fence. Every operation
succeeds whole or leaves the state as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack

from trtllm_vattn.errors import ConfigError, DriverError, MemoryQuarantined
from trtllm_vattn.memory.arena import ATTEMPTS, Arena
from trtllm_vattn.memory.slot import RangeGroup, Stripe
from trtllm_vattn.vmm.base import Fence
from trtllm_vattn.vmm.owners import RollbackFailed

logger = logging.getLogger(__name__)

Copy = Callable[[int, int, int], None]
"""``copy(to, from, nbytes)`` between addresses of the device, on the stream that a fence is recorded on."""


def move(arena: Arena, source: int, target: int, record: Callable[[], Fence]) -> int:
    """Give a running slot's memory, and its state, to a free slot; returns the mappings made.

    The memory is mapped at both addresses for a while (rule R5); the old ones are unmapped once `record()`'s fence is
    done. Raises ConfigError where the target is not free or other slots read the source, or DriverError; nothing
    changed.
    """
    arena.check_not_held(source)
    _empty(arena, target)
    slot = arena.slots[source]
    visible, segments = slot.visible_bytes, slot.segments
    fence = record()
    with ExitStack() as undo:
        groups = [_alias(arena, group, len(group.stripes), target, undo) for group in slot.groups]
        undo.pop_all()
    for mapping in slot.mappings():
        arena.incref(mapping.extent)
    arena.stop(source)
    arena.begin_unmap(source, fence)
    arena.start(target, groups, segments)
    arena.set_visible(target, visible)
    return sum(len(group.stripes) * len(group.ranges) for group in groups)


def reach(arena: Arena, source: int, tokens: int, target: int, total: int) -> None:
    """Have a free slot back `total` tokens, of which the first `tokens` lie in a slot that is used: it holds that slot,
    and those that tokens of that slot lie in. Its own memory begins at the page of the first token behind.

    Raises ConfigError where the target is not free, or those tokens are not all there or do not end with a block,
    KVCacheOutOfMemory or DriverError; nothing changed.
    """
    layout = arena.layout
    _check_readable(arena, source, tokens)
    if any(group.deficit or group.window is not None for group in arena.slots[source].groups):
        raise ConfigError(f"ranges of slot {source} hold different tokens, which no other slot can read; alias them")
    if layout.whole_bytes(tokens) != layout.touched_bytes(tokens):
        raise ConfigError(f"{tokens} tokens in slot {source} do not end with a block; read whole blocks of it")
    _empty(arena, target)
    lower = layout.whole_bytes(tokens) // layout.granularity * layout.granularity
    groups = [group.empty(lower) for group in arena.slots[target].groups]
    arena.start(target, groups, arena.segments_below(source, tokens))
    try:
        arena.grow({target: total})
    except BaseException:
        arena.stop(target)
        raise


def share(
    arena: Arena, source: int, tokens: int, target: int, total: int, copy: Copy, record: Callable[[], Fence]
) -> None:
    """Have a free slot back `total` tokens, the first `tokens` of them with the bytes of a slot that is used: by those
    mappings that lie wholly below them, which both share then, and by memory of its own, which the rest is copied to.

    Tokens of the source that lie in other slots lie there for the target too. Where the source's lower edge is raised,
    so is the target's.
    Raises ConfigError where the target is not free or those tokens are not there, KVCacheOutOfMemory or DriverError;
    nothing changed.
    """
    slot, layout = arena.slots[source], arena.layout
    if tokens <= slot.prefix:
        reach(arena, source, tokens, target, total)
        return
    if tokens <= (edge := arena.lower_edge(source)):
        raise ConfigError(f"slot {source} backs tokens from {edge} on, so its first {tokens} cannot be forked")
    _empty(arena, target)
    ends = [group.held(tokens) for group in slot.groups]
    with ExitStack() as undo:
        groups = [
            # What is written again, as the rows of a window are, is shared by nobody.
            _alias(
                arena,
                group,
                _whole_stripes(group, layout.whole_bytes(end)) if group.window is None else 0,
                target,
                undo,
            )
            for group, end in zip(slot.groups, ends, strict=True)
        ]
        extents = [mapping.extent for group in groups for stripe in group.stripes for mapping in stripe]
        shared = [group.frontier for group in groups]
        for extent in extents:
            arena.incref(extent)
        # It holds the source, too, until the rest is copied: nothing of that is evicted for its growth.
        arena.start(target, groups, arena.segments_below(source, tokens))

        def part() -> None:
            for each in arena.slots[target].groups:
                each.clear()
            arena.stop(target)
            for extent in extents:
                arena.decref(extent)

        undo.callback(part)
        arena.grow({target: total})
        undo.pop_all()
    try:
        for group, start, end in zip(groups, shared, ends, strict=True):
            _copy(arena, group, source, target, start, layout.touched_bytes(end), copy)
    except BaseException:
        arena.park(target, record())
        raise
    arena.fence_retained([source], record)
    arena.hold(target, slot.segments)


def copy_tokens(arena: Arena, source: int, tokens: int, target: int, copy: Copy, record: Callable[[], Fence]) -> None:
    """Copy the first `tokens` tokens of a slot that is used, wherever they lie, into another one's own memory: one copy
    for each range and each slot that they lie in. Raises ConfigError where they are not there; nothing changed."""
    _check_readable(arena, source, tokens)
    layout, segments = arena.layout, arena.segments_below(source, tokens)
    for owner, start, stop in segments:
        for group in arena.slots[owner].groups:
            size = layout.touched_bytes(group.held(stop))
            _copy(arena, group, owner, target, layout.whole_bytes(start), size, copy)
    arena.fence_retained([segment.owner for segment in segments], record)


def _copy(arena: Arena, group: RangeGroup, source: int, target: int, start: int, end: int, copy: Copy) -> None:
    stride = arena.layout.slot_stride
    for where in group.ranges if start < end else ():
        base = arena.reservations[where].base + start
        copy(base + target * stride, base + source * stride, end - start)


def _whole_stripes(group: RangeGroup, size: int) -> int:
    """How many stripes of a group lie wholly below byte `size`."""
    end = group.lower
    for count, stripe in enumerate(group.stripes):
        end += stripe[0].size
        if end > size:
            return count
    return len(group.stripes)


def own_from(arena: Arena, index: int, tokens: int, copy: Copy, record: Callable[[], Fence]) -> None:
    """Copy on write: what a running slot shares at or behind its first `tokens` tokens becomes its own. Waits for the
    device where there is any. Raises as `replace`."""
    for group in arena.slots[index].groups:
        start, end = arena.layout.whole_bytes(group.held(tokens)), group.lower
        for first, stripe in enumerate(group.stripes):
            end += stripe[0].size
            if end > start and any(mapping.extent.serial in arena.extent_refs for mapping in stripe):
                _replace(arena, index, group, first, copy, record)
                break


def replace(arena: Arena, index: int, copy: Copy, record: Callable[[], Fence]) -> int:
    """Put other extents with the same bytes under a slot; returns the mappings replaced.

    Waits for the device: the bytes are copied behind all work submitted before, and none runs while addresses change.

    Raises
    ------
    KVCacheOutOfMemory, DriverError
        The old memory is in place; where the driver refuses even that, the slot is broken and ends before it.
    """
    return sum(_replace(arena, index, group, 0, copy, record) for group in arena.slots[index].groups)


def _replace(arena: Arena, index: int, group: RangeGroup, first: int, copy: Copy, record: Callable[[], Fence]) -> int:
    stripes = group.stripes[first:]
    if not stripes:
        return 0
    start, size = stripes[0][0].offset, sum(stripe[0].size for stripe in stripes)
    arena.make_available(size * len(group.ranges))
    arena.check_ceiling(len(arena.pool.split(size)))
    scratch = arena.scratch()
    ranges = [(place, arena.reservations[where]) for place, where in enumerate(group.ranges)]
    rows = []
    with ExitStack() as undo:
        for place, reservation in ranges:
            extents = arena.pool.acquire(size)
            undo.callback(arena.release_unmapped, extents)
            at = place * arena.layout.slot_stride
            with ExitStack() as aside:
                aside.callback(arena.unmap, None, arena.map_extents(None, scratch, at, extents)[::-1])
                copy(scratch.base + at, reservation.base + start, size)
                record().wait()
            rows.append(extents)
        made = []
        for place, reservation in ranges:
            closed: list[Stripe] = []
            undo.callback(_put_back, arena, index, group, first, place, closed)
            for stripe in stripes:
                stripe[place].close()
                closed.append(stripe)
            fresh = arena.map_extents(index, reservation, start, rows[place])
            undo.callback(arena.unmap, index, fresh[::-1])
            made.append(fresh)
        undo.pop_all()
    old = [mapping.extent for stripe in stripes for mapping in stripe]
    for extent in old:
        arena.decref(extent)
    group.stripes[first:] = [list(stripe) for stripe in zip(*made, strict=True)]
    arena.release_unmapped(old)
    return len(made) * len(made[0])


def _check_readable(arena: Arena, source: int, tokens: int) -> None:
    slot = arena.slots[source]
    if tokens > slot.prefix < (edge := arena.lower_edge(source)):
        raise ConfigError(f"slot {source} backs tokens from {edge} on, so its first {tokens} cannot be read")


def _empty(arena: Arena, target: int) -> None:
    """Make sure that a slot is free and nothing is parked in it."""
    free = arena.free_slots()
    if target not in free:
        some = f"free are {free[:8]}" if free else "none is"
        raise ConfigError(f"slot {target} is not free; {some}")
    arena.unmap_parked(target)
    if arena.slots[target].broken:
        raise MemoryQuarantined(f"an unmap failed in slot {target}, so it cannot be used; take another one")


def _alias(arena: Arena, group: RangeGroup, count: int, target: int, undo: ExitStack) -> RangeGroup:
    """Map the first stripes of a group in another slot as well; `undo` gets what reverts it."""
    stripes = group.stripes[:count]
    made = group.empty(group.lower)
    made.deficit, made.rewritten = group.deficit, group.rewritten
    if stripes:
        arena.check_ceiling(count * len(group.ranges))
        rows = []
        for place, where in enumerate(group.ranges):
            extents = [stripe[place].extent for stripe in stripes]
            offset = target * arena.layout.slot_stride + group.lower
            mappings = arena.map_extents(target, arena.reservations[where], offset, extents)
            undo.callback(arena.unmap, target, mappings[::-1])
            rows.append(mappings)
        made.push([list(stripe) for stripe in zip(*rows, strict=True)])
    return made


def _put_back(arena: Arena, index: int, group: RangeGroup, first: int, place: int, closed: list[Stripe]) -> None:
    """Map what was closed in a range again where it was; where the driver refuses, the slot ends before `first`."""
    if len(group.stripes) == first:
        # It does already, since another range could not be put back: the old memory is in the pool.
        return
    for stripe in closed:
        if not map_again(arena, index, stripe, place):
            # What is raised is why the memory was to be put back.
            arena.truncate_broken(index, group, first)
            return


def map_again(arena: Arena, index: int, stripe: Stripe, place: int) -> bool:
    """Map an extent of a slot's stripe where it was unmapped; returns whether the driver did so."""
    old = stripe[place]
    for _ in range(ATTEMPTS):
        try:
            (stripe[place],) = arena.map_extents(index, old.reservation, old.offset, [old.extent])
        except DriverError as error:
            failed = error
            if isinstance(error, RollbackFailed):
                break
        else:
            return True
    logger.warning("slot %d loses its memory from %#x on: %s", index, old.address, failed, extra={"slot": index})
    return False
