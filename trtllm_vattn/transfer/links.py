"""How bytes get from one process to another: by NIXL, which writes into the other's memory, or over the connection.

All links push: the sender writes, for reading was reported a hundred times slower than writing on one node.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from time import monotonic, sleep
from typing import Any, Protocol

import torch.distributed as dist

from trtllm_vattn.errors import ConfigError, TransferFailed
from trtllm_vattn.transfer.ipc import IpcLink
from trtllm_vattn.transfer.pieces import Piece
from trtllm_vattn.transfer.ucx import check_ucx, installed_ucx, nixl_installed
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.tensors import current_stream, finish, tensor_at

CHUNK = 8 << 20
"""Bytes of one message of a `HostLink`."""


class Link(Protocol):
    """Moves bytes; also a `registrations.Registrar`."""

    name: str

    @property
    def stats(self) -> dict[str, Any]:
        """What it runs with, by name."""

    def register(self, address: int, size: int) -> Any: ...

    def deregister(self, registration: Any) -> None: ...

    def offer(self, registrations: Sequence[Any]) -> bytes:
        """What a peer needs to write into registered memory, for one transfer."""

    def write(self, pieces: Sequence[Piece], offer: bytes, connection: Connection, timeout_s: float) -> None:
        """Write to the peer, and return once it is there. Raises TransferFailed."""

    def take(self, pieces: Sequence[Piece], connection: Connection, timeout_s: float) -> None:
        """The peer's part in `write`: to be called with the same pieces while it writes."""

    def close(self) -> None:
        """Give everything back. Idempotent."""


class NixlLink:
    """NIXL over UCX: the sender writes into the receiver's extents, which does nothing meanwhile.

    Parameters
    ----------
    device : str
        Whose memory is registered.

    Attributes
    ----------
    ucx : Ucx
        The versions that it runs with.

    Raises
    ------
    ConfigError
        NIXL is not installed, or its UCX would keep memory of the device (ucx.py).
    """

    name = "nixl"

    def __init__(self, device: str) -> None:
        self.ucx = installed_ucx()
        check_ucx(self.ucx, device)
        # A registration that is ended must not live on in a cache of UCX's.
        os.environ.setdefault("UCX_RCACHE_ENABLE", "n")
        from nixl_cu13._api import nixl_agent, nixl_agent_config

        kind, _, index = device.partition(":")
        self._memory, self._index = ("DRAM", 0) if kind == "cpu" else ("VRAM", int(index or 0))
        self._agent: Any = nixl_agent(f"{os.uname().nodename}-{os.getpid()}-{id(self)}", nixl_agent_config())
        self._lock = threading.Lock()
        self._ended = 0
        """Registrations that were ended here."""
        self._known: dict[str, int] = {}
        """What a peer had ended when it was last asked, by its name."""

    @property
    def stats(self) -> dict[str, Any]:
        """Versions of NIXL and UCX; registrations that were ended."""
        return {**self.ucx.as_dict(), "deregistrations": self._ended}

    def register(self, address: int, size: int) -> Any:
        with self._lock:
            return address, size, self._agent.register_memory([(address, size, self._index, "")], self._memory)

    def deregister(self, registration: Any) -> None:
        with self._lock:
            self._ended += 1
            self._agent.deregister_memory(registration[2])

    def offer(self, registrations: Sequence[Any]) -> bytes:
        with self._lock:
            regions = [(address, size, self._index, "") for address, size, _ in registrations]
            listed = self._agent.get_reg_descs(regions, self._memory)
            metadata: bytes = self._agent.get_partial_agent_metadata(listed, inc_conn_info=True)
            return pickle.dumps((metadata, self._memory, self._index, self._ended))

    def write(self, pieces: Sequence[Piece], offer: bytes, connection: Connection, timeout_s: float) -> None:
        metadata, memory, index, ended = pickle.loads(offer)
        agent = self._agent
        with self._lock:
            peer = self._meet(metadata, ended)
            handle = None
            try:
                sources = agent.get_xfer_descs([(p.source, p.size, self._index) for p in pieces], self._memory)
                targets = agent.get_xfer_descs([(p.target, p.size, index) for p in pieces], memory)
                handle = agent.initialize_xfer("WRITE", sources, targets, peer)
                state, until = agent.transfer(handle), monotonic() + timeout_s
                while state == "PROC" and monotonic() < until and not connection.poll(0):
                    sleep(20e-6)
                    state = agent.check_xfer_state(handle)
                if state != "DONE":
                    raise TransferFailed(f"writing {sum(p.size for p in pieces):,} bytes to {peer} ended as {state}")
            finally:
                if handle is not None:
                    with suppress(Exception):
                        agent.release_xfer_handle(handle)

    def _meet(self, metadata: bytes, ended: int) -> str:
        """A peer by the name that the agent has for it, with the registrations that it offers.

        Where it has ended any since the last time, all that is known of it is forgotten first: an address may be
        registered anew, and what was known of it reaches pages that are somebody else's.
        """
        agent = self._agent
        name: Any = agent.add_remote_agent(metadata)
        peer = str(name.decode() if isinstance(name, bytes) else name)
        if self._known.get(peer, ended) != ended:
            agent.remove_remote_agent(peer)
            agent.add_remote_agent(metadata)
        self._known[peer] = ended
        return peer

    def take(self, pieces: Sequence[Piece], connection: Connection, timeout_s: float) -> None:
        """Nothing to do."""

    def close(self) -> None:
        self._agent = None


