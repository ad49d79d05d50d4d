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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
from trtllm_vattn.lost import end_process
from trtllm_vattn.machine import processes
from trtllm_vattn.runtime.async_engine import AsyncEngine
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.request import TokenEvent
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.tenancy.beside import host_bytes_beside
from trtllm_vattn.tenancy.config import TenantConfig
from trtllm_vattn.trace import read_trace
from trtllm_vattn.values import counted
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.wrappers import CountingDriver, FaultyDriver

PROMPTS = [[1 + (7 * at + n) % 200 for at in range(n)] for n in (3, 20, 9)]
TOKENS = 6
MOST_CALLS = 500
"""Driver calls of a small workload; more is a workload that does not end."""
PATIENCE_S = 120.0
"""A process that takes longer hangs."""
LENT = 256 << 20
"""Bytes of a broker: more than the drills' engines ask for."""
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


def tenant_over(device: str, path: str, name: str) -> Engine:
    """A small engine whose memory is a broker's, not captured."""
    return Engine.from_pretrained(
        "tiny-llama",
        device=device,
        dtype=torch.float32,
        max_seqs=4,
        max_seq_len=128,
        broker=TenantConfig(path, name),
        attention="torch",
        mapping="between-steps",
        prefix_cache=False,
        capture=False,
        compile=False,
    )


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
                    return (
                        f"{counted(refused, 'start')} refused, {counted(survived, 'run')} went on, "
                        f"{counted(ended, 'request')} ended with an error"
                    )
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
        return f"the time of day was asked for {counted(looks, 'time')}; all tokens came, and no deadline"

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

    def killed_tenant(self) -> str:
        """A tenant of a broker is killed while it and another one serve: its memory comes back, the other goes on."""
        # With msgspec, which is an extra.
        from trtllm_vattn.tenancy.broker import open_exportable
        from trtllm_vattn.verify.tenants import lending

        with engine_over(open_driver(self.device)) as engine:
            wanted = generate(engine)
        driver, path = open_exportable(self.device), Path(self._folder.name, "of-tenant")
        with (
            self._gives_back(),
            lending(driver, LENT, path) as broker,
            tenant_over(self.device, str(path), "other") as other,
        ):
            with self._beside("killed_tenant", str(path)) as victim:
                events = _some_steps(other)
                lent = broker.books.accounts["victim"].held
                expect(lent > 0, "the tenant was killed before it held anything")
                code = victim.kill()
            expect(code == -signal.SIGKILL, f"the process ended with {code} in place of {-signal.SIGKILL}")
            _await(lambda: "victim" not in broker.tenants, "the broker lends to a tenant whose process has ended")
            expect(_tokens_of([*events, *other.run()]) == wanted, "other tokens of the tenant that goes on")
            expect(generate(other) == wanted, "other tokens of a tenant that begins again")
            other.cache.check_integrity()
            held, left = other.cache.held_bytes, broker.books.lent
            expect(left == held, f"{left:,} bytes are lent, of which {held:,} to the tenant that is left")
        return f"{lent:,} bytes came back to the broker, the other's tokens all came"

    def killed_broker(self) -> str:
        """A broker is killed while a tenant serves: who needs no more memory goes on, who needs some ends with an error
        that says why."""
        with engine_over(open_driver(self.device)) as engine:
            wanted = generate(engine)
        path = Path(self._folder.name, "of-broker")
        with (
            self._gives_back(),
            self._beside("killed_broker", str(path)) as broker,
            tenant_over(self.device, str(path), "holder") as holder,
            tenant_over(self.device, str(path), "needy") as needy,
        ):
            events = _some_steps(holder)
            number = needy.submit(PROMPTS[1], SamplingParams(TOKENS, ignore_eos=True))
            code = broker.kill()
            expect(code == -signal.SIGKILL, f"the broker ended with {code} in place of {-signal.SIGKILL}")
            expect(_tokens_of([*events, *holder.run()]) == wanted, "other tokens of a tenant that needs no more memory")
            expect(generate(holder) == wanted, "other tokens of a tenant that begins again within what it holds")
            ended = [event for event in needy.run() if event.request == number][-1]
            expect(ended.finish_reason == "error", f"a request without memory ended by {ended.finish_reason}")
            expect("broker" in str(ended.error), f"its error does not say that the broker has ended: {ended.error}")
            for each in (holder, needy):
                each.cache.check_integrity()
        return f"who held its memory went on; who did not: {ended.error}"

    @contextmanager
    def _beside(self, name: str, *arguments: str) -> Iterator[_Process]:
        """Inside this context a process does a drill's part, and has said that it is ready; it is ended at the end."""
        ready, said = (Path(self._folder.name, f"{name}.{what}") for what in ("ready", "txt"))
        ready.unlink(missing_ok=True)
        process = self._start(name, [self.device, *arguments, str(ready)], said)
        try:
            process.wait_for(ready)
            expect(ready.exists(), f"the process ended before it was ready: {said.read_text()}")
            yield process
            process.kill()
        except BaseException:
            process.signal(signal.SIGKILL)
            self._end_source()
            raise

    def _process(self, name: str, *arguments: str, kill_at: Path | None = None) -> tuple[int, str]:
        """Run a drill's process, which gets SIGTERM once `kill_at` exists; its exit code, and what it said on stderr.
        Raises DrillFailed where it hangs, or its GPU's memory does not come back where nobody else uses it."""
        said = Path(self._folder.name, f"{name}.txt")
        with self._gives_back():
            try:
                code = self._code_of(name, [self.device, *arguments], said, kill_at)
            except BaseException:
                # What it says next would be taken for another drill's.
                self._end_source()
                raise
        return code, said.read_text().strip()

    @contextmanager
    def _gives_back(self) -> Iterator[None]:
        """Behind this context this process holds of host drivers what it did before, and the GPU's memory comes back,
        where nobody else uses it; else DrillFailed is raised."""
        files, free = _files_open(), self._free_bytes()
        yield
        expect(_files_open() == files, f"{_files_open():,} bytes of host drivers are held, where {files:,} were")
        until = perf_counter() + FREED_WITHIN_S
        while self._is_alone() and self._free_bytes() < free - FREED_BUT:
            expect(perf_counter() < until, f"of {free:,} free bytes {self._free_bytes():,} came back")
            time.sleep(0.1)

    def _code_of(self, name: str, arguments: list[str], said: Path, kill_at: Path | None) -> int:
        process = self._start(name, arguments, said)
        if kill_at is not None:
            process.wait_for(kill_at)
            process.signal(signal.SIGTERM)
        return process.wait()

    def _start(self, name: str, arguments: list[str], said: Path) -> _Process:
        """Have a process started that does a drill's part, one at a time."""
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
        return _Process(_number(self._source.stdout, "pid"), self._source.stdout)

    def _is_alone(self) -> bool:
        """Whether nobody else uses the GPU, whose memory could not be told apart."""
        return self.device == "cpu" or processes(str(torch.cuda.get_device_properties(self.device).uuid)) <= 1

    def _free_bytes(self) -> int:
        return 0 if self.device == "cpu" else int(torch.cuda.mem_get_info(self.device)[0])


