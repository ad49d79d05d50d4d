"""`BlockKVCache`: fixed addresses, seen as TensorRT-LLM's kernels see a paged cache.

Memory is reserved, mapped and unmapped as in `KVCacheManager`; only the order of bytes in a slot differs, and a kernel
is given a pool of blocks and a table. The table is affine in slot and block, so it is made once and never changes:
sequences come, go and grow without a write to it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from trtllm_vattn.cache.base import CacheShape, PagedKV
from trtllm_vattn.cache.config import CacheConfig, Layout
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.memory.layout import BlockLayout
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.regions import STATIC, Region, tensor_regions
from trtllm_vattn.vmm.tensors import strided


class BlockKVCache(KVCacheManager):
    """`KVCacheManager` in the block layout ``[slot][block][layer][K,V][head][token][dim]``.

    `layer` gives `PagedKV` views: k and v ``[num_blocks, tokens_per_block, num_kv_heads, head_dim]`` (head-major
    beneath) and the affine table. A row's entries past its slot's frontier name blocks with no memory.

    Parameters
    ----------
    tokens_per_block, and the others
        As `CacheConfig` and `KVCacheManager` have them.

    Raises
    ------
    ConfigError
        As `KVCacheManager`; or the blocks are too many for the kernels' 31-bit offsets.
    """

    layouts: ClassVar[tuple[Layout, ...]] = (Layout.BLOCKS,)
    layout: BlockLayout

    def __init__(
        self,
        shape: CacheShape,
        driver: Driver,
        budget: int | str | None = None,
        layers_per_range: int | None = None,
        lookahead: int | None = None,
        tokens_per_block: int | None = None,
        idle_after_s: float | None = None,
        idle_floor: int | str | None = None,
        *,
        config: CacheConfig | None = None,
    ) -> None:
        config = config or CacheConfig(layout=Layout.BLOCKS)
        if tokens_per_block is not None:
            config = dataclasses.replace(config, tokens_per_block=tokens_per_block)
        self.tokens_per_block = config.tokens_per_block
        self._table: torch.Tensor | None = None
        super().__init__(shape, driver, budget, layers_per_range, lookahead, idle_after_s, idle_floor, config=config)

    @property
    def table(self) -> torch.Tensor:
        """int32 ``[num_slots + 1, blocks of max_seq_len]`` on the device: the affine table, made once. Every entry of
        the dummy slot's row is the dummy block."""
        if self._table is None:
            layout = self.layout
            firsts = torch.arange(self.shape.num_slots + 1, dtype=torch.int32)[:, None] * layout.blocks_per_slot
            table = firsts + torch.arange(layout.blocks_of(self.shape.max_seq_len), dtype=torch.int32)
            table[self.dummy_slot] = layout.dummy_block
            self._table = table.to(self.device)
        return self._table

    def _make_layout(self) -> BlockLayout:
        return BlockLayout(
            **self._layout_sizes(), tokens_per_block=self.tokens_per_block, kv_factor=self.shape.kv_factor
        )

    def blocks(self, layer: int) -> torch.Tensor:
        """One layer's blocks, ``[num_blocks, kv_factor, num_kv_heads, tokens_per_block, head_dim]``; a new view.

        It reaches over all slots, most of which have no memory: touch what lies below a frontier.
        """
        self._check_layer(layer)
        return self._blocks(layer)

    def _blocks(self, layer: int) -> torch.Tensor:
        shape, layout, itemsize = self.shape, self.layout, self.shape.dtype.itemsize
        index, offset = layout.place_of(layer)
        part = layout.part_bytes // itemsize
        size = (
            layout.dummy_block + layout.blocks_per_slot,
            shape.kv_factor,
            shape.num_kv_heads,
            self.tokens_per_block,
            shape.head_dim,
        )
        strides = (layout.block_bytes // itemsize, part, self.tokens_per_block * shape.head_dim, shape.head_dim, 1)
        return strided(self._flat[index], shape.dtype, size, strides, offset)

    def _view(self, layer: int, part: int) -> PagedKV:
        by_token = self._blocks(layer).transpose(2, 3)
        return PagedKV(by_token[:, 0], by_token[:, -1], self.table)

    def storages(self) -> list[torch.Tensor]:
        return [self.table, *super().storages()]

    def regions(self) -> list[Region]:
        return [*super().regions(), *tensor_regions(STATIC, [self.table])]
