"""Pinned host memory for what is not on the device: bounded, allocated lazily in large chunks, handed out in blocks.

Pinning costs the operating system some 0.1 s a gigabyte, so a chunk stays pinned until `close`. Blocks of one size mean
that nothing fragments; neighbours are joined to one span, so that a copy is as large as can be.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Iterable
from typing import NamedTuple

from trtllm_vattn.errors import DriverError, HostMemoryFull
from trtllm_vattn.vmm.base import Driver

logger = logging.getLogger(__name__)

CHUNK = 256 << 20
"""Bytes that are pinned at a time."""
BLOCK_PAGES = 4
"""A block is so many times the driver's granularity: 8 MiB on CUDA."""


class Span(NamedTuple):
    """`size` bytes of pinned host memory from `address` on."""

    address: int
    size: int


class HostPool:
    """Pinned host memory of one cache, or of an engine's weights.

    Parameters
    ----------
    driver : Driver
    budget : int
        Bytes that may be pinned; what is less than a block is not used.

    Attributes
    ----------
    held_bytes, used_bytes : int
        Bytes that are pinned, and those of them that are handed out.
    """

    def __init__(self, driver: Driver, budget: int) -> None:
        self.driver, self.budget = driver, budget
        self.block = BLOCK_PAGES * driver.granularity()
        self.held_bytes = self.used_bytes = 0
        self._chunks: list[Span] = []
        self._free: list[int] = []
        """Addresses of free blocks, in order."""
        self._ends: set[int] = set()
        """Ends of chunks: blocks on both sides of one are of two allocations, and no span is across it."""

    @property
    def available_bytes(self) -> int:
        """Bytes that `acquire` can hand out."""
        return self.budget // self.block * self.block - self.used_bytes

    def acquire(self, size: int) -> list[Span]:
        """Spans that add up to `size` bytes rounded up to whole blocks, in the order of their addresses.

        Raises
        ------
        HostMemoryFull
            So many bytes are not left under the budget, or the operating system pins no more; nothing changed.
        DriverError
            Pinning failed for another reason; nothing is handed out.
        """
        blocks = -(-size // self.block)
        if blocks * self.block > self.available_bytes:
            raise HostMemoryFull(
                f"{size:,} bytes of host memory asked for, {max(0, self.available_bytes):,} left of {self.budget:,}; "
                "raise host_memory, or end a suspended sequence"
            )
        while len(self._free) < blocks:
            self._pin_chunk()
        taken, self._free = self._free[:blocks], self._free[blocks:]
        self.used_bytes += blocks * self.block
        spans: list[Span] = []
        for address in taken:
            if spans and sum(spans[-1]) == address and address not in self._ends:
                spans[-1] = Span(spans[-1].address, spans[-1].size + self.block)
            else:
                spans.append(Span(address, self.block))
        return spans

    def _pin_chunk(self) -> None:
        size = min(CHUNK, self.budget - self.held_bytes) // self.block * self.block
        try:
            address = self.driver.create_host(size)
        except DriverError as error:
            if error.code != "CUDA_ERROR_OUT_OF_MEMORY":
                raise
            raise HostMemoryFull(
                f"the operating system pins no {size:,} bytes more, {self.held_bytes:,} are; lower host_memory"
            ) from error
        self._chunks.append(Span(address, size))
        self._ends.add(address + size)
        self.held_bytes += size
        self._free = sorted([*self._free, *range(address, address + size, self.block)])

    def release(self, spans: Iterable[Span]) -> None:
        """Take spans back; copies that use them are before all later ones, on the same stream."""
        for address, size in spans:
            for block in range(address, address + size, self.block):
                bisect.insort(self._free, block)
            self.used_bytes -= size

    def close(self) -> None:
        """Unpin everything, once no copy uses it any more. Idempotent; raises DriverError, to be called again."""
        while self._chunks:
            self.driver.release_host(*self._chunks[-1])
            chunk = self._chunks.pop()
            self.held_bytes -= chunk.size
            self._ends.discard(sum(chunk))
        self._free, self.used_bytes = [], 0
