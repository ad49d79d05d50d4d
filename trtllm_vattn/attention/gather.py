"""What all backends share: storing K and V of new tokens, and gathering K and V of a sequence."""

from __future__ import annotations

import torch

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.attention.options import FP8
from trtllm_vattn.cache.base import FlatKV, KVCache, PagedKV


class GatheringAttention(Attention):
    """Stores by a Triton kernel on a GPU and by advanced indexing on the host; gathers by advanced indexing."""

    def __init__(self, cache: KVCache, num_heads: int, scale: float | None = None) -> None:
        super().__init__(cache, num_heads, scale)
        self._range = torch.arange(cache.shape.max_seq_len, device=cache.device)
        self._lanes = torch.arange(cache.shape.num_slots, device=cache.device)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        options, both = self.options[layer], self.cache.shape.kv_factor == 2
        parts = self.cache.head_groups(layer)
        heads = k.shape[1] // len(parts)
        for part, kv in enumerate(parts):
            own = slice(part * heads, (part + 1) * heads)
            deficits = self._deficits(layer, part)
            scales = [_own(scale, own) for scale in (options.k_scale, options.v_scale)]
            if self.cache.device.type == "cuda":
                from trtllm_vattn.attention.kv_write import write_kv

                write_kv(kv, k[:, own], v[:, own], slots, positions, both, deficits, *scales)
                continue
            where = _places(kv, slots, positions if deficits is None else positions - deficits[slots])
            kv.k.index_put_(where, quantised(k[:, own], kv.k.dtype, scales[0]))
            if both:
                kv.v.index_put_(where, quantised(v[:, own], kv.v.dtype, scales[1]))

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
        parts = self.cache.head_groups(layer)
        if self.cache.device.type != "cuda" or len(parts) > 1:
            return super().rotate_and_write(layer, q, k, v, cos, sin, slots, positions)
        from trtllm_vattn.attention.kv_write import rotate_and_write_kv

        options, both = self.options[layer], self.cache.shape.kv_factor == 2
        more = self._deficits(layer, 0), options.k_scale, options.v_scale
        return rotate_and_write_kv(parts[0], q, k, v, cos, sin, slots, positions, both, *more)

    def _deficits(self, layer: int, part: int) -> torch.Tensor | None:
        """int32 ``[num_slots + 1]``: how many tokens fewer than its sequence's length a slot holds of a part of a
        layer's heads; None where all have one length."""
        deficits = self.cache.length_deficits
        return None if deficits is None else deficits[self.cache.group_of(layer, part)]

    def _gather(
        self, layer: int, slots: torch.Tensor, lengths: torch.Tensor, extent: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V ``[lanes, extent, num_kv_heads, head_dim]`` of the first `extent` positions.

        Positions past a length repeat its last row; a lane of length 0 repeats the dummy slot's first row.
        """
        slots = torch.where(lengths > 0, slots, self.cache.dummy_slot)[:, None]
        return self._rows_at(layer, slots, self._range[:extent].minimum((lengths[:, None] - 1).clamp(min=0)))

    def _rows_at(
        self, layer: int, slots: torch.Tensor, tokens: torch.Tensor, part: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V ``[..., heads, head_dim]`` of a part of a layer's heads at places `tokens` of `slots`, int64 of the
        same shape."""
        kv = self.cache.head_groups(layer)[part]
        where = _places(kv, slots, tokens)
        return kv.k[where], kv.v[where]


def _places(kv: FlatKV | PagedKV, slots: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first two indices of rows in K and V."""
    if isinstance(kv, FlatKV):
        return slots, tokens
    size = kv.k.shape[1]
    return kv.table[slots, tokens // size].long(), tokens % size


def _own(scale: torch.Tensor | None, heads: slice) -> torch.Tensor | None:
    """Of a scale a tensor or a head, that of some heads."""
    return scale if scale is None or len(scale) == 1 else scale[heads]


def quantised(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """x ``[tokens, heads, head_dim]`` as a cache of `dtype` stores it (`LayerOptions.k_scale`)."""
    if dtype != FP8:
        return x
    largest = torch.finfo(FP8).max
    x = x.float() if scale is None else x.float() / scale[:, None]
    return x.clamp(-largest, largest).to(FP8)


def restored(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Stored rows x ``[..., heads, head_dim]`` in float32."""
    return x.float() if scale is None else x.float() * scale[:, None]
