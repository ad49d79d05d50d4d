"""A limit of time for requests to come in, which uvicorn has none of: clients that connect and send nothing, or byte by
byte, would hold connections for ever.

Of uvicorn's protocols, of either parser, more than asyncio's part is used: that `cycle` is the newest request, with
`more_body`, `response_started` and `response_complete`, that `flow` says whether reading is paused, that
`pipeline` has requests that wait for the answer to another (of httptools'; h11's does not read them before), that
`on_response_complete` is called behind each answer, httptools' `on_message_complete` behind each request that came
whole, and that h11's `conn` is at the next request then.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any, cast

import h11
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from trtllm_vattn.serve.protocol import ApiError

logger = logging.getLogger(__name__)


class TimedReading(asyncio.Protocol):
    """Part of a protocol of uvicorn's: the head of a request, its first byte or the connection on, has `read_s` seconds
    to come, and its body as long. What has not come by then is answered by 408, where nothing was answered and
    something came, and its connection closed. A connection between two requests is uvicorn's, and its keep-alive's."""

    read_s: float
    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    cycle: Any = None
    flow: Any
    pipeline: Any = ()
    conn: h11.Connection | None = None
    _timer: asyncio.TimerHandle | None = None
    _of: Any = None
    """The request whose body the timer is for; None, or one that was answered, where it is for a head."""
    _has_begun = False
    """Whether anything came since the last request that came whole."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        self._has_begun = True
        super().data_received(data)
        cycle = self.cycle
        if self.conn is not None and cycle is not None and cycle.response_complete and cycle.more_body:
            # h11's parser; what it has beyond is of the next request.
            self._note_whole(self.conn.their_state is h11.IDLE, has_begun=bool(self.conn.trailing_data[0]))
        self._look()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._stop()

    def on_response_complete(self) -> None:
        """uvicorn's: an answer was written. What came behind its request may have begun the next one, whose time is
        counted from here on."""
        cast(Any, super()).on_response_complete()
        self._stop()
        self._look()

    def on_message_begin(self) -> None:
        """httptools': something of a request came."""
        cast(Any, super()).on_message_begin()
        self._has_begun = True

    def on_message_complete(self) -> None:
        """httptools': a request came whole."""
        cast(Any, super()).on_message_complete()
        self._note_whole(self.cycle is not None and self.cycle.response_complete)

    def _note_whole(self, is_whole: bool, has_begun: bool = False) -> None:
        """Have a request that was answered before its body came be over once that did, of which uvicorn takes no note:
        its connection is between two requests then."""
        if is_whole:
            self.cycle.more_body, self._has_begun = False, has_begun

    def _look(self) -> None:
        """Have the timer run where something is to come, anew where that is of another request."""
        cycle = self.cycle
        if cycle is not None and not cycle.more_body and not cycle.response_complete:
            self._has_begun = False
        is_between = cycle is not None and not cycle.more_body and not self._has_begun
        # Where it became a websocket, another protocol has it.
        if is_between or self.transport.is_closing() or self.transport.get_protocol() is not self:
            self._stop()
        elif self._timer is None or self._of is not cycle:
            self._stop()
            self._timer, self._of = self.loop.call_later(self.read_s, self._end), cycle

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self.flow.read_paused or self.pipeline:
            # It waits for the answer to another request of this connection.
            self._look()
            return
        logger.info("a request did not come whole within %g s; its connection is closed", self.read_s)
        of_body = self.cycle is not None and self.cycle.more_body
        if not self.cycle.response_started if of_body else self._has_begun:
            self.transport.write(_timeout(self.read_s))
        self.transport.close()


def _timeout(read_s: float) -> bytes:
    """An answer, head and body."""
    message = f"the request did not come whole within {read_s:g} seconds; send it sooner"
    body = json.dumps(ApiError(408, message, "request_timeout").body()).encode()
    head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return b"HTTP/1.1 408 Request Timeout\r\n" + head.encode() + body


def protocol_within(read_s: float, base: type[asyncio.Protocol] = AutoHTTPProtocol) -> type[asyncio.Protocol]:
    """uvicorn's protocol, whose requests have so many seconds to come in."""
    return type("TimedProtocol", (TimedReading, base), {"read_s": read_s})
