"""What can be done to memory beneath a sequence without copying its addresses: moving it to another slot, sharing its
beginning with a new one, putting other physical memory under it.

Nothing here waits for the device but `replace`, and nothing unmaps before a fence. Every operation succeeds whole or
leaves the state as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from time import monotonic

from trtllm_vattn.errors import ConfigError, DriverError
from trtllm_vattn.memory.arena import Arena
from trtllm_vattn.memory.leftovers import ATTEMPTS
from trtllm_vattn.memory.reclaim import make_available
from trtllm_vattn.memory.slot import RUNNING
from trtllm_vattn.vmm.base import Fence
from trtllm_vattn.vmm.owners import Extent, Mapping, Reservation, RollbackFailed

logger = logging.getLogger(__name__)

Columns = list[list[Mapping]]


def move(arena: Arena, source: int, target: int, record: Callable[[], Fence]) -> int:
    """Give a running slot's memory, and its state, to a free slot; returns the mappings made.

    The memory is mapped at both addresses for a while (rule R5); the old ones are left once `record()`'s fence is done.
    Raises ConfigError where the target is not free, or DriverError; nothing changed.
    """
    _vacant(arena, target)
    slot = arena.slots[source]
    fence = record()
    with ExitStack() as undo:
        columns = _alias(arena, slot.columns, target, undo)
        undo.pop_all()
    for column in slot.columns:
        for mapping in column:
            arena.share(mapping.extent)
    mapped, offered = slot.mapped, slot.offered
    arena.set_idle(source)
    arena.leave(source, fence)
    _settle_in(arena, target, columns, mapped)
    arena.withhold(target, offered)
    return sum(len(column) for column in columns)


def share(arena: Arena, source: int, tokens: int, need: int, target: int) -> int:
    """Put the mappings of a running slot that lie wholly below `tokens` under a free slot too, and memory of its own
    behind them for `need` tokens in all; returns the bytes a range that are shared.

    Raises OutOfPages or DriverError; nothing changed.
    """
    _vacant(arena, target)
    shared: Columns = []
    size = 0
    for column in arena.slots[source].columns:
        if size + column[0].size > arena.layout.whole_bytes(tokens):
            break
        shared.append(column)
        size += column[0].size
    with ExitStack() as undo:
        columns = _alias(arena, shared, target, undo)
        for column in shared:
            for mapping in column:
                arena.share(mapping.extent)
        _settle_in(arena, target, columns, size)

        def part() -> None:
            arena.slots[target].columns, arena.slots[target].mapped = [], 0
            arena.set_idle(target)
            for column in shared:
                for mapping in column:
                    arena.unshare(mapping.extent)

        undo.callback(part)
        arena.grow({target: need})
        undo.pop_all()
    return size


def replace(
    arena: Arena, slot: int, first: int, copy: Callable[[int, int, int], None], record: Callable[[], Fence]
) -> int:
    """Put other extents with the same bytes under a slot, from its column `first` on; returns the mappings replaced.

    Waits for the device: the bytes are copied behind all work submitted before, and none runs while addresses change.

    Parameters
    ----------
    copy : callable
        ``copy(to, from, nbytes)`` between addresses of the device, on the stream that `record` records.

    Raises
    ------
    OutOfPages, DriverError
        The old memory is in place; where the driver refuses even that, the slot is broken and ends before `first`.
    """
    columns = arena.slots[slot].columns[first:]
    if not columns:
        return 0
    start, size = columns[0][0].offset, sum(column[0].size for column in columns)
    make_available(arena, size * len(arena.reservations))
    arena.check_ceiling(len(arena.pool.split(size)))
    scratch = arena.scratch()
    rows = []
    with ExitStack() as undo:
        for index, reservation in enumerate(arena.reservations):
            extents = arena.pool.take(size)
            undo.callback(_give_unmapped, arena, extents)
            at = index * arena.layout.slot_stride
            with ExitStack() as aside:
                for mapping in _map(arena, None, scratch, at, extents):
                    aside.callback(_take_away, arena, None, [mapping])
                copy(scratch.base + at, reservation.base + start, size)
                record().wait()
            rows.append(extents)
        placed = []
        for index, reservation in enumerate(arena.reservations):
            closed: list[list[Mapping]] = []
            undo.callback(_put_back, arena, slot, first, index, closed)
            for column in columns:
                column[index].close()
                closed.append(column)
            fresh = _map(arena, slot, reservation, start, rows[index])
            undo.callback(_take_away, arena, slot, fresh)
            placed.append(fresh)
        undo.pop_all()
    for mapping in (m for column in columns for m in column):
        arena.unshare(mapping.extent)
    arena.slots[slot].columns[first:] = [list(column) for column in zip(*placed, strict=True)]
    _give_unmapped(arena, [mapping.extent for column in columns for mapping in column])
    return len(placed) * len(placed[0])


def _vacant(arena: Arena, target: int) -> None:
    """Make sure that a slot is free and nothing is parked in it."""
    free = arena.free_slots()
    if target not in free:
        some = f"free are {free[:8]}" if free else "none is"
        raise ConfigError(f"slot {target} is not free; {some}")
    arena.empty(target)
    if arena.slots[target].broken:
        raise DriverError("QUARANTINED", "unmap", (target,), "an unmap failed in this slot, so it cannot be used")


def _alias(arena: Arena, columns: Columns, target: int, undo: ExitStack) -> Columns:
    """Map what columns hold at the start of a slot as well; the way back is pushed onto `undo`."""
    if not columns:
        return []
    arena.check_ceiling(len(columns) * len(arena.reservations))
    rows = []
    for index, reservation in enumerate(arena.reservations):
        extents = [column[index].extent for column in columns]
        placed = _map(arena, target, reservation, target * arena.layout.slot_stride, extents)
        undo.callback(_take_away, arena, target, placed)
        rows.append(placed)
    return [list(column) for column in zip(*rows, strict=True)]


def _settle_in(arena: Arena, target: int, columns: Columns, mapped: int) -> None:
    arena.slots[target].columns = columns
    arena.slots[target].state, arena.slots[target].since = RUNNING, monotonic()
    arena.set_mapped(target, mapped)


def _map(
    arena: Arena, slot: int | None, reservation: Reservation, offset: int, extents: Sequence[Extent]
) -> list[Mapping]:
    try:
        return reservation.map(offset, extents)
    except RollbackFailed as error:
        _quarantine(arena, slot, error.left)
        raise


def _take_away(arena: Arena, slot: int | None, mappings: Sequence[Mapping]) -> None:
    _quarantine(arena, slot, [mapping for mapping in reversed(mappings) if not arena.unmap(mapping)])


def _quarantine(arena: Arena, slot: int | None, stuck: list[Mapping]) -> None:
    """Of a slot, or of the scratch addresses."""
    if slot is None:
        arena.quarantine += stuck
    else:
        arena.set_aside(slot, stuck)


def _give_unmapped(arena: Arena, extents: Sequence[Extent]) -> None:
    arena.pool.give(extent for extent in extents if not extent.mappings)


def _put_back(arena: Arena, slot: int, first: int, index: int, closed: Columns) -> None:
    """Map what was closed again where it was; cut the slot short where the driver does not let us."""
    reservation = arena.reservations[index]
    if len(arena.slots[slot].columns) == first:
        # Cut short already, while another range was put back: the old memory is in the pool.
        return
    for column in closed:
        extent, offset = column[index].extent, column[index].offset
        for _ in range(ATTEMPTS):
            try:
                (column[index],) = _map(arena, slot, reservation, offset, [extent])
            except DriverError as error:
                failed = error
                if isinstance(error, RollbackFailed):
                    break
            else:
                break
        if not column[index].is_open:
            # What is raised is why the memory was to be put back.
            logger.warning("slot %d loses its memory from mapping %d on: %s", slot, first, failed)
            arena.cut(slot, first)
            return
