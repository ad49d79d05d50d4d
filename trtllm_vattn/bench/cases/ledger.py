"""Caches that hold no memory and only count bytes, so that any machine can simulate a large one."""

from __future__ import annotations

import itertools

import torch

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.manager import AllFences
from trtllm_vattn.cache.paged import PagedCache
from trtllm_vattn.vmm.base import Driver, Fence, MappingCount


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
        return AllFences(())


class LedgerCache(PagedCache):
    """Block tables without pools: blocks of `block_size` tokens are counted under a budget; one of max_seq_len tokens
    reserves the maximum, as Orca did."""

    def __init__(self, shape: CacheShape, budget: int, block_size: int) -> None:
        super().__init__(shape, "cpu", block_size, budget // (block_size * shape.token_bytes))

    def _make_pools(self, size: tuple[int, int, int, int]) -> list[list[torch.Tensor]]:
        return []

    def _publish(self) -> None:
        """Nobody reads the table."""
