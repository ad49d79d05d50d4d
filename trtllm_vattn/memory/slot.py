"""One slot of an arena: which memory backs it, and the states that it passes through (drawn in DESIGN.md)."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import NamedTuple

from trtllm_vattn.errors import InvariantViolation
from trtllm_vattn.vmm.base import Fence
from trtllm_vattn.vmm.owners import Mapping

Stripe = list[Mapping]
"""One mapping in each range of a group, all of one size at one offset."""


class SlotState(enum.Enum):
    FREE = "free"
    RUNNING = "running"
    """It backs a sequence."""
    RETAINED = "retained"
    """Its last sequence is gone, and its tokens are kept for sequences that begin with the same ones."""
    PARKED = "parked"
    """Its last sequence is gone and its memory is still mapped, for the next sequence to adopt, whatever it holds."""
    PENDING_UNMAP = "pending unmap"
    """It backs nothing; its last mappings are unmapped once its fence is done, and until then it takes no sequence."""
    SUSPENDED = "suspended"
    """Its tokens are in host memory and nothing is mapped in it; its addresses are kept for them to come back to."""
    RETIRED = "retired"
    """An unmap failed in it: its addresses are not used again."""


FREE, RUNNING, RETAINED, PARKED, PENDING_UNMAP, SUSPENDED, RETIRED = SlotState
"""Module-level names: looking a member up in its class takes Python 3.11 longer than the rest of a loop over slots."""


class Segment(NamedTuple):
    """Tokens `start` to `stop` (excluded) of a slot lie in the slot `owner`, at the same positions of it."""

    owner: int
    start: int
    stop: int


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
    deficit : int
        How many tokens fewer than its slot's length these ranges hold.
    window : int or None
        How many tokens they have rows for, which later tokens take in turns; None is all.
    window_bytes : int or None
        The memory of so many tokens; the frontier goes no farther.
    rewritten : int
        The sequence's length when its tokens here were moved to other places last: what it was before is gone.
    """

    ranges: Sequence[int]
    lower: int = 0
    frontier: int = 0
    stripes: list[Stripe] = field(default_factory=list)
    deficit: int = 0
    window: int | None = None
    window_bytes: int | None = None
    rewritten: int = 0

    def empty(self, lower: int = 0) -> RangeGroup:
        """The same ranges without memory, which begins at byte `lower`."""
        return RangeGroup(self.ranges, lower, lower, window=self.window, window_bytes=self.window_bytes)

    def held(self, tokens: int) -> int:
        """How many of a sequence's tokens these ranges hold."""
        held = max(0, tokens - self.deficit)
        return held if self.window is None else min(held, self.window)

    @property
    def is_whole(self) -> bool:
        """Whether they have memory for a whole window, and so for sequences of any length."""
        return self.window_bytes is not None and self.frontier >= self.window_bytes

    @property
    def mapped(self) -> int:
        """Bytes mapped in each range."""
        return self.frontier - self.lower

    def push(self, stripes: list[Stripe]) -> None:
        """Add memory at the frontier."""
        self.stripes += stripes
        self.frontier += sum(stripe[0].size for stripe in stripes)

    def ends_behind(self, size: int) -> bool:
        """Whether the last stripe lies wholly behind byte `size`."""
        return bool(self.stripes) and self.frontier - self.stripes[-1][0].size >= size

    def clear(self) -> list[Mapping]:
        """Forget all memory, which begins at 0 the next time; returns the mappings."""
        mappings = [mapping for stripe in self.stripes for mapping in stripe]
        self.stripes, self.lower, self.frontier, self.deficit, self.rewritten = [], 0, 0, 0, 0
        return mappings


