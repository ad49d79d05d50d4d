"""Inputs of a variable-length attention kernel for chunks of several prompts; they are the same for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trtllm_vattn.attention.base import Span
from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.vmm.tensors import upload

TILE = 128
"""Keys that a kernel loads at once. A tile may reach past a chunk's last key; what it loads there must be mapped and
finite."""


@dataclass(frozen=True)
class PackedInputs:
    """Queries of chunks packed one after another, and the keys that they attend to, packed in the same order.

    Attributes
    ----------
    lanes, most_rows, most_keys : int
        Chunks, and upper bounds of a chunk's queries and keys; all are powers of two, so that there are few plans.
    slots, tokens : Tensor
        The slot and position of each key, int64 ``[keys]``. The last key is repeated for at least one tile.
    query_lengths, lengths : Tensor
        Queries and keys of each chunk, int32 ``[lanes]``; 0 for lanes without a chunk.
    query_offsets, key_offsets : Tensor
        The element at which each chunk's queries and keys begin, int32 ``[lanes + 1]``.
    """

    lanes: int
    most_rows: int
    most_keys: int
    slots: torch.Tensor
    tokens: torch.Tensor
    query_lengths: torch.Tensor
    lengths: torch.Tensor
    query_offsets: torch.Tensor
    key_offsets: torch.Tensor

    @classmethod
    def of(cls, spans: Sequence[Span], q: torch.Tensor, cache: KVCache) -> PackedInputs:
        """The inputs for queries q ``[rows, num_heads, head_dim]`` of `spans`, on the device of q."""
        rows = np.array([span.end - span.start for span in spans])
        keys = np.array([span.end for span in spans])
        lanes = _power_of_two(len(spans))
        total = int(keys.sum())
        padded = (total // TILE + 2) * TILE
        where = np.zeros((2, padded), np.int64)
        where[0, :total] = np.repeat([span.slot for span in spans], keys)
        where[1, :total] = np.concatenate([np.arange(end) for end in keys])
        where[:, total:] = where[:, total - 1 : total]
        of_query, of_key = q.shape[1] * q.shape[2], cache.shape.num_kv_heads * cache.shape.head_dim
        # Each of the four rows begins at a cache line, because libraries require aligned addresses.
        numbers = np.zeros((4, (lanes // 16 + 1) * 16), np.int32)
        numbers[0, : len(spans)], numbers[1, : len(spans)] = rows, keys
        numbers[2, 1 : lanes + 1] = numbers[0, :lanes].cumsum() * of_query
        numbers[3, 1 : lanes + 1] = numbers[1, :lanes].cumsum() * of_key
        on_device = upload(numbers, q.device)
        counts, offsets = on_device[:2, :lanes], on_device[2:, : lanes + 1]
        most_rows, most_keys = (max(TILE, _power_of_two(int(most.max()))) for most in (rows, keys))
        return cls(lanes, most_rows, most_keys, *upload(where, q.device), *counts, *offsets)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
