"""A cache whose budget is what a broker lends. Needs nothing of msgspec: a cache without a broker imports it, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple, Protocol

from trtllm_vattn.errors import KVCacheOutOfMemory
from trtllm_vattn.memory.lifetime import CacheMemory
from trtllm_vattn.memory.slot import RUNNING
from trtllm_vattn.sizes import MOST

if TYPE_CHECKING:
    from trtllm_vattn.tenancy.journal import Journal

REPORT_S = 0.01
"""Seconds between two looks at what is needed: a look costs some microseconds a running slot."""
HEADROOM = 8
"""This part of what is needed is wanted besides, for running sequences to grow into."""
PART_S = 0.002
"""Seconds that a step waits at once while memory that no sequence uses is given back."""
FIRST_PART = 8
"""Granules that are taken to be given back in that time, before it was seen."""
WAKE_S = 10.0
"""Seconds that waking waits for memory that others have to give back first."""


class Lease(NamedTuple):
    """What a tenant has of its broker at one moment, in bytes: what is lent to it, what it may hold now, what it asked
    for last. `path` is of the broker's socket."""

    path: str
    name: str
    lent: int
    budget: int
    wanted: int
    broker_has_ended: bool


class Lender(Protocol):
    """What a cache asks of the tenant that it borrows as (`tenant.Tenant`)."""

    path: str
    name: str
    held: int

    @property
    def deadline_s(self) -> float: ...

    @property
    def wanted(self) -> int: ...

    @property
    def budget(self) -> int: ...

    @property
    def ceiling(self) -> int: ...

    @property
    def heard_needs(self) -> int: ...

    @property
    def broker_has_ended(self) -> bool: ...

    @property
    def asked_to_sleep(self) -> bool: ...

    def need(self, least: int) -> None: ...

    def report(self, needs: int, wants: int, is_asleep: bool = False) -> None: ...

    def wait_for(self, budget: int, timeout_s: float) -> bool: ...

    def wait_for_change(self, timeout_s: float) -> None: ...

    def waiting(self, seconds: float) -> AbstractContextManager[None]: ...

    def on_change(self, call: Callable[[], None]) -> None: ...

    def close(self) -> None: ...


class Keeper(Protocol):
    """What knows the leases of handles (`tenant.BrokerDriver`), of a tenant whose leases outlive its process."""

    @property
    def journal(self) -> Journal: ...

    def take_over(self, lease: int, size: int) -> int: ...

    def lease_of(self, handle: int) -> int: ...

    def go_on(self) -> None: ...

    def leave(self) -> None: ...


