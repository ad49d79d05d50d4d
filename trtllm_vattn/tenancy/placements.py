"""Which lease lies where in which slot, noted in a journal where it changed: of a slot that grew, what it grew by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from trtllm_vattn.memory.slot import RangeGroup, Stripe
from trtllm_vattn.tenancy.journal import Journal

Placement = tuple[int, int | None, Sequence[RangeGroup], bool]
"""A slot, the sequence that runs in it, or None, its range groups, and whether the sequence came there since its last
note."""


class _Noted:
    """What is noted of a range group of a slot."""

    __slots__ = ("lower", "stripes")

    def __init__(self) -> None:
        self.lower = 0
        self.stripes: list[Stripe] = []


class Placements:
    """Notes what slots hold, and remembers what of it is noted. By one thread at a time, which nothing interrupts.

    Parameters
    ----------
    lease_of : callable
        The lease of a driver's handle.
    """

    def __init__(self, journal: Journal, lease_of: Callable[[int], int]) -> None:
        self._journal, self._lease_of = journal, lease_of
        self._noted: dict[int, tuple[int, list[_Noted]]] = {}
        """The sequence of each slot, and its range groups."""

    def note(self, placements: Iterable[Placement]) -> None:
        """Note what of these slots is not noted so."""
        records: list[Any] = []
        for slot, owner, groups, is_new in placements:
            noted = self._noted.get(slot)
            if noted is not None and noted[0] != owner:
                # Its stripes may be another sequence's by now: nothing of them is taken for this one's.
                records.append((slot, None, [], False))
                del self._noted[slot]
                noted = None
            if owner is None:
                continue
            if is_first := noted is None:
                noted = self._noted[slot] = owner, [_Noted() for _ in groups]
            changes = [self._update(old, group) for old, group in zip(noted[1], groups, strict=True)]
            if is_first or is_new or any(is_changed for is_changed, _ in changes):
                records.append((slot, owner, [change for _, change in changes], is_new))
        if records:
            self._journal.note_slots(records)

    def _update(self, old: _Noted, group: RangeGroup) -> tuple[bool, tuple[int, int, int, list[Any]]]:
        """Whether a group changed; and its first byte, how many stripes went in front, how many behind those stayed,
        and what follows."""
        before, now, front = old.stripes, group.stripes, 0
        keep = len(before)
        # Lists are compared by their members' identity first: a stripe that changes is another list.
        if now[:keep] != before:
            if now and before[0] is not now[0]:
                front = next((place for place, stripe in enumerate(before) if stripe is now[0]), keep)
            pairs = zip(before[front:], now, strict=False)
            keep = next(
                (place for place, (one, other) in enumerate(pairs) if one is not other), min(keep - front, len(now))
            )
            old.stripes = before[front : front + keep]
        added, lease_of = now[keep:], self._lease_of
        is_changed = bool(added) or len(old.stripes) != len(before) or old.lower != group.lower
        old.lower = group.lower
        old.stripes += added
        leases = [(stripe[0].size, [lease_of(part.extent.handle) for part in stripe]) for stripe in added]
        return is_changed, (group.lower, front, keep, leases)
