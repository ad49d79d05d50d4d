"""`Ranks`: the processes of a tensor parallel engine, started here or by torchrun."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from trtllm_vattn.errors import ConfigError, RankLost, VattnError
from trtllm_vattn.runtime.parallel import group
from trtllm_vattn.runtime.parallel.build import Parts, Recipe
from trtllm_vattn.runtime.parallel.channel import GRACE_S, Follower, Leader
from trtllm_vattn.runtime.parallel.engine import FollowingEngine, LeadingEngine

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")
START_S = 300.0
"""That ranks may take to start."""
ADDRESS = "trtllm_vattn/channel"
END_S = 30.0
"""That a rank may take to end once it was told to."""


def size_of_torchrun() -> int:
    """How many ranks torchrun, or whatever else sets its variables, has started, of which this process is one; 1
    without it."""
    if not all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
        return 1
    return int(os.environ["WORLD_SIZE"])


def device_of(rank: int, size: int, device: str) -> torch.device:
    """The device of a rank on one host. Raises ConfigError where there are fewer GPUs than ranks."""
    if device == "cpu":
        return torch.device("cpu")
    there = torch.cuda.device_count()
    if there < size:
        raise ConfigError(f"tensor_parallel is {size}, and there are {there} GPUs; lower it, or use device='cpu'")
    return torch.device("cuda", rank)


class Ranks:
    """The processes of rank 1 and up, as rank 0 has them. One engine after another may be built on them.

    Made by `start` or `of_torchrun`; `close` ends them. Not thread-safe. A process has one at a time.
    """

    def __init__(self, leader: Leader, processes: Sequence[subprocess.Popen[bytes]], device: str) -> None:
        self.leader, self.device = leader, device
        self._processes = list(processes)
        self._has_engine = False

    @property
    def size(self) -> int:
        """How many ranks there are, with this process."""
        return self.leader.size

    @classmethod
    def start(cls, size: int, device: str, all_reduce: str = "nccl") -> Self:
        """Start `size` - 1 processes on this host, each with a GPU of its own, or on ``cpu``; this one is rank 0.
        `all_reduce` is one of `group.ALL_REDUCE`.

        Raises ConfigError where there are fewer GPUs, or this process has a process group already; RankLost where one
        of them does not start.
        """
        group.check_free()
        own = device_of(0, size, device)
        with ExitStack() as undo:
            store = dist.TCPStore("127.0.0.1", 0, size, True, wait_for_workers=False)  # type: ignore[attr-defined]
            listener = undo.enter_context(socket.create_server(("127.0.0.1", 0)))
            key, port = secrets.token_bytes(32), listener.getsockname()[1]
            processes: list[subprocess.Popen[bytes]] = []
            undo.callback(_end, processes, 0.0)
            for rank in range(1, size):
                command = [sys.executable, "-m", "trtllm_vattn.runtime.parallel.rank", str(rank), str(size), device]
                command += [str(store.port), str(port), all_reduce]
                process = subprocess.Popen(command, stdin=subprocess.PIPE)
                processes.append(process)
                assert process.stdin is not None
                process.stdin.write(key)
                process.stdin.close()
            connections = _accept(listener, key, size, processes)
            leader = Leader(connections, [f"rank {i + 1} (process {p.pid})" for i, p in enumerate(processes)])
            undo.callback(leader.close)
            with leader.call():
                group.join(0, size, own, store, all_reduce)
            made = cls(leader, processes, device)
            undo.pop_all()
            listener.close()
        return made

    @classmethod
    def of_torchrun(cls, size: int, device: str, all_reduce: str = "nccl") -> Self:
        """The ranks that torchrun has started. Rank 0 gets them; every other one serves here until rank 0 closes them,
        and leaves by SystemExit.

        Raises ConfigError where torchrun started another number.
        """
        started = size_of_torchrun()
        if started != size:
            raise ConfigError(f"tensor_parallel is {size}, and torchrun started {started} ranks; make them equal")
        rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        own = device_of(local, int(os.environ.get("LOCAL_WORLD_SIZE", size)), device)
        try:
            store, _, _ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        except ValueError as error:
            raise ConfigError(f"RANK is set, and ranks cannot meet: {error}; start them by torchrun") from error
        if rank:
            store.wait([ADDRESS])
            host, port, sent = store.get(ADDRESS).decode().split()
            serve(rank, size, own, store, connect(host, int(port), bytes.fromhex(sent), rank), all_reduce)
        host, key = os.environ["MASTER_ADDR"], secrets.token_bytes(32)
        with socket.create_server((host, 0)) as listener:
            store.set(ADDRESS, f"{host} {listener.getsockname()[1]} {key.hex()}")
            connections = _accept(listener, key, size, ())
        leader = Leader(connections, [f"rank {i + 1}" for i in range(size - 1)])
        with leader.call():
            group.join(0, size, own, store, all_reduce)
        return cls(leader, (), device)

    # -- what they do ----------------------------------------------------------------------------------------------

    def build(self, recipe: Recipe, closing: bool, **own: Any) -> LeadingEngine:
        """Build an engine on all ranks; rank 0's, which leads. With `closing`, closing it closes these ranks.

        `own` are parameters of `Engine` that rank 0 alone has. Raises what building raises on any rank.
        """
        leader = self.leader
        if self._has_engine:
            raise ConfigError("these ranks have an engine already; close it first, or start others")
        with leader.call():
            leader.ask("prepare", recipe)
            failed, parts = None, None
            try:
                parts = Parts(recipe, leads=True)
            except Exception as error:
                failed = error
            try:
                for rank, likeness in enumerate(leader.results(), 1):
                    if parts is not None and likeness != parts.likeness:
                        raise ConfigError(f"rank {rank} has another model: {likeness}, here {parts.likeness}")
            except VattnError as error:
                failed = failed or error
            if failed is not None:
                leader.ask("discard")
                leader.results()
                if parts is not None:
                    parts.cache.close()
                raise failed
            assert parts is not None
            with ExitStack() as undo:
                # Behind a failure here the others wait in a collective: they are of no use any more.
                undo.callback(self.close)
                leader.ask("build")
                engine: LeadingEngine = parts.engine(**own)
                undo.callback(engine.close)
                leader.results()
                engine.lead(leader, self.close if closing else self._release)
                self._has_engine = True
                if parts.sized_later:
                    leader.ask("memory_left")
                    left = min([parts.memory_left(), *leader.results()])
                    engine.cache.set_budget(left if recipe.budget is None else recipe.budget)
                undo.pop_all()
        engine.startup.load_s, engine.startup.budget_bytes = parts.load_s, engine.cache.budget_bytes
        return engine

    def _release(self) -> None:
        self._has_engine = False

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(engine, *arguments)`` on each rank but this one, by rank; `engine` is the rank's, or None. For
        what is looked at on other ranks: a module's function, and answers that can be pickled."""
        with self.leader.call():
            self.leader.ask("call", function, *arguments)
            return self.leader.results()

    def call_beside(self, own: Callable[[], T], function: Callable[..., Any], *arguments: Any) -> tuple[T, list[Any]]:
        """`call`, and ``own()`` here meanwhile; both answers."""
        with self.leader.call():
            self.leader.ask("call", function, *arguments)
            try:
                answer = own()
            except BaseException:
                # Theirs end with the connection that was between the two.
                with suppress(VattnError):
                    self.leader.results()
                raise
            return answer, self.leader.results()

    def close(self) -> None:
        """End the other ranks. Idempotent."""
        self.leader.dismiss()
        if self.leader.watch.lost is None:
            group.leave()
        else:
            # A group with a rank that has ended is not left by agreement.
            group.forget()
        self.leader.close()
        _end(self._processes, END_S)
        self._processes = []


