"""Contents of a cache: what (sequence, layer, token) holds, written and read through the cache's own views."""

from __future__ import annotations

import torch

from trtllm_vattn.cache.base import FlatKV, KVCache, SequenceId

Place = tuple[torch.Tensor | int, torch.Tensor | slice]


def pattern(cache: KVCache, sequence: SequenceId, layer: int, tokens: range) -> torch.Tensor:
    """``[2, tokens, kv_heads, head_dim]`` of numbers that name their place, each exact in float32."""
    shape = cache.shape
    start = hash((sequence, layer)) % 9973
    rows = (start + torch.arange(tokens.start, tokens.stop) * 131).remainder(16381) * 1000
    row = torch.arange(2 * shape.num_kv_heads * shape.head_dim).view(2, 1, shape.num_kv_heads, shape.head_dim)
    return (rows.view(1, -1, 1, 1) + row).to(shape.dtype)


def _place(cache: KVCache, slot: int, layer: int, tokens: range) -> Place:
    """Where tokens lie in a layer's K and V: indices of the first two dimensions."""
    views = cache.layer(layer)
    if isinstance(views, FlatKV):
        return slot, slice(tokens.start, tokens.stop)
    size = views.k.shape[1]
    positions = torch.arange(tokens.start, tokens.stop)
    return views.table[slot, positions // size].long(), positions % size


def fill(cache: KVCache, sequence: SequenceId, tokens: range) -> None:
    """Write the pattern into all layers of some tokens."""
    slot = cache.slot_of(sequence)
    for layer in range(cache.shape.num_layers):
        views, place = cache.layer(layer), _place(cache, slot, layer, tokens)
        k, v = pattern(cache, sequence, layer, tokens).to(cache.device)
        views.k[place] = k
        if cache.shape.kv_factor == 2:
            views.v[place] = v


def admit(cache: KVCache, sequence: SequenceId, tokens: int) -> int:
    """Admit a sequence and write the pattern into its tokens; its slot."""
    slot = cache.admit(sequence, tokens)
    fill(cache, sequence, range(tokens))
    return slot


def expect(cache: KVCache, sequence: SequenceId, tokens: range, written_by: SequenceId | None = None) -> None:
    """All layers of some tokens hold the pattern, of the sequence itself or of the one that it was forked from; read
    in the slots that they lie in."""
    expect_in(cache, cache.slot_of(sequence), tokens, sequence if written_by is None else written_by)


def expect_in(cache: KVCache, slot: int, tokens: range, author: SequenceId) -> None:
    """`expect` of a slot, whether it has a sequence or not."""
    for owner, start, stop in lie_in(cache, slot):
        part = range(max(start, tokens.start), min(stop, tokens.stop))
        for layer in range(cache.shape.num_layers) if part else ():
            views, place = cache.layer(layer), _place(cache, owner, layer, part)
            k, v = pattern(cache, author, layer, part).to(cache.device)
            pairs = (("K", views.k, k), ("V", views.v, v))
            wrong = [name for name, seen, want in pairs if not torch.equal(seen[place], want)]
            assert not wrong, f"{wrong} of {author!r}, slot {owner}, layer {layer}, somewhere in tokens {part}"


def lie_in(cache: KVCache, slot: int) -> list[tuple[int, int, int]]:
    """Which of a slot's tokens lie where: (slot, from, to)."""
    segments = cache.segments
    rows = [] if segments is None else segments[segments[:, 0] == slot, 1:].tolist()
    return [*rows, (slot, rows[-1][2] if rows else 0, cache.shape.max_seq_len)]
