"""What all backends share: storing K and V of new tokens, and gathering K and V of a sequence."""

from __future__ import annotations

import torch

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.cache.base import FlatKV, KVCache


class GatheringAttention(Attention):
    """Stores by a Triton kernel on a GPU and by advanced indexing on the host; gathers by advanced indexing."""

    def __init__(self, cache: KVCache, num_heads: int, scale: float | None = None) -> None:
        super().__init__(cache, num_heads, scale)
        self._range = torch.arange(cache.shape.max_seq_len, device=cache.device)
        self._lanes = torch.arange(cache.shape.num_slots, device=cache.device)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        kv = self.cache.layer(layer)
        if self.cache.device.type == "cuda":
            from trtllm_vattn.attention.kv_write import write_kv

            write_kv(kv, k, v, slots, positions, both=self.cache.shape.kv_factor == 2)
            return
        if isinstance(kv, FlatKV):
            where = (slots, positions)
        else:
            size = kv.k.shape[1]
            where = (kv.table[slots, positions // size].long(), positions % size)
        kv.k.index_put_(where, k)
        if self.cache.shape.kv_factor == 2:
            kv.v.index_put_(where, v)

    def rotate_and_write(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        if self.cache.device.type != "cuda":
            return super().rotate_and_write(layer, q, k, v, cos, sin, slots, positions)
        from trtllm_vattn.attention.kv_write import rotate_and_write_kv

        kv, both = self.cache.layer(layer), self.cache.shape.kv_factor == 2
        return rotate_and_write_kv(kv, q, k, v, cos, sin, slots, positions, both)

    def _gather(
        self, layer: int, slots: torch.Tensor, lengths: torch.Tensor, extent: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V ``[lanes, extent, num_kv_heads, head_dim]`` of the first `extent` positions.

        Positions past a length repeat its last row; a lane of length 0 repeats the dummy slot's first row.
        """
        slots = torch.where(lengths > 0, slots, self.cache.dummy_slot)[:, None]
        return self._rows_at(layer, slots, self._range[:extent].minimum((lengths[:, None] - 1).clamp(min=0)))

    def _rows_at(self, layer: int, slots: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V ``[..., num_kv_heads, head_dim]`` at positions `tokens` of `slots`, int64 of the same shape."""
        kv = self.cache.layer(layer)
        if isinstance(kv, FlatKV):
            return kv.k[slots, tokens], kv.v[slots, tokens]
        size = kv.k.shape[1]
        blocks = kv.table[slots, tokens // size].long()
        return kv.k[blocks, tokens % size], kv.v[blocks, tokens % size]
