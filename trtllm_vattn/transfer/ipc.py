"""Between processes of one host: the sender maps the receiver's extents, and copies.

Memory made exportable is handed over as a file descriptor (cuMemExportToShareableHandle; on the host driver a memfd)
over a Unix socket, and mapped at addresses of the sender's own. It works on one GPU, between GPUs that reach each other
(NVLink, PCIe), and on the host driver.

A mapping in another process keeps memory alive, so it would outlive the extent. The two sides agree therefore: before
an extent is unmapped here, every process that has mapped it is told, and answers once it has not. A process that ends
closes its socket, which is as good an answer. One that does neither for `PATIENCE_S` makes the unmap fail, and the
cache keeps the extent aside (quarantine).

(UCX's CUDA IPC does the same where it was built with pidfd_getfd; the UCX in NIXL's wheels was not, and copies such
memory through TCP: openucx/ucx#11548.)
"""

from __future__ import annotations

import json
import logging
import os
import queue
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from trtllm_vattn.errors import DriverError, TransferFailed
from trtllm_vattn.transfer.pieces import Piece
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.tensors import copy_bytes, current_stream

logger = logging.getLogger(__name__)

PATIENCE_S = 30.0
"""That another process may take to unmap an extent."""
MOST_FDS = 200
"""Of one message; Linux takes 253."""
ENDED, DROPPED, WANTED, GIVEN = b"e", b"d", b"w", b"g"
_MESSAGE = 1 + 8 * MOST_FDS


def _pack(kind: bytes, numbers: Sequence[int]) -> bytes:
    return kind + struct.pack(f"{len(numbers)}q", *numbers)


def _unpack(message: bytes) -> tuple[bytes, tuple[int, ...]]:
    return message[:1], struct.unpack(f"{len(message) // 8}q", message[1:])


@dataclass
class _Registration:
    """An extent of this process; `number` names it to others."""

    number: int
    address: int
    size: int


@dataclass
class _Importer:
    """Another process that has mapped extents of this one."""

    there: socket.socket
    has: dict[int, threading.Event] = field(default_factory=dict)
    """By number of what it was given; set once it has unmapped it."""


class _Import:
    """An extent of another process, mapped here.

    Parameters
    ----------
    driver : Driver
    fd : int
    address, size : int
        There.
    """

    def __init__(self, driver: Driver, fd: int, address: int, size: int) -> None:
        self.address, self.size = address, size
        with ExitStack() as undo:
            self.here = driver.reserve(size)
            undo.callback(driver.free, self.here, size)
            handle = driver.import_fd(fd, size)
            undo.callback(driver.release, handle)
            driver.map(self.here, size, handle)
            undo.callback(driver.unmap, self.here, size)
            driver.set_access(self.here, size)
            undo.pop_all()
        self._left: list[tuple[Callable[..., None], tuple[int, ...]]] = [
            (driver.free, (self.here, size)),
            (driver.release, (handle,)),
            (driver.unmap, (self.here, size)),
        ]

    def close(self) -> None:
        """Unmap it. Raises DriverError; what was not done then is done by the next call."""
        while self._left:
            call, arguments = self._left[-1]
            call(*arguments)
            self._left.pop()


class _Exporter:
    """Another process whose extents this one maps.

    Its messages are taken by a thread, for an extent may end there at any time.
    """

    def __init__(self, name: str, driver: Driver) -> None:
        self._driver = driver
        self.there = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.there.settimeout(PATIENCE_S)
        self.there.connect(f"\0{name}")
        self.there.settimeout(None)
        self.mapped: dict[int, _Import] = {}
        self._kept: list[_Import] = []
        """Ended there, and not unmapped here for a failure."""
        self.in_use = threading.Lock()
        """Held while what is mapped is read or written, or changes."""
        self._given: queue.SimpleQueue[tuple[tuple[int, ...], list[int]] | None] = queue.SimpleQueue()
        self._ended: set[int] = set()
        self._thread = threading.Thread(target=self._listen, name="trtllm-vattn imports", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                message, fds, _, _ = socket.recv_fds(self.there, _MESSAGE, MOST_FDS, socket.MSG_CMSG_CLOEXEC)
                if not message:
                    break
                kind, numbers = _unpack(message)
                if kind == GIVEN:
                    self._given.put((numbers, fds))
                    continue
                # What stays mapped for a failure is not answered, and kept aside there.
                self.there.send(_pack(DROPPED, [number for number in numbers if self._drop(number)]))
        # Nobody there needs the memory any more, so nothing here may keep it.
        for number in list(self.mapped):
            self._drop(number)
        self._given.put(None)

    def _drop(self, number: int) -> bool:
        """Unmap what has ended there; whether that succeeded."""
        with self.in_use:
            found = self.mapped.pop(number, None)
            if found is None:
                # It was given, and is on its way to `fetch`.
                self._ended.add(number)
                return True
            self._kept.append(found)
            return self._close_kept()

    def _close_kept(self) -> bool:
        while self._kept:
            try:
                self._kept[-1].close()
            except DriverError as error:
                logger.warning("%d bytes of another process stay mapped: %s", self._kept[-1].size, error)
                return False
            self._kept.pop()
        return True

    def fetch(self, offered: dict[int, tuple[int, int]], timeout_s: float) -> None:
        """Map what was offered (number to address and size) and is not mapped yet. Raises TransferFailed."""
        missing = [number for number in offered if number not in self.mapped]
        for at in range(0, len(missing), MOST_FDS):
            some = missing[at : at + MOST_FDS]
            self.there.send(_pack(WANTED, some))
            try:
                answer = self._given.get(timeout=timeout_s)
            except queue.Empty:
                raise TransferFailed(f"the peer gave no memory for {timeout_s:g} s") from None
            if answer is None:
                raise TransferFailed("the peer has ended")
            given, fds = answer
            try:
                if given != tuple(some):
                    raise TransferFailed(f"the peer gave {len(given)} of {len(some)} extents that it had offered")
                with self.in_use:
                    for number, fd in zip(given, fds, strict=True):
                        if number in self._ended:
                            self._ended.discard(number)
                        else:
                            self.mapped[number] = _Import(self._driver, fd, *offered[number])
            finally:
                for fd in fds:
                    os.close(fd)

    def at(self, address: int, size: int) -> int:
        """Where bytes of the other process are mapped here. Raises TransferFailed where they are not any more."""
        for found in self.mapped.values():
            if found.address <= address and address + size <= found.address + found.size:
                return found.here + address - found.address
        raise TransferFailed(f"the peer has ended {size:,} bytes at {address:#x} that it had offered")

    def close(self) -> None:
        with suppress(OSError):
            self.there.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE_S)
        self.there.close()
        with self.in_use:
            self._close_kept()


