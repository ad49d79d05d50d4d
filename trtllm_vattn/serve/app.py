"""The application: routes, keys, limits, and what becomes of a request whose client goes away."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from trtllm_vattn.errors import (
    ConfigError,
    EngineClosed,
    EngineOverloaded,
    NoTokenAllowed,
    RequestFailed,
    SequenceTooLong,
    VattnError,
)
from trtllm_vattn.observe import SLOTS_PATH
from trtllm_vattn.runtime.async_engine import RequestStream
from trtllm_vattn.runtime.request import TokenEvent
from trtllm_vattn.serve import protocol
from trtllm_vattn.serve.answers import Answer, line
from trtllm_vattn.serve.link import RemoteEngine
from trtllm_vattn.serve.metrics import CONTENT_TYPE, Metrics, Served, Timer
from trtllm_vattn.serve.protocol import ApiError, Asked
from trtllm_vattn.serve.spans import RequestSpan

logger = logging.getLogger(__name__)
T = TypeVar("T")
LONG_BODY = 32 << 10
"""Bytes. Reading so many, and making tokens of them, takes milliseconds."""
GONE = 499
"""What nginx logs for a client that went away; nobody reads it."""


@dataclass(frozen=True)
class Settings:
    """How a server is set up.

    Attributes
    ----------
    name : str
        What clients call the model.
    keys : sequence of str
        One of them has to be sent as bearer token with every request to ``/v1``; none is no check.
    max_body : int
        Bytes of a request's body.
    max_prompts : int
        Samples of one request, all prompts together.
    read_s : float
        Seconds that a request's head has to come, and its body.
    """

    name: str
    keys: Sequence[str] = ()
    max_body: int = 4 << 20
    max_prompts: int = 128
    read_s: float = 60.0


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error; of a bug, nothing that is inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, SequenceTooLong):
        return ApiError(400, str(error), "context_length_exceeded", "prompt")
    if isinstance(error, ConfigError):
        return ApiError(400, str(error), param=protocol.field_of(str(error)))
    if isinstance(error, RecursionError):  # of reading it, or of anything that looks through its values
        return ApiError(400, "the body is nested too deep; give JSON of fewer levels")
    if isinstance(error, EngineOverloaded):
        return ApiError(429, str(error), "overloaded", retry_s=1)
    if isinstance(error, EngineClosed):
        return ApiError(503, str(error), "shutting_down", retry_s=5)
    if isinstance(error, ModuleNotFoundError) and error.name == "llguidance":
        return ApiError(400, "grammars need llguidance, which this server has not: pip install 'trtllm-vattn[grammar]'")
    if isinstance(error, NoTokenAllowed):
        # The request's own fields are why: no finished choice, for what there is of it is not what they ask for, and no
        # error of the server, for which clients send it again.
        return ApiError(400, str(error), "no_token_allowed")
    if isinstance(error, RequestFailed):
        return ApiError(500, str(error), "request_failed")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, str(error) if isinstance(error, VattnError) else "internal error; see the server's log")


def as_response(error: Exception) -> Response:
    """An error's answer."""
    told = as_api_error(error)
    headers = {"Retry-After": str(told.retry_s)} if told.retry_s else None
    return JSONResponse(told.body(), told.status, headers)