def _accept(
    listener: socket.socket, key: bytes, size: int, processes: Sequence[subprocess.Popen[bytes]]
) -> list[Connection]:
    """The other ranks' connections, in order. Raises RankLost where a process ends before."""
    found: dict[int, Connection] = {}
    listener.settimeout(1.0)
    until = monotonic() + START_S
    while len(found) < size - 1:
        try:
            accepted, _ = listener.accept()
        except TimeoutError:
            ended = [(i + 1, code) for i, p in enumerate(processes) if (code := p.poll()) is not None]
            if ended:
                rank, code = ended[0]
                raise RankLost(rank, f"rank {rank} ended with code {code} before it had started") from None
            if monotonic() > until:
                missing = min(set(range(1, size)) - set(found))
                raise RankLost(missing, f"rank {missing} did not start within {START_S} s") from None
            continue
        connection = Connection(accepted.detach())
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
        found[connection.recv()] = connection
    return [found[rank] for rank in sorted(found)]


def connect(host: str, port: int, key: bytes, rank: int) -> Connection:
    """Connect to rank 0, which listens there."""
    connection: Connection = Client((host, port), authkey=key)
    connection.send(rank)
    return connection


def _end(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    for process in processes:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass
class Served:
    """What a rank but the first has."""

    follower: Follower
    parts: Parts | None = None
    engine: FollowingEngine | None = None

    def prepare(self, recipe: Recipe) -> dict[str, Any]:
        self.parts = Parts(recipe, leads=False)
        return self.parts.likeness

    def discard(self) -> None:
        if self.parts is not None:
            self.parts.cache.close()
        self.parts = None

    def build(self) -> None:
        assert self.parts is not None
        self.engine = self.parts.engine()

    def memory_left(self) -> int:
        assert self.parts is not None
        return self.parts.memory_left()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.engine, *arguments)

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine = self.parts = None


