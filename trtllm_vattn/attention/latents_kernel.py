"""Triton kernels of attention over latents: one row a token, which is key and value of all query heads (MLA of
DeepSeek-V2, arXiv 2405.04434, in its absorbed form).

A row has more numbers than a kernel's tile may (576 of DeepSeek-V2 and V3), so it is read in two parts: as many as the
largest power of two below, and the rest. Each is read once, and used as keys and as values. A program attends with a
block of rows of queries, a row being one query of one head, to one of several equal pieces of a sequence's tokens
(FlashDecoding); the second kernel puts pieces together, in their order, so that equal lengths give equal bits.

All is read on the device: lanes of a decode step, or chunks of prompts (`PackedPrefill.descriptors`). Nothing past a
sequence's length is loaded. Offsets are 64-bit, because slots may be terabytes apart, and rows' address is a plain
number, because Triton asks the driver about pointers, and the first slot may have no memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trtllm_vattn.attention.softmax_kernel import weighed


@triton.jit  # type: ignore[untyped-decorator]
def _whose(  # type: ignore[no-untyped-def]
    who, descriptors, lengths, query_lens, slots, QUERIES: tl.constexpr, HAS_QUERY_LENS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    """Of a lane, or with QUERIES 0 a chunk: its first row of the pass, its queries, its tokens, and its slot."""
    if QUERIES:
        first = who * QUERIES
        count = tl.load(query_lens + who) if HAS_QUERY_LENS else QUERIES
        length = tl.load(lengths + who)
        slot = tl.load(slots + who).to(tl.int64) if HAS_SLOTS else who.to(tl.int64)
    else:
        first = tl.load(descriptors + who * 4)
        count = tl.load(descriptors + who * 4 + 1)
        length = tl.load(descriptors + who * 4 + 2)
        slot = tl.load(descriptors + who * 4 + 3).to(tl.int64)
    # What makes no sense is none: its rows would lie outside.
    return first, tl.where(length >= count, tl.maximum(count, 0), 0), length, slot


@triton.jit  # type: ignore[untyped-decorator]
def attend_latents(  # type: ignore[no-untyped-def]
    q,
    latents,
    out,
    descriptors,
    lengths,
    query_lens,
    slots,
    part_tops,
    part_totals,
    part_outs,
    of_slot,
    of_token,
    scale,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    HAS_QUERY_LENS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    PIECES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """q, out ``[rows, HEADS, DIM]``; rows of latents at element ``slot * of_slot + token * of_token``. The grid is
    pieces, and lanes or chunks times `BLOCKS` blocks of `ROWS` rows. The first `FIRST` numbers of a row are a power of
    two, and the others are padded to `REST`. Lanes are QUERIES rows each; with QUERIES 0 there are chunks.

    Partial results are by unit of the grid's second dimension: tops, totals float32 ``[units, PIECES, ROWS]``, outs
    ``[units, PIECES, ROWS, FIRST + REST]``; with one piece the output is stored at once.
    """
    piece, unit = tl.program_id(0), tl.program_id(1)
    first_row, count, length, slot = _whose(
        unit // BLOCKS, descriptors, lengths, query_lens, slots, QUERIES, HAS_QUERY_LENS, HAS_SLOTS
    )
    row = unit % BLOCKS * ROWS + tl.arange(0, ROWS)
    query = row // HEADS
    here = query < count
    if unit % BLOCKS * ROWS < count * HEADS:
        low, high = tl.arange(0, FIRST), FIRST + tl.arange(0, REST)
        to = ((first_row + query).to(tl.int64) * HEADS + row % HEADS)[:, None] * DIM
        in_rest = (high < DIM)[None, :]
        q_low = tl.load(q + to + low[None, :], mask=here[:, None], other=0.0)
        q_high = tl.load(q + to + high[None, :], mask=here[:, None] & in_rest, other=0.0)
        last_query = tl.minimum(count - 1, (unit % BLOCKS * ROWS + ROWS - 1) // HEADS)
        tiles = tl.cdiv(length - count + 1 + last_query, TILE)
        each = tl.cdiv(tiles, PIECES)
        base = (latents + slot * of_slot * (q.dtype.element_ty.primitive_bitwidth // 8)).to(
            tl.pointer_type(q.dtype.element_ty)
        )
        base = tl.multiple_of(base, 16)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc_low, acc_high = tl.zeros([ROWS, FIRST], tl.float32), tl.zeros([ROWS, REST], tl.float32)
        for tile in tl.range(piece * each, tl.minimum((piece + 1) * each, tiles), num_stages=STAGES):
            token = tile * TILE + tl.arange(0, TILE)
            at = base + token.to(tl.int64)[:, None] * of_token
            there = (token < length)[:, None]
            rows_low = tl.load(at + low[None, :], mask=there, other=0.0)
            rows_high = tl.load(at + high[None, :], mask=there & in_rest, other=0.0)
            scores = tl.dot(q_low, tl.trans(rows_low), input_precision="ieee")
            scores = tl.dot(q_high, tl.trans(rows_high), scores, input_precision="ieee")
            scores = tl.where(token[None, :] < (length - count + 1 + query)[:, None], scores, float("-inf"))
            top, faded, weights = weighed(scores, scale, top, True)
            total = total * faded + tl.sum(weights, 1)
            weights = weights.to(rows_low.dtype)
            acc_low = tl.dot(weights, rows_low, acc_low * faded[:, None], input_precision="ieee")
            acc_high = tl.dot(weights, rows_high, acc_high * faded[:, None], input_precision="ieee")
        if PIECES == 1:
            # Rows of padding attend to nothing.
            over = tl.where(total != 0, total, 1.0)[:, None]
            tl.store(out + to + low[None, :], (acc_low / over).to(out.dtype.element_ty), mask=here[:, None])
            tl.store(out + to + high[None, :], (acc_high / over).to(out.dtype.element_ty), mask=here[:, None] & in_rest)
        else:
            part = (unit * PIECES + piece) * ROWS + tl.arange(0, ROWS)
            tl.store(part_tops + part, top)
            tl.store(part_totals + part, total)
            to_part = part.to(tl.int64)[:, None] * (FIRST + REST)
            tl.store(part_outs + to_part + low[None, :], acc_low)
            tl.store(part_outs + to_part + high[None, :], acc_high)
    if QUERIES and PIECES == 1:
        # Queries that a lane has not got.
        zero = tl.zeros([ROWS, FIRST], out.dtype.element_ty)
        over = (~here & (query < QUERIES))[:, None]
        to = ((first_row + query).to(tl.int64) * HEADS + row % HEADS)[:, None] * DIM
        d = tl.arange(0, FIRST)[None, :]
        tl.store(out + to + d, zero, mask=over)
        tl.store(out + to + FIRST + d, zero, mask=over & (FIRST + d < DIM))


@triton.jit  # type: ignore[untyped-decorator]
def combine_pieces(  # type: ignore[no-untyped-def]
    out,
    descriptors,
    lengths,
    query_lens,
    slots,
    part_tops,
    part_totals,
    part_outs,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    HAS_QUERY_LENS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Put the pieces of `attend_latents` together; the grid is its units, and the rows of a block."""
    unit, of_block = tl.program_id(0), tl.program_id(1)
    first_row, count, _, _ = _whose(
        unit // BLOCKS, descriptors, lengths, query_lens, slots, QUERIES, HAS_QUERY_LENS, HAS_SLOTS
    )
    row = unit % BLOCKS * ROWS + of_block
    query = row // HEADS
    d = tl.arange(0, 2 * FIRST)
    to = out + ((first_row + query).to(tl.int64) * HEADS + row % HEADS) * DIM + d
    if query < count:
        piece = (unit * PIECES + tl.arange(0, PIECES)) * ROWS + of_block
        tops = tl.load(part_tops + piece)
        highest = tl.max(tops, 0)
        total = tl.sum(tl.load(part_totals + piece) * tl.exp2(tops - highest), 0)
        acc = tl.zeros([2 * FIRST], tl.float32)
        for one in range(0, PIECES):
            at = (unit * PIECES + one) * ROWS + of_block
            weight = tl.exp2(tl.load(part_tops + at) - highest)
            from_part = part_outs + at.to(tl.int64) * (FIRST + REST) + d
            acc += tl.load(from_part, mask=d < FIRST + REST, other=0.0) * weight
        tl.store(to, (acc / total).to(out.dtype.element_ty), mask=d < DIM)
    elif query < QUERIES:
        tl.store(to, tl.zeros([2 * FIRST], out.dtype.element_ty), mask=d < DIM)
