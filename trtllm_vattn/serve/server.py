"""A server's life: the engine, then uvicorn until a signal, then what runs is finished."""

from __future__ import annotations

import signal
import socket
import sys
from typing import Any

import uvicorn

from trtllm_vattn.errors import ConfigError, EngineClosed
from trtllm_vattn.runtime.async_engine import AsyncEngine
from trtllm_vattn.serve.app import Server, Settings

SWITCH_S = 0.0005
"""How long one thread keeps the interpreter from another: the engine's thread waits so long, after every call that let
go of it, where the event loop has much to do. Python's own 5 ms are as long as a step."""


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
    """
    sys.setswitchinterval(SWITCH_S)
    # Before the model is loaded: it may take minutes.
    listening = listen(host, port)
    with listening:
        engine = AsyncEngine.from_pretrained(model, max_requests=max_requests, **options)
        try:
            server = uvicorn.Server(configuration(engine, settings, options["max_seq_len"], drain_s))
            address, bound = listening.getsockname()[:2]
            address = f"[{address}]" if ":" in address else address
            print(f"{settings.name} at http://{address}:{bound}/v1", flush=True)
            # uvicorn raises the signal again that ended it, with the handler that there was before.
            before = signal.signal(signal.SIGTERM, lambda *_: None)
            engine.on_failure = lambda: setattr(server, "should_exit", True)
            server.should_exit = engine.failure is not None
            try:
                server.run([listening])
            finally:
                signal.signal(signal.SIGTERM, before)
        finally:
            engine.close()
        if engine.failure is not None:
            raise EngineClosed(f"the engine ended, and with it the server: {engine.failure}") from engine.failure


def configuration(engine: AsyncEngine, settings: Settings, max_model_len: int, drain_s: float) -> uvicorn.Config:
    """uvicorn's, for the application over an engine. Raises ConfigError where that has no tokenizer."""
    if engine.tokenizer is None:
        raise ConfigError(f"{settings.name} has no tokenizer, which the endpoints need; give a checkpoint with one")
    return uvicorn.Config(
        Server(engine, settings, max_model_len).app(),
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(drain_s)),
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises OSError, which says where."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(error.errno, f"nothing can listen there: {error.strerror}", f"{host}:{port}") from error
