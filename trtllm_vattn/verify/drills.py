"""Failure drills: each brings about one misfortune and says whether what should come of it came.

What should: a message that names it, memory given back, a code other than 0 where the process dies, and the others'
tokens where it goes on. A drill that a process may not survive runs in one of its own: a fork
of one that has imported everything and done nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import IO, Any
from unittest import mock

import torch
from transformers import PreTrainedModel

from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import ConfigError, DriverError, EngineClosed, RequestFailed, VattnError, WrongProcess
from trtllm_vattn.machine import processes
from trtllm_vattn.runtime.async_engine import AsyncEngine
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.trace import read_trace
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.wrappers import CountingDriver, FaultyDriver

PROMPTS = [[1 + (7 * at + n) % 200 for at in range(n)] for n in (3, 20, 9)]
TOKENS = 6
MOST_CALLS = 500
"""Driver calls of a small workload; more is a workload that does not end."""
PATIENCE_S = 120.0
"""A process that takes longer hangs."""
FREED_WITHIN_S, FREED_BUT = 10.0, 64 << 20
"""The driver takes a dead process's memory back soon, but for what other processes took meanwhile."""
OUT_OF_MEMORY, ILLEGAL = "CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_ILLEGAL_ADDRESS"


class DrillFailed(Exception):
    """What should have come of a misfortune did not."""


@dataclass(frozen=True)
class Outcome:
    """What came of a drill; `exit_code` is of the process that had the misfortune, None where that went on."""

    name: str
    passed: bool
    detail: str
    exit_code: int | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@cache
def _model(device: str) -> PreTrainedModel:
    return load_model("tiny-llama", device, torch.float32)


def engine_over(driver: Driver, extent_classes: int = CacheConfig.extent_classes, **options: Any) -> Engine:
    """A small engine, not captured."""
    model = _model(driver.device)
    config = CacheConfig(extent_classes=extent_classes)
    budget = 8 << 20 if driver.device == "cpu" else 64 << 20
    kv = KVCacheManager(shape_of(model, 4, 128), driver, budget, config=config)
    try:
        return Engine(model, kv, attention="torch", capture=False, compile=False, mapping="between-steps", **options)
    except BaseException:
        kv.close()
        raise


def generate(engine: Engine) -> list[list[int]]:
    """The tokens of the drills' prompts."""
    return [done.tokens for done in engine.generate(PROMPTS, SamplingParams(TOKENS, ignore_eos=True))]


def expect(holds: bool, message: str) -> None:
    """Raise DrillFailed unless it holds."""
    if not holds:
        raise DrillFailed(message)


