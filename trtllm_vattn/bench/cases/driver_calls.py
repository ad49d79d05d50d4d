"""`bench alloc`: what does each driver call of virtual memory management cost, by size: alone, batched, beside a busy
device, and from several threads?

The calls that map memory (create, map, set_access) and those that give it back (unmap, release), for every size of
extent: one by one, with one set_access for many mappings, beside a busy device, and from several threads at once.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import product
from time import perf_counter
from typing import Any

import torch

from trtllm_vattn.arguments import adder, numbers
from trtllm_vattn.bench.harness.case import conclude
from trtllm_vattn.bench.harness.flags import add_device, add_results
from trtllm_vattn.bench.harness.timing import summarise
from trtllm_vattn.bench.publish.plots import plot_alloc
from trtllm_vattn.progress import counting
from trtllm_vattn.table import tabulate
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.open import open_driver

CALLS = ("create", "map", "set_access", "unmap", "release")
BATCH = 64
"""Mappings that one call makes accessible."""
THREADS = (1, 2, 4)
"""That call at once."""
THREAD_COLUMNS = "threads size lives_per_s" + "".join(f" us.{call}.p50 us.{call}.p99" for call in CALLS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench alloc`."""
    add_device(parser)
    add = adder(parser)
    text = "sizes of extents, in multiples of the driver's granularity: 2 MiB on a GPU, 4 KiB on the host"
    names = ("--multiples", "--granules")  # the second is an alias for 0.1
    parser.add_argument(*names, type=numbers, default="1,2,8,32,128", metavar="COUNT,...", help=text, dest="granules")
    add("--repeats", "TIMES", "times that each call is made", 200)
    add_results(parser, plots=True)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    driver = open_driver(args.device)
    granularity = driver.granularity()
    sizes = [number * granularity for number in args.granules]
    rows: list[dict[str, Any]] = []
    for busy in (False, True):
        with busy_device(args.device) if busy else nullcontext():
            for size in counting(sizes, "beside a busy device" if busy else "alone", "size"):
                rows += _rows("one by one", size, busy, one_by_one(driver, size, args.repeats))
            rows += _rows("batched", granularity, busy, batched(driver, granularity, BATCH, args.repeats // 10 + 1))
    threads = [
        {**threaded(driver, size, count, args.repeats), **lives(driver, size, count, args.repeats)}
        for count, size in counting([*product(THREADS, sizes)], "threads", "point")
    ]
    summary = {}
    for row in rows:
        if row["size"] == granularity:
            name = (
                f"{row['call']}_{'batched_' if row['how'] == 'batched' else ''}us_{'busy' if row['busy'] else 'idle'}"
            )
            summary[name] = row["us"]["p50"]
    for row in threads:
        if row["size"] == sizes[0]:
            summary[f"pairs_per_s_{row['threads']}_threads"] = row["pairs_per_s"]
            for call in CALLS:
                summary[f"{call}_us_{row['threads']}_threads"] = row["us"][call]["p50"]
    results = {"calls": rows, "threads": threads, "granule": granularity}
    shown = [tabulate(rows, "how size busy call us.p50 us.p99"), tabulate(threads, THREAD_COLUMNS)]
    return conclude("alloc", args, results, summary, "\n".join(shown), plot_alloc)


def one_by_one(driver: Driver, size: int, repeats: int) -> dict[str, list[float]]:
    """Microseconds of each call on an extent of `size` bytes, from create to release."""
    took: dict[str, list[float]] = {name: [] for name in CALLS}
    base = driver.reserve(size)
    try:
        for _ in range(repeats):
            handle = _timed(took["create"], driver.create, size)
            _timed(took["map"], driver.map, base, size, handle)
            _timed(took["set_access"], driver.set_access, base, size)
            _timed(took["unmap"], driver.unmap, base, size)
            _timed(took["release"], driver.release, handle)
    finally:
        driver.free(base, size)
    return took


def batched(driver: Driver, size: int, count: int, repeats: int) -> dict[str, list[float]]:
    """Microseconds an extent where one set_access, and one unmap, cover `count` of them."""
    took: dict[str, list[float]] = {"set_access": [], "unmap": []}
    base = driver.reserve(count * size)
    handles = [driver.create(size) for _ in range(count)]
    try:
        for _ in range(repeats):
            for i, handle in enumerate(handles):
                driver.map(base + i * size, size, handle)
            for name, call in (("set_access", driver.set_access), ("unmap", driver.unmap)):
                _timed(took[name], call, base, count * size)
    finally:
        for handle in handles:
            driver.release(handle)
        driver.free(base, count * size)
    return {name: [value / count for value in values] for name, values in took.items()}


def threaded(driver: Driver, size: int, count: int, repeats: int) -> dict[str, Any]:
    """Pairs of map+set_access and unmap a second, by `count` threads at once, each in a reservation of its own."""
    homes = [(driver.reserve(size), driver.create(size)) for _ in range(count)]

    def work(number: int) -> None:
        base, handle = homes[number]
        for _ in range(repeats):
            driver.map(base, size, handle)
            driver.set_access(base, size)
            driver.unmap(base, size)

    seconds = _at_once(count, work)
    for base, handle in homes:
        driver.release(handle)
        driver.free(base, size)
    pairs = count * repeats
    return {"threads": count, "size": size, "pairs_per_s": pairs / seconds, "us_a_pair": 1e6 * seconds / pairs}


def lives(driver: Driver, size: int, count: int, repeats: int) -> dict[str, Any]:
    """Microseconds of each call where `count` threads each create, map, unmap and release extents, and extents a
    second."""
    took: list[dict[str, list[float]]] = [{} for _ in range(count)]

    def work(number: int) -> None:
        took[number] = one_by_one(driver, size, repeats)

    seconds = _at_once(count, work)
    us = {call: summarise([value for each in took for value in each[call]]) for call in CALLS}
    return {"lives_per_s": count * repeats / seconds, "us": us}


def _at_once(count: int, work: Callable[[int], None]) -> float:
    """Seconds until so many threads, started together, have each done a piece of work."""
    ready = threading.Barrier(count + 1)

    def run(number: int) -> None:
        ready.wait()
        work(number)

    with ThreadPoolExecutor(count) as pool:
        pending = [pool.submit(run, number) for number in range(count)]
        ready.wait()
        started = perf_counter()
        for each in pending:
            each.result()
        return perf_counter() - started


def _timed(into: list[float], call: Callable[..., Any], *arguments: int) -> Any:
    started = perf_counter()
    answer = call(*arguments)
    into.append(1e6 * (perf_counter() - started))
    return answer


@contextmanager
def busy_device(device: str) -> Iterator[None]:
    """The device reads memory without a pause; on the host, another thread does."""
    stop = threading.Event()
    data = torch.zeros(1 << 28 if device != "cpu" else 1 << 20, device=device)
    stream = torch.cuda.Stream(device) if device != "cpu" else None  # type: ignore[no-untyped-call]

    def read() -> None:
        with torch.cuda.stream(stream):
            while not stop.is_set():
                for _ in range(8):
                    data.sum()
                if stream is not None:
                    stream.synchronize()

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _rows(how: str, size: int, busy: bool, took: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [{"how": how, "size": size, "busy": busy, "call": name, "us": summarise(us)} for name, us in took.items()]
