"""What outlives an engine's process: the journal, what the broker keeps, and sequences that go on."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tenancy.lending import lending

from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cli.main import main
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.tenancy import journal
from trtllm_vattn.tenancy import protocol as say
from trtllm_vattn.tenancy.broker import Broker
from trtllm_vattn.tenancy.config import TenantConfig
from trtllm_vattn.tenancy.journal import Journal, KeptRequest, State
from trtllm_vattn.tenancy.page import sealed_memory
from trtllm_vattn.tenancy.tenant import Client, Tenant

SETTINGS = {"prompt": [1, 2, 3], "max_tokens": 9, "priority": 0, "params": {}}
CHANGES: list[tuple[Any, ...]] = [
    ("add", 0, SETTINGS),
    ("slots", [(0, 0, [(0, [(4096, [1]), (8192, [2])])], True)]),
    ("tokens", [(0, 0, 17, None)]),
    ("add", 1, SETTINGS),
    ("slots", [(1, 1, [(0, [(4096, [3])])], True), (0, None, [], False)]),
    ("tokens", [(0, 1, 18, None), (1, 0, 5, "length")]),
    ("forget", [1]),
]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A small journal's."""
    monkeypatch.setattr(journal, "HALF", 2048)
    descriptor = sealed_memory("vattn-journal", journal.SIZE)
    yield descriptor
    os.close(descriptor)


def test_a_record_that_was_cut_short_anywhere_is_not_there(memory: int) -> None:
    written = Journal(memory)
    assert not written.is_written
    written.begin(State(settings={"layout": "rows"}))
    bytes_before, states = [os.pread(memory, 4096, 0)], [State(settings={"layout": "rows"})]
    for change in CHANGES:
        written.write(*change)
        bytes_before.append(os.pread(memory, 4096, 0))
        state = State(settings={"layout": "rows"})
        for each in CHANGES[: len(states)]:
            state.apply(list(each))
        states.append(state)
    rng = random.Random(31)
    for before, after, old, new in zip(bytes_before, bytes_before[1:], states, states[1:], strict=False):
        changed = [index for index in range(len(after)) if before[index] != after[index]]
        for _ in range(20):
            # Any part of its bytes came, whatever the order.
            torn = bytearray(before)
            for index in rng.sample(changed, rng.randrange(len(changed))):
                torn[index] = after[index]
            os.pwrite(memory, bytes(torn), 0)
            assert Journal(memory).state == old
        os.pwrite(memory, after, 0)
        assert Journal(memory).state == new
    assert states[-1].kept_slots() == {}


def test_a_journal_that_is_full_goes_on_in_its_other_half(memory: int) -> None:
    written = Journal(memory)
    written.begin(State(settings={"layout": "rows"}))
    written.write("add", 7, SETTINGS)
    for place in range(300):
        written.write("tokens", [(7, place, place, None)])
        found = Journal(memory)
        assert found.state.requests[7].chosen == list(range(place + 1))
        found.close()
    with pytest.raises(ConfigError, match="the journal has 2,048 bytes"):
        written.write("add", 8, {"prompt": [1000] * 2000})
    written.close()


def test_a_slot_is_kept_once_its_sequence_got_a_token_there(memory: int) -> None:
    written = Journal(memory)
    written.begin(State(settings={"layout": "rows"}))
    groups = [(0, [(4096, [1])])]
    written.write("add", 3, SETTINGS)
    written.write("slots", [(0, 3, groups, True)])
    written.write("tokens", [(3, 0, 17, None)])
    assert written.state.kept_slots().keys() == {0}
    # It was preempted, and comes to another slot, where its tokens are computed again.
    written.write("slots", [(0, None, [], False), (1, 3, groups, True)])
    assert written.state.kept_slots() == {}
    written.write("slots", [(1, 3, [(0, [(4096, [1]), (4096, [2])])], False)])
    assert written.state.kept_slots() == {}
    found = Journal(memory)
    assert found.state.kept_slots() == {}
    # Who takes it over has nothing in that slot, nor is that written down.
    found.begin(found.state)
    assert Journal(memory).state.slots == {}
    written.write("tokens", [(3, 1, 18, None)])
    assert written.state.kept_slots().keys() == {1}


def ended_tenant(broker: Broker, name: str, state: State | None = None) -> None:
    """A process that is lent something that outlives it."""
    state = State(settings={"was": "there"}) if state is None else state
    pid = os.fork()
    if not pid:
        tenant = Tenant(TenantConfig(str(broker.path), name, keep_s=60))
        assert tenant.journal is not None
        tenant.journal.begin(state)
        for _ in range(3):
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
        ended_tenant(broker, "two")
        with Client(broker.path) as client:
            (kept,) = client.standing().tenants
            assert (kept.state, kept.lent) == ("kept", 3 * 4096)
        # Who wants nothing kept begins with nothing.
        with Tenant(TenantConfig(str(broker.path), "two")) as tenant:
            assert (tenant.journal, tenant.leases) == (None, [])
            assert broker.books.lent == 0


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
        ended_tenant(broker, "two")
        with pytest.raises(ConfigError, match="the process before this one had layout None"):
            Engine.from_pretrained(
                "tiny-llama", broker=TenantConfig(str(broker.path), "two", keep_s=60), prefix_cache=False, **SIZES
            )


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
        settings = {"prompt": prompt, "max_tokens": 6, "priority": 0, "params": asdict(params)}
        ended_tenant(broker, "one", State(requests={0: KeptRequest(settings, wanted.tokens[:2])}))
        config = TenantConfig(str(broker.path), "one", keep_s=60)
        with Engine.from_pretrained("tiny-llama", broker=config, **options) as engine:
            assert engine.survivors() == {0: wanted.tokens[:2]}
            assert engine.prefilled_again == 1
            assert [event.token for event in engine.run()] == wanted.tokens[2:]


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
            assert engine.cache._journal is not None
            state = engine.cache._journal.state
            assert state.kept_slots().keys() == {request.slot}
            noted = list(state.requests[number].chosen)
            engine.scheduler.recompute(request)
            while engine.busy:
                engine.step()
                if number not in state.requests or state.requests[number].finish_reason:
                    break
                # Nobody's token is forgotten, and nothing is taken over that is not all there.
                assert state.requests[number].chosen[: len(noted)] == noted
                if len(state.requests[number].chosen) == len(noted):
                    assert state.kept_slots() == {}
            assert len(request.chosen) == 9


def test_engines_that_are_killed_lose_no_token_and_give_none_twice(tmp_path: Path) -> None:
    path = tmp_path / "survival.json"
    sizes = ["--kills", "6", "--prompts", "3", "--prompt-tokens", "20", "--output-tokens", "24", "--life-tokens", "20"]
    arguments = ["bench", "survival", "--device", "cpu", *sizes, "--journal-steps", "5", "--memory", "1MiB"]
    assert main([*arguments, "--output-json", str(path)]) == 0
    summary = json.loads(path.read_text())["summary"]
    assert summary["kills"] == 6
    for name in ("sequences_lost", "tokens_differing", "tokens_twice", "prefilled_again"):
        assert summary[name] == 0
    assert 0 < summary["journal_us"] < summary["step_us"]
