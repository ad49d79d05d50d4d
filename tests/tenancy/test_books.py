"""The broker's books against a simple model (tenancy/books.py, promises T1 to T5)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trtllm_vattn.errors import ConfigError, KVCacheOutOfMemory
from trtllm_vattn.tenancy import books as of_books
from trtllm_vattn.tenancy.books import Books, Limits
from trtllm_vattn.tenancy.shares import Claim, divide, level

MEMORY = 64
NAMES = st.sampled_from("abcd")
SIZES = st.integers(0, MEMORY)


@st.composite
def claims(draw: st.DrawFn) -> dict[str, Claim]:
    found, left = {}, MEMORY
    for name in "abcd"[: draw(st.integers(1, 4))]:
        ceiling = draw(SIZES)
        floor = draw(st.integers(0, min(ceiling, left)))
        left -= floor
        held, needs, wants = draw(SIZES), draw(SIZES), draw(SIZES)
        found[name] = Claim(floor, ceiling, draw(st.integers(0, 2)), held, needs, wants)
    return found


@given(claims())
@settings(max_examples=100)
def test_shares_hold_what_they_promise(asked: dict[str, Claim]) -> None:
    shares = divide(MEMORY, asked)
    assert sum(shares.values()) <= MEMORY
    for name, claim in asked.items():
        wanted = max(claim.wants, claim.needs)
        assert min(claim.floor, wanted) <= shares[name] <= claim.ceiling
        # Memory that is left over is nobody's only where all are at their ceilings.
        assert sum(shares.values()) == MEMORY or shares[name] == claim.ceiling
        for other, theirs in asked.items():
            # Nobody who does not want it has what somebody of the same or a higher priority wants.
            if theirs.priority <= claim.priority and shares[name] < min(claim.ceiling, wanted):
                kept = max(min(theirs.floor, max(theirs.wants, theirs.needs)), theirs.needs, theirs.wants)
                assert shares[other] <= kept


@given(
    st.integers(-20, 120),
    st.dictionaries(NAMES, st.tuples(SIZES, SIZES).map(lambda pair: (min(pair), max(pair))), min_size=1),
)
@settings(max_examples=100)
def test_those_with_least_rise_first_to_one_level(room: int, asked: dict[str, tuple[int, int]]) -> None:
    shares = level(room, asked)
    given_ = sum(shares[name] - least for name, (least, _) in asked.items())
    assert given_ == min(max(0, room), sum(most - least for least, most in asked.values()))
    risen = max((shares[name] for name, (least, _) in asked.items() if shares[name] > least), default=0)
    for name, (least, most) in asked.items():
        assert least <= shares[name] <= most
        # Who did not get all has as much as who rose, but for one that cannot be divided.
        assert shares[name] == most or shares[name] >= risen - 1


def test_equals_share_equally_and_priority_goes_first() -> None:
    def claim(priority: int = 0, wants: int = 64, held: int = 0, needs: int = 0, floor: int = 0) -> Claim:
        return Claim(floor, 64, priority, held, needs, wants)

    assert divide(64, {"a": claim(), "b": claim()}) == {"a": 32, "b": 32}
    assert divide(64, {"a": claim(), "b": claim(priority=1)}) == {"a": 0, "b": 64}
    assert divide(64, {"a": claim(wants=10), "b": claim()}) == {"a": 10, "b": 54}
    # What runs stays, whatever others want; but not beyond what they were promised.
    assert divide(64, {"a": claim(held=60, needs=60), "b": claim()}) == {"a": 60, "b": 4}
    assert divide(64, {"a": claim(held=60, needs=60), "b": claim(floor=32)}) == {"a": 32, "b": 32}
    # What is only kept goes to who wants it.
    assert divide(64, {"a": claim(held=60, needs=4, wants=4), "b": claim(wants=40)}) == {"a": 24, "b": 40}


class BooksMachine(RuleBasedStateMachine):
    """Tenants that are honest, but for those named in `deaf`, which give nothing back."""

    def __init__(self) -> None:
        super().__init__()
        self.books, self.now = Books(MEMORY, deadline_s=10.0), 0.0
        self.leases: dict[str, dict[int, int]] = {}
        self.lost: set[str] = set()
        self.numbers: set[int] = set()

    @rule(name=NAMES, floor=SIZES, ceiling=st.none() | SIZES, priority=st.integers(0, 2))
    def join(self, name: str, floor: int, ceiling: int | None, priority: int) -> None:
        if name in self.leases:
            with pytest.raises(ConfigError, match="already"):
                self.books.join(name, Limits(), self.now)
            return
        try:
            self.books.join(name, Limits(floor, ceiling, priority), self.now)
        except ConfigError:
            assert name not in self.books.accounts
        else:
            self.leases[name] = {}

    @rule(name=NAMES, floor=SIZES, ceiling=st.none() | SIZES, priority=st.integers(0, 2))
    def set_limits(self, name: str, floor: int, ceiling: int | None, priority: int) -> None:
        before = self.books.limits_of(name)
        try:
            self.books.set_limits(name, Limits(floor, ceiling, priority), self.now)
        except ConfigError:
            assert self.books.limits_of(name) == before

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), needs=st.integers(-5, MEMORY + 5), wants=st.integers(-5, MEMORY + 5))
    def report(self, data: st.DataObject, needs: int, wants: int) -> None:
        self.books.report(data.draw(st.sampled_from(sorted(self.leases))), needs, wants, self.now)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), size=st.integers(1, 16))
    def lend(self, data: st.DataObject, size: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.leases)))
        account = self.books.accounts[name]
        held = sum(self.leases[name].values())
        fits = held + size <= account.budget and name not in self.lost
        try:
            lease = self.books.lend(name, size, self.now)
        except KVCacheOutOfMemory:
            assert not fits or account.is_overdue(self.now)
        else:
            assert fits
            assert lease not in self.numbers
            self.numbers.add(lease)
            self.leases[name][lease] = size

    @precondition(lambda self: any(self.leases.values()))
    @rule(data=st.data())
    def take_back(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(name for name, leases in self.leases.items() if leases)))
        lease = data.draw(st.sampled_from(sorted(self.leases[name])))
        for other in self.leases.keys() - {name}:
            with pytest.raises(ConfigError, match="has no lease"):
                self.books.take_back(other, lease, self.now)
        self.books.take_back(name, lease, self.now)
        del self.leases[name][lease]

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.leases)))
        self.books.lose(name, self.now)
        self.lost.add(name)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.leases)))
        assert sorted(self.books.leave(name, self.now)) == sorted(self.leases.pop(name))
        self.lost.discard(name)

    @rule(seconds=st.floats(0.0, 9.0))
    def pass_time(self, seconds: float) -> None:
        """Everybody who is there pays in time, and so nobody is ever overdue."""
        self.now += seconds
        for name in sorted(self.leases.keys() - self.lost):
            account = self.books.accounts[name]
            while account.held > account.share:
                lease = min(self.leases[name])
                self.books.take_back(name, lease, self.now)
                del self.leases[name][lease]
            assert not account.is_overdue(self.now + 1e9), "T5: it was paid in time"

    @invariant()
    def accounts_are_the_models(self) -> None:
        assert {name: account.leases for name, account in self.books.accounts.items()} == self.leases
        assert {name for name, account in self.books.accounts.items() if account.is_lost} == self.lost

    @invariant()
    def memory_is_lent_once(self) -> None:
        accounts = self.books.accounts
        held = {name: sum(leases.values()) for name, leases in self.leases.items()}
        assert self.books.lent == sum(held.values()) <= MEMORY
        assert sum(max(held[name], accounts[name].budget) for name in held) <= MEMORY
        for name, account in accounts.items():
            assert 0 <= account.budget <= account.share or account.held > account.share
            assert account.share <= self.books.ceiling_of(account)
            assert name not in self.lost or account.budget == 0

    @invariant()
    def floors_are_owed(self) -> None:
        if self.lost:
            return
        for account in self.books.accounts.values():
            assert account.share >= min(account.promised, max(account.wants, account.needs))
            assert bool(account.debts) == (account.held > account.share)


TestBooks = BooksMachine.TestCase
TestBooks.settings = settings(max_examples=25, stateful_step_count=30)


def test_who_does_not_pay_is_overdue_and_is_lent_nothing() -> None:
    books = Books(64, deadline_s=1.0)
    rich = books.join("rich", Limits(), 0.0)
    lease = [books.lend("rich", 16, 0.0) for _ in range(4)]
    books.report("rich", 64, 64, 0.0)
    books.join("poor", Limits(floor=32), 0.0)
    books.report("poor", 0, 32, 0.5)
    assert (rich.share, rich.is_overdue(1.49), rich.is_overdue(1.51)) == (32, False, True)
    books.take_back("rich", lease[0], 1.6)
    assert rich.is_overdue(1.6)
    with pytest.raises(KVCacheOutOfMemory, match="has not given back what it owes"):
        books.lend("rich", 1, 1.6)
    books.take_back("rich", lease[1], 1.7)
    assert not rich.is_overdue(1.7)
    # A later debt has a deadline of its own.
    books.set_limits("rich", Limits(ceiling=16), 2.0)
    assert (rich.is_overdue(2.9), rich.is_overdue(3.1)) == (False, True)


def test_what_a_lost_tenant_had_is_lent_until_its_process_has_ended() -> None:
    books = Books(64, deadline_s=1.0)
    books.join("gone", Limits(floor=32), 0.0)
    books.lend("gone", 40, 0.0)
    books.lose("gone", 0.0)
    there = books.join("there", Limits(), 0.0)
    books.report("there", 0, 64, 0.0)
    assert (books.lent, there.budget) == (40, 24)
    books.leave("gone", 0.0)
    assert (books.lent, there.budget) == (0, 64)


def test_what_is_owed_again_and_again_is_one_debt() -> None:
    books = Books(64, deadline_s=1.0)
    rich = books.join("rich", Limits(), 0.0)
    for _ in range(4):
        books.lend("rich", 16, 0.0)
    # It hangs, while what others want of it goes up and down.
    for now in range(100):
        books.set_limits("rich", Limits(ceiling=(32, 16, 48)[now % 3]), float(now))
    assert len(rich.debts) <= 2
    assert rich.is_overdue(1.5)


def test_limits_are_kept_for_the_names_that_were_set_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_books, "MOST_LIMITS", 3)
    books = Books(64, deadline_s=1.0)
    books.join("there", Limits(), 0.0)
    for name in ("there", "a", "b", "a", "c", "d"):
        books.set_limits(name, Limits(floor=1, priority=3), 0.0)
    kept = {name for name in ("there", "a", "b", "c", "d") if books.limits_of(name).priority == 3}
    assert kept == {"there", "c", "d"}


def test_who_goes_on_with_anothers_leases_has_limits_of_its_own() -> None:
    books = Books(64, deadline_s=1.0)
    books.join("one", Limits(floor=16), 0.0)
    other = books.join("other", Limits(floor=16), 0.0)
    for _ in range(2):
        books.lend("one", 16, 0.0)
    books.lose("one", 1.0)
    before = books.accounts["one"]
    for asked, message in (
        (Limits(floor=49), "16 of 64 are promised to others"),
        (Limits(floor=8, ceiling=4), "its ceiling is 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            books.find("one", asked, 2.0)
        assert before.is_lost
        assert before.limits == Limits(floor=16)
    books.find("one", Limits(floor=8, ceiling=16, priority=2), 2.0)
    assert (before.limits, before.is_lost, before.budget) == (Limits(8, 16, 2), False, 16)
    # It owes what is beyond its new ceiling, and who else is there may hold what its floor leaves.
    assert before.debts == [(3.0, 16)]
    books.set_limits("one", Limits(ceiling=32), 3.0)
    books.lose("one", 3.0)
    books.find("one", Limits(ceiling=16), 4.0)
    assert before.limits == Limits(ceiling=32)
    assert other.share > 0