def serve(rank: int, size: int, device: torch.device, store: Any, connection: Connection, all_reduce: str) -> NoReturn:
    """Do what rank 0 says until it ends; then leave by SystemExit, of 1 where it ended without a word."""
    # Ctrl-C reaches all processes of a terminal; rank 0 decides what it means.
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    follower = Follower(connection)
    served = Served(follower)
    code: int | str = 0
    try:
        with follower.watch.call():
            group.join(rank, size, device, store, all_reduce)
            while (said := _serve_one(served)) is None:
                pass
            code = said
    except EOFError:
        code = "trtllm-vattn: rank 0 has ended; this rank ends, too"
    except RankLost as lost:
        code = f"trtllm-vattn: {lost}"
    except RuntimeError as error:
        # A collective failed though rank 0 is there: it knows who has ended.
        code = f"trtllm-vattn: {follower.parting(GRACE_S) or error}"
    follower.watch.end()
    with suppress(VattnError, RuntimeError):
        served.close()
    if code == 0:
        group.leave()
    follower.close()
    raise SystemExit(code)


def _serve_one(served: Served) -> int | str | None:
    """Make the calls of one message; what to end with once that was said."""
    asks, calls = served.follower.receive()
    name, arguments = calls[-1]
    own: dict[str, Callable[..., Any]] = {
        "prepare": served.prepare,
        "discard": served.discard,
        "build": served.build,
        "memory_left": served.memory_left,
        "call": served.call,
        "close": served.close,
    }
    if name == "end":
        (lost,) = arguments
        return f"trtllm-vattn: {lost}" if lost else 0
    if name not in own:
        assert served.engine is not None
        served.engine.follow(served.follower, asks, calls)
        return None
    if calls[:-1]:
        assert served.engine is not None
        served.engine.follow(served.follower, False, calls[:-1])
    error: Exception | None = None
    value = None
    try:
        value = own[name](*arguments)
    except Exception as raised:
        if name == "build" and not isinstance(raised, VattnError):
            # Others are in the middle of a collective.
            raise
        error = raised
    if asks:
        served.follower.answer(error, value, None)
    return None
