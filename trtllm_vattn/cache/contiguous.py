"""A plain allocation of maximum length for every slot: what serving systems did before paging (Orca, OSDI'22)."""

from __future__ import annotations

import numpy as np
import torch

from trtllm_vattn.cache.base import CacheShape, CacheStats, FlatKV
from trtllm_vattn.cache.slotted import SlottedCache


class ContiguousCache(SlottedCache):
    """All memory is taken at the start: a tensor ``[num_slots + 1, max_seq_len, num_kv_heads, head_dim]`` a layer for
    K and another for V (one for both where `kv_factor` is 1)."""

    def __init__(self, shape: CacheShape, device: torch.device | str) -> None:
        super().__init__(shape, device)

        def allocate(tokens: int) -> torch.Tensor:
            size = (shape.num_slots + 1, tokens, shape.num_kv_heads, shape.head_dim)
            return torch.empty(size, dtype=shape.dtype, device=self.device)

        self._layers = []
        for layer in range(shape.num_layers):
            tokens = shape.window_of(layer) or shape.max_seq_len
            k = allocate(tokens)
            self._layers.append(FlatKV(k, allocate(tokens) if shape.kv_factor == 2 else k))

    def _allocate(self, tokens: int) -> int:
        slot = self._lowest_free()
        self.frontiers[slot] = self.shape.max_seq_len
        return slot

    def _grow(self, lengths: np.ndarray) -> None:
        """Everything is backed from the start."""

    def _release(self, slot: int) -> None:
        self.frontiers[slot] = 0

    def _clear(self) -> None:
        self.frontiers[:] = 0

    def _free(self) -> None:
        self._layers = []

    def layer(self, layer: int) -> FlatKV:
        self._check_layer(layer)
        return self._layers[layer]

    def storages(self) -> list[torch.Tensor]:
        return [tensor for layer in self._layers for tensor in (layer.k, layer.v)]

    def stats(self) -> CacheStats:
        self._check_readable()
        slot_bytes = self.shape.kept_bytes(self.shape.max_seq_len)
        held = (self.shape.num_slots + 1) * slot_bytes
        return CacheStats(
            sequences=len(self._slot_of),
            live_bytes=self.live_bytes,
            mapped_bytes=self.shape.num_slots * slot_bytes,
            parked_bytes=0,
            held_bytes=held,
            budget_bytes=held,
        )
