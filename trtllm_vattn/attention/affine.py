"""Describe flat KV as blocks behind a block table, for kernels that read block tables only.

A slot's tokens are contiguous, so every `block` tokens are a block, and block j of slot s is block
``s * blocks_per_slot + j`` of the pool. The table is affine in s and j and never changes; no data is moved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trtllm_vattn.cache.base import FlatKV, PagedKV
from trtllm_vattn.errors import ConfigError


def fitting_block(kv: FlatKV, blocks: Sequence[int]) -> int:
    """The first of `blocks` (tokens) that divides the distance between slots. Raises ConfigError if none does."""
    apart = kv.k.stride(0) // kv.k.stride(1)
    for block in blocks:
        if apart % block == 0:
            return block
    raise ConfigError(
        f"slots are {apart} tokens apart, which is not whole blocks of {' or '.join(map(str, blocks))}; make "
        f"max_seq_len a multiple of {min(blocks)}, or let lane i be slot i over the cudnn backend"
    )


def affine_table(kv: FlatKV, block: int) -> torch.Tensor:
    """The block table, int32 ``[slots, blocks of a slot]`` on the device; the last row is the dummy slot's."""
    slots, tokens, _, _ = kv.k.shape
    per_slot = kv.k.stride(0) // (block * kv.k.stride(1))
    firsts = torch.arange(slots, dtype=torch.int32, device=kv.k.device)[:, None] * per_slot
    return firsts + torch.arange(-(-tokens // block), dtype=torch.int32, device=kv.k.device)


def as_blocks(kv: FlatKV, block: int, table: torch.Tensor) -> PagedKV:
    """Views of the same memory as a pool of blocks behind `table`; the pool's last block is the dummy slot's first."""
    of_slot, of_token, of_head, of_dim = kv.k.stride()
    per_slot = of_slot // (block * of_token)
    size = (per_slot * (kv.k.shape[0] - 1) + 1, block, *kv.k.shape[2:])
    strides = (block * of_token, of_token, of_head, of_dim)
    return PagedKV(kv.k.as_strided(size, strides), kv.v.as_strided(size, strides), table)
