"""What outlives an engine's process: the journal, what the broker keeps, and sequences that go on."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from tenancy.lending import lending

from trtllm_vattn.bench.cases import survival as of_bench
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cli.main import main
from trtllm_vattn.errors import ConfigError, EngineOverloaded
from trtllm_vattn.memory.slot import RangeGroup
from trtllm_vattn.runtime import engine as of_engine
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.request import TokenEvent
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.tenancy import broker as of_broker
from trtllm_vattn.tenancy import journal
from trtllm_vattn.tenancy import protocol as say
from trtllm_vattn.tenancy.broker import Broker
from trtllm_vattn.tenancy.config import TenantConfig
from trtllm_vattn.tenancy.journal import Journal, KeptRequest, KeptSlot, Sizes, State
from trtllm_vattn.tenancy.page import sealed_memory
from trtllm_vattn.tenancy.placements import Placements
from trtllm_vattn.tenancy.tenant import Client, Tenant


def request(*chosen: int, prompt: Sequence[int] = (1, 2, 3), max_tokens: int = 40) -> KeptRequest:
    return KeptRequest.of(prompt, max_tokens, {"priority": 0, "params": {}}, chosen)


def steps(written: Journal) -> Iterator[Callable[[], None]]:
    """Everything that is ever noted, and enough of it for more snapshots than one."""

    def tokens(place: int) -> None:
        written.pending.extend([TokenEvent(0, 10 + place, index=place), TokenEvent(1, 20 + place, index=place)])
        written.flush()

    yield lambda: written.add(0, request())
    yield lambda: written.add(1, request(prompt=range(9)))
    yield lambda: written.note_slots([(0, 0, [(0, 0, 0, [(4096, [1]), (8192, [2])])], True)])
    yield lambda: written.note_slots([(1, 1, [(0, 0, 0, [(4096, [3])])], True)])
    for place in range(8):
        yield partial(tokens, place)
    # It grows; another part of it is replaced; pages in front of a window go.
    yield lambda: written.note_slots([(0, 0, [(0, 0, 2, [(4096, [4])])], False)])
    yield lambda: written.note_slots([(0, 0, [(0, 0, 1, [(8192, [5]), (4096, [6])])], False)])
    yield lambda: written.note_slots([(0, 0, [(4096, 1, 2, [])], False)])
    for place in range(8, 16):
        yield partial(tokens, place)
    yield lambda: written.ends.append((1, 16, 7, "length"))
    yield written.flush
    yield lambda: written.note_slots([(1, None, [], False)])
    yield lambda: written.forget([1])
    yield lambda: written.ends.append((0, 16, None, "abort"))
    yield written.flush


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A small journal's, of which a snapshot is written every few records."""
    monkeypatch.setattr(journal, "TAIL", 200)
    descriptor = sealed_memory("vattn-journal", journal.HEAD + 4 * journal.HEAD)
    yield descriptor
    os.close(descriptor)


class Killed(BaseException):
    """In place of SIGKILL."""


