"""Caches that hold no memory and only count bytes, so that any machine can simulate a large one."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from trtllm_vattn.cache.base import CacheShape, CacheStats, FlatKV
from trtllm_vattn.cache.slotted import SlottedCache
from trtllm_vattn.errors import ConfigError, KVCacheOutOfMemory
from trtllm_vattn.vmm.base import Driver, Fence, MappingCount


class _Done(Fence):
    def done(self) -> bool:
        return True

    def wait(self) -> None:
        """Nothing runs."""


class LedgerDriver(Driver):
    """A driver that maps nothing; `handles` holds the sizes of what was created and not released."""

    device = "cpu"

    def __init__(self, granularity: int = 2 << 20) -> None:
        self._granularity, self.mappings = granularity, MappingCount()
        self._next = itertools.count(1)
        self._address = 1 << 40
        self.handles: dict[int, int] = {}

    def granularity(self) -> int:
        return self._granularity

    def reserve(self, size: int) -> int:
        base = self._address
        self._address += size
        return base

    def free(self, address: int, size: int) -> None:
        """Addresses are not used again."""

    def create(self, size: int) -> int:
        handle = next(self._next)
        self.handles[handle] = size
        return handle

    def release(self, handle: int) -> None:
        del self.handles[handle]

    def map(self, address: int, size: int, handle: int) -> None:
        """No memory."""

    def set_access(self, address: int, size: int) -> None:
        """No memory."""

    def unmap(self, address: int, size: int) -> None:
        """No memory."""

    def record(self, stream: int) -> Fence:
        return _Done()


class LedgerCache(SlottedCache):
    """Counts blocks of `block_size` tokens under a budget; a `block_size` of max_seq_len reserves the maximum, as Orca
    did."""

    def __init__(self, shape: CacheShape, budget: int, block_size: int) -> None:
        super().__init__(shape, torch.device("cpu"))
        self.block_size = block_size
        self._block_bytes = block_size * shape.token_bytes
        self._blocks = budget // self._block_bytes
        self._held = np.zeros(shape.num_slots, np.int64)

    def _allocate(self, tokens: int) -> int:
        slot = self._lowest_free()
        lengths = np.zeros_like(self.lengths)
        lengths[slot] = tokens
        self._grow(lengths)
        return slot

    def _grow(self, lengths: np.ndarray) -> None:
        wanted = np.maximum(self._held, -(-lengths // self.block_size))
        if wanted.sum() > self._blocks:
            raise KVCacheOutOfMemory(f"{wanted.sum()} blocks wanted of {self._blocks}; release or preempt a sequence")
        self._held[:] = wanted
        np.minimum(wanted * self.block_size, self.shape.max_seq_len, out=self.frontiers)

    def _release(self, slot: int) -> None:
        self._held[slot] = self.frontiers[slot] = 0

    def _clear(self) -> None:
        self._held[:] = self.frontiers[:] = 0

    def _free(self) -> None:
        """No memory."""

    def layer(self, layer: int) -> FlatKV:
        raise ConfigError("a ledger has no memory; use a cache of cache.select")

    def storages(self) -> list[torch.Tensor]:
        return []

    def stats(self) -> CacheStats:
        held = int(self._held.sum()) * self._block_bytes
        return CacheStats(
            sequences=len(self._slot_of),
            live_bytes=self.live_bytes,
            mapped_bytes=held,
            parked_bytes=0,
            held_bytes=held,
            budget_bytes=self._blocks * self._block_bytes,
        )
