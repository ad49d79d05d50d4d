"""`AsyncEngine`: an `Engine` for tasks and threads, its loop in a thread of its own.

Who may call what: every method here, from any task of any event loop in any thread. What they ask for is done by the
engine's thread between two steps, in the order in which it was asked for; nobody else touches the engine. All events of
a step for the tasks of one event loop reach it by one call; who has no event loop gets them by an `Outlet`.

Backpressure: at most `max_requests` requests are unfinished, and one more raises EngineOverloaded at once. A task that
reads slowly holds nobody up: its request goes on, and its events, no more than the tokens it asked for, wait in its
stream.

Errors: what `Engine.submit` raises, `add_request` raises. A request that ends with an error of its own raises
RequestFailed in its stream, behind its tokens; NoTokenAllowed, which is one, where its own parameters are why. A step
that raises is tried again, for the engine goes on from its records; where `MOST_FAILURES` steps in a row raise, all
requests are aborted and each stream raises what the last one did. Where the device is lost (`errors.is_device_lost`) no
step can succeed any more: the engine ends, all streams raise EngineClosed, and `failure` says why; the process has to
be started anew. An update of the weights that broke (WeightsMixed) and `sleep` hold requests up until they are undone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from trtllm_vattn.cache.base import SlotStats
from trtllm_vattn.errors import (
    ConfigError,
    EngineClosed,
    EngineOverloaded,
    NoTokenAllowed,
    RequestFailed,
    VattnError,
    WeightsMixed,
    WrongProcess,
    is_device_lost,
)
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.engine_stats import EngineStats
from trtllm_vattn.runtime.request import TokenEvent
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.sampling_fields import LARGEST_COUNT
from trtllm_vattn.runtime.tokens import TokenIds
from trtllm_vattn.runtime.weights_ipc import IpcWeights
from trtllm_vattn.values import described, whole

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)
T = TypeVar("T")

MOST_FAILURES = 3
"""Steps in a row that raise before requests are given up."""

COMPILERS = 4
"""Grammars that are compiled, and long texts that tokens are made of, at once."""

LONG_TEXT = 16 << 10
"""Characters. Of longer prompts tokens are not made by the engine's thread, whose steps would wait for milliseconds."""

IDLE_S = 0.25
"""Seconds without work after which a graph is captured that steps went without, and a broker's word is looked at."""

LOOK_S = 3600.0
"""Seconds after which a thread without work looks again at deadlines."""


class Aborts(Protocol):
    """What has requests that a stream may abort: an `AsyncEngine`, or what stands for one of another process."""

    def abort_soon(self, request: int) -> None:
        """As `AsyncEngine.abort_soon`."""


class RequestStream(AsyncIterator[TokenEvent]):
    """The events of one request, of all its samples, in order; for one task of the loop that added it.

    A stream that is closed, or dropped, before its end aborts its request.

    Parameters
    ----------
    arrived : asyncio.Event or None
        Set whenever events come; one that is given may be that of several streams, by which one task waits for them
        all (`take`).

    Attributes
    ----------
    request : int
        The number that `Engine.submit` gave.
    has_ended : bool
        Whether no event comes any more.
    """

    def __init__(self, engine: Aborts, samples: int, arrived: asyncio.Event | None = None) -> None:
        self.request = -1
        self.has_ended = False
        self._engine, self._left = engine, samples
        self._events: deque[TokenEvent | BaseException] = deque()
        self._arrived = asyncio.Event() if arrived is None else arrived

    def put(self, events: Sequence[TokenEvent | BaseException]) -> None:
        """In the stream's event loop: these came."""
        if not self.has_ended:
            self._events.extend(events)
            self._arrived.set()

    async def __anext__(self) -> TokenEvent:
        while not (events := self.take(1)):
            if self.has_ended:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return events[0]

    def take(self, most: int = LARGEST_COUNT) -> list[TokenEvent]:
        """The events that have come, so many at most; none where none have. Raises what the request ended with, behind
        the events before."""
        events: list[TokenEvent] = []
        while self._events and len(events) < most and not self.has_ended:
            event = self._events[0]
            failed = isinstance(event, BaseException) or event.finish_reason == "error"
            if failed and events:
                break
            self._events.popleft()
            if isinstance(event, BaseException):
                self.has_ended = True
                self._events.clear()
                if isinstance(event, StopAsyncIteration):
                    break
                raise event
            if failed:
                self._stop()
                kind = NoTokenAllowed if event.is_forbidden else RequestFailed
                raise kind(event.error or "the request failed")
            if event.finish_reason is not None:
                self._left -= 1
                self.has_ended = not self._left
            events.append(event)
        return events

    async def aclose(self) -> None:
        """Abort the request, unless it has ended. Idempotent."""
        self._stop()

    def _stop(self) -> None:
        if not self.has_ended and self.request >= 0:
            self._engine.abort_soon(self.request)
        self.has_ended = True
        self._events.clear()
        self._arrived.set()

    def __del__(self) -> None:
        self._stop()


