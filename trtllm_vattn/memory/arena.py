"""Slots at fixed addresses, backed by extents that come and go.

A slot is free or running. A free slot may be *parked*: its last sequence is gone and its extents are still mapped, so
that the next sequence adopts them without a driver call (the idea of TensorRT-LLM PR #15931's parked ranges). Only
pressure unmaps, from the tail of the longest-parked slot, behind the fence that was recorded when it was parked.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping as MappingType
from contextlib import ExitStack
from time import monotonic

import numpy as np

from trtllm_vattn.errors import AddressSpaceExhausted, ConfigError, DriverError, OutOfPages
from trtllm_vattn.memory.integrity import check_arena
from trtllm_vattn.memory.layout import SlotLayout
from trtllm_vattn.memory.leftovers import discard
from trtllm_vattn.memory.pool import ExtentPool
from trtllm_vattn.memory.reclaim import is_short_for, make_available, reclaim
from trtllm_vattn.memory.slot import FREE, RETIRED, RUNNING, Slot
from trtllm_vattn.vmm.base import Fence
from trtllm_vattn.vmm.owners import Extent, Mapping, Reservation, RollbackFailed

logger = logging.getLogger(__name__)

SLACK = 32
"""Parts of a sequence's need; a surplus of one is not worth taking away."""


