"""Sequences from one cache to another: bytes, registrations that follow the memory, and peers that fail or end."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch

from trtllm_vattn.cache.base import CacheShape, ExtentPlace
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import ConfigError, DriverError, KVCacheOutOfMemory, TransferFailed
from trtllm_vattn.transfer import HostLink, IpcLink, Peer, RegisteringDriver, open_link
from trtllm_vattn.transfer.pieces import Piece
from trtllm_vattn.transfer.sequences import pieces_of
from trtllm_vattn.transfer.ucx import Ucx, check_ucx
from trtllm_vattn.vmm.cuda import CudaDriver
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.tensors import tensor_at
from trtllm_vattn.vmm.wrappers import FaultyDriver

SHAPE = CacheShape(num_layers=4, num_kv_heads=2, head_dim=16, dtype=torch.float32, num_slots=3, max_seq_len=512)


@dataclass
class PinnedLink:
    """Writes to the physical pages of the time of registration, as a network card does."""

    driver: HostDriver
    name: str = "pinned"
    registered: dict[int, mmap.mmap] = field(default_factory=dict)
    fails: str = ""

    def register(self, address: int, size: int) -> int:
        home = self.driver._find_range("register", address, size)
        mapped, handle = home.mapped[address]
        assert mapped == size, "a registration is of one mapping, whole"
        self.registered[address] = mmap.mmap(self.driver._handles[handle].fd, size)
        return address

    def deregister(self, registration: int) -> None:
        self.registered.pop(registration)

    def offer(self, registrations: Sequence[int]) -> bytes:
        return b""

    def at(self, address: int, size: int) -> memoryview:
        """Registered pages."""
        start = max(base for base in self.registered if base <= address)
        return memoryview(self.registered[start])[address - start : address - start + size]

    def write(self, pieces: Sequence[Piece], offer: bytes, connection: Connection, timeout_s: float) -> None:
        if self.fails:
            raise TransferFailed(self.fails)
        for piece in pieces:
            PEERS[self].at(piece.target, piece.size)[:] = self.at(piece.source, piece.size)

    def take(self, pieces: Sequence[Piece], connection: Connection, timeout_s: float) -> None: ...

    def close(self) -> None: ...

    __hash__ = object.__hash__


PEERS: dict[PinnedLink, PinnedLink] = {}


@dataclass
class Side:
    """One process's half."""

    host: HostDriver
    faulty: FaultyDriver
    driver: RegisteringDriver
    link: Any
    cache: KVCacheManager
    peer: Peer

    def fill(self, sequence: str, tokens: int, seed: int) -> np.ndarray:
        """Admit a sequence of random bytes; returns them, a row a token."""
        slot = self.cache.admit(sequence, tokens)
        rows = np.random.default_rng(seed).standard_normal((tokens, 4, 2, 2, 16)).astype(np.float32)
        for layer in range(4):
            flat = self.cache.layer(layer)
            flat.k[slot, :tokens] = torch.from_numpy(rows[:, layer, 0])
            flat.v[slot, :tokens] = torch.from_numpy(rows[:, layer, 1])
        return rows

    def rows(self, slot: int, tokens: int) -> np.ndarray:
        layers = [self.cache.layer(layer) for layer in range(4)]
        return np.stack([np.stack([flat.k[slot, :tokens], flat.v[slot, :tokens]], 1) for flat in layers], 1)


Pair = tuple[Side, Side]


def side_of(link: Callable[[Any], Any], connection: Connection, **config: Any) -> Side:
    host = HostDriver()
    faulty = FaultyDriver(host)
    made = link(faulty if link is IpcLink else host)
    driver = RegisteringDriver(faulty, made)
    cache = KVCacheManager(SHAPE, driver, "2MiB", config=CacheConfig(layers_per_range=2, lookahead=0, **config))
    return Side(host, faulty, driver, made, cache, Peer(cache, driver, made, connection, patience_s=5.0))


def pair_of(link: Callable[[Any], Any], **config: Any) -> Iterator[Pair]:
    here, there = Pipe()
    sides = side_of(link, here), side_of(link, there, **config)
    if link is PinnedLink:
        PEERS.update({sides[0].link: sides[1].link, sides[1].link: sides[0].link})
    yield sides
    for side in sides:
        side.peer._connection.close()
        side.cache.close()
        side.link.close()
        assert side.driver.made == side.driver.ended
        assert (side.host.live_mappings, side.host.live_handles, side.host.live_host_bytes) == (0, 0, 0)
        side.host.close()
    PEERS.clear()


