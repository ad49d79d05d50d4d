"""`bench doors`: a server over an engine, its clients in processes of their own, and what they leave behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, sleep, thread_time
from typing import Any
from urllib.request import urlopen

from trtllm_vattn.bench.harness.contenders import observed
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.async_engine import AsyncEngine
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.request import Completion, StepRecord, TokenEvent
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.serve.app import Settings
from trtllm_vattn.serve.server import ServerProcess, listen

CLIENTS = "trtllm_vattn.bench.peer.http_clients"
NAME = "bench"
PATIENCE_S = 30.0


@dataclass
class Trace:
    """Prompts, and how many tokens each is asked for."""

    prompts: Sequence[list[int]]
    max_output: int

    @property
    def tokens(self) -> int:
        """Of all outputs."""
        return len(self.prompts) * self.max_output

    @property
    def plain(self) -> SamplingParams:
        """Asks for so many tokens and nothing else."""
        return SamplingParams(self.max_output, ignore_eos=True)


def finished(engine: Engine) -> list[TokenEvent]:
    """Events until nothing runs. Raises ConfigError where a request failed."""
    events = list(engine.run())
    for event in events:
        if event.error is not None:
            raise ConfigError(f"{event.error}; raise --budget")
    return events


def engine_seconds(engine: Engine, trace: Trace, params: Sequence[SamplingParams]) -> tuple[float, int]:
    """What all prompts take by the engine itself, all queued at once, and their tokens."""
    started = perf_counter()
    for prompt, each in zip(trace.prompts, params, strict=True):
        engine.submit(prompt, each)
    tokens = sum(event.token is not None for event in finished(engine))
    return perf_counter() - started, tokens


@dataclass
class Serving:
    """A server over an engine of this process."""

    engine: AsyncEngine
    where: dict[str, Any]
    pid: int

    def counts(self) -> dict[str, int]:
        """What is there now, by kind, memory that no sequence uses given back; nothing of it should be more when all
        clients are gone."""
        books = asyncio.run(self.engine.call(_books))
        return {
            **books,
            "unfinished": self.engine.unfinished,
            "tasks": self.tasks(),
            "descriptors": len(os.listdir("/proc/self/fd")) + len(os.listdir(f"/proc/{self.pid}/fd")),
            "threads": threading.active_count() + len(os.listdir(f"/proc/{self.pid}/task")),
        }

    def tasks(self) -> int:
        """Of the server's event loop."""
        with urlopen(f"http://{self.where['host']}:{self.where['port']}/metrics") as answer:
            text = answer.read().decode()
        return int(float(text.partition("\nvattn_server_tasks ")[2].split()[0]))

    def left_since(self, before: dict[str, int]) -> dict[str, int]:
        """What there is more than before, by kind; what is just being dropped is waited for."""
        patience = perf_counter() + PATIENCE_S
        while True:
            now = self.counts()
            more = {kind: now[kind] - before[kind] for kind in now if now[kind] > before[kind]}
            if not more or perf_counter() > patience:
                return more
            sleep(0.1)

    def cpu_s(self) -> float:
        """Seconds of processors that the server's process has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def engine_cpu_s(self) -> float:
        """Seconds of processors that the engine's thread has used."""
        return asyncio.run(self.engine.call(lambda _: thread_time()))


def _books(engine: Engine) -> dict[str, int]:
    engine.scheduler.release_ended()
    engine.cache.release_free_memory()
    engine.cache.check_integrity()
    stats = engine.cache.stats()
    return {
        "requests": len(engine.scheduler.requests),
        "sequences": stats.sequences,
        "mappings": stats.live_mappings,
        "quarantined": stats.quarantined,
    }


@contextmanager
def serving(engine: Engine, max_requests: int, max_seq_len: int) -> Iterator[Serving]:
    """A server over an engine, which is closed at the end."""
    around = AsyncEngine(engine, max_requests=max_requests)
    try:
        listening = listen("127.0.0.1", 0)
        host, port = listening.getsockname()
        with ServerProcess(listening, Settings(NAME), 60) as server:
            server.begin(around, max_seq_len)
            yield Serving(around, {"host": host, "port": port, "model": NAME}, server.pid)
            server.send_signal(signal.SIGTERM)
            server.wait()
    finally:
        around.close()


