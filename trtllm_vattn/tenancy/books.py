"""Who holds which lease, what each may hold, and what is owed until when: the broker's books. Makes no call of a
driver or the system; time is given to it.

Numbered promises, which tests/tenancy/test_books.py holds it to:

T1. What is lent, to whomever, adds up to no more than the memory; so do budgets, or what is held beyond them.
T2. A lease is of one tenant; its number was never used before.
T3. Nobody is lent anything beyond its budget, and no budget is beyond its ceiling.
T4. What a tenant that ended, or is lost, had counts as lent until its process has ended.
T5. A tenant with a floor that wants so much is owed it by the others, each by the deadline that it was told.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from trtllm_vattn.errors import ConfigError, KVCacheOutOfMemory
from trtllm_vattn.tenancy.shares import Claim, divide, level
from trtllm_vattn.values import shown

MOST_LIMITS = 10_000
"""Names that limits are kept for, whether tenants of these names are there or not."""


@dataclass
class Limits:
    """Of one tenant, in bytes: what it is promised, what it may hold at most (None is all), and its priority."""

    floor: int = 0
    ceiling: int | None = None
    priority: int = 0


@dataclass
class Account:
    """One tenant's.

    Attributes
    ----------
    leases : dict of int to int
        Bytes by lease.
    needs, wants : int
        As the tenant said last (`shares.Claim`).
    share : int
        Bytes that it may hold once others have given back what they owe.
    budget : int
        Bytes that it may hold now; less than `held` where it owes the rest.
    debts : list of (float, int)
        By when it has to be down to how many bytes; earlier ones first.
    least : int
        Bytes that it cannot do without, whatever its floor is.
    is_lost : bool
        Its connection is gone, and its process is not: it is lent nothing, and gives nothing back.
    """

    limits: Limits
    leases: dict[int, int] = field(default_factory=dict)
    held: int = 0
    needs: int = 0
    wants: int = 0
    share: int = 0
    budget: int = 0
    debts: list[tuple[float, int]] = field(default_factory=list)
    is_lost: bool = False
    least: int = 0

    @property
    def promised(self) -> int:
        """Bytes that it gets whenever it wants them."""
        return max(self.limits.floor, self.least)

    def is_overdue(self, now: float) -> bool:
        """Whether it holds more than it should have given back to by now."""
        return any(due <= now and self.held > most for due, most in self.debts)


class Books:
    """The accounts of all tenants.

    Parameters
    ----------
    memory : int
        Bytes that may be lent.
    deadline_s : float
        Seconds within which a tenant gives back what it owes.
    """

    def __init__(self, memory: int, deadline_s: float) -> None:
        self.memory, self.deadline_s = memory, deadline_s
        self.accounts: dict[str, Account] = {}
        self._limits: dict[str, Limits] = {}
        """Set by whoever operates the broker, for tenants that are not there, too."""
        self._numbers = itertools.count(1)

    @property
    def lent(self) -> int:
        """Bytes lent."""
        return sum(account.held for account in self.accounts.values())

    def ceiling_of(self, account: Account) -> int:
        """Bytes that a tenant may ever hold."""
        ceiling = account.limits.ceiling
        return self.memory if ceiling is None else min(ceiling, self.memory)

    def join(self, name: str, asked: Limits, now: float) -> Account:
        """A tenant begins. Limits that were set for its name hold instead of what it asks for. Raises ConfigError for
        a name that is taken, or a floor that cannot be promised."""
        if name in self.accounts:
            raise ConfigError(f"there is a tenant {shown(name)} already; give another name, or end that one")
        limits = self._limits.get(name, asked)
        self._check(name, limits)
        self.accounts[name] = account = Account(limits)
        self.settle(now)
        return account

    def set_limits(self, name: str, limits: Limits, now: float) -> None:
        """Set a tenant's limits, there or not yet; those of tenants that are not there are kept for the `MOST_LIMITS`
        names that were set last. Raises ConfigError where floors are more than the memory, or the ceiling is below the
        floor."""
        self._check(name, limits)
        self._limits.pop(name, None)
        self._limits[name] = limits
        if len(self._limits) > MOST_LIMITS:
            oldest = next((each for each in self._limits if each not in self.accounts), name)
            del self._limits[oldest]
        if name in self.accounts:
            self.accounts[name].limits = limits
            self.settle(now)

    def limits_of(self, name: str) -> Limits:
        """What holds, or would hold, for a name."""
        account = self.accounts.get(name)
        return account.limits if account is not None else self._limits.get(name, Limits())

    def need(self, name: str, least: int, now: float) -> None:
        """A tenant cannot do with less than so many bytes. Raises ConfigError where they cannot be promised."""
        account = self.accounts[name]
        self._check(name, account.limits, least)
        account.least = least
        self.settle(now)

    def _check(self, name: str, limits: Limits, least: int | None = None) -> None:
        promised = sum(account.promised for other, account in self.accounts.items() if other != name)
        if least is None:
            least = self.accounts[name].least if name in self.accounts else 0
        ceiling = self.memory if limits.ceiling is None else limits.ceiling
        floor = max(limits.floor, least)
        if floor > ceiling:
            raise ConfigError(
                f"tenant {shown(name)} asks for a floor of {limits.floor:,} bytes, and cannot do with less than "
                f"{least:,}; its ceiling is {ceiling:,}: change one of them"
            )
        if promised + floor > self.memory:
            raise ConfigError(
                f"tenant {shown(name)} has a floor of {floor:,} bytes, by its own wish, by `trtllm-vattn broker "
                f"limits`, or as the least it runs with; {promised:,} of {self.memory:,} are promised to others: lower "
                "a floor, or give the broker more memory"
            )

    def report(self, name: str, needs: int, wants: int, now: float) -> None:
        """What a tenant says of itself; nothing of it is believed beyond what its limits allow it anyway."""
        account = self.accounts[name]
        needs, wants = (max(0, min(value, self.memory)) for value in (needs, wants))
        if (needs, wants) != (account.needs, account.wants):
            account.needs, account.wants = needs, wants
            self.settle(now)

    def lend(self, name: str, size: int, now: float) -> int:
        """Enter a new lease; returns its number. Raises KVCacheOutOfMemory where the budget has no room for it."""
        account = self.accounts[name]
        if account.is_lost or account.is_overdue(now):
            raise KVCacheOutOfMemory(
                f"tenant {shown(name)} has not given back what it owes; nothing more is lent to it"
            )
        if account.held + size > account.budget:
            raise KVCacheOutOfMemory(
                f"{size:,} bytes asked for; tenant {shown(name)} has {account.held:,} of {account.budget:,} bytes, "
                f"and may come to {account.share:,} once others have given back what they owe"
            )
        lease = next(self._numbers)
        account.leases[lease] = size
        account.held += size
        return lease

    def take_back(self, name: str, lease: int, now: float) -> None:
        """A tenant gave a lease back. Raises ConfigError for one that it has not."""
        account = self.accounts[name]
        if lease not in account.leases:
            raise ConfigError(f"tenant {shown(name)} has no lease {lease}")
        account.held -= account.leases.pop(lease)
        self.settle(now)

    def lose(self, name: str, now: float) -> None:
        """A tenant's connection is gone, and its process is not."""
        self.accounts[name].is_lost = True
        self.settle(now)

    def find(self, name: str, asked: Limits, now: float) -> None:
        """A lost tenant's leases are another process's now, which uses all of them until it says otherwise, and whose
        limits are those that it asks for, or that were set for its name. Raises ConfigError, with nothing changed, as
        `set_limits` does."""
        account, limits = self.accounts[name], self._limits.get(name, asked)
        self._check(name, limits)
        account.limits = limits
        account.is_lost, account.needs, account.wants = False, account.held, account.held
        # What the process before it owed, it is given time for.
        account.debts.clear()
        self.settle(now)

    def leave(self, name: str, now: float) -> list[int]:
        """A tenant's process has ended: nothing is lent to it any more. Returns the leases that it had."""
        account = self.accounts.pop(name)
        self.settle(now)
        return list(account.leases)

    def settle(self, now: float) -> None:
        """Work out anew what each may hold, and what is owed."""
        live = {name: account for name, account in self.accounts.items() if not account.is_lost}
        gone = sum(account.held for account in self.accounts.values() if account.is_lost)
        shares = divide(self.memory - gone, {name: self._claim(account) for name, account in live.items()})
        for name, account in self.accounts.items():
            account.share = account.budget = shares.get(name, 0)
            if account.held <= account.share:
                account.debts.clear()
            else:
                self._note_debt(account, now)
        self._hand_out(live)

    def _claim(self, account: Account) -> Claim:
        ceiling, priority = self.ceiling_of(account), account.limits.priority
        return Claim(account.promised, ceiling, priority, account.held, account.needs, account.wants)

    def _note_debt(self, account: Account, now: float) -> None:
        # What it may keep after all is not owed; what it has given back is paid.
        kept, below = [], account.held
        for due, most in account.debts:
            most = max(most, account.share)
            # One that owes no less was due before.
            if most < below:
                kept.append((due, most))
                below = most
        account.debts = kept
        if not account.debts or account.debts[-1][1] > account.share:
            account.debts.append((now + self.deadline_s, account.share))

    def _hand_out(self, live: dict[str, Account]) -> None:
        """Budgets of those that may hold more: what is free, until others have given back what they owe."""
        free = self.memory - self.lent
        growing = {name: account for name, account in live.items() if account.held <= account.share}
        for priority in sorted({account.limits.priority for account in growing.values()}, reverse=True):
            asked = {
                name: (account.held, account.share)
                for name, account in growing.items()
                if account.limits.priority == priority
            }
            for name, budget in level(free, asked).items():
                growing[name].budget = budget
                free -= budget - growing[name].held
