"""`bench transfer`: sequences sent from one process's cache to another's, beside what the link gives for one large
buffer; then many of them while memory is remapped on both sides, their bytes checked.
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
from tqdm import tqdm

from trtllm_vattn.arguments import amount, numbers, positive
from trtllm_vattn.bench.harness.case import conclude
from trtllm_vattn.bench.harness.flags import add_device, add_results
from trtllm_vattn.cache.base import CacheShape, ExtentPlace
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.memory.layout import round_up
from trtllm_vattn.runtime.parallel import Ranks, size_of_torchrun
from trtllm_vattn.table import tabulate
from trtllm_vattn.transfer import GroupLink, Link, Peer, RegisteringDriver, open_link
from trtllm_vattn.transfer.links import Piece, nixl_installed
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.cuda import CudaDriver
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.tensors import finish, tensor_at

LINKS = ("auto", "nixl", "group", "host")
ROUNDS = 5
BLOCK = 16
"""Tokens of a block, of the block tables that descriptors are compared with: K and V of each layer lie apart there."""
SLOTS = 3

COLUMNS = {
    "tokens": "tokens",
    "MB": "megabytes:.1f",
    "GB/s": "gb_s:.2f",
    "link GB/s": "link_gb_s:.2f",
    "over link": "over_link:.3f",
    "extents": "extents",
    "descriptors": "descriptors",
    "by blocks": "block_descriptors",
}


@dataclass(frozen=True)
class Plan:
    """What both sides do.

    Parameters
    ----------
    kind : str
        ``cpu`` or ``cuda``.
    link : str
    sizes : tuple of int
        Tokens of the sequences that are timed.
    transfers, seconds : int, float
        Sequences sent under remapping, and after how many seconds no more are.
    seed : int
    """

    kind: str
    link: str
    sizes: tuple[int, ...]
    transfers: int
    seconds: float
    seed: int

    @property
    def shape(self) -> CacheShape:
        """Keys and values of Llama-3-8B on a GPU; on the host, a small model's."""
        sizes = (32, 8, 128, torch.bfloat16) if self.kind == "cuda" else (8, 4, 64, torch.float32)
        return CacheShape(*sizes, num_slots=SLOTS, max_seq_len=max(self.sizes) + 256)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench transfer`."""
    gpu, add = add_device(parser), parser.add_argument
    add_results(parser)
    text = "how bytes move; auto is nixl where it is installed, else group: torch.distributed"
    add("--link", default="auto", choices=LINKS, help=text)
    text = "tokens of the sequences that are timed"
    add("--sizes", type=numbers, default="2048,32768" if gpu else "64,512", metavar="TOKENS,...", help=text)
    text = "sequences sent while memory is remapped"
    add("--transfers", type=positive, default=2000 if gpu else 24, metavar="SEQUENCES", help=text)
    add("--seconds", type=amount, default=60.0, metavar="SECONDS", help="end these after so many")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 where bytes were wrong."""
    kind = args.device.partition(":")[0]
    link = args.link if args.link != "auto" else "nixl" if nixl_installed() else "group"
    plan = Plan(kind, link, tuple(args.sizes), args.transfers, args.seconds, args.seed)
    ranks = (Ranks.of_torchrun if size_of_torchrun() > 1 else Ranks.start)(2, kind)
    try:
        key = secrets.token_bytes(32)
        with Listener(("127.0.0.1", 0), authkey=key) as listener:
            address = listener.address

            def own() -> tuple[list[dict[str, Any]], dict[str, Any]]:
                with listener.accept() as connection:
                    return _send_all(plan, connection)

            (rows, done), (received,) = ranks.call_beside(own, receive_all, plan, address, key)
    finally:
        ranks.close()
    summary = {
        "link": link,
        "over_link": rows[-1]["over_link"],
        **{f"gb_s_{row['tokens']}": row["gb_s"] for row in rows},
        "link_gb_s": rows[-1]["link_gb_s"],
        "descriptors_per_extent": sum(row["descriptors"] for row in rows) / sum(row["extents"] for row in rows),
        **done,
        **received,
    }
    wrong = [f"{received['wrong_bytes']} bytes were wrong"] if received["wrong_bytes"] else []
    return conclude("transfer", args, {"runs": rows}, summary, tabulate(rows, COLUMNS), wrong=wrong)


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
        first = place.offset // 4 + 7919 * place.range + 104729 * seed
        return torch.arange(first, first + words, dtype=torch.int32, device=self.driver.device)


def _driver(kind: str, rank: int) -> Driver:
    return HostDriver(granularity=2 << 20) if kind == "cpu" else CudaDriver(rank, exportable=True)


@contextmanager
def _side(plan: Plan, rank: int, connection: Connection) -> Iterator[Side]:
    with ExitStack() as closing:
        inner = _driver(plan.kind, rank)
        link = GroupLink(inner.device, 1 - rank) if plan.link == "group" else open_link(plan.link, inner)
        closing.callback(link.close)
        driver = RegisteringDriver(inner, link)
        cache = closing.enter_context(KVCacheManager(plan.shape, driver))
        layout = cache.layout
        cache.set_budget(layout.least_bytes + SLOTS * layout.num_ranges * layout.bytes_for(max(plan.sizes) + 64))
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
    with ExitStack() as undo:
        address = driver.reserve(size)
        undo.callback(driver.free, address, size)
        handle = driver.create(size)
        undo.callback(driver.release, handle)
        driver.map(address, size, handle)
        undo.callback(driver.unmap, address, size)
        driver.set_access(address, size)
        yield address, size


def _send_all(plan: Plan, connection: Connection) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = []
    with _side(plan, 0, connection) as side:
        row_bytes = side.cache.byte_order["row_bytes"]
        for tokens in plan.sizes:
            side.cache.admit("timed", tokens)
            places = side.cache.extents("timed")
            side.fill(places, row_bytes * tokens, tokens)
            sent = [side.peer.send("timed") for _ in range(ROUNDS)]
            side.cache.release("timed")
            limit = _limit(plan, side, connection, sent[0].nbytes, 0)
            # The first one registers, and connects.
            rate = sent[0].nbytes / median(each.seconds for each in sent[1:]) / 1e9
            rows.append(
                {
                    "tokens": tokens,
                    "megabytes": sent[0].nbytes / 1e6,
                    "gb_s": rate,
                    "link_gb_s": limit,
                    "over_link": rate / limit,
                    "extents": sent[0].extents,
                    "descriptors": sent[0].descriptors,
                    "block_descriptors": -(-tokens // BLOCK) * plan.shape.num_layers * 2,
                    "seconds": [each.seconds for each in sent],
                }
            )
        return rows, _send_many(plan, side, connection)


def _send_many(plan: Plan, side: Side, connection: Connection) -> dict[str, Any]:
    random = np.random.default_rng(plan.seed)
    row_bytes = side.cache.byte_order["row_bytes"]
    until = perf_counter() + plan.seconds
    done = 0
    with tqdm(total=plan.transfers, desc="transfers", unit="transfer", disable=None) as bar:
        while done < plan.transfers and perf_counter() < until:
            tokens = int(random.integers(1, min(plan.sizes) + 1))
            connection.send((done, tokens))
            _shift(side, random)
            side.cache.admit("sent", tokens)
            side.fill(side.cache.extents("sent"), row_bytes * tokens, done)
            side.peer.send("sent")
            side.cache.release("sent")
            done += 1
            bar.update(1)
    connection.send(None)
    return {"transfers": done, "registrations": side.driver.made, "deregistrations": side.driver.ended}


def _shift(side: Side, random: np.random.Generator) -> None:
    """Have the next sequence lie in other pages, and mostly in another slot."""
    if side.cache.stats().sequences:
        side.cache.release("between")
    if random.random() < 0.5:
        side.cache.release_free_memory()
    if random.random() < 0.5:
        side.cache.admit("between", int(random.integers(1, 64)))


def receive_all(engine: Any, plan: Plan, address: tuple[str, int], key: bytes) -> dict[str, Any]:
    """The other process's part; what was wrong."""
    wrong = checked = 0
    with Client(address, authkey=key) as connection, _side(plan, 1, connection) as side:
        row_bytes = side.cache.byte_order["row_bytes"]
        for tokens in plan.sizes:
            for turn in range(ROUNDS):
                side.peer.receive("timed")
                if not turn:
                    wrong += side.wrong_bytes(side.cache.extents("timed"), row_bytes * tokens, tokens)
                side.cache.release("timed")
            _limit(plan, side, connection, plan.shape.token_bytes * tokens, 1)
        random = np.random.default_rng(plan.seed + 1)
        while (said := connection.recv()) is not None:
            number, tokens = said
            _shift(side, random)
            side.peer.receive("taken")
            wrong += side.wrong_bytes(side.cache.extents("taken"), row_bytes * tokens, number)
            checked += row_bytes * tokens * side.cache.byte_order["ranges"]
            side.cache.release("taken")
    return {"wrong_bytes": wrong, "checked_bytes": checked}
