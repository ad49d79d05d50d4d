"""Triton kernels that store K and V of a step's tokens in flat KV or in blocks; one also applies rotary position
embeddings. Into rows of eight bits they divide by a scale and round to the nearest number there is; what is beyond the
largest becomes that one, and NaN stays NaN. Where a range group holds fewer tokens than its sequence has, they store
that many places further ahead.

Offsets are 64-bit, because slots may be terabytes apart.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from trtllm_vattn.attention.options import FP8
from trtllm_vattn.attention.shares_launch import scales_of
from trtllm_vattn.cache.base import FlatKV, PagedKV


@triton.jit  # type: ignore[untyped-decorator]
def _place(  # type: ignore[no-untyped-def]
    token,
    slots,
    positions,
    table,
    slots_step,
    positions_step,
    of_slot,
    of_token,
    table_row,
    deficits,
    BLOCK_SIZE: tl.constexpr,
    HAS_DEFICITS: tl.constexpr,
):
    """The offset of a token's row in the cache, in elements."""
    slot = tl.load(slots + token * slots_step).to(tl.int64)
    position = tl.load(positions + token * positions_step).to(tl.int64)
    if HAS_DEFICITS:
        position -= tl.load(deficits + slot)
    if BLOCK_SIZE:
        slot = tl.load(table + slot * table_row + position // BLOCK_SIZE).to(tl.int64)
        position = position % BLOCK_SIZE
    return slot * of_slot + position * of_token


@triton.jit  # type: ignore[untyped-decorator]
def _stored(x, scale, head, FP8: tl.constexpr, SCALES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers of `head` as they are stored; SCALES as in `decode_shares`."""
    if FP8:
        x = x.to(tl.float32)
        if SCALES:
            x = x / tl.load(scale + head * (SCALES - 1))
        # Comparisons with NaN are false, so it stays.
        x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x)).to(tl.float8e4nv)
    return x


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
    deficits,
    k_scale,
    v_scale,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BOTH: tl.constexpr,
    HAS_DEFICITS: tl.constexpr,
    FP8: tl.constexpr,
    K_SCALES: tl.constexpr,
    V_SCALES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = _place(
        token, slots, positions, table, slots_step, positions_step, of_slot, of_token, table_row, deficits,
        BLOCK_SIZE, HAS_DEFICITS,
    )  # fmt: skip
    stored: tl.constexpr = tl.float8e4nv if FP8 else k_new.dtype.element_ty
    element = tl.arange(0, ROW)
    head, dim = element // DIM, element % DIM
    there = element < HEADS * DIM
    to = row + head.to(tl.int64) * of_head + dim
    within = tl.minimum(head, HEADS - 1)
    k = tl.load(k_new + token * k_new_token + head * k_new_head + dim, mask=there)
    tl.store(k_cache.to(tl.pointer_type(stored)) + to, _stored(k, k_scale, within, FP8, K_SCALES), mask=there)
    if BOTH:
        v = tl.load(v_new + token * v_new_token + head * v_new_head + dim, mask=there)
        tl.store(v_cache.to(tl.pointer_type(stored)) + to, _stored(v, v_scale, within, FP8, V_SCALES), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_and_write(  # type: ignore[no-untyped-def]
    q,
    k_new,
    v_new,
    cos,
    sin,
    q_out,
    k_cache,
    v_cache,
    slots,
    positions,
    table,
    slots_step,
    positions_step,
    q_token,
    q_head,
    k_new_token,
    k_new_head,
    v_new_token,
    v_new_head,
    cos_token,
    sin_token,
    of_slot,
    of_token,
    of_head,
    table_row,
    deficits,
    k_scale,
    v_scale,
    QUERY_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BOTH: tl.constexpr,
    HAS_DEFICITS: tl.constexpr,
    FP8: tl.constexpr,
    K_SCALES: tl.constexpr,
    V_SCALES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    # A token's first programs take groups of query heads, the others groups of key and value heads.
    group = tl.program_id(1)
    groups_of_queries = tl.cdiv(QUERY_HEADS, GROUP)
    dim = tl.arange(0, WIDTH)[None, :]
    within = dim < HALF
    cos_1 = tl.load(cos + token * cos_token + dim, mask=within).to(tl.float32)
    cos_2 = tl.load(cos + token * cos_token + HALF + dim, mask=within).to(tl.float32)
    sin_1 = tl.load(sin + token * sin_token + dim, mask=within).to(tl.float32)
    sin_2 = tl.load(sin + token * sin_token + HALF + dim, mask=within).to(tl.float32)
    if group < groups_of_queries:
        head = (group * GROUP + tl.arange(0, GROUP))[:, None]
        there = within & (head < QUERY_HEADS)
        at = q + token * q_token + head * q_head + dim
        first = tl.load(at, mask=there).to(tl.float32)
        second = tl.load(at + HALF, mask=there).to(tl.float32)
        q_to = q_out + (token * QUERY_HEADS + head) * (2 * HALF) + dim
        tl.store(q_to, first * cos_1 - second * sin_1, mask=there)
        tl.store(q_to + HALF, second * cos_2 + first * sin_2, mask=there)
    else:
        row = _place(
            token, slots, positions, table, slots_step, positions_step, of_slot, of_token, table_row, deficits,
            BLOCK_SIZE, HAS_DEFICITS,
        )  # fmt: skip
        stored: tl.constexpr = tl.float8e4nv if FP8 else k_new.dtype.element_ty
        head = ((group - groups_of_queries) * GROUP + tl.arange(0, GROUP))[:, None]
        there = within & (head < HEADS)
        at = k_new + token * k_new_token + head * k_new_head + dim
        first = tl.load(at, mask=there).to(tl.float32)
        second = tl.load(at + HALF, mask=there).to(tl.float32)
        k_to = k_cache.to(tl.pointer_type(stored)) + row + head.to(tl.int64) * of_head + dim
        scaled = tl.minimum(head, HEADS - 1)
        tl.store(k_to, _stored(first * cos_1 - second * sin_1, k_scale, scaled, FP8, K_SCALES), mask=there)
        tl.store(k_to + HALF, _stored(second * cos_2 + first * sin_2, k_scale, scaled, FP8, K_SCALES), mask=there)
        if BOTH:
            at = v_new + token * v_new_token + head * v_new_head + dim
            v_to = v_cache.to(tl.pointer_type(stored)) + row + head.to(tl.int64) * of_head + dim
            tl.store(v_to, _stored(tl.load(at, mask=there), v_scale, scaled, FP8, V_SCALES), mask=there)
            tl.store(v_to + HALF, _stored(tl.load(at + HALF, mask=there), v_scale, scaled, FP8, V_SCALES), mask=there)


GROUP = 8
"""Heads per program of `_rotate_and_write`."""


def _storing(
    kv: FlatKV | PagedKV,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    both: bool,
    deficits: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> dict[str, Any]:
    """The arguments by which both kernels store K and V."""
    table = kv.table if isinstance(kv, PagedKV) else slots
    of_slot, of_token, of_head, _ = kv.k.stride()
    return {
        # Plain numbers, because Triton asks the driver about pointers, and the first slot may have no memory.
        "k_cache": kv.k.data_ptr(),
        "v_cache": kv.v.data_ptr(),
        "slots": slots,
        "positions": positions,
        "table": table,
        "slots_step": slots.stride(0),
        "positions_step": positions.stride(0),
        "k_new_token": k.stride(0),
        "k_new_head": k.stride(1),
        "v_new_token": v.stride(0),
        "v_new_head": v.stride(1),
        "of_slot": of_slot,
        "of_token": of_token,
        "of_head": of_head,
        "table_row": table.stride(0),
        "HEADS": k.shape[1],
        "BLOCK_SIZE": kv.k.shape[1] if isinstance(kv, PagedKV) else 0,
        "BOTH": both,
        "deficits": slots if deficits is None else deficits,
        "k_scale": slots if k_scale is None else k_scale,
        "v_scale": slots if v_scale is None else v_scale,
        "HAS_DEFICITS": deficits is not None,
        "FP8": kv.k.dtype == FP8,
        "K_SCALES": scales_of(k_scale),
        "V_SCALES": scales_of(v_scale),
    }


def write_kv(
    kv: FlatKV | PagedKV,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    both: bool = True,
    deficits: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Store k and, if `both`, v of some tokens in a layer's cache, on the GPU.

    k, v ``[tokens, num_kv_heads, head_dim]`` with stride 1 in the last dimension; slots, positions int64 ``[tokens]``.
    deficits int32 ``[num_slots + 1]``: how many tokens fewer than its sequence a slot holds. The scales are those of
    `LayerOptions`.
    """
    heads, dim = k.shape[1:]
    storing = _storing(kv, k, v, slots, positions, both, deficits, k_scale, v_scale)
    _write[(len(k),)](k, v, **storing, DIM=dim, ROW=triton.next_power_of_2(heads * dim))


def rotate_and_write_kv(
    kv: FlatKV | PagedKV,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    both: bool = True,
    deficits: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply rotary position embeddings to q and k, and `write_kv` k and v; returns the rotated q.

    q ``[tokens, num_heads, head_dim]`` to the same shape, contiguous; cos, sin ``[tokens, head_dim]``. All inputs have
    stride 1 in the last dimension.
    """
    tokens, query_heads, dim = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    groups = triton.cdiv(query_heads, GROUP) + triton.cdiv(k.shape[1], GROUP)
    _rotate_and_write[(tokens, groups)](
        q,
        k,
        v,
        cos,
        sin,
        out,
        **_storing(kv, k, v, slots, positions, both, deficits, k_scale, v_scale),
        q_token=q.stride(0),
        q_head=q.stride(1),
        cos_token=cos.stride(0),
        sin_token=sin.stride(0),
        QUERY_HEADS=query_heads,
        HALF=dim // 2,
        GROUP=GROUP,
        WIDTH=triton.next_power_of_2(dim // 2),
    )
    return out
