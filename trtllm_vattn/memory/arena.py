"""Slots at fixed addresses, backed by extents that are mapped and unmapped beneath them.

A slot that no sequence uses may keep its memory mapped (*parked*), so that the next sequence adopts it without a driver
call (the idea of TensorRT-LLM PR #15931's parked ranges). Only pressure unmaps it, from the tail of the longest-parked
slot, once the fence is done that was recorded when it was parked. A slot may also keep its tokens (*retained*), for
sequences that begin with the same ones; under pressure these go after what is parked, by priority and last use.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Mapping as MappingType
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from trtllm_vattn.errors import (
    AddressSpaceExhausted,
    ConfigError,
    DriverError,
    InvariantViolation,
    KVCacheOutOfMemory,
    MemoryQuarantined,
)
from trtllm_vattn.memory.layout import Kind, SlotLayout
from trtllm_vattn.memory.pool import ExtentPool
from trtllm_vattn.memory.slot import (
    FREE,
    PARKED,
    RETAINED,
    RUNNING,
    SUSPENDED,
    RangeGroup,
    Segment,
    Slot,
    SlotState,
    Stripe,
)
from trtllm_vattn.vmm.base import Fence
from trtllm_vattn.vmm.owners import Extent, Mapping, Reservation, RollbackFailed

logger = logging.getLogger(__name__)

SLACK = 32
"""A surplus of less than this part of a sequence's need is not worth unmapping."""
ATTEMPTS = 3
"""How often a driver call that undoes a failure is tried before the undoing counts as failed, too."""


@dataclass(frozen=True)
class Placement:
    """How nearly the order of memory in slots is the order of its creation, which tends to be physical order; random
    reads over more than about 64 GB feel it (scripts/results/README.md, TLB reach).

    `neighbours` are pairs of mappings that follow one another in a slot; of these, `ascending` are in the order of
    their creation, and `adjacent` were created one right after the other.
    """

    mappings: int
    neighbours: int
    ascending: int
    adjacent: int


