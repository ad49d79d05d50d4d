"""What the Triton kernels of attention share: loads of rows of keys and values, and the online softmax over them
(FlashAttention, arXiv 2205.14135).

A row is one query of one query head. It carries its largest score so far, minus infinity as long as it has attended to
nothing, the sum of its weights beside that score, and its output times that sum. Scores are in powers of two.

Heads' addresses are those of the first slot; a slot's rows are ``slot * of_slot`` elements further on, in 64 bits,
because slots may be terabytes apart.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def rows_from(base, tiles, slot, token, head, of_token, d, TILE: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of K or V from `token` on, ``[TILE, len(d)]``, all below the length; dimensions past `DIM` are zeros."""
    if TMA:
        return tiles.load([slot.to(tl.int32), token, head, 0]).reshape(TILE, d.shape[0])
    at = base + (token + tl.arange(0, TILE)).to(tl.int64)[:, None] * of_token + d[None, :]
    if d.shape[0] == DIM:
        return tl.load(at)
    return tl.load(at, mask=(d < DIM)[None, :], other=0.0)


@triton.jit
def _reference(top):  # type: ignore[no-untyped-def]
    """What weights are taken beside: the largest score, or any number for a row that has attended to nothing."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit  # type: ignore[untyped-decorator]
def weighed(scores, scale, top, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a tile's scores, which `scale` makes powers of two: each row's largest score now, by what its weights so far
    are multiplied, and the tile's weights. Masked scores are minus infinity."""
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    beside = _reference(higher) if MASKED else higher
    return higher, tl.exp2(top - beside), tl.exp2(scores * scale - beside[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def attend(q, k, v, visible, scale, top, total, acc, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Attend to a tile. `SOFTCAP` is that of scores, in powers of two as they are, or 0."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SOFTCAP > 0:
        # A hyperbolic tangent.
        scores = SOFTCAP * (2 * tl.sigmoid(scores * scale * (2 / SOFTCAP)) - 1)
        scale = 1.0
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    top, faded, weights = weighed(scores, scale, top, MASKED)
    total = total * faded + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * faded[:, None], input_precision="ieee")
    return top, total, acc


@triton.jit
def merged(top, total, acc, other_top, other_total, other_acc):  # type: ignore[no-untyped-def]
    """What rows carry after two parts of their keys."""
    higher = tl.maximum(top, other_top)
    beside = _reference(higher)
    faded, weight = tl.exp2(top - beside), tl.exp2(other_top - beside)
    return higher, total * faded + other_total * weight, acc * faded[:, None] + other_acc * weight[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def sunk_and_scaled(  # type: ignore[no-untyped-def]
    top, total, acc, head, row, sink_logits, v_scale, GROUP: tl.constexpr, SINKS: tl.constexpr, V_SCALES: tl.constexpr
):
    """The sums of rows' weights and their outputs, with the sink logits of a KV head and the scale of its values."""
    if SINKS:
        logit = tl.load(sink_logits + head * GROUP + row % GROUP) * 1.4426950408889634
        top, total, acc = merged(top, total, acc, logit, 1.0, tl.zeros_like(acc))
    if V_SCALES:
        acc = acc * tl.load(v_scale + head * (V_SCALES - 1))
    return total, acc


@triton.jit  # type: ignore[untyped-decorator]
def attend_whole(  # type: ignore[no-untyped-def]
    begin,
    end,
    shift,
    q,
    k_head,
    v_head,
    k_tiles,
    v_tiles,
    of_slot,
    of_token,
    head,
    slot,
    d,
    scale,
    top,
    total,
    acc,
    dot_dtype: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Attend to tiles `begin` to `end` of the list, which lie in one slot and which every row sees whole."""
    k_slot, v_slot = tl.multiple_of(k_head + slot * of_slot, 16), tl.multiple_of(v_head + slot * of_slot, 16)
    for tile in tl.range(begin, end, num_stages=STAGES):
        token = (tile + shift) * TILE
        keys = rows_from(k_slot, k_tiles, slot, token, head, of_token, d, TILE, DIM, TMA).to(dot_dtype)
        values = rows_from(v_slot, v_tiles, slot, token, head, of_token, d, TILE, DIM, TMA).to(dot_dtype)
        top, total, acc = attend(q, keys, values, True, scale, top, total, acc, SOFTCAP, False)
    return top, total, acc


@triton.jit  # type: ignore[untyped-decorator]
def attend_masked(  # type: ignore[no-untyped-def]
    begin,
    end,
    sinks,
    shift,
    q,
    sees,
    lowest,
    k_head,
    v_head,
    of_slot,
    of_token,
    slot,
    base,
    border,
    length,
    d,
    scale,
    top,
    total,
    acc,
    dot_dtype: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOW: tl.constexpr,
    FIRST: tl.constexpr,
    BOUNDED: tl.constexpr,
    PREFIXES: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Attend to tiles `begin` to `end` of the list, token by token: those below the length alone are read, with
    `BOUNDED` those from `lowest` on or below `FIRST`, and with `PREFIXES` those below the border in another slot. A row
    sees the tokens below `sees`, with a window those in it or below `FIRST`."""
    for tile in tl.range(begin, end, num_stages=STAGES):
        token = tl.where(tile < sinks, tile, tile + shift) * TILE + tl.arange(0, TILE)
        there = token < length
        if BOUNDED:
            there &= (token >= lowest) | (token < FIRST)
        here = slot
        if PREFIXES:
            here = tl.where(token < border, base, slot)
        row = (here * of_slot + token.to(tl.int64) * of_token)[:, None] + d[None, :]
        mask = there[:, None] & (d < DIM)[None, :]
        keys = tl.load(k_head + row, mask=mask, other=0.0).to(dot_dtype)
        values = tl.load(v_head + row, mask=mask, other=0.0).to(dot_dtype)
        visible = (token[None, :] < sees[:, None]) & there[None, :]
        if WINDOW:
            visible &= (token[None, :] >= sees[:, None] - WINDOW) | (token < FIRST)[None, :]
        top, total, acc = attend(q, keys, values, visible, scale, top, total, acc, SOFTCAP, True)
    return top, total, acc


@triton.jit  # type: ignore[untyped-decorator]
def attend_tiles(  # type: ignore[no-untyped-def]
    first,
    last,
    sinks,
    shift,
    low,
    clear,
    q,
    sees,
    lowest,
    k_head,
    v_head,
    k_tiles,
    v_tiles,
    of_slot,
    of_token,
    head,
    slot,
    base,
    border,
    length,
    d,
    scale,
    top,
    total,
    acc,
    dot_dtype: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
    WINDOW: tl.constexpr,
    FIRST: tl.constexpr,
    BOUNDED: tl.constexpr,
    PREFIXES: tl.constexpr,
    TMA: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Attend to tiles `first` to `last` of a sequence's list: whole where every row sees all of a tile and it lies in
    one slot, and token by token before, between and behind those.

    Tile t of the list is the sequence's tile t below `sinks`, and its tile ``t + shift`` from there on. Every row sees
    the tokens from `low` to the sequence's tile `clear`. The other parameters are those of `attend_masked`.
    """
    whole = first
    if BOUNDED:
        whole = tl.minimum(tl.maximum(tl.cdiv(low, TILE) - shift, first), last)
        top, total, acc = attend_masked(
            first, whole, sinks, shift, q, sees, lowest, k_head, v_head, of_slot, of_token, slot, base, border, length,
            d, scale, top, total, acc, dot_dtype, TILE, DIM, MASKED_STAGES, WINDOW, FIRST, BOUNDED, PREFIXES, SOFTCAP,
        )  # fmt: skip
    high = tl.minimum(tl.maximum(clear - shift, whole), last)
    own = whole
    if PREFIXES:
        based = tl.minimum(tl.maximum(border // TILE - shift, whole), high)
        own = tl.minimum(tl.maximum(tl.cdiv(border, TILE) - shift, based), high)
        top, total, acc = attend_whole(
            whole, based, shift, q, k_head, v_head, k_tiles, v_tiles, of_slot, of_token, head, base, d, scale, top,
            total, acc, dot_dtype, TILE, DIM, STAGES, TMA, SOFTCAP,
        )  # fmt: skip
        top, total, acc = attend_masked(
            based, own, sinks, shift, q, sees, lowest, k_head, v_head, of_slot, of_token, slot, base, border, length,
            d, scale, top, total, acc, dot_dtype, TILE, DIM, MASKED_STAGES, WINDOW, FIRST, BOUNDED, PREFIXES, SOFTCAP,
        )  # fmt: skip
    top, total, acc = attend_whole(
        own, high, shift, q, k_head, v_head, k_tiles, v_tiles, of_slot, of_token, head, slot, d, scale, top, total,
        acc, dot_dtype, TILE, DIM, STAGES, TMA, SOFTCAP,
    )  # fmt: skip
    return attend_masked(
        high, last, sinks, shift, q, sees, lowest, k_head, v_head, of_slot, of_token, slot, base, border, length, d,
        scale, top, total, acc, dot_dtype, TILE, DIM, MASKED_STAGES, WINDOW, FIRST, BOUNDED, PREFIXES, SOFTCAP,
    )  # fmt: skip
