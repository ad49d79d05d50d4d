"""`bench tlb`: does attention feel where pages lie? Bandwidth against context, working set, layout and page order.

At each point flat KV stands beside block tables. Flat slots are backed in the order of creation by the largest extents,
by single pages in that order and in a random one, and as hours of sequences coming and going leave them; the last also
after everything was given back to the driver and created again. Plain random reads of several sizes over the same
memory say what the hardware does.
"""

from __future__ import annotations

import argparse
import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm import tqdm

from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.bench.attention import fill
from trtllm_vattn.bench.bandwidth import attention_bandwidth, timed_ms
from trtllm_vattn.bench.flags import (
    add_attention,
    amounts,
    as_config,
    device,
    dtype_of,
    non_negative,
    numbers,
    positive,
)
from trtllm_vattn.bench.plot import plot_tlb
from trtllm_vattn.bench.report import Result, finish, table
from trtllm_vattn.cache.base import CacheShape, KVCache
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.paged import PagedCache
from trtllm_vattn.errors import VattnError
from trtllm_vattn.memory.reclaim import reclaim
from trtllm_vattn.vmm.open import open_driver

ORDERS = ("in order", "single pages in order", "scattered", "after churn", "created again")

READ_AT_ONCE = 2 << 30
"""Bytes; many times what a cache of the device holds."""


