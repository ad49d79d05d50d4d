"""Triton kernels of causal attention for chunks of prompts, straight over flat KV.

A tile is `BLOCK_M` rows, a row one query of one query head of a KV head; the query heads of a KV head share its tiles,
so that a chunk of few queries fills them too. A tile's keys may be divided into several pieces, which leave partial
results that the last one to finish combines in a fixed order (FlashAttention's split-KV, arXiv 2307.08691). All chunks
are read on the device. `plan_prompts` runs once a step: it lists the pieces, those with the most keys first, and
divides keys as far as this is expected to shorten the launch. `attend_prompts` runs in every layer: each program takes
pieces of the list in turns.

With a window, a tile's blocks begin where the window of its first query does, behind those of the first tokens that
stay visible. Where a sequence's first tokens lie in another slot, blocks are read whole from the one and from the
other, and the block between them row by row. What a layer does not use is not compiled.

Nothing past a sequence's length is loaded. K and V are passed as plain numbers, because Triton asks the driver about
pointers, and the first slot may have no memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trtllm_vattn.attention.softmax_kernel import (
    attend,
    attend_masked,
    attend_tiles,
    attend_whole,
    merged,
    rows_from,
    sunk_and_scaled,
)

FIELDS = tl.constexpr(16)
"""int32 numbers of a piece in the list: its chunk's first row, rows, length and slot; its tile of the chunk; its first
block of keys and the end of its last; pieces of its tile; the first one's place among all parts, and its own."""


