"""What rank 0 tells the other ranks, and what they answer, over sockets of their own beside the process group.

Calls are collected and go out in one message with the launch that they belong to, so a step costs one message a rank
and waits for none. A rank that has ended is known by its closed socket, whatever this process is doing: a thread looks,
has collectives that wait for that rank give up, and ends the process where they do not.
"""

from __future__ import annotations

import logging
import os
import pickle
import select
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any, NoReturn

from trtllm_vattn import errors
from trtllm_vattn.cache.ranked import Report
from trtllm_vattn.errors import DriverError, RankLost, VattnError
from trtllm_vattn.runtime.parallel import group
from trtllm_vattn.transfer.connections import quick

logger = logging.getLogger(__name__)

ANSWER_S = 120.0
"""That an answer is waited for. Another rank may be capturing a graph."""
GRACE_S = 30.0
"""Between the end of another rank and this process's, where something still waits for that rank."""
LOOK_S = 5.0
"""That a failed collective waits to be told which rank has ended."""

Call = tuple[str, tuple[Any, ...]]


def told(error: Exception) -> tuple[str, tuple[Any, ...]]:
    """An error as a message of plain values."""
    if isinstance(error, DriverError):
        return "DriverError", (error.code, error.call, error.arguments)
    return type(error).__name__, (str(error),)


def retold(rank: int, message: tuple[str, tuple[Any, ...]]) -> VattnError:
    """The error that a rank told of, of the same type."""
    name, arguments = message
    if name == "DriverError":
        code, call, given = arguments
        return DriverError(code, call, given, f"on rank {rank}")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, VattnError) and kind is not RankLost:
        return kind(f"{arguments[0]} (on rank {rank})")
    return RankLost(rank, f"rank {rank} failed: {name}: {arguments[0]}")