class SinglePages(KVCacheManager):
    """Backed by single pages, so that their order can be chosen."""

    extent_classes: ClassVar[int] = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench tlb`."""
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--device", type=device, default="cuda:0" if gpu else "cpu", help="cpu or cuda:N")
    add_attention(parser)
    add("--heads", type=numbers, default=[32, 8, 128] if gpu else [2, 1, 16], help="query heads, kv heads, their size")
    add("--layers", type=positive, default=32 if gpu else 4, help="layers; the working set is all of them")
    add(
        "--layers-per-range",
        type=numbers,
        default=[1, 32, 8] if gpu else [1, 4],
        help="layouts; the last in all orders",
    )
    add("--contexts", type=numbers, default=[2048, 131072] if gpu else [100], help="tokens a sequence")
    add(
        "--working-sets-gb",
        type=amounts,
        default=[1, 16, 64, 120] if gpu else [5e-4],
        help="of K and V; a GB is 1e9 bytes",
    )
    add("--blocks", type=numbers, default=[16, 64] if gpu else [16], help="tokens a block of the block tables")
    add("--read-bytes", type=numbers, default=[512, 4096, 32768], help="sizes of plain random reads")
    add("--churn", type=non_negative, default=400, help="sequences that come and go before 'after churn'")
    add("--repeats", type=positive, default=5)
    add("--seed", type=int, default=0)
    add("--output-json", type=Path, help="write all results there")
    add("--plot", type=Path, help="write a PNG there")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    torch.manual_seed(args.seed)
    rows: list[dict[str, Any]] = []
    reads: list[dict[str, Any]] = []
    points = [(gb, context) for gb in args.working_sets_gb for context in args.contexts]
    for gb, context in tqdm(points, desc="points", disable=None):
        shape = _shape(args, gb, context)
        if shape is None:
            continue
        at = {"context": context, "sequences": shape.num_slots, "working_set_gb": _gb(shape)}
        rows += [{**at, **row} for row in _flat(args, shape, reads if context == args.contexts[0] else None)]
        rows += [{**at, **row} for row in _blocks(args, shape)]
    result = Result.start("tlb", as_config(args), args.seed)
    result.results.update(attention=rows, reads=reads)
    result.summary.update(_summary(rows, reads, args.layers_per_range[-1]))
    print(_show(rows))
    finish(result, args, plot_tlb)
    return 0


def _shape(args: argparse.Namespace, gb: float, context: int) -> CacheShape | None:
    """As many sequences as fill the working set; None where not one does."""
    _, kv_heads, head_dim = args.heads
    one = CacheShape(args.layers, kv_heads, head_dim, dtype_of(args.device), 1, context)
    sequences = int(gb * 1e9 // (context * one.token_bytes))
    if not sequences:
        return None
    return CacheShape(args.layers, kv_heads, head_dim, one.dtype, sequences, context)


def _gb(shape: CacheShape) -> float:
    return shape.num_slots * shape.max_seq_len * shape.token_bytes / 1e9


def _flat(args: argparse.Namespace, shape: CacheShape, reads: list[dict[str, Any]] | None) -> Iterator[dict[str, Any]]:
    """Attention over flat KV in each layout and order; plain reads of the last layout go into `reads`."""
    for g in args.layers_per_range:
        for order in ORDERS if g == args.layers_per_range[-1] else ("in order", "scattered"):
            system = f"flat, {g} layers a row, {order}"
            try:
                with _flat_cache(args, shape, g, order) as cache:
                    yield {"system": system, "order": order, "layers_per_range": g, **_attend(args, cache)}
                    if reads is not None and g == args.layers_per_range[-1]:
                        flat = cache.storages()[0]
                        reads += [
                            {"order": order, "working_set_gb": _gb(shape), **_read(args, cache, flat, size)}
                            for size in args.read_bytes
                        ]
            except (RuntimeError, VattnError) as error:
                yield {"system": system, "refused": str(error).strip().splitlines()[0][:200]}
            _give_back()


def _flat_cache(args: argparse.Namespace, shape: CacheShape, g: int, order: str) -> KVCacheManager:
    kind = KVCacheManager if order == "in order" else SinglePages
    cache = kind(shape, open_driver(args.device), None, g, lookahead=0)
    cache.set_budget(cache.layout.num_ranges * cache.layout.range_bytes)
    if order == "scattered":
        cache.stock_up(shape.num_slots, shape.max_seq_len)
        random.Random(args.seed).shuffle(cache.arena.pool._stock[cache.layout.granule])
    elif order in ("after churn", "created again"):
        _churn(cache, args)
        if order == "created again":
            reclaim(cache.arena, cache.arena.parked_bytes)
            while cache.arena.pool.shrink():
                pass
    return cache


def _churn(cache: KVCacheManager, args: argparse.Namespace) -> None:
    """Sequences of all lengths come, grow and go; parked memory is taken away now and then. None is left running."""
    choose = random.Random(args.seed)
    running: list[int] = []
    for number in range(args.churn):
        if len(running) == cache.shape.num_slots:
            cache.release(running.pop(choose.randrange(len(running))))
        cache.admit(number, choose.randint(1, cache.shape.max_seq_len))
        running.append(number)
        for sequence in running:
            slot = cache.slot_of(sequence)
            room = cache.shape.max_seq_len - int(cache.lengths[slot])
            cache.extend(sequence, min(room, choose.randint(0, 64)))
        if choose.random() < 0.1:
            reclaim(cache.arena, cache.arena.parked_bytes // 2)
    for sequence in running:
        cache.release(sequence)


def _blocks(args: argparse.Namespace, shape: CacheShape) -> Iterator[dict[str, Any]]:
    for block in args.blocks:
        system = f"blocks of {block}"
        try:
            with PagedCache(shape, args.device, block, shape.num_slots * -(-shape.max_seq_len // block)) as cache:
                np.random.default_rng(args.seed).shuffle(cache._free_blocks)
                yield {"system": system, **_attend(args, cache)}
        except (RuntimeError, VattnError) as error:
            yield {"system": system, "refused": str(error).strip().splitlines()[0][:200]}
        _give_back()


def _give_back() -> None:
    """Memory of the last cache goes back to the driver, which the next one asks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _attend(args: argparse.Namespace, cache: KVCache) -> dict[str, Any]:
    attention = make_attention(args.attention, cache, args.heads[0])
    fill(attention, np.full(cache.shape.num_slots, cache.shape.max_seq_len))
    measured = attention_bandwidth(attention, cache.lengths, args.repeats)
    rates: Any = measured["bytes_per_s"]
    return {"gb_per_s": rates["p50"] / 1e9, "bytes_per_s": rates, "placement": _placement(cache)}


def _placement(cache: KVCache) -> float | None:
    """Share of neighbours in order of their creation."""
    if not isinstance(cache, KVCacheManager):
        return None
    placed = cache.placement()
    return placed.ascending / placed.neighbours if placed.neighbours else None


@torch.inference_mode()
def _read(args: argparse.Namespace, cache: KVCacheManager, flat: torch.Tensor, size: int) -> dict[str, Any]:
    """Random reads of `size` bytes, `READ_AT_ONCE` in all, over all slots of a range, each fully mapped; what is read
    is written elsewhere."""
    layout = cache.layout
    used = layout.max_seq_len * layout.row_bytes // size
    count = min(READ_AT_ONCE // size, cache.shape.num_slots * used)
    slots = torch.randint(0, cache.shape.num_slots, (count,), device=flat.device)
    offsets = slots * (layout.slot_stride // size) + torch.randint(0, used, (count,), device=flat.device)
    words = flat.view(torch.int64)
    rows = words[: words.numel() // (size // 8) * (size // 8)].view(-1, size // 8)
    milliseconds = timed_ms(lambda: rows[offsets], args.repeats, flat.device)
    return {"read_bytes": size, "gb_per_s": count * size / (sorted(milliseconds)[len(milliseconds) // 2] / 1e3) / 1e9}


def _summary(rows: list[dict[str, Any]], reads: list[dict[str, Any]], g: int) -> dict[str, float]:
    """Each order against pages in order, of attention in a layout of `g` layers a row and of plain reads, at worst."""
    out: dict[str, float] = {}
    best = {(r["context"], r["working_set_gb"], r["system"]): r["gb_per_s"] for r in rows if "gb_per_s" in r}
    for order in ORDERS[1:]:
        ratios = [
            rate / best[context, gb, f"flat, {g} layers a row, in order"]
            for (context, gb, system), rate in best.items()
            if system == f"flat, {g} layers a row, {order}"
        ]
        if ratios:
            out[f"attention_{order.replace(' ', '_')}_over_in_order_worst"] = min(ratios)
    for blocks in dict.fromkeys(system for _, _, system in best if system.startswith("blocks")):
        ratios = [
            best[context, gb, f"flat, {g} layers a row, in order"] / rate
            for (context, gb, system), rate in best.items()
            if system == blocks and (context, gb, f"flat, {g} layers a row, in order") in best
        ]
        if ratios:
            out[f"flat_over_{blocks.replace(' ', '_')}_worst"] = min(ratios)
    for size in dict.fromkeys(row["read_bytes"] for row in reads):
        found = {(r["order"], r["working_set_gb"]): r["gb_per_s"] for r in reads if r["read_bytes"] == size}
        ratios = [rate / found["in order", gb] for (order, gb), rate in found.items() if order == "scattered"]
        if ratios:
            out[f"reads_of_{size}_scattered_over_in_order_worst"] = min(ratios)
    return out


def _show(rows: list[dict[str, Any]]) -> str:
    systems = list(dict.fromkeys(row["system"] for row in rows))
    points = list(dict.fromkeys((row["context"], row["working_set_gb"], row["sequences"]) for row in rows))
    cells = {(r["context"], r["working_set_gb"], r["system"]): r.get("gb_per_s") for r in rows}

    def cell(context: int, gb: float, system: str) -> str:
        rate = cells.get((context, gb, system))
        return "-" if rate is None else f"{rate:,.1f}"

    return table(
        ["sequences x tokens", "GB", *systems],
        [[f"{n} x {c}", f"{gb:.3g}", *(cell(c, gb, system) for system in systems)] for c, gb, n in points],
    )