class Streamed(StreamingResponse):
    """Closes its generator however it ends. That looks for itself whether the client is gone."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.stream_response(send)
        finally:
            assert isinstance(self.body_iterator, AsyncGenerator)
            await self.body_iterator.aclose()


class Server:
    """Endpoints over an engine."""

    def __init__(self, engine: Served, settings: Settings, max_model_len: int) -> None:
        self.engine, self.settings, self.metrics = engine, settings, Metrics(engine)
        self._max_model_len = max_model_len

    def app(self) -> Starlette:
        """The ASGI application; when it is shut down the engine is drained and closed."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            if isinstance(self.engine, RemoteEngine):
                self.engine.attach()
            yield
            await self.engine.shutdown()

        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route(SLOTS_PATH, self._slots),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{name:path}", self._guarded(self._model)),
            Route("/v1/completions", self._guarded(self._completions), methods=["POST"]),
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
        ]
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _told})

    # -- small ones ------------------------------------------------------------------------------------------------

    async def _health(self, _: Request) -> Response:
        if self.engine.is_open:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "shutting down"}, 503)

    async def _metrics(self, _: Request) -> Response:
        self.metrics.tasks.set(len(asyncio.all_tasks()))
        # In another thread: it waits, for a moment, where memory is being mapped.
        return Response(await asyncio.to_thread(self.metrics.text), media_type=CONTENT_TYPE)

    async def _slots(self, _: Request) -> Response:
        return Response(await asyncio.to_thread(self.metrics.text, slots=True), media_type=CONTENT_TYPE)

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        return {
            "id": self.settings.name,
            "object": "model",
            "created": 0,
            "owned_by": "trtllm-vattn",
            "max_model_len": self._max_model_len,
        }

    def _check_model(self, name: Any) -> None:
        if name != self.settings.name:
            message = f"no model {name!r:.100}; this server has {self.settings.name!r}"
            raise ApiError(404, message, "model_not_found", "model")

    def _guarded(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint that asks for a key, and whose errors are answers."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
                return await endpoint(request)
            except ClientDisconnect:
                return Response(status_code=GONE)
            except Exception as error:
                return as_response(error)

        return guarded

    def _check_key(self, request: Request) -> None:
        if not self.settings.keys:
            return
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        # Each is compared, whichever fits, so that time tells nothing.
        fits = [hmac.compare_digest(sent.encode(), key.encode()) for key in self.settings.keys]
        if scheme.lower() != "bearer" or not any(fits):
            raise ApiError(401, "no such API key; send one as 'Authorization: Bearer KEY'", "invalid_api_key")

    async def _body(self, request: Request) -> tuple[dict[str, Any], int]:
        """A request's object, and its bytes."""
        most, body = self.settings.max_body, bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise ApiError(413, f"the body is longer than {most:,} bytes", "body_too_large")
        parsed = await _aside(len(body), protocol.parse_json, bytes(body))
        if parsed.get("model") is not None:
            self._check_model(parsed["model"])
        return parsed, len(body)

    # -- completions -----------------------------------------------------------------------------------------------

    async def _completions(self, request: Request) -> Response:
        body, size = await self._body(request)
        asked = await _aside(size, protocol.completion, body)
        self._check_samples(asked)
        return await self._answer(request, asked, await _aside(size, self._tokenized, asked.prompts))

    async def _chat(self, request: Request) -> Response:
        body, size = await self._body(request)
        asked = await _aside(size, protocol.chat, body, self.engine.tokenizer)
        self._check_samples(asked)
        return await self._answer(request, asked, asked.prompts)

    def _check_samples(self, asked: Asked) -> None:
        samples, most = asked.params.n * len(asked.prompts), self.settings.max_prompts
        if samples > most:
            raise ApiError(400, f"{samples} samples are asked for; at most {most} at once", param="n")

    def _tokenized(self, prompts: Sequence[Any]) -> list[Sequence[int]]:
        tokenizer = self.engine.tokenizer
        return [tokenizer(each)["input_ids"] if isinstance(each, str) else each for each in prompts]

    async def _answer(self, request: Request, asked: Asked, prompts: Sequence[Sequence[int]]) -> Response:
        if (longest := max(map(len, prompts))) > self._max_model_len:
            # The engine would say so, too, when all of it was sent there.
            raise SequenceTooLong(f"a prompt of {longest} tokens exceeds max_seq_len {self._max_model_len}; shorten it")
        answer = Answer(asked, self.settings.name, self.engine.tokenizer, prompts)
        span = RequestSpan(request.url.path, self.settings.name, request.headers)
        arrived = asyncio.Event()
        timer, streams = self.metrics.timer(span), list[RequestStream]()
        try:
            for prompt in prompts:
                added = await self.engine.add_request(prompt, asked.params, priority=asked.priority, arrived=arrived)
                streams.append(added)
        except BaseException as error:
            await _close(streams)
            reason = "refused" if isinstance(error, VattnError) else "error"
            self.metrics.ended(reason)
            span.end(reason)
            raise
        came = _events(request, answer, streams, arrived, timer)
        if asked.stream:
            return Streamed(
                _streamed(answer, came), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        async with aclosing(came):
            async for events in came:
                for place, some in events:
                    answer.choices[place].add(some)
        return JSONResponse(answer.whole())


async def _aside(size: int, call: Callable[..., T], *arguments: Any) -> T:
    """``call(*arguments)``; beside the event loop where a body of that many bytes takes long, which would hold up the
    streams of all clients."""
    return await asyncio.to_thread(call, *arguments) if size > LONG_BODY else call(*arguments)


Came = list[tuple[int, list[TokenEvent]]]
"""Events by choice."""


async def _streamed(answer: Answer, came: AsyncGenerator[Came, None]) -> AsyncGenerator[str, None]:
    """An answer's server-sent events, all at once that can be."""
    before = answer.first()
    try:
        async with aclosing(came):
            async for events in came:
                if chunk := before + "".join([answer.more(place, some) for place, some in events]):
                    yield chunk
                    before = ""
    except ClientDisconnect:
        return
    except Exception as error:
        yield line(as_api_error(error).body())
        return
    yield answer.last()


async def _events(
    request: Request, answer: Answer, streams: list[RequestStream], arrived: asyncio.Event, timer: Timer
) -> AsyncGenerator[Came, None]:
    """Events of a request whenever some have come, until all its streams have ended, which set `arrived`; however it
    ends, nothing of it is left in the engine. Raises what a stream raises, and ClientDisconnect when the client goes
    away."""
    n, reason = answer.asked.params.n, "cancelled"
    gone = asyncio.create_task(_gone(request, arrived))
    open_ = {place * n: stream for place, stream in enumerate(streams)}
    try:
        while open_:
            if gone.done():
                raise ClientDisconnect
            arrived.clear()
            came: Came = []
            for first, stream in list(open_.items()):
                came += _by_choice(first, stream.take())
                if stream.has_ended:
                    del open_[first]
            if came:
                timer.tokens((place, len(events)) for place, events in came)
                yield came
            elif open_:
                await arrived.wait()
        if ended := answer.unfinished():
            yield ended
        reason = answer.choices[0].finish_reason or "error"
    except Exception as error:
        reason = "cancelled" if isinstance(error, ClientDisconnect) else "error"
        raise
    finally:
        gone.cancel()
        await _close(streams)
        timer.end(reason, answer.usage())


def _by_choice(first: int, events: list[TokenEvent]) -> Came:
    """Events of one stream, whose first sample is the choice `first`."""
    found: dict[int, list[TokenEvent]] = {}
    for event in events:
        found.setdefault(first + event.branch, []).append(event)
    return list(found.items())


async def _gone(request: Request, arrived: asyncio.Event) -> None:
    """Wait until the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    arrived.set()


async def _close(streams: list[RequestStream]) -> None:
    for stream in streams:
        await stream.aclose()


async def _told(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in OpenAI's bodies."""
    assert isinstance(error, HTTPException)
    message, code = f"{error.detail}", None
    if error.status_code == 404:
        paths = [route.path for route in request.app.routes if "{" not in route.path]
        message, code = f"nothing is served at {request.url.path}; served are {', '.join(paths)}", "not_found"
    elif error.status_code == 405:
        message = f"{request.method} is not served at {request.url.path}; use {(error.headers or {}).get('Allow')}"
    answer = as_response(ApiError(error.status_code, message, code))
    answer.headers.update(error.headers or {})  # the methods that there are
    return answer