class _Process:
    """A process that does a drill's part, and where its exit code will be read."""

    def __init__(self, pid: int, reading: IO[bytes]) -> None:
        self._pid, self._reading = pid, reading
        self._code: int | None = None

    def _has_ended(self, within_s: float = 0.0) -> bool:
        return self._code is not None or bool(select.select([self._reading], [], [], within_s)[0])

    def wait_for(self, path: Path) -> None:
        """Return when there is such a file, or the process has ended. Raises DrillFailed."""
        until = perf_counter() + PATIENCE_S
        while not path.exists() and not self._has_ended(0.01):
            if perf_counter() > until:
                self.signal(signal.SIGKILL)
                raise DrillFailed(f"the process did not come so far within {PATIENCE_S:g} s")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it has not ended."""
        if not self._has_ended():
            with suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def wait(self) -> int:
        """Its exit code. Raises DrillFailed where it hangs."""
        if not self._has_ended(PATIENCE_S):
            self.signal(signal.SIGKILL)
            raise DrillFailed(f"the process did not end within {PATIENCE_S:g} s")
        if self._code is None:
            self._code = _number(self._reading, "code")
        return self._code

    def kill(self) -> int:
        """End it where it is (SIGKILL), if it has not ended; its exit code."""
        self.signal(signal.SIGKILL)
        return self.wait()


def _files_open() -> int:
    """Bytes that this process holds of host drivers, its own and others'."""
    return host_bytes_beside(os.getpid(), ()) or 0


def _await(holds: Callable[[], bool], otherwise: str) -> None:
    until = perf_counter() + FREED_WITHIN_S
    while not holds():
        expect(perf_counter() < until, otherwise)
        time.sleep(0.005)


def _some_steps(engine: Engine) -> list[TokenEvent]:
    """Submit the prompts, and step until each has a token and none has all."""
    numbers = [engine.submit(prompt, SamplingParams(TOKENS, ignore_eos=True)) for prompt in PROMPTS]
    events: list[TokenEvent] = []
    while {event.request for event in events} < set(numbers):
        events += engine.step()
    expect(all(event.finish_reason is None for event in events), "a request ended before the others had begun")
    return events


def _tokens_of(events: list[TokenEvent]) -> list[list[int | None]]:
    """Of each request, in order. Raises DrillFailed where one ended with an error."""
    tokens: dict[int, list[int | None]] = {}
    for event in sorted(events, key=lambda event: event.request):
        expect(event.error is None, f"request {event.request}: {event.error}")
        tokens.setdefault(event.request, []).append(event.token)
    return list(tokens.values())


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
        print(f"the engine ended: {' '.join(str(engine.failure).split())[:300]}", file=sys.stderr)
        end_process(1)


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


def _in_killed_tenant(device: str, path: str, ready: str) -> None:
    engine = tenant_over(device, path, "victim")
    while True:
        engine.submit(PROMPTS[1], SamplingParams(100, ignore_eos=True))
        while engine.busy:
            engine.step()
            Path(ready).touch()


def _in_killed_broker(device: str, path: str, ready: str) -> None:
    from trtllm_vattn.tenancy.broker import Broker, open_exportable

    broker = Broker(open_exportable(device), LENT, Path(path))
    Path(ready).touch()
    broker.serve(os.eventfd(0))


CHILDREN: dict[str, Callable[..., None]] = {
    "sticky_error": _in_sticky_error,
    "full_disk": _in_full_disk,
    "fork": _in_fork,
    "exit_in_flight": _in_exit_in_flight,
    "sigterm": _in_sigterm,
    "killed_tenant": _in_killed_tenant,
    "killed_broker": _in_killed_broker,
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
    "killed-tenant": Drills.killed_tenant,
    "killed-broker": Drills.killed_broker,
    "clock-jumps": Drills.clock_jumps,
}
CODES = {
    **{"sticky-error": 1, "exit-in-flight": 3, "sigterm": -int(signal.SIGTERM)},
    **dict.fromkeys(("killed-tenant", "killed-broker"), -int(signal.SIGKILL)),
}
"""Exit codes of the processes that die."""
