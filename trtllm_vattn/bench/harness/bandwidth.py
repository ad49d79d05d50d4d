"""Bytes a second that attention over a cache reads."""

from __future__ import annotations

import numpy as np
import torch

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.bench.harness.timing import summarise, timed_ms


@torch.inference_mode()
def attention_bandwidth(attention: Attention, lengths: np.ndarray, repeats: int = 20) -> dict[str, object]:
    """Decode attention alone, every layer once in one graph; lengths int ``[lanes]``.

    Returns bytes of K and V a layer, microseconds a layer, and bytes a second.
    """
    shape, device = attention.cache.shape, attention.cache.device
    on_device = torch.from_numpy(lengths).to(device, torch.int32)
    q = torch.randn(len(lengths), attention.num_heads, shape.head_dim, dtype=shape.dtype, device=device)

    def work() -> None:
        for layer in range(shape.num_layers):
            attention.decode(layer, q, on_device)

    milliseconds = timed_ms(work, repeats, device)
    layer_bytes = int(lengths.sum()) * shape.layer_token_bytes
    return {
        "layer_bytes": layer_bytes,
        "layer_us": summarise([1e3 * ms / shape.num_layers for ms in milliseconds]),
        "bytes_per_s": summarise([layer_bytes * shape.num_layers / (ms / 1e3) for ms in milliseconds]),
    }


@torch.inference_mode()
def fill_random(attention: Attention, context: int, sequences: int | None = None) -> np.ndarray:
    """Give every slot of an empty cache, or the first `sequences`, one of `context` random tokens; returns the lengths
    of those slots, int64 ``[sequences]``."""
    cache = attention.cache
    shape, device = cache.shape, cache.device
    positions = torch.arange(context, device=device)
    sequences = shape.num_slots if sequences is None else sequences
    for sequence in range(sequences):
        slot = torch.full_like(positions, cache.admit(sequence, context))
        for layer in range(shape.num_layers):
            k, v = torch.randn(2, context, shape.num_kv_heads, shape.head_dim, dtype=shape.dtype, device=device)
            attention.write(layer, k, v, slot, positions)
    return np.array(cache.lengths[:sequences])
