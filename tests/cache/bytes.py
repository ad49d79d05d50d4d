"""Contents of a cache: what (sequence, layer, token) holds, written and read through the cache's own views."""

from __future__ import annotations

import torch

from trtllm_vattn.cache.base import FlatKV, KVCache, SequenceId


def pattern(cache: KVCache, sequence: SequenceId, layer: int, token: int) -> torch.Tensor:
    """``[2, kv_heads, head_dim]`` of numbers that name their place; exact in float32."""
    shape = cache.shape
    start = (hash((sequence, layer, token)) % 1_000_003) * 8.0
    count = 2 * shape.num_kv_heads * shape.head_dim
    return (start + torch.arange(count) % 7).view(2, shape.num_kv_heads, shape.head_dim).to(shape.dtype)


def _place(cache: KVCache, slot: int, layer: int, token: int) -> tuple[torch.Tensor, torch.Tensor]:
    views = cache.layer(layer)
    if isinstance(views, FlatKV):
        return views.k[slot, token], views.v[slot, token]
    size = views.k.shape[1]
    block = int(views.table[slot, token // size])
    return views.k[block, token % size], views.v[block, token % size]


def fill(cache: KVCache, sequence: SequenceId, tokens: range) -> None:
    """Write the pattern into all layers of some tokens."""
    slot = cache.slot_of(sequence)
    for layer in range(cache.shape.num_layers):
        for token in tokens:
            k, v = _place(cache, slot, layer, token)
            want = pattern(cache, sequence, layer, token)
            k.copy_(want[0])
            if cache.shape.kv_factor == 2:
                v.copy_(want[1])


def expect(cache: KVCache, sequence: SequenceId, tokens: range) -> None:
    """All layers of some tokens hold the pattern."""
    slot = cache.slot_of(sequence)
    for layer in range(cache.shape.num_layers):
        for token in tokens:
            k, v = _place(cache, slot, layer, token)
            want = pattern(cache, sequence, layer, token)
            torch.testing.assert_close(k.cpu(), want[0], rtol=0, atol=0)
            torch.testing.assert_close(v.cpu(), want[cache.shape.kv_factor - 1], rtol=0, atol=0)
