"""What backends share whose own kernel serves decode only: another backend attends for prompts."""

from __future__ import annotations

import torch

from trtllm_vattn.attention.base import Attention, PackedPrefill, PrefillChunk
from trtllm_vattn.attention.cudnn import CudnnAttention, availability
from trtllm_vattn.attention.gather import GatheringAttention
from trtllm_vattn.attention.reference import TorchAttention
from trtllm_vattn.cache.base import KVCache


def default_attention(cache: KVCache, num_heads: int, scale: float | None = None) -> Attention:
    """The cudnn backend if it works over this cache, else the torch backend."""
    half = cache.shape.dtype in (torch.float16, torch.bfloat16)
    if cache.device.type == "cuda" and half and availability() == "yes":
        return CudnnAttention(cache, num_heads, scale)
    return TorchAttention(cache, num_heads, scale)


class DecodeOnlyAttention(GatheringAttention):
    """Base of backends with a decode kernel of their own; prompts go through `default_attention`."""

    def __init__(self, cache: KVCache, num_heads: int, scale: float | None = None) -> None:
        super().__init__(cache, num_heads, scale)
        self._prefill = default_attention(cache, num_heads, scale)

    def begin_step(self) -> None:
        super().begin_step()
        self._prefill.begin_step()

    def storages(self) -> list[torch.Tensor]:
        return [*super().storages(), *self._prefill.storages()]

    def prefill(self, layer: int, q: torch.Tensor, chunk: PrefillChunk) -> torch.Tensor:
        return self._prefill.prefill(layer, q, chunk)

    def prefill_packed(self, layer: int, q: torch.Tensor, packed: PackedPrefill) -> torch.Tensor:
        return self._prefill.prefill_packed(layer, q, packed)
