"""Clients that connect and send nothing, or too slowly, over real sockets and both of uvicorn's parsers."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

uvicorn = pytest.importorskip("uvicorn")

from starlette.applications import Starlette  # noqa: E402
from starlette.requests import ClientDisconnect, Request  # noqa: E402
from starlette.responses import JSONResponse, Response, StreamingResponse  # noqa: E402
from starlette.routing import Route  # noqa: E402
from uvicorn.protocols.http.h11_impl import H11Protocol  # noqa: E402
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol  # noqa: E402

from trtllm_vattn.cli.parser import build_parser  # noqa: E402
from trtllm_vattn.serve.app import Settings  # noqa: E402
from trtllm_vattn.serve.reading import protocol_within  # noqa: E402
from trtllm_vattn.serve.server import listen  # noqa: E402

READ_S = 0.6
SOON_S = READ_S / 3
ENOUGH_S = 20.0
GET = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n\r\n"

gone: list[str] = []


async def _echo(request: Request) -> Response:
    try:
        return Response(await request.body())
    except ClientDisconnect:
        gone.append("echo")
        return Response(status_code=499)


async def _refuse(_: Request) -> Response:
    return JSONResponse({"refused": True}, 401)


async def _slow(_: Request) -> Response:
    async def parts():  # type: ignore[no-untyped-def]
        for _ in range(5):
            await asyncio.sleep(READ_S / 2)
            yield b"part"

    return StreamingResponse(parts())


@pytest.fixture(params=[HttpToolsProtocol, H11Protocol], scope="module", ids=["httptools", "h11"])
def address(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    with served(request.param) as where:
        yield where


@contextmanager
def served(parser: type[asyncio.Protocol], **options: Any) -> Iterator[tuple[str, int]]:
    routes = [
        Route("/echo", _echo, methods=["POST"]),
        Route("/refuse", _refuse, methods=["POST"]),
        Route("/slow", _slow),
    ]
    listening = listen("127.0.0.1", 0)
    where = listening.getsockname()
    server = uvicorn.Server(
        uvicorn.Config(
            Starlette(routes=routes),
            http=protocol_within(READ_S, parser),
            **options,
            log_level="error",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    yield where
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@contextmanager
def connected(address: tuple[str, int]) -> Iterator[socket.socket]:
    with socket.create_connection(address, timeout=ENOUGH_S) as made:
        yield made


def rest(made: socket.socket) -> bytes:
    """What comes until the server closes the connection; in time, or this raises."""
    got = b""
    try:
        while some := made.recv(65536):
            got += some
    except ConnectionResetError:  # what was sent, and is not read, has the kernel reset it
        pass
    return got


def until(made: socket.socket, end: bytes) -> bytes:
    got = b""
    while not got.endswith(end):
        some = made.recv(65536)
        assert some, got
        got += some
    return got


def dribble(made: socket.socket, sent: bytes) -> bytes:
    """Send byte by byte, each sooner than the limit, until the server closes the connection; what it answered."""
    got = b""
    made.settimeout(SOON_S)
    for byte in sent:
        try:
            made.sendall(bytes([byte]))
            got += (some := made.recv(65536))
        except TimeoutError:
            continue
        except OSError:
            return got
        if not some:
            return got
    pytest.fail("the server takes it byte by byte")


def check_timeout(got: bytes) -> None:
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert b"connection: close" in head
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "request_timeout")
    assert "did not come whole within 0.6 seconds" in error["message"]


def test_a_client_that_sends_nothing_is_left(address: tuple[str, int]) -> None:
    with connected(address) as made:
        started = time.monotonic()
        assert rest(made) == b""
        assert READ_S * 0.9 < time.monotonic() - started < ENOUGH_S / 2


@pytest.mark.parametrize("sent", [b"G", GET[:-2], HEAD, HEAD + b"abc"], ids=["byte", "head", "no-body", "body"])
def test_a_client_that_stops_in_the_middle_is_told(address: tuple[str, int], sent: bytes) -> None:
    gone.clear()
    with connected(address) as made:
        made.sendall(sent)
        check_timeout(rest(made))
    if sent.startswith(HEAD):
        # The endpoint that waited for the body waits no more.
        deadline = time.monotonic() + ENOUGH_S
        while not gone and time.monotonic() < deadline:
            time.sleep(0.01)
        assert gone == ["echo"]


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\nX: " + b"y" * 100, HEAD.replace(b": 6", b": 200") + b"z" * 100], ids=["head", "body"]
)
def test_a_byte_now_and_then_does_not_help(address: tuple[str, int], sent: bytes) -> None:
    with connected(address) as made:
        quick = len(sent) - 100
        made.sendall(sent[:quick])
        check_timeout(dribble(made, sent[quick:]))


def test_a_request_behind_another_has_a_time_of_its_own(address: tuple[str, int]) -> None:
    with connected(address) as made:
        for _ in range(2):
            # Head and body have as long each, and idle between two requests is not the limit's.
            for part in (HEAD[:20], HEAD[20:], b"abc", b"def"):
                time.sleep(SOON_S)
                made.sendall(part)
            assert made.recv(65536).endswith(b"abcdef")
            time.sleep(READ_S * 1.5)
        made.sendall(HEAD[:20])
        check_timeout(rest(made))


def test_an_answer_takes_as_long_as_it_takes(address: tuple[str, int]) -> None:
    with connected(address) as made:
        made.sendall(GET)
        got = until(made, b"0\r\n\r\n")
        assert got.count(b"part") == 5
        # One that is sent behind it at once, and not read while it is answered.
        made.sendall(GET + HEAD + b"abcdef")
        got = until(made, b"abcdef")
        assert got.count(b"part") == 5


def test_a_pipelined_request_that_stops_waits_for_the_answer_before_it(address: tuple[str, int]) -> None:
    with connected(address) as made:
        made.sendall(GET + HEAD + b"abc")
        got = rest(made)
    assert got.count(b"part") == 5
    check_timeout(got[got.rindex(b"HTTP/1.1 ") :])


def test_a_body_that_was_refused_unread_is_not_waited_for(address: tuple[str, int]) -> None:
    with connected(address) as made:
        made.sendall(HEAD.replace(b"/echo", b"/refuse") + b"abc")
        got = rest(made)
    assert got.startswith(b"HTTP/1.1 401")
    assert b"408" not in got


def test_a_body_that_comes_whole_behind_its_answer_is_waited_for_no_more(address: tuple[str, int]) -> None:
    with connected(address) as made:
        for _ in range(2):
            made.sendall(HEAD.replace(b"/echo", b"/refuse"))
            until(made, b'{"refused":true}')
            made.sendall(b"abc")
            time.sleep(SOON_S)
            # The connection is between two requests then, and the next one has a time of its own.
            made.sendall(b"def")
            time.sleep(READ_S * 1.5)
            for part in (HEAD[:20], HEAD[20:], b"abc", b"def"):
                time.sleep(SOON_S)
                made.sendall(part)
            until(made, b"abcdef")
        # One behind it that has begun.
        made.sendall(HEAD.replace(b"/echo", b"/refuse"))
        until(made, b'{"refused":true}')
        made.sendall(b"abcdef" + HEAD[:20])
        check_timeout(rest(made))


class Taken(asyncio.Protocol):
    """A protocol of websockets, of one that says nothing."""

    def __init__(self, **_: object) -> None:
        pass

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        transport: Any = self.transport
        transport.write(b"taken" if data.startswith(b"GET") else data)


@pytest.mark.parametrize("parser", [HttpToolsProtocol, H11Protocol])
def test_a_connection_that_becomes_a_websocket_has_no_limit(parser: type[asyncio.Protocol]) -> None:
    with served(parser, ws=Taken) as address, connected(address) as made:
        made.sendall(GET[:-2] + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n")
        until(made, b"taken")
        time.sleep(READ_S * 1.5)
        made.sendall(b"more")
        assert until(made, b"more") == b"more"


def test_the_limit_is_an_option() -> None:
    arguments = ["serve", "--model", "x", "--device", "cpu"]
    parser = build_parser(arguments, "0")
    assert parser.parse_args(arguments).read_timeout_s == Settings("x").read_s == 60
    assert parser.parse_args([*arguments, "--read-timeout-s", "7.5"]).read_timeout_s == 7.5