class Arena:
    """Equal reservations (ranges) divided into slots.

    Parameters
    ----------
    one_by_one : bool
        Make each mapping accessible by a call of its own, instead of all of a growth at once.
    own_lengths : bool
        Each range is a group of its own, with a length, a lower edge and a frontier of its own in each slot.

    Attributes
    ----------
    frontiers : numpy.ndarray
        int64 ``[num_slots]``; tokens of each slot that its sequence may use. A group that holds fewer tokens than its
        slot's length (`RangeGroup.deficit`) is backed for so many tokens less.
    lower_edges : numpy.ndarray or None
        int64 ``[num_slots]``; the first token of each slot that lies in its own memory. None while all are 0.
    retained_frontiers : numpy.ndarray
        int64 ``[num_slots]``; tokens that are backed in each retained slot, for others to read.
    evicted : deque of tuple
        (slot, serial, tokens left) of each retained slot that memory was taken from.
    extent_refs : dict
        Reference counts of extents that are mapped in more than one slot, by serial.
    trim_pending : set of int
        Slots of which not all memory is visible to their sequence; `reclaim.trim` unmaps the rest.
    quarantine : list of Mapping
        Mappings that could not be unmapped.

    Raises
    ------
    ConfigError
        The budget cannot back one token of the dummy slot.
    AddressSpaceExhausted, DriverError
        A reservation, or the dummy slot's memory, could not be had; nothing is left behind (see `discard`).
    """

    def __init__(
        self, pool: ExtentPool, layout: SlotLayout, one_by_one: bool = False, own_lengths: bool = False
    ) -> None:
        self.pool, self.layout, self._one_by_one = pool, layout, one_by_one
        ranges = range(layout.num_ranges)
        groups: list[Sequence[int] | RangeGroup] = [[index] for index in ranges]
        if not own_lengths:
            groups = [self._group_of(kind) for kind in layout.kinds]
        self.slots = [Slot(groups) for _ in range(layout.num_slots + 1)]
        self.frontiers = np.zeros(layout.num_slots, np.int64)
        self.retained_frontiers = np.zeros(layout.num_slots, np.int64)
        self.lower_edges: np.ndarray | None = None
        self.evicted: deque[tuple[int, int, int]] = deque()
        self._serials = itertools.count(1)
        self._retained: set[int] = set()
        self._segments: np.ndarray | None = None
        self._write_floors: np.ndarray | None = None
        self._sharing_changed = False
        self.quarantine: list[Mapping] = []
        self.extent_refs: dict[int, int] = {}
        self.reservations: list[Reservation] = []
        self.trim_pending: set[int] = set()
        self.changed: set[int] | None = None
        """Slots whose state or memory changed since somebody looked; None where nobody does."""
        self.grown_ahead: set[int] = set()
        """Slots that grew ahead of their sequences since then, which nothing was written to yet."""
        self._pending_unmap: set[int] = set()
        self._scratches: list[Reservation] = []
        self._used_slots = 0
        """Slots from here on never had memory: with very many slots, most are never looked at."""
        self._free: set[int] = set()
        """Free slots before those."""
        self._idle: set[int] = set()
        """Slots that are not used and have memory."""
        dummy, least = layout.num_slots, layout.least_bytes
        if least > pool.available_bytes:
            raise ConfigError(
                f"the budget of {pool.budget:,} bytes is smaller than the least that can be mapped in each of "
                f"{layout.num_ranges} ranges ({least:,} bytes); raise the budget or layers_per_range"
            )
        try:
            for _ in range(layout.num_ranges):
                self.reservations.append(self._reserve())
            self.slots[dummy].start()
            self.grow({dummy: 1})
        except BaseException:
            discard(self)
            raise

    def _group_of(self, kind: Kind) -> RangeGroup:
        size = None if kind.window is None else self.layout.bytes_for(kind.window)
        return RangeGroup(kind.ranges, window=kind.window, window_bytes=size)

    def _reserve(self) -> Reservation:
        layout = self.layout
        try:
            return Reservation(self.pool.driver, layout.range_bytes)
        except AddressSpaceExhausted as error:
            raise AddressSpaceExhausted(
                f"{layout.num_slots:,} slots and a dummy of {layout.slot_stride:,} bytes of addresses each, in "
                f"{layout.num_ranges} ranges, take {layout.num_ranges * layout.range_bytes:,} bytes, of which the "
                f"driver gave {sum(made.size for made in self.reservations):,}; lower the number of slots or "
                "max_seq_len"
            ) from error

    # -- growing ---------------------------------------------------------------------------------------------------

    def grow(self, wants: MappingType[int, int], wait: bool = True, ahead: bool = False) -> int:
        """Back each slot for the tokens wanted, all or none; returns the number of mappings made.

        With `wait`, it waits for the fences of memory that is parked or pending, where that is needed. With `ahead`,
        it takes no memory that is kept for prompts to come (`ExtentPool.acquire`).
        Raises KVCacheOutOfMemory, MemoryQuarantined where a slot is broken, or DriverError; nothing changed.
        """
        growth = self._missing(wants)
        made = self._grow(growth, wait, ahead) if growth else 0
        for slot, tokens in wants.items():
            self.extend_visible(slot, self.layout.bytes_for(tokens))
        return made

    def missing_bytes(self, wants: MappingType[int, int]) -> int:
        """Bytes that `grow` would map."""
        return sum(size * len(group.ranges) for _, group, size in self._missing(wants))

    def _missing(self, wants: MappingType[int, int]) -> list[tuple[int, RangeGroup, int]]:
        return [
            (slot, group, need - group.frontier)
            for slot, tokens in wants.items()
            for group in self.slots[slot].groups
            if (need := self.layout.bytes_for(group.held(tokens))) > group.frontier
        ]

    def _grow(self, growth: list[tuple[int, RangeGroup, int]], wait: bool, ahead: bool) -> int:
        total = sum(size * len(group.ranges) for _, group, size in growth)
        if any(self.slots[slot].pending_unmap for slot, _, _ in growth):
            self._free_tails(growth, wait)
        while True:
            self.make_available(total, wait)
            try:
                return self._map_all(growth, ahead)
            except KVCacheOutOfMemory:
                # The device, quarantine or the ceiling leaves less than the budget says; parked memory may make up.
                if ahead or not self.reclaim(total, wait):
                    raise

    def _free_tails(self, growth: list[tuple[int, RangeGroup, int]], wait: bool) -> None:
        """Unmap what is pending at the addresses that slots grow into. Raises KVCacheOutOfMemory where that has to wait
        for a fence, and `wait` is False."""
        self.complete_pending_unmaps(wait)
        for slot, group, _ in growth:
            start = slot * self.layout.slot_stride + group.frontier
            if any(mapping.offset >= start for mapping in self.slots[slot].pending_unmap):
                raise KVCacheOutOfMemory(
                    f"slot {slot} has memory behind its frontier that is still in use; grow it once its fence is done"
                )

    def _map_all(self, growth: list[tuple[int, RangeGroup, int]], ahead: bool) -> int:
        self.check_ceiling(sum(len(self.pool.split(size)) * len(group.ranges) for _, group, size in growth))
        with ExitStack() as undo:
            made = [self._map_more(slot, group, size, ahead, undo) for slot, group, size in growth]
            undo.pop_all()
        for (slot, group, _), stripes in zip(growth, made, strict=True):
            self.slots[slot].push(group, stripes)
            self.publish(slot, ahead)
        return sum(len(stripes) * len(group.ranges) for (_, group, _), stripes in zip(growth, made, strict=True))

    def _map_more(self, slot: int, group: RangeGroup, size: int, ahead: bool, undo: ExitStack) -> list[Stripe]:
        """Map `size` more bytes at a group's frontier, in each of its ranges; `undo` gets what reverts it."""
        if self.slots[slot].broken:
            raise MemoryQuarantined(
                f"an unmap failed in slot {slot}, so it cannot grow; release its sequence, and admit it again"
            )
        offset = slot * self.layout.slot_stride + group.frontier
        rows = []
        for index in group.ranges:
            extents = self.pool.acquire(size, ahead)
            made: list[Mapping] = []
            undo.callback(self._revert, slot, extents, made)
            at = offset
            for batch in [[extent] for extent in extents] if self._one_by_one else [extents]:
                made += self.map_extents(slot, self.reservations[index], at, batch)
                at += sum(extent.size for extent in batch)
            rows.append(made)
        return [list(stripe) for stripe in zip(*rows, strict=True)]

    def map_extents(
        self, slot: int | None, reservation: Reservation, offset: int, extents: list[Extent]
    ) -> list[Mapping]:
        """Map extents one after another in a slot, or in scratch addresses (None); raises DriverError, with nothing
        mapped but what is quarantined."""
        try:
            return reservation.map(offset, extents)
        except RollbackFailed as error:
            self.quarantine_mappings(slot, error.left)
            raise

    def _revert(self, slot: int, extents: list[Extent], made: list[Mapping]) -> None:
        self.unmap(slot, made[::-1])
        self.release_unmapped(extents)

    def publish(self, index: int, ahead: bool = False) -> None:
        """A slot's state, what is mapped in it, or visible of it, changed: bring what is known of it up to date. With
        `ahead` it grew behind all that its sequence's next steps write, and nothing else changed."""
        if index < self.layout.num_slots:
            slot = self.slots[index]
            if self.changed is not None:
                (self.grown_ahead if ahead else self.changed).add(index)
            if index >= self._used_slots:
                self._free.update(range(self._used_slots, index))
                self._used_slots = index + 1
            (self._free.add if slot.state is FREE else self._free.discard)(index)
            (self._idle.discard if slot.is_used or not slot.mapped else self._idle.add)(index)
            self.frontiers[index] = self.frontier_of(index)
            self.retained_frontiers[index] = self.backed_tokens(index) if slot.state is RETAINED else 0
            if self.lower_edges is None and slot.is_used and slot.lower:
                self.lower_edges = np.zeros(self.layout.num_slots, np.int64)
            if self.lower_edges is not None:
                self.lower_edges[index] = self.lower_edge(index)

    def frontier_of(self, index: int) -> int:
        """Tokens that a slot's sequence may use; 0 without one: what is mapped there may go at any time."""
        slot = self.slots[index]
        return self.backed_tokens(index, slot.visible_bytes) if slot.state is RUNNING else 0

    def backed_tokens(self, index: int, most: int | None = None) -> int:
        """Tokens that what is mapped in a slot backs in every group, or its first `most` bytes."""
        tokens_in, longest = self.layout.tokens_in, self.layout.max_seq_len
        found = longest
        for group in self.slots[index].groups:
            there = tokens_in(group.frontier if most is None else min(group.frontier, most))
            if group.window is None or there < group.window:
                found = min(found, there + group.deficit)
        return found

    @property
    def used_slots(self) -> list[Slot]:
        """The first slots, up to the last one that ever had memory; never the dummy."""
        return self.slots[: self._used_slots]

    # -- running and parking ---------------------------------------------------------------------------------------

    def free_slots(self, below: int | None = None) -> list[int]:
        """Slots that a sequence may be given, in order; only those below a number where one is given."""
        last = self.layout.num_slots if below is None else min(below, self.layout.num_slots)
        free = sorted(index for index in (*self._free, *self._parked()) if index < last)
        return [*free, *range(self._used_slots, last)]

    def first_free(self) -> int | None:
        """The lowest slot that a sequence may be given."""
        first = min((*self._free, *self._parked()), default=self._used_slots)
        return first if first < self.layout.num_slots else None

    def _parked(self) -> list[int]:
        # A copy, which the background thread does not change: some properties are read without its lock.
        return [index for index in tuple(self._idle) if self.slots[index].state is PARKED]

    def allocate_slot(
        self, tokens: int, limit: int, ahead: int = 0, exact: bool = False, at: int | None = None
    ) -> tuple[int, int]:
        """Choose a free slot below `limit`, of which there must be one, and back it for `tokens`; returns the slot and
        the number of mappings made. With `at`, that slot is chosen, which must be free.

        The best-fitting parked slot is adopted: the smallest that holds `tokens` and not more than twice as much, else
        the largest that holds less; where none is parked, the lowest free slot is taken. What is parked there beyond
        the need is unmapped first where memory is short, where it is much, or with `exact`. Otherwise the sequence
        keeps it, and sees `ahead` tokens of it; the rest is left to `reclaim.trim`.
        Raises KVCacheOutOfMemory or DriverError; no sequence changed.
        """
        need = self.layout.most_bytes(tokens)

        def misfit(index: int) -> tuple[int, int, int]:
            mapped = self.slots[index].mapped
            if need <= mapped:
                return (0, mapped, index) if mapped <= 2 * need else (2, mapped, index)
            return (1, -mapped, index)

        # Of slots without memory only the first counts.
        free = min(self._free, default=self._used_slots)
        some = [index for index in (*self._parked(), free) if index < min(limit, self.layout.num_slots)]
        chosen = min(some, key=misfit) if at is None else at
        slot = self.slots[chosen]
        if self._is_short_for(tokens):
            trims = slot.mapped > need + need // SLACK
        else:
            trims = slot.mapped > 2 * need and (slot.fence is None or slot.fence.done())
        since = slot.since
        slot.start()
        self.publish(chosen)
        try:
            if exact or trims:
                self._trim(chosen, need)
            maps = self.grow({chosen: tokens})
        except BaseException:
            self.stop(chosen)
            slot.since = since
            raise
        visible = self.layout.bytes_for(min(tokens + ahead, self.layout.max_seq_len))
        has_more = any(group.ends_behind(visible) for group in slot.groups)
        self.set_visible(chosen, visible if has_more else None)
        return chosen, maps

    def _is_short_for(self, tokens: int) -> bool:
        """Whether less than the headroom would be free once a sequence has memory for so many tokens."""
        least = self.pool.headroom + self.layout.total_bytes(tokens)
        return self.pool.available_bytes < least and self.pool.available_bytes + self.parked_bytes < least

    def set_visible(self, index: int, visible: int | None) -> None:
        """Let a slot's sequence use so many bytes a range of what is mapped, and no more; None is all."""
        self.slots[index].visible_bytes = visible
        if visible is None:
            self.trim_pending.discard(index)
        else:
            self.trim_pending.add(index)
        self.publish(index)

    def extend_visible(self, index: int, size: int) -> None:
        """Let a slot's sequence use at least so many bytes a range of what is mapped. Makes no driver call."""
        slot = self.slots[index]
        if slot.visible_bytes is not None:
            visible = max(slot.visible_bytes, size)
            self.set_visible(index, visible if visible < slot.frontier else None)

    def start(self, index: int, groups: Iterable[RangeGroup], segments: Sequence[Segment] = ()) -> None:
        """Have a free, empty slot run with memory that was mapped in it, and with tokens that lie in other slots."""
        slot = self.slots[index]
        slot.start()
        slot.groups = tuple(groups)
        self.hold(index, segments)
        self.publish(index)

    def take_over(self, index: int, groups: Sequence[tuple[int, Sequence[Sequence[Extent]]]]) -> None:
        """Have a free, empty slot run with extents that hold a sequence's tokens already: of each range group, the
        first byte, and the extents of each stripe, one a range, which are the pool's from now on. Raises
        KVCacheOutOfMemory or DriverError; what was mapped before it is the slot's, to be parked, and the rest free."""
        extents = [extent for _, stripes in groups for stripe in stripes for extent in stripe]
        self.pool.take_over(extents)
        slot = self.slots[index]
        slot.start()
        self.publish(index)
        try:
            for group, (lower, stripes) in zip(slot.groups, groups, strict=True):
                group.lower = group.frontier = lower
                for stripe in stripes:
                    slot.push(group, [self._map_stripe(index, group, stripe)])
        except BaseException:
            self.release_unmapped(extents)
            raise
        self.publish(index)

    def _map_stripe(self, index: int, group: RangeGroup, stripe: Sequence[Extent]) -> Stripe:
        """Map these extents at a group's frontier, one in each of its ranges; all or none."""
        self.check_ceiling(len(stripe))
        made: list[Mapping] = []
        try:
            for where, extent in zip(group.ranges, stripe, strict=True):
                offset = index * self.layout.slot_stride + group.frontier
                made += self.map_extents(index, self.reservations[where], offset, [extent])
        except BaseException:
            self.unmap(index, made[::-1])
            raise
        return made

    def stop(self, index: int) -> None:
        """A slot's sequence is gone, and nothing on the device uses it."""
        self.slots[index].stop()
        self._let_go(index, None)
        self.set_visible(index, None)

    def park(self, index: int, fence: Fence) -> None:
        """End a slot's use. Its memory stays mapped until it is adopted or, once `fence` is done, unmapped.

        Memory that is shared with another slot, or does not begin at the slot's start, cannot be adopted: it is
        unmapped once `fence` is done.
        """
        self.check_not_held(index)
        slot = self.slots[index]
        slot.park(fence)
        self._let_go(index, fence)
        self._unmap_what_is_not_adopted(index)

    def _unmap_what_is_not_adopted(self, index: int) -> None:
        slot = self.slots[index]
        self.set_visible(index, None)
        refs = self.extent_refs
        if slot.lower or (refs and any(mapping.extent.serial in refs for mapping in slot.mappings())):
            self.begin_unmap(index, slot.fence)

    def raise_lower_edge(self, index: int, tokens: int, fence: Fence) -> None:
        """A running sequence reads and writes nothing below `tokens` any more: unmap what lies wholly below, once
        `fence` is done. Its frontier stays. Raises ConfigError where other slots read there."""
        self.check_not_held(index)
        self._begin_to_unmap(index, self.slots[index].raise_lower(self.layout.whole_bytes(tokens), fence))

    def set_deficits(
        self, index: int, deficits: Sequence[int], keep: MappingType[int, int], fence: Fence, rewritten: int = 0
    ) -> None:
        """Each group of a running slot holds so many tokens fewer than the slot's length from now on. Of the groups in
        `keep`, what lies wholly behind so many tokens is unmapped once `fence` is done. Where the tokens of all groups
        were moved to other places, `rewritten` is the slot's length."""
        slot = self.slots[index]
        for each, deficit in zip(slot.groups, deficits, strict=True):
            each.deficit, each.rewritten = deficit, max(each.rewritten, rewritten)
        for group, tokens in keep.items():
            size = self.layout.bytes_for(min(tokens, self.layout.max_seq_len))
            self._begin_to_unmap(index, slot.lower_frontier(slot.groups[group], size, fence))
        self.publish(index)

    def _begin_to_unmap(self, index: int, mappings: list[Mapping]) -> None:
        if mappings:
            self._pending_unmap.add(index)
            self.publish(index)
            for mapping in mappings:
                self.decref(mapping.extent)

    def lower_edge(self, index: int) -> int:
        """The first token of a slot that lies in its own memory; from it to the frontier all are backed."""
        slot = self.slots[index]
        return self.layout.first_token(slot.lower) if slot.is_used else 0

    # -- tokens that lie in other slots -------------------------------------------------------------------------------

    def segments_below(self, index: int, tokens: int) -> tuple[Segment, ...]:
        """Where the first `tokens` tokens of a slot lie: in the slots that it has segments in, and in itself."""
        slot = self.slots[index]
        found = [Segment(owner, start, min(stop, tokens)) for owner, start, stop in slot.segments if start < tokens]
        if slot.prefix < tokens:
            found.append(Segment(index, slot.prefix, tokens))
        return tuple(found)

    def hold(self, index: int, segments: Sequence[Segment]) -> None:
        """A slot's first tokens lie in other slots, and these are held; those that it held before are let go."""
        self._let_go(index, None)
        self.slots[index].segments = tuple(segments)
        for segment in segments:
            self.slots[segment.owner].holders.add(index)
        self._sharing_changed |= bool(segments)

    def _let_go(self, index: int, fence: Fence | None) -> None:
        """A slot has no segments any more. `fence` was recorded after the last work that read them."""
        slot = self.slots[index]
        if fence is not None:
            self._fence_owners(slot, fence)
        for segment in slot.segments:
            self.slots[segment.owner].holders.discard(index)
        self._sharing_changed |= bool(slot.segments)
        slot.segments = ()

    def fence_retained(self, indices: Iterable[int], record: Callable[[], Fence]) -> None:
        """Work that reads these slots was submitted: those that are retained are not unmapped before it is done."""
        retained = [self.slots[index] for index in indices if self.slots[index].state is RETAINED]
        fence = record() if retained else None
        for slot in retained:
            slot.fence = fence

    def _fence_owners(self, slot: Slot, fence: Fence) -> None:
        self.fence_retained((segment.owner for segment in slot.segments), lambda: fence)

    def held_tokens(self, index: int, only_kept: bool = False) -> int:
        """How many of a slot's first tokens other slots read; with `only_kept`, without those that can be evicted."""
        holders = (self.slots[holder] for holder in self.slots[index].holders)
        return max(
            (
                segment.stop
                for holder in holders
                if not only_kept or holder.state in (RUNNING, SUSPENDED) or holder.priority == math.inf
                for segment in holder.segments
                if segment.owner == index
            ),
            default=0,
        )

    def check_not_held(self, index: int, tokens: int = 0) -> None:
        """Raise ConfigError where other slots read tokens of a slot behind its first `tokens`."""
        if (held := self.held_tokens(index)) > tokens:
            raise ConfigError(
                f"slots {sorted(self.slots[index].holders)} read the first {held} tokens of slot {index}: release them "
                "first, or retain its sequence instead of releasing it"
            )

    @property
    def segments(self) -> np.ndarray | None:
        """int64 ``[segments, 4]``: holder, owner, start, stop of every segment, a holder's in order; None without."""
        self._update_sharing()
        return self._segments

    @property
    def write_floors(self) -> np.ndarray | None:
        """int64 ``[num_slots]``: the first token of each slot that its sequence may write, for those before lie in
        other slots or in shared extents; None where all are 0."""
        self._update_sharing()
        return self._write_floors

    def _update_sharing(self) -> None:
        if not self._sharing_changed:
            return
        self._sharing_changed = False
        used = [(index, slot) for index, slot in enumerate(self.used_slots) if slot.is_used]
        rows = [(index, *segment) for index, slot in used for segment in slot.segments]
        self._segments = np.array(rows, np.int64) if rows else None
        floors = np.zeros(self.layout.num_slots, np.int64)
        for index, slot in used:
            floors[index] = max(slot.prefix, self._shared_tokens(slot))
        self._write_floors = floors if floors.any() else None

    def _shared_tokens(self, slot: Slot) -> int:
        """The first token of a slot that lies behind all extents which it shares."""
        if not self.extent_refs:
            return 0
        most = 0
        for group in slot.groups:
            end = group.lower
            for stripe in group.stripes:
                end += stripe[0].size
                if any(mapping.extent.serial in self.extent_refs for mapping in stripe):
                    most = max(most, self.layout.first_token(end) + group.deficit)
        return most

    # -- retained slots ----------------------------------------------------------------------------------------------

    def retain(self, index: int, tokens: int, fence: Fence) -> int:
        """End a slot's use, but keep its first `tokens` tokens; returns a serial number, by which they can be told from
        what may be retained in the slot later."""
        serial = next(self._serials)
        self.slots[index].retain(tokens, serial, fence)
        self._retained.add(index)
        self._fence_owners(self.slots[index], fence)
        self.set_visible(index, None)
        return serial

    def has_windows_of(self, index: int, tokens: int, written: int | None = None) -> bool:
        """Whether what every range keeps of a slot's first `tokens` tokens is still there: later ones, of `written` in
        all, take the places of those that left a window. None is what was written in a retained slot."""
        slot = self.slots[index]
        written = slot.written if written is None else written
        return tokens == written or all(group.window is None or written <= group.window for group in slot.groups)

    def retained_tokens(self, index: int, serial: int) -> int:
        """Tokens that are still kept of those that were retained by this serial number."""
        slot = self.slots[index]
        return slot.tokens if slot.state is RETAINED and slot.serial == serial else 0

    def adopt(self, index: int) -> Callable[[], None]:
        """Have a retained slot run again, with all that it holds. Returns what retains it again as it was, or what the
        driver has left of it."""
        slot = self.slots[index]
        tokens, serial, priority, since = slot.tokens, slot.serial, slot.priority, slot.since
        written = slot.written

        def undo() -> None:
            slot.retain(tokens, serial, slot.fence)
            slot.priority, slot.since, slot.written = priority, since, written
            self._retained.add(index)
            self.set_visible(index, None)
            if not slot.holders:
                self._note_eviction(index)

        slot.adopt()
        self._retained.discard(index)
        self.publish(index)
        return undo

    def shrink_retained(self, index: int, tokens: int) -> None:
        """Keep no more than the first `tokens` tokens of a retained slot; what lies behind them is the first to go
        under pressure. 0, or none of its own, evicts it. Raises ConfigError where other slots read behind them."""
        slot = self.slots[index]
        self.check_not_held(index, tokens)
        if tokens > max(slot.prefix, *(group.deficit for group in slot.groups)):
            slot.shrink(min(tokens, slot.tokens))
            return
        slot.evict()
        self._retained.discard(index)
        self._let_go(index, None)
        self._unmap_what_is_not_adopted(index)

    def suspend(self, index: int, fence: Fence | None = None) -> None:
        """A slot's bytes are in host memory, and its mappings were unmapped: it keeps nothing but its place. Its
        extents are the caller's, where they are mapped nowhere else. With a fence, its bytes are on their way, and it
        is unmapped once that is done (`complete_pending_unmaps`)."""
        slot = self.slots[index]
        for mapping in slot.mappings():
            self.decref(mapping.extent)
        slot.suspend(fence)
        if slot.pending_unmap:
            self._pending_unmap.add(index)
        self._retained.discard(index)
        self._sharing_changed |= bool(slot.segments)
        self.trim_pending.discard(index)
        self.publish(index)

    def resume(self, index: int, groups: Sequence[RangeGroup], state: SlotState, tokens: int, serial: int) -> None:
        """A suspended slot is what it was before, with this memory."""
        slot = self.slots[index]
        slot.resume(groups, state, tokens, serial)
        if state is RETAINED:
            self._retained.add(index)
        self._sharing_changed |= bool(slot.segments)
        self.publish(index)

    def abandon(self, index: int) -> None:
        """Nobody wants a suspended slot's tokens any more: it is free."""
        self.slots[index].abandon()
        self._let_go(index, None)
        self.publish(index)

    def eviction_order(self) -> list[int]:
        """Retained slots that may be evicted, the first to go first: by priority, then by last use."""
        slots = self.slots
        kept = (index for index in self._retained if slots[index].priority < math.inf)
        return sorted(kept, key=lambda index: (slots[index].priority, slots[index].since))

    def _evictable(self) -> set[Extent]:
        """Extents that evicting retained slots would give back to the pool."""
        found: Counter[Extent] = Counter()
        for index in self.eviction_order():
            least = self.held_tokens(index, only_kept=True)
            for group in self.slots[index].groups:
                found.update(m.extent for m in self._behind(group, least))
        return {extent for extent, count in found.items() if count == extent.mappings}

    def _behind(self, group: RangeGroup, tokens: int) -> list[Mapping]:
        """Mappings of a group that lie wholly behind a slot's first `tokens` tokens."""
        least, end = self.layout.bytes_for(group.held(tokens)), group.frontier
        found: list[Mapping] = []
        for stripe in reversed(group.stripes):
            end -= stripe[0].size
            if end < least:
                break
            found += stripe
        return found

    @property
    def evictable_bytes(self) -> int:
        """Bytes that evicting retained slots would give back to the pool."""
        return sum(extent.size for extent in self._evictable()) if self._retained else 0

    @contextmanager
    def pinned(self, index: int) -> Iterator[None]:
        """Nothing of a retained slot is evicted inside this context."""
        slot = self.slots[index]
        priority, slot.priority = slot.priority, math.inf
        try:
            yield
        finally:
            slot.priority = priority

    def has_sharing(self, index: int) -> bool:
        """Whether a slot reads tokens of another one, or others, suspended ones too, read its; or any slots share
        extents."""
        slot = self.slots[index]
        return bool(self.extent_refs or slot.segments or slot.holders)

    @property
    def retained_slots(self) -> int:
        """Slots that keep the tokens of ended sequences."""
        return len(self._retained)

    @property
    def retained_bytes(self) -> int:
        """Bytes mapped in retained slots; what they share counts once."""
        return _unshared(self.slots[index] for index in self._retained)

    def _evict(self, size: int, wait: bool) -> int:
        """Unmap memory of retained slots, from their tails, until `size` bytes went back to the pool, or all that can:
        first what lies behind their tokens, then tokens."""
        released, went_on = 0, True
        worth = self._evictable()
        while released < size and went_on:
            # A slot whose holders are evicted after it has its turn in the next round.
            went_on = False
            for index, takes_tokens in [(i, takes) for takes in (False, True) for i in self.eviction_order()]:
                slot = self.slots[index]
                if released >= size or slot.state is not RETAINED:
                    continue
                if not wait and slot.fence is not None and not slot.fence.done():
                    continue
                keep = self.held_tokens(index) if takes_tokens else slot.tokens
                for group in slot.groups:
                    while released < size and any(
                        mapping.extent in worth for mapping in self._behind(group, keep)[: len(group.ranges)]
                    ):
                        if slot.fence is not None:
                            slot.fence.wait()
                        released += self.unmap_tail(index, group)
                        went_on = True
                self._note_eviction(index)
        return released

    def _note_eviction(self, index: int) -> None:
        """Memory of a retained slot was unmapped: keep the tokens that are left."""
        slot = self.slots[index]
        left = min(slot.tokens, self.backed_tokens(index))
        if left < slot.tokens:
            serial = slot.serial
            self.shrink_retained(index, left)
            self.evicted.append((index, serial, self.retained_tokens(index, serial)))

    def retained_indices(self) -> list[int]:
        """Retained slots, in order."""
        return sorted(self._retained)

    def suspended_slots(self) -> list[int]:
        """Slots whose tokens are in host memory, in order; not the dummy."""
        return [index for index, slot in enumerate(self.used_slots) if slot.state is SUSPENDED]

    def evict(self, index: int) -> bool:
        """Forget all tokens of a slot that was retained, whatever its priority, and of retained ones that read it; its
        memory is parked, or unmapped once its fence is done. Returns whether it is gone: what others read stays."""
        slot = self.slots[index]
        for holder in sorted(slot.holders):
            if self.slots[holder].state is RETAINED:
                self.evict(holder)
        if slot.state is RETAINED and not slot.holders:
            self.evicted.append((index, slot.serial, 0))
            self.shrink_retained(index, 0)
        return slot.state is not RETAINED

    def evict_slot(self) -> bool:
        """Evict the first retained slot that nobody reads, so that a sequence may be given its place; returns whether
        there was one. Its memory is parked, or unmapped once its fence is done."""
        for index in self.eviction_order():
            slot = self.slots[index]
            if not slot.holders:
                self.evicted.append((index, slot.serial, 0))
                self.shrink_retained(index, 0)
                return True
        return False

    # -- unmapping -------------------------------------------------------------------------------------------------

    def make_available(self, size: int, wait: bool = True) -> None:
        """Have the pool able to hand out `size` bytes, by unmapping what is pending or parked.

        Without `wait`, only what no fence holds back. Raises KVCacheOutOfMemory.
        """
        pool = self.pool
        if size > pool.available_bytes:
            self.complete_pending_unmaps(wait)
        short = size - pool.available_bytes
        if short <= 0:
            return
        parked = sum(self.slots[index].mapped_bytes for index in self.reclaimable(wait))
        if short > parked and short > parked + (evictable := self.evictable_bytes):
            raise KVCacheOutOfMemory(
                f"{size:,} bytes asked for; of a budget of {pool.budget:,} only {pool.available_bytes:,} are free, "
                f"{parked:,} parked and {evictable:,} retained for nobody; release or preempt a sequence, or raise the "
                "budget"
            )
        self.reclaim(short, wait)

    def reclaim(self, size: int, wait: bool = True) -> int:
        """Unmap `size` bytes that no sequence needs, or all there are: of parked slots, the longest-parked first, then
        of retained ones in the order of eviction. Returns the bytes released to the pool."""
        released = self.reclaim_parked(size, wait)
        if released < size and self._retained:
            released += self._evict(size - released, wait)
        return released

    def reclaim_parked(self, size: int, wait: bool = True) -> int:
        """Unmap `size` bytes of parked slots or all there are, the longest-parked first; returns the bytes released to
        the pool."""
        released = 0
        for index in self.reclaimable(wait):
            slot = self.slots[index]
            while slot.mapped and released < size:
                if slot.fence is not None:
                    slot.fence.wait()
                released += self.unmap_tail(index)
        return released

    def reclaimable(self, wait: bool) -> list[int]:
        """Slots that are not used and have memory, the longest-parked first; without `wait`, those whose fence is
        done."""
        idle = [index for index in self._idle if wait or (fence := self.slots[index].fence) is None or fence.done()]
        return sorted(idle, key=lambda index: self.slots[index].since)

    def _trim(self, index: int, keep: int) -> None:
        """Unmap the tail of a slot, once its fence is done, until no more than `keep` bytes a range are left."""
        slot = self.slots[index]
        if slot.mapped > keep and slot.fence is not None:
            slot.fence.wait()
        while slot.mapped > keep:
            self.unmap_tail(index)

    def unmap_parked(self, index: int) -> None:
        """Unmap all that is parked in a free slot, once its fence is done."""
        self._trim(index, 0)

    def truncate_broken(self, index: int, group: RangeGroup, first: int) -> None:
        """Unmap the memory of a slot's group from stripe `first` on although its sequence needs it, and let it grow no
        more; its frontier tells what is left."""
        slot = self.slots[index]
        slot.mark_broken()
        while len(group.stripes) > first:
            self.unmap_tail(index, group)

    def unmap_tail(self, index: int, group: RangeGroup | None = None) -> int:
        """Unmap the last stripe of a slot's group, or of the one that reaches farthest; its last use must be over.
        Returns the bytes released to the pool."""
        stripe = self.slots[index].pop(group)
        self.publish(index)
        for mapping in stripe:
            self.decref(mapping.extent)
        self.unmap(index, stripe)
        return self.release_unmapped(mapping.extent for mapping in stripe)

    def begin_unmap(self, index: int, fence: Fence | None) -> None:
        """Take all memory of a slot that is not used out of use at once, to be unmapped once `fence` is done."""
        self._pending_unmap.add(index)
        for mapping in self.slots[index].mappings():
            self.decref(mapping.extent)
        self.slots[index].begin_unmap(fence)
        self.publish(index)

    def complete_pending_unmaps(self, wait: bool = False) -> None:
        """Unmap what is pending and whose fence is done; with `wait`, all of it."""
        for index in sorted(self._pending_unmap):
            slot = self.slots[index]
            if slot.fence is None or wait or slot.fence.done():
                if slot.fence is not None:
                    slot.fence.wait()
                self._pending_unmap.discard(index)
                pending = slot.complete_unmap()
                self.publish(index)
                self.unmap(index, pending)
                self.release_unmapped(mapping.extent for mapping in pending)

    def unmap(self, index: int | None, mappings: Iterable[Mapping]) -> None:
        """Unmap mappings of a slot, or of the scratch addresses (None); what the driver refuses is quarantined."""
        stuck = []
        for mapping in mappings:
            try:
                mapping.close()
            except DriverError as error:
                numbers = {"address": mapping.address, "bytes": mapping.size, "code": error.code}
                text = "a mapping of %d bytes at %#x is quarantined: %s"
                logger.warning(text, mapping.size, mapping.address, error, extra=numbers)
                stuck.append(mapping)
        self.quarantine_mappings(index, stuck)

    def quarantine_mappings(self, index: int | None, stuck: list[Mapping]) -> None:
        """Keep mappings that could not be undone, and use no more the addresses of the slot that they are in."""
        self.quarantine += stuck
        if stuck and index is not None:
            self.slots[index].mark_broken()
            self.publish(index)

    def release_unmapped(self, extents: Iterable[Extent]) -> int:
        """Release those extents that are mapped nowhere to the pool; returns their bytes."""
        unmapped = [extent for extent in extents if not extent.mappings]
        self.pool.release(unmapped)
        return sum(extent.size for extent in unmapped)

    def incref(self, extent: Extent) -> None:
        """An extent is mapped in one more slot."""
        self._sharing_changed = True
        self.extent_refs[extent.serial] = self.extent_refs.get(extent.serial, 1) + 1

    def decref(self, extent: Extent) -> None:
        """An extent is mapped in one slot less."""
        if extent.serial not in self.extent_refs:
            return
        self._sharing_changed = True
        refs = self.extent_refs.pop(extent.serial) - 1
        if refs > 1:
            self.extent_refs[extent.serial] = refs

    def scratch(self) -> Reservation:
        """Addresses for one slot in each range, with nothing mapped in them."""
        for reservation in self._scratches:
            if not reservation.mappings:
                return reservation
        made = Reservation(self.pool.driver, self.layout.num_ranges * self.layout.slot_stride)
        self._scratches.append(made)
        return made

    # -- statistics ------------------------------------------------------------------------------------------------

    @property
    def quarantined_bytes(self) -> int:
        """Bytes that could not be unmapped, or not be given back to the driver."""
        stuck = {mapping.extent.serial: mapping.size for mapping in self.quarantine}
        return self.pool.quarantined_bytes + sum(stuck.values())

    @property
    def has_pending_work(self) -> bool:
        """Whether anything is to be unmapped once a fence is done."""
        return bool(self._pending_unmap or self.trim_pending)

    @property
    def live_mappings(self) -> int:
        """Mappings that the driver holds for this arena."""
        return sum(reservation.mappings for reservation in (*self.reservations, *self._scratches))

    def check_ceiling(self, more: int) -> None:
        """Raise KVCacheOutOfMemory where so many more mappings would pass the driver's limit."""
        driver = self.pool.driver
        if driver.mappings.alive + more > driver.max_mappings:
            raise KVCacheOutOfMemory(
                f"{more:,} mappings asked for; {driver.mappings.alive:,} are alive, {self.live_mappings:,} of them in "
                f"this cache, and the driver bears about {driver.max_mappings:,}; release sequences, or use fewer "
                "ranges (layers_per_range) or larger prompts' extents"
            )

    @property
    def parked_bytes(self) -> int:
        """Bytes mapped for nobody, in all ranges."""
        return sum(self.slots[index].mapped_bytes for index in self._idle)

    @property
    def parked_slots(self) -> int:
        """Free slots with memory in them."""
        return len(self._parked())

    @property
    def used_bytes(self) -> int:
        """Bytes held that are neither free nor parked: running sequences', retained, the dummy slot's, pending or
        quarantined."""
        return self.pool.held_bytes - self.pool.free_bytes - self.parked_bytes

    @property
    def running_bytes(self) -> int:
        """Bytes mapped for running sequences, in all ranges, without the dummy slot; what they share counts once."""
        running = [slot for slot in self.used_slots if slot.state is RUNNING]
        return _unshared(running) if self.extent_refs else sum(slot.mapped_bytes for slot in running)

    @property
    def window_bytes(self) -> int:
        """Of `running_bytes`, those in ranges that keep a window."""
        groups = (group for slot in self.used_slots if slot.state is RUNNING for group in slot.groups)
        return sum(group.mapped * len(group.ranges) for group in groups if group.window is not None)

    def placement(self) -> Placement:
        """Of all that is mapped in slots, parked ones too."""
        mappings = 0
        steps = []
        for slot in self.used_slots:
            for group in slot.groups:
                for row in zip(*group.stripes, strict=True):
                    mappings += len(row)
                    steps += [after.extent.serial - before.extent.serial for before, after in pairwise(row)]
        return Placement(mappings, len(steps), sum(step > 0 for step in steps), sum(step == 1 for step in steps))

    # -- integrity -------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise InvariantViolation, with its numbers, unless every extent is in exactly one place, or in as many slots
        as its reference count says, and every frontier is backed (I1, C1)."""
        self._check_extents()
        readers: dict[int, set[int]] = {}
        for index, slot in enumerate(self.slots):
            for segment in slot.segments:
                readers.setdefault(segment.owner, set()).add(index)
        for index, slot in enumerate(self.slots):
            for group in slot.groups:
                self._check_group(index, group)
            self._check_pending(index)
            if index == self.layout.num_slots:
                continue
            lower = 0 if self.lower_edges is None else self.lower_edges[index]
            if lower != self.lower_edge(index):
                raise InvariantViolation(
                    f"slot {index} ({slot.state.value}): lower edge {lower}, but tokens from {self.lower_edge(index)} "
                    "on are backed"
                )
            if self.frontiers[index] != self.frontier_of(index):
                raise InvariantViolation(
                    f"slot {index} ({slot.state.value}): frontier {self.frontiers[index]}, but {slot.mapped:,} bytes "
                    f"back {self.frontier_of(index)} tokens"
                )
            found = (index in self._free or index >= self._used_slots, index in self._idle)
            if found != (slot.state is FREE, not slot.is_used and slot.mapped > 0):
                raise InvariantViolation(f"slot {index} ({slot.state.value}) is taken for free, idle: {found}")
            self._check_sharing(index, readers.get(index, set()))

    def _check_sharing(self, index: int, readers: set[int]) -> None:
        slot = self.slots[index]
        backed = self.backed_tokens(index) if slot.state is RETAINED else 0
        if (self.retained_frontiers[index], index in self._retained) != (backed, slot.state is RETAINED):
            raise InvariantViolation(
                f"slot {index} ({slot.state.value}): {self.retained_frontiers[index]} tokens are backed for others, "
                f"but its memory backs {backed}"
            )
        if slot.tokens > backed and not slot.broken:
            raise InvariantViolation(f"slot {index} keeps {slot.tokens} tokens, but {backed} are backed")
        is_kept = slot.is_used or slot.state is SUSPENDED
        if slot.holders != readers or (readers and not is_kept):
            raise InvariantViolation(
                f"slot {index} ({slot.state.value}) is held by slots {sorted(slot.holders)}, but read by "
                f"{sorted(readers)}"
            )
        end = 0
        for owner, start, stop in slot.segments:
            first, last = self.lower_edge(owner), self.backed_tokens(owner)
            is_lost = (self.slots[owner].broken and last < stop) or self.slots[owner].state is SUSPENDED
            if start != end or stop <= start or owner == index or not (is_lost or first <= start < stop <= last):
                raise InvariantViolation(
                    f"slot {index}: tokens {start} to {stop} lie in slot {owner}, which backs {first} to {last}; those "
                    f"before end at {end}"
                )
            end = stop
        if slot.segments and (not is_kept or self.lower_edge(index) > end):
            raise InvariantViolation(
                f"slot {index} ({slot.state.value}): tokens below {end} lie in other slots, its own from "
                f"{self.lower_edge(index)} on"
            )

    def _check_extents(self) -> None:
        pool = self.pool
        in_slots = Counter(m.extent.serial for slot in self.slots for m in slot.mappings())
        held = [m for slot in self.slots for m in (*slot.mappings(), *slot.pending_unmap)] + self.quarantine
        extents = {mapping.extent.serial: mapping.extent for mapping in held}
        mapped = Counter(mapping.extent.serial for mapping in held)
        for serial, extent in extents.items():
            if mapped[serial] != extent.mappings:
                raise InvariantViolation(
                    f"extent {serial} is mapped {extent.mappings} times, {mapped[serial]} by the arena's slots"
                )
        for serial in in_slots.keys() | self.extent_refs.keys():
            refs = self.extent_refs.get(serial, 1)
            if in_slots[serial] != refs:
                raise InvariantViolation(
                    f"extent {serial} is mapped in {in_slots[serial]} slots, its reference count is {refs}"
                )
        for extent in [*pool.free_extents(), *pool.quarantine]:
            if extent.serial in extents or extent.mappings:
                raise InvariantViolation(f"extent {extent.serial} is in the pool and mapped {extent.mappings} times")
            extents[extent.serial] = extent
        total = sum(extent.size for extent in extents.values())
        if total != pool.held_bytes:
            raise InvariantViolation(f"extents add up to {total:,} bytes, the pool holds {pool.held_bytes:,}")
        if pool.held_bytes > pool.budget:
            raise InvariantViolation(f"{pool.held_bytes:,} bytes held of a budget of {pool.budget:,}")

    def _check_group(self, index: int, group: RangeGroup) -> None:
        start = index * self.layout.slot_stride
        offset = start + group.lower
        for stripe in group.stripes:
            for mapping, where in zip(stripe, group.ranges, strict=True):
                found = (mapping.reservation, mapping.offset, mapping.size)
                if found != (self.reservations[where], offset, stripe[0].size):
                    raise InvariantViolation(
                        f"slot {index}: {mapping.size:,} bytes at offset {mapping.offset:,}, expected "
                        f"{stripe[0].size:,} at {offset:,}"
                    )
            offset += stripe[0].size
        if offset - start != group.frontier:
            raise InvariantViolation(
                f"slot {index}: {offset - start - group.lower:,} bytes mapped, {group.mapped:,} by its edges"
            )

    def _check_pending(self, index: int) -> None:
        slot = self.slots[index]
        if not slot.pending_unmap:
            return
        start = index * self.layout.slot_stride
        used = {
            self.reservations[where]: (start + group.lower, start + group.frontier)
            for group in slot.groups
            for where in group.ranges
        }
        in_use = [
            mapping
            for mapping in slot.pending_unmap
            if mapping.offset < used[mapping.reservation][1]
            and mapping.offset + mapping.size > used[mapping.reservation][0]
        ]
        if in_use:
            raise InvariantViolation(
                f"slot {index} ({slot.state.value}) is in use while {len(in_use)} mappings are pending unmap"
            )

    # -- ends ------------------------------------------------------------------------------------------------------

    def clear(self, fence: Fence) -> None:
        """Release the memory of all slots but the dummy to the pool once `fence` is done; all are free then, but for
        those that an unmap fails in. What is quarantined is tried again. Idempotent. Raises DriverError where a fence
        fails; calling again goes on."""
        fence.wait()
        self.complete_pending_unmaps(wait=True)
        for index, slot in enumerate(self.used_slots):
            while slot.mapped:
                self.unmap_tail(index)
        self._retry(self.quarantine)
        self.pool.retry()
        broken = {self._slot_of(mapping) for mapping in self.quarantine}
        self._retained.clear()
        self._sharing_changed = True
        for index, slot in enumerate(self.used_slots):
            slot.reset(index in broken)
            self.set_visible(index, None)

    def _slot_of(self, mapping: Mapping) -> int | None:
        """The slot that a mapping lies in; None for one in scratch addresses."""
        return mapping.offset // self.layout.slot_stride if mapping.reservation in self.reservations else None

    def _retry(self, quarantined: list[Mapping]) -> None:
        """Try again to unmap mappings that are quarantined."""
        self.quarantine = [mapping for mapping in self.quarantine if mapping not in quarantined]
        self.unmap(None, quarantined)
        self.release_unmapped({mapping.extent.serial: mapping.extent for mapping in quarantined}.values())

    def mend(self, indices: Iterable[int]) -> list[int]:
        """Try again to unmap what is quarantined in slots that have lost no token by it: suspended ones, and the dummy.
        Where nothing is left of it, memory may be mapped there again. Returns the slots in which something is."""
        wanted = [index for index in indices if self.slots[index].broken]
        self._retry([mapping for mapping in self.quarantine if self._slot_of(mapping) in wanted])
        left = {self._slot_of(mapping) for mapping in self.quarantine}
        for index in wanted:
            if index not in left:
                self.slots[index].mend()
                self.publish(index)
        return [index for index in wanted if index in left]

    @property
    def has_dummy(self) -> bool:
        """Whether the dummy slot has its memory, or sleeps."""
        dummy = self.slots[-1]
        return not dummy.broken or dummy.state is SUSPENDED

    def mend_dummy(self) -> None:
        """Back the dummy slot again, which idle lanes write to, where it was not suspended, nor left as it was. Raises
        MemoryQuarantined, KVCacheOutOfMemory or DriverError; calling again tries again."""
        dummy = self.layout.num_slots
        if self.mend([dummy]):
            raise MemoryQuarantined(
                "an unmap failed in the dummy slot, which idle lanes write to; try again, or close the cache"
            )
        try:
            self.grow({dummy: 1})
        except BaseException:
            self.slots[dummy].mark_broken()
            raise

    def close(self, fence: Fence | None = None) -> None:
        """Unmap and free everything once `fence` is done; what is quarantined is tried again.

        Idempotent. Raises DriverError or MemoryQuarantined where something still fails; calling again tries again.
        """
        if fence is not None:
            fence.wait()
        self.complete_pending_unmaps(wait=True)
        for index, slot in enumerate(self.slots):
            while slot.mapped:
                self.unmap_tail(index)
        self._retry(self.quarantine)
        with ExitStack() as closing:
            closing.callback(self.pool.close)
            for reservation in (*self.reservations, *self._scratches):
                if not reservation.mappings:
                    closing.callback(reservation.close)
        if self.quarantine:
            held = sum(mapping.size for mapping in self.quarantine)
            raise MemoryQuarantined(
                f"{len(self.quarantine)} mappings of {held:,} bytes could not be unmapped; call close() again"
            )


def _unshared(slots: Iterable[Slot]) -> int:
    """Bytes mapped in slots; what they share counts once."""
    return sum({m.extent.serial: m.size for slot in slots for m in slot.mappings()}.values())


# -- arenas that nobody holds any more: a constructor failed, or a cache was dropped without close() -----------------

_unclosed: list[Arena] = []
_lock = threading.Lock()


def discard(arena: Arena) -> None:
    """Give all that an arena holds back to the driver, or keep the arena for `retry_discarded`. Raises nothing.

    Nothing submitted to the device may still use its memory.
    """
    for _ in range(ATTEMPTS):
        if (error := _try_close(arena)) is None:
            return
    logger.warning("memory of a cache that is gone is tried again at the next cache's construction or close: %s", error)
    with _lock:
        _unclosed.append(arena)


def retry_discarded() -> int:
    """Try again to close the arenas that `discard` kept; returns how many are left."""
    with _lock:
        _unclosed[:] = [arena for arena in _unclosed if _try_close(arena) is not None]
        return len(_unclosed)


def _try_close(arena: Arena) -> DriverError | MemoryQuarantined | None:
    try:
        arena.close()
    except (DriverError, MemoryQuarantined) as error:
        return error
    return None


def _enter_child() -> None:
    """A forked child has none of its parent's memory."""
    global _lock
    _unclosed.clear()
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_enter_child)
