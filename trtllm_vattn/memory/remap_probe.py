"""Test a driver: do reads of mapped pages stay correct while other pages of the same reservation are remapped?

``python -m trtllm_vattn.memory.remap_probe`` prints a `RemapReport` as one line of JSON. Run it in a process of its
own: the fault that it looks for ends the process.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from time import perf_counter

import torch

from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.owners import Extent, Reservation
from trtllm_vattn.vmm.tensors import tensor_at

READ_PAGES, REMAPPED_PAGES = 32, 8
QUEUED_READS = 4
"""Reads queued on the device, so that it is never idle while the host remaps."""


@dataclass(frozen=True)
class RemapReport:
    """How often all pages were read, how many pages were mapped and unmapped meanwhile, and how many 64-bit words were
    read wrong; `error` says why the probe did not finish."""

    reads: int
    remaps: int
    wrong_words: int
    seconds: float
    error: str | None = None


class Readers:
    """Fills pages with known words, and counts the words that differ whenever it reads the pages."""

    FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)

    def __init__(self, pages: list[torch.Tensor]) -> None:
        self.pages = [page.view(torch.int64) for page in pages]
        device = pages[0].device
        words = torch.arange(sum(len(page) for page in self.pages), device=device) * self.FACTOR
        self.expected = list(torch.split(words, [len(page) for page in self.pages]))
        self.wrong = torch.zeros(1, dtype=torch.int64, device=device)
        for page, right in zip(self.pages, self.expected, strict=True):
            page.copy_(right)

    def read(self) -> None:
        for page, right in zip(self.pages, self.expected, strict=True):
            self.wrong += (page != right).sum()


def probe_remapping(driver: Driver, seconds: float, seed: int = 0) -> RemapReport:
    """For this many seconds, map and unmap pages that lie between pages which are being read."""
    granularity = driver.granularity()
    generator = random.Random(seed)
    with ExitStack() as closing:
        reservation = Reservation(driver, (READ_PAGES + REMAPPED_PAGES) * granularity)
        closing.callback(reservation.close)
        order = list(range(READ_PAGES + REMAPPED_PAGES))
        generator.shuffle(order)
        pages = []
        for page in order[REMAPPED_PAGES:]:
            extent = Extent(driver, granularity)
            closing.callback(extent.close)
            (mapping,) = reservation.map(page * granularity, [extent])
            closing.callback(mapping.close)
            pages.append(tensor_at(mapping.address, granularity, driver.device, owner=mapping))
        spare = [Extent(driver, granularity) for _ in range(REMAPPED_PAGES)]
        for extent in spare:
            closing.callback(extent.close)

        def remap() -> None:
            page = generator.choice(order[:REMAPPED_PAGES])
            (mapping,) = reservation.map(page * granularity, [generator.choice(spare)])
            mapping.close()

        beside = _beside_device if driver.device.startswith("cuda") else _beside_thread
        return beside(Readers(pages), remap, seconds)


def _beside_device(readers: Readers, remap: Callable[[], None], seconds: float) -> RemapReport:
    """A captured graph reads; its replays are queued ahead of the host."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        readers.read()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        readers.read()
    queued: deque[torch.cuda.Event] = deque()
    reads = remaps = 0
    started = perf_counter()
    while perf_counter() - started < seconds:
        while len(queued) < QUEUED_READS:
            with torch.cuda.stream(stream):
                graph.replay()
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(stream)
            queued.append(event)
        remap()
        remaps += 1
        while queued and queued[0].query():  # type: ignore[no-untyped-call]
            queued.popleft()
            reads += 1
    torch.cuda.synchronize()
    return RemapReport(reads + len(queued), remaps, int(readers.wrong.item()), perf_counter() - started)


def _beside_thread(readers: Readers, remap: Callable[[], None], seconds: float) -> RemapReport:
    """On the host a second thread reads."""
    stop = threading.Event()
    reads = remaps = 0

    def read() -> None:
        nonlocal reads
        while not stop.is_set():
            readers.read()
            reads += 1

    thread = threading.Thread(target=read)
    started = perf_counter()
    thread.start()
    try:
        while perf_counter() - started < seconds or not reads:
            remap()
            remaps += 1
    finally:
        stop.set()
        thread.join()
    return RemapReport(reads, remaps, int(readers.wrong.item()), perf_counter() - started)


def main() -> None:
    """Remap as the arguments say, and print the report as JSON."""
    parser = argparse.ArgumentParser(description="Remap pages while others are read; report wrong words.")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(asdict(probe_remapping(open_driver(args.device), args.seconds, args.seed))), flush=True)


if __name__ == "__main__":
    main()