@triton.jit  # type: ignore[untyped-decorator]
def _tile(t, descriptors, chunks, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tiles by number, in the order of the chunks: the numbers of their chunk, the tile of the chunk, and its blocks of
    keys, 0 past the last tile."""
    first, rows, length, slot, tile = t * 0, t * 0, t * 0, t * 0, t * 0
    begin = 0
    for chunk in range(0, chunks):
        of_chunk = descriptors + chunk * 4
        its_rows = tl.load(of_chunk + 1)
        its_length = tl.load(of_chunk + 2)
        # Descriptors that make no sense are none: their rows and keys would lie outside.
        its_rows = tl.where(its_length >= its_rows, tl.maximum(its_rows, 0), 0)
        tiles = tl.cdiv(its_rows * GROUP, BLOCK_M)
        mine = (t >= begin) & (t < begin + tiles)
        first = tl.where(mine, tl.load(of_chunk), first)
        rows = tl.where(mine, its_rows, rows)
        length = tl.where(mine, its_length, length)
        slot = tl.where(mine, tl.load(of_chunk + 3), slot)
        tile = tl.where(mine, t - begin, tile)
        begin += tiles
    queries = tl.minimum(rows, tl.cdiv((tile + 1) * BLOCK_M, GROUP))
    return first, rows, length, slot, tile, tl.cdiv(length - rows + queries, BLOCK_N)


@triton.jit  # type: ignore[untyped-decorator]
def _windowed(  # type: ignore[no-untyped-def]
    end,
    tile,
    rows,
    length,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Of tiles whose keys end with block `end`: how many blocks they read, how many of those hold first tokens before
    the window, and how far beyond its number in the list each block behind those lies."""
    begin = tl.maximum(length - rows + tile * BLOCK_M // GROUP + 1 - WINDOW, 0) // BLOCK_N
    begin = tl.minimum(begin, end)
    sinks = tl.minimum(begin, (FIRST + BLOCK_N - 1) // BLOCK_N)
    return end - begin + sinks, sinks, begin - sinks


@triton.jit(do_not_specialize=["chunks", "keep", "programs", "most_parts", "start"])  # type: ignore[untyped-decorator]
def plan_prompts(  # type: ignore[no-untyped-def]
    descriptors,
    header,
    pieces,
    chunks,
    keep,
    programs,
    most_parts,
    start,
    TILES: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    FIRST: tl.constexpr,
):
    """List the pieces of chunks, descriptors int32 ``[chunks, 4]``, for `programs` programs.

    header int32 ``[2]``: pieces of a KV head, and the end of the last chunk's rows or `keep`, whichever is later.
    pieces int32 ``[TILES + most_parts, FIELDS]``. `start` is what a piece costs besides its keys, in blocks of keys; a
    divided tile's piece costs as much again. There are at most `most_parts` pieces of divided tiles in all heads.
    """
    t = tl.arange(0, TILES)
    _, rows, length, _, tile, blocks = _tile(t, descriptors, chunks, GROUP, BLOCK_M, BLOCK_N)
    if WINDOW:
        blocks, _, _ = _windowed(blocks, tile, rows, length, GROUP, BLOCK_M, BLOCK_N, WINDOW, FIRST)
    there = blocks > 0
    longest = tl.max(blocks, 0)
    best_cap = longest
    best = tl.full([], 3.0e38, tl.float32)
    for splits in range(1, MOST_SPLITS + 1):
        cap = tl.maximum(tl.cdiv(longest, splits), 1)
        count = tl.cdiv(blocks, cap)
        cost = tl.cdiv(blocks, tl.maximum(count, 1)) + tl.where(count > 1, 2 * start, start)
        total = tl.sum(tl.where(there, count * cost, 0).to(tl.float32), 0) * KV_HEADS
        number = tl.sum(count, 0) * KV_HEADS
        parts = tl.sum(tl.where(count > 1, count, 0), 0) * KV_HEADS
        most = tl.max(tl.where(there, cost, 0), 0)
        least = tl.min(tl.where(there, cost, 1 << 30), 0)
        # The longest first: the last piece to begin is a short one, or all are alike and go in rounds.
        mixed = total / programs + least
        alike = (tl.cdiv(number, programs) * most).to(tl.float32)
        expected = tl.maximum(most.to(tl.float32), tl.minimum(mixed, alike))
        better = (expected < best) & ((parts <= most_parts) | (splits == 1))
        best_cap = tl.where(better, cap, best_cap)
        best = tl.where(better, expected, best)
    best_cap = tl.maximum(best_cap, 1)

    count = tl.cdiv(blocks, best_cap)
    size = tl.cdiv(blocks, tl.maximum(count, 1))
    keys = tl.sort((((1 << 30) - size).to(tl.int64) << 32) | t)
    ordered = (keys & 0xFFFFFFFF).to(tl.int32)
    first, rows, length, slot, tile, blocks = _tile(ordered, descriptors, chunks, GROUP, BLOCK_M, BLOCK_N)
    if WINDOW:
        blocks, _, _ = _windowed(blocks, tile, rows, length, GROUP, BLOCK_M, BLOCK_N, WINDOW, FIRST)
    count = tl.cdiv(blocks, best_cap)
    size = tl.cdiv(blocks, tl.maximum(count, 1))
    begin = tl.cumsum(count, 0) - count
    divided = tl.where(count > 1, count, 0)
    part = tl.cumsum(divided, 0) - divided
    for split in range(0, tl.max(count, 0)):
        mask = split < count
        to = pieces + (begin + split) * FIELDS
        tl.store(to, first, mask=mask)
        tl.store(to + 1, rows, mask=mask)
        tl.store(to + 2, length, mask=mask)
        tl.store(to + 3, slot, mask=mask)
        tl.store(to + 4, tile, mask=mask)
        tl.store(to + 5, split * blocks // tl.maximum(count, 1), mask=mask)
        tl.store(to + 6, (split + 1) * blocks // tl.maximum(count, 1), mask=mask)
        tl.store(to + 7, count, mask=mask)
        tl.store(to + 8, part, mask=mask)
        tl.store(to + 9, split + tl.zeros([TILES], tl.int32), mask=mask)
    tl.store(header, tl.sum(count, 0))
    ends = tl.max(tl.where(blocks > 0, first + rows, 0), 0)
    tl.store(header + 1, tl.maximum(ends, keep))


@triton.jit  # type: ignore[untyped-decorator]
def _finish(  # type: ignore[no-untyped-def]
    out,
    from_row,
    mask,
    top,
    total,
    acc,
    head,
    row,
    sink_logits,
    v_scale,
    GROUP: tl.constexpr,
    SINKS: tl.constexpr,
    V_SCALES: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Store rows' output, with the sink logits and the scale of values."""
    total, acc = sunk_and_scaled(top, total, acc, head, row, sink_logits, v_scale, GROUP, SINKS, V_SCALES)
    result = acc / total[:, None]
    if HEADS:
        # A head may hold nothing that a query sees.
        result = tl.where((total != 0)[:, None], result, 0.0)
    tl.store(out + from_row, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["all_rows", "of_group"])  # type: ignore[untyped-decorator]
def attend_prompts(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    k_tiles,
    v_tiles,
    out,
    header,
    pieces,
    part_tops,
    part_totals,
    part_outs,
    arrived,
    base_slots,
    borders,
    sink_logits,
    k_scale,
    v_scale,
    head_bases,
    head_groups,
    deficits,
    of_group,
    of_slot,
    of_token,
    of_head,
    all_rows,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
    WINDOW: tl.constexpr,
    FIRST: tl.constexpr,
    PREFIXES: tl.constexpr,
    SINKS: tl.constexpr,
    FP8: tl.constexpr,
    K_SCALES: tl.constexpr,
    V_SCALES: tl.constexpr,
    HEADS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Causal attention of chunks: q, out ``[all_rows, KV_HEADS * GROUP, DIM]``.

    K and V of a token are at element ``slot * of_slot + token * of_token + head * of_head``. Rows behind the last
    chunk's get zeros. The other parameters are those of `decode_shares`.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    d = tl.arange(0, DIMS)
    row_range = tl.arange(0, BLOCK_M)
    kv_dtype: tl.constexpr = tl.float8e4nv if FP8 else q.dtype.element_ty
    dot_dtype: tl.constexpr = tl.float16 if FP8 else q.dtype.element_ty
    bytes_each: tl.constexpr = kv_dtype.primitive_bitwidth // 8
    number = tl.load(header) * KV_HEADS
    turn = 0
    at = program
    while at < number:
        head = at % KV_HEADS
        piece = pieces + (at // KV_HEADS) * FIELDS
        chunk_row = tl.load(piece)
        chunk_rows = tl.load(piece + 1)
        length = tl.load(piece + 2)
        slot = tl.load(piece + 3).to(tl.int64)
        tile = tl.load(piece + 4)
        first = tl.load(piece + 5)
        last = tl.load(piece + 6)
        splits = tl.load(piece + 7)

        if HEADS:
            length -= tl.load(deficits + tl.load(head_groups + head).to(tl.int64) * of_group + slot)
            last = tl.minimum(last, tl.cdiv(tl.maximum(length, 0), BLOCK_N))
            k_head = tl.load(head_bases + 2 * head).to(tl.pointer_type(kv_dtype))
            v_head = tl.load(head_bases + 2 * head + 1).to(tl.pointer_type(kv_dtype))
        else:
            from_first = head.to(tl.int64) * of_head * bytes_each
            k_head, v_head = (
                (k + from_first).to(tl.pointer_type(kv_dtype)),
                (v + from_first).to(tl.pointer_type(kv_dtype)),
            )
        k_head, v_head = tl.multiple_of(k_head, 16), tl.multiple_of(v_head, 16)
        row = tile * BLOCK_M + row_range
        query = row // GROUP
        here = query < chunk_rows
        q_row = (chunk_row + query).to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + row % GROUP
        from_row = q_row[:, None] * DIM + d[None, :]
        queries = tl.load(q + from_row, mask=here[:, None] & (d < DIM)[None, :], other=0.0)
        queries = queries.to(dot_dtype)
        head_scale = scale
        if K_SCALES:
            head_scale = scale * tl.load(k_scale + head * (K_SCALES - 1))
        sees = length - chunk_rows + query + 1
        whole = length // BLOCK_N
        # What the tile's first query sees, every one does.
        clear = tl.minimum(whole, (length - chunk_rows + tile * BLOCK_M // GROUP + 1) // BLOCK_N)

        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, DIMS], tl.float32)
        if PREFIXES or WINDOW > 0:
            sinks = 0
            shift = 0
            lowest = 0
            low = 0
            base = slot
            border = 0
            if PREFIXES:
                base = tl.load(base_slots + slot).to(tl.int64)
                border = tl.load(borders + slot)
            if WINDOW:
                queries_seen = tl.minimum(chunk_rows, tl.cdiv((tile + 1) * BLOCK_M, GROUP))
                blocks = tl.cdiv(length - chunk_rows + queries_seen, BLOCK_N)
                _, sinks, shift = _windowed(blocks, tile, chunk_rows, length, GROUP, BLOCK_M, BLOCK_N, WINDOW, FIRST)
                lowest = tl.maximum(length - chunk_rows + tile * BLOCK_M // GROUP + 1 - WINDOW, 0)
                last_query = tl.minimum(chunk_rows - 1, ((tile + 1) * BLOCK_M - 1) // GROUP)
                low = tl.maximum(length - chunk_rows + last_query + 1 - WINDOW, 0)
            top, total, acc = attend_tiles(
                first, last, sinks, shift, low, clear, queries, sees, lowest, k_head, v_head, k_tiles, v_tiles, of_slot,
                of_token, head, slot, base, border, length, d, head_scale, top, total, acc, dot_dtype, BLOCK_N, DIM,
                STAGES, 1, WINDOW, FIRST, WINDOW > 0, PREFIXES, TMA, SOFTCAP,
            )  # fmt: skip
        else:
            whole, clear = tl.minimum(last, whole), tl.minimum(last, clear)
            top, total, acc = attend_whole(
                first, clear, 0, queries, k_head, v_head, k_tiles, v_tiles, of_slot, of_token, head, slot, d,
                head_scale, top, total, acc, dot_dtype, BLOCK_N, DIM, STAGES, TMA, SOFTCAP,
            )  # fmt: skip
            k_slot, v_slot = tl.multiple_of(k_head + slot * of_slot, 16), tl.multiple_of(v_head + slot * of_slot, 16)
            for block in tl.range(tl.maximum(first, clear), whole, num_stages=1):
                token = block * BLOCK_N
                keys = rows_from(k_slot, k_tiles, slot, token, head, of_token, d, BLOCK_N, DIM, TMA).to(dot_dtype)
                values = rows_from(v_slot, v_tiles, slot, token, head, of_token, d, BLOCK_N, DIM, TMA).to(dot_dtype)
                visible = (token + tl.arange(0, BLOCK_N))[None, :] < sees[:, None]
                top, total, acc = attend(queries, keys, values, visible, head_scale, top, total, acc, SOFTCAP, True)
            # The block in which the sequence ends, if it is among them.
            top, total, acc = attend_masked(
                tl.maximum(first, whole), last, 0, 0, queries, sees, 0, k_head, v_head, of_slot, of_token, slot, slot,
                0, length, d, head_scale, top, total, acc, dot_dtype, BLOCK_N, DIM, 1, 0, 0, False, False, SOFTCAP,
            )  # fmt: skip

        result_mask = here[:, None] & (d < DIM)[None, :]
        if splits == 1:
            _finish(
                out, from_row, result_mask, top, total, acc, head, row, sink_logits, v_scale, GROUP, SINKS, V_SCALES,
                HEADS,
            )  # fmt: skip
        else:
            parts = tl.load(piece + 8)
            part = ((parts + tl.load(piece + 9)) * KV_HEADS + head) * BLOCK_M + row_range
            tl.store(part_tops + part, top)
            tl.store(part_totals + part, total)
            tl.store(part_outs + part[:, None] * DIMS + d[None, :], acc)
            tl.debug_barrier()
            counter = arrived + parts * KV_HEADS + head
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == splits - 1:
                top = tl.full([BLOCK_M], float("-inf"), tl.float32)
                total = tl.zeros([BLOCK_M], tl.float32)
                acc = tl.zeros([BLOCK_M, DIMS], tl.float32)
                for split in range(0, splits):
                    # Bypass the L1 cache, which is not coherent with other multiprocessors' stores.
                    other = ((parts + split) * KV_HEADS + head) * BLOCK_M + row_range
                    part_top = tl.load(part_tops + other, cache_modifier=".cg")
                    part_total = tl.load(part_totals + other, cache_modifier=".cg")
                    part_out = tl.load(part_outs + other[:, None] * DIMS + d[None, :], cache_modifier=".cg")
                    top, total, acc = merged(top, total, acc, part_top, part_total, part_out)
                _finish(
                    out, from_row, result_mask, top, total, acc, head, row, sink_logits, v_scale, GROUP, SINKS,
                    V_SCALES, HEADS,
                )  # fmt: skip
                tl.store(counter, 0)
        # There and back: who began with the longest pieces goes on with the shortest ones.
        turn += 1
        at = turn * programs + tl.where(turn % 2 == 0, program, programs - 1 - program)

    behind = tl.load(header + 1) + program
    while behind < all_rows:
        elements: tl.constexpr = KV_HEADS * GROUP * DIM
        for some in range(0, elements, 1024):
            element = some + tl.arange(0, 1024)
            zeros = tl.zeros([1024], out.dtype.element_ty)
            tl.store(out + behind.to(tl.int64) * elements + element, zeros, mask=element < elements)
        behind += programs
