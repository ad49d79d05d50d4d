"""The two ends of the connection between an engine's process and a server's: what comes over is the engine's own."""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import pytest
from tiny_text import tiny_model, tiny_tokenizer

from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError, DriverError, EngineClosed, EngineOverloaded, RequestFailed, SequenceTooLong
from trtllm_vattn.runtime.async_engine import AsyncEngine, RequestStream
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.serve.link import EngineEnd, RemoteEngine, sendable

OWN = copy.deepcopy(tiny_model())
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
LONG = SamplingParams(max_tokens=120, ignore_eos=True)


def engine_of() -> Engine:
    model = copy.deepcopy(OWN)
    cache = make_cache("vattn", shape_of(model, 4, 128), "cpu")
    return Engine(model, cache, compile=False, capture=False, tokenizer=tiny_tokenizer())


@dataclass
class Linked:
    engine: AsyncEngine
    end: EngineEnd
    remote: RemoteEngine

    def run(self, job: Callable[[], Awaitable[None]]) -> None:
        """A job in an event loop that the other end is attached to."""

        async def attached() -> None:
            self.remote.attach()
            try:
                await job()
            finally:
                await self.remote.shutdown()

        asyncio.run(asyncio.wait_for(attached(), 60))


@pytest.fixture
def linked() -> Iterator[Linked]:
    ours, theirs = multiprocessing.Pipe()
    around = AsyncEngine(engine_of(), max_requests=20)
    end = EngineEnd(around, ours)
    yield Linked(around, end, RemoteEngine(theirs, tiny_tokenizer()))
    around.close()
    end.close()
    assert around.unfinished == 0


async def tokens_of(stream: RequestStream) -> list[int]:
    return [event.token async for event in stream if event.token is not None]


async def until(engine: AsyncEngine, unfinished: int) -> None:
    """Wait until so many requests are unfinished."""

    def there() -> bool:
        with engine._changed:
            return engine._changed.wait_for(lambda: engine.unfinished == unfinished, 30)

    assert await asyncio.to_thread(there)


def test_many_requests_get_the_engines_tokens_in_order_and_errors_are_whose_they_are(linked: Linked) -> None:
    prompts = [[n % 7, n, 3] for n in range(18)]
    with engine_of() as engine:
        wanted = [completion.tokens for completion in engine.generate(prompts, PARAMS)]

    async def job() -> None:
        async def ask(number: int) -> list[int]:
            stream = await linked.remote.add_request(prompts[number], PARAMS)
            events = [event async for event in stream]
            assert [event.index for event in events] == list(range(8))
            assert [event.finish_reason for event in events] == [None] * 7 + ["length"]
            return [event.token for event in events if event.token is not None]

        asked = [ask(number) for number in range(18)]
        refused = [linked.remote.add_request([1] * 10, LONG), linked.remote.add_request([9999], PARAMS)]
        *got, long, outside = await asyncio.gather(*asked, *refused, return_exceptions=True)
        assert got == wanted
        assert isinstance(long, SequenceTooLong)
        assert "exceed max_seq_len 128" in str(long)
        assert isinstance(outside, ConfigError)
        several = await linked.remote.add_request([1, 2], SamplingParams(max_tokens=4, ignore_eos=True, n=3, seed=2))
        assert sorted([event.branch async for event in several]) == sorted([0, 1, 2] * 4)

    linked.run(job)