class Watch:
    """Looks whether any of some connections was closed by its peer, in a thread, without reading from it.

    Parameters
    ----------
    names : dict of Connection to (int, str)
        The rank behind each connection, and how a message calls it.

    Attributes
    ----------
    lost : RankLost or None
        What is to be raised, once a rank has ended.
    """

    def __init__(self, names: dict[Connection, tuple[int, str]]) -> None:
        self.lost: RankLost | None = None
        self._noticed = threading.Event()
        self._busy = threading.Lock()
        """Held while this process is in a call that other ranks take part in."""
        self._names = {connection.fileno(): name for connection, name in names.items()}
        self._ends: tuple[int, ...] = os.pipe()
        self._read_end, self._write_end = self._ends
        self._thread = threading.Thread(target=self._look, name="trtllm-vattn ranks", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        poll = select.poll()
        poll.register(self._read_end, select.POLLIN)
        for number in self._names:
            poll.register(number, select.POLLRDHUP)
        events = dict(poll.poll())
        if self._read_end in events:
            return
        rank, name = self._names[next(iter(events))]
        self.note(RankLost(rank, f"{name} has ended; close this engine, and start another"))
        # A call that is over by itself releases the lock.
        if not self._busy.acquire(timeout=GRACE_S):
            print(f"trtllm-vattn: {self.lost}; this process waited for it, and ends", file=sys.stderr, flush=True)
            os._exit(1)
        self._busy.release()

    def note(self, lost: RankLost) -> None:
        """A rank is lost. The first one counts."""
        if self.lost is None:
            self.lost = lost
            logger.info("%s", lost)
        self._noticed.set()
        with suppress(RuntimeError):
            group.abort()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around what other ranks take part in: where it fails for one that has ended, that one is named (RankLost)."""
        if self.lost is not None:
            raise self.lost
        with self._busy:
            try:
                yield
            except VattnError:
                raise
            except (RuntimeError, OSError, EOFError) as error:
                if self._noticed.wait(LOOK_S) and self.lost is not None:
                    raise self.lost from error
                raise

    def end(self) -> None:
        """Stop looking. Idempotent."""
        if self._thread.is_alive():
            os.write(self._write_end, b".")
            self._thread.join(timeout=LOOK_S)
        for end in self._ends:
            with suppress(OSError):
                os.close(end)
        self._ends = ()


class Leader:
    """Rank 0's side. `cache.ranked.Peers`, and launches beside it.

    Parameters
    ----------
    connections : sequence of Connection
        To ranks 1, 2, …
    names : sequence of str
        How messages call them.
    """

    def __init__(self, connections: Sequence[Connection], names: Sequence[str]) -> None:
        self.size = 1 + len(connections)
        self._connections = [quick(connection) for connection in connections]
        self._names = list(names)
        self.watch = Watch({connection: (i + 1, names[i]) for i, connection in enumerate(self._connections)})
        self._noted: list[Call] = []
        self._asked: list[int] = []
        self._reports: dict[int, Report] = {}
        self._dismissed = False

    @contextmanager
    def call(self) -> Iterator[None]:
        """`Watch.call`; where a rank was lost, the others are told of it, and end."""
        try:
            with self.watch.call():
                yield
        except RankLost:
            self.dismiss()
            raise

    def dismiss(self) -> None:
        """Have the other ranks end, those that are left. Idempotent."""
        self.watch.end()
        lost = self.watch.lost
        message = pickle.dumps((False, [("end", (None if lost is None else str(lost),))]))
        for connection in self._connections:
            with suppress(OSError):
                if not connection.closed and not self._dismissed:
                    connection.send_bytes(message)
        self._dismissed = True

    @property
    def reports(self) -> Sequence[Report]:
        """The newest of each rank. Takes in what came meanwhile."""
        for rank, connection in enumerate(self._connections, 1):
            while not self._asked and self._there(rank, connection, 0.0):
                self._receive(rank, connection)
        return list(self._reports.values())

    def forget_reports(self, empty: Report) -> None:
        """Another cache begins, of which nothing is reported yet."""
        self._reports = dict.fromkeys(range(1, self.size), empty)

    def note(self, call: str, *arguments: Any) -> None:
        self._noted.append((call, arguments))

    def send(self) -> None:
        """Tell all other ranks of what was noted."""
        if self._noted:
            self._send(range(1, self.size), False)

    def ask(self, call: str, *arguments: Any, ranks: Sequence[int] | None = None) -> None:
        if ranks is not None:
            self.send()
        self._noted.append((call, arguments))
        self._asked = list(range(1, self.size) if ranks is None else ranks)
        self._send(self._asked, True)

    def _send(self, ranks: Sequence[int], asks: bool) -> None:
        message = pickle.dumps((asks, self._noted), pickle.HIGHEST_PROTOCOL)
        self._noted = []
        for rank in ranks:
            try:
                self._connections[rank - 1].send_bytes(message)
            except OSError as error:
                self._lose(rank, "has ended", error)

    def answers(self) -> dict[int, VattnError | None]:
        found = {}
        for rank in self._asked:
            answer = self._answer(rank)
            found[rank] = None if answer[0] is None else retold(rank, answer[0])
            if isinstance(found[rank], RankLost):
                self._lose(rank, str(found[rank]), None)
        self._asked = []
        return found

    def results(self) -> list[Any]:
        """What the call that was asked gave on each of the other ranks. Raises the first error of one."""
        values = []
        failed: VattnError | None = None
        for rank in self._asked:
            error, value = self._answer(rank)
            failed = failed or (None if error is None else retold(rank, error))
            values.append(value)
        self._asked = []
        if failed is not None:
            raise failed
        return values

    def _answer(self, rank: int) -> tuple[Any, Any]:
        connection = self._connections[rank - 1]
        while True:
            if not self._there(rank, connection, ANSWER_S):
                self._lose(rank, f"did not answer within {ANSWER_S:.0f} s", None)
            answer = self._receive(rank, connection)
            if answer is not None:
                return answer

    def _there(self, rank: int, connection: Connection, seconds: float) -> bool:
        try:
            return connection.poll(seconds)
        except OSError as error:
            self._lose(rank, "has ended", error)

    def _receive(self, rank: int, connection: Connection) -> tuple[Any, Any] | None:
        """One message of a rank: its answer, or None for a report alone."""
        try:
            report, answer = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError) as error:
            self._lose(rank, "has ended", error)
        if report is not None:
            self._reports[rank] = report
        given: tuple[Any, Any] | None = answer
        return given

    def broke(self, rank: int, error: VattnError) -> NoReturn:
        self._lose(rank, f"could not undo a call: {error}", error)

    def _lose(self, rank: int, what: str, error: BaseException | None) -> NoReturn:
        self.watch.note(RankLost(rank, f"{self._names[rank - 1]} {what}; close this engine, and start another"))
        assert self.watch.lost is not None
        raise self.watch.lost from error

    def close(self) -> None:
        """`dismiss`, and close the connections. Idempotent."""
        self.dismiss()
        for connection in self._connections:
            connection.close()


class Follower:
    """Another rank's side: takes calls, and answers those that ask."""

    def __init__(self, connection: Connection) -> None:
        self._connection = quick(connection)
        self.watch = Watch({connection: (0, "rank 0")})

    def receive(self) -> tuple[bool, list[Call]]:
        """The next calls, in order, and whether the last one is to be answered. Raises EOFError where rank 0 ended."""
        try:
            asks, calls = pickle.loads(self._connection.recv_bytes())
        except OSError as error:
            raise EOFError from error
        return asks, calls

    def parting(self, seconds: float) -> str | None:
        """Why rank 0 ends all of it, if it says so within so many seconds."""
        until = monotonic() + seconds
        with suppress(EOFError, OSError):
            while self._connection.poll(max(0.0, until - monotonic())):
                _, calls = self.receive()
                if calls[-1][0] == "end":
                    said: str | None = calls[-1][1][0]
                    return said
        return None if self.watch.lost is None else str(self.watch.lost)

    def report(self, report: Report) -> None:
        """Say how far the cache is backed."""
        self._send((report, None))

    def answer(self, error: Exception | None, value: Any, report: Report | None) -> None:
        """Answer the call that asked."""
        self._send((report, (None if error is None else told(error), value)))

    def _send(self, message: tuple[Any, Any]) -> None:
        with suppress(OSError):  # that rank 0 has ended is known by the next `receive`
            self._connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def close(self) -> None:
        self.watch.end()
        self._connection.close()
