"""Clients of a completions endpoint, in a process of their own: so many at once, some of which go away in the middle.

Reads a job as JSON from standard input and writes its outcome as JSON to standard output. It speaks HTTP by itself,
so that the clients take as little as can be of the machine that they measure.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

TIMEOUT_S = 300.0


async def post(host: str, port: int, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection whose request is sent and whose answer's head is read. Raises ConnectionError for another status
    than 200."""
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    status = await reader.readline()
    if b" 200 " not in status:
        answer = (await reader.read())[-500:]
        writer.close()
        raise ConnectionError(f"{status.decode().strip()}: {answer.decode(errors='replace')}")
    while (await reader.readline()).strip():
        pass
    return reader, writer


async def ask(host: str, port: int, request: dict[str, Any]) -> dict[str, Any]:
    """One client: tokens by streaming, all of them, or until it has `leave_after` and goes away."""
    leave_after = request.pop("leave_after", None)
    body = json.dumps({**request, "stream": True, "return_token_ids": True}).encode()
    tokens: list[int] = []
    reason = None
    reader, writer = await post(host, port, body)
    try:
        while reason is None and (leave_after is None or len(tokens) < leave_after):
            line = await reader.readline()
            if not line:
                break
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                return {"tokens": tokens, "error": chunk["error"]["message"]}
            choice = chunk["choices"][0]
            tokens += choice["token_ids"]
            reason = choice["finish_reason"]
    finally:
        writer.close()
    return {"tokens": tokens, "finish_reason": reason, "left": leave_after is not None and reason is None}


async def run(job: dict[str, Any]) -> dict[str, Any]:
    """All requests of a job, `at_once` at a time, in order."""
    outcomes: list[dict[str, Any]] = [{} for _ in job["requests"]]
    waiting = iter(enumerate(job["requests"]))

    async def client() -> None:
        for place, request in waiting:
            try:
                outcomes[place] = await asyncio.wait_for(ask(job["host"], job["port"], dict(request)), TIMEOUT_S)
            except (OSError, TimeoutError, asyncio.TimeoutError, ValueError) as error:
                outcomes[place] = {"tokens": [], "error": f"{type(error).__name__}: {error}"}

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(job["at_once"])))
    return {"seconds": time.perf_counter() - started, "outcomes": outcomes}


if __name__ == "__main__":
    json.dump(asyncio.run(run(json.load(sys.stdin))), sys.stdout)
