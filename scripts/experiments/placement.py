"""Does it pay to place hot pages together? Random small reads, most of them from few pages, by where those pages lie.

An experiment: ``python scripts/experiments/placement.py --help``. Single pages are mapped by arrangements that differ
in the order of memory (of creation) and of addresses: all in a random order of memory, or in order, with the hot pages
anywhere; hot pages the first in memory, the first in addresses, or both, where the cold ones stay in a random order.
What the planner's formula of TLB misses says of each stands beside it (trtllm_vattn/planner/README.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from random_reads import check_size, reader

from trtllm_vattn.arguments import adder
from trtllm_vattn.bench.harness.case import Part, Recording
from trtllm_vattn.bench.harness.flags import add_device, add_results
from trtllm_vattn.bench.harness.timing import summarise, timed_ms
from trtllm_vattn.cache.calibrated import card_of
from trtllm_vattn.cli.parser import run_script
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.planner.calibration import find, named
from trtllm_vattn.table import tabulate
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.open import open_driver

ARRANGEMENTS = ("scattered", "in order", "hot first in memory", "hot first in addresses", "hot together")
READ_AT_ONCE = 1 << 30
"""Bytes of a reading; many times what a cache of the device holds."""
ON_HOST = 1 << 16
SPARE = 4 << 30
"""Bytes of the device that stay free: for the context, kernels and the rows' addresses."""
COLUMNS = "working_set_gb hot_gb read_bytes arrangement gb_per_s planned_gb_per_s"


