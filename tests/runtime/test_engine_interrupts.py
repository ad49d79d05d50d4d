"""Ctrl-C at every instruction of every public call of the engine: it goes on with the same tokens, each of them comes
once, closing frees everything and nothing waits for ever.

By default every n-th instruction is tried, and a few signals by a timer; VATTN_THOROUGH=1 tries all of them, and
sends 10,000 signals over 100 seeds.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache as remember
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from interrupting import THOROUGH, instructions_of, interrupt_at, within
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import PreTrainedModel

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError, EngineClosed, WeightsMixed, WrongProcess
from trtllm_vattn.runtime.binding import current_step, shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.request import TokenEvent
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.uninterrupted import drain

SLOTS, LENGTH, CHUNK = 3, 64, 16
SPACING = 8 if THOROUGH else 2
"""Steps from one interrupt to the next. An interrupted step puts every prompt back and a prompt takes several, so
that nothing is ever decoded where every second step is interrupted."""
PROMPTS = [np.random.default_rng(n).integers(0, 512, n).tolist() for n in (5, 37, 1, 12)]
GREEDY = [SamplingParams(n) for n in (9, 6, 14, 1)]
DRAWN = [SamplingParams(n, temperature=0.9, seed=n) for n in (9, 6, 14, 1)]


@dataclass(frozen=True)
class Mode:
    options: dict[str, Any] = field(default_factory=dict)
    params: list[SamplingParams] = field(default_factory=lambda: GREEDY)
    pages: int | None = None
    """Of memory; None is enough for all."""
    kind: str = "vattn"


MODES = {
    "eager": Mode(),
    "captured": Mode({"capture": True}),
    "4 steps": Mode({"steps": 4}),
    "4 steps, captured, drawn": Mode({"steps": 4, "capture": True}, DRAWN),
    "loop": Mode({"steps": 4, "loop": True}),
    "drawn": Mode(params=DRAWN),
    "preempting": Mode(pages=13),
    "preempting, packed": Mode({"packed": True}, DRAWN, pages=13),
    "with a thread": Mode({"mapping": "concurrent"}),
    "paged": Mode(kind="paged"),
}


@remember
def model_of() -> PreTrainedModel:
    return load_model("tiny-llama", "cpu", torch.float32)


def cache_of(mode: Mode, driver: HostDriver) -> KVCache:
    shape = shape_of(model_of(), SLOTS, LENGTH)
    if mode.kind != "vattn":
        return make_cache(mode.kind, shape, "cpu")
    cache = KVCacheManager(shape, driver, 64 << 20)
    if mode.pages is not None:
        cache.set_budget(cache.layout.least_bytes + mode.pages * cache.layout.num_ranges * cache.layout.granularity)
    return cache


def build(mode: Mode, driver: HostDriver) -> Engine:
    options = {"compile": False, "capture": False, "mapping": "between-steps", "chunk": CHUNK, **mode.options}
    return Engine(model_of(), cache_of(mode, driver), **options)


@contextmanager
def empty_driver() -> Iterator[HostDriver]:
    """A host driver in which nothing is left."""
    driver = HostDriver()
    yield driver
    left = driver.live_handles, driver.live_mappings, driver.live_reservations
    driver.close()
    assert left == (0, 0, 0)


@remember
def wanted(name: str) -> list[list[int]]:
    with empty_driver() as driver, build(MODES[name], driver) as engine:
        numbers_ = [engine.submit(*each) for each in zip(PROMPTS, MODES[name].params, strict=True)]
        seen = list(engine.run())
        return [[event.token for event in seen if event.request == n and event.token is not None] for n in numbers_]


def handing_over(frame: FrameType) -> bool:
    """Whether the events of a step are on their way to the caller. There is no call any more and no jump back, so that
    Python runs no signal handler; and no code could take them back once `return` runs."""
    return frame.f_code is Engine.step.__code__ and "events" in frame.f_locals


def some(count: int, about: int) -> list[int]:
    """About so many of `count` instructions, the first and the last among them; all of them where `THOROUGH`."""
    return sorted({*range(0, count, 1 if THOROUGH else count // about + 1), count - 1})


def check_peace(engine: Engine) -> None:
    """Nothing of an interrupted call is left in an idle engine or in this thread."""
    assert not engine.busy
    assert engine.cache.stats().sequences == 0
    engine.cache.check_integrity()
    assert not engine.scheduler.holders
    check_thread()


def in_a_finalizer(frame: FrameType | None) -> bool:
    """Whether something dropped is being given back, where Python would print an interrupt and go on."""
    while frame is not None and frame.f_code.co_name not in ("_drop", "_on_last_reference"):
        frame = frame.f_back
    return frame is not None


def check_thread() -> None:
    with pytest.raises(ConfigError, match="run it through its Engine"):
        current_step()
    assert not torch.is_inference_mode_enabled()
    assert not _get_current_dispatch_mode_stack()
    assert gc.isenabled()


def check_tokens(seen: list[TokenEvent], requests: list[int], want: list[list[int]]) -> None:
    """Each token of each request came once, in order, and an end with the last of them."""
    for number, tokens in zip(requests, want, strict=True):
        mine = [event for event in seen if event.request == number]
        assert [event.token for event in mine] == tokens
        assert [event.index for event in mine] == list(range(len(tokens)))
        assert [event.finish_reason for event in mine] == [None] * (len(tokens) - 1) + ["length"]
    assert {event.request for event in seen} <= set(requests)


@pytest.mark.parametrize("name", MODES)
def test_a_step_interrupted_anywhere(name: str) -> None:
    """Every `SPACING`-th step is interrupted, each at a later instruction than the one before, and serving goes on
    until the longest step has been interrupted at its end."""
    mode, want = MODES[name], wanted(name)
    hits = 0
    with empty_driver() as driver, build(mode, driver) as engine:
        for _ in range(2):  # what is captured when it is needed is captured in the first round
            longest = 0
            for each in zip(PROMPTS, mode.params, strict=True):
                engine.submit(*each)
            while engine.busy:
                longest = max(longest, instructions_of(engine.step, handing_over))
        at, stride = 0, 1 if THOROUGH else longest // 9
        while at < longest:
            requests = [engine.submit(*each) for each in zip(PROMPTS, mode.params, strict=True)]
            seen: list[TokenEvent] = []
            for turn in range(1000):
                if turn % SPACING:
                    seen += engine.step()
                else:
                    hit = interrupt_at(at, lambda seen=seen: seen.extend(engine.step()), handing_over)  # type: ignore[misc]
                    # Not every step is as long: some have less to do.
                    at += stride
                    hits += hit
                if not engine.busy:
                    break
            check_tokens(seen, requests, want)
            check_peace(engine)
    # Where one step is much longer than the others (a prompt's), only few are as long as the later instructions.
    assert hits > 2


def test_a_capture_in_a_step_interrupted_anywhere() -> None:
    mode = Mode({"capture": True, "buckets": [SLOTS]}, DRAWN)
    for _ in range(2):  # what the first one runs once is not interrupted in the others
        with empty_driver() as driver, build(mode, driver) as engine:
            engine.submit(PROMPTS[0], DRAWN[0])
            count = instructions_of(engine.step, handing_over)
    for number in some(count, 2):
        # What is dropped meanwhile runs a few hundred instructions, so the last one may be a little earlier.
        for earlier in range(0, 1000 if number == count - 1 else 1, 200):
            with empty_driver() as driver, build(mode, driver) as engine:
                requests = [engine.submit(PROMPTS[0], DRAWN[0])]
                if not interrupt_at(number - earlier, engine.step, handing_over):
                    continue
                check_thread()
                check_tokens(list(engine.run()), requests, wanted("drawn")[:1])
                check_peace(engine)
                engine.audit()
                break
        else:
            pytest.fail(f"instruction {number} was never reached")


def serving(driver: HostDriver, mode: Mode) -> tuple[Engine, list[int], list[TokenEvent]]:
    """An engine in the middle of it, its requests, and their events so far."""
    engine = build(mode, driver)
    requests = [engine.submit(*each) for each in zip(PROMPTS, mode.params, strict=True)]
    seen = [event for _ in range(4) for event in engine.step()]
    return engine, requests, seen


def weights() -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model_of().state_dict().items()}


CALLS: dict[str, Callable[[Engine], object]] = {
    "submit": lambda engine: engine.submit([7, 8], SamplingParams(2)),
    "abort": lambda engine: engine.abort(0),
    "set_budget": lambda engine: engine.set_budget(_fitting(engine)),
    "update_weights, continue": lambda engine: engine.update_weights(weights()),
    "update_weights, restart": lambda engine: engine.update_weights(weights(), running="restart"),
}


def _fitting(engine: Engine) -> int:
    """A budget that is enough for the longest request alone."""
    assert isinstance(engine.cache, KVCacheManager)
    return engine.cache.layout.least_bytes + engine.cache.bytes_of(48)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_between_steps_interrupted_anywhere(name: str) -> None:
    call = CALLS[name]
    mode = Mode({"steps": 4 if "continue" in name else 1})
    want = wanted("eager")
    with empty_driver() as driver:
        engine, *_ = serving(driver, mode)
        count = instructions_of(lambda: call(engine))
        engine.close()
    assert count > 5
    hits = 0
    for number in some(count - 1, 5):  # the number of what was submitted is handed over by the last one
        with empty_driver() as driver:
            engine, requests, seen = serving(driver, mode)
            hits += interrupt_at(number, lambda engine=engine: call(engine))  # type: ignore[misc]
            if name == "abort":
                # As before it, or as behind it; then as behind it.
                if 0 in engine.scheduler.requests:
                    engine.abort(0)
            elif name != "submit":
                call(engine)
            while engine.busy:
                seen += engine.step()
            if name == "abort":
                seen = [event for event in seen if event.request]
                requests, tokens = requests[1:], want[1:]
            check_tokens(seen, requests, want if name != "abort" else tokens)
            check_peace(engine)
            engine.close()
    assert hits > 3


def test_an_interrupted_update_of_weights_says_so() -> None:
    with empty_driver() as driver, build(Mode(), driver) as engine:
        count = instructions_of(lambda: engine.update_weights(weights()))
        mixed = 0
        for number in some(count, 5):
            requests = [engine.submit(*each) for each in zip(PROMPTS, GREEDY, strict=True)]
            seen = engine.step()
            interrupt_at(number, lambda: engine.update_weights(weights()))
            try:
                seen += engine.step()
            except WeightsMixed:
                mixed += 1
                engine.update_weights(weights())
            while engine.busy:
                seen += engine.step()
            check_tokens(seen, requests, wanted("eager"))
        assert mixed
        check_peace(engine)


def test_generating_interrupted_anywhere() -> None:
    with empty_driver() as driver, build(Mode({"steps": 4}), driver) as engine:

        def generate() -> list[list[int]]:
            return [done.tokens for done in engine.generate(PROMPTS, GREEDY)]

        count = instructions_of(generate)
        hits = 0
        for number in some(count, 8):
            hits += interrupt_at(number, generate)
            # At once: nobody calls again.
            assert engine.cache.stats().sequences == 0
            check_peace(engine)
        assert hits > 3
        assert generate() == wanted("eager")


def test_closing_interrupted_anywhere() -> None:
    mode = Mode({"capture": True, "mapping": "concurrent"})
    with empty_driver() as driver:
        engine, *_ = serving(driver, mode)
        count = instructions_of(engine.close)
    for number in some(count, 4):
        with empty_driver() as driver:
            engine, *_ = serving(driver, mode)
            assert interrupt_at(number, engine.close)
            if number % 2:
                within(20, engine.close)
            else:
                # Closed, or as it was.
                try:
                    engine.step()
                except EngineClosed:
                    pass
                else:
                    assert number < 40
                engine.close()
            engine.close()
            with pytest.raises(EngineClosed):
                engine.step()


@pytest.mark.parametrize("name", ["eager", "loop"])
def test_an_interrupted_engine_is_closed_from_anywhere(name: str) -> None:
    for number in range(100, 4000, 100 if THOROUGH else 800):
        with empty_driver() as driver:
            engine, *_ = serving(driver, MODES[name])
            interrupt_at(number, engine.step)
            if number % 200:
                within(20, engine.close)
            engine.close()


def test_a_constructor_interrupted_anywhere() -> None:
    mode = Mode({"capture": True, "mapping": "concurrent", "buckets": [SLOTS]})

    def construct(cache: KVCache) -> Engine:
        return Engine(model_of(), cache, compile=False, chunk=CHUNK, **mode.options)

    with empty_driver() as driver:
        engines = []
        counts = []
        for _ in range(2):  # what the first one runs once is not interrupted in the others
            cache = cache_of(mode, driver)
            counts.append(instructions_of(lambda cache=cache: engines.append(construct(cache))))  # type: ignore[misc]
            engines.pop().close()
        count = min(counts)
    hits = 0
    for number in some(count, 2):
        with empty_driver() as driver, cache_of(mode, driver) as cache:
            # Kept, so that where it comes too late it is not in a finalizer.
            made: list[Engine] = []
            hits += interrupt_at(number, lambda cache=cache, made=made: made.append(construct(cache)))  # type: ignore[misc]
            made.clear()
            gc.collect()
            check_thread()
            engine = construct(cache)
            assert engine.generate(PROMPTS[:1], GREEDY[0])[0].tokens == wanted("eager")[0]
            engine.close()
    assert hits > 1


def held() -> tuple[int, int, int]:
    with open("/proc/self/maps") as maps:
        mapped = sum("memfd:vattn" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), mapped, threading.active_count()


def from_pretrained() -> Engine:
    return Engine.from_pretrained(
        "tiny-llama", device="cpu", max_seqs=2, max_seq_len=32, compile=False, capture=False, mapping="concurrent"
    )


def test_from_pretrained_interrupted_anywhere_leaves_nothing() -> None:
    from_pretrained().close()
    count = instructions_of(lambda: from_pretrained().close(), in_a_finalizer)
    gc.collect()
    before = held()
    hits = 0
    for number in some(count, 5):
        with warnings.catch_warnings():
            # At its last instructions there is an engine, which is dropped.
            warnings.simplefilter("ignore", ResourceWarning)
            hits += interrupt_at(number, lambda: from_pretrained().close(), in_a_finalizer)
            drain()
            gc.collect()
        assert held() == before
        check_thread()
    assert hits > 2


@pytest.mark.parametrize("steps", [0, 3])
def test_a_dropped_engine_gives_everything_back(steps: int) -> None:
    from_pretrained().close()
    gc.collect()
    before = held()
    engine = from_pretrained()
    assert held() > before
    engine.submit([1, 2, 3])
    for _ in range(steps):
        engine.step()
    gc.disable()
    try:
        with pytest.warns(ResourceWarning, match="a KV cache of .* bytes was not closed; its memory is given back"):
            # At once: nobody collects garbage for the sake of memory that is not Python's.
            del engine
    finally:
        gc.enable()
    drain()
    assert held() == before


def test_a_forked_child_is_refused_by_name() -> None:
    with empty_driver() as driver:
        engine, requests, seen = serving(driver, Mode({"mapping": "concurrent"}))
        calls: list[Callable[[], object]] = [
            engine.step,
            engine.run,
            lambda: engine.submit([1]),
            lambda: engine.generate([[1]]),
            lambda: engine.abort(requests[0]),
            lambda: engine.set_budget("1MiB"),
            lambda: engine.update_weights(weights()),
            engine.audit,
            engine.close,
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of forking with threads
            child = os.fork()
        if not child:
            wrong = 0
            for call in calls:
                try:
                    call()
                    wrong += 1
                except WrongProcess:
                    pass
                except BaseException:
                    wrong += 1
            os._exit(wrong)
        assert os.waitpid(child, 0)[1] == 0
        while engine.busy:
            seen += engine.step()
        check_tokens(seen, requests, wanted("eager"))
        engine.close()


@contextmanager
def interrupt_after(seconds: float) -> Iterator[None]:
    """KeyboardInterrupt where a timer's signal comes."""

    def raise_it(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, raise_it)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:
            signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("seed", range(100 if THOROUGH else 3))
def test_signals_at_random(seed: int) -> None:
    """In a step, in running and leaving `run`, and in what recovers."""
    wanted_hits = 100 if THOROUGH else 8
    rng = random.Random(seed)
    name = rng.choice(list(MODES))
    mode, hits = MODES[name], 0
    with empty_driver() as driver, build(mode, driver) as engine:
        for _ in range(500):
            requests = [engine.submit(*each) for each in zip(PROMPTS, mode.params, strict=True)]
            seen: list[TokenEvent] = []
            while engine.busy:
                wait = rng.uniform(1e-5, rng.choice([1e-3, 8e-3, 3e-2]))
                got: list[TokenEvent] = []
                try:
                    with interrupt_after(wait):
                        got = engine.step()
                except KeyboardInterrupt:
                    hits += 1
                    # Where each step takes longer than the timer, requests end by the steps that nothing interrupts.
                    for _ in range(rng.choice([0, 0, 4, 12])):
                        got += engine.step() if engine.busy else []
                seen += got
            check_tokens(seen, requests, wanted(name))
            check_peace(engine)
            if hits >= wanted_hits:
                break
    assert hits >= wanted_hits
