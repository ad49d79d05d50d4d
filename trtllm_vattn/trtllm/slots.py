"""Slots for TensorRT-LLM's requests in a cache at fixed addresses, and how many blocks a budget of bytes backs.

Slot 0 never belongs to a request: its first block, which is block 0 of every pool, stays mapped (`NULL_BLOCK`). Dummy
requests and the unused entries of block tables point there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.blocks import BlockKVCache
from trtllm_vattn.cache.config import CacheConfig, Layout
from trtllm_vattn.memory.layout import INT31, BlockLayout
from trtllm_vattn.vmm.base import Driver

NULL_BLOCK = 0
"""The block of every pool that is always mapped."""
FEWEST_KEPT, MOST_KEPT_BYTES = 64, 1 << 44
"""Slots beside the running requests' for what ended ones leave, and the addresses that they may take: a process has
2**47."""


def slots_to_keep(layout: BlockLayout) -> int:
    """Slots for what ended requests leave, beside those of a layout: four times as many, or fewer where the kernels'
    31-bit offsets or addresses do not reach further."""
    blocks = layout.blocks_per_slot
    slots = min(INT31 // (blocks * layout.layers_per_range * layout.kv_factor), (INT31 - 1) // blocks // 2) - 2
    by_addresses = MOST_KEPT_BYTES // (layout.slot_stride * layout.num_ranges)
    return max(0, min(max(FEWEST_KEPT, 4 * layout.num_slots), slots - layout.num_slots, by_addresses))


class RequestSlots:
    """Slots of one manager's requests.

    Parameters
    ----------
    shape : CacheShape
        `num_slots` is the number of requests; the cache gets one slot more, slot 0.
    layers_per_range, lookahead, tokens_per_block, fence_streams
        As `CacheConfig` has them.
    keeps : bool
        Have slots for what ended requests leave, too.

    Raises
    ------
    ConfigError
        The blocks are too many for the kernels' 31-bit offsets.
    AddressSpaceExhausted, DriverError, KVCacheOutOfMemory
        The driver refused; nothing is left behind.
    """

    def __init__(
        self,
        shape: CacheShape,
        driver: Driver,
        layers_per_range: int,
        lookahead: int,
        tokens_per_block: int,
        fence_streams: tuple[int, ...] = (),
        keeps: bool = False,
    ) -> None:
        self.max_requests = shape.num_slots
        shape = replace(shape, num_slots=shape.num_slots + 1)
        if keeps:
            layout = BlockLayout(
                num_layers=shape.num_layers,
                layers_per_range=layers_per_range,
                layer_token_bytes=shape.layer_token_bytes,
                max_seq_len=shape.max_seq_len,
                num_slots=shape.num_slots,
                granularity=driver.granularity(),
                tokens_per_block=tokens_per_block,
                kv_factor=shape.kv_factor,
            )
            shape = replace(shape, num_slots=shape.num_slots + slots_to_keep(layout))
        with ExitStack() as undo:
            config = CacheConfig(
                layout=Layout.BLOCKS,
                layers_per_range=layers_per_range,
                tokens_per_block=tokens_per_block,
                exact_admission=True,
                fence_streams=fence_streams,
                lookahead=lookahead,
            )
            self.cache = BlockKVCache(shape, driver, config=config)
            undo.callback(self.cache.close)
            self.cache.set_budget(self.least_bytes)
            self.cache.admit("null block", 1)
            for layer in range(shape.num_layers):
                # Kernels may multiply what they load there by zero, and NaN times zero is NaN.
                self.cache.blocks(layer)[NULL_BLOCK].zero_()
            undo.pop_all()

    # -- blocks and bytes ------------------------------------------------------------------------------------------

    @property
    def least_bytes(self) -> int:
        """Bytes that the cache takes without any request: the null block and the dummy slot."""
        return 2 * self.cache.layout.least_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all pools."""
        return self.cache.layout.block_bytes * self.cache.layout.num_ranges

    @property
    def rounding_bytes(self) -> int:
        """Bytes that one request may lose by rounding its blocks up to pages, in all pools."""
        layout = self.cache.layout
        return (layout.granularity - math.gcd(layout.granularity, layout.block_bytes)) * layout.num_ranges

    def blocks_backed_by(self, budget: int) -> int:
        """Blocks that a budget of bytes backs, however requests share them."""
        usable = budget - self.least_bytes - self.max_requests * self.rounding_bytes
        return max(0, usable // self.block_bytes)

    def budget_for(self, blocks: int) -> int:
        """The least budget, in bytes, that backs so many blocks."""
        return self.least_bytes + self.max_requests * self.rounding_bytes + blocks * self.block_bytes

    # -- requests --------------------------------------------------------------------------------------------------

    def holds(self, request: int) -> bool:
        """Whether a request has a slot."""
        return request in self.cache.sequences

    def length_of(self, request: int) -> int:
        """Tokens of a request. Raises UnknownSequence."""
        return int(self.cache.lengths[self.cache.slot_of(request)])

    def prepare_step(
        self,
        admitted: Mapping[int, int],
        grown: Mapping[int, int],
        admit: Callable[[int, int], object] | None = None,
        release: Callable[[int], None] | None = None,
    ) -> None:
        """Back the tokens of a step: tokens of new requests, and additional tokens of running ones, by request id.

        New requests are given slots by `admit`, and those are taken again by `release`; None are the cache's own.
        Raises KVCacheOutOfMemory, NoFreeSlot, SequenceTooLong, UnknownSequence; nothing changed then.
        """
        cache = self.cache
        admit, release = admit or cache.admit, release or cache.release
        with ExitStack() as undo:
            for request, tokens in admitted.items():
                admit(request, tokens)
                undo.callback(release, request)
            lengths = np.zeros_like(cache.lengths)
            for request, tokens in grown.items():
                slot = cache.slot_of(request)
                lengths[slot] = cache.lengths[slot] + tokens
            cache.prepare_step(lengths)
            undo.pop_all()

    def rewind(self, request: int, tokens: int) -> None:
        """Shorten a request by so many tokens; its memory stays mapped."""
        self.cache.truncate(request, self.length_of(request) - tokens)

    def block_ids(self, request: int) -> list[int]:
        """The numbers of a request's blocks, in order."""
        layout = self.cache.layout
        first = self.cache.slot_of(request) * layout.blocks_per_slot
        return list(range(first, first + layout.blocks_of(self.length_of(request))))

    def has_invalid(self, fill_with_zero: bool = False) -> bool:
        """Whether any mapped element is NaN or infinite; with `fill_with_zero`, all mapped memory is zeroed afterwards.

        float8 elements count as valid: torch cannot test them.
        """
        testable = self.cache.shape.dtype is not torch.float8_e4m3fn
        wrong = False
        for values in self.cache.mapped_tensors():
            wrong = wrong or (testable and not bool(torch.isfinite(values).all()))
            if fill_with_zero:
                values.zero_()
        return wrong