class Borrowing:
    """What one cache owes and may take.

    Memory that no sequence uses is given back in the tenant's own thread as soon as the broker asks, whether steps are
    taken or not; the rest between steps. Either gives it back by parts of some `PART_S` seconds, between which the
    engine steps on: hundreds of extents would hold up a step for as long as dozens of steps take.

    Attributes
    ----------
    own : int
        Bytes that the cache's user allows it.
    is_changing : bool
        Whether retained slots are left alone by the tenant's thread.
    is_giving_back : bool
        Whether that thread gives memory back now, in which it looked at `is_changing`.
    owes_since : float or None
        When a step left a part of what is owed to those after it, by the monotonic clock; None where nothing is.
    stuck : int
        Bytes that were left when less was asked for, and could not be given back; 0 where nothing is owed.
    """

    def __init__(self, tenant: Lender, memory: CacheMemory, beside: bool, keeper: Keeper | None = None) -> None:
        self.tenant, self._memory, self.keeper = tenant, memory, keeper
        self.own, self.stuck = MOST, 0
        self.is_changing = self.is_giving_back = False
        self._reported = -REPORT_S
        self._waiting = 0
        self.owes_since: float | None = None
        self._part = FIRST_PART * memory.arena.pool.granularity
        if beside:
            tenant.on_change(self.give_back)

    @property
    def wanted(self) -> int:
        """The budget that the broker and the user allow now."""
        return min(self.own, self.tenant.budget)

    @property
    def most(self) -> int:
        """The budget that they may allow one day; what there is, where the broker has ended."""
        return self.wanted if self.tenant.broker_has_ended else min(self.own, self.tenant.ceiling)

    def lease(self) -> Lease | None:
        """As it is now; None once the cache is closed. Under the cache's lock."""
        tenant = self.tenant
        if self._memory.is_closed:
            return None
        return Lease(tenant.path, tenant.name, tenant.held, tenant.budget, tenant.wanted, tenant.broker_has_ended)

    def give_back(self) -> None:
        """Give back what no sequence uses, if it is owed; in the tenant's thread."""
        has_more = True
        while has_more and not self.tenant.broker_has_ended:
            wanted = self.wanted
            with self._memory.lock.in_background():
                self.is_giving_back = True
                try:
                    has_more = self._give_part(wanted, retained=not self.is_changing)
                    if not has_more and self._memory.arena.pool.budget > wanted:
                        self.report(self._waiting)
                finally:
                    self.is_giving_back = False

    def _give_part(self, wanted: int, retained: bool) -> bool:
        """Give back a part of what no sequence uses, as much as takes `PART_S` seconds; returns whether that was
        something, and not all that is owed."""
        pool, started = self._memory.arena.pool, monotonic()
        held = pool.held_bytes
        reached = self._memory.shrink_beside(wanted, retained, self._part)
        if given := held - pool.held_bytes:
            # The next part is twice as large at most, as a clock is coarse.
            fitting = int(given * PART_S / max(monotonic() - started, 1e-6))
            self._part = max(pool.granularity, min(fitting, 2 * max(given, self._part)))
        return given > 0 and reached > wanted

    def give_before_step(self, wanted: int) -> bool:
        """Give back a part of what no sequence uses, where a step begins; returns whether the rest is left to the steps
        after it. Half of the broker's deadline has to be left."""
        now = monotonic()
        since = now if self.owes_since is None else self.owes_since
        is_left = now - since < self.tenant.deadline_s / 2 and self._give_part(wanted, retained=True)
        self.owes_since = since if is_left else None
        return is_left

    def check_room(self, need: int) -> None:
        """Raise KVCacheOutOfMemory for a new sequence of `need` bytes that would take what is owed and not given back
        yet."""
        arena = self._memory.arena
        if self.owes_since is None or self.wanted >= arena.pool.budget:
            return
        room = self.wanted - (arena.used_bytes - arena.evictable_bytes)
        if need > room:
            raise KVCacheOutOfMemory(
                f"{need:,} bytes asked for; the broker wants all but {self.wanted:,} back, of which running sequences "
                f"leave {max(0, room):,}: wait for others to give theirs back, or release a sequence"
            )

    def wait(self) -> None:
        """Return when the tenant's thread has given back what it began to."""
        with self._memory.lock:
            pass

    def owed(self, wanted: int, reached: int) -> int:
        """Of a budget that should be `wanted` bytes and is `reached`, what running sequences have to give: nothing
        before the broker has worked out its budgets from that they have it."""
        self.stuck = reached if reached > wanted else 0
        if not self.stuck:
            return 0
        self.report(self._waiting)
        return reached - wanted if self.tenant.heard_needs >= self.stuck and self.wanted <= wanted else 0

    def is_due(self) -> bool:
        """Whether it is time to look at what is needed."""
        return not self._memory.is_asleep and monotonic() - self._reported >= REPORT_S

    def report(self, waiting: int) -> None:
        """Tell the broker what running sequences hold, and that `waiting` bytes are wanted beside."""
        self._reported, self._waiting = monotonic(), waiting
        arena = self._memory.arena
        if self._memory.is_asleep or self._memory.is_closed:
            return
        running = sum(slot.mapped_bytes for slot in arena.used_slots if slot.state is RUNNING)
        needs = min(arena.used_bytes, max(running + arena.layout.least_bytes + arena.quarantined_bytes, self.stuck))
        self.tenant.report(needs, needs + waiting + needs // HEADROOM)

    def sleeps(self) -> None:
        """Nothing is held any more, and nothing wanted."""
        self.tenant.report(0, 0, True)

    @contextmanager
    def waking(self, size: int) -> Iterator[None]:
        """Inside this context `size` bytes are to be had again, from others if need be."""
        arena = self._memory.arena
        least = size + arena.layout.least_bytes + arena.quarantined_bytes
        self.tenant.report(0, least)
        self.tenant.wait_for(min(least, self.most), WAKE_S)
        # What could not be given back in sleep counts as well, and limits may have been raised meanwhile.
        arena.pool.budget = max(arena.pool.budget, self.wanted)
        with self.tenant.waiting(WAKE_S):
            yield
