"""A pool of blocks behind block tables (vLLM's PagedAttention, SOSP'23).

Pool layout, a layer: K and V each ``[num_blocks][head][token of the block][dim]``, head-major inside a block as
attention libraries with block tables expect; block 0 is the dummy block.
"""

from __future__ import annotations

import random

import numpy as np
import torch

from trtllm_vattn.cache.base import CacheShape, CacheStats, PagedKV
from trtllm_vattn.cache.slotted import SlottedCache
from trtllm_vattn.errors import ConfigError, InvariantViolation, KVCacheOutOfMemory
from trtllm_vattn.vmm.tensors import upload


class PagedCache(SlottedCache):
    """Block tables over one pool a layer; free blocks are reused last in, first out, so tables become scattered.

    Parameters
    ----------
    block_size : int
        Tokens a block.
    num_blocks : int or None
        Blocks of the pool, the dummy block not counted; None is enough for every slot at maximum length.
    """

    def __init__(
        self,
        shape: CacheShape,
        device: torch.device | str,
        block_size: int = 16,
        num_blocks: int | None = None,
    ) -> None:
        if shape.windows:
            raise ConfigError("a paged cache keeps all tokens of all layers; make it of a shape without windows")
        super().__init__(shape, device)
        if block_size < 1:
            raise ConfigError(f"block_size is {block_size}; it must be a positive number of tokens")
        self.block_size = block_size
        self.blocks_per_slot = -(-shape.max_seq_len // block_size)
        self.num_blocks = shape.num_slots * self.blocks_per_slot if num_blocks is None else num_blocks
        if self.num_blocks < 1:
            raise ConfigError(f"num_blocks is {self.num_blocks}; at least one is needed")
        pools = self._make_pools((self.num_blocks + 1, shape.num_kv_heads, block_size, shape.head_dim))
        self._table = torch.zeros((shape.num_slots + 1, self.blocks_per_slot), dtype=torch.int32, device=self.device)
        self._layers = [PagedKV(p[0].transpose(1, 2), p[-1].transpose(1, 2), self._table) for p in pools]
        self._rows = np.zeros((shape.num_slots, self.blocks_per_slot), np.int32)
        self._held = np.zeros(shape.num_slots, np.int64)
        self._free_blocks: list[int] = []
        self._clear()

    def _make_pools(self, size: tuple[int, int, int, int]) -> list[list[torch.Tensor]]:
        """K and V (one tensor where `kv_factor` is 1) of each layer, ``[blocks, heads, tokens, dim]``."""
        # A block of NaN-free zeros: kernels may load a block's unused tokens and mask them by multiplying.
        return [
            [torch.zeros(size, dtype=self.shape.dtype, device=self.device) for _ in range(self.shape.kv_factor)]
            for _ in range(self.shape.num_layers)
        ]

    def bytes_of(self, tokens: int) -> int:
        return -(-tokens // self.block_size) * self.block_size * self.shape.token_bytes

    @property
    def bytes_for_sequences(self) -> int:
        return self.num_blocks * self.block_size * self.shape.token_bytes

    @property
    def longest_alone(self) -> int:
        return min(self.shape.max_seq_len, self.num_blocks * self.block_size)

    def _allocate(self, tokens: int) -> int:
        slot = self._lowest_free()
        lengths = np.zeros_like(self.lengths)
        lengths[slot] = tokens
        self._grow(lengths)
        return slot

    def _grow(self, lengths: np.ndarray) -> None:
        wanted = -(-lengths // self.block_size)
        missing = np.maximum(wanted - self._held, 0)
        if missing.sum() > len(self._free_blocks):
            raise KVCacheOutOfMemory(
                f"{missing.sum()} blocks of {self.block_size} tokens asked for, {len(self._free_blocks)} of "
                f"{self.num_blocks} free; release or preempt a sequence, or raise num_blocks"
            )
        for slot in np.flatnonzero(missing).tolist():
            for ordinal in range(int(self._held[slot]), int(wanted[slot])):
                self._rows[slot, ordinal] = self._free_blocks.pop()
            self._held[slot] = wanted[slot]
            self.frontiers[slot] = min(self.shape.max_seq_len, int(wanted[slot]) * self.block_size)
        self._publish()

    def _publish(self) -> None:
        self._table[:-1].copy_(upload(self._rows, self.device))

    def _release(self, slot: int) -> None:
        held = int(self._held[slot])
        self._free_blocks += self._rows[slot, :held].tolist()
        self._rows[slot] = 0
        self._held[slot] = 0
        self.frontiers[slot] = 0
        self._publish()

    def _clear(self) -> None:
        self._free_blocks = list(range(self.num_blocks, 0, -1))
        for each in (self._rows, self._held, self.frontiers):
            each[...] = 0
        self._publish()

    def shuffle_free_memory(self, seed: int) -> None:
        random.Random(seed).shuffle(self._free_blocks)

    def _free(self) -> None:
        self._layers = []

    def layer(self, layer: int) -> PagedKV:
        self._check_layer(layer)
        return self._layers[layer]

    def storages(self) -> list[torch.Tensor]:
        return [self._table] + [tensor for layer in self._layers for tensor in (layer.k, layer.v)]

    def stats(self) -> CacheStats:
        self._check_readable()
        block_bytes = self.block_size * self.shape.token_bytes
        return CacheStats(
            sequences=len(self._slot_of),
            live_bytes=self.live_bytes,
            mapped_bytes=int(self._held.sum()) * block_bytes,
            parked_bytes=0,
            held_bytes=(self.num_blocks + 1) * block_bytes,
            budget_bytes=self.num_blocks * block_bytes,
        )

    def _do_check_integrity(self) -> None:
        super()._do_check_integrity()
        used = [int(block) for slot, held in enumerate(self._held) for block in self._rows[slot, :held]]
        if sorted(used + self._free_blocks) != list(range(1, self.num_blocks + 1)):
            raise InvariantViolation(
                f"{len(used)} blocks in tables ({len(set(used))} distinct) and {len(self._free_blocks)} free do not "
                f"make up the {self.num_blocks} there are"
            )
