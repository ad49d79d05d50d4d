"""Slots at fixed addresses, backed by extents that come and go.

A slot is free or running. A free slot may be *parked*: its last sequence is gone and its extents are still mapped, so
that the next sequence adopts them without a driver call (the idea of TensorRT-LLM PR #15931's parked ranges). Only
pressure unmaps, from the tail of the longest-parked slot, behind the fence that was recorded when it was parked.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Mapping as MappingType
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from trtllm_vattn.errors import ConfigError, DriverError, InvariantViolation, OutOfPages
from trtllm_vattn.memory.layout import SlotLayout
from trtllm_vattn.memory.pool import ExtentPool
from trtllm_vattn.vmm.base import Fence
from trtllm_vattn.vmm.owners import Extent, Mapping, Reservation, RollbackFailed

logger = logging.getLogger(__name__)


class SlotState(enum.Enum):
    FREE = "free"
    RUNNING = "running"
    RETIRED = "retired"
    """An unmap failed in it: its addresses are not used again."""


@dataclass
class Slot:
    """What backs one slot.

    `columns` lists, from the slot's start, mappings of equal size and offset, one in each range; `mapped` is their
    bytes in one range. `parked_at` orders free slots by when they were parked.
    """

    columns: list[list[Mapping]] = field(default_factory=list)
    mapped: int = 0
    state: SlotState = SlotState.FREE
    fence: Fence | None = None
    parked_at: int = 0
    broken: bool = False


class Arena:
    """Equal reservations divided into slots; a slot's frontier is the same in all of them.

    Raises
    ------
    ConfigError
        The budget cannot back one token of the dummy slot.
    AddressSpaceExhausted, DriverError
        A reservation, or the dummy slot's memory, could not be had; nothing is left behind.
    """

    def __init__(self, pool: ExtentPool, layout: SlotLayout) -> None:
        self.pool, self.layout = pool, layout
        self.slots = [Slot() for _ in range(layout.num_slots + 1)]
        self.frontiers = np.zeros(layout.num_slots, np.int64)
        self.quarantine: list[Mapping] = []
        self.reservations: list[Reservation] = []
        self._parkings = 0
        dummy = layout.num_slots
        least = layout.bytes_for(1) * layout.num_ranges
        if least > pool.available_bytes:
            raise ConfigError(
                f"the budget of {pool.budget:,} bytes is smaller than one granule in each of {layout.num_ranges} "
                f"ranges ({least:,} bytes); raise the budget or layers_per_range"
            )
        with ExitStack() as undo:
            for _ in range(layout.num_ranges):
                reservation = Reservation(pool.driver, layout.range_bytes)
                undo.callback(reservation.close)
                self.reservations.append(reservation)
            self.slots[dummy].state = SlotState.RUNNING
            self.grow({dummy: 1})
            undo.pop_all()

    # -- growing ---------------------------------------------------------------------------------------------------

    def grow(self, wants: MappingType[int, int]) -> int:
        """Back each slot for the tokens wanted, all or none; returns the number of mappings made.

        Raises OutOfPages, or DriverError where a driver call failed; nothing changed.
        """
        growth = {}
        for slot, tokens in wants.items():
            more = self.layout.bytes_for(tokens) - self.slots[slot].mapped
            if more > 0:
                growth[slot] = more
        if not growth:
            return 0
        total = sum(growth.values()) * self.layout.num_ranges
        while True:
            self._make_available(total)
            try:
                return self._place_all(growth)
            except OutOfPages:
                # The device, or quarantine, leaves less than the budget says; what is parked may make up for it.
                if not self.reclaim(total):
                    raise

    def _place_all(self, growth: MappingType[int, int]) -> int:
        with ExitStack() as undo:
            grown = {slot: self._place(slot, more, undo) for slot, more in growth.items()}
            undo.pop_all()
        for slot, columns in grown.items():
            self.slots[slot].columns += columns
            self._set_mapped(slot, self.slots[slot].mapped + growth[slot])
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
            try:
                placed += reservation.map(offset, extents)
            except RollbackFailed as error:
                self._set_aside(slot, error.left)
                raise
            rows.append(placed)
        return [list(column) for column in zip(*rows, strict=True)]

    def _take_back(self, slot: int, extents: list[Extent], placed: list[Mapping]) -> None:
        self._set_aside(slot, [mapping for mapping in reversed(placed) if not self._unmap(mapping)])
        self.pool.give(extent for extent in extents if not extent.mappings)

    def _set_mapped(self, slot: int, mapped: int) -> None:
        self.slots[slot].mapped = mapped
        self._set_frontier(slot)

    def _set_frontier(self, slot: int) -> None:
        """A slot without a sequence has none: what is mapped there may be taken at any time."""
        if slot < self.layout.num_slots:
            self.frontiers[slot] = self._frontier_of(slot)

    def _frontier_of(self, slot: int) -> int:
        running = self.slots[slot].state is SlotState.RUNNING
        return self.layout.tokens_in(self.slots[slot].mapped) if running else 0

    # -- running and parking ---------------------------------------------------------------------------------------

    def free_slots(self) -> list[int]:
        """Slots that a sequence may be given, in order."""
        dummy = self.layout.num_slots
        return [index for index in range(dummy) if self.slots[index].state is SlotState.FREE]

    def occupy(self, tokens: int, limit: int) -> tuple[int, int]:
        """Choose a free slot below `limit`, back it for `tokens`; returns the slot and the mappings made.

        The best-fitting parked slot is adopted: the smallest that holds `tokens`, else the largest; where none is
        parked, the lowest free slot is taken. There must be a free slot below `limit`.
        Raises OutOfPages or DriverError; nothing changed.
        """
        need = self.layout.bytes_for(tokens)

        def fit(slot: int) -> tuple[int, int, int]:
            mapped = self.slots[slot].mapped
            return (0, mapped, slot) if mapped >= need else (1, -mapped, slot)

        chosen = min((slot for slot in self.free_slots() if slot < limit), key=fit)
        self.slots[chosen].state = SlotState.RUNNING
        try:
            maps = self.grow({chosen: tokens})
        except BaseException:
            self._set_idle(chosen)
            raise
        self._set_frontier(chosen)
        return chosen, maps

    def park(self, slot: int, fence: Fence) -> None:
        """End a slot's use. Its memory stays mapped until adopted or, once `fence` is done, taken away."""
        self._parkings += 1
        self.slots[slot].parked_at = self._parkings
        self.slots[slot].fence = fence
        self._set_idle(slot)

    def _set_idle(self, slot: int) -> None:
        broken = self.slots[slot].broken
        self.slots[slot].state = SlotState.RETIRED if broken else SlotState.FREE
        self._set_frontier(slot)

    # -- taking away -----------------------------------------------------------------------------------------------

    def _idle(self) -> list[int]:
        """Slots without a sequence, the longest-parked first."""
        idle = (i for i, slot in enumerate(self.slots) if slot.state is not SlotState.RUNNING)
        return sorted(idle, key=lambda index: self.slots[index].parked_at)

    @property
    def parked_bytes(self) -> int:
        """Bytes mapped for nobody, in all ranges."""
        return sum(self.slots[index].mapped for index in self._idle()) * self.layout.num_ranges

    @property
    def running_bytes(self) -> int:
        """Bytes mapped for running sequences, in all ranges, without the dummy slot."""
        running = (slot.mapped for slot in self.slots[:-1] if slot.state is SlotState.RUNNING)
        return sum(running) * self.layout.num_ranges

    def _make_available(self, size: int) -> None:
        short = size - self.pool.available_bytes
        if short <= 0:
            return
        if short > self.parked_bytes:
            raise OutOfPages(
                f"{size:,} bytes asked for; of a budget of {self.pool.budget:,} only {self.pool.available_bytes:,} are "
                f"free and {self.parked_bytes:,} parked; release or preempt a sequence, or raise the budget"
            )
        self.reclaim(short)

    def reclaim(self, size: int) -> int:
        """Unmap at least `size` bytes of parked slots if there are so many; returns the bytes given to the pool."""
        given = 0
        for index in self._idle():
            slot = self.slots[index]
            while slot.columns and given < size:
                if slot.fence is not None:
                    slot.fence.wait()
                given += self._unmap_tail(index)
        return given

    def _unmap_tail(self, index: int) -> int:
        slot = self.slots[index]
        column = slot.columns.pop()
        self._set_mapped(index, slot.mapped - column[0].size)
        stuck = [mapping for mapping in column if not self._unmap(mapping)]
        given = [mapping.extent for mapping in column if mapping not in stuck]
        self.pool.give(given)
        self._set_aside(index, stuck)
        return sum(extent.size for extent in given)

    def _unmap(self, mapping: Mapping) -> bool:
        try:
            mapping.close()
        except DriverError as error:
            logger.warning("a mapping of %d bytes at %#x is quarantined: %s", mapping.size, mapping.address, error)
            return False
        return True

    def _set_aside(self, index: int, stuck: list[Mapping]) -> None:
        """Quarantine mappings that could not be undone, and the slot whose addresses they hold."""
        if stuck:
            self.quarantine += stuck
            self.slots[index].broken = True
            if self.slots[index].state is not SlotState.RUNNING:
                self.slots[index].state = SlotState.RETIRED

    # -- books -----------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise InvariantViolation, with its numbers, unless every extent is in exactly one place and every frontier
        is backed."""
        places: dict[int, str] = {}

        def put(extent: Extent, place: str) -> None:
            if extent.serial in places:
                raise InvariantViolation(f"extent {extent.serial} is in {places[extent.serial]} and in {place}")
            places[extent.serial] = place

        total = 0
        mapped = [m for slot in self.slots for column in slot.columns for m in column] + self.quarantine
        for mapping in mapped:
            put(mapping.extent, f"the mapping at {mapping.address:#x}")
            total += mapping.size
        for extent in [*self.pool.stocked(), *self.pool.quarantine]:
            put(extent, "the pool")
            total += extent.size
        if total != self.pool.held_bytes:
            raise InvariantViolation(f"extents add up to {total:,} bytes, the pool holds {self.pool.held_bytes:,}")
        if self.pool.held_bytes > self.pool.budget:
            raise InvariantViolation(f"{self.pool.held_bytes:,} bytes held of a budget of {self.pool.budget:,}")
        for index, slot in enumerate(self.slots):
            self._check_slot(index, slot)

    def _check_slot(self, index: int, slot: Slot) -> None:
        offset = start = index * self.layout.slot_stride
        for column in slot.columns:
            for mapping, reservation in zip(column, self.reservations, strict=True):
                if (mapping.reservation, mapping.offset, mapping.size) != (
                    reservation,
                    offset,
                    column[0].size,
                ):
                    raise InvariantViolation(
                        f"slot {index}: {mapping.size:,} bytes at offset {mapping.offset:,}, expected "
                        f"{column[0].size:,} at {offset:,}"
                    )
            offset += column[0].size
        if offset - start != slot.mapped:
            raise InvariantViolation(f"slot {index}: {offset - start:,} bytes mapped, {slot.mapped:,} in the books")
        if index < self.layout.num_slots and self.frontiers[index] != self._frontier_of(index):
            raise InvariantViolation(
                f"slot {index} ({slot.state.value}): frontier {self.frontiers[index]}, but {slot.mapped:,} bytes back "
                f"{self._frontier_of(index)} tokens"
            )

    def close(self, fence: Fence) -> None:
        """Unmap and free everything once `fence` is done; what was quarantined is tried again.

        Idempotent. Raises DriverError where something still fails; calling again tries again.
        """
        fence.wait()
        for index in range(len(self.slots)):
            while self.slots[index].columns:
                self._unmap_tail(index)
        retry, self.quarantine = self.quarantine, []
        stuck = [mapping for mapping in retry if not self._unmap(mapping)]
        self.pool.give(mapping.extent for mapping in retry if mapping not in stuck)
        self.quarantine = stuck
        with ExitStack() as closing:
            closing.callback(self.pool.close)
            for reservation in self.reservations:
                if not reservation.mappings:
                    closing.callback(reservation.close)
        if stuck:
            held = sum(mapping.size for mapping in stuck)
            raise DriverError("NOT_UNMAPPED", "unmap", (held,), f"{len(stuck)} mappings are still held")
