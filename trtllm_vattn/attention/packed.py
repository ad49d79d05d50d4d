"""Chunks of several prompts as kernels of variable length take them: what is the same for all layers of a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trtllm_vattn.attention.base import Span
from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.vmm.tensors import upload

TILE = 128
"""Keys that a kernel loads at once, past a chunk's last one too; they must be there and finite."""


@dataclass(frozen=True)
class Packed:
    """Queries of chunks one behind another, and all keys that they see, each chunk's behind those of the one before.

    Attributes
    ----------
    lanes, most_rows, most_keys : int
        Chunks, and bounds on their queries and keys; powers of two, so that few shapes are planned for.
    slots, tokens : Tensor
        Where the keys are, int64 ``[keys]``; behind the last one it is repeated for a tile and more.
    query_lengths, lengths : Tensor
        int32 ``[lanes]``; 0 where there is no chunk.
    query_offsets, key_offsets : Tensor
        Elements of queries and of keys before each chunk, int32 ``[lanes + 1]``.
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
    def of(cls, spans: Sequence[Span], q: torch.Tensor, cache: KVCache) -> Packed:
        """For queries q ``[rows, num_heads, head_dim]`` of `spans`."""
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
        # Four rows, each on cache lines of its own: libraries ask that what they are given be aligned.
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
