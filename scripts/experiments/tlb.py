"""Does attention feel where pages lie? Bandwidth against context, working set, layout and page order.

An experiment: ``python scripts/experiments/tlb.py --help``. Its results and tables are in scripts/results.

At each point flat KV stands beside block tables. Flat slots are backed in the order of creation by the largest extents,
by single pages in that order and in a random one, and as hours of sequences coming and going leave them; the last also
after everything was given back to the driver and created again. Plain random reads of several sizes over all of the
same memory say what the hardware does. What does not fit, or would take too long, is said and recorded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from random_reads import check_size, random_rows, reader
from tqdm import tqdm

from trtllm_vattn.arguments import HEADS, adder, heads, non_negative
from trtllm_vattn.attention.base import Attention
from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.bench.harness.case import conclude, give_back
from trtllm_vattn.bench.harness.flags import add_attention, add_device, add_results, dtype_of
from trtllm_vattn.bench.harness.timing import attention_bandwidth, fill_random, refusal, summarise, timed_ms
from trtllm_vattn.bench.publish.plots import pyplot, save
from trtllm_vattn.cache.base import CacheShape, KVCache
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.paged import PagedCache
from trtllm_vattn.cli.parser import run_script
from trtllm_vattn.errors import KVCacheOutOfMemory, VattnError
from trtllm_vattn.table import tabulate
from trtllm_vattn.verify.workload import CacheWorkload
from trtllm_vattn.vmm.open import open_driver

ORDERS = ("in order", "single pages in order", "scattered", "after churn", "created again")

READ_AT_ONCE = 2 << 30
"""Bytes; many times what a cache of the device holds."""
SPARE = 2 << 30
"""Bytes of the device that a point leaves: for the context, kernels and what is read."""


SINGLE_PAGES = CacheConfig(extent_classes=1, lookahead=0)
"""Backed by single pages, so that their order can be chosen."""
COLUMNS = "context sequences working_set_gb system gb_per_s"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the experiment."""
    add = adder(parser, gpu := add_device(parser))
    add_attention(parser)
    add("--heads", "Q,KV,SIZE", HEADS, "32,8,128", "2,1,16", type=heads)
    add("--layers", "LAYERS", "the working set is all of them", 32, 4)
    text = "layouts by layers that share a token's row; the last one in all orders of pages"
    add("--layers-per-range", "LAYERS,...", text, "1,8,16,32", "1,4")
    add("--contexts", "TOKENS,...", "tokens of each sequence", "2048,16384,131072", "100")
    usual = "1GiB,16GiB,32GiB,64GiB,102GiB,121GiB" if gpu else "500000"
    add("--working-sets", "BYTES,...", "of K and V, all layers together", usual)
    add("--blocks", "TOKENS,...", "tokens of a block of block tables", "16,64", "16")
    add("--read-bytes", "BYTES,...", "sizes of plain random reads", "512,4096,32768")
    add("--churn", "SEQUENCES", "sequences of each slot that come and go before 'after churn'", 10, type=non_negative)
    add("--repeats", "TIMES", "times that each point is timed", 5)
    add("--most-seconds", "SECONDS", "what would begin later is left out", 600.0)
    add_results(parser, plots=True)


