"""A server's life: its process, the engine's, and a signal that ends both once what runs is finished.

The server has a process of its own, so that what it does for each token takes nothing from the engine's interpreter
(as vLLM has its API server beside the engine's core); what it is sent is in `link`.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import uvicorn

from trtllm_vattn.errors import ConfigError, EngineClosed, VattnError
from trtllm_vattn.runtime.async_engine import AsyncEngine
from trtllm_vattn.runtime.checkpoint import require_tokenizer
from trtllm_vattn.runtime.models import SHAPES
from trtllm_vattn.runtime.settings import check_model_name
from trtllm_vattn.serve.app import Server, Settings
from trtllm_vattn.serve.link import EngineEnd, RemoteEngine
from trtllm_vattn.serve.metrics import Served
from trtllm_vattn.serve.reading import protocol_within
from trtllm_vattn.serve.spans import instrument, is_instrumented

START = "spawn"
"""How the server's process is started: a GPU's context is nothing to fork."""

KEEP_ALIVE_S = 75
"""Seconds that a connection may be idle: longer than proxies and clients keep one, so that none sends a request into
one that is being closed."""
STARTUP_FAILED = 3
"""Exit code of the server's process then, as uvicorn's own."""


def serve(
    model: str,
    settings: Settings,
    host: str,
    port: int,
    drain_s: float,
    max_requests: int,
    options: dict[str, Any],
) -> None:
    """Serve a checkpoint until SIGTERM or SIGINT; requests that run then have `drain_s` seconds.

    Raises
    ------
    ConfigError
        The checkpoint has no tokenizer, or a setting of the engine (`options`) cannot work.
    OSError
        Nothing can listen there.
    EngineClosed
        The engine ended by itself: the device is lost, say. Start the process anew.
    VattnError
        The server's process ended by itself.
    """
    # Before the model is loaded: it may take minutes.
    listening = listen(host, port)
    address, bound = listening.getsockname()[:2]
    address = f"[{address}]" if ":" in address else address
    with ServerProcess(listening, settings, drain_s) as server:
        tokenizer = require_tokenizer(check_model_name(model), SHAPES)
        engine = AsyncEngine.from_pretrained(model, max_requests=max_requests, tokenizer=tokenizer, **options)
        gc.collect()
        gc.freeze()
        try:
            server.begin(engine, engine.max_seq_len)
            with server.signalled() as signals:
                print(f"{settings.name} at http://{address}:{bound}/v1", flush=True)
                code = server.wait()
        finally:
            engine.close()
    if engine.failure is not None:
        raise EngineClosed(f"the engine ended, and with it the server: {engine.failure}") from engine.failure
    if code:
        raise VattnError(f"the server's process ended with code {code}; what it said last is above")
    if signal.SIGINT in signals:
        raise KeyboardInterrupt


class ServerProcess:
    """A server in a process of its own, which begins at once to get ready for an engine.

    Parameters
    ----------
    listening : socket
        Where it listens; it is closed in this process.
    drain_s : float
        Seconds that requests have which run when it is told to end.

    Attributes
    ----------
    pid : int
        The process's.
    """

    def __init__(self, listening: socket.socket, settings: Settings, drain_s: float) -> None:
        spawning: Any = multiprocessing.get_context(START)
        self._connection, theirs = spawning.Pipe()
        self._end: EngineEnd | None = None
        inherited = Inherited(logging.getLogger().getEffectiveLevel(), is_instrumented())
        given = (theirs, listening, settings, drain_s, inherited)
        self._process = spawning.Process(target=run_server, args=given, name="vattn-server", daemon=True)
        with theirs, listening, _without_interrupts():
            self._process.start()
        self.pid: int = self._process.pid

    def begin(self, engine: AsyncEngine, max_model_len: int) -> None:
        """Have it serve an engine; returns when it does.

        Raises ConfigError where the engine has no tokenizer, and VattnError where the process has ended.
        """
        if engine.tokenizer is None:
            raise ConfigError("the model has no tokenizer, which the endpoints need; give a checkpoint with one")
        with suppress(OSError):  # it has ended, which is seen below
            self._connection.send((engine.tokenizer, max_model_len))
        self._end = end = EngineEnd(engine, self._connection)
        engine.on_failure = lambda: end.end(engine.failure)
        if engine.failure is not None:
            end.end(engine.failure)
        end.is_ready.wait()
        if end.has_ended:
            raise VattnError(f"the server's process ended with code {self.wait()} before it served")

    @contextmanager
    def signalled(self) -> Iterator[list[int]]:
        """SIGTERM and SIGINT are the server's meanwhile; gives a list of those that came. In the main thread."""
        came: list[int] = []

        def forward(number: int, _: object) -> None:
            came.append(number)
            self.send_signal(number)

        before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield came
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self._process.is_alive():
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for its end; returns its exit code."""
        self._process.join()
        code: int = self._process.exitcode
        return code

    def close(self) -> None:
        """End it, as SIGTERM does. Idempotent."""
        self._process.terminate()
        self._process.join()
        if self._end is not None:
            self._end.close()
        self._connection.close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """What is started meanwhile ignores SIGINT, which a terminal sends to all processes, until it says otherwise."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(frozen=True)
class Inherited:
    """What the server's process has of the one that starts it."""

    log_level: int
    is_instrumented: bool

    def begin(self) -> None:
        """In the new one."""
        # What a terminal sends to all is sent on by the other process.
        os.setpgid(0, 0)
        logging.basicConfig(level=self.log_level, format="%(name)s: %(message)s")
        if self.is_instrumented:
            instrument()


def run_server(
    connection: Connection, listening: socket.socket, settings: Settings, drain_s: float, inherited: Inherited
) -> None:
    """The server's process."""
    inherited.begin()
    try:
        tokenizer, max_model_len = connection.recv()
    except EOFError:
        return
    engine = RemoteEngine(connection, tokenizer)
    server = uvicorn.Server(configuration(engine, settings, max_model_len, drain_s))

    def end(*_: object) -> None:
        server.should_exit = True

    engine.on_end = end
    # For signals that come before uvicorn has handlers of its own; behind them it raises again the one that ended it.
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    # As in the other process: what is there stays, and no collection looks at it again while tokens wait.
    gc.collect()
    gc.freeze()
    server.run([listening])
    if not server.started:
        raise SystemExit(STARTUP_FAILED)


def configuration(engine: Served, settings: Settings, max_model_len: int, drain_s: float) -> uvicorn.Config:
    """uvicorn's, for the application over an engine. Raises ConfigError where that has no tokenizer."""
    if engine.tokenizer is None:
        raise ConfigError(f"{settings.name} has no tokenizer, which the endpoints need; give a checkpoint with one")
    return uvicorn.Config(
        Server(engine, settings, max_model_len).app(),
        http=protocol_within(settings.read_s),
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(drain_s)),
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises OSError, which says where."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(error.errno, f"nothing can listen there: {error.strerror}", f"{host}:{port}") from error