@dataclass
class Took:
    """What a trace took: seconds by the clock, those of processors that the engine's thread used, and its launches."""

    seconds: float
    engine_cpu_s: float
    launches: list[StepRecord]

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s, a step {self.step_ms:.3f} ms, of which the host works {self.host_ms:.3f}"

    @property
    def step_ms(self) -> float:
        """Milliseconds of a launch of the most lanes, the median."""
        return 1e3 * median(each.wall_s for each in self._full)

    @property
    def host_ms(self) -> float:
        """Milliseconds of that in which its thread did not wait for the device, the median."""
        return 1e3 * median(each.wall_s - each.wait_s for each in self._full)

    @property
    def _full(self) -> list[StepRecord]:
        decoding = [each for each in self.launches if not each.prefilled]
        most = max(each.lanes for each in decoding)
        return [each for each in decoding if each.lanes == most]


def through_server(engine: Engine, server: Serving, job: dict[str, Any]) -> tuple[Took, list[dict[str, Any]]]:
    """All requests of a job at once, by HTTP, and what each got. Raises ConfigError where any failed."""
    before = server.engine_cpu_s()
    with observed(engine) as launches:
        outcomes = list(_lines(_start({**server.where, **job, "timed": True})))
    if not outcomes or "seconds" not in outcomes[-1]:
        raise ConfigError("the process of clients ended early; its error is above")
    last = outcomes.pop()
    if failed := [each["error"] for each in outcomes if "error" in each]:
        raise ConfigError(f"clients failed: {failed[:3]}")
    return Took(float(last["seconds"]), server.engine_cpu_s() - before, launches), outcomes


def outcomes_of(job: dict[str, Any], processes: int, kills: Sequence[int] = ()) -> list[dict[str, Any]]:
    """What each request of a job got, which so many processes share. Process p is killed once it has told of
    ``kills[p]`` requests, where there is such a number: what it had in hand is gone, and another one takes the rest."""
    requests: list[dict[str, Any]] = job["requests"]
    outcomes: list[dict[str, Any]] = [{} for _ in requests]

    def part(number: int) -> None:
        places = list(range(number, len(requests), processes))
        own = {**job, "at_once": max(1, job["at_once"] // processes)}
        kill_at = kills[number] if number < len(kills) else None
        while places:
            done: set[int] = set()
            process = _start({**own, "requests": [requests[place] for place in places]})
            for line in _lines(process):
                if (place := line.pop("place", None)) is not None:
                    outcomes[places[place]] = line
                    done.add(place)
                if kill_at is not None and len(done) == kill_at:
                    process.kill()
            if kill_at is None:
                return
            # Clients take places in order, each the next one when it has done with one.
            taken = min(len(places), max(done, default=-1) + 1 + own["at_once"])
            for place in set(range(taken)) - done:
                outcomes[places[place]] = {"tokens": [], "left": True, "killed": True}
            places, kill_at = places[taken:], None

    threads = [threading.Thread(target=part, args=(number,)) for number in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcome or {"tokens": [], "error": "a process of clients ended early"} for outcome in outcomes]


def _start(job: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", CLIENTS]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    with process.stdin as into:
        into.write(json.dumps(job))
    return process


def _lines(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """What clients tell, until they have ended; half a line is of one that was killed."""
    assert process.stdout is not None
    with process.stdout as told:
        for line in told:
            if line.endswith("\n"):
                yield json.loads(line)
    process.wait()


def judge(outcome: dict[str, Any], wanted: Completion, tolerance: float) -> str:
    """``right``, ``wrong``, ``failed``, or ``tie`` where an output parts from the engine's at a tie."""
    tokens, whole = outcome["tokens"], not outcome.get("left")
    if "error" in outcome:
        return "failed"
    if whole and len(tokens) != len(wanted.tokens):
        return "wrong"
    apart = parting(tokens, wanted)
    return "right" if apart is None else "tie" if apart < tolerance else "wrong"


def parting(tokens: Sequence[int], wanted: Completion) -> float | None:
    """How far the engine's two likeliest tokens lie apart where tokens part from its own first; None where none do."""
    parts = [place for place, (got, own) in enumerate(zip(tokens, wanted.tokens, strict=False)) if got != own]
    if not parts:
        return None
    assert wanted.logprobs is not None
    (_, first), (_, second) = wanted.logprobs[parts[0]].top
    return first - second
