"""`AsyncEngine`: tasks and threads get the engine's own tokens, errors reach whose they are, nothing is left."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import threading
import warnings
from collections.abc import Awaitable, Callable, Iterator
from time import perf_counter

import pytest
import torch
from tiny_text import tiny_model, tiny_tokenizer

from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import (
    ConfigError,
    DriverError,
    EngineClosed,
    EngineOverloaded,
    RequestFailed,
    WeightsMixed,
    WrongProcess,
)
from trtllm_vattn.runtime.async_engine import COMPILERS, LONG_TEXT, MOST_FAILURES, AsyncEngine, RequestStream
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams

OWN = copy.deepcopy(tiny_model())
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


def engine_of(**options: object) -> Engine:
    model = copy.deepcopy(OWN)
    cache = make_cache("vattn", shape_of(model, 4, 128), "cpu")
    return Engine(model, cache, compile=False, capture=False, tokenizer=tiny_tokenizer(), **options)  # type: ignore[arg-type]


@pytest.fixture
def made() -> Iterator[AsyncEngine]:
    engine = engine_of()
    around = AsyncEngine(engine, max_requests=40)
    yield around
    around.close()
    with pytest.raises(EngineClosed):
        engine.submit([1])
    assert around.unfinished == 0


async def tokens_of(stream: RequestStream) -> list[int]:
    return [event.token async for event in stream if event.token is not None]


def run(job: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(job(), 60))


def test_tasks_of_several_threads_get_the_engines_tokens(made: AsyncEngine) -> None:
    prompts = [[n % 7, n, 3] for n in range(24)]
    with engine_of() as engine:
        wanted = [completion.tokens for completion in engine.generate(prompts, PARAMS)]
    got: dict[int, list[int]] = {}

    async def ask(number: int) -> None:
        stream = await made.add_request(prompts[number], PARAMS)
        if number % 5 == 4:
            # Left in the middle.
            assert (await anext(stream)).token == wanted[number][0]
            await stream.aclose()
            return
        got[number] = await tokens_of(stream)

    async def some(first: int) -> None:
        await asyncio.gather(*(ask(number) for number in range(first, 24, 3)))

    threads = [threading.Thread(target=lambda first=first: asyncio.run(some(first))) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == {number: wanted[number] for number in range(24) if number % 5 != 4}

    async def at_last() -> None:
        await made.shutdown()

    run(at_last)


def test_what_submit_refuses_add_request_raises_and_more_than_enough_is_refused(made: AsyncEngine) -> None:
    async def job() -> None:
        with pytest.raises(ConfigError, match="the prompt is empty"):
            await made.add_request([])
        with pytest.raises(ConfigError, match="the grammar is not possible"):
            await made.add_request("one", SamplingParams(regex="(("))
        await made.pause()
        streams = [await made.add_request([n], PARAMS) for n in range(40)]
        with pytest.raises(EngineOverloaded, match="40 requests are unfinished"):
            await made.add_request([1], PARAMS)
        for stream in streams[1:]:
            await made.abort(stream)
        assert [event async for event in streams[5]] == []
        assert made.unfinished == 1
        await made.resume()
        assert len(await tokens_of(streams[0])) == 8

    run(job)


def test_a_request_of_several_samples_is_one_stream(made: AsyncEngine) -> None:
    async def job() -> None:
        params = SamplingParams(max_tokens=4, ignore_eos=True, n=3, temperature=1.0, seed=2)
        stream = await made.add_request([1, 2], params)
        events = [event async for event in stream]
        assert sorted(event.branch for event in events) == sorted([0, 1, 2] * 4)
        assert made.unfinished == 0

    run(job)


def test_pause_resume_and_an_update_between_steps(made: AsyncEngine) -> None:
    weights = {name: tensor.clone() for name, tensor in OWN.state_dict().items()}

    async def job() -> None:
        stream = await made.add_request([1, 2, 3], SamplingParams(max_tokens=60, ignore_eos=True))
        await anext(stream)
        await made.pause()
        assert await made.update_weights(weights) == 1
        await made.resume()
        events = [event async for event in stream]
        versions = [event.weights_version for event in events]
        assert versions == sorted(versions)
        assert versions[-1] == 1

    run(job)


def test_a_broken_update_holds_requests_up_until_a_full_one(made: AsyncEngine) -> None:
    weights = {name: tensor.clone() for name, tensor in OWN.state_dict().items()}
    manifest = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}

    def breaking() -> Iterator[tuple[str, torch.Tensor]]:
        yield next(iter(weights.items()))
        raise RuntimeError("the stream broke")

    async def job() -> None:
        stream = await made.add_request([1, 2, 3], SamplingParams(max_tokens=30, ignore_eos=True))
        with pytest.raises(RuntimeError, match="the stream broke"):
            await made.update_weights(breaking(), manifest=manifest)
        tokens = asyncio.create_task(tokens_of(stream))
        with pytest.raises(WeightsMixed):
            await made.call(lambda engine: engine.step())
        assert not tokens.done()
        await made.update_weights(weights)
        assert len(await tokens) == 30

    run(job)


def test_one_requests_error_is_its_own(made: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def job() -> None:
        await made.pause()
        bad, good = await made.add_request([5, 6], PARAMS), await made.add_request([7, 8], PARAMS)
        await made.call(lambda engine: engine._fail(engine.scheduler.requests[bad.request], "bad luck"))
        await made.resume()
        with pytest.raises(RequestFailed, match=r"request \d+: bad luck"):
            await tokens_of(bad)
        assert len(await tokens_of(good)) == 8

    run(job)


@pytest.mark.parametrize("times", [MOST_FAILURES - 1, MOST_FAILURES])
def test_steps_that_raise_are_tried_again_and_then_everybody_is_told(
    made: AsyncEngine, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    step, left = Engine.step, [times]

    def failing(self: Engine) -> list:
        if left[0]:
            left[0] -= 1
            raise DriverError("CUDA_ERROR_UNKNOWN", "map", (1,))
        return step(self)

    monkeypatch.setattr(Engine, "step", failing)

    async def job() -> None:
        stream = await made.add_request([1, 2], PARAMS)
        if times < MOST_FAILURES:
            assert len(await tokens_of(stream)) == 8
        else:
            with pytest.raises(DriverError, match="CUDA_ERROR_UNKNOWN"):
                await tokens_of(stream)
        # Whoever comes later is served.
        assert len(await tokens_of(await made.add_request([1, 2], PARAMS))) == 8

    run(job)


def test_a_stream_that_is_dropped_or_whose_task_is_cancelled_aborts_its_request(made: AsyncEngine) -> None:
    long = SamplingParams(max_tokens=100, ignore_eos=True)

    async def job() -> None:
        await made.pause()
        stream = await made.add_request([1], long)
        del stream
        adding = asyncio.create_task(made.add_request([2], long))
        await asyncio.sleep(0)
        adding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await adding
        # Behind this the abort is asked for, and before the next one made.
        await made.call(lambda engine: None)
        assert await made.call(lambda engine: len(engine.scheduler.requests)) == 0
        await made.resume()

    run(job)
    # The event loop is closed while its requests run.
    asyncio.run(leave(made, long))
    run(lambda: drained(made))


async def leave(made: AsyncEngine, params: SamplingParams) -> None:
    made.kept = [await made.add_request([3], params)]  # type: ignore[attr-defined]


async def drained(made: AsyncEngine) -> None:
    await made.shutdown()
    assert made.unfinished == 0


def test_a_request_whose_future_is_cancelled_is_neither_counted_nor_waited_nor_spoken_for(made: AsyncEngine) -> None:
    class Nobody:
        def put(self, puts: object) -> None:
            raise AssertionError(puts)

    async def job() -> None:
        await made.pause()
        holding, goes_on = threading.Event(), threading.Event()

        def hold(engine: Engine) -> bool:
            holding.set()
            return goes_on.wait(30)

        held = asyncio.create_task(made.call(hold))
        assert await asyncio.to_thread(holding.wait, 30)
        taken = made.submit([1], PARAMS, Nobody(), 1)
        assert taken.cancel()
        assert made.unfinished == 0
        # Nor does anybody miss why a request was refused whose task is gone.
        missed: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: missed.append(context))
        adding = asyncio.create_task(made.add_request([1, -1], PARAMS))
        await asyncio.sleep(0)
        adding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await adding
        goes_on.set()
        await held
        await made.call(lambda engine: None)
        gc.collect()
        assert missed == []
        await drained(made)

    run(job)


def test_shutdown_drains_or_not(made: AsyncEngine) -> None:
    async def job() -> None:
        stream = await made.add_request([1], PARAMS)
        await made.pause()
        other = AsyncEngine(engine_of())
        cut = await other.add_request([1], PARAMS)
        await other.pause()
        await other.shutdown(drain=False)
        with pytest.raises(EngineClosed, match="before it was done"):
            await tokens_of(cut)
        with pytest.raises(EngineClosed):
            await other.call(lambda engine: None)
        await made.shutdown()
        assert len(await tokens_of(stream)) == 8
        with pytest.raises(EngineClosed, match="shut down"):
            await made.add_request([1], PARAMS)
        await made.shutdown()

    run(job)


@pytest.mark.parametrize("held", ["suspended", "asleep", "paused"])
def test_shutdown_waits_for_nobody_who_cannot_go_on(made: AsyncEngine, held: str) -> None:
    async def job() -> None:
        stream = await made.add_request([1, 2, 3], SamplingParams(max_tokens=60, ignore_eos=True))
        await anext(stream)
        if held == "suspended":
            await made.call(lambda engine: engine.suspend(stream.request))
        elif held == "asleep":
            await made.call(lambda engine: engine.sleep(kv="drop"))
        else:
            await made.pause()
        await made.shutdown()
        if held == "paused":
            assert len(await tokens_of(stream)) == 59
            return
        with pytest.raises(EngineClosed):
            await tokens_of(stream)

    run(job)


@pytest.mark.parametrize("held", ["suspended", "asleep", "paused"])
def test_a_deadline_ends_who_waits_for_no_step(held: str) -> None:
    began: list[float] = []
    made = AsyncEngine(engine_of(clock=lambda: perf_counter() - began[0] if began else 0.0))

    async def job() -> None:
        params = SamplingParams(max_tokens=60, ignore_eos=True)
        stream = await made.add_request([1, 2, 3], params, deadline_s=0.02)
        other = await made.add_request([1, 2, 3], params)
        await anext(stream)
        if held == "suspended":
            await made.call(lambda engine: [engine.suspend(each.request) for each in (stream, other)])
        elif held == "asleep":
            await made.call(lambda engine: engine.sleep(kv="drop"))
        else:
            await made.pause()
        await made.call(lambda _: began.append(perf_counter()))
        *_, last = [event async for event in stream]
        assert (last.token, last.finish_reason) == (None, "deadline")
        assert made.unfinished == 1

    try:
        run(job)
    finally:
        made.close()


def test_a_forked_child_is_refused_by_name(made: AsyncEngine) -> None:
    async def job() -> None:
        stream = await made.add_request([1, 2, 3], PARAMS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of forking with threads
            child = os.fork()
        if not child:
            wrong = 0
            for call in (
                made.add_request([1]),
                made.abort(stream),
                made.pause(),
                made.shutdown(),
                made.close,
                made.stats,
            ):
                try:
                    await call if not callable(call) else call()  # type: ignore[func-returns-value]
                    wrong += 1
                except WrongProcess:
                    pass
                except BaseException:
                    wrong += 1
            await stream.aclose()
            os._exit(wrong)
        assert os.waitpid(child, 0)[1] == 0
        assert len(await tokens_of(stream)) == 8

    run(job)


def test_what_is_no_engine_or_a_busy_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="engine is None; give an Engine"):
        AsyncEngine(None)  # type: ignore[arg-type]
    with engine_of() as engine:
        with pytest.raises(ConfigError, match="max_requests is 0"):
            AsyncEngine(engine, max_requests=0)
        engine.submit([1], PARAMS)
        with pytest.raises(ConfigError, match="running requests, whose tokens nobody would get"):
            AsyncEngine(engine)


def test_requests_whose_grammars_are_compiled_count_and_none_is_compiled_behind_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of()
    around = AsyncEngine(engine, max_requests=3 * COMPILERS)
    begun, goes_on = threading.Semaphore(0), threading.Event()
    compiled: list[object] = []

    def compiling(params: SamplingParams) -> None:
        compiled.append(params)
        begun.release()
        assert goes_on.wait(30)

    monkeypatch.setattr(engine, "compile_grammar", compiling)
    asked = SamplingParams(regex="a")

    async def job() -> None:
        adding = [asyncio.create_task(around.add_request([1], asked)) for _ in range(3 * COMPILERS)]
        for _ in range(COMPILERS):
            assert await asyncio.to_thread(begun.acquire, timeout=30)
        with pytest.raises(EngineOverloaded, match=f"{3 * COMPILERS} requests are unfinished"):
            await asyncio.wait_for(around.add_request([1], asked), 5)
        closing = asyncio.create_task(around.shutdown(drain=False))
        while not around._stopped:
            await asyncio.sleep(0)
        goes_on.set()
        await closing
        assert [type(each) for each in await asyncio.gather(*adding, return_exceptions=True)] == [EngineClosed] * len(
            adding
        )

    run(job)
    assert len(compiled) == COMPILERS
    assert around.unfinished == 0


def test_of_a_long_text_tokens_are_made_beside_the_engines_thread(
    made: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    tokenize = Engine.tokenize

    def noted(self: Engine, text: str) -> list[int]:
        threads.append(threading.current_thread().name)
        return tokenize(self, text)[:3]

    monkeypatch.setattr(Engine, "tokenize", noted)

    async def text_of(prompt: str, params: SamplingParams | None) -> str:
        return "".join([event.text or "" async for event in await made.add_request(prompt, params)])

    async def job() -> None:
        short, long = "one two three four", "one two three four" + " x" * LONG_TEXT
        assert await text_of(long, PARAMS) == await text_of(short, PARAMS) != ""
        assert [name.startswith("vattn-grammar") for name in threads] == [True, False]
        with pytest.raises(ConfigError, match="surrogate"):
            await made.add_request(long + "\ud800", PARAMS)
        with pytest.raises(ConfigError, match="the parameters are"):
            await made.add_request(long, 3)  # type: ignore[arg-type]

    run(job)