class _Unregistered:
    """What a link that registers nothing says to it."""

    @property
    def stats(self) -> dict[str, Any]:
        return {}

    def register(self, address: int, size: int) -> Any:
        return None

    def deregister(self, registration: Any) -> None:
        """Nothing to do."""

    def offer(self, registrations: Sequence[Any]) -> bytes:
        return b""


class HostLink(_Unregistered):
    """Through pinned host memory and the connection between the two: works everywhere, and registers nothing.

    Parameters
    ----------
    driver : Driver
        Copies between its device and host memory.
    """

    name = "host"

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._host = driver.create_host(CHUNK)
        self._view = _view_of(self._host, CHUNK)

    def write(self, pieces: Sequence[Piece], offer: bytes, connection: Connection, timeout_s: float) -> None:
        stream = current_stream(self._driver.device)
        try:
            for piece in pieces:
                for at in range(0, piece.size, CHUNK):
                    size = min(CHUNK, piece.size - at)
                    self._driver.copy_to_host(self._host, piece.source + at, size, stream)
                    self._driver.record(stream).wait()
                    connection.send_bytes(self._view, 0, size)
        except OSError as error:
            raise TransferFailed(f"the peer has ended: {error}") from error

    def take(self, pieces: Sequence[Piece], connection: Connection, timeout_s: float) -> None:
        stream = current_stream(self._driver.device)
        for piece in pieces:
            for at in range(0, piece.size, CHUNK):
                if not connection.poll(timeout_s):
                    raise TransferFailed(f"nothing came for {timeout_s:g} s")
                size = connection.recv_bytes_into(self._view)
                self._driver.copy_to_device(piece.target + at, self._host, size, stream)
                self._driver.record(stream).wait()

    def close(self) -> None:
        if self._host:
            self._driver.release_host(self._host, CHUNK)
        self._host = 0


class GroupLink(_Unregistered):
    """Through torch.distributed: NCCL between GPUs, which copies through buffers of its own and registers nothing that
    is remapped; gloo on the host. Both sides are in one process group.

    Parameters
    ----------
    device : str
    peer : int
        The other side's rank.
    """

    name = "group"

    def __init__(self, device: str, peer: int) -> None:
        self._device, self._peer = device, peer

    def write(self, pieces: Sequence[Piece], offer: bytes, connection: Connection, timeout_s: float) -> None:
        self._move(dist.isend, [(piece.source, piece.size) for piece in pieces])

    def take(self, pieces: Sequence[Piece], connection: Connection, timeout_s: float) -> None:
        self._move(dist.irecv, [(piece.target, piece.size) for piece in pieces])

    def _move(self, how: Any, places: list[tuple[int, int]]) -> None:
        tensors = [tensor_at(address, size, self._device) for address, size in places]
        for work in dist.batch_isend_irecv([dist.P2POp(how, tensor, self._peer) for tensor in tensors]):
            work.wait()
        finish(self._device)

    def close(self) -> None:
        """Nothing to do."""


def _view_of(address: int, size: int) -> memoryview:
    import ctypes

    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def open_link(name: str, driver: Driver) -> Link:
    """A link by name: ``nixl``, ``ipc`` (both processes on one host), ``host``, or ``auto``, which is nixl where it is
    installed."""
    if name == "auto":
        name = "nixl" if nixl_installed() else "host"
    if name == "nixl":
        return NixlLink(driver.device)
    if name == "ipc":
        return IpcLink(driver)
    if name == "host":
        return HostLink(driver)
    raise ConfigError(f"no link {name!r}; there are auto, nixl, ipc and host")