def test_messages_of_any_length_come_over_by_uvloop_too(linked: Linked, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has sockets not block, whose buffer ends then where a prompt of some ten thousand tokens does."""
    uvloop = pytest.importorskip("uvloop")
    monkeypatch.setattr(asyncio, "run", uvloop.run)

    async def job() -> None:
        with pytest.raises(SequenceTooLong):
            await linked.remote.add_request([300] * 500_000, PARAMS)
        assert len(await tokens_of(await linked.remote.add_request([1, 2, 3], PARAMS))) == 8
        # And back: an error that says much.
        asked = linked.remote._asked[-1] = asyncio.get_running_loop().create_future()
        linked.end._outbox.put(("answer", -1, "x" * 3_000_000))
        assert len(await asked) == 3_000_000

    linked.run(job)


def test_streams_that_are_closed_dropped_or_never_there_abort_their_requests(linked: Linked) -> None:
    async def job() -> None:
        await linked.engine.pause()
        streams = [await linked.remote.add_request([n], LONG) for n in range(20)]
        with pytest.raises(EngineOverloaded, match="20 requests are unfinished"):
            await linked.remote.add_request([1], PARAMS)
        await streams[0].aclose()
        del streams[0]
        await until(linked.engine, 19)
        adding = asyncio.create_task(linked.remote.add_request([2], LONG))
        await asyncio.sleep(0)
        adding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await adding
        await until(linked.engine, 19)
        streams.clear()
        await until(linked.engine, 0)

    linked.run(job)


def test_one_wait_is_for_several_streams_and_a_failed_one_fails_alone(linked: Linked) -> None:
    async def job() -> None:
        await linked.engine.pause()
        arrived = asyncio.Event()
        bad, good = [await linked.remote.add_request([n], PARAMS, arrived=arrived) for n in (5, 6)]
        await linked.engine.call(lambda engine: engine._fail(engine.scheduler.requests[bad.request], "bad luck"))
        await linked.engine.resume()
        count = 0
        while not good.has_ended:
            await arrived.wait()
            arrived.clear()
            count += len(good.take())
        assert count == 8
        with pytest.raises(RequestFailed, match=r"request \d+: bad luck"):
            bad.take()

    linked.run(job)


def test_numbers_come_from_any_thread_and_who_goes_away_leaves_nothing(linked: Linked) -> None:
    async def job() -> None:
        await linked.engine.pause()
        kept.append(await linked.remote.add_request([1, 2], LONG))
        stats = await asyncio.to_thread(linked.remote.stats)
        assert (stats.waiting, stats.cache.sequences) == (1, 0)
        assert await asyncio.to_thread(linked.remote.slot_stats) == []

    kept: list[RequestStream] = []
    # The server's end closes while a request waits, and nobody reads it any more.
    linked.run(job)
    asyncio.run(linked.engine.resume())
    asyncio.run(until(linked.engine, 0))


def test_an_engine_that_ends_ends_the_other_end_and_its_streams(linked: Linked) -> None:
    ended: list[bool] = []
    linked.remote.on_end = lambda: ended.append(True)

    async def job() -> None:
        await linked.engine.pause()
        stream = await linked.remote.add_request([1, 2], LONG)
        await linked.engine.shutdown(drain=False)
        linked.end.end(RuntimeError("the device is lost"))
        with pytest.raises(EngineClosed, match="before it was done"):
            await tokens_of(stream)
        while linked.remote.is_open:
            await asyncio.sleep(0)
        with pytest.raises(EngineClosed, match="the device is lost; no request is taken"):
            await linked.remote.add_request([1], PARAMS)
        with pytest.raises(EngineClosed):
            await asyncio.to_thread(linked.remote.stats)

    linked.run(job)
    assert ended == [True]


def test_an_engines_process_that_is_gone_ends_the_other_end() -> None:
    ours, theirs = multiprocessing.Pipe()
    remote = RemoteEngine(theirs, None)

    async def job() -> None:
        ended = asyncio.Event()
        remote.on_end = ended.set
        remote.attach()
        adding = asyncio.create_task(remote.add_request([1], PARAMS))
        await asyncio.sleep(0)
        assert [ours.recv()[0] for _ in range(2)] == ["ready", "submit"]
        ours.close()
        await ended.wait()
        with pytest.raises(EngineClosed, match="the engine's process has ended; no request is taken"):
            await adding

    asyncio.run(asyncio.wait_for(job(), 60))


def test_errors_that_no_pickle_holds_say_the_same() -> None:
    told = sendable(DriverError("CUDA_ERROR_UNKNOWN", "map", (1,)))
    assert str(told) == "map(0x1) failed: CUDA_ERROR_UNKNOWN"
    assert isinstance(sendable(ConfigError("x")), ConfigError)
    assert isinstance(sendable(ModuleNotFoundError("x", name="llguidance")), ModuleNotFoundError)
