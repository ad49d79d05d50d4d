"""One slot of an arena: which memory backs it, and the states that it passes through (drawn in DESIGN.md)."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic

from trtllm_vattn.errors import InvariantViolation
from trtllm_vattn.vmm.base import Fence
from trtllm_vattn.vmm.owners import Mapping

Stripe = list[Mapping]
"""One mapping in each range of a group, all of one size at one offset."""


class SlotState(enum.Enum):
    FREE = "free"
    RUNNING = "running"
    """It backs a sequence."""
    PARKED = "parked"
    """Its last sequence is gone and its memory is still mapped, for the next sequence to adopt."""
    PENDING_UNMAP = "pending unmap"
    """It backs nothing; its last mappings are unmapped once its fence is done, and until then it takes no sequence."""
    RETIRED = "retired"
    """An unmap failed in it: its addresses are not used again."""


FREE, RUNNING, PARKED, PENDING_UNMAP, RETIRED = SlotState
"""Module-level names: looking a member up in its class takes Python 3.11 longer than the rest of a loop over slots."""


@dataclass
class RangeGroup:
    """Ranges whose memory in a slot grows and shrinks together: from byte `lower` of the slot to byte `frontier`.

    Parameters
    ----------
    ranges : sequence of int
        Indices of the ranges.
    lower, frontier : int
        Bytes from the slot's start, where the mapped memory begins and ends.
    stripes : list of Stripe
        The memory between them, in order.
    """

    ranges: Sequence[int]
    lower: int = 0
    frontier: int = 0
    stripes: list[Stripe] = field(default_factory=list)

    @property
    def mapped(self) -> int:
        """Bytes mapped in each range."""
        return self.frontier - self.lower

    def push(self, stripes: list[Stripe]) -> None:
        """Add memory at the frontier."""
        self.stripes += stripes
        self.frontier += sum(stripe[0].size for stripe in stripes)

    def clear(self) -> list[Mapping]:
        """Forget all memory, which begins at 0 the next time; returns the mappings."""
        mappings = [mapping for stripe in self.stripes for mapping in stripe]
        self.stripes, self.lower, self.frontier = [], 0, 0
        return mappings


class Slot:
    """One slot. Its methods are the transitions between its states; none makes a driver call.

    All ranges are one group today, with its lower edge at 0.

    Attributes
    ----------
    groups : tuple of RangeGroup
        What is mapped.
    visible_bytes : int or None
        How far, in bytes from the slot's start, the sequence may use the mapped memory; None is all of it. What the
        sequence found parked beyond that is unmapped once `fence` is done, unless the sequence grows so far before.
    fence : Fence or None
        Recorded after the last use of what is parked, pending, or beyond `visible_bytes`.
    since : float
        When the slot was last started or parked, in seconds of a monotonic clock.
    pending_unmap : list of Mapping
        Still mapped at the slot's addresses and used by no sequence; unmapped once `fence` is done.
    broken : bool
        An unmap failed in it. A running slot that is broken cannot grow; without a sequence it is retired.
    """

    __slots__ = ("broken", "fence", "groups", "pending_unmap", "since", "state", "visible_bytes")

    def __init__(self, num_ranges: int) -> None:
        self.groups = (RangeGroup(range(num_ranges)),)
        self.state = FREE
        self.visible_bytes: int | None = None
        self.fence: Fence | None = None
        self.since = 0.0
        self.pending_unmap: list[Mapping] = []
        self.broken = False

    # -- what it holds ---------------------------------------------------------------------------------------------

    @property
    def is_free(self) -> bool:
        """Whether a sequence may be given it."""
        return self.state is FREE or self.state is PARKED

    @property
    def stripes(self) -> list[Stripe]:
        """Of all groups."""
        return [stripe for group in self.groups for stripe in group.stripes]

    def mappings(self) -> Iterator[Mapping]:
        """What is mapped and not pending."""
        return (mapping for group in self.groups for stripe in group.stripes for mapping in stripe)

    @property
    def mapped(self) -> int:
        """Bytes mapped in a range, where most is."""
        return max(group.mapped for group in self.groups)

    @property
    def mapped_bytes(self) -> int:
        """Bytes mapped in all ranges."""
        return sum(group.mapped * len(group.ranges) for group in self.groups)

    @property
    def lower(self) -> int:
        """Bytes from the slot's start, from which on every range is mapped."""
        return max(group.lower for group in self.groups)

    @property
    def frontier(self) -> int:
        """Bytes from the slot's start, up to which every range is mapped."""
        return min(group.frontier for group in self.groups)

    @property
    def visible_frontier(self) -> int:
        """Bytes from the slot's start that its sequence may use; 0 without a sequence."""
        if self.state is not RUNNING:
            return 0
        return self.frontier if self.visible_bytes is None else min(self.frontier, self.visible_bytes)

    # -- transitions -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """FREE or PARKED → RUNNING."""
        self._check(FREE, PARKED)
        self.state, self.since = RUNNING, monotonic()

    def stop(self) -> None:
        """RUNNING → PARKED; FREE with no memory, RETIRED if broken."""
        self._check(RUNNING)
        self.visible_bytes = None
        self.state = self._idle_state()

    def park(self, fence: Fence) -> None:
        """`stop`; what is mapped may be unmapped once `fence` is done."""
        self.stop()
        self.fence, self.since = fence, monotonic()

    def begin_unmap(self, fence: Fence) -> list[Mapping]:
        """Any state without a sequence → PENDING_UNMAP; returns all its mappings."""
        self._check(FREE, PARKED, PENDING_UNMAP, RETIRED)
        self.fence = fence
        self.pending_unmap += [mapping for group in self.groups for mapping in group.clear()]
        self.state = self._idle_state()
        return self.pending_unmap

    def complete_unmap(self) -> list[Mapping]:
        """PENDING_UNMAP → FREE, or RETIRED if broken; returns the mappings, for the caller to unmap."""
        pending, self.pending_unmap = self.pending_unmap, []
        if self.state is not RUNNING:
            self.state = self._idle_state()
        return pending

    def push(self, group: RangeGroup, stripes: list[Stripe]) -> None:
        """Memory was mapped at a group's frontier."""
        group.push(stripes)
        if self.state is not RUNNING:
            self.state = self._idle_state()

    def pop(self) -> Stripe:
        """Take the last stripe of the group that reaches farthest, for the caller to unmap; PARKED → FREE where it was
        the last one."""
        group = max(self.groups, key=lambda group: (group.frontier, group.mapped))
        stripe = group.stripes.pop()
        group.frontier -= stripe[0].size
        if not group.stripes:
            group.lower = group.frontier = 0
        if self.state is not RUNNING:
            self.state = self._idle_state()
        return stripe

    def raise_lower(self, lower: int, fence: Fence) -> list[Mapping]:
        """Take the stripes that lie wholly below byte `lower` out of use, to be unmapped once `fence` is done; returns
        their mappings. The last stripe stays."""
        self._check(RUNNING)
        front: list[Mapping] = []
        for group in self.groups:
            while len(group.stripes) > 1 and group.lower + group.stripes[0][0].size <= lower:
                stripe = group.stripes.pop(0)
                group.lower += stripe[0].size
                front += stripe
        if front:
            self.fence = fence
            self.pending_unmap += front
        return front

    def mark_broken(self) -> None:
        """An unmap failed in it: RETIRED, now or once its sequence ends."""
        self.broken = True
        if self.state is not RUNNING:
            self.state = self._idle_state()

    def reset(self, broken: bool) -> None:
        """Any state → FREE, or RETIRED if broken; its memory is gone already."""
        self.broken, self.visible_bytes, self.fence, self.since = broken, None, None, 0.0
        self.state = self._idle_state()

    def _idle_state(self) -> SlotState:
        if self.pending_unmap:
            return PENDING_UNMAP
        if self.broken:
            return RETIRED
        return PARKED if any(group.stripes for group in self.groups) else FREE

    def _check(self, *states: SlotState) -> None:
        if self.state not in states:
            expected = " or ".join(state.value for state in states)
            raise InvariantViolation(f"a slot is {self.state.value}, where it must be {expected}")
