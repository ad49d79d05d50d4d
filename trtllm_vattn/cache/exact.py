"""`ExactBlockKVCache`: a block cache in which a sequence holds the memory of its own tokens and no more.

Whoever promises blocks to a scheduler needs that: memory that was mapped ahead for one sequence never makes the next
admission or growth fail while the budget would allow it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from trtllm_vattn.cache.base import CacheShape, SequenceId
from trtllm_vattn.cache.blocks import BlockKVCache
from trtllm_vattn.memory.reclaim import drop_surplus, fit
from trtllm_vattn.vmm.base import Driver, Fence


class AllFences(Fence):
    """Several fences as one: done when each of them is."""

    def __init__(self, fences: Iterable[Fence]) -> None:
        self._fences = list(fences)

    def done(self) -> bool:
        return all(fence.done() for fence in self._fences)

    def wait(self) -> None:
        for fence in self._fences:
            fence.wait()


class ExactBlockKVCache(BlockKVCache):
    """`BlockKVCache` that admits and grows every sequence whose need is within the budget.

    Attributes
    ----------
    fence_streams : list of int
        CUDA streams that fences cover besides torch's current one.
    """

    def __init__(
        self, shape: CacheShape, driver: Driver, layers_per_range: int, lookahead: int, tokens_per_block: int
    ) -> None:
        self.fence_streams: list[int] = []
        super().__init__(shape, driver, None, layers_per_range, lookahead, tokens_per_block)

    @property
    def sequences(self) -> Mapping[SequenceId, int]:
        """Slots by sequence."""
        return self._slot_of

    def _fence(self) -> Fence:
        fences = [super()._fence(), *(self.driver.record(stream) for stream in self.fence_streams)]
        return fences[0] if len(fences) == 1 else AllFences(fences)

    def _claim(self, tokens: int) -> int:
        with self._gate:
            self._make_room(self.layout.bytes_for(tokens) * self.layout.num_ranges, self.lengths)
            slot = super()._claim(tokens)
            self._admission_maps += fit(self.arena, slot, tokens)
            return slot

    def shrink_towards(self, budget: int) -> int:
        """Set the budget to `budget` bytes, or as near above it as running sequences allow; returns the budget set.

        Memory beyond it that is parked or mapped ahead goes back to the driver.
        """
        with self._gate:
            pool = self.arena.pool
            if budget < pool.held_bytes:
                drop_surplus(self.arena, self.lengths.tolist(), self._fence())
                self.arena.settle(wait=True)
            used = pool.held_bytes - pool.stock_bytes - self.arena.parked_bytes
            self.set_budget(max(budget, used))
            return pool.budget

    def mapped_tensors(self) -> Iterator[torch.Tensor]:
        """Flat views, of the cache's dtype, over all memory that is mapped: one for each slot in each range."""
        itemsize = self.shape.dtype.itemsize
        for flat in self._flat:
            for index, slot in enumerate(self.arena.slots):
                start = index * self.layout.slot_stride
                yield flat[start : start + slot.mapped // itemsize * itemsize].view(self.shape.dtype)
