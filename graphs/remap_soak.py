"""The start-up soak: does reading mapped pages stay right while others in the same reservation come and go?

``python -m trtllm_vattn.graphs.remap_soak`` prints its report as one line of JSON. It belongs in a process of its own:
what it looks for may end the process.
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

READ_PAGES, CHURNED_PAGES = 32, 8
AHEAD = 4
"""Reads that the device has before it, so that it is never idle while the host remaps."""


@dataclass(frozen=True)
class SoakReport:
    """How often all read pages were read, how many mappings were made and taken away meanwhile, and how many 64-bit
    words read wrong; `error` says what kept the soak from its end."""

    reads: int
    remaps: int
    wrong_words: int
    seconds: float
    error: str | None = None


class Readers:
    """Reads pages again and again and counts words that are not their own index times a number."""

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


def soak(driver: Driver, seconds: float, seed: int = 0) -> SoakReport:
    """Remap pages between the pages being read, for so many seconds."""
    granularity = driver.granularity()
    generator = random.Random(seed)
    with ExitStack() as closing:
        reservation = Reservation(driver, (READ_PAGES + CHURNED_PAGES) * granularity)
        closing.callback(reservation.close)
        order = list(range(READ_PAGES + CHURNED_PAGES))
        generator.shuffle(order)
        pages = []
        for place in order[CHURNED_PAGES:]:
            extent = Extent(driver, granularity)
            closing.callback(extent.close)
            (mapping,) = reservation.map(place * granularity, [extent])
            closing.callback(mapping.close)
            pages.append(tensor_at(mapping.address, granularity, driver.device, owner=mapping))
        spare = [Extent(driver, granularity) for _ in range(CHURNED_PAGES)]
        for extent in spare:
            closing.callback(extent.close)

        def churn() -> None:
            place = generator.choice(order[:CHURNED_PAGES])
            (mapping,) = reservation.map(place * granularity, [generator.choice(spare)])
            mapping.close()

        beside = _beside_device if driver.device.startswith("cuda") else _beside_thread
        return beside(Readers(pages), churn, seconds)


def _beside_device(readers: Readers, churn: Callable[[], None], seconds: float) -> SoakReport:
    """The reads are a captured graph, replayed ahead of the host."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        readers.read()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        readers.read()
    ahead: deque[torch.cuda.Event] = deque()
    reads = remaps = 0
    started = perf_counter()
    while perf_counter() - started < seconds:
        while len(ahead) < AHEAD:
            with torch.cuda.stream(stream):
                graph.replay()
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(stream)
            ahead.append(event)
        churn()
        remaps += 1
        while ahead and ahead[0].query():  # type: ignore[no-untyped-call]
            ahead.popleft()
            reads += 1
    torch.cuda.synchronize()
    return SoakReport(reads + len(ahead), remaps, int(readers.wrong.item()), perf_counter() - started)


def _beside_thread(readers: Readers, churn: Callable[[], None], seconds: float) -> SoakReport:
    """On the host a thread reads."""
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
            churn()
            remaps += 1
    finally:
        stop.set()
        thread.join()
    return SoakReport(reads, remaps, int(readers.wrong.item()), perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description="Remap pages beside running reads; report what was read wrong.")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(asdict(soak(open_driver(args.device), args.seconds, args.seed))), flush=True)


if __name__ == "__main__":
    main()