class Sweep:
    """What was measured, and what was left out and why."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.until = args, perf_counter() + args.most_seconds
        self.attention: list[dict[str, Any]] = []
        self.reads: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []

    def skip(self, why: str, **what: Any) -> None:
        """Say on stderr that a point, or a system at it, is left out, and record it."""
        self.skipped.append({**what, "why": why})
        where = ", ".join(f"{name} {value}" for name, value in what.items())
        tqdm.write(f"left out: {where}: {why}", file=sys.stderr)

    def check_time(self) -> None:
        """Raise TimeoutError where it is too late to begin anything."""
        if perf_counter() > self.until:
            raise TimeoutError(f"{self.args.most_seconds:g} s are over (--most-seconds)")

    @contextmanager
    def systems(self, *names: str, **at: Any) -> Iterator[list[str]]:
        """A body that measures systems and takes off the list each that it has done; what is still there when it fails
        is left out. Afterwards memory goes back to the driver, which the next one asks."""
        left = list(names)
        try:
            yield left
        except (RuntimeError, VattnError, TimeoutError) as error:
            for name in left:
                self.skip(refusal(error), system=name, **at)
        give_back()


def run(args: argparse.Namespace) -> int:
    """Run the experiment."""
    torch.manual_seed(args.seed)
    for size in args.read_bytes:
        check_size(size)
    sweep = Sweep(args)
    points = [(nbytes / 1e9, context) for nbytes in args.working_sets for context in args.contexts]
    for gb, context in tqdm(points, desc="points", disable=None):
        shape, why = _shape(args, gb, context)
        if shape is None:
            sweep.skip(why, working_set_gb=gb, context=context)
            continue
        at = {"context": context, "sequences": shape.num_slots, "working_set_gb": _gb(shape)}
        for g in args.layers_per_range:
            _flat(sweep, shape, g, at)
        _blocks(sweep, shape, at)
    results = {"attention": sweep.attention, "reads": sweep.reads, "skipped": sweep.skipped}
    summary = {
        **_summary(sweep.attention, sweep.reads, args.layers_per_range[-1]),
        "skipped": len(sweep.skipped),
    }
    program = "python scripts/experiments/tlb.py"
    return conclude("tlb", args, results, summary, tabulate(sweep.attention, COLUMNS), plot_tlb, program=program)


def _shape(args: argparse.Namespace, gb: float, context: int) -> tuple[CacheShape | None, str]:
    """As many sequences as fill the working set; None, and why, where that cannot be."""
    _, kv_heads, head_dim = args.heads
    one = CacheShape(args.layers, kv_heads, head_dim, dtype_of(args.device), 1, context)
    each = context * one.token_bytes
    sequences = int(gb * 1e9 // each)
    if not sequences:
        return None, f"one sequence takes {each / 1e9:.3g} GB"
    if args.device != "cpu":
        free = torch.cuda.mem_get_info(torch.device(args.device))[0] - SPARE
        if (sequences + 1) * each > free:
            return None, f"only {free / 1e9:.1f} GB of the device are free"
    return CacheShape(args.layers, kv_heads, head_dim, one.dtype, sequences, context), ""


def _gb(shape: CacheShape) -> float:
    return shape.num_slots * shape.max_seq_len * shape.token_bytes / 1e9


def _flat(sweep: Sweep, shape: CacheShape, g: int, at: dict[str, Any]) -> None:
    """Attention over flat KV, and plain reads, in each order of pages; in two of them but for the last layout."""
    args = sweep.args
    systems = {order: f"flat, {g} layers a row, {order}" for order in ORDERS}
    few = ("scattered",) if g != args.layers_per_range[-1] else ORDERS[1:]
    for config, orders in ((CacheConfig(lookahead=0), ORDERS[:1]), (SINGLE_PAGES, few)):
        with sweep.systems(*(systems[order] for order in orders), **at) as left:
            sweep.check_time()
            with KVCacheManager(shape, open_driver(args.device), None, g, config=config) as cache:
                cache.set_budget(cache.layout.num_ranges * cache.layout.range_bytes)
                attention = make_attention(args.attention, cache, args.heads[0])
                for order in orders:
                    sweep.check_time()
                    arrange(cache, order, args.churn, args.seed)
                    what = {**at, "system": systems[order], "order": order, "layers_per_range": g}
                    sweep.attention.append({**what, **_attend(args, attention)})
                    left.remove(systems[order])
                    if at["context"] == args.contexts[0]:
                        sweep.reads += [{**what, **_read(args, cache, size)} for size in _sizes(sweep, cache, what)]


def arrange(cache: KVCacheManager, order: str, churn: int, seed: int) -> None:
    """End sequences 0, 1, …, and have the cache back those that come next in this order."""
    for sequence in range(cache.stats().sequences):
        cache.release(sequence)
    cache.release_free_memory(cache.stats().parked_bytes)
    if order == "scattered":
        cache.preallocate(cache.shape.num_slots, cache.shape.max_seq_len)
        cache.shuffle_free_memory(seed)
        cache.preallocate(0, 1)
    elif order == "after churn":
        _churn(cache, churn * cache.shape.num_slots, seed)
    elif order == "created again":
        cache.release_free_memory()


def _churn(cache: KVCacheManager, sequences: int, seed: int) -> None:
    """So many sequences of all lengths come, grow and go, at most in all slots and at times in half of them, in less
    memory than there is, so that what is parked is taken away for others. None is left running."""
    workload = CacheWorkload(cache, seed)
    slots, longest = cache.shape.num_slots, cache.shape.max_seq_len
    whole = cache.stats().budget_bytes
    cache.set_budget(whole * 5 // 8)

    def grow() -> None:
        more = np.array([workload.random.randint(0, longest // slots + 1) for _ in range(slots)])
        cache.prepare_step(np.where(cache.lengths > 0, np.minimum(cache.lengths + more, longest), 0))

    for _ in range(sequences):
        while len(workload.authors) >= workload.random.randint(slots // 2 + 1, slots):
            workload.release()
        for operation in (workload.admit, grow):
            while True:
                try:
                    operation()
                    break
                except KVCacheOutOfMemory:
                    workload.release()
    while workload.authors:
        workload.release()
    cache.set_budget(whole)


def _blocks(sweep: Sweep, shape: CacheShape, at: dict[str, Any]) -> None:
    args = sweep.args
    for block in args.blocks:
        system = f"blocks of {block}"
        blocks = shape.num_slots * -(-shape.max_seq_len // block)
        with sweep.systems(system, **at) as left:
            sweep.check_time()
            with PagedCache(shape, args.device, block, blocks) as cache:
                cache.shuffle_free_memory(args.seed)
                attention = make_attention(args.attention, cache, args.heads[0])
                sweep.attention.append({**at, "system": system, **_attend(args, attention)})
                left.clear()


def _attend(args: argparse.Namespace, attention: Attention) -> dict[str, Any]:
    cache = attention.cache
    fill_random(attention, np.full(cache.shape.num_slots, cache.shape.max_seq_len))
    measured = attention_bandwidth(attention, cache.lengths, args.repeats)
    rates: Any = measured["bytes_per_s"]
    return {"gb_per_s": rates["p50"] / 1e9, "bytes_per_s": rates, **_placement(cache)}


def _placement(cache: KVCache) -> dict[str, float]:
    """Share of neighbours in order of their creation, and of those created one right after the other."""
    placed = cache.placement()
    if placed is None or not placed.neighbours:
        return {}
    return {"placement": placed.ascending / placed.neighbours, "adjacent": placed.adjacent / placed.neighbours}


def _sizes(sweep: Sweep, cache: KVCacheManager, what: dict[str, Any]) -> Iterator[int]:
    """Sizes of rows that a slot of a range holds."""
    room = cache.layout.max_seq_len * cache.layout.row_bytes
    for size in sweep.args.read_bytes:
        if size <= room:
            yield size
        else:
            sweep.skip(f"a slot has {room:,} bytes in a range", read_bytes=size, **what)


@torch.inference_mode()
def _read(args: argparse.Namespace, cache: KVCacheManager, size: int) -> dict[str, Any]:
    """Random reads of `size` bytes, `READ_AT_ONCE` in all, over all slots of all ranges, each fully mapped."""
    work, nbytes = reader(random_rows(cache, size, READ_AT_ONCE), size)
    rates = summarise([nbytes / (ms / 1e3) / 1e9 for ms in timed_ms(work, args.repeats, cache.device)])
    return {"read_bytes": size, "gb_per_s": rates["p50"], "rates": rates}


def _summary(rows: list[dict[str, Any]], reads: list[dict[str, Any]], g: int) -> dict[str, float]:
    """Each order against pages in order, of attention in a layout of `g` layers a row and of plain reads, at worst."""
    out: dict[str, float] = {}
    best = {(r["context"], r["working_set_gb"], r["system"]): r["gb_per_s"] for r in rows if "gb_per_s" in r}
    for order in ORDERS[1:]:
        ratios = [
            rate / best[context, gb, f"flat, {g} layers a row, in order"]
            for (context, gb, system), rate in best.items()
            if system == f"flat, {g} layers a row, {order}"
            and (context, gb, f"flat, {g} layers a row, in order") in best
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
        found = {
            (r["order"], r["working_set_gb"]): r["gb_per_s"]
            for r in reads
            if (r["read_bytes"], r["layers_per_range"]) == (size, g)
        }
        for order in ORDERS[1:]:
            ratios = [
                found[order, gb] / rate for (o, gb), rate in found.items() if o == ORDERS[0] and (order, gb) in found
            ]
            if ratios:
                out[f"reads_of_{size}_{order.replace(' ', '_')}_over_in_order_worst"] = min(ratios)
        if found:
            out[f"reads_of_{size}_gb_per_s_most"] = max(found.values())
    return out


def plot_tlb(result: dict[str, Any], path: Path) -> None:
    """Draw bandwidth against the working set, of attention by context and of plain reads by size. Raises ConfigError
    without matplotlib."""
    attention, reads = (result["results"][name] for name in ("attention", "reads"))
    contexts = list(dict.fromkeys(row["context"] for row in attention))
    sizes = list(dict.fromkeys(row["read_bytes"] for row in reads))
    width = max(len(contexts), len(sizes), 1)
    figure, axes = pyplot().subplots(2, width, figsize=(6 * width, 9), layout="constrained", squeeze=False)
    for axis, context in zip(axes[0], contexts, strict=False):
        _by_working_set(axis, [row for row in attention if row["context"] == context])
        axis.set_title(f"decode attention, sequences of {context:,} tokens")
    for axis, size in zip(axes[1], sizes, strict=False):
        _by_working_set(axis, [row for row in reads if row["read_bytes"] == size])
        axis.set_title(f"random reads of {size:,} bytes")
    for axis in axes.flat:
        axis.set_visible(bool(axis.lines))
    if attention:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(figure, result, path)


def _by_working_set(axis: Any, rows: list[dict[str, Any]]) -> None:
    """A line a system."""
    colours = pyplot().get_cmap("tab20")
    for number, system in enumerate(dict.fromkeys(row["system"] for row in rows)):
        found = sorted((row["working_set_gb"], row["gb_per_s"]) for row in rows if row["system"] == system)
        dashed = "--" if system.startswith("blocks") else "-"
        axis.plot(*zip(*found, strict=True), dashed, marker=".", linewidth=0.9, label=system, color=colours(number))
    axis.set(xlabel="working set, GB", ylabel="GB/s", ylim=(0, None))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; 2 for what the user can mend, with one line that says what."""
    return run_script("tlb.py", str(__doc__), add_arguments, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
