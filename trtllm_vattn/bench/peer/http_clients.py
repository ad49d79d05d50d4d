"""Clients of a completions endpoint, in a process of their own: so many at once, some of which go away in the middle.

Reads a job as JSON from standard input; writes a line of JSON for each request as it ends, with its place, and last one
with the seconds that all of it took. Clients speak HTTP by themselves, so that they take as little as can be of the
machine that they measure, or are those of the openai package, where the job says so (``library``). Of a job that is
``timed``, all requests are sent at once, and no answer is looked at before the last one is there.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

TIMEOUT_S = 300.0
Ask = Callable[[dict[str, Any], "int | None", list[int]], Awaitable["str | None"]]
"""Asks for a body, and puts tokens to the list until it has so many; returns the finish reason, None where it left."""


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


async def ask_plainly(
    job: dict[str, Any], body: dict[str, Any], leave_after: int | None, tokens: list[int]
) -> str | None:
    """One client over a socket. Half of those that go away reset the connection."""
    sent = json.dumps({**body, "stream": True, "return_token_ids": True}).encode()
    reader, writer = await post(job["host"], job["port"], sent)
    try:
        while leave_after is None or len(tokens) < leave_after:
            line = await reader.readline()
            if not line:
                raise ConnectionError("the answer ended early")
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ConnectionError(chunk["error"]["message"])
            choice = chunk["choices"][0]
            tokens += choice["token_ids"]
            if choice["finish_reason"] is not None:
                return str(choice["finish_reason"])
        if leave_after is not None and leave_after % 2:
            writer.transport.abort()
        return None
    finally:
        writer.close()


async def answer_of(job: dict[str, Any], body: dict[str, Any]) -> bytes:
    """All of an answer, as it comes over a socket."""
    sent = json.dumps({**body, "stream": job.get("stream", True), "return_token_ids": True}).encode()
    reader, writer = await post(job["host"], job["port"], sent)
    try:
        return await reader.read()
    finally:
        writer.close()


def outcome_of(answer: bytes) -> dict[str, Any]:
    """What an answer says, as `one` has it."""
    lines = [line for line in answer.splitlines() if line.startswith((b"data: {", b"{"))]
    bodies = [json.loads(line.removeprefix(b"data: ")) for line in lines]
    failed = next((body["error"]["message"] for body in bodies if "error" in body), None)
    choices = [body["choices"][0] for body in bodies if "error" not in body]
    if failed is not None or not choices or choices[-1]["finish_reason"] is None:
        return {"tokens": [], "error": failed or "the answer ended early"}
    tokens = [token for choice in choices for token in choice["token_ids"]]
    return {"tokens": tokens, "finish_reason": choices[-1]["finish_reason"], "left": False}


async def run_timed(job: dict[str, Any], told: Callable[[dict[str, Any]], None]) -> None:
    """All requests of a job at once."""
    started = time.perf_counter()
    asked = [answer_of(job, body) for body in job["requests"]]
    answers = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), TIMEOUT_S)
    seconds = time.perf_counter() - started
    for place, answer in enumerate(answers):
        failed = {"tokens": [], "error": repr(answer)}
        told({"place": place, **(failed if isinstance(answer, BaseException) else outcome_of(answer))})
    told({"seconds": seconds})


def asking_by_openai(job: dict[str, Any]) -> Ask:
    """The openai package's asynchronous client; all of a process share one, as its documentation advises."""
    import openai

    url = f"http://{job['host']}:{job['port']}/v1"
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=TIMEOUT_S)

    async def ask(body: dict[str, Any], leave_after: int | None, tokens: list[int]) -> str | None:
        known = {name: body[name] for name in ("prompt", "max_tokens", "temperature")}
        more = {name: value for name, value in body.items() if name not in known}
        more["return_token_ids"] = True
        stream = await client.completions.create(model=job["model"], stream=True, extra_body=more, **known)
        async with stream:
            async for chunk in stream:
                choice = chunk.choices[0]
                tokens += choice.token_ids
                if choice.finish_reason is not None:
                    return str(choice.finish_reason)
                if leave_after is not None and len(tokens) >= leave_after:
                    return None
        raise ConnectionError("the answer ended early")

    return ask


async def one(ask: Ask, request: dict[str, Any]) -> dict[str, Any]:
    """What a client got: all tokens, or those until it has `leave_after` and goes away, or is cancelled after
    `cancel_after` seconds, wherever it is."""
    body = dict(request)
    leave_after, cancel_after = body.pop("leave_after", None), body.pop("cancel_after", None)
    tokens: list[int] = []
    try:
        reason = await asyncio.wait_for(ask(body, leave_after, tokens), cancel_after or TIMEOUT_S)
    except (TimeoutError, asyncio.TimeoutError):
        return {"tokens": tokens, "left": True} if cancel_after else {"tokens": tokens, "error": "hung", "hung": True}
    except Exception as error:
        return {"tokens": tokens, "error": f"{type(error).__name__}: {error}"}
    return {"tokens": tokens, "finish_reason": reason, "left": reason is None}


async def run(job: dict[str, Any], told: Callable[[dict[str, Any]], None]) -> None:
    """All requests of a job, `at_once` at a time, in order; or `run_timed`."""
    if job.get("timed"):
        await run_timed(job, told)
        return

    async def plainly(body: dict[str, Any], leave_after: int | None, tokens: list[int]) -> str | None:
        return await ask_plainly(job, body, leave_after, tokens)

    ask: Ask = asking_by_openai(job) if job.get("library") == "openai" else plainly
    waiting = iter(enumerate(job["requests"]))

    async def client() -> None:
        for place, request in waiting:
            told({"place": place, **await one(ask, request)})

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(job["at_once"])))
    told({"seconds": time.perf_counter() - started})


if __name__ == "__main__":
    asyncio.run(run(json.load(sys.stdin), lambda outcome: print(json.dumps(outcome), flush=True)))