class Arrangement(NamedTuple):
    """Which extent each page of addresses gets, by order of creation, and which pages are hot."""

    extents: np.ndarray
    hot: np.ndarray


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the experiment."""
    add = adder(parser, gpu := add_device(parser))
    usual = "64GiB,112GiB" if gpu else "1MiB"
    add("--working-sets", "BYTES,...", "that is read at random, all of it", usual)
    add("--hot-pages", "SHARE", "part of the pages that are hot", 0.2)
    add("--hot-reads", "SHARE", "part of the reads that are theirs", 0.9)
    add("--read-bytes", "BYTES,...", "sizes of reads", "128,512,2048")
    add("--repeats", "TIMES", "times that each reading is timed", 5)
    add_results(parser)


def run(args: argparse.Namespace) -> int:
    """Run the experiment."""
    for size in args.read_bytes:
        check_size(size)
    if not 0 < args.hot_pages < 1:
        raise ConfigError(f"--hot-pages is {args.hot_pages}; give a part above 0 and below 1")
    recording = Recording("placement", args, "python scripts/experiments/placement.py")
    driver = open_driver(args.device)

    def of(working_set: int) -> Part:
        def measure(recording: Recording) -> list[dict[str, Any]]:
            with extents(driver, working_set) as (base, handles):
                for name in ARRANGEMENTS:
                    recording.say(f"{working_set / 1e9:.1f} GB, {name}")
                    for row in measured(args, driver, base, handles, name):
                        recording.add("runs", row)
            return [summary(recording.results["runs"])]

        return measure

    recording.measure({f"{size / 1e9:.1f} GB": of(size) for size in args.working_sets})
    return recording.conclude(tabulate(recording.results.get("runs", []), COLUMNS))


@contextmanager
def extents(driver: Driver, working_set: int) -> Iterator[tuple[int, list[int]]]:
    """Addresses for a working set of whole pages, and as many single pages of memory. Raises ConfigError where the
    device has less free."""
    granularity = driver.granularity()
    count = working_set // granularity
    if count < 10:
        raise ConfigError(
            f"a working set of {working_set:,} bytes has {count} pages of {granularity:,}; give 10 or more"
        )
    if driver.device != "cpu":
        free = torch.cuda.mem_get_info(torch.device(driver.device))[0] - SPARE
        if count * granularity > free:
            raise ConfigError(
                f"a working set of {working_set:,} bytes asked for, {max(0, free):,} can be had; give less"
            )
    base = driver.reserve(count * granularity)
    handles: list[int] = []
    try:
        handles.extend(driver.create(granularity) for _ in range(count))
        yield base, handles
    finally:
        for handle in handles:
            driver.release(handle)
        driver.free(base, count * granularity)


def arrange(name: str, pages: int, hot_pages: float, seed: int) -> Arrangement:
    """One of the `ARRANGEMENTS` of so many pages."""
    random = np.random.default_rng(seed)
    count = max(1, min(pages - 1, round(hot_pages * pages)))
    anywhere = np.sort(random.permutation(pages)[:count])
    hot = np.arange(count) if name in ("hot first in addresses", "hot together") else anywhere
    if name == "in order":
        return Arrangement(np.arange(pages), hot)
    if name in ("scattered", "hot first in addresses"):
        return Arrangement(random.permutation(pages), hot)
    found = np.empty(pages, np.int64)
    found[hot] = np.arange(count)
    found[np.setdiff1d(np.arange(pages), hot)] = count + random.permutation(pages - count)
    return Arrangement(found, hot)


@contextmanager
def mapped(driver: Driver, base: int, handles: list[int], arrangement: Arrangement) -> Iterator[None]:
    """All pages of addresses, backed by the extents of an arrangement."""
    granularity, done = driver.granularity(), 0
    try:
        for page, extent in enumerate(arrangement.extents.tolist()):
            driver.map(base + page * granularity, granularity, handles[extent])
            done += 1
        driver.set_access(base, done * granularity)
        yield
    finally:
        if done:
            driver.unmap(base, done * granularity)


def measured(
    args: argparse.Namespace, driver: Driver, base: int, handles: list[int], name: str
) -> Iterator[dict[str, Any]]:
    """Gigabytes a second of reads of each size, pages mapped by one arrangement."""
    granularity, pages = driver.granularity(), len(handles)
    arrangement = arrange(name, pages, args.hot_pages, args.seed)
    with mapped(driver, base, handles, arrangement):
        for size in args.read_bytes:
            rows = some_rows(driver, base, arrangement, size, args.hot_reads, args.seed)
            work, nbytes = reader(rows, size)
            rates = [nbytes / (ms / 1e3) / 1e9 for ms in timed_ms(work, args.repeats, rows.device)]
            yield {
                "working_set_gb": pages * granularity / 1e9,
                "hot_gb": len(arrangement.hot) * granularity / 1e9,
                "read_bytes": size,
                "arrangement": name,
                "gb_per_s": summarise(rates)["p50"],
                "rates": summarise(rates),
                "planned_gb_per_s": planned(driver, pages * granularity, size, name),
            }
            del rows, work


def some_rows(
    driver: Driver, base: int, arrangement: Arrangement, size: int, hot_reads: float, seed: int
) -> torch.Tensor:
    """int64 ``[rows]``: addresses of rows of `size` bytes at random, such a part of them in hot pages."""
    granularity, device = driver.granularity(), torch.device(driver.device)
    if size > granularity:
        raise ConfigError(f"reads of {size:,} bytes asked for, a page has {granularity:,}; give less")
    count = (READ_AT_ONCE if device.type == "cuda" else ON_HOST) // size
    generator = torch.Generator(device).manual_seed(seed)
    pages = len(arrangement.extents)

    def drawn(among: int, many: int = count) -> torch.Tensor:
        return torch.randint(0, among, (many,), device=device, generator=generator)

    hot = torch.from_numpy(arrangement.hot).to(device)
    cold = torch.from_numpy(np.setdiff1d(np.arange(pages), arrangement.hot)).to(device)
    is_hot = torch.rand(count, device=device, generator=generator) < hot_reads
    page = torch.where(is_hot, hot[drawn(len(hot))], cold[drawn(len(cold))])
    return base + page * granularity + drawn(granularity // size) * size


def planned(driver: Driver, working_set: int, size: int, name: str) -> float:
    """What the formula says where hot pages were no different from others: uniform reads, scattered or in order."""
    numbers = find(card_of(driver.device)) or named("h200")
    reach = numbers["tlb_reach_bytes"]
    walk_ns = numbers["tlb_walk_ns" if name == "in order" else "tlb_walk_scattered_ns"]
    ns = max(1e9 * size / numbers["read_bytes_per_s"], walk_ns * max(0.0, 1 - reach / working_set))
    return size / ns


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What each arrangement gains over a random one, and what placing hot pages gains over plain order, at most."""
    rates = {(r["working_set_gb"], r["read_bytes"], r["arrangement"]): r["gb_per_s"] for r in rows}
    points = list(dict.fromkeys((gb, size) for gb, size, _ in rates))
    out = {}
    for name in ARRANGEMENTS[1:]:
        gains = [rates[gb, size, name] / rates[gb, size, "scattered"] for gb, size in points]
        out[f"{name.replace(' ', '_')}_over_scattered_most"] = max(gains)
    over = [rates[gb, size, "hot together"] / rates[gb, size, "in order"] for gb, size in points]
    out |= {"hot_together_over_in_order_most": max(over), "hot_together_over_in_order_least": min(over)}
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; 2 for what the user can mend, with one line that says what."""
    return run_script("placement.py", str(__doc__), add_arguments, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
