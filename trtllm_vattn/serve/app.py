"""The application: routes, keys, limits, and what becomes of a request whose client goes away."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

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
    RequestFailed,
    SequenceTooLong,
    VattnError,
)
from trtllm_vattn.observe import SLOTS_PATH
from trtllm_vattn.runtime.async_engine import AsyncEngine, RequestStream
from trtllm_vattn.runtime.request import TokenEvent
from trtllm_vattn.serve import protocol
from trtllm_vattn.serve.answers import Answer, line
from trtllm_vattn.serve.metrics import CONTENT_TYPE, Metrics, Timer
from trtllm_vattn.serve.protocol import ApiError, Asked
from trtllm_vattn.serve.spans import RequestSpan

logger = logging.getLogger(__name__)
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
    """

    name: str
    keys: Sequence[str] = ()
    max_body: int = 4 << 20
    max_prompts: int = 128


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error; of a bug, nothing that is inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, SequenceTooLong):
        return ApiError(400, str(error), "context_length_exceeded")
    if isinstance(error, ConfigError):
        return ApiError(400, str(error))
    if isinstance(error, RecursionError):  # of reading it, or of anything that looks through its values
        return ApiError(400, "the body is nested too deep; give JSON of fewer levels")
    if isinstance(error, EngineOverloaded):
        return ApiError(429, str(error), "overloaded", retry_s=1)
    if isinstance(error, EngineClosed):
        return ApiError(503, str(error), "shutting_down", retry_s=5)
    if isinstance(error, ModuleNotFoundError) and error.name == "llguidance":
        return ApiError(400, "grammars need llguidance, which this server has not: pip install 'trtllm-vattn[grammar]'")
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
    """Closes its generator however it ends."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            assert isinstance(self.body_iterator, AsyncGenerator)
            await self.body_iterator.aclose()


class Server:
    """Endpoints over an engine."""

    def __init__(self, engine: AsyncEngine, settings: Settings, max_model_len: int) -> None:
        self.engine, self.settings, self.metrics = engine, settings, Metrics(engine)
        self._max_model_len = max_model_len

    def app(self) -> Starlette:
        """The ASGI application; when it is shut down the engine is drained and closed."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
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

    async def _body(self, request: Request) -> dict[str, Any]:
        most, body = self.settings.max_body, bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise ApiError(413, f"the body is longer than {most:,} bytes", "body_too_large")
        parsed = protocol.parse_json(bytes(body))
        self._check_model(parsed.get("model", self.settings.name))
        return parsed

    # -- completions -----------------------------------------------------------------------------------------------

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, protocol.completion(await self._body(request)))

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, protocol.chat(await self._body(request), self.engine.tokenizer))

    async def _answer(self, request: Request, asked: Asked) -> Response:
        n, most = asked.params.n, self.settings.max_prompts
        if n * len(asked.prompts) > most:
            raise ApiError(400, f"{n * len(asked.prompts)} samples are asked for; at most {most} at once", param="n")
        tokenizer = self.engine.tokenizer
        prompts = [tokenizer(each)["input_ids"] if isinstance(each, str) else each for each in asked.prompts]
        answer = Answer(asked, self.settings.name, tokenizer, prompts)
        span = RequestSpan(request.url.path, self.settings.name, request.headers)
        timer, streams = self.metrics.timer(span), list[RequestStream]()
        try:
            for prompt in prompts:
                streams.append(await self.engine.add_request(prompt, asked.params, priority=asked.priority))
        except BaseException as error:
            await self._close(streams)
            reason = "refused" if isinstance(error, VattnError) else "error"
            self.metrics.ended(reason)
            span.end(reason)
            raise
        if asked.stream:
            return Streamed(
                self._streamed(request, answer, streams, timer),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache"},
            )
        await self._whole(request, answer, streams, timer)
        return JSONResponse(answer.whole())

    async def _whole(self, request: Request, answer: Answer, streams: list[RequestStream], timer: Timer) -> None:
        """Wait for all choices. Raises ClientDisconnect where nobody waits for them any more."""
        async for place, events in self._watched(request, streams, timer, answer):
            answer.choices[place].add(events)

    async def _streamed(
        self, request: Request, answer: Answer, streams: list[RequestStream], timer: Timer
    ) -> AsyncIterator[str]:
        for each in answer.first():
            yield each
        try:
            async with aclosing(self._watched(request, streams, timer, answer)) as came:
                async for place, events in came:
                    if (chunk := answer.more(place, events)) is not None:
                        yield chunk
        except ClientDisconnect:
            return
        except Exception as error:
            yield line(as_api_error(error).body())
            return
        for each in answer.last():
            yield each

    async def _watched(
        self, request: Request, streams: list[RequestStream], timer: Timer, answer: Answer
    ) -> AsyncGenerator[tuple[int, list[TokenEvent]], None]:
        """Events of a request by choice, of one choice at a time, until all have ended; however it ends, nothing of it
        is left in the engine. Raises what a stream raises, and ClientDisconnect when the client goes away."""
        came: asyncio.Queue[tuple[int, list[TokenEvent]] | Exception | None] = asyncio.Queue()
        tasks = [asyncio.create_task(_gone(request, came))]
        n, reason = answer.asked.params.n, "cancelled"
        tasks += [asyncio.create_task(_pump(stream, place * n, came)) for place, stream in enumerate(streams)]
        left = len(streams)
        try:
            while left:
                item = await came.get()
                if item is None:
                    left -= 1
                    continue
                if isinstance(item, Exception):
                    reason = "cancelled" if isinstance(item, ClientDisconnect) else "error"
                    raise item
                timer.tokens(len(item[1]))
                yield item
            reason = answer.choices[0].finish_reason or "error"
        finally:
            for task in tasks:
                task.cancel()
            await self._close(streams)
            timer.end(reason, answer.usage())

    async def _close(self, streams: list[RequestStream]) -> None:
        for stream in streams:
            await stream.aclose()


async def _pump(stream: RequestStream, first: int, came: asyncio.Queue[Any]) -> None:
    """Put a stream's events, by choice, to those that came; None at its end."""
    try:
        async for events in stream.batches():
            by_choice: dict[int, list[TokenEvent]] = {}
            for event in events:
                if event.finish_reason in ("abort", "deadline"):
                    raise RequestFailed(f"the request was ended before it was done: {event.finish_reason}")
                by_choice.setdefault(first + event.branch, []).append(event)
            for item in by_choice.items():
                came.put_nowait(item)
        came.put_nowait(None)
    except Exception as error:
        came.put_nowait(error)


async def _gone(request: Request, came: asyncio.Queue[Any]) -> None:
    """Wait until the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    came.put_nowait(ClientDisconnect())


async def _told(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in OpenAI's bodies."""
    assert isinstance(error, HTTPException)
    message, code = f"{error.detail}", None
    if error.status_code == 404:
        paths = [route.path for route in request.app.routes if "{" not in route.path]
        message, code = f"nothing is served at {request.url.path}; served are {', '.join(paths)}", "not_found"
    return as_response(ApiError(error.status_code, message, code))