class Slot:
    """One slot. Its methods are the transitions between its states; none makes a driver call.

    Attributes
    ----------
    groups : tuple of RangeGroup
        What is mapped: one group of all ranges, or one of each where ranges have lengths of their own.
    segments : tuple of Segment
        Its first tokens, where they lie in other slots; in order, without gaps. Its own memory begins at the page of
        the first token behind them.
    holders : set of int
        Slots that have a segment in this one.
    tokens : int
        Of a retained slot: how many tokens are kept.
    written : int
        Of a retained slot: how many tokens were written in it at most. What lies beyond a window took the places of
        earlier ones.
    priority : float
        Of a retained slot: those of lower priority are evicted first; one of infinite priority never is.
    serial : int
        Of a retained slot: a number that no other one had.
    visible_bytes : int or None
        How far, in bytes from the slot's start, the sequence may use the mapped memory; None is all of it. What the
        sequence found parked beyond that is unmapped once `fence` is done, unless the sequence grows so far before.
    fence : Fence or None
        Recorded after the last use of what is retained, parked, pending, or beyond `visible_bytes`.
    since : float
        When the slot was last started, retained, touched or parked, in seconds of a monotonic clock.
    pending_unmap : list of Mapping
        Still mapped at the slot's addresses and used by no sequence; unmapped once `fence` is done.
    broken : bool
        An unmap failed in it. A running slot that is broken cannot grow; without a sequence it is retired.
    """

    __slots__ = (
        "broken",
        "fence",
        "groups",
        "holders",
        "pending_unmap",
        "priority",
        "segments",
        "serial",
        "since",
        "state",
        "tokens",
        "visible_bytes",
        "written",
    )

    def __init__(self, groups: Sequence[Sequence[int] | RangeGroup]) -> None:
        self.groups = tuple(each.empty() if isinstance(each, RangeGroup) else RangeGroup(each) for each in groups)
        self.state = FREE
        self.segments: tuple[Segment, ...] = ()
        self.holders: set[int] = set()
        self.tokens = self.serial = self.written = 0
        self.priority = 0.0
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
    def is_used(self) -> bool:
        """Whether somebody may read its tokens."""
        return self.state is RUNNING or self.state is RETAINED

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
        """Bytes from the slot's start, up to which every range is mapped that does not have a whole window."""
        edges = [group.frontier for group in self.groups if not group.is_whole]
        return min(edges) if edges else max(group.frontier for group in self.groups)

    @property
    def prefix(self) -> int:
        """Tokens that lie in other slots."""
        return self.segments[-1].stop if self.segments else 0

    @property
    def rewritten(self) -> int:
        """The sequence's length when its tokens were moved to other places last; 0 where they never were."""
        return max(group.rewritten for group in self.groups)

    # -- transitions -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """FREE or PARKED → RUNNING."""
        self._check(FREE, PARKED)
        self.state, self.since = RUNNING, monotonic()

    def stop(self) -> None:
        """RUNNING → PARKED; FREE with no memory, RETIRED if broken."""
        self._check(RUNNING)
        self.visible_bytes = None
        self._become_idle()

    def park(self, fence: Fence) -> None:
        """`stop`; what is mapped may be unmapped once `fence` is done."""
        self.stop()
        self.fence, self.since = fence, monotonic()

    def retain(self, tokens: int, serial: int, fence: Fence | None) -> None:
        """RUNNING → RETAINED; its tokens may be read by others, and unmapped once `fence` is done."""
        self._check(RUNNING)
        self.state, self.visible_bytes = RETAINED, None
        self.tokens, self.serial, self.priority, self.written = tokens, serial, 0.0, tokens
        self.fence, self.since = fence, monotonic()

    def adopt(self) -> None:
        """RETAINED → RUNNING, with its memory, segments and tokens."""
        self._check(RETAINED)
        self.state, self.since, self.tokens = RUNNING, monotonic(), 0

    def touch(self, priority: float) -> None:
        """RETAINED, used now; `priority` from now on."""
        self._check(RETAINED)
        self.priority, self.since = priority, monotonic()

    def shrink(self, tokens: int) -> None:
        """RETAINED, with fewer tokens; its memory stays."""
        self._check(RETAINED)
        self.tokens = tokens

    def evict(self) -> None:
        """RETAINED → PARKED; FREE with no memory, RETIRED if broken."""
        self._check(RETAINED)
        self._become_idle()

    def suspend(self, fence: Fence | None = None) -> None:
        """RUNNING or RETAINED → SUSPENDED; its mappings are unmapped already, or with a fence once that is done. It
        keeps its segments and holders."""
        self._check(RUNNING, RETAINED)
        held = [mapping for group in self.groups for mapping in group.clear()]
        self.state, self.visible_bytes, self.fence, self.tokens = SUSPENDED, None, fence, 0
        if fence is not None:
            # What was pending before was so behind an earlier one.
            self.pending_unmap += held

    def resume(self, groups: Sequence[RangeGroup], state: SlotState, tokens: int, serial: int) -> None:
        """SUSPENDED → RUNNING or RETAINED, as it was, with memory that was mapped and filled again."""
        self._check(SUSPENDED)
        self.groups, self.state, self.tokens, self.serial = tuple(groups), state, tokens, serial

    def abandon(self) -> None:
        """SUSPENDED → FREE, or RETIRED if broken; nobody wants its tokens any more."""
        self._check(SUSPENDED)
        self._become_idle()

    def begin_unmap(self, fence: Fence | None) -> list[Mapping]:
        """Any state in which it is not used → PENDING_UNMAP; returns all its mappings."""
        self._check(FREE, PARKED, PENDING_UNMAP, RETIRED)
        self.fence = fence
        self.pending_unmap += [mapping for group in self.groups for mapping in group.clear()]
        self._become_idle()
        return self.pending_unmap

    def complete_unmap(self) -> list[Mapping]:
        """PENDING_UNMAP → FREE, or RETIRED if broken; returns the mappings, for the caller to unmap."""
        pending, self.pending_unmap = self.pending_unmap, []
        self._update_idle()
        return pending

    def push(self, group: RangeGroup, stripes: list[Stripe]) -> None:
        """Memory was mapped at a group's frontier."""
        group.push(stripes)
        self._update_idle()

    def pop(self, group: RangeGroup | None = None) -> Stripe:
        """Take the last stripe of a group, or of the one that reaches farthest, for the caller to unmap; PARKED → FREE
        where it was the last one."""
        if group is None:
            group = max((group for group in self.groups if group.stripes), key=lambda group: group.frontier)
        stripe = group.stripes.pop()
        group.frontier -= stripe[0].size
        self._update_idle()
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
        self._set_pending(front, fence)
        return front

    def lower_frontier(self, group: RangeGroup, size: int, fence: Fence) -> list[Mapping]:
        """Take a group's stripes that lie wholly behind byte `size` out of use, to be unmapped once `fence` is done;
        returns their mappings."""
        self._check(RUNNING)
        tail: list[Mapping] = []
        while group.ends_behind(size):
            tail += self.pop(group)
        self._set_pending(tail, fence)
        return tail

    def _set_pending(self, mappings: list[Mapping], fence: Fence) -> None:
        if mappings:
            self.fence = fence
            self.pending_unmap += mappings

    def mark_broken(self) -> None:
        """An unmap failed in it: RETIRED, now or once it is not used any more."""
        self.broken = True
        self._update_idle()

    def mend(self) -> None:
        """What failed to be unmapped in it is unmapped; where it was RETIRED, it is FREE."""
        self.broken = False
        self._update_idle()

    def reset(self, broken: bool) -> None:
        """Any state → FREE, or RETIRED if broken; its memory is gone already, and nobody has a segment anywhere."""
        self.broken, self.visible_bytes, self.fence, self.since = broken, None, None, 0.0
        self.segments = ()
        self.holders.clear()
        self._become_idle()

    def _update_idle(self) -> None:
        if not self.is_used and self.state is not SUSPENDED:
            self._become_idle()

    def _become_idle(self) -> None:
        """Nobody reads its tokens; what state that is follows from what is mapped."""
        self.tokens = 0
        for group in self.groups:
            group.deficit = group.rewritten = 0
            if not group.stripes:
                group.lower = group.frontier = 0
        if self.pending_unmap:
            self.state = PENDING_UNMAP
        elif self.broken:
            self.state = RETIRED
        else:
            self.state = PARKED if any(group.stripes for group in self.groups) else FREE

    def _check(self, *states: SlotState) -> None:
        if self.state not in states:
            expected = " or ".join(state.value for state in states)
            raise InvariantViolation(f"a slot is {self.state.value}, where it must be {expected}")
