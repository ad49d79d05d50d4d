"""Slots whose bytes go to host memory and come back at the same addresses.

Tensors, tables and captured graphs hold addresses, so that a suspended slot keeps its place, and resuming it maps other
extents there and copies the bytes back. Several slots are suspended together where they share extents or read one
another's tokens: what they share is saved once and is shared again afterwards. Nothing past a slot's tokens is copied.

Copies are made on one stream of their own, behind all that was submitted before: a step that wrote the tokens is done
then, and host memory that is used again has been read. Both operations wait for them, or leave them to go on beside the
steps of others. What a suspended slot had is unmapped once its fence is done, or when somebody needs the memory: an
unmap is not ordered by a stream, so it cannot be given away sooner. A slot that comes back must not be touched before
its fence is done. Both succeed whole or leave the state as it was; an unmap that was left for later and fails is
quarantined, and the slot comes back in another place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from trtllm_vattn.errors import KVCacheOutOfMemory, MemoryQuarantined
from trtllm_vattn.memory.arena import Arena
from trtllm_vattn.memory.host_pool import HostPool, Span
from trtllm_vattn.memory.remap import map_again
from trtllm_vattn.memory.slot import RangeGroup, SlotState, Stripe
from trtllm_vattn.vmm import owners
from trtllm_vattn.vmm.base import Fence
from trtllm_vattn.vmm.owners import Extent
from trtllm_vattn.vmm.tensors import finish


@dataclass(frozen=True)
class Piece:
    """`size` bytes of each range of a group. `shared` are the serials, by range, of the extents that lay there, where
    another slot of the image has them too; without any, the bytes come back in extents of their own."""

    size: int
    shared: tuple[int, ...] = ()


@dataclass(frozen=True)
class GroupImage:
    """What a range group of a slot had: pieces one after another from byte `lower` on. `group` has no memory any more,
    but tells what it held."""

    group: RangeGroup
    pieces: tuple[Piece, ...]

    @property
    def ranges(self) -> Sequence[int]:
        return self.group.ranges

    @property
    def lower(self) -> int:
        return self.group.lower

    def upto(self, size: int) -> GroupImage:
        """With a further piece where these end before byte `size`."""
        more = size - self.lower - sum(piece.size for piece in self.pieces)
        return self if more <= 0 else replace(self, pieces=(*self.pieces, Piece(more)))


@dataclass(frozen=True)
class SlotImage:
    """A suspended slot; `state`, `tokens` and `serial` are what they were."""

    index: int
    state: SlotState
    tokens: int
    serial: int
    groups: tuple[GroupImage, ...]


@dataclass(frozen=True)
class Run:
    """`size` bytes from byte `offset` of the image's slot number `position`, in range `where`."""

    position: int
    where: int
    offset: int
    size: int


@dataclass(frozen=True)
class Image:
    """Slots in host memory: their bytes are those of `runs`, one after another, in `spans`."""

    slots: tuple[SlotImage, ...]
    runs: tuple[Run, ...]
    spans: tuple[Span, ...]

    @property
    def content_bytes(self) -> int:
        """Bytes that were copied."""
        return sum(run.size for run in self.runs)

    @property
    def mapped_bytes(self) -> int:
        """Bytes of physical memory that the slots need to come back."""
        pieces = [(piece, len(group.ranges)) for slot in self.slots for group in slot.groups for piece in group.pieces]
        shared = {piece.shared: piece.size * count for piece, count in pieces if piece.shared}
        return sum(piece.size * count for piece, count in pieces if not piece.shared) + sum(shared.values())

    def upto(self, tokens: Mapping[int, int], arena: Arena) -> Image:
        """With memory for so many tokens of each slot, by its index."""
        layout, slots = arena.layout, []
        for slot in self.slots:
            wanted = tokens.get(slot.index, 0)
            groups = (group.upto(layout.bytes_for(group.group.held(wanted))) for group in slot.groups)
            slots.append(replace(slot, groups=tuple(groups)))
        return replace(self, slots=tuple(slots))


