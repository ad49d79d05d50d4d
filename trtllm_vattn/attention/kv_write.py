"""One Triton kernel that stores K and V of a step's tokens, into flat memory or behind a block table.

Offsets are 64-bit: a slot may lie terabytes from the first one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trtllm_vattn.cache.base import FlatKV, PagedKV


@triton.jit  # type: ignore[untyped-decorator]
def _write(  # type: ignore[no-untyped-def]
    k_new,
    v_new,
    k_cache,
    v_cache,
    slots,
    positions,
    table,
    slots_step,
    positions_step,
    k_new_token,
    k_new_head,
    v_new_token,
    v_new_head,
    of_slot,
    of_token,
    of_head,
    table_row,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BOTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token * slots_step).to(tl.int64)
    position = tl.load(positions + token * positions_step).to(tl.int64)
    if BLOCK_SIZE:
        slot = tl.load(table + slot * table_row + position // BLOCK_SIZE).to(tl.int64)
        position = position % BLOCK_SIZE
    element = tl.arange(0, ROW)
    head, dim = element // DIM, element % DIM
    there = element < HEADS * DIM
    to = slot * of_slot + position * of_token + head * of_head + dim
    k = tl.load(k_new + token * k_new_token + head * k_new_head + dim, mask=there)
    tl.store(k_cache.to(tl.pointer_type(k_new.dtype.element_ty)) + to, k, mask=there)
    if BOTH:
        v = tl.load(v_new + token * v_new_token + head * v_new_head + dim, mask=there)
        tl.store(v_cache.to(tl.pointer_type(v_new.dtype.element_ty)) + to, v, mask=there)


def write_kv(
    kv: FlatKV | PagedKV,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    both: bool = True,
) -> None:
    """Store k and, where `both`, v ``[tokens, num_kv_heads, head_dim]`` of tokens at `positions` of `slots`, int64
    ``[tokens]``; all on the GPU. k and v may have any strides but in their last dimension, where it is 1."""
    heads, dim = k.shape[1:]
    block_size = kv.k.shape[1] if isinstance(kv, PagedKV) else 0
    table = kv.table if isinstance(kv, PagedKV) else slots
    of_slot, of_token, of_head, _ = kv.k.stride()
    _write[(len(k),)](
        k,
        v,
        # Plain numbers, because Triton asks the driver about pointers, and the first slot may have no memory.
        kv.k.data_ptr(),
        kv.v.data_ptr(),
        slots,
        positions,
        table,
        slots.stride(0),
        positions.stride(0),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        of_slot,
        of_token,
        of_head,
        table.stride(0),
        HEADS=heads,
        DIM=dim,
        ROW=triton.next_power_of_2(heads * dim),
        BLOCK_SIZE=block_size,
        BOTH=both,
    )
