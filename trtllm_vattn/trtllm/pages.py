"""The memory side of the adapter: TensorRT-LLM's requests in slots, and how many blocks a budget backs.

Block 0 of every pool is mapped for good: slot 0 is never a request's. Tails of tables and dummy requests point there,
and so does whoever takes 0 for a block that is safe to touch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import numpy as np
import torch

from trtllm_vattn.cache.base import CacheShape, SequenceId
from trtllm_vattn.cache.blocks import BlockKVCache
from trtllm_vattn.memory.reclaim import drop_surplus, fit
from trtllm_vattn.vmm.base import Driver, Fence

SAFE = "the block that is always mapped"
"""What slot 0 holds."""


class _Both(Fence):
    """Several fences as one."""

    def __init__(self, fences: Iterable[Fence]) -> None:
        self._fences = list(fences)

    def done(self) -> bool:
        return all(fence.done() for fence in self._fences)

    def wait(self) -> None:
        for fence in self._fences:
            fence.wait()


class ExactBlocks(BlockKVCache):
    """`BlockKVCache` that can always give what its sequences need, if that is within the budget.

    A sequence gets its need and no more; what is mapped ahead of others is taken back where memory is short. A fence
    covers `streams` besides torch's current one.
    """

    def __init__(
        self, shape: CacheShape, driver: Driver, layers_per_range: int, lookahead: int, tokens_per_block: int
    ) -> None:
        self.streams: list[int] = []
        super().__init__(shape, driver, None, layers_per_range, lookahead, tokens_per_block)

    @property
    def sequences(self) -> Mapping[SequenceId, int]:
        """Slots by sequence."""
        return self._slot_of

    def _fence(self) -> Fence:
        fences = [super()._fence(), *(self.driver.record(stream) for stream in self.streams)]
        return fences[0] if len(fences) == 1 else _Both(fences)

    def _claim(self, tokens: int) -> int:
        with self._gate:
            self._make_room(self.layout.bytes_for(tokens) * self.layout.num_ranges, self.lengths)
            slot = super()._claim(tokens)
            self._admission_maps += fit(self.arena, slot, tokens)
            return slot

    def drop_ahead(self) -> int:
        """Take back what is mapped beyond running sequences' lengths; returns the bytes."""
        return self._run(self._drop_ahead)

    def _drop_ahead(self) -> int:
        with self._gate:
            return drop_surplus(self.arena, self.lengths.tolist(), self._fence())


