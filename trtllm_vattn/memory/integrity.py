"""Do the books of an arena agree with one another? What is checked is what the invariants of vmm/base.py promise."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from trtllm_vattn.errors import InvariantViolation
from trtllm_vattn.vmm.owners import Extent

if TYPE_CHECKING:
    from trtllm_vattn.memory.arena import Arena


def check_arena(arena: Arena) -> None:
    """Raise InvariantViolation, with its numbers, where they do not."""
    pool = arena.pool
    extents: dict[int, Extent] = {}
    placed: Counter[int] = Counter()
    mapped: Counter[int] = Counter()
    for slot in arena.slots:
        for mapping in (m for column in slot.columns for m in column):
            extents[mapping.extent.serial] = mapping.extent
            placed[mapping.extent.serial] += 1
            mapped[mapping.extent.serial] += 1
        for mapping in slot.leaving:
            extents[mapping.extent.serial] = mapping.extent
            mapped[mapping.extent.serial] += 1
    for mapping in arena.quarantine:
        extents[mapping.extent.serial] = mapping.extent
        mapped[mapping.extent.serial] += 1
    for serial, extent in extents.items():
        if mapped[serial] != extent.mappings:
            raise InvariantViolation(
                f"extent {serial} is mapped {extent.mappings} times, {mapped[serial]} in the books"
            )
    for serial in placed.keys() | arena.places.keys():
        if placed[serial] != arena.places.get(serial, 1):
            raise InvariantViolation(
                f"extent {serial} stands in {placed[serial]} slots, in {arena.places.get(serial, 1)} in the books"
            )
    for extent in [*pool.stocked(), *pool.quarantine]:
        if extent.serial in extents or extent.mappings:
            raise InvariantViolation(f"extent {extent.serial} is in the pool and mapped {extent.mappings} times")
        extents[extent.serial] = extent
    total = sum(extent.size for extent in extents.values())
    if total != pool.held_bytes:
        raise InvariantViolation(f"extents add up to {total:,} bytes, the pool holds {pool.held_bytes:,}")
    if pool.held_bytes > pool.budget:
        raise InvariantViolation(f"{pool.held_bytes:,} bytes held of a budget of {pool.budget:,}")
    for index in range(len(arena.slots)):
        _check_slot(arena, index)


def _check_slot(arena: Arena, index: int) -> None:
    slot = arena.slots[index]
    offset = start = index * arena.layout.slot_stride
    for column in slot.columns:
        for mapping, reservation in zip(column, arena.reservations, strict=True):
            if (mapping.reservation, mapping.offset, mapping.size) != (reservation, offset, column[0].size):
                raise InvariantViolation(
                    f"slot {index}: {mapping.size:,} bytes at offset {mapping.offset:,}, expected "
                    f"{column[0].size:,} at {offset:,}"
                )
        offset += column[0].size
    if offset - start != slot.mapped:
        raise InvariantViolation(f"slot {index}: {offset - start:,} bytes mapped, {slot.mapped:,} in the books")
    if slot.leaving and (slot.columns or slot.state.value == "running"):
        raise InvariantViolation(
            f"slot {index} ({slot.state.value}) is in use while {len(slot.leaving)} mappings leave"
        )
    if index < arena.layout.num_slots and arena.frontiers[index] != arena.frontier_of(index):
        raise InvariantViolation(
            f"slot {index} ({slot.state.value}): frontier {arena.frontiers[index]}, but {slot.mapped:,} bytes back "
            f"{arena.frontier_of(index)} tokens"
        )