class Arena:
    """Equal reservations divided into slots; a slot's frontier is the same in all of them.

    Parameters
    ----------
    one_by_one : bool
        Make each mapping accessible by a call of its own, instead of all of a growth at once.

    Raises
    ------
    ConfigError
        The budget cannot back one token of the dummy slot.
    AddressSpaceExhausted, DriverError
        A reservation, or the dummy slot's memory, could not be had; nothing is left behind (see leftovers.py).
    """

    def __init__(self, pool: ExtentPool, layout: SlotLayout, one_by_one: bool = False) -> None:
        self.pool, self.layout, self._one_by_one = pool, layout, one_by_one
        self.slots = [Slot() for _ in range(layout.num_slots + 1)]
        self.frontiers = np.zeros(layout.num_slots, np.int64)
        self.quarantine: list[Mapping] = []
        self.places: dict[int, int] = {}
        """In how many slots an extent stands, by serial; of those in more than one."""
        self.reservations: list[Reservation] = []
        self.withheld: set[int] = set()
        """Slots of which not all is offered to their sequence."""
        self._touched = 0
        """Slots from here on never had memory: with very many slots, most are never looked at."""
        self._leaving: set[int] = set()
        self._scratches: list[Reservation] = []
        dummy = layout.num_slots
        least = layout.least_bytes
        if least > pool.available_bytes:
            raise ConfigError(
                f"the budget of {pool.budget:,} bytes is smaller than one granule in each of {layout.num_ranges} "
                f"ranges ({least:,} bytes); raise the budget or layers_per_range"
            )
        try:
            for _ in range(layout.num_ranges):
                self.reservations.append(self._reserve())
            self.slots[dummy].state = RUNNING
            self.grow({dummy: 1})
        except BaseException:
            discard(self)
            raise

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

    def grow(self, wants: MappingType[int, int], wait: bool = True) -> int:
        """Back each slot for the tokens wanted, all or none; returns the number of mappings made.

        With `wait`, memory that is parked or leaving is had by waiting for its fence.
        Raises OutOfPages, or DriverError where a driver call failed; nothing changed.
        """
        needs = {slot: self.layout.bytes_for(tokens) for slot, tokens in wants.items()}
        more = {slot: need - self.slots[slot].mapped for slot, need in needs.items()}
        growth = {slot: size for slot, size in more.items() if size > 0}
        made = self._grow(growth, wait) if growth else 0
        for slot, need in needs.items():
            self.offer(slot, need)
        return made

    def _grow(self, growth: MappingType[int, int], wait: bool) -> int:
        total = sum(growth.values()) * self.layout.num_ranges
        while True:
            make_available(self, total, wait)
            try:
                return self._place_all(growth)
            except OutOfPages:
                # The device, quarantine or the ceiling leaves less than the budget says; what is parked may make up.
                if not reclaim(self, total, wait):
                    raise

    def _place_all(self, growth: MappingType[int, int]) -> int:
        self.check_ceiling(sum(len(self.pool.split(more)) for more in growth.values()) * self.layout.num_ranges)
        with ExitStack() as undo:
            grown = {slot: self._place(slot, more, undo) for slot, more in growth.items()}
            undo.pop_all()
        for slot, columns in grown.items():
            self.slots[slot].columns += columns
            self.set_mapped(slot, self.slots[slot].mapped + growth[slot])
        return sum(len(columns) for columns in grown.values()) * self.layout.num_ranges

    def _place(self, slot: int, size: int, undo: ExitStack) -> list[list[Mapping]]:
        """Map `size` more bytes at the end of a slot in every range; the way back is pushed onto `undo`."""
        if self.slots[slot].broken:
            raise DriverError("QUARANTINED", "map", (slot,), "an unmap failed in this slot, so it cannot grow")
        offset = slot * self.layout.slot_stride + self.slots[slot].mapped
        rows = []
        for reservation in self.reservations:
            extents = self.pool.take(size)
            placed: list[Mapping] = []
            undo.callback(self._take_back, slot, extents, placed)
            at = offset
            try:
                for batch in [[extent] for extent in extents] if self._one_by_one else [extents]:
                    placed += reservation.map(at, batch)
                    at += sum(extent.size for extent in batch)
            except RollbackFailed as error:
                self.set_aside(slot, error.left)
                raise
            rows.append(placed)
        return [list(column) for column in zip(*rows, strict=True)]

    def _take_back(self, slot: int, extents: list[Extent], placed: list[Mapping]) -> None:
        self.set_aside(slot, [mapping for mapping in reversed(placed) if not self.unmap(mapping)])
        self.pool.give(extent for extent in extents if not extent.mappings)

    def set_mapped(self, slot: int, mapped: int) -> None:
        self._touch(slot)
        self.slots[slot].mapped = mapped
        self.set_frontier(slot)

    def _touch(self, slot: int) -> None:
        if self._touched <= slot < self.layout.num_slots:
            self._touched = slot + 1

    @property
    def touched(self) -> list[Slot]:
        """The first slots, up to the last one that ever had memory; never the dummy."""
        return self.slots[: self._touched]

    def set_frontier(self, slot: int) -> None:
        if slot < self.layout.num_slots:
            self.frontiers[slot] = self.frontier_of(slot)

    # -- running and parking ---------------------------------------------------------------------------------------

    def free_slots(self, below: int | None = None) -> list[int]:
        """Slots that a sequence may be given, in order; only those below a number where one is given."""
        last = self.layout.num_slots if below is None else min(below, self.layout.num_slots)
        free = [i for i, slot in enumerate(self.slots[: min(last, self._touched)]) if slot.is_free]
        return [*free, *range(self._touched, last)]

    def first_free(self) -> int | None:
        """The lowest slot that a sequence may be given."""
        for index, slot in enumerate(self.touched):
            if slot.is_free:
                return index
        return self._touched if self._touched < self.layout.num_slots else None

    def occupy(self, tokens: int, limit: int, ahead: int = 0) -> tuple[int, int]:
        """Choose a free slot below `limit`, back it for `tokens`; returns the slot and the mappings made.

        The best-fitting parked slot is adopted: the smallest that holds `tokens` and not more than twice as much, else
        the largest that holds less; where none is parked, the lowest free slot is taken. There must be one below
        `limit`. What is parked there beyond the need comes along while memory is plenty and it is not much; else it is
        taken away first. What comes along beyond `ahead` tokens more is withheld, for `reclaim.trim` to take.
        Raises OutOfPages or DriverError; no sequence changed.
        """
        need = self.layout.bytes_for(tokens)

        def fit(slot: int) -> tuple[int, int, int]:
            mapped = self.slots[slot].mapped
            if need <= mapped:
                return (0, mapped, slot) if mapped <= 2 * need else (2, mapped, slot)
            return (1, -mapped, slot)

        chosen = min(self.free_slots(limit), key=fit)
        mapped, fence = self.slots[chosen].mapped, self.slots[chosen].fence
        if is_short_for(self, need):
            if mapped > need + need // SLACK:
                self._trim(chosen, need)
        elif mapped > 2 * need and (fence is None or fence.done()):
            self._trim(chosen, need)
        self.slots[chosen].state = RUNNING
        try:
            maps = self.grow({chosen: tokens})
        except BaseException:
            self.set_idle(chosen)
            raise
        slot, need = self.slots[chosen], self.layout.bytes_for(min(tokens + ahead, self.layout.max_seq_len))
        whole_beyond = slot.mapped - slot.columns[-1][0].size >= need
        self.withhold(chosen, need if whole_beyond else None)
        slot.since = monotonic()
        return chosen, maps

    def withhold(self, index: int, offered: int | None) -> None:
        """Offer a slot's sequence so many bytes a range of what is mapped and no more; None is all."""
        self.slots[index].offered = offered
        if offered is None:
            self.withheld.discard(index)
        else:
            self.withheld.add(index)
        self.set_frontier(index)

    def offer(self, index: int, size: int) -> None:
        """Let a slot's sequence use so many bytes a range of what is mapped, if it may not yet. No driver call."""
        slot = self.slots[index]
        if slot.offered is not None:
            offered = max(slot.offered, size)
            self.withhold(index, offered if offered < slot.mapped else None)

    def _trim(self, index: int, keep: int) -> None:
        """Unmap the tail of a free slot, behind its fence, until no more than `keep` bytes a range are left."""
        slot = self.slots[index]
        if slot.fence is not None:
            slot.fence.wait()
        while slot.mapped > keep:
            self.unmap_tail(index)

    def park(self, slot: int, fence: Fence) -> None:
        """End a slot's use. Its memory stays mapped until adopted or, once `fence` is done, taken away.

        Memory shared with another slot is not for adopting: such a slot is emptied.
        """
        self.slots[slot].fence = fence
        self.set_idle(slot)
        self.slots[slot].since = monotonic()
        if any(mapping.extent.serial in self.places for column in self.slots[slot].columns for mapping in column):
            self.leave(slot, fence)

    def set_idle(self, slot: int) -> None:
        broken = self.slots[slot].broken
        self.slots[slot].state = RETIRED if broken else FREE
        self.withhold(slot, None)

    # -- taking away -----------------------------------------------------------------------------------------------

    def idle_slots(self) -> list[int]:
        """Slots without a sequence, the longest-parked first."""
        idle = (i for i, slot in enumerate(self.touched) if slot.state is not RUNNING)
        return sorted(idle, key=lambda index: self.slots[index].since)

    @property
    def is_leaving(self) -> bool:
        """Whether anything waits for a fence to be unmapped, or can be."""
        return bool(self._leaving or self.withheld)

    @property
    def live_mappings(self) -> int:
        """Mappings that the driver holds for this arena."""
        return sum(reservation.mappings for reservation in (*self.reservations, *self._scratches))

    def check_ceiling(self, more: int) -> None:
        """Raise OutOfPages where the driver would not bear so many more mappings."""
        driver = self.pool.driver
        if driver.mappings.alive + more > driver.max_mappings:
            raise OutOfPages(
                f"{more:,} mappings asked for; {driver.mappings.alive:,} are alive, {self.live_mappings:,} of them in "
                f"this cache, and the driver bears about {driver.max_mappings:,}; release sequences, or use fewer "
                "ranges (layers_per_range) or larger prompts' extents"
            )

    @property
    def parked_bytes(self) -> int:
        """Bytes mapped for nobody, in all ranges."""
        return sum(slot.mapped for slot in self.touched if slot.state is not RUNNING) * self.layout.num_ranges

    @property
    def parked_slots(self) -> int:
        """Free slots with memory in them."""
        return sum(slot.state is FREE and bool(slot.columns) for slot in self.touched)

    @property
    def running_bytes(self) -> int:
        """Bytes mapped for running sequences, in all ranges, without the dummy slot; what they share counts once."""
        running = [slot for slot in self.touched if slot.state is RUNNING]
        if not self.places:
            return sum(slot.mapped for slot in running) * self.layout.num_ranges
        extents = {m.extent.serial: m.size for slot in running for column in slot.columns for m in column}
        return sum(extents.values())

    def empty(self, index: int) -> None:
        """Unmap all that is parked in a free slot, behind its fence."""
        self._trim(index, 0)

    def cut(self, index: int, first: int) -> None:
        """Take a slot's memory from its column `first` on, though its sequence needs it: its books are in order then,
        and its frontier says what is left."""
        slot = self.slots[index]
        slot.broken = True
        while len(slot.columns) > first:
            self.unmap_tail(index)

    def scratch(self) -> Reservation:
        """Addresses for one slot in each range, with nothing mapped in them."""
        for reservation in self._scratches:
            if not reservation.mappings:
                return reservation
        made = Reservation(self.pool.driver, self.layout.num_ranges * self.layout.slot_stride)
        self._scratches.append(made)
        return made

    def unmap_tail(self, index: int) -> int:
        slot = self.slots[index]
        column = slot.columns.pop()
        self.set_mapped(index, slot.mapped - column[0].size)
        stuck = [mapping for mapping in column if not self.unmap(mapping)]
        for mapping in column:
            self.unshare(mapping.extent)
        given = [mapping.extent for mapping in column if not mapping.extent.mappings]
        self.pool.give(given)
        self.set_aside(index, stuck)
        return sum(extent.size for extent in given)

    def unmap(self, mapping: Mapping) -> bool:
        try:
            mapping.close()
        except DriverError as error:
            logger.warning("a mapping of %d bytes at %#x is quarantined: %s", mapping.size, mapping.address, error)
            return False
        return True

    def set_aside(self, index: int, stuck: list[Mapping]) -> None:
        """Quarantine mappings that could not be undone, and the slot whose addresses they hold."""
        if stuck:
            self._touch(index)
            self.quarantine += stuck
            self.slots[index].broken = True
            if self.slots[index].state is not RUNNING:
                self.slots[index].state = RETIRED

    # -- leaving ---------------------------------------------------------------------------------------------------

    def leave(self, index: int, fence: Fence) -> None:
        """Take everything out of a slot's books at once, and out of its addresses once `fence` is done."""
        slot = self.slots[index]
        slot.leaving = [mapping for column in slot.columns for mapping in column]
        self._leaving.add(index)
        slot.fence = fence
        for mapping in slot.leaving:
            self.unshare(mapping.extent)
        slot.columns = []
        self.set_mapped(index, 0)

    def settle(self, wait: bool = False) -> None:
        """Unmap what is leaving and whose fence is done; with `wait`, all of it."""
        for index in sorted(self._leaving):
            slot = self.slots[index]
            if slot.fence is not None and (wait or slot.fence.done()):
                slot.fence.wait()
                self._leaving.discard(index)
                leaving, slot.leaving = slot.leaving, []
                self.set_aside(index, [mapping for mapping in leaving if not self.unmap(mapping)])
                self.pool.give(mapping.extent for mapping in leaving if not mapping.extent.mappings)

    def share(self, extent: Extent) -> None:
        """An extent stands in one more slot."""
        self.places[extent.serial] = self.places.get(extent.serial, 1) + 1

    def unshare(self, extent: Extent) -> None:
        """It stands in one slot less; nothing where it stood in one alone."""
        places = self.places.pop(extent.serial, 1) - 1
        if places > 1:
            self.places[extent.serial] = places

    # -- books -----------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise InvariantViolation, with its numbers, unless every extent is in exactly one place, or in several slots
        as shared, and every frontier is backed."""
        check_arena(self)

    def frontier_of(self, slot: int) -> int:
        """Tokens that a slot's sequence may use; 0 without one: what is mapped there may go at any time."""
        mapped, offered = self.slots[slot].mapped, self.slots[slot].offered
        running = self.slots[slot].state is RUNNING
        return self.layout.tokens_in(mapped if offered is None else min(offered, mapped)) if running else 0

    def clear(self, fence: Fence) -> None:
        """Take the memory of all slots but the dummy into the pool once `fence` is done; all are free then, but for
        those that an unmap fails in. What was quarantined is tried again. Idempotent. Raises DriverError where a fence
        fails; calling again goes on."""
        fence.wait()
        self.settle(wait=True)
        for index, slot in enumerate(self.touched):
            while slot.columns:
                self.unmap_tail(index)
            slot.fence, slot.since = None, 0.0
        self._retry_quarantine()
        self.pool.retry()
        broken = {m.offset // self.layout.slot_stride for m in self.quarantine if m.reservation in self.reservations}
        for index, slot in enumerate(self.touched):
            slot.broken = index in broken
            self.set_idle(index)

    def _retry_quarantine(self) -> None:
        retry, self.quarantine = self.quarantine, []
        self.quarantine = [mapping for mapping in retry if not self.unmap(mapping)]
        self.pool.give({m.extent.serial: m.extent for m in retry if not m.extent.mappings}.values())

    def close(self, fence: Fence | None = None) -> None:
        """Unmap and free everything once `fence` is done; what was quarantined is tried again.

        Idempotent. Raises DriverError where something still fails; calling again tries again.
        """
        if fence is not None:
            fence.wait()
        self.settle(wait=True)
        for index in range(len(self.slots)):
            while self.slots[index].columns:
                self.unmap_tail(index)
        self._retry_quarantine()
        with ExitStack() as closing:
            closing.callback(self.pool.close)
            for reservation in (*self.reservations, *self._scratches):
                if not reservation.mappings:
                    closing.callback(reservation.close)
        if self.quarantine:
            held = sum(mapping.size for mapping in self.quarantine)
            raise DriverError("NOT_UNMAPPED", "unmap", (held,), f"{len(self.quarantine)} mappings are still held")