class Pages:
    """Requests of one TensorRT-LLM manager, over memory at fixed addresses.

    Parameters
    ----------
    shape : CacheShape
        Of the requests; there is one slot more, slot 0.
    layers_per_range, lookahead, tokens_per_block : int
        As `BlockKVCache`.

    Raises
    ------
    ConfigError
        The blocks are too many for the kernels' 31-bit offsets.
    AddressSpaceExhausted, DriverError, OutOfPages
        The driver refused; nothing is left behind.
    """

    def __init__(
        self, shape: CacheShape, driver: Driver, layers_per_range: int, lookahead: int, tokens_per_block: int
    ) -> None:
        wider = CacheShape(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            num_slots=shape.num_slots + 1,
            max_seq_len=shape.max_seq_len,
            kv_factor=shape.kv_factor,
        )
        self.max_requests = shape.num_slots
        with ExitStack() as undo:
            self.cache = ExactBlocks(wider, driver, layers_per_range, lookahead, tokens_per_block)
            undo.callback(self.cache.close)
            self.cache.set_budget(self.least_bytes)
            self.cache.admit(SAFE, 1)
            self._zero_safe_block()
            undo.pop_all()

    def _zero_safe_block(self) -> None:
        """Kernels may multiply what they load there by zero, and NaN by zero is NaN."""
        for layer in range(self.cache.shape.num_layers):
            self.cache.blocks(layer)[0].zero_()

    # -- arithmetic ------------------------------------------------------------------------------------------------

    @property
    def least_bytes(self) -> int:
        """Bytes without which there is no cache: the safe block and the dummy slot's."""
        return 2 * self.cache.layout.least_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all pools."""
        return self.cache.layout.block_bytes * self.cache.layout.num_ranges

    @property
    def spare_bytes(self) -> int:
        """Bytes that every request may lose to rounding its blocks to pages."""
        layout = self.cache.layout
        return (layout.granule - math.gcd(layout.granule, layout.block_bytes)) * layout.num_ranges

    def blocks_in(self, budget: int) -> int:
        """Blocks that a budget backs, however requests share them."""
        usable = budget - self.least_bytes - self.max_requests * self.spare_bytes
        return max(0, usable // self.block_bytes)

    def bytes_of(self, blocks: int) -> int:
        """The budget that backs so many blocks."""
        return self.least_bytes + self.max_requests * self.spare_bytes + blocks * self.block_bytes

    # -- requests --------------------------------------------------------------------------------------------------

    def holds(self, request: int) -> bool:
        """Whether a request has a slot."""
        return request in self.cache.sequences

    def step(self, admitted: Mapping[int, int], grown: Mapping[int, int]) -> None:
        """Back a batch: new requests with their tokens, and so many tokens more for others; for all or for none.

        Raises OutOfPages, NoFreeSlot, SequenceTooLong, UnknownSequence; nothing changed.
        """
        cache = self.cache
        with ExitStack() as undo:
            for request, tokens in admitted.items():
                cache.admit(request, tokens)
                undo.callback(cache.release, request)
            lengths = np.zeros_like(cache.lengths)
            for request, tokens in grown.items():
                slot = cache.slot_of(request)
                lengths[slot] = cache.lengths[slot] + tokens
            cache.prepare_step(lengths)
            undo.pop_all()

    def rewind(self, request: int, tokens: int) -> None:
        """Shorten a request by so many tokens; its memory stays."""
        self.cache.truncate(request, int(self.cache.lengths[self.cache.slot_of(request)]) - tokens)

    def block_ids(self, request: int) -> list[int]:
        """The numbers of a request's blocks, in order."""
        slot, layout = self.cache.slot_of(request), self.cache.layout
        first = slot * layout.blocks_per_slot
        return list(range(first, first + layout.blocks_of(int(self.cache.lengths[slot]))))

    # -- budget ----------------------------------------------------------------------------------------------------

    def approach(self, target: int) -> int:
        """Set the budget to `target`, or as near above it as running requests allow; returns what it is then.

        What is parked, or mapped ahead, beyond it goes back to the device.
        """
        cache, pool = self.cache, self.cache.arena.pool
        if target < pool.held_bytes:
            cache.drop_ahead()
            cache.arena.settle(wait=True)
        used = pool.held_bytes - pool.stock_bytes - cache.arena.parked_bytes
        cache.set_budget(max(target, used, self.least_bytes))
        return pool.budget

    # -- contents --------------------------------------------------------------------------------------------------

    def has_invalid(self, fill_with_zero: bool = False) -> bool:
        """Whether any mapped element is NaN or infinite; afterwards all are zero, if so asked.

        Only what is mapped is read. Raises nothing for dtypes that torch cannot test: they count as valid.
        """
        arena, itemsize = self.cache.arena, self.cache.shape.dtype.itemsize
        wrong = False
        for flat in self.cache.storages()[1:]:
            for index, slot in enumerate(arena.slots):
                start = index * self.cache.layout.slot_stride
                bytes_ = flat[start : start + slot.mapped // itemsize * itemsize]
                values = bytes_.view(self.cache.shape.dtype)
                if self.cache.shape.dtype is not torch.float8_e4m3fn:
                    wrong = wrong or not bool(torch.isfinite(values).all())
                if fill_with_zero:
                    bytes_.zero_()
        return wrong
