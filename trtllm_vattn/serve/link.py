"""Between two processes: an engine's, and that of a server, which stands in for the engine there.

The engine's process does nothing for a token but to send it: what came of a step goes over in one message, which a
thread of its own writes, so that the engine's thread waits neither for the interpreter nor for the server. Text,
JSON and HTTP are made in the other process. Both ends are of one program and trust each other; messages are pickled.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import threading
import weakref
from collections.abc import Callable
from itertools import count
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from trtllm_vattn.cache.base import SlotStats
from trtllm_vattn.errors import EngineClosed, VattnError
from trtllm_vattn.runtime.async_engine import AsyncEngine, Puts, RequestStream
from trtllm_vattn.runtime.engine_stats import EngineStats
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.tokens import TokenIds

logger = logging.getLogger(__name__)
EXPECTED = (VattnError, ModuleNotFoundError, StopAsyncIteration)
"""Errors that are no bug."""


class EngineEnd:
    """Serves a `RemoteEngine` at the other end of a connection with an engine, until either ends.

    Attributes
    ----------
    is_ready : threading.Event
        Set when the other end serves, or has ended.
    has_ended : bool
        Whether the other end has.
    """

    def __init__(self, engine: AsyncEngine, connection: Connection) -> None:
        self._engine, self._connection = engine, connection
        self._outbox: SimpleQueue[tuple[str, Any, Any] | None] = SimpleQueue()
        self.has_ended = False
        self.is_ready = threading.Event()
        self._threads = [
            threading.Thread(target=each, name=f"vattn-{each.__name__.strip('_')}", daemon=True)
            for each in (self._read, self._write)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, puts: Puts) -> None:
        """As `Outlet`."""
        if self.has_ended:
            raise RuntimeError("the server's process has ended")
        if isinstance(puts[0][1][0], BaseException):
            puts = [(key, [sendable(error) for error in errors]) for key, errors in puts]
        self._outbox.put(("events", puts, None))

    def end(self, why: BaseException | None) -> None:
        """Tell the other end that the engine has ended, and why; it is to end, too."""
        self._outbox.put(("ended", None if why is None else str(why), None))

    def close(self) -> None:
        """Behind the end of the other process. Idempotent."""
        self._outbox.put(None)
        for thread in self._threads:
            thread.join()
        self._connection.close()

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
            except OSError:
                # Whoever read it is gone, which the other thread sees, too.
                self.has_ended = True

    def _read(self) -> None:
        handlers: dict[str, Callable[[Any, Any], None]]
        handlers = {"submit": self._submit, "abort": self._abort, "stats": self._stats, "ready": self._ready}
        try:
            while True:
                name, key, what = self._connection.recv()
                handlers[name](key, what)
        except (EOFError, OSError):
            self.has_ended = True
            self.is_ready.set()

    def _ready(self, key: Any, what: Any) -> None:
        self.is_ready.set()

    def _submit(self, key: int, what: tuple[TokenIds, SamplingParams, int]) -> None:
        prompt, params, priority = what
        try:
            taken = self._engine.submit(prompt, params, self, key, priority=priority)
        except Exception as error:
            self._answer(key, error)
            return
        taken.add_done_callback(lambda done: self._answer(key, done.exception() or done.result()))

    def _abort(self, key: Any, number: int) -> None:
        self._engine.abort_soon(number)

    def _stats(self, key: int, name: str) -> None:
        try:
            self._answer(key, self._engine.stats() if name == "stats" else self._engine.slot_stats())
        except Exception as error:
            self._answer(key, error)

    def _answer(self, key: int, what: Any) -> None:
        self._outbox.put(("answer", key, sendable(what) if isinstance(what, BaseException) else what))


def sendable(error: BaseException) -> BaseException:
    """An error, or where it cannot be pickled one that says the same. A bug's is logged here, where its traceback
    is."""
    if not isinstance(error, EXPECTED):
        logger.error("a request failed", exc_info=error)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return (VattnError if isinstance(error, VattnError) else RuntimeError)(str(error))
    return error


class RemoteEngine:
    """What a server needs of an `AsyncEngine`, which is at the other end of a connection; for tasks of one event loop.

    Parameters
    ----------
    tokenizer : transformers' fast tokenizer
        The engine's.

    Attributes
    ----------
    on_end : callable or None
        Called in the event loop when the engine has ended.
    """

    def __init__(self, connection: Connection, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.on_end: Callable[[], object] | None = None
        self._connection = connection
        self._loop: asyncio.AbstractEventLoop | None = None
        self._keys = count()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        """What is not answered yet."""
        self._streams: weakref.WeakValueDictionary[int, RequestStream] = weakref.WeakValueDictionary()
        self._closed: EngineClosed | None = None

    def attach(self) -> None:
        """From now on the running event loop is told what comes. Once."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._connection.fileno(), self._read)
        # uvloop, by libuv's uv_poll_init, has it not block, by which a message longer than the socket's buffer would
        # be cut off. The other end always reads, and writes whole messages.
        os.set_blocking(self._connection.fileno(), True)
        self._send("ready", None, None)

    @property
    def is_open(self) -> bool:
        """Whether requests are taken."""
        return self._closed is None

    async def add_request(
        self,
        prompt: TokenIds,
        params: SamplingParams,
        *,
        priority: int = 0,
        arrived: asyncio.Event | None = None,
    ) -> RequestStream:
        """As `AsyncEngine.add_request`, for token ids."""
        stream = RequestStream(self, params.n, arrived)
        key = next(self._keys)
        self._streams[key] = stream
        taken = self._ask("submit", key, (prompt, params, priority))
        try:
            stream.request = await asyncio.shield(taken)
        except asyncio.CancelledError:
            # Whenever it is queued, nobody reads it.
            taken.add_done_callback(lambda done: None if done.exception() else self.abort_soon(done.result()))
            raise
        return stream

    def abort_soon(self, request: int) -> None:
        """As `AsyncEngine.abort_soon`."""
        if self._loop is not None and self._closed is None:
            self._loop.call_soon_threadsafe(self._send, "abort", None, request)

    def stats(self) -> EngineStats:
        """As `AsyncEngine.stats`; from any thread but the event loop's."""
        stats: EngineStats = self._from_thread("stats")
        return stats

    def slot_stats(self) -> list[SlotStats]:
        """As `AsyncEngine.slot_stats`; from any thread but the event loop's."""
        slots: list[SlotStats] = self._from_thread("slot_stats")
        return slots

    async def shutdown(self) -> None:
        """Take no more requests. Who runs still is aborted, by the other process. Idempotent."""
        self._end("the server is shut down")

    # -- the connection --------------------------------------------------------------------------------------------

    def _from_thread(self, name: str) -> Any:
        async def ask() -> Any:
            return await self._ask("stats", next(self._keys), name)

        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result()

    def _ask(self, name: str, key: int, what: Any) -> asyncio.Future[Any]:
        if self._closed is not None:
            raise self._closed
        asked = self._asked[key] = asyncio.get_running_loop().create_future()
        self._send(name, key, what)
        return asked

    def _send(self, name: str, key: int | None, what: Any) -> None:
        if self._closed is None:
            try:
                self._connection.send((name, key, what))
            except OSError:
                self._end("the engine's process has ended")

    def _read(self) -> None:
        """Take all that has come: whoever is behind finds the events of several steps."""
        try:
            while self._closed is None and self._connection.poll():
                name, key, what = self._connection.recv()
                if name == "events":
                    self._put(key)
                elif name == "answer":
                    self._answer(key, what)
                else:
                    self._end(key or "the engine was closed")
        except (EOFError, OSError):
            self._end("the engine's process has ended")

    def _put(self, puts: Puts) -> None:
        for key, events in puts:
            if (stream := self._streams.get(key)) is not None:
                stream.put(events)

    def _answer(self, key: int, what: Any) -> None:
        asked = self._asked.pop(key)
        if asked.cancelled():
            return
        if isinstance(what, BaseException):
            asked.set_exception(what)
        else:
            asked.set_result(what)

    def _end(self, why: str) -> None:
        if self._closed is not None:
            return
        self._closed = closed = EngineClosed(f"{why}; no request is taken")
        if self._loop is not None:
            self._loop.remove_reader(self._connection.fileno())
        self._connection.close()
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(closed)
        self._asked.clear()
        for stream in list(self._streams.values()):
            stream.put([closed])
        if self.on_end is not None:
            self.on_end()
