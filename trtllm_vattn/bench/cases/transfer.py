"""`bench transfer`: sequences sent from one process's cache to another's, beside what the link gives for one large
buffer; then many of them while memory is remapped on both sides, their bytes checked.

With one GPU both processes are on it. `--measure peer` is of one process and two GPUs (transfer_peer.py).
"""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from trtllm_vattn.arguments import adder
from trtllm_vattn.bench.cases import transfer_peer
from trtllm_vattn.bench.harness.case import Recording
from trtllm_vattn.bench.harness.flags import add_device, add_parts, add_results
from trtllm_vattn.cache.base import CacheShape, ExtentPlace
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.memory.layout import round_up
from trtllm_vattn.runtime.parallel import Ranks, size_of_torchrun
from trtllm_vattn.table import tabulate
from trtllm_vattn.transfer import GroupLink, Link, Peer, RegisteringDriver, open_link
from trtllm_vattn.transfer.pieces import Piece
from trtllm_vattn.transfer.ucx import nixl_installed
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.cuda import CudaDriver
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.tensors import finish, tensor_at

LINKS = ("auto", "nixl", "ipc", "group", "host")
PARTS = ("sequences", "remapping", "peer")
ROUNDS = 5
SMALL = 8
"""Sequences sent under remapping have at most a part of the shortest timed one's tokens."""
SMALL_EXTENTS = CacheConfig(extent_classes=2)
"""Of the cache that they are in, so that most sequences cross the border of two extents."""
SAY_S = 5.0
"""Between two messages of how far it is."""
BLOCK = 16
"""Tokens of a block, of the block tables that descriptors are compared with: K and V of each layer lie apart there."""
SLOTS = 3

COLUMNS = "tokens megabytes gb_s link_gb_s over_link extents descriptors block_descriptors"


