"""Engines whose keys and values are a broker's: the same tokens, while memory goes from one to the other."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
from tenancy.lending import lending, until

from trtllm_vattn.errors import ConfigError, SequenceTooLong
from trtllm_vattn.runtime.async_engine import AsyncEngine, RequestStream
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.speculation import Speculation
from trtllm_vattn.tenancy import protocol as say
from trtllm_vattn.tenancy.broker import Broker
from trtllm_vattn.tenancy.config import TenantConfig
from trtllm_vattn.tenancy.tenant import Client

MEMORY = 640 << 10
"""Bytes: 640 tokens of the model."""
PROMPTS = [list(range(1, 60)), list(range(3, 120)), [5, 6, 7], list(range(100, 230))]
PARAMS = SamplingParams(max_tokens=10, ignore_eos=True)
SIZES: dict[str, Any] = {"device": "cpu", "max_seqs": 4, "max_seq_len": 256, "capture": False, "compile": False}


@pytest.fixture(scope="module")
def lent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with lending(tmp_path_factory.mktemp("broker") / "socket", MEMORY, deadline_s=30.0) as made:
        yield made


@pytest.fixture(scope="module")
def pair(lent: Broker) -> Iterator[tuple[Engine, Engine]]:
    """Two engines that are each promised a little less than half."""
    with engine(lent, "one", floor=MEMORY // 2 - 8192) as one, engine(lent, "two", floor=MEMORY // 2 - 8192) as two:
        yield one, two


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """The tokens of an engine without a broker."""
    with Engine.from_pretrained("tiny-llama", **SIZES) as made:
        return [completion.tokens for completion in made.generate(PROMPTS, PARAMS)]


def engine(broker: Broker, name: str, budget: int | None = None, **options: Any) -> Engine:
    config = TenantConfig(str(broker.path), name, **options)
    return Engine.from_pretrained("tiny-llama", broker=config, budget=budget, **SIZES)


def standing(broker: Broker) -> dict[str, say.TenantStatus]:
    with Client(broker.path) as client:
        return {tenant.name: tenant for tenant in client.standing().tenants}


def tokens(made: Engine, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return [completion.tokens for completion in made.generate(prompts, PARAMS)]


def serve_together(engines: tuple[Engine, ...], prompts: list[list[int]]) -> list[list[list[int | None]]]:
    """Step engines in turns until all are done; the tokens of each, by prompt."""
    found: list[dict[int, list[int | None]]] = []
    for made in engines:
        numbers = [made.submit(prompt, PARAMS) for prompt in prompts]
        found.append({number: [] for number in numbers})
    while any(made.busy for made in engines):
        for made, into in zip(engines, found, strict=True):
            for event in made.step() if made.busy else ():
                assert event.error is None, event.error
                into[event.request].append(event.token)
    return [list(each.values()) for each in found]


def test_one_engines_burst_borrows_what_the_other_leaves_idle(
    pair: tuple[Engine, Engine], lent: Broker, alone: list[list[int]]
) -> None:
    one, two = pair
    for first, second in ((one, two), (two, one)):
        names = ("one", "two") if first is one else ("two", "one")

        def borrows(first: Engine = first, name: str = names[0]) -> bool:
            assert tokens(first) == alone
            seen = standing(lent)
            assert sum(each.lent for each in seen.values()) <= MEMORY
            return seen[name].lent > MEMORY // 2

        def is_told(second: Engine = second, name: str = names[1]) -> bool:
            return second.cache.held_bytes == standing(lent)[name].lent

        # The second does not step: what its last requests left is taken from it all the same, by a thread of its own;
        # while that is not done, the first may serve its requests one after another instead.
        until(borrows)
        until(is_told)
        for each in pair:
            each.cache.check_integrity()


def test_both_serve_and_who_runs_gives_way_to_a_floor(
    pair: tuple[Engine, Engine], lent: Broker, alone: list[list[int]]
) -> None:
    one, two = pair
    numbers = [one.submit(prompt, PARAMS) for prompt in PROMPTS]
    found: dict[int, list[int | None]] = {number: [] for number in numbers}
    while min(map(len, found.values())) < 3:
        for event in one.step():
            found[event.request].append(event.token)
    held = one.cache.held_bytes
    assert held > MEMORY // 2
    waiting = [two.submit(prompt, PARAMS) for prompt in PROMPTS]
    other: dict[int, list[int | None]] = {number: [] for number in waiting}
    least = held
    while one.busy or two.busy:
        for made, into in ((two, other), (one, found)):
            for event in made.step() if made.busy else ():
                assert event.error is None, event.error
                into[event.request].append(event.token)
        least = min(least, one.cache.held_bytes) if one.busy else least
    assert least <= MEMORY // 2 + 8192, "what the other was promised was given back while sequences ran"
    assert list(found.values()) == alone
    assert list(other.values()) == alone
    assert all(each.state == "serving" for each in standing(lent).values())


def test_a_request_that_does_not_fit_now_waits_for_memory(pair: tuple[Engine, Engine], alone: list[list[int]]) -> None:
    one, two = pair
    # Nearly all there is, held by nobody who runs: neither submit nor the scheduler fails for the budget of the moment.
    assert tokens(two) == alone
    long = list(range(1, 231))
    assert one.cache.longest_alone == 256
    found = serve_together((one, two), [long, long[::-1]])
    assert found[0] == found[1]


def test_the_smaller_of_two_budgets_counts(lent: Broker, pair: tuple[Engine, Engine]) -> None:
    one, _ = pair
    one.set_budget(200 << 10)
    tokens(one, PROMPTS[:2])
    assert one.cache.held_bytes <= one.cache.budget_bytes <= 200 << 10
    with pytest.raises(SequenceTooLong, match="the budget has"):
        one.submit(list(range(1, 231)), PARAMS)
    one.set_budget(1 << 30)
    tokens(one)
    assert standing(lent)["one"].lent > 200 << 10


def test_who_sleeps_holds_nothing_and_wakes_with_others_memory(
    lent: Broker, pair: tuple[Engine, Engine], alone: list[list[int]]
) -> None:
    one, two = pair
    one.sleep(kv="drop")
    assert standing(lent)["one"].lent == 0
    assert standing(lent)["one"].state == "asleep"
    assert tokens(two) == alone
    one.wake()
    assert tokens(one) == alone


def test_models_take_turns_with_all_the_memory_by_the_brokers_word(
    lent: Broker, pair: tuple[Engine, Engine], alone: list[list[int]]
) -> None:
    one, two = pair
    numbers = [one.submit(prompt, PARAMS) for prompt in PROMPTS]
    found: dict[int, list[int | None]] = {number: [] for number in numbers}

    def take(made: Engine) -> None:
        for event in made.step():
            found[event.request].append(event.token)

    while min(map(len, found.values())) < 2:
        take(one)
    with Client(lent.path) as client:
        client.do(say.SetAsleep("one", True))
        take(one)
        assert standing(lent)["one"].state == "asleep"
        assert standing(lent)["one"].lent == 0
        assert tokens(two) == alone
        # Its requests wait, and steps do nothing until it is woken.
        assert one.busy
        before = {number: len(each) for number, each in found.items()}
        for _ in range(3):
            take(one)
        assert before == {number: len(each) for number, each in found.items()}
        client.do(say.SetAsleep("one", False))
    while one.busy:
        take(one)
    assert list(found.values()) == alone


def test_an_engine_in_its_own_thread_sleeps_and_wakes_by_the_brokers_word(
    tmp_path: Path, alone: list[list[int]]
) -> None:
    async def sleeps(broker: Broker) -> None:
        while standing(broker)["one"].state != "asleep":
            await asyncio.sleep(0.01)

    async def tokens_of(stream: RequestStream) -> list[int | None]:
        return [event.token async for event in stream]

    async def job(broker: Broker, made: AsyncEngine) -> list[list[int | None]]:
        with Client(broker.path) as client:
            # Nothing runs, and nobody calls it.
            client.do(say.SetAsleep("one", True))
            await asyncio.wait_for(sleeps(broker), 30.0)
            streams = [await made.add_request(prompt, PARAMS) for prompt in PROMPTS]
            assert standing(broker)["one"].lent == 0
            client.do(say.SetAsleep("one", False))
            return list(await asyncio.wait_for(asyncio.gather(*map(tokens_of, streams)), 60.0))

    with lending(tmp_path / "broker", MEMORY) as broker:
        made = AsyncEngine(engine(broker, "one"))
        try:
            assert asyncio.run(job(broker, made)) == alone
        finally:
            made.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"broker": 3}, "broker is an int"),
        ({"broker": "/no/broker"}, "no broker answers at /no/broker"),
        ({"broker": "x", "cache": "contiguous"}, "has its memory for life; a broker lends to vattn and blocks"),
        ({"broker": "x", "tensor_parallel": 2}, "memory of one device to one process"),
        ({"broker": "x", "speculation": "draft"}, "a draft model's cache has memory of its own beside the broker"),
    ],
)
def test_what_cannot_be_combined_is_refused_at_the_door(options: dict[str, Any], message: str) -> None:
    if options.get("speculation"):
        options = {
            **options,
            "speculation": Speculation("draft_model", model=load_model("tiny-llama", "cpu", torch.float32)),
        }
    with pytest.raises(ConfigError, match=message):
        Engine.from_pretrained("tiny-llama", **{**SIZES, **options})


def test_a_floor_that_cannot_be_promised_is_refused_and_nothing_is_left(lent: Broker) -> None:
    before = standing(lent)
    with pytest.raises(ConfigError, match=r"tenant 'three' has a floor of .* are promised to others: lower a floor"):
        engine(lent, "three", floor=MEMORY)
    assert standing(lent).keys() == before.keys()


def test_engines_of_a_broker_that_ended_go_on_with_what_they_hold(tmp_path: Path, alone: list[list[int]]) -> None:
    with lending(tmp_path / "broker", MEMORY) as broker:
        made = engine(broker, "one")
        assert tokens(made) == alone
    assert not made.cache.waits_for_memory
    # Extents of a size that is not there cannot be had any more: who needs one ends with an error that says so.
    for completion, expected in zip(made.generate(PROMPTS, PARAMS), alone, strict=True):
        assert completion.tokens == expected or (completion.finish_reason == "error" and completion.error)
        if completion.error:
            assert "start a broker and this engine anew" in completion.error, completion.error
    made.cache.check_integrity()
    made.close()


def test_who_waits_for_others_memory_ends_with_an_error_where_the_broker_is_killed(tmp_path: Path) -> None:
    long = list(range(1, 231))
    with lending(tmp_path / "broker", MEMORY) as broker, engine(broker, "rich") as rich, engine(broker, "poor") as poor:
        for prompt in (long, long[::-1], long[1:]):
            rich.submit(prompt, PARAMS)
        while standing(broker)["rich"].lent < MEMORY * 3 // 4:
            rich.step()
        number = poor.submit(long, PARAMS)
        assert [poor.step() for _ in range(3)] == [[]] * 3
        # As the kernel does with those of a process that is killed; nothing is written to any page.
        for connection in list(broker._connections):
            connection.socket.shutdown(socket.SHUT_RDWR)
        (event,) = poor.run()
        assert (event.request, event.finish_reason) == (number, "error")
        assert "start a broker and this engine anew" in str(event.error)


def test_kept_memory_is_given_back_between_the_steps_of_who_runs(tmp_path: Path) -> None:
    kept = [list(range(first, first + 150)) for first in (1, 160, 320)]
    # Without the tenant's thread beside the steps, which gives it back by parts as well.
    alone, least = {**SIZES, "mapping": "between-steps"}, 120 << 10
    with (
        lending(tmp_path / "broker", MEMORY, deadline_s=30.0) as broker,
        Engine.from_pretrained("tiny-llama", broker=TenantConfig(str(broker.path), "one"), **alone) as one,
        Client(broker.path) as client,
    ):
        tokens(one, kept)
        held = [one.cache.held_bytes]
        assert held[0] > 3 * 150 << 10
        number = one.submit(list(range(470, 500)), SamplingParams(max_tokens=40, ignore_eos=True))
        while not one.step():
            pass
        client.do(say.SetLimits("one", 0, least))
        waits: list[int] = []
        found: dict[int, int] = {}
        while one.busy:
            for event in one.step():
                assert event.error is None, event.error
                found[event.request] = found.get(event.request, 0) + 1
            held.append(one.cache.held_bytes)
            if not waits:
                # Of what is owed a new sequence takes nothing: it waits for the one that runs.
                waits = [one.submit(list(range(410, 500)), PARAMS)]
            elif held[-1] > least:
                assert waits[0] not in found
        assert found == {number: 39, waits[0]: 10}
        given = [before - after for before, after in itertools.pairwise(held) if before > after]
        assert held[-1] <= least
        assert len(given) > 2, given
        assert given[0] < (held[0] - least) // 4, "a step waits for a part of it"
        one.cache.check_integrity()


def test_who_owes_and_takes_no_step_any_more_gives_it_back(tmp_path: Path) -> None:
    with (
        lending(tmp_path / "broker", MEMORY, deadline_s=30.0) as broker,
        engine(broker, "one") as one,
        Client(broker.path) as client,
    ):
        tokens(one, [list(range(first, first + 150)) for first in (1, 160, 320)])
        # As in the middle of a step, which is the last one.
        one.cache.mark_changing(True)
        client.do(say.SetLimits("one", 0, 120 << 10))
        one.cache.mark_changing(False)
        until = monotonic() + 20.0
        while standing(broker)["one"].lent > 120 << 10:
            assert monotonic() < until, standing(broker)["one"]