Puts = list[tuple[Any, list[Any]]]
"""Events of some requests, or the error that one ended with, each with the key that its request was submitted with."""


class Outlet(Protocol):
    """Where events of requests go."""

    def put(self, puts: Puts) -> None:
        """These came. Called by the engine's thread, once a step at most, and for errors; it waits for nothing. Raises
        RuntimeError where nobody takes them any more; requests whose events go there are aborted then."""


@dataclass(frozen=True)
class _Loop:
    """Tasks of an event loop; keys are their streams, which are not kept alive, so that dropping one is seen."""

    loop: asyncio.AbstractEventLoop

    def put(self, puts: Puts) -> None:
        self.loop.call_soon_threadsafe(_put_all, puts)


def _put_all(puts: Puts) -> None:
    """In an event loop: what came for its streams."""
    for reference, events in puts:
        if (stream := reference()) is not None:
            stream.put(events)


@dataclass(eq=False)
class _Running:
    """A request that the engine has: its samples' numbers, where its events go, and how many have not ended."""

    numbers: range
    outlet: Outlet
    key: Any
    left: int

    @property
    def number(self) -> int:
        """The request's."""
        return self.numbers[0]


class AsyncEngine:
    """Serves tasks and threads with one `Engine`, whose every call its own thread makes from then on.

    Parameters
    ----------
    engine : Engine
        Nobody else calls it any more; `shutdown` closes it.
    max_requests : int
        Requests that may be unfinished at once; a request of n samples counts once.

    Raises
    ------
    ConfigError
        `engine` is none, or is running requests already.
    """

    def __init__(self, engine: Engine, *, max_requests: int = 4096) -> None:
        if not isinstance(engine, Engine):
            raise ConfigError(f"engine is {described(engine)}; give an Engine")
        if engine.busy:
            raise ConfigError("the engine is running requests, whose tokens nobody would get; finish them first")
        self._engine = engine
        self.max_requests = whole("max_requests", max_requests, 1)
        self._changed = threading.Condition()
        self._calls: deque[tuple[Callable[[Engine], Any], Future[Any]]] = deque()
        self._running: dict[int, _Running] = {}
        """By each sample's number. The engine's thread alone uses it."""
        self._taken = 0
        """Requests taken, or being taken."""
        self._paused = self._stopping = self._stopped = False
        self._held_up: BaseException | None = None
        """Why steps are not taken until a call changed something."""
        self.failure: BaseException | None = None
        """Why the engine ended by itself."""
        self._process = os.getpid()
        self._idle = False
        """Whether the engine's thread finds no step to take before somebody calls."""
        self.on_failure: Callable[[], object] | None = None
        """Called when it does, in the engine's thread."""
        self._compilers = ThreadPoolExecutor(COMPILERS, "vattn-grammar")
        self._thread = threading.Thread(target=self._run, name="vattn-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_pretrained(cls, model: str, *, max_requests: int = 4096, **options: Any) -> Self:
        """Over `Engine.from_pretrained` with these options."""
        engine = Engine.from_pretrained(model, **options)
        try:
            return cls(engine, max_requests=max_requests)
        except BaseException:
            engine.close()
            raise

    @property
    def tokenizer(self) -> Any:
        """The engine's."""
        return self._engine.tokenizer

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest sequence, prompt and output together."""
        return self._engine.cache.shape.max_seq_len

    @property
    def is_open(self) -> bool:
        """Whether requests are taken."""
        return not self._stopping

    @property
    def unfinished(self) -> int:
        """Requests that are not finished."""
        return self._taken

    def stats(self) -> EngineStats:
        """`Engine.stats`, from any thread."""
        return self._engine.stats()

    def slot_stats(self) -> list[SlotStats]:
        """`Engine.slot_stats`, from any thread."""
        return self._engine.slot_stats()

    # -- requests --------------------------------------------------------------------------------------------------

    async def add_request(
        self,
        prompt: TokenIds | str,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        arrived: asyncio.Event | None = None,
    ) -> RequestStream:
        """Queue a prompt as `Engine.submit` does; returns the stream of its events (`RequestStream` has `arrived`).

        Raises
        ------
        ConfigError, SequenceTooLong
            As `Engine.submit`.
        EngineOverloaded
            `max_requests` are unfinished.
        EngineClosed
            It is shut down, or shutting down.
        WrongProcess
            A forked child calls its parent's engine.
        """
        self._check_process()
        stream = RequestStream(self, _samples(params), arrived)
        into = _Loop(asyncio.get_running_loop()), weakref.ref(stream)
        taken = self.submit(prompt, params, *into, priority=priority, deadline_s=deadline_s)
        waited = asyncio.wrap_future(taken)
        try:
            stream.request = await asyncio.shield(waited)
        except asyncio.CancelledError:
            # Whenever it is queued, nobody reads it, nor why it is refused.
            waited.add_done_callback(_has_failed)
            taken.add_done_callback(lambda done: None if _has_failed(done) else self.abort_soon(done.result()))
            raise
        return stream

    def submit(
        self,
        prompt: TokenIds | str,
        params: SamplingParams | None,
        outlet: Outlet,
        key: Any,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> Future[int]:
        """As `add_request`, for who has no event loop: the request's events go to an outlet, with a key. Waits for
        nothing; the future has the number that `Engine.submit` gave, or what that raised, and may be cancelled before.
        Raises EngineOverloaded, EngineClosed and WrongProcess."""
        self._check_process()
        samples, taken = _samples(params), Future[int]()

        def submit(prompt: TokenIds | str, params: SamplingParams | None, engine: Engine) -> int:
            number = engine.submit(prompt, params, priority=priority, deadline_s=deadline_s)
            running = _Running(range(number, number + samples), outlet, key, samples)
            self._running.update(dict.fromkeys(running.numbers, running))
            return number

        taken.add_done_callback(lambda done: self._give_back() if _has_failed(done) else None)
        with self._changed:
            if self._stopping:
                raise EngineClosed("this engine is shut down, or shutting down; no request is taken")
            if self._taken >= self.max_requests:
                raise EngineOverloaded(f"{self._taken} requests are unfinished, as many as are taken; try again later")
            takes_long = isinstance(prompt, str) and len(prompt) > LONG_TEXT
            if takes_long or (isinstance(params, SamplingParams) and params.has_grammar):
                self._compilers.submit(self._call_prepared, prompt, params, submit, taken)
            else:
                self._call(partial(submit, prompt, params), taken)
            self._taken += 1
        return taken

    def _call_prepared(
        self,
        prompt: TokenIds | str,
        params: SamplingParams | None,
        function: Callable[[TokenIds | str, SamplingParams | None, Engine], T],
        future: Future[T],
    ) -> None:
        """`_call`, with tokens made of a text, and the grammar that parameters ask for compiled, before, so that no
        step waits for them."""
        try:
            if not self._stopped:
                if isinstance(prompt, str) and isinstance(params, SamplingParams | None):
                    prompt = self._engine.tokenize(prompt)
                    given = SamplingParams() if params is None else params
                    params = replace(given, detokenize=True) if given.detokenize is None else given
                if isinstance(params, SamplingParams) and params.has_grammar:
                    self._engine.compile_grammar(params)
            self._call(partial(function, prompt, params), future)
        except BaseException as error:
            future.set_exception(error)

    async def abort(self, request: int | RequestStream) -> None:
        """Drop a request, or its stream's, and all its samples; the stream ends. Nothing where it has ended."""
        number = request.request if isinstance(request, RequestStream) else request
        await asyncio.wrap_future(self._call(lambda engine: self._abort(engine, number)))

    def abort_soon(self, request: int) -> None:
        """As `abort`, without waiting; from anywhere. Nothing where it is shut down, or in a forked child, which drops
        what it has of its parent's."""
        with suppress(EngineClosed, WrongProcess):
            self._call(lambda engine: self._abort(engine, request))

    def _abort(self, engine: Engine, number: int) -> None:
        running = self._running.get(number)
        if running is not None and self._forget(running, StopAsyncIteration()):
            engine.abort(running.number)

    def _forget(self, running: _Running, error: BaseException | None) -> bool:
        """A request is no more; its stream ends with an error. Returns whether it was there."""
        there = [self._running.pop(number, None) for number in running.numbers]
        if not any(there):
            return False
        self._give_back()
        if error is not None:
            self._into(running.outlet, [(running.key, [error])])
        return True

    # -- the engine ------------------------------------------------------------------------------------------------

    async def call(self, function: Callable[[Engine], T]) -> T:
        """Have the engine's thread call a function of the `Engine` between two steps; returns or raises what it does.
        What runs meanwhile waits. Raises EngineClosed after `shutdown`."""
        return await asyncio.wrap_future(self._call(function))

    async def pause(self) -> None:
        """Take no further step until `resume`; requests are still queued."""
        await self.call(lambda _: self._set_paused(True))

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self.call(lambda _: self._set_paused(False))

    def _set_paused(self, paused: bool) -> None:
        self._paused = paused

    async def update_weights(self, named_tensors: Any, **options: Any) -> int:
        """`Engine.update_weights` between two steps; returns the new version. Tokens say with which one they were
        computed (`TokenEvent.weights_version`)."""
        return await self.call(lambda engine: engine.update_weights(named_tensors, **options))

    async def update_weights_from_ipc(self, weights: IpcWeights, **options: Any) -> int:
        """`Engine.update_weights_from_ipc` between two steps; returns the new version."""
        return await self.call(lambda engine: engine.update_weights_from_ipc(weights, **options))

    async def shutdown(self, drain: bool = True, timeout_s: float | None = None) -> None:
        """Take no more requests, and close the engine: with `drain` when all have ended, `timeout_s` seconds have
        passed or none can go on (it sleeps, or they are suspended), else at once. Streams of requests that have not
        ended raise EngineClosed then. Idempotent."""
        self._check_process()
        with self._changed:
            self._stopping = True
            self._paused = self._paused and not drain
            self._idle = False
            self._changed.notify_all()
        if drain:
            await asyncio.to_thread(self._wait_until_drained, timeout_s)
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """`shutdown` without draining, for who has no event loop."""
        self._check_process()
        with self._changed:
            self._stopping = self._stopped = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self._compilers.shutdown()

    def _wait_until_drained(self, timeout_s: float | None) -> None:
        with self._changed:
            self._changed.wait_for(self._is_drained, timeout_s)

    def _is_drained(self) -> bool:
        """Whether all requests have ended, or none of those that the engine has can go on."""
        return not self._taken or self._stopped or (self._idle and self._taken == len(set(self._running.values())))

    # -- the thread ------------------------------------------------------------------------------------------------

    def _check_process(self) -> None:
        """Before the lock is taken, which another thread may have held when a child was forked."""
        if self._process != os.getpid():
            raise WrongProcess(f"this engine was made in process {self._process}; make one in this process")

    def _call(self, function: Callable[[Engine], T], future: Future[T] | None = None) -> Future[T]:
        self._check_process()
        future = Future() if future is None else future
        with self._changed:
            if self._stopped:
                raise EngineClosed("this engine is shut down; build another")
            self._calls.append((function, future))
            self._idle = False
            self._changed.notify_all()
        return future

    def _give_back(self) -> None:
        """One request less is unfinished."""
        with self._changed:
            self._taken -= 1
            self._changed.notify_all()

    def _run(self) -> None:
        device = self._engine.cache.device
        failures, why = 0, None
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            while self._wait():
                self._answer()
                failures = self._step(failures) if self._steps or self._is_late else failures
        except BaseException as error:
            logger.exception("the engine's thread ends")
            self.failure = why = error
        try:
            self._end(why)
        except Exception as error:
            if why is None:
                raise
            logger.error("what the engine held could not be given back before the process ends: %s", error)
        if why is not None and self.on_failure is not None:
            self.on_failure()

    def _step(self, failures: int) -> int:
        """A step, or the end of what is overdue where none is taken, after so many in a row that raised; returns how
        many did then."""
        try:
            events = self._engine.step() if self._steps else self._engine.end_overdue()
        except WeightsMixed as error:
            self._held_up = error
            return failures
        except Exception as error:
            if is_device_lost(error):
                raise
            logger.warning("a step failed, %d in a row: %s", failures + 1, error, extra={"failures": failures + 1})
            if failures + 1 < MOST_FAILURES:
                return failures + 1
            for running in set(self._running.values()):
                self._drop(running, error)
            return 0
        self._deliver(events)
        return 0

    def _drop(self, running: _Running, error: BaseException | None) -> None:
        """Abort a request, whose stream ends with an error."""
        if not self._forget(running, error):
            return
        try:
            self._engine.abort(running.number)
        except VattnError as failed:
            text, number = "request %d: taking its memory is tried again: %s", running.number
            logger.warning(text, number, failed, extra={"request": number})

    @property
    def _steps(self) -> bool:
        """Whether there is a step to take now: something runs, or a broker's operator has the engine sleep or wake."""
        if self._paused or self._held_up is not None:
            return False
        return self._engine.is_told_otherwise or (self._engine.busy and not self._engine.sleeping.is_asleep)

    @property
    def _is_late(self) -> bool:
        """Whether a request's deadline has passed, which a step would end."""
        return not self._engine.deadline_in_s

    @property
    def _waits(self) -> bool:
        """Whether there is no step before somebody calls: `update_weights`, or `wake`, or a broker's operator does."""
        return self._held_up is not None or self._engine.sleeping.is_asleep

    def _wait(self) -> bool:
        """Wait for something to do; False is to end. After a while without, graphs that steps went without are
        captured."""
        while True:
            with self._changed:
                idle = False
                while not (idle or self._stopped or self._calls or self._steps or self._is_late):
                    self._idle = True
                    self._changed.notify_all()
                    wanted = bool(self._engine.decode.wanted) and not (self._engine.busy or self._waits)
                    # Nothing here says what a broker's operator wants: that is looked at.
                    looks = wanted or self._engine.cache.waits_for_memory
                    most_s = min(self._engine.deadline_in_s, IDLE_S if looks else LOOK_S)
                    idle = not self._changed.wait(most_s) and wanted
                self._idle = False
                if not idle:
                    return not self._stopped
            self._capture_wanted()

    def _capture_wanted(self) -> None:
        try:
            self._engine.capture_wanted()
        except Exception as error:
            # Steps go on without it, in a larger graph.
            logger.warning("a graph could not be captured: %s", error)

    def _answer(self) -> None:
        """Make the calls that were asked for."""
        while self._calls:
            function, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            self._held_up = None
            try:
                future.set_result(function(self._engine))
            except BaseException as error:
                future.set_exception(error)

    def _deliver(self, events: list[TokenEvent]) -> None:
        """Give events to their outlets, to each at once."""
        came: dict[_Running, list[Any]] = {}
        for event in events:
            if (running := self._running.get(event.request)) is None:
                continue
            came.setdefault(running, []).append(event)
            if event.finish_reason is not None:
                del self._running[event.request]
                running.left -= 1
                if not running.left:
                    self._give_back()
        by_outlet: dict[Outlet, Puts] = {}
        for running, its in came.items():
            by_outlet.setdefault(running.outlet, []).append((running.key, its))
        for outlet, puts in by_outlet.items():
            self._into(outlet, puts)

    def _into(self, outlet: Outlet, puts: Puts) -> None:
        """Give events to an outlet; where nobody takes them any more, its requests are aborted."""
        try:
            outlet.put(puts)
        except RuntimeError:
            for running in {each for each in self._running.values() if each.outlet == outlet}:
                self._drop(running, None)

    def _end(self, why: BaseException | None) -> None:
        """Close the engine, and tell everybody who waits."""
        with self._changed:
            self._stopping = self._stopped = True
            calls, self._calls = self._calls, deque()
        closed = EngineClosed("this engine was shut down before it was done" + (f": {why}" if why else ""))
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(closed)
        for running in set(self._running.values()):
            self._forget(running, closed)
        self._engine.close()


def _has_failed(done: Future[Any] | asyncio.Future[Any]) -> bool:
    """Whether what was asked for was not done."""
    return done.cancelled() or done.exception() is not None


def _samples(params: object) -> int:
    return params.n if isinstance(params, SamplingParams) else 1
