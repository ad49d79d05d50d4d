"""Which lease lies where in which slot, noted in a journal where it changed: of a slot that grew, what it grew by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from trtllm_vattn.memory.slot import RangeGroup, Stripe
from trtllm_vattn.tenancy.journal import Journal


class Placement(NamedTuple):
    """A slot, the sequence that runs in it, or None, its range groups, and whether the sequence came there since its
    last note."""

    slot: int
    owner: int | None
    groups: Sequence[RangeGroup]
    is_new: bool


class Placements:
    """Notes what slots hold, and remembers what of it is noted.

    Parameters
    ----------
    lease_of : callable
        The lease of a driver's handle.
    """

    def __init__(self, journal: Journal, lease_of: Callable[[int], int]) -> None:
        self._journal, self._lease_of = journal, lease_of
        self._noted: dict[int, tuple[int, list[tuple[int, list[Stripe]]]]] = {}
        """By slot: the sequence, and of each range group the first byte and the stripes."""

    def note(self, placements: Iterable[Placement]) -> None:
        """Note what of these slots is not noted so."""
        records: list[Any] = []
        now = dict(self._noted)
        for slot, owner, groups, is_new in placements:
            noted = now.get(slot)
            if owner is None:
                if noted is not None:
                    records.append((slot, None, [], False))
                    del now[slot]
                continue
            if noted is not None and noted[0] != owner:
                # Its stripes may be another sequence's by now: nothing of them is taken for this one's.
                records.append((slot, None, [], False))
                noted = None
            before = noted[1] if noted is not None else [(-1, [])] * len(groups)
            changes = [self._change(old, group) for (_, old), group in zip(before, groups, strict=True)]
            if is_new or any(
                lower != group.lower or front or added or keep < len(old)
                for (lower, old), group, (_, front, keep, added) in zip(before, groups, changes, strict=True)
            ):
                records.append((slot, owner, changes, is_new))
                now[slot] = owner, [(group.lower, list(group.stripes)) for group in groups]
        if records:
            self._journal.note_slots(records)
            self._noted = now

    def _change(self, old: list[Stripe], group: RangeGroup) -> tuple[int, int, int, list[tuple[int, list[int]]]]:
        """The group's first byte, how many stripes went in front, how many behind those stayed, and what follows."""
        new, front = group.stripes, 0
        if old and new and old[0] is not new[0]:
            front = next((place for place, stripe in enumerate(old) if stripe is new[0]), len(old))
        rest = old[front:]
        most = min(len(rest), len(new))
        keep = most
        # A list knows its own members without a look inside.
        if rest[:most] != new[:most]:
            keep = next(place for place, (one, other) in enumerate(zip(rest, new, strict=False)) if one != other)
        lease_of = self._lease_of
        added = [(stripe[0].size, [lease_of(part.extent.handle) for part in stripe]) for stripe in new[keep:]]
        return group.lower, front, keep, added