def suspend(
    arena: Arena,
    tokens: Mapping[int, int],
    host: HostPool,
    stream: int,
    record: Callable[[], Fence],
    wait: bool = True,
) -> Image:
    """Copy the bytes of used slots to host memory, and unmap all that is mapped in them. No other slot may be resumed
    before them, or go on, that reads one of them.

    Parameters
    ----------
    tokens : mapping of int to int
        How many tokens of each slot, by its index, are kept; 0 is a page, whatever it holds.
    stream : int
        The stream that copies are made on; `record` records behind it.
    wait : bool
        Whether to wait for the copies; else memory comes back to the pool once they are done.

    Raises
    ------
    MemoryQuarantined
        An unmap failed in one of them before.
    HostMemoryFull, DriverError
        Nothing changed.
    """
    for index in tokens:
        slot = arena.slots[index]
        if slot.broken:
            raise MemoryQuarantined(f"an unmap failed in slot {index}, so it cannot come back; release its sequence")
    arena.complete_pending_unmaps(wait)
    slots, runs = _plan(arena, tokens)
    spans = host.acquire(sum(run.size for run in runs))
    image = Image(tuple(slots), tuple(runs), tuple(spans))
    try:
        for address, at, size in _parts(arena, image):
            host.driver.copy_to_host(at, address, size, stream)
        fence = record()
        if wait:
            fence.wait()
            _unmap_all(arena, tokens)
    except BaseException:
        finish(host.driver.device)
        host.release(spans)
        raise
    if not wait:
        for index in tokens:
            arena.suspend(index, fence)
        return image
    extents = {m.extent.serial: m.extent for index in tokens for m in arena.slots[index].mappings()}
    for index in tokens:
        arena.suspend(index)
    arena.release_unmapped(extents.values())
    return image


def resume(
    arena: Arena, image: Image, host: HostPool, stream: int, record: Callable[[], Fence], wait: bool = True
) -> tuple[int, Fence]:
    """Map memory at the addresses of suspended slots and copy their bytes back; returns the mappings made, and the
    fence behind the copies, which is done with `wait`.

    Raises
    ------
    MemoryQuarantined
        An unmap failed in one of the slots, and failed again; a single one may be resumed in another place
        (`relocate`).
    KVCacheOutOfMemory, DriverError
        The slots are suspended as before.
    """
    if broken := arena.mend(slot.index for slot in image.slots):
        raise MemoryQuarantined(f"an unmap failed in slots {broken}, so nothing comes back there; try again")
    while True:
        arena.make_available(image.mapped_bytes)
        try:
            return _resume(arena, image, host, stream, record, wait)
        except KVCacheOutOfMemory:
            if not arena.reclaim(image.mapped_bytes):
                raise


def discard(arena: Arena, image: Image, host: HostPool) -> None:
    """Nobody wants the slots of an image any more."""
    for slot in image.slots:
        arena.abandon(slot.index)
    host.release(image.spans)


def relocate(arena: Arena, image: Image, target: int) -> Image:
    """Have the single slot of an image come back in another, free and empty one: an unmap failed in its own."""
    (slot,) = image.slots
    segments = arena.slots[slot.index].segments
    arena.abandon(slot.index)
    arena.start(target, [group.group.empty() for group in slot.groups], segments)
    arena.suspend(target)
    return replace(image, slots=(replace(slot, index=target),))


def _plan(arena: Arena, tokens: Mapping[int, int]) -> tuple[list[SlotImage], list[Run]]:
    """What slots have, and which of their bytes have to be copied: each extent's once."""
    kept = [
        (index, group, at, end, stripe) for index in tokens for group, at, end, stripe in _kept(arena, index, tokens)
    ]
    uses = Counter(mapping.extent.serial for *_, stripe in kept for mapping in stripe)
    live: Counter[int] = Counter()
    """Bytes of each extent that hold tokens of one of the slots."""
    for _, _, at, end, stripe in kept:
        for mapping in stripe:
            live[mapping.extent.serial] = max(live[mapping.extent.serial], min(end - at, mapping.size))
    saved: set[int] = set()
    pieces: dict[tuple[int, int], list[Piece]] = {}
    runs: list[Run] = []
    positions = {index: position for position, index in enumerate(tokens)}
    for index, group, at, _, stripe in kept:
        shared = tuple(m.extent.serial for m in stripe) if any(uses[m.extent.serial] > 1 for m in stripe) else ()
        size = stripe[0].size if shared else min(stripe[0].size, _keep_end(arena, group, tokens[index]) - at)
        _append(pieces.setdefault((index, id(group)), []), Piece(size, shared))
        for mapping, where in zip(stripe, group.ranges, strict=True):
            if mapping.extent.serial not in saved and live[mapping.extent.serial] > 0:
                saved.add(mapping.extent.serial)
                runs.append(Run(positions[index], where, at, live[mapping.extent.serial]))
    slots = []
    for index in tokens:
        slot = arena.slots[index]
        groups = tuple(GroupImage(_emptied(group), tuple(pieces.get((index, id(group)), ()))) for group in slot.groups)
        slots.append(SlotImage(index, slot.state, slot.tokens, slot.serial, groups))
    return slots, _joined(runs)


def _kept(arena: Arena, index: int, tokens: Mapping[int, int]) -> Iterator[tuple[RangeGroup, int, int, Stripe]]:
    """Stripes of a slot that hold kept tokens: the group, the bytes that the stripe begins at and the tokens end at."""
    for group in arena.slots[index].groups:
        at, end = group.lower, arena.layout.touched_bytes(group.held(tokens[index]))
        for stripe in group.stripes:
            if at >= _keep_end(arena, group, tokens[index]):
                break
            yield group, at, end, stripe
            at += stripe[0].size