class IpcLink:
    """Copies into the receiver's extents, which the sender maps; for two processes of one user on one host.

    Parameters
    ----------
    driver : Driver
        Of the device whose memory is sent or received; its memory is exportable.
    """

    name = "ipc"

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._lock = threading.Lock()
        self._offered: dict[int, _Registration] = {}
        self._next = 0
        self._importers: list[_Importer] = []
        self._exporters: dict[str, _Exporter] = {}
        self._address = f"trtllm-vattn-{os.getpid()}-{secrets.token_hex(16)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"\0{self._address}")
        self._listener.listen()
        self._thread = threading.Thread(target=self._accept, name="trtllm-vattn exports", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> dict[str, Any]:
        """Extents of other processes that are mapped here, and processes that have mapped some of this one's."""
        mapped = sum(len(exporter.mapped) for exporter in self._exporters.values())
        return {"imports": mapped, "importers": len(self._importers)}

    # -- the receiver's side ---------------------------------------------------------------------------------------

    def register(self, address: int, size: int) -> Any:
        with self._lock:
            self._next += 1
            return _Registration(self._next, address, size)

    def offer(self, registrations: Sequence[Any]) -> bytes:
        with self._lock:
            self._offered.update({each.number: each for each in registrations})
        regions = [(each.number, each.address, each.size) for each in registrations]
        return json.dumps((self._address, regions)).encode()

    def deregister(self, registration: Any) -> None:
        number = registration.number
        with self._lock:
            self._offered.pop(number, None)
            waited = [(importer, importer.has[number]) for importer in self._importers if number in importer.has]
        for importer, dropped in waited:
            with suppress(OSError):  # a process that has ended has dropped it
                importer.there.send(_pack(ENDED, [number]))
            if not dropped.wait(PATIENCE_S):
                raise TransferFailed(f"another process keeps {registration.size:,} bytes at {registration.address:#x}")

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                there, _ = self._listener.accept()
                _, user, _ = struct.unpack("3i", there.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
                if user != os.geteuid():
                    there.close()
                    continue
                importer = _Importer(there)
                with self._lock:
                    self._importers.append(importer)
                threading.Thread(target=self._serve, args=(importer,), name="trtllm-vattn export", daemon=True).start()

    def _serve(self, importer: _Importer) -> None:
        with suppress(OSError):
            while message := importer.there.recv(_MESSAGE):
                kind, numbers = _unpack(message)
                if kind == WANTED:
                    self._give(importer, numbers)
                    continue
                with self._lock:
                    for number in numbers:
                        importer.has.pop(number).set()
        with self._lock:
            self._importers.remove(importer)
            for dropped in importer.has.values():
                dropped.set()
        importer.there.close()

    def _give(self, importer: _Importer, numbers: Sequence[int]) -> None:
        fds: list[int] = []
        given: list[int] = []
        try:
            # Under the lock nothing of it is ended, and unmapped, meanwhile.
            with self._lock:
                for number in numbers:
                    found = self._offered.get(number)
                    if found is not None:
                        with suppress(DriverError):
                            fds.append(self._driver.export_fd(found.address, found.size))
                            given.append(number)
                            importer.has[number] = threading.Event()
            socket.send_fds(importer.there, [_pack(GIVEN, given)], fds)
        finally:
            for fd in fds:
                os.close(fd)

    # -- the sender's side -----------------------------------------------------------------------------------------

    def write(self, pieces: Sequence[Piece], offer: bytes, connection: Connection, timeout_s: float) -> None:
        name, regions = json.loads(offer)
        offered = {number: (address, size) for number, address, size in regions}
        driver = self._driver
        try:
            exporter = self._exporters.get(name)
            if exporter is None:
                exporter = self._exporters[name] = _Exporter(name, driver)
            exporter.fetch(offered, timeout_s)
            with exporter.in_use:
                for piece in pieces:
                    copy_bytes(driver.device, exporter.at(piece.target, piece.size), piece.source, piece.size)
                driver.record(current_stream(driver.device)).wait()
        except OSError as error:
            raise TransferFailed(f"the peer cannot be reached on this host: {error}") from error

    def take(self, pieces: Sequence[Piece], connection: Connection, timeout_s: float) -> None:
        """Nothing to do."""

    def close(self) -> None:
        for exporter in self._exporters.values():
            exporter.close()
        self._exporters.clear()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(PATIENCE_S)
        with self._lock:
            importers = list(self._importers)
        for importer in importers:
            with suppress(OSError):
                importer.there.shutdown(socket.SHUT_RDWR)
