"""A Triton kernel that stores a step's K and V at the positions that its lengths give.

The writing kernel of `attention.kv_write` takes a slot and a position for each token. A plan's layer has only lengths,
and a second kernel in each layer, to turn them into positions, would cost too much.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trtllm_vattn.cache.base import FlatKV


@triton.jit  # type: ignore[untyped-decorator]
def _write(  # type: ignore[no-untyped-def]
    k_new,
    v_new,
    k_cache,
    v_cache,
    lengths,
    query_lengths,
    slots,
    rows,
    k_new_token,
    v_new_token,
    of_slot,
    of_token,
    of_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROW: tl.constexpr,
    CHUNKS: tl.constexpr,
    LOOK_UP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    lane, row = token // rows, token % rows
    length = tl.load(lengths + lane).to(tl.int64)
    count = length * 0 + 1
    if CHUNKS:
        count = tl.load(query_lengths + lane).to(tl.int64)
    slot = lane
    if LOOK_UP:
        slot = tl.load(slots + lane).to(tl.int64)
    position = length - count + row
    element = tl.arange(0, ROW)
    head, dim = element // DIM, element % DIM
    # Padding lanes, and rows of a chunk that are no tokens or lie before the sequence, write nothing.
    there = (element < HEADS * DIM) & (length > 0) & (row < count) & (position >= 0)
    to = slot * of_slot + position * of_token + head.to(tl.int64) * of_head + dim
    k = tl.load(k_new + token * k_new_token + element, mask=there)
    tl.store(k_cache.to(tl.pointer_type(k_new.dtype.element_ty)) + to, k, mask=there)
    v = tl.load(v_new + token * v_new_token + element, mask=there)
    tl.store(v_cache.to(tl.pointer_type(v_new.dtype.element_ty)) + to, v, mask=there)


def write_step(
    kv: FlatKV,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    query_lengths: torch.Tensor | None,
    slots: torch.Tensor | None,
) -> None:
    """Store k and v ``[tokens, num_kv_heads, head_dim]``, a token's heads one after another, on the GPU.

    lengths, query_lengths and slots are int32 or int64 ``[lanes]``, `tokens` a multiple of `lanes`. Row r of lane i
    goes to position ``lengths[i] - query_lengths[i] + r`` of slot ``slots[i]``; without `query_lengths` there is one
    row a lane, without `slots` lane i is slot i. Lanes of length 0 and rows past `query_lengths` write nothing.
    """
    heads, dim = k.shape[1:]
    of_slot, of_token, of_head, _ = kv.k.stride()
    _write[(len(k),)](
        k,
        v,
        # Plain numbers, because Triton asks the driver about pointers, and the first slot may have no memory.
        kv.k.data_ptr(),
        kv.v.data_ptr(),
        lengths,
        lengths if query_lengths is None else query_lengths,
        lengths if slots is None else slots,
        len(k) // len(lengths),
        k.stride(0),
        v.stride(0),
        of_slot,
        of_token,
        of_head,
        HEADS=heads,
        DIM=dim,
        ROW=triton.next_power_of_2(heads * dim),
        CHUNKS=query_lengths is not None,
        LOOK_UP=slots is not None,
    )