def test_a_writer_that_is_ended_at_any_store_leaves_the_state_before_or_after(
    memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = {"left": 1 << 30, "done": 0}
    rng = random.Random(31)

    def store(memory: Any, at: int, data: bytes) -> None:
        stores["left"] -= 1
        stores["done"] += 1
        if stores["left"]:
            memory[at : at + len(data)] = data
            return
        # Any part of its bytes comes, whatever the order.
        for place in rng.sample(range(len(data)), rng.randrange(len(data) + 1)):
            memory[at + place : at + place + 1] = data[place : place + 1]
        raise Killed

    def store_word(words: Any, word: int, value: int) -> None:
        stores["left"] -= 1
        stores["done"] += 1
        if not stores["left"] and rng.random() < 0.5:
            raise Killed
        words[word] = value
        if not stores["left"]:
            raise Killed

    monkeypatch.setattr(journal, "store", store)
    monkeypatch.setattr(journal, "store_word", store_word)

    def life(ends_at: int) -> tuple[State, State | None, int]:
        """The state before what it is ended in, and behind that; and how many snapshots it wrote."""
        os.pwrite(memory, bytes(journal.HEAD + 4 * journal.HEAD), 0)
        with closing(Journal(memory)) as written:
            stores["left"] = 1 << 30
            written.begin(State(settings={"layout": "rows"}))
            stores.update(left=ends_at, done=0)
            before = deepcopy(written.state)
            for step in steps(written):
                try:
                    step()
                except Killed:
                    return before, deepcopy(written.state), written.snapshots
                before = deepcopy(written.state)
            return before, None, written.snapshots

    _, _, snapshots = life(1 << 30)
    assert snapshots > 4
    most, torn = stores["done"], 0
    assert most > 50
    for ends_at in range(1, most + 1):
        before, after, _ = life(ends_at)
        assert after is not None
        with closing(Journal(memory)) as found:
            assert found.is_written
            assert found.state in (before, after)
            torn += found.state == before
            # Whoever comes next writes on, and is read.
            stores["left"] = 1 << 30
            found.begin(found.state)
            found.add(9, request())
            with closing(Journal(memory)) as again:
                assert again.state == found.state
    assert torn > most // 4


def test_tokens_are_taken_in_together_as_one_after_another() -> None:
    memory, rng = sealed_memory("vattn-journal", 1 << 20), random.Random(7)
    kinds = ("step", "step", "step", "some", "again", "twice", "grown", "new", "ends")
    with closing(Journal(memory)) as written:
        requests = {number: request(max_tokens=400) for number in range(5)}
        written.begin(State(requests=requests))
        length = dict.fromkeys(range(7), 0)
        before = deepcopy(written.state)
        for count in range(60):
            kind = rng.choice(kinds)
            # Of 5 and 6 nobody knows.
            of = [2, 3] if kind == "some" else list(length)
            if kind == "again":
                length[0] = max(0, length[0] - 2)
            for number in of * (2 if kind == "twice" else 1):
                written.pending.append(TokenEvent(number, 100 * number + count, index=length[number]))
                length[number] += 1
            if kind in ("grown", "new"):
                written.note_slots([(0, 1, [(0, 0, 0, [(4096, [count])])], kind == "new")])
            elif kind == "ends":
                written.ends.append((4, length[4], 9, "length"))
            written.flush()
        with closing(Journal(memory)) as found:
            assert found.state == written.state != before
            assert found.state.requests[1].known > 0
            assert len(found.state.requests[3].chosen) == length[3]
    os.close(memory)


def test_a_call_that_an_interrupt_ends_is_done_whole_by_the_next_one(
    memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, is_after = 1 << 30, False

    def interrupted(call: Callable[..., None]) -> Callable[..., None]:
        def called(*arguments: Any) -> None:
            nonlocal left
            left -= 1
            if left or is_after:
                call(*arguments)
            if not left:
                raise KeyboardInterrupt

        return called

    for name in ("store", "store_word"):
        monkeypatch.setattr(journal, name, interrupted(getattr(journal, name)))
    for first, after in ((1, False), (1, True), (2, False), (2, True), (3, False), (3, True)):
        left, is_after = 1 << 30, after
        with closing(Journal(memory)) as written:
            written.begin(State(requests={0: request(max_tokens=400)}))
            before = written.snapshots
            for place in range(80):
                written.pending.append(TokenEvent(0, place, index=place))
                left = first
                with suppress(KeyboardInterrupt):
                    written.flush()
                left = 1 << 30
                written.flush()
                assert written.pending == []
                with closing(Journal(memory)) as found:
                    assert found.state.requests[0].chosen.tolist() == list(range(place + 1))
            assert written.snapshots > before + 2


def test_a_journal_never_fills_however_long_it_is_written(memory: int) -> None:
    with closing(Journal(memory)) as written:
        written.begin(State(settings={"layout": "rows"}))
        number = 0
        for place in range(3000):
            if place % 40 == 0:
                written.forget([number])
                number += 1
                written.add(number, request(max_tokens=40))
            written.pending.append(TokenEvent(number, place, index=place % 40))
            written.flush()
        assert written.snapshots > 20
        with closing(Journal(memory)) as found:
            assert found.state == written.state
            assert (found.state.next_number, list(found.state.requests)) == (number + 1, [number])


def test_a_request_is_promised_its_room_or_refused_when_it_comes(memory: int) -> None:
    with closing(Journal(memory, placements=1000)) as written:
        written.begin(State())
        with pytest.raises(ConfigError, match=r"takes 40,1\d\d bytes of the journal, which has room for 3,096"):
            written.add(0, request(max_tokens=10_000))
        fit = 3096 // request().most_bytes
        for number in range(fit):
            written.add(number, request())
        with pytest.raises(EngineOverloaded, match="submit it again when some have ended"):
            written.add(fit, request())
        assert set(written.state.requests) == set(range(fit))
        # All of them may come to their ends.
        for place in range(40):
            written.pending.extend(TokenEvent(each, -1, index=place) for each in range(fit))
            written.flush()
        with closing(Journal(memory)) as found:
            assert all(len(each.chosen) == 40 for each in found.state.requests.values())
        written.forget([0])
        written.add(fit, request())


def test_sizes_are_derived_and_what_cannot_fit_is_refused() -> None:
    sizes = Sizes(slots=3, tokens=50, groups=2, leases=100)
    state = State(settings={"layout": "rows" * 200})
    biggest = (1 << 62) + 1
    for slot in range(3):
        state.slots[slot] = KeptSlot(biggest, [(biggest, [(biggest, [biggest])] * 16), (biggest, [])])
        state.requests[slot] = KeptRequest.of(range(20), 30, {"params": "x" * 1000}, range(30))
    state.slots[0].groups[1] = (biggest, [(biggest, [biggest])] * 52)
    encoded = len(msgspec.msgpack.encode(state.whole()))
    promised = sizes.placements + sum(each.most_bytes for each in state.requests.values())
    assert promised / 2 < encoded <= promised < sizes.file_bytes
    with pytest.raises(ConfigError, match="max_seqs is 1,048,576 and max_seq_len 131,072: a journal"):
        _ = Sizes(1 << 20, 1 << 17, 1, 1).file_bytes


def test_another_versions_journal_is_refused_and_an_unreadable_one_is_said_to_be(
    memory: int, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(Journal(memory)) as written:
        written.begin(State(settings={"layout": "rows"}))
    kept = os.pread(memory, journal.HEAD + 100, 0)
    os.pwrite(memory, b"vattnJ01", 0)
    with pytest.raises(ConfigError, match="wrote its journal by another version"):
        Journal(memory)
    os.pwrite(memory, kept[:8], 0)
    os.pwrite(memory, b"x" * 100, journal.HEAD)
    with closing(Journal(memory)) as found:
        assert not found.is_written
    assert "cannot be read" in caplog.text


class _Handles:
    """Stripes whose handles are their leases."""

    def __init__(self) -> None:
        self.leases = iter(range(1, 10_000))

    def stripe(self, ranges: int = 2) -> Any:
        lease = [next(self.leases) for _ in range(ranges)]
        return [SimpleNamespace(size=4096, extent=SimpleNamespace(handle=each)) for each in lease]


def test_what_is_noted_of_a_slot_is_what_lies_there_however_it_changed(memory: int) -> None:
    rng, handles = random.Random(5), _Handles()
    with closing(Journal(memory)) as written:
        written.begin(State())
        placements = Placements(written, lambda handle: handle)
        groups = [RangeGroup([0, 1]), RangeGroup([2, 3])]
        owner = 7
        records = written.note_slots
        sizes: list[int] = []
        written.note_slots = lambda noted: (sizes.append(len(repr(noted))), records(noted))[1]  # type: ignore
        for turn in range(300):
            for group in groups:
                stripes = group.stripes
                what = rng.randrange(6)
                if what < 2:
                    stripes += [handles.stripe() for _ in range(rng.randrange(3))]
                elif what == 2 and len(stripes) > 4:
                    del stripes[: rng.randrange(3)]
                    group.lower += 4096
                elif what == 3 and len(stripes) > 4:
                    del stripes[-rng.randrange(1, 3) :]
                elif what == 4 and stripes:
                    stripes[rng.randrange(len(stripes)) :] = [handles.stripe()]
            if turn % 50 == 49:
                owner += 1
            placements.note([(3, owner, groups, turn % 50 == 49)])
            with closing(Journal(memory)) as found:
                kept = found.state.slots[3]
                assert kept.owner == owner
                assert [lower for lower, _ in kept.groups] == [group.lower for group in groups]
                lying = [[(4096, [part.extent.handle for part in each]) for each in group.stripes] for group in groups]
                assert [stripes for _, stripes in kept.groups] == lying
        before = len(sizes)
        placements.note([(3, owner, groups, False)])
        assert len(sizes) == before
        # Who grew is noted by what it grew by.
        groups[0].stripes += [handles.stripe()]
        placements.note([(3, owner, groups, False)])
        assert sizes[-1] < 100
        placements.note([(3, None, groups, False)])
        assert written.state.slots == {}


def test_a_slot_is_kept_once_its_sequence_got_a_token_there(memory: int) -> None:
    with closing(Journal(memory)) as written:
        written.begin(State(settings={"layout": "rows"}))
        groups = [(0, 0, 0, [(4096, [1])])]
        written.add(3, request())
        written.note_slots([(0, 3, groups, True)])
        written.pending.append(TokenEvent(3, 17, index=0))
        written.flush()
        assert written.state.kept_slots().keys() == {0}
        # A lease that is the broker's no more is nobody's.
        assert written.state.kept_slots({1}).keys() == {0}
        assert written.state.kept_slots({2}) == {}
        # It was preempted, and comes to another slot, where its tokens are computed again.
        written.note_slots([(0, None, [], False), (1, 3, groups, True)])
        assert written.state.kept_slots() == {}
        written.note_slots([(1, 3, [(0, 0, 1, [(4096, [2])])], False)])
        assert written.state.kept_slots() == {}
        with closing(Journal(memory)) as found:
            assert found.state.kept_slots() == {}
        written.pending.append(TokenEvent(3, 18, index=1))
        written.flush()
        assert written.state.kept_slots().keys() == {1}


SMALL = Sizes(slots=2, tokens=64, groups=4, leases=256)


def ended_tenant(broker: Broker, name: str, state: State | None = None, leases: int = 3, **options: Any) -> None:
    """A process that is lent something that outlives it."""
    state = State(settings={"was": "there"}) if state is None else state
    pid = os.fork()
    if not pid:
        tenant = Tenant(TenantConfig(str(broker.path), name, keep_s=60, **options))
        tenant.open_journal(SMALL).begin(state)
        for _ in range(leases):
            tenant.create(4096)
        os._exit(0)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("most", [1, 3, 2000])
def test_leases_outlive_their_process_for_the_next_one_of_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(say, "MOST_LEASES", most)
    with lending(tmp_path / "broker", 1 << 20) as broker:
        ended_tenant(broker, "one")
        with Tenant(TenantConfig(str(broker.path), "one", keep_s=60)) as tenant:
            assert tenant.journal is not None
            assert tenant.journal.state.settings == {"was": "there"}
            assert [size for _, size in tenant.leases] == [4096] * 3
            assert tenant.held == 3 * 4096
            lease, _ = tenant.leases[0]
            descriptor = tenant.fetch(lease)
            assert os.fstat(descriptor).st_size == 4096
            os.close(descriptor)
            for lease, size in tenant.leases:
                tenant.release(lease, size)
            tenant.leave()
        ended_tenant(broker, "two")
        with Client(broker.path) as client:
            (kept,) = client.standing().tenants
            assert (kept.state, kept.lent) == ("kept", 3 * 4096)
        # Who wants nothing kept begins with nothing.
        with Tenant(TenantConfig(str(broker.path), "two")) as tenant:
            assert (tenant.journal, tenant.leases) == (None, [])
            assert broker.books.lent == 0


def test_a_tenant_that_holds_nothing_keeps_its_journal_however_often_it_ends(tmp_path: Path) -> None:
    with lending(tmp_path / "broker", 1 << 20) as broker:
        waiting = State(requests={3: request(5, 6)}, next_number=4)
        ended_tenant(broker, "one", waiting, leases=0)
        for _ in range(2):
            # One that takes over, and ends before it has begun.
            pid = os.fork()
            if not pid:
                tenant = Tenant(TenantConfig(str(broker.path), "one", keep_s=60))
                os._exit(tenant.journal is None)
            assert os.waitpid(pid, 0)[1] == 0
        with Tenant(TenantConfig(str(broker.path), "one", keep_s=60)) as tenant:
            assert tenant.journal is not None
            assert tenant.journal.state == waiting
            assert tenant.leases == []
            # Who leaves has nothing that outlives it.
            tenant.leave()
        with Client(broker.path) as client:
            assert client.standing().tenants == []
        # Nor has one that ended before it noted anything: nobody knows what lies in its leases.
        pid = os.fork()
        if not pid:
            tenant = Tenant(TenantConfig(str(broker.path), "two", keep_s=60))
            tenant.open_journal(SMALL)
            tenant.create(4096)
            os._exit(0)
        os.waitpid(pid, 0)
        with Client(broker.path) as client:
            assert client.standing().tenants == []
            assert broker.books.lent == 0


def test_a_process_that_hung_up_goes_on_with_what_it_left(tmp_path: Path) -> None:
    with lending(tmp_path / "broker", 1 << 20) as broker:
        config = TenantConfig(str(broker.path), "one", keep_s=60)
        with Tenant(config) as tenant:
            tenant.open_journal(SMALL).begin(State(settings={"was": "there"}))
            lease, descriptor = tenant.create(4096)
            os.close(descriptor)
        with Client(broker.path) as client:
            assert client.standing().tenants[0].state == "lost"
        with pytest.raises(ConfigError, match="there is a tenant 'one' already"):
            Tenant(TenantConfig(str(broker.path), "one"))
        with Tenant(config) as tenant:
            assert tenant.leases == [(lease, 4096)]
            assert tenant.journal is not None
            assert tenant.journal.state.settings == {"was": "there"}
            with pytest.raises(ConfigError, match="has a journal already"):
                tenant.do(say.MakeJournal(1 << 20))
            tenant.release(lease, 4096)
            tenant.leave()
        with Tenant(TenantConfig(str(broker.path), "one")) as tenant:
            with pytest.raises(ConfigError, match="say Hello with keep_s"):
                tenant.do(say.MakeJournal(1 << 20))
            assert broker.books.lent == 0


def test_who_takes_over_has_limits_of_its_own_or_is_refused(tmp_path: Path) -> None:
    with lending(tmp_path / "broker", 1 << 20) as broker, Tenant(TenantConfig(str(broker.path), "other", "512KiB")):
        ended_tenant(broker, "one", floor=8192)
        for limits, message in (
            ({"floor": "768KiB"}, "are promised to others"),
            ({"floor": 9, "ceiling": 8}, "ceiling"),
        ):
            with pytest.raises(ConfigError, match=message):
                Tenant(TenantConfig(str(broker.path), "one", keep_s=60, **limits))
            with Client(broker.path) as client:
                kept = client.standing().tenants[0]
                assert (kept.name, kept.state, kept.floor, kept.leases) == ("one", "kept", 8192, 3)
        with (
            Tenant(TenantConfig(str(broker.path), "one", 4096, 3 * 4096, 7, keep_s=60)) as tenant,
            Client(broker.path) as client,
        ):
            one = client.standing().tenants[0]
            assert (one.floor, one.ceiling, one.priority, one.leases) == (4096, 3 * 4096, 7, 3)
            assert tenant.ceiling == 3 * 4096
            tenant.leave()


def test_no_more_are_kept_than_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_broker, "MOST_KEPT", 2)
    before = len(os.listdir("/proc/self/fd"))
    with lending(tmp_path / "broker", 1 << 20) as broker:
        for name in "abc":
            ended_tenant(broker, name)
        with Client(broker.path) as client:
            assert [each.name for each in client.standing().tenants] == ["b", "c"]
        assert broker.books.lent == 2 * 3 * 4096
    assert len(os.listdir("/proc/self/fd")) <= before


def test_what_nobody_takes_over_is_given_back(tmp_path: Path) -> None:
    now = [0.0]
    with lending(tmp_path / "broker", 1 << 20, clock=lambda: now[0]) as broker:
        ended_tenant(broker, "one")
        with Client(broker.path) as client:
            assert client.standing().tenants[0].state == "kept"
            now[0] = 61.0
            client.standing()
            assert client.standing().tenants == []
            assert broker.books.lent == 0


SIZES: dict[str, Any] = {"device": "cpu", "max_seqs": 2, "max_seq_len": 64, "capture": False, "compile": False}


def test_what_cannot_outlive_a_process_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found by its tenant's name"):
        TenantConfig("x", keep_s=1)
    with pytest.raises(ConfigError, match="keep_s is -1"):
        TenantConfig("x", "one", keep_s=-1)
    with pytest.raises(ConfigError, match="prefixes do not outlive a process"):
        Engine.from_pretrained("tiny-llama", broker=TenantConfig("x", "one", keep_s=1), **SIZES)
    with pytest.raises(ConfigError, match="of an engine with loop do not outlive"):
        Engine.from_pretrained(
            "tiny-llama", broker=TenantConfig("x", "one", keep_s=1), prefix_cache=False, steps=2, loop=True, **SIZES
        )
    with lending(tmp_path / "broker", 1 << 20) as broker:
        config = TenantConfig(str(broker.path), "one", keep_s=60)
        with Engine.from_pretrained("tiny-llama", broker=config, prefix_cache=False, **SIZES) as engine:
            assert engine.survivors() == {}
            for params in (SamplingParams(max_tokens=2, logprobs=1), SamplingParams(max_tokens=2, n=2)):
                with pytest.raises(ConfigError, match="cannot be taken over by another process"):
                    engine.submit([1, 2], params)
            number = engine.submit([1, 2], SamplingParams(max_tokens=2, ignore_eos=True))
            with pytest.raises(ConfigError, match="cannot be forked"):
                engine.fork(number)
            while engine.busy:
                engine.step()
            with pytest.raises(ConfigError, match="steps were taken"):
                engine.survivors({})
            engine.submit([1, 2], SamplingParams(max_tokens=2, ignore_eos=True))
        # It was closed, which gives everything up.
        with Client(broker.path) as client:
            assert client.standing().tenants == []
        ended_tenant(broker, "two")
        for _ in range(2):
            # Who is refused leaves it as it was.
            with pytest.raises(ConfigError, match="the process before this one had layout None"):
                Engine.from_pretrained(
                    "tiny-llama", broker=TenantConfig(str(broker.path), "two", keep_s=60), prefix_cache=False, **SIZES
                )


def test_an_engine_takes_no_request_that_its_journal_could_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "QUEUE", 0)
    with lending(tmp_path / "broker", 1 << 20) as broker:
        config = TenantConfig(str(broker.path), "one", keep_s=60)
        with monkeypatch.context() as small:
            small.setattr(journal, "MOST", 1 << 12)
            with pytest.raises(ConfigError, match="max_seqs is 2 and max_seq_len 64: a journal"):
                Engine.from_pretrained("tiny-llama", broker=config, prefix_cache=False, **SIZES)
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        with Engine.from_pretrained("tiny-llama", broker=config, prefix_cache=False, **SIZES) as engine:
            taken: list[int] = []
            with suppress(EngineOverloaded):
                while len(taken) < 1000:
                    taken.append(engine.submit([1, 2, 3], params))
            assert 4 <= len(taken) < 1000
            assert len(engine.scheduler.requests) == len(taken)
            while engine.busy:
                engine.step()
            engine.step()
            # Others have ended, and were delivered.
            assert engine.submit([1, 2, 3], params) > taken[-1]


def test_what_was_aborted_stays_so_and_no_number_comes_again(tmp_path: Path) -> None:
    with lending(tmp_path / "broker", 1 << 20) as broker:
        config = TenantConfig(str(broker.path), "one", keep_s=60)

        def engine_of() -> Engine:
            return Engine.from_pretrained("tiny-llama", broker=config, prefix_cache=False, **SIZES)

        pid = os.fork()
        if not pid:
            engine = engine_of()
            goes_on = engine.submit([1, 2], SamplingParams(max_tokens=20, ignore_eos=True))
            ends = engine.submit([3], SamplingParams(max_tokens=1, ignore_eos=True))
            aborted = engine.submit([4, 5], SamplingParams(max_tokens=20, ignore_eos=True))
            for _ in range(4):
                engine.step()
            engine.abort(aborted)
            os._exit(0 if (goes_on, ends, aborted) == (0, 1, 2) else 1)
        assert os.waitpid(pid, 0)[1] == 0
        with engine_of() as engine:
            assert list(engine.survivors({0: 1, 1: 1, 2: 2})) == [0]
            assert engine.submit([6], SamplingParams(max_tokens=1, ignore_eos=True)) == 3
            while engine.busy:
                assert all(event.request in (0, 3) for event in engine.step())


def test_what_a_request_asks_for_beside_tokens_is_taken_over(tmp_path: Path) -> None:
    options: dict[str, Any] = {"prefix_cache": False, **SIZES}
    prompt = [*range(1, 9)]
    with Engine.from_pretrained("tiny-llama", **options) as alone:
        (plain,) = alone.generate([prompt], SamplingParams(max_tokens=6, ignore_eos=True))
        banned = [[plain.tokens[2]], [*plain.tokens[3:5]]]
        params = SamplingParams(
            max_tokens=6, ignore_eos=True, bad_words=banned, frequency_penalty=1.5, logit_bias={7: 0.5}
        )
        (wanted,) = alone.generate([prompt], params)
    assert wanted.tokens != plain.tokens
    with lending(tmp_path / "broker", 1 << 20) as broker:
        settings = {"priority": 0, "params": asdict(params)}
        ended_tenant(broker, "one", State(requests={0: KeptRequest.of(prompt, 6, settings, wanted.tokens[:2])}))
        config = TenantConfig(str(broker.path), "one", keep_s=60)
        with Engine.from_pretrained("tiny-llama", broker=config, **options) as engine:
            assert engine.survivors() == {0: wanted.tokens[:2]}
            assert engine.prefilled_again == 1
            assert [event.token for event in engine.run()] == wanted.tokens[2:]


def test_an_engine_that_sleeps_when_it_is_killed_loses_no_request(tmp_path: Path) -> None:
    options: dict[str, Any] = {"prefix_cache": False, **SIZES}
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    with Engine.from_pretrained("tiny-llama", **options) as alone:
        (wanted,) = alone.generate([[1, 2, 3]], params)
    with lending(tmp_path / "broker", 1 << 20) as broker:
        config = TenantConfig(str(broker.path), "one", keep_s=60)
        pid = os.fork()
        if not pid:
            engine = Engine.from_pretrained("tiny-llama", broker=config, **options)
            number = engine.submit([1, 2, 3], params)
            for _ in range(4):
                engine.step()
            engine.sleep(kv="drop")
            os._exit(len(engine.scheduler.requests[number].chosen) == 0)
        assert os.waitpid(pid, 0)[1] == 0
        with Client(broker.path) as client:
            (kept,) = client.standing().tenants
            assert (kept.state, kept.leases) == ("kept", 0)
        with Engine.from_pretrained("tiny-llama", broker=config, **options) as engine:
            before = engine.survivors()[0]
            assert before == wanted.tokens[: len(before)] != []
            assert engine.prefilled_again == 1
            assert [event.token for event in engine.run()] == wanted.tokens[len(before) :]


def test_a_sequence_whose_leases_are_gone_is_computed_anew(tmp_path: Path) -> None:
    with lending(tmp_path / "broker", 1 << 20) as broker:
        there = KeptSlot(0, [(0, [(4096, [999])])])
        kept = KeptRequest.of([1, 2], 4, {"priority": 0, "params": asdict(SamplingParams(ignore_eos=True))}, [7])
        ended_tenant(broker, "one", State(requests={0: kept}, slots={1: there}))
        config = TenantConfig(str(broker.path), "one", keep_s=60)
        with Engine.from_pretrained("tiny-llama", broker=config, prefix_cache=False, **SIZES) as engine:
            assert engine.survivors() == {0: [7]}
            assert engine.prefilled_again == 1
            assert [event.index for event in engine.run()] == [1, 2, 3]


def test_a_request_that_failed_before_says_so_to_who_did_not_hear_it(tmp_path: Path) -> None:
    with lending(tmp_path / "broker", 1 << 20) as broker:
        kept = KeptRequest.of([1, 2], 4, {"priority": 0, "params": asdict(SamplingParams(ignore_eos=True))}, [7])
        kept.finish_reason = "error"
        ended_tenant(broker, "one", State(requests={0: kept}))
        config = TenantConfig(str(broker.path), "one", keep_s=60)
        with Engine.from_pretrained("tiny-llama", broker=config, prefix_cache=False, **SIZES) as engine:
            engine.survivors({0: 1})
            (event,) = engine.run()
            assert (event.request, event.token, event.finish_reason, event.index) == (0, None, "error", 1)
            assert event.error == "it failed in the process before this one, whose log says why"


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_preempted_sequence_is_kept_where_it_got_its_next_token(tmp_path: Path, deterministic: bool) -> None:
    with lending(tmp_path / "broker", 1 << 20) as broker:
        config = TenantConfig(str(broker.path), "one", keep_s=60)
        options: dict[str, Any] = {"prefix_cache": False, "max_step_tokens": 8, "deterministic": deterministic}
        with Engine.from_pretrained("tiny-llama", broker=config, **options, **SIZES) as engine:
            assert isinstance(engine.cache, KVCacheManager)
            number = engine.submit([*range(1, 25)], SamplingParams(max_tokens=9, ignore_eos=True))
            request = engine.scheduler.requests[number]
            while len(request.chosen) < 5:
                engine.step()
            assert engine.cache._borrowing is not None
            assert engine.cache._borrowing.keeper is not None
            kept = engine.cache._borrowing.keeper.journal
            assert kept.state.kept_slots().keys() == {request.slot}
            noted = kept.state.requests[number].chosen.tolist()
            engine.scheduler.recompute(request)
            while engine.busy:
                engine.step()
                if number not in kept.state.requests or kept.state.requests[number].finish_reason:
                    break
                # Nobody's token is forgotten, and nothing is taken over that is not all there.
                assert kept.state.requests[number].chosen.tolist()[: len(noted)] == noted
                if len(kept.state.requests[number].chosen) == len(noted):
                    assert kept.state.kept_slots() == {}
            assert len(request.chosen) == 9


def test_engines_that_share_a_gpu_have_shorter_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = of_engine.usual_step_tokens
    monkeypatch.setattr(of_engine, "usual_step_tokens", lambda device, shared: 31 if shared else usual(device))
    path = tmp_path / "broker"
    with lending(path, 1 << 20), Engine.from_pretrained("tiny-llama", broker=str(path), **SIZES) as engine:
        assert engine.scheduler.chunk == 31
    with Engine.from_pretrained("tiny-llama", **SIZES) as engine:
        assert engine.scheduler.chunk == 2048


def test_a_step_waits_for_the_note_of_memory_mapped_ahead_only_where_it_writes_there(tmp_path: Path) -> None:
    with lending(tmp_path / "broker", 1 << 20) as broker:
        config = TenantConfig(str(broker.path), "one", keep_s=60)
        with Engine.from_pretrained("tiny-llama", broker=config, prefix_cache=False, **SIZES) as engine:
            assert isinstance(engine.cache, KVCacheManager)
            cache, number = engine.cache, engine.submit([*range(1, 9)], SamplingParams(max_tokens=40, ignore_eos=True))
            while len(engine.scheduler.requests[number].chosen) < 2:
                engine.step()
            assert cache.wait_ahead()
            assert cache._borrowing is not None
            assert cache._borrowing.keeper is not None
            slot, kept = engine.scheduler.requests[number].slot, cache._borrowing.keeper.journal

            def noted() -> int:
                return sum(len(stripes) for _, stripes in kept.state.slots[slot].groups)

            # As the thread does, of whose work it is the beginning.
            before, frontier = noted(), int(cache.arena.frontiers[slot])
            with cache._lock:
                assert cache.arena.grow({slot: frontier + 1}, ahead=True)
            cache.note_placements()
            assert noted() == before
            cache.lengths[slot], length = frontier, int(cache.lengths[slot])
            cache.note_placements()
            assert noted() == before
            cache.lengths[slot] = frontier + 1
            cache.note_placements()
            assert noted() > before
            cache.lengths[slot] = length


def test_engines_that_are_killed_lose_no_token_and_give_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "survival.json"
    sizes = ["--kills", "8", "--prompts", "3", "--prompt-tokens", "20", "--output-tokens", "24", "--life-tokens", "20"]
    monkeypatch.setattr(of_bench, "SEQUENCES", (1, 3))
    arguments = ["bench", "survival", "--device", "cpu", *sizes, "--journal-steps", "5", "--memory", "1MiB"]
    assert main([*arguments, "--output-json", str(path)]) == 0
    summary = json.loads(path.read_text())["summary"]
    assert summary["kills"] == 8
    for name in ("sequences_lost", "tokens_differing", "tokens_twice", "prefilled_again", "bytes_left"):
        assert summary[name] == 0
    assert sum(summary["kills_at"].values()) == 8
    assert summary["kills_at"]["a store"] + summary["kills_at"]["a switch"] > 0
    assert summary["mappings_replaced"] > 0
    for sequences in (1, 3):
        assert 0 < summary[f"journal_us_per_step_{sequences}"] < summary[f"step_us_{sequences}"]
        assert summary[f"journal_cpu_us_per_step_{sequences}"] > 0
    assert summary["journal_over_card_step"] > 0


def test_a_token_that_no_engine_would_choose_is_found_teacher_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last one: nothing follows from it.
    take = of_bench.Consumer.take
    monkeypatch.setattr(
        of_bench.Consumer,
        "take",
        lambda self, number, index, token: take(self, number, index, (token + (number == 1 and index == 9)) % 512),
    )
    path = tmp_path / "survival.json"
    sizes = ["--kills", "1", "--prompts", "2", "--prompt-tokens", "20", "--output-tokens", "10", "--life-tokens", "4"]
    sizes += ["--journal-steps", "0", "--memory", "1MiB", "--tie-tolerance", "1e-3"]
    assert main(["bench", "survival", "--device", "cpu", *sizes, "--output-json", str(path)]) == 1
    summary = json.loads(path.read_text())["summary"]
    assert (summary["tokens"], summary["tokens_differing"], summary["tokens_tied"]) == (20, 1, 0)
    assert summary["widest_mismatch"] > 1e-3
    assert summary["sequences_lost"] == 0
