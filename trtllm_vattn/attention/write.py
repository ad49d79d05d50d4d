"""Storing K and V of new tokens, the same way for every backend."""

from __future__ import annotations

import torch

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.cache.base import FlatKV


class WritingAttention(Attention):
    """An attention backend that writes by advanced indexing on the cache's own views (64-bit offsets)."""

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        kv = self.cache.layer(layer)
        if isinstance(kv, FlatKV):
            where = (slots, positions)
        else:
            size = kv.k.shape[1]
            where = (kv.table[slots, positions // size].long(), positions % size)
        kv.k.index_put_(where, k)
        if self.cache.shape.kv_factor == 2:
            kv.v.index_put_(where, v)