class Drills:
    """The drills on one device, each a method that says what came of it or raises DrillFailed; a context, which ends
    the process that others are forked from."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._folder = tempfile.TemporaryDirectory()
        self._source: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Drills:
        return self

    def __exit__(self, *error: object) -> None:
        self._end_source()
        self._folder.cleanup()

    def _end_source(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            # It may be waiting for a process that hangs.
            source.kill()
            source.communicate()

    def run(self, name: str) -> Outcome:
        """One drill, whatever comes of it. Raises ConfigError for an unknown one."""
        if name not in DRILLS:
            raise ConfigError(f"no drill {name!r:.60}; there are {', '.join(DRILLS)}, and all")
        started = perf_counter()
        try:
            detail, passed = DRILLS[name](self), True
        except (DrillFailed, VattnError) as error:
            detail, passed = f"{type(error).__name__}: {error}", False
        return Outcome(name, passed, detail, CODES.get(name), perf_counter() - started)

    # -- in this process -----------------------------------------------------------------------------------------------

    def out_of_memory(self) -> str:
        """The device has no memory left, once, at each driver call of a small workload in turn."""
        with engine_over(open_driver(self.device)) as engine:
            wanted = generate(engine)
        refused = ended = survived = 0
        for skip in range(MOST_CALLS):
            counting = CountingDriver(open_driver(self.device))
            driver = FaultyDriver(counting)
            driver.fail("*", skip, OUT_OF_MEMORY)
            try:
                engine = engine_over(driver)
            except VattnError as error:
                refused += 1
                expect(bool(str(error)), "a refusal without a message")
            else:
                failed = _run_through(engine, wanted)
                ended, survived = ended + failed, survived + 1
                whole = driver.seen <= skip
                driver.disarm()
                expect(generate(engine) == wanted, f"other tokens after call {skip} had failed")
                engine.cache.check_integrity()
                engine.close()
                if whole:
                    return f"{refused} starts refused, {survived} runs went on, {ended} requests ended with an error"
            for made, gone in (("create", "release"), ("reserve", "free")):
                calls = counting.calls
                expect(calls[made] == calls[gone], f"{calls[made]} calls of {made}, {calls[gone]} of {gone}")
        raise DrillFailed(f"the workload makes more than {MOST_CALLS} driver calls")

    def clock_jumps(self) -> str:
        """The time of day jumps by days at every look; deadlines and waits go by a clock that does not."""
        with engine_over(open_driver(self.device)) as engine:
            wanted = generate(engine)
        looks = 0
        true_time = time.time

        def jumping() -> float:
            nonlocal looks
            looks += 1
            return true_time() + (1e6 * looks if looks % 2 else -1e6 * looks)

        with mock.patch("time.time", jumping), engine_over(open_driver(self.device)) as engine:
            started, params = perf_counter(), SamplingParams(TOKENS, ignore_eos=True)
            numbers = [engine.submit(prompt, params, deadline_s=3600) for prompt in PROMPTS]
            tokens: dict[int, list[int | None]] = {number: [] for number in numbers}
            for event in engine.run():
                expect(event.finish_reason != "deadline", "a deadline of an hour has passed")
                tokens[event.request].append(event.token)
            expect(list(tokens.values()) == wanted, "other tokens than by a steady clock")
            expect(perf_counter() - started < PATIENCE_S, "waits went by the time of day")
        return f"the time of day was asked for {looks} times; all tokens came, and no deadline"

    # -- in a process of its own ---------------------------------------------------------------------------------------

    def sticky_error(self) -> str:
        """A CUDA error that the process does not recover from: on a card a real one, on the host an injected one."""
        code, said = self._process("sticky_error")
        expect(code == 1, f"the process ended with {code}, after an error that it cannot recover from: {said}")
        expect("the engine ended" in said, f"no message says so: {said}")
        expect(ILLEGAL in said or "CUDA error" in said, f"the error is not named: {said}")
        return said.splitlines()[-1]

    def full_disk(self) -> str:
        """The disk is full while a trace is written: the trace ends, loadable, and the engine goes on."""
        path = Path(self._folder.name, "full.json")
        code, said = self._process("full_disk", str(path))
        expect(code == 0, f"the process ended with {code}: {said}")
        expect("it ends here, and loads" in said, f"no message says that the trace ended: {said}")
        events = len(read_trace(path))
        expect(events > 10, f"the trace holds {events} events")
        return f"{events} events are there, and all tokens came"

    def fork(self) -> str:
        """A process that has an engine forks: the child's calls are refused, the parent goes on."""
        code, said = self._process("fork")
        expect(code == 0, f"the process ended with {code}: {said}")
        return "the child was refused, the parent went on"

    def exit_in_flight(self) -> str:
        """The process exits while requests run, without closing anything."""
        code, said = self._process("exit_in_flight")
        expect(code == 3, f"the process ended with {code} in place of 3, the code that it exits with: {said}")
        return "it ended with its own code"

    def sigterm(self) -> str:
        """SIGTERM while a burst of prompts is being mapped: the process dies of it, at once, and its trace loads."""
        path, ready = (Path(self._folder.name, name) for name in ("sigterm.json", "ready"))
        code, said = self._process("sigterm", str(path), str(ready), kill_at=ready)
        expect(code == -signal.SIGTERM, f"the process ended with {code} in place of {-signal.SIGTERM}: {said}")
        return f"its trace holds {len(read_trace(path))} events"

    def _process(self, name: str, *arguments: str, kill_at: Path | None = None) -> tuple[int, str]:
        """Run a drill's process, which gets SIGTERM once `kill_at` exists; its exit code, and what it said on stderr.
        Raises DrillFailed where it hangs, or its GPU's memory does not come back where nobody else uses it."""
        said = Path(self._folder.name, f"{name}.txt")
        free = self._free_bytes()
        try:
            code = self._code_of(name, [self.device, *arguments], said, kill_at)
        except BaseException:
            # What it says next would be taken for another drill's.
            self._end_source()
            raise
        until = perf_counter() + FREED_WITHIN_S
        while self._is_alone() and self._free_bytes() < free - FREED_BUT:
            expect(perf_counter() < until, f"of {free:,} free bytes {self._free_bytes():,} came back")
            time.sleep(0.1)
        return code, said.read_text().strip()

    def _code_of(self, name: str, arguments: list[str], said: Path, kill_at: Path | None) -> int:
        pid, reading = self._start(name, arguments, said)
        while kill_at is not None and not kill_at.exists() and not select.select([reading], [], [], 0.01)[0]:
            pass
        if kill_at is not None:
            os.kill(pid, signal.SIGTERM)
        if not select.select([reading], [], [], PATIENCE_S)[0]:
            os.kill(pid, signal.SIGKILL)
            raise DrillFailed(f"the process did not end within {PATIENCE_S:g} s")
        return _number(reading, "code")

    def _start(self, name: str, arguments: list[str], said: Path) -> tuple[int, IO[bytes]]:
        """Have a process started that does a drill's part; its id, and where its exit code will be read."""
        if self._source is None:
            # Unbuffered: what a reader had taken too much, `select` would not see.
            self._source = subprocess.Popen(
                [sys.executable, "-c", "from trtllm_vattn.verify.drills import fork_children; fork_children()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
            )
        assert self._source.stdin is not None
        assert self._source.stdout is not None
        self._source.stdin.write(json.dumps([name, arguments, str(said)]).encode() + b"\n")
        return _number(self._source.stdout, "pid"), self._source.stdout

    def _is_alone(self) -> bool:
        """Whether nobody else uses the GPU, whose memory could not be told apart."""
        return self.device == "cpu" or processes(str(torch.cuda.get_device_properties(self.device).uuid)) <= 1

    def _free_bytes(self) -> int:
        return 0 if self.device == "cpu" else int(torch.cuda.mem_get_info(self.device)[0])


def _number(reading: IO[bytes], what: str) -> int:
    """The number on the next line, which says what it is: nobody is to be killed by another's exit code."""
    kind, _, number = reading.readline().decode().strip().partition(" ")
    expect(kind == what, f"the process that others are forked from said {kind!r} in place of {what!r}")
    return int(number)


def _run_through(engine: Engine, wanted: list[list[int]]) -> int:
    """Run the prompts to their end, whatever steps raise; each has its tokens or an error of its own. Returns how many
    had an error."""
    numbers = [engine.submit(prompt, SamplingParams(TOKENS, ignore_eos=True)) for prompt in PROMPTS]
    events = []
    for _ in range(50 * TOKENS):
        if not engine.busy:
            break
        try:
            events += engine.step()
        except VattnError as error:
            expect(bool(str(error)), "a step raised without a message")
    expect(not engine.busy, "requests do not end")
    failed = 0
    for number, tokens in zip(numbers, wanted, strict=True):
        of_it = [event for event in events if event.request == number]
        if of_it[-1].finish_reason == "error":
            expect(bool(of_it[-1].error), f"request {number} ended without a message")
            failed += 1
        else:
            expect([event.token for event in of_it] == tokens, f"request {number} has other tokens")
    return failed


# -- what the processes do ---------------------------------------------------------------------------------------------


def _in_sticky_error(device: str) -> None:
    driver = FaultyDriver(open_driver(device))
    engine = AsyncEngine(engine_over(driver))

    async def serve() -> None:
        stream = await engine.add_request(PROMPTS[1], SamplingParams(60, ignore_eos=True))
        tokens = 0
        async for _ in stream:
            tokens += 1
            if tokens == 4:
                if device == "cpu":
                    driver.fail("*", 0, ILLEGAL, sticky=True)
                else:
                    # Kernels look at the index only when they run: a device-side assert.
                    await engine.call(lambda _: torch.zeros(4, device=device)[torch.tensor([9], device=device)])

    try:
        asyncio.run(serve())
    except (EngineClosed, RequestFailed, DriverError) as error:
        print(f"the stream: {error}", file=sys.stderr)
    engine.close()
    if engine.failure is not None:
        sys.exit(f"the engine ended: {' '.join(str(engine.failure).split())[:300]}")


def _in_full_disk(device: str, path: str) -> None:
    with engine_over(open_driver(device)) as engine:
        wanted = generate(engine)
    # Of the host driver's memory, too, which is files: one page each.
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    with engine_over(open_driver(device), extent_classes=1, trace=path) as engine:
        while engine.trace_error is None:
            expect(generate(engine) == wanted, "other tokens while the trace is written")
        expect(generate(engine) == wanted, "other tokens after the trace ended")


def _in_fork(device: str) -> None:
    with engine_over(open_driver(device)) as engine:
        wanted = generate(engine)
        engine.submit(PROMPTS[1], SamplingParams(TOKENS))
        engine.step()
        if (child := os.fork()) == 0:
            refused = 0
            for call in (engine.step, engine.stats, engine.close, engine.cache.stats):
                try:
                    call()
                except WrongProcess:
                    refused += 1
            os._exit(40 + refused)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        expect(code == 44, f"the child ended with {code}, where 4 calls should have been refused")
        while engine.busy:
            engine.step()
        expect(generate(engine) == wanted, "other tokens in the parent")


def _in_exit_in_flight(device: str) -> None:
    engine = engine_over(open_driver(device))
    for prompt in PROMPTS:
        engine.submit(prompt, SamplingParams(60))
    for _ in range(3):
        engine.step()
    engine.cache.start_thread()
    sys.exit(3)


def _in_sigterm(device: str, path: str, ready: str) -> None:
    engine = engine_over(open_driver(device), trace=path)
    while True:
        for prompt in PROMPTS * 8:
            engine.submit(prompt, SamplingParams(2))
        engine.step()
        Path(ready).touch()
        while engine.busy:
            engine.step()


CHILDREN: dict[str, Callable[..., None]] = {
    "sticky_error": _in_sticky_error,
    "full_disk": _in_full_disk,
    "fork": _in_fork,
    "exit_in_flight": _in_exit_in_flight,
    "sigterm": _in_sigterm,
}


def fork_children() -> None:
    """For each line of stdin fork a process that runs a drill's part; print its id, and then its exit code."""
    for line in sys.stdin:
        name, arguments, said = json.loads(line)
        if (pid := os.fork()) == 0:
            where = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(where, 1)
            os.dup2(where, 2)
            CHILDREN[name](*arguments)
            # From here on it ends as any interpreter does.
            return
        print("pid", pid, flush=True)
        print("code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


DRILLS: dict[str, Callable[[Drills], str]] = {
    "out-of-memory": Drills.out_of_memory,
    "sticky-error": Drills.sticky_error,
    "full-disk": Drills.full_disk,
    "fork": Drills.fork,
    "exit-in-flight": Drills.exit_in_flight,
    "sigterm": Drills.sigterm,
    "clock-jumps": Drills.clock_jumps,
}
CODES = {"sticky-error": 1, "exit-in-flight": 3, "sigterm": -int(signal.SIGTERM)}
"""Exit codes of the processes that die."""