@dataclass(frozen=True)
class Plan:
    """What both sides do.

    Parameters
    ----------
    kind : str
        ``cpu`` or ``cuda``.
    gpus : tuple of int
        The sender's and the receiver's.
    link : str
    sizes : tuple of int
        Tokens of the sequences that are timed.
    parts : tuple of str
        Of `PARTS`.
    transfers, seconds : int, float
        Sequences sent under remapping, and after how many seconds no more are.
    seed : int
    """

    kind: str
    gpus: tuple[int, int]
    link: str
    sizes: tuple[int, ...]
    parts: tuple[str, ...]
    transfers: int
    seconds: float
    seed: int

    @property
    def shape(self) -> CacheShape:
        """Keys and values of Llama-3-8B on a GPU; on the host, a small model's."""
        sizes = (32, 8, 128, torch.bfloat16) if self.kind == "cuda" else (8, 4, 64, torch.float32)
        return CacheShape(*sizes, num_slots=SLOTS, max_seq_len=max(self.sizes) + 256)

    @property
    def small(self) -> int:
        """Tokens of the longest sequence that is sent under remapping."""
        return max(32, min(self.sizes) // SMALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench transfer`."""
    add = adder(parser, add_device(parser))
    add_results(parser)
    add_parts(parser, PARTS, "sequences,remapping", flag="--measure")
    text = "how bytes move; auto is nixl where it is installed, else group (torch.distributed); with one GPU, ipc"
    parser.add_argument("--link", default="auto", choices=LINKS, help=text)
    add("--sizes", "TOKENS,...", "tokens of the sequences that are timed", "2048,32768", "64,512")
    add("--transfers", "SEQUENCES", "sequences sent while memory is remapped", 10_000, 24)
    add("--seconds", "SECONDS", "end these after so many", 40.0)


def plan_of(args: argparse.Namespace) -> Plan:
    """What the flags ask for. Raises ConfigError where there are too few GPUs for it."""
    kind, _, index = args.device.partition(":")
    first = int(index or 0)
    alone = kind == "cuda" and torch.cuda.device_count() == 1
    link = args.link
    if link == "auto":
        link = "ipc" if alone else "nixl" if nixl_installed() else "group"
    if alone and link == "group":
        raise ConfigError("link is group, and NCCL refuses two processes on one GPU; take ipc, host or nixl")
    gpus = (first, first) if alone else (0, 1)
    if "peer" in args.measure:
        raise ConfigError("peer is of one process; ask for it alone")
    return Plan(kind, gpus, link, tuple(args.sizes), tuple(args.measure), args.transfers, args.seconds, args.seed)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 where bytes were wrong."""
    if args.measure == ["peer"]:
        return _run_peer(args)
    plan, recording = plan_of(args), Recording("transfer", args)
    # Two processes on one GPU have no NCCL between them.
    kind = "cpu" if plan.gpus[0] == plan.gpus[1] else plan.kind
    ranks = (Ranks.of_torchrun if size_of_torchrun() > 1 else Ranks.start)(2, kind)

    def between(recording: Recording) -> list[dict[str, Any]]:
        recording.say("both processes are there")
        key = secrets.token_bytes(32)
        with Listener(("127.0.0.1", 0), authkey=key) as listener:
            address = listener.address

            def own() -> None:
                with listener.accept() as connection:
                    Sending(plan, connection, recording).run()

            _, (received,) = ranks.call_beside(own, receive_all, plan, address, key)
        return [{**received, "complete": True}]

    try:
        recording.measure({" and ".join(plan.parts): between})
    finally:
        ranks.close()
    rows, differing = recording.results.get("runs"), recording.summary.get("wrong_bytes")
    wrong = [f"{differing} bytes were wrong"] if differing else []
    return recording.conclude(tabulate(rows, COLUMNS) if rows else "", wrong=wrong)


def _run_peer(args: argparse.Namespace) -> int:
    recording, why = Recording("transfer", args), transfer_peer.why_not()
    if why is not None:
        recording.sum_up(peer=f"skipped: {why}")
        return recording.conclude()

    def peer(recording: Recording) -> list[dict[str, Any]]:
        rows = recording.results["peer"] = transfer_peer.measure_peer()
        return [{"peer": "measured", **rows[-1], "wrong_bytes": sum(row["wrong_bytes"] for row in rows)}]

    recording.measure({"peer": peer})
    rows, differing = recording.results.get("peer", []), recording.summary.get("wrong_bytes")
    told = [f"{differing} bytes were wrong"] if differing else []
    return recording.conclude(tabulate(rows, transfer_peer.COLUMNS), wrong=told)


# -- both sides --------------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """One process's half."""

    cache: KVCacheManager
    driver: RegisteringDriver
    link: Link
    peer: Peer

    def fill(self, places: list[ExtentPlace], nbytes: int, seed: int) -> None:
        """Write what `wrong_bytes` expects into each range's first bytes."""
        for place, view in self._views(places, nbytes):
            view.copy_(self._expected(place, len(view), seed))

    def wrong_bytes(self, places: list[ExtentPlace], nbytes: int, seed: int) -> int:
        """Bytes of words that are not those that the other side wrote."""
        wrong = [(view != self._expected(place, len(view), seed)).sum() for place, view in self._views(places, nbytes)]
        return 4 * int(torch.stack(wrong).sum())

    def _views(self, places: list[ExtentPlace], nbytes: int) -> Iterator[tuple[ExtentPlace, torch.Tensor]]:
        for place in places:
            size = min(place.size, nbytes - place.offset)
            yield place, tensor_at(place.address, size, self.driver.device).view(torch.int32)

    def _expected(self, place: ExtentPlace, words: int, seed: int) -> torch.Tensor:
        first = (place.offset // 4 + 7919 * place.range + 104729 * seed) % (1 << 30)
        return torch.arange(first, first + words, dtype=torch.int32, device=self.driver.device)


def _driver(plan: Plan, rank: int) -> Driver:
    return HostDriver(granularity=64 << 10) if plan.kind == "cpu" else CudaDriver(plan.gpus[rank], exportable=True)


@contextmanager
def _side(
    plan: Plan, rank: int, connection: Connection, longest: int, config: CacheConfig | None = None
) -> Iterator[Side]:
    """One half, with memory for sequences of `longest` tokens."""
    with ExitStack() as closing:
        inner = _driver(plan, rank)
        link = GroupLink(inner.device, 1 - rank) if plan.link == "group" else open_link(plan.link, inner)
        closing.callback(link.close)
        driver = RegisteringDriver(inner, link)
        cache = closing.enter_context(KVCacheManager(plan.shape, driver, config=config))
        layout = cache.layout
        cache.set_budget(layout.least_bytes + SLOTS * layout.num_ranges * layout.bytes_for(longest + 64))
        yield Side(cache, driver, link, Peer(cache, driver, link, connection))


def _limit(plan: Plan, side: Side, connection: Connection, nbytes: int, rank: int) -> float:
    """GB/s of one buffer of so many bytes, in one piece: the best of a few times."""
    best = 0.0
    with _buffer(side.driver, nbytes) as (here, size):
        connection.send((here, side.link.offer([side.driver.registered(here, size)])))
        there, offer = connection.recv()
        pieces = [Piece(here, there, nbytes) if rank == 0 else Piece(there, here, nbytes)]
        for _ in range(ROUNDS):
            finish(side.driver.device)
            started = perf_counter()
            if rank == 0:
                side.link.write(pieces, offer, connection, 60.0)
                best = max(best, nbytes / (perf_counter() - started) / 1e9)
                connection.send("written")
                connection.recv()
            else:
                side.link.take(pieces, connection, 60.0)
                connection.recv()
                connection.send("taken")
    return best


@contextmanager
def _buffer(driver: Driver, nbytes: int) -> Iterator[tuple[int, int]]:
    """Address and size of one extent of at least so many bytes."""
    size = round_up(nbytes, driver.granularity())
    with transfer_peer.mapped(driver, size) as address:
        driver.set_access(address, size)
        yield address, size


class Sending:
    """The sender's part; each size that was timed is a row of the recording's ``runs``."""

    def __init__(self, plan: Plan, connection: Connection, recording: Recording) -> None:
        self.plan, self._connection, self._recording = plan, connection, recording
        recording.sum_up(link=plan.link, same_device=plan.gpus[0] == plan.gpus[1], complete=False)

    def run(self) -> None:
        if "sequences" in self.plan.parts:
            with _side(self.plan, 0, self._connection, max(self.plan.sizes)) as side:
                for tokens in self.plan.sizes:
                    self._recording.add("runs", self._timed(side, tokens))
                    self._sum_up()
        if "remapping" in self.plan.parts:
            with _side(self.plan, 0, self._connection, self.plan.small, SMALL_EXTENTS) as side:
                self._send_many(side)

    def _sum_up(self) -> None:
        rows = self._recording.results["runs"]
        figures = {
            "over_link": rows[-1]["over_link"],
            **{f"gb_s_{row['tokens']}": row["gb_s"] for row in rows},
            **{f"over_link_{row['tokens']}": row["over_link"] for row in rows},
            "link_gb_s": rows[-1]["link_gb_s"],
            "descriptors_per_extent": sum(row["descriptors"] for row in rows) / sum(row["extents"] for row in rows),
            "block_descriptors_per_descriptor": sum(row["block_descriptors"] for row in rows)
            / sum(row["descriptors"] for row in rows),
        }
        self._recording.sum_up(**figures)

    def _timed(self, side: Side, tokens: int) -> dict[str, Any]:
        side.cache.admit("timed", tokens)
        places = side.cache.extents("timed")
        side.fill(places, side.cache.byte_order["row_bytes"] * tokens, tokens)
        sent = [side.peer.send("timed") for _ in range(ROUNDS)]
        side.cache.release("timed")
        limit = _limit(self.plan, side, self._connection, sent[0].nbytes, 0)
        # The first one registers, and connects.
        rate = sent[0].nbytes / median(each.seconds for each in sent[1:]) / 1e9
        return {
            "tokens": tokens,
            "megabytes": sent[0].nbytes / 1e6,
            "gb_s": rate,
            "link_gb_s": limit,
            "over_link": rate / limit,
            "extents": sent[0].extents,
            "descriptors": sent[0].descriptors,
            "block_descriptors": -(-tokens // BLOCK) * self.plan.shape.num_layers * 2,
            "seconds": [each.seconds for each in sent],
        }

    def _send_many(self, side: Side) -> None:
        plan, connection = self.plan, self._connection
        random = np.random.default_rng(plan.seed)
        row_bytes = side.cache.byte_order["row_bytes"]
        started = said = perf_counter()
        done = extents = descriptors = 0
        while done < plan.transfers and perf_counter() < started + plan.seconds:
            tokens = int(random.integers(1, plan.small + 1))
            connection.send((done, tokens))
            _shift(side, random)
            side.cache.admit("sent", tokens)
            side.fill(side.cache.extents("sent"), row_bytes * tokens, done)
            sent = side.peer.send("sent")
            side.cache.release("sent")
            done, extents, descriptors = done + 1, extents + sent.extents, descriptors + sent.descriptors
            if perf_counter() > said + SAY_S:
                said = perf_counter()
                self._recording.sum_up(transfers=done)
        connection.send(None)
        self._recording.sum_up(
            transfers=done,
            extents_per_transfer=extents / done,
            descriptors_per_transfer=descriptors / done,
            registrations=side.driver.made,
            deregistrations=side.driver.ended,
            **{f"link_{name}": value for name, value in side.link.stats.items()},
        )


def _shift(side: Side, random: np.random.Generator) -> None:
    """Have the next sequence lie in other pages, and mostly in another slot."""
    if side.cache.stats().sequences:
        side.cache.release("between")
    if random.random() < 0.3:
        side.cache.release_free_memory()
    if random.random() < 0.5:
        side.cache.admit("between", int(random.integers(1, 64)))


def receive_all(engine: Any, plan: Plan, address: tuple[str, int], key: bytes) -> dict[str, Any]:
    """The other process's part; what was wrong."""
    wrong = checked = 0
    with Client(address, authkey=key) as connection:
        if "sequences" in plan.parts:
            with _side(plan, 1, connection, max(plan.sizes)) as side:
                wrong += sum(_receive_timed(plan, side, connection, tokens) for tokens in plan.sizes)
        if "remapping" in plan.parts:
            with _side(plan, 1, connection, plan.small, SMALL_EXTENTS) as side:
                wrong_there, checked = _receive_many(plan, side, connection)
                wrong += wrong_there
    return {"wrong_bytes": wrong, "checked_bytes": checked}


def _receive_timed(plan: Plan, side: Side, connection: Connection, tokens: int) -> int:
    wrong = 0
    for turn in range(ROUNDS):
        side.peer.receive("timed")
        if turn in (0, ROUNDS - 1):
            nbytes = side.cache.byte_order["row_bytes"] * tokens
            wrong += side.wrong_bytes(side.cache.extents("timed"), nbytes, tokens)
        side.cache.release("timed")
    _limit(plan, side, connection, plan.shape.token_bytes * tokens, 1)
    return wrong


def _receive_many(plan: Plan, side: Side, connection: Connection) -> tuple[int, int]:
    """Bytes that were wrong, and those that were checked."""
    wrong = checked = 0
    random = np.random.default_rng(plan.seed + 1)
    row_bytes = side.cache.byte_order["row_bytes"]
    while (said := connection.recv()) is not None:
        number, tokens = said
        _shift(side, random)
        side.peer.receive("taken")
        wrong += side.wrong_bytes(side.cache.extents("taken"), row_bytes * tokens, number)
        checked += row_bytes * tokens * side.cache.byte_order["ranges"]
        side.cache.release("taken")
    return wrong, checked
