"""What outlives an engine's process: the journal, what the broker keeps, and sequences that go on."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tenancy.lending import lending

from trtllm_vattn.cli.main import main
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.tenancy import journal
from trtllm_vattn.tenancy.broker import Broker
from trtllm_vattn.tenancy.config import TenantConfig
from trtllm_vattn.tenancy.journal import Journal, State
from trtllm_vattn.tenancy.page import sealed_memory
from trtllm_vattn.tenancy.tenant import Client, Tenant

SETTINGS = {"prompt": [1, 2, 3], "max_tokens": 9, "priority": 0, "params": {}}
CHANGES: list[tuple[Any, ...]] = [
    ("add", 0, SETTINGS),
    ("slots", [(0, 0, [(0, [(4096, [1]), (8192, [2])])])]),
    ("tokens", [(0, 0, 17, None)]),
    ("add", 1, SETTINGS),
    ("slots", [(1, 1, [(0, [(4096, [3])])]), (0, None, [])]),
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


def ended_tenant(broker: Broker, name: str) -> None:
    """A process that is lent something that outlives it."""
    pid = os.fork()
    if not pid:
        tenant = Tenant(TenantConfig(str(broker.path), name, keep_s=60))
        assert tenant.journal is not None
        tenant.journal.begin(State(settings={"was": "there"}))
        for _ in range(3):
            tenant.create(4096)
        os._exit(0)
    os.waitpid(pid, 0)


def test_leases_outlive_their_process_for_the_next_one_of_the_name(tmp_path: Path) -> None:
    with lending(tmp_path / "broker", 1 << 20) as broker:
        ended_tenant(broker, "one")
        with Tenant(TenantConfig(str(broker.path), "one", keep_s=60)) as tenant:
            assert tenant.journal is not None
            assert tenant.journal.state.settings == {"was": "there"}
            assert [size for _, size in tenant.welcome.leases] == [4096] * 3
            assert tenant.held == 3 * 4096
            lease, _ = tenant.welcome.leases[0]
            descriptor = tenant.fetch(lease)
            assert os.fstat(descriptor).st_size == 4096
            os.close(descriptor)
            for lease, size in tenant.welcome.leases:
                tenant.release(lease, size)
        ended_tenant(broker, "two")
        with Client(broker.path) as client:
            (kept,) = client.standing().tenants
            assert (kept.state, kept.lent) == ("kept", 3 * 4096)
        # Who wants nothing kept begins with nothing.
        with Tenant(TenantConfig(str(broker.path), "two")) as tenant:
            assert (tenant.journal, tenant.welcome.leases) == (None, [])
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