@pytest.fixture(params=[PinnedLink, HostLink, IpcLink], ids=["pinned", "host", "ipc"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A sender and a receiver."""
    yield from pair_of(request.param)


@pytest.fixture
def pinned() -> Iterator[Pair]:
    """The same, over a link that writes to registered pages."""
    yield from pair_of(PinnedLink)


@pytest.fixture(params=[PinnedLink, IpcLink], ids=["pinned", "ipc"])
def registering(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """The same, over links that write by registrations."""
    yield from pair_of(request.param)


@pytest.fixture
def mapped() -> Iterator[Pair]:
    """The same, over a link whose sender maps the receiver's extents."""
    yield from pair_of(IpcLink)


def reconnect(pair: Pair) -> None:
    """Another connection, after a transfer that failed."""
    for side, connection in zip(pair, Pipe(), strict=True):
        side.peer._connection.close()
        side.peer = Peer(side.cache, side.driver, side.link, connection, patience_s=5.0)


def transfer(pair: Pair, sequence: str, into: str) -> Any:
    """Both halves at once; raises what the sender's raises, and else what the receiver's does."""
    sender, receiver = pair
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(receiver.peer.receive, into)
        try:
            sent = sender.peer.send(sequence)
        except BaseException:
            received.exception()
            raise
        return sent, received.result()


def test_a_sequence_arrives_at_the_receivers_own_addresses(pair: Pair) -> None:
    sender, receiver = pair
    receiver.cache.admit("other", 10)
    rows = sender.fill("a", 200, 1)
    sent, received = transfer(pair, "a", "b")
    assert np.array_equal(receiver.rows(received.slot, 200), rows)
    assert receiver.cache.slot_of("b") == received.slot != sender.cache.slot_of("a")
    assert sent.descriptors == sent.extents == received.extents
    assert sent.nbytes == rows.nbytes
    receiver.cache.prepare_step(np.array([10, 201, 0]))


def test_registrations_follow_the_memory_beneath_remapping(pair: Pair) -> None:
    sender, receiver = pair
    random = np.random.default_rng(3)
    for turn in range(40):
        tokens = int(random.integers(1, 400))
        rows = sender.fill("a", tokens, turn)
        _, received = transfer(pair, "a", "b")
        assert np.array_equal(receiver.rows(received.slot, tokens), rows), turn
        for side, name in ((sender, "a"), (receiver, "b")):
            side.cache.release(name)
            if random.random() < 0.5:
                side.cache.release_free_memory()
                assert side.driver.made == side.driver.ended
    assert receiver.driver.ended


def test_a_registration_that_stays_would_show_stale_bytes(registering: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same life, with registrations that are kept beyond their mappings."""
    sender, receiver = registering
    monkeypatch.setattr(receiver.driver, "_call", lambda name, *arguments: getattr(receiver.faulty, name)(*arguments))
    wrong = []
    for turn in range(2):
        rows = sender.fill("a", 100, turn)
        _, received = transfer(registering, "a", "b")
        wrong.append(not np.array_equal(receiver.rows(received.slot, 100), rows))
        receiver.cache.release("b")
        sender.cache.release("a")
        receiver.cache.release_free_memory()
    monkeypatch.undo()
    receiver.driver.deregister(0, 1 << 62)
    assert wrong == [False, True]


def test_what_cannot_be_deregistered_is_not_unmapped(pinned: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receiver = pinned
    sender.fill("a", 100, 1)
    transfer(pinned, "a", "b")
    receiver.cache.release("b")

    def refuse(registration: int) -> None:
        raise OSError("busy")

    monkeypatch.setattr(receiver.link, "deregister", refuse)
    mapped = receiver.host.live_mappings
    receiver.cache.release_free_memory()
    assert receiver.host.live_mappings == mapped
    assert receiver.cache.stats().quarantined
    monkeypatch.undo()


def test_memory_that_is_unmapped_is_mapped_by_no_sender(mapped: Pair) -> None:
    sender, receiver = mapped
    sender.fill("a", 300, 1)
    transfer(mapped, "a", "b")
    assert sender.link.stats["imports"] == len(receiver.cache.extents("b"))
    assert receiver.link.stats["importers"] == 1
    receiver.cache.release("b")
    receiver.cache.release_free_memory()
    assert sender.link.stats["imports"] == 0
    assert not receiver.cache.stats().quarantined


def test_memory_that_a_sender_keeps_is_kept_aside(mapped: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receiver = mapped
    sender.fill("a", 100, 1)
    transfer(mapped, "a", "b")
    receiver.cache.release("b")
    monkeypatch.setattr("trtllm_vattn.transfer.ipc.PATIENCE_S", 0.05)
    sender.faulty.fail("unmap")
    receiver.cache.release_free_memory()
    assert receiver.cache.stats().quarantined
    # The rest is on its way; a process that ends has unmapped everything.
    sender.link.close()
    receiver.cache.check_integrity()


def test_a_sender_that_ends_keeps_nothing(mapped: Pair) -> None:
    sender, receiver = mapped
    sender.fill("a", 100, 1)
    transfer(mapped, "a", "b")
    receiver.cache.release("b")
    sender.link.close()
    receiver.cache.release_free_memory()
    assert not receiver.cache.stats().quarantined


def test_what_a_sender_cannot_map_fails_the_transfer_alone(mapped: Pair) -> None:
    sender, receiver = mapped
    rows = sender.fill("a", 100, 1)
    for side, call, error in (
        (sender, "import_fd", DriverError),
        (sender, "map", DriverError),
        (sender, "set_access", DriverError),
        (receiver, "export_fd", TransferFailed),
    ):
        side.faulty.fail(call)
        with pytest.raises(error, match=r"injected|gave 5 of 6"):
            transfer(mapped, "a", "b")
        side.faulty.disarm()
        assert receiver.cache.stats().sequences == 0
        assert sender.link.stats["imports"] == 0
        reconnect(mapped)
    _, received = transfer(mapped, "a", "b")
    assert np.array_equal(receiver.rows(received.slot, 100), rows)


def test_pieces_end_where_an_extent_ends_on_either_side() -> None:
    one = [ExtentPlace(0, 0, 1000, 64), ExtentPlace(0, 64, 1064, 64)]
    other = [ExtentPlace(0, 0, 9000, 32), ExtentPlace(0, 32, 9032, 96)]
    pieces = pieces_of(one, other, row_bytes=10, tokens=11)
    assert pieces == [(1000, 9000, 32), (1032, 9032, 32), (1064, 9064, 46)]


def test_a_receiver_without_memory_refuses_and_both_go_on(pair: Pair) -> None:
    sender, receiver = pair
    rows = sender.fill("a", 300, 1)
    whole = receiver.cache.budget_bytes
    receiver.cache.set_budget("64KiB")
    with pytest.raises(TransferFailed, match="refused 300 tokens"):
        transfer(pair, "a", "b")
    assert receiver.cache.stats().sequences == 0
    receiver.cache.set_budget(whole)
    _, received = transfer(pair, "a", "b")
    assert np.array_equal(receiver.rows(received.slot, 300), rows)


def test_another_order_of_bytes_is_refused_by_name() -> None:
    here, there = Pipe()
    sender, receiver = side_of(HostLink, here), side_of(HostLink, there, heads_per_range=1)
    sender.fill("a", 5, 1)
    with pytest.raises(TransferFailed, match=r"another order .*'ranges': 4"):
        transfer((sender, receiver), "a", "b")
    for side in (sender, receiver):
        side.cache.close()
        side.link.close()
        side.host.close()


@pytest.mark.parametrize("failing", ["write", "map", "register"])
def test_where_a_transfer_fails_nothing_is_left_at_the_receiver(pinned: Pair, failing: str) -> None:
    sender, receiver = pinned
    sender.fill("a", 100, 1)
    if failing == "write":
        sender.link.fails = "the wire broke"
    elif failing == "map":
        receiver.faulty.fail("map")
    else:
        receiver.link.register = lambda address, size: (_ for _ in ()).throw(KVCacheOutOfMemory("no keys left"))
    with pytest.raises(TransferFailed, match=r"broke|map|no keys left"):
        transfer(pinned, "a", "b")
    assert receiver.cache.stats().sequences == 0
    assert sender.cache.stats().sequences == 1
    assert receiver.driver.made == receiver.driver.ended
    receiver.cache.check_integrity()


@pytest.mark.parametrize("ending", ["sender", "receiver"])
def test_a_peer_that_ends_leaves_nothing_leased(pinned: Pair, ending: str) -> None:
    sender, receiver = pinned
    sender.fill("a", 100, 1)
    if ending == "sender":
        sender.peer._say(("sequence", 100, sender.cache.byte_order))
        sender.peer._connection.close()
        with pytest.raises(TransferFailed, match="ended"):
            receiver.peer.receive("b")
        with pytest.raises(TransferFailed, match="earlier transfer"):
            receiver.peer.receive("b")
    else:
        receiver.peer._connection.close()
        with pytest.raises(TransferFailed, match="ended"):
            sender.peer.send("a")
    assert receiver.cache.stats().sequences == 0
    assert receiver.driver.made == receiver.driver.ended
    sender.cache.release("a")


def test_the_receiver_waits_for_what_ran_on_its_memory_before(pinned: Pair) -> None:
    sender, receiver = pinned
    sender.fill("a", 100, 1)
    receiver.host.hold()
    with pytest.raises(TransferFailed, match="held"):
        transfer(pinned, "a", "b")
    receiver.host.complete()
    assert receiver.cache.stats().sequences == 0


@pytest.mark.gpu
def test_memory_of_a_gpu_is_written_through_a_descriptor() -> None:
    driver = CudaDriver(exportable=True)
    size, fd = driver.granularity(), -1
    first, second = driver.reserve(size), driver.reserve(size)
    handle = driver.create(size)
    driver.map(first, size, handle)
    driver.set_access(first, size)
    try:
        fd = driver.export_fd(first, size)
        imported = driver.import_fd(fd, size)
    finally:
        os.close(fd)
    driver.map(second, size, imported)
    driver.set_access(second, size)
    tensor_at(second, size, driver.device).fill_(7)
    assert int((tensor_at(first, size, driver.device) == 7).sum()) == size
    for address, its in ((second, imported), (first, handle)):
        driver.unmap(address, size)
        driver.release(its)
        driver.free(address, size)


def test_part_of_an_extent_is_not_exported(host_driver: HostDriver) -> None:
    base, handle = host_driver.reserve(16384), host_driver.create(8192)
    host_driver.map(base, 8192, handle)
    with pytest.raises(DriverError, match="whole mappings"):
        host_driver.export_fd(base, 4096)
    other = host_driver.create(8192)
    host_driver.map(base + 8192, 8192, other)
    with pytest.raises(DriverError, match="2 mappings are there"):
        host_driver.export_fd(base, 16384)
    fd = host_driver.export_fd(base, 8192)
    with pytest.raises(DriverError, match="it has 8,192 bytes"):
        host_driver.import_fd(fd, 4096)
    os.close(fd)
    host_driver.unmap(base, 16384)
    host_driver.release(handle)
    host_driver.release(other)
    host_driver.free(base, 16384)


def test_a_link_is_opened_by_name(host_driver: HostDriver) -> None:
    with pytest.raises(ConfigError, match="no link 'rdma'; there are auto, nixl, ipc and host"):
        open_link("rdma", host_driver)
    link = open_link("host", host_driver)
    assert link.name == "host"
    link.close()
    link.close()


@pytest.mark.parametrize("lanes", [None, "^cuda_ipc", "tcp,cuda_copy", "^ib", "cuda"])
def test_a_ucx_that_keeps_memory_is_refused_for_a_gpu(lanes: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCX_TLS", raising=False)
    if lanes is not None:
        monkeypatch.setenv("UCX_TLS", lanes)
    bad = Ucx("1.3.0", "1.21.0", True)
    check_ucx(bad, "cpu")
    if lanes in ("^cuda_ipc", "tcp,cuda_copy"):
        check_ucx(bad, "cuda:0")
    else:
        with pytest.raises(ConfigError, match=r"UCX 1\.21\.0 keeps memory .*ucxx#733.*UCX_TLS=\^cuda_ipc"):
            check_ucx(bad, "cuda:0")


@pytest.mark.parametrize("shares", [True, False])
def test_a_ucx_without_memory_by_descriptors_is_warned_of(shares: bool, caplog: pytest.LogCaptureFixture) -> None:
    check_ucx(Ucx("1.5.1", "1.23.0", shares), "cuda:0")
    assert [record.message.split(":")[0] for record in caplog.records] == (
        [] if shares else ["NIXL 1.5.1 over UCX 1.23.0, which does not share cuMemCreate's memory on one host"]
    )


def test_nixl_writes_into_registered_extents() -> None:
    pytest.importorskip("nixl_cu13")
    for pair in pair_of(lambda host: open_link("nixl", host)):
        sender, receiver = pair
        assert sender.link.stats["nixl"] >= "1.5"
        assert sender.link.stats["ucx"].count(".") == 2
        for turn in range(6):
            rows = sender.fill("a", 150, turn)
            _, received = transfer(pair, "a", "b")
            assert np.array_equal(receiver.rows(received.slot, 150), rows)
            for side, name in ((sender, "a"), (receiver, "b")):
                side.cache.release(name)
                side.cache.release_free_memory()
