"""Tenants that look at every byte they are lent: for tests, and `bench tenancy`.

Imports nothing of torch, so that many such processes start quickly.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from trtllm_vattn.errors import DriverError
from trtllm_vattn.tenancy import protocol as say
from trtllm_vattn.tenancy.broker import Broker
from trtllm_vattn.tenancy.broker import Connection as ClientConnection
from trtllm_vattn.tenancy.config import TenantConfig
from trtllm_vattn.tenancy.tenant import BrokerDriver, open_tenant
from trtllm_vattn.vmm.base import Driver

WORD = 8
WAIT_S = 20.0
"""Seconds that a tenant waits for its first extent."""


@contextmanager
def lending(driver: Driver, memory: int, path: Path, **options: Any) -> Iterator[Broker]:
    """A `Broker` that answers in a thread of this process until the end."""
    broker = Broker(driver, memory, path, **options)
    stop = os.eventfd(0, os.EFD_CLOEXEC)
    thread = threading.Thread(target=broker.serve, args=(stop,), daemon=True)
    thread.start()
    try:
        yield broker
    finally:
        os.eventfd_write(stop, 1)
        thread.join()
        broker.close()
        os.close(stop)


@dataclass
class _Lent:
    address: int
    size: int
    handle: int
    pattern: int


class PatternedTenant:
    """Borrows extents, reads every word of each, writes words of its own, and reads those again before it gives the
    extent back.

    Attributes
    ----------
    counts : Counter
        ``handovers`` (extents borrowed), ``foreign_bytes`` (that were not zero when they came), ``lost_bytes`` (that
        were not what it had written), ``refused``, and ``passed`` (times that it held more than its ceiling).
    """

    def __init__(self, config: TenantConfig, seed: int, extents: int = 64, device: str = "cpu") -> None:
        self.driver: BrokerDriver = open_tenant(config, device)
        self.tenant = self.driver.tenant
        self.granularity = self.driver.granularity()
        self.counts: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._stride = 4 * self.granularity
        self._base = self.driver.reserve(extents * self._stride)
        self._places = [self._base + index * self._stride for index in range(extents)]
        self._size = extents * self._stride
        self._held: list[_Lent] = []

    @property
    def held_bytes(self) -> int:
        """Bytes that it has borrowed."""
        return sum(lent.size for lent in self._held)

    def _differing(self, lent: _Lent, pattern: int) -> int:
        """Bytes, in words, of an extent that are not those of a pattern."""
        return WORD * int((self._words(lent) != pattern).sum())

    def _fill(self, lent: _Lent) -> None:
        self._words(lent)[:] = lent.pattern

    def _words(self, lent: _Lent) -> Any:
        if self.driver.device == "cpu":
            return np.frombuffer(memoryview((ctypes.c_char * lent.size).from_address(lent.address)), np.int64)
        # With torch, which takes seconds to import.
        import torch

        from trtllm_vattn.vmm.tensors import tensor_at

        return tensor_at(lent.address, lent.size, self.driver.device).view(torch.int64)

    def _finish(self) -> None:
        """Nothing on the device uses the memory any more."""
        if self.driver.device != "cpu":
            self.driver.record(0).wait()

    def borrow(self) -> bool:
        """Borrow an extent and look at it; False where there is none for it."""
        if not self._places:
            return False
        size = self._random.randint(1, 4) * self.granularity
        try:
            handle = self.driver.create(size)
        except DriverError:
            self.counts["refused"] += 1
            return False
        lent = _Lent(self._places.pop(), size, handle, self._random.getrandbits(63) | 1)
        self.driver.map(lent.address, size, handle)
        self.driver.set_access(lent.address, size)
        self.counts["handovers"] += 1
        self.counts["foreign_bytes"] += self._differing(lent, 0)
        self._fill(lent)
        self._held.append(lent)
        self.counts["passed"] += self.held_bytes > self.tenant.ceiling
        return True

    def look(self) -> None:
        """Read all that it holds again."""
        for lent in self._held:
            self.counts["lost_bytes"] += self._differing(lent, lent.pattern)

    def give_back(self, index: int = -1) -> None:
        """Give an extent back."""
        lent = self._held.pop(index)
        self.counts["lost_bytes"] += self._differing(lent, lent.pattern)
        self._finish()
        self.driver.unmap(lent.address, lent.size)
        self.driver.release(lent.handle)
        self._places.append(lent.address)

    def turn(self) -> None:
        """Give back what is owed, and borrow or give back something."""
        held = self.held_bytes
        self.tenant.report(held // 2, self.tenant.ceiling)
        while self._held and self.held_bytes > self.tenant.budget:
            self.give_back(0)
        if not self._held or (self._random.random() < 0.5 and self.borrow()):
            if not self._held and not self.borrow():
                time.sleep(0.001)
            return
        self.give_back(self._random.randrange(len(self._held)))

    def close(self) -> None:
        """Give everything back, and hang up."""
        while self._held:
            self.give_back()
        self.driver.free(self._base, self._size)
        self.tenant.close()


# -- messages ----------------------------------------------------------------------------------------------------------

MESSAGES: list[say.Message] = [
    say.Hello(say.VERSION, "one", device="cpu", keep_s=1.0),
    say.Create(4096),
    say.Release(1),
    say.Fetch(1),
    say.Leases(0),
    say.MakeJournal(1 << 16),
    say.Leave(),
    say.Need(0),
    say.Report(),
    say.Status(),
    say.SetLimits("one"),
    say.SetAsleep("one", True),
]


def garbled(rng: random.Random) -> bytes:
    """A message to a broker with something wrong in it, or nothing, or nothing but noise."""
    packet = bytearray(say.encode(rng.choice(MESSAGES)))
    for _ in range(rng.randint(0, 4)):
        what, at = rng.randrange(4), rng.randrange(len(packet) + 1)
        if what == 0:
            packet[at : at + 1] = rng.randbytes(rng.randrange(3))
        elif what == 1:
            del packet[at:]
        elif what == 2:
            packet[at:at] = rng.randbytes(rng.randrange(20))
        else:
            wrong: dict[str, object] = {"type": rng.choice(["create", "hello", "release", "limits", "need"])}
            name = rng.choice(["size", "name", "lease", "version", "floor", "more"])
            wrong[name] = rng.choice([-1, (1 << 64) - 1, "x" * 300, None, [[]], 1.5, True, 4097, "\0"])
            packet = bytearray(msgspec.msgpack.encode(wrong))
    return bytes(packet)


class Strangers:
    """Connections that send a broker garbled messages, within its own process."""

    def __init__(self, broker: Broker, seed: int) -> None:
        self._broker, self._random = broker, random.Random(seed)
        self.messages = self.refused = 0

    def send(self, messages: int) -> None:
        """Send so many, over connections of one or two messages each; who became a tenant ends."""
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with mine, theirs:
            end = self.messages + messages
            while self.messages < end:
                connection = ClientConnection(theirs, os.getpid(), os.getuid())
                for _ in range(self._random.randint(1, 2)):
                    answer, beside = self._broker.handle(connection, garbled(self._random))
                    self.messages += 1
                    self.refused += isinstance(answer, say.Refused)
                    if isinstance(answer, say.Lent):
                        say.close_all(beside)
                if connection.tenant is not None:
                    self._broker.bury(connection.tenant)


# -- processes ---------------------------------------------------------------------------------------------------------


def serve_tenant(config: TenantConfig, seed: int, manner: str, device: str, pipe: Connection) -> None:
    """A tenant's process: takes turns until it is told to end, and sends its counts. `manner`: ``honest``; ``hung``
    borrows and then does nothing more; ``lying`` says that it gave back what it goes on holding; ``beside`` allocates
    what the broker did not lend."""
    made = PatternedTenant(config, seed, device=device)
    made.tenant.report(0, made.tenant.ceiling)
    with made.tenant.waiting(WAIT_S):
        made.borrow()
    while made.held_bytes < made.tenant.budget // 2 and made.borrow():
        pass
    if manner == "lying":
        for lease in list(made.driver.leases.values()):
            made.tenant.release(*lease)
    elif manner == "beside":
        made.driver.inner.create(16 * made.granularity)
    pipe.send(os.getpid())
    while True:
        if pipe.poll(0.02 if manner != "honest" else 0):
            if pipe.recv() == "end":
                break
            pipe.send(made.counts["handovers"])
        if manner == "honest":
            made.turn()
    made.look()
    if manner in ("honest", "hung"):
        made.close()
    pipe.send(dict(made.counts))


class TenantProcess:
    """A process of `serve_tenant`."""

    def __init__(self, config: TenantConfig, seed: int = 0, manner: str = "honest", device: str = "cpu") -> None:
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *(["torch"] if device != "cpu" else [])])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve_tenant, args=(config, seed, manner, device, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def wait_ready(self, timeout_s: float = 60.0) -> int:
        """Its process's number, once it holds what it borrows first. Raises TimeoutError."""
        if not self.pipe.poll(timeout_s):
            raise TimeoutError(f"a tenant did not begin within {timeout_s:g} s")
        pid: int = self.pipe.recv()
        return pid

    def progress(self, timeout_s: float = 60.0) -> int:
        """Extents that it has borrowed so far. Raises TimeoutError."""
        self.pipe.send("progress")
        if not self.pipe.poll(timeout_s):
            raise TimeoutError(f"a tenant did not answer within {timeout_s:g} s")
        handovers: int = self.pipe.recv()
        return handovers

    def kill(self) -> None:
        """End it where it is (SIGKILL)."""
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def end(self, timeout_s: float = 60.0) -> Counter[str]:
        """Have it give everything back; its counts. Raises TimeoutError."""
        self.pipe.send("end")
        if not self.pipe.poll(timeout_s):
            raise TimeoutError(f"a tenant did not end within {timeout_s:g} s")
        counts = Counter(self.pipe.recv())
        self.process.join()
        self.pipe.close()
        return counts