def _keep_end(arena: Arena, group: RangeGroup, tokens: int) -> int:
    """Bytes from a slot's start up to which its memory has to come back."""
    return arena.layout.bytes_for(max(1, group.held(tokens)))


def _emptied(group: RangeGroup) -> RangeGroup:
    return replace(group, frontier=group.lower, stripes=[])


def _append(pieces: list[Piece], piece: Piece) -> None:
    if pieces and not (pieces[-1].shared or piece.shared):
        pieces[-1] = Piece(pieces[-1].size + piece.size)
    else:
        pieces.append(piece)


def _joined(runs: list[Run]) -> list[Run]:
    """Runs that follow one another in a slot and range as one."""
    joined: list[Run] = []
    for run in sorted(runs, key=lambda run: (run.position, run.where, run.offset)):
        last = joined[-1] if joined else None
        if last and (last.position, last.where, last.offset + last.size) == (run.position, run.where, run.offset):
            joined[-1] = replace(last, size=last.size + run.size)
        else:
            joined.append(run)
    return joined


def _parts(arena: Arena, image: Image) -> Iterator[tuple[int, int, int]]:
    """Copies between the device and the host, as large as they can be: device address, host address, bytes."""
    spans = iter(image.spans)
    at = left = 0
    for run in image.runs:
        base = arena.reservations[run.where].base + image.slots[run.position].index * arena.layout.slot_stride
        address, size = base + run.offset, run.size
        while size:
            if not left:
                at, left = next(spans)
            part = min(size, left)
            yield address, at, part
            address, size, at, left = address + part, size - part, at + part, left - part


def _unmap_all(arena: Arena, indices: Mapping[int, int]) -> None:
    """Unmap all that is mapped in slots. Raises DriverError with everything mapped again; where the driver refuses
    even that, the slot is broken and ends there."""
    closed: list[tuple[int, RangeGroup, int, Stripe, int]] = []
    try:
        for index in indices:
            for group in arena.slots[index].groups:
                for number, stripe in enumerate(group.stripes):
                    for place, mapping in enumerate(stripe):
                        mapping.close()
                        closed.append((index, group, number, stripe, place))
    except BaseException:
        for index, group, number, stripe, place in closed:
            if number < len(group.stripes) and not map_again(arena, index, stripe, place):
                arena.truncate_broken(index, group, number)
        raise


def _resume(
    arena: Arena, image: Image, host: HostPool, stream: int, record: Callable[[], Fence], wait: bool
) -> tuple[int, Fence]:
    groups: dict[int, list[RangeGroup]] = {}
    shared: dict[int, list[Extent]] = {}
    pieces = [(piece, len(g.ranges)) for slot in image.slots for g in slot.groups for piece in g.pieces]
    arena.check_ceiling(sum(len(arena.pool.split(piece.size)) * count for piece, count in pieces))
    with ExitStack() as undo:
        for slot in image.slots:
            groups[slot.index] = [_map_group(arena, slot.index, group, shared, undo) for group in slot.groups]
        undo.callback(finish, host.driver.device)
        for address, at, size in _parts(arena, image):
            host.driver.copy_to_device(address, at, size, stream)
        fence = record()
        if wait:
            fence.wait()
        undo.pop_all()
    again: set[int] = set()
    for slot in image.slots:
        made = [mapping for group in groups[slot.index] for stripe in group.stripes for mapping in stripe]
        for mapping in made:
            if mapping.extent.serial in again:
                arena.incref(mapping.extent)
            again.add(mapping.extent.serial)
        arena.resume(slot.index, groups[slot.index], slot.state, slot.tokens, slot.serial)
    host.release(image.spans)
    return sum(len(group.stripes) * len(group.ranges) for each in groups.values() for group in each), fence


def _map_group(
    arena: Arena, index: int, image: GroupImage, shared: dict[int, list[Extent]], undo: ExitStack
) -> RangeGroup:
    """Map a group's memory again, in extents of its own or in those that a slot before has `shared`."""
    group = _emptied(image.group)
    for piece in image.pieces:
        rows = []
        for place, where in enumerate(image.ranges):
            key = piece.shared[place] if piece.shared else None
            extents = None if key is None else shared.get(key)
            if extents is None:
                extents = arena.pool.acquire(piece.size)
                if key is not None:
                    shared[key] = extents
            made: list[owners.Mapping] = []
            undo.callback(_revert, arena, index, extents, made)
            offset = index * arena.layout.slot_stride + group.frontier
            made += arena.map_extents(index, arena.reservations[where], offset, extents)
            rows.append(made)
        group.push([list(stripe) for stripe in zip(*rows, strict=True)])
    return group


def _revert(arena: Arena, index: int, extents: list[Extent], made: list[owners.Mapping]) -> None:
    arena.unmap(index, made[::-1])
    arena.release_unmapped(extents)
