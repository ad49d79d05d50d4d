"""The Triton kernel of decode attention by equal shares, after LeanAttention (arXiv 2405.10480).

The work of a launch is a list of tiles of `TILE` tokens, ordered by lane and then by KV head. Every program takes an
equal part of the list, regardless of where sequences and heads begin. A program that has all tiles of a head stores the
head's output. If several programs share a head, each stores a partial result, and the last one to finish combines the
partial results in a fixed order, so that equal lengths give equal bits. Each program computes its part of the list from
the lengths, which it reads on the device.

Offsets are 64-bit, because slots may be terabytes apart. K and V are passed as plain numbers, because Triton asks the
driver about pointers, and the first slot may have no memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _tiles_of(base, tiles, slot, token, head, of_token, d, TILE: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of K or V from `token` on, ``[TILE, len(d)]``, all below the length; dimensions past `DIM` are zeros."""
    if TMA:
        return tiles.load([slot.to(tl.int32), token, head, 0]).reshape(TILE, d.shape[0])
    at = base + (token + tl.arange(0, TILE)).to(tl.int64)[:, None] * of_token + d[None, :]
    if d.shape[0] == DIM:
        return tl.load(at)
    return tl.load(at, mask=(d < DIM)[None, :], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _attend(q, k, v, visible, scale, top, total, acc, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add a tile to each row's online softmax: its largest score, the sum of its weights, and its output."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    if MASKED:
        # The row has attended to no token yet.
        higher = tl.where(higher == float("-inf"), 0.0, higher)
    faded = tl.exp2(top - higher)
    weights = tl.exp2(scores - higher[:, None])
    total = total * faded + tl.sum(weights, 1)
    acc = acc * faded[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return higher, total, acc


@triton.jit  # type: ignore[untyped-decorator]
def _row_offsets(rows, lane, head, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The indices of a KV head's rows among all rows of q and out."""
    return (lane.to(tl.int64) * QUERIES + rows // GROUP) * (KV_HEADS * GROUP) + head * GROUP + rows % GROUP


@triton.jit  # type: ignore[untyped-decorator]
def _store(  # type: ignore[no-untyped-def]
    out,
    total,
    acc,
    rows,
    lane,
    head,
    count,
    d,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
):
    """Store the output of some rows; zeros for queries past `count`."""
    given = (rows // GROUP < count) & (total > 0)
    result = tl.where(given[:, None], acc / total[:, None], 0.0)
    to = out + _row_offsets(rows, lane, head, KV_HEADS, GROUP, QUERIES)[:, None] * DIM + d[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=(rows < GROUP * QUERIES)[:, None] & (d < DIM)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _combined(  # type: ignore[no-untyped-def]
    part_tops,
    part_totals,
    part_outs,
    first_program,
    last_program,
    here,
    d,
    ROWS: tl.constexpr,
    PART_ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Combine the partial results of a head, `PARTS` at a time: each row's sum of weights, and its output."""
    row_range = tl.arange(0, PART_ROWS)
    top = tl.full([PART_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([PART_ROWS], tl.float32)
    acc = tl.zeros([PART_ROWS, d.shape[0]], tl.float32)
    for some in range(first_program, last_program + 1, PARTS):
        for one in tl.static_range(PARTS):
            who = some + one
            there = here & (who <= last_program)
            part = (who * 2 + (who == first_program).to(tl.int32)) * ROWS + row_range
            # Bypass the L1 cache, which is not coherent with other multiprocessors' stores.
            part_top = tl.load(part_tops + part, mask=there, other=float("-inf"), cache_modifier=".cg")
            part_total = tl.load(part_totals + part, mask=there, other=0.0, cache_modifier=".cg")
            at = part_outs + part[:, None] * d.shape[0] + d[None, :]
            part_out = tl.load(at, mask=there[:, None], other=0.0, cache_modifier=".cg")
            higher = tl.maximum(top, part_top)
            higher = tl.where(higher == float("-inf"), 0.0, higher)
            faded, weight = tl.exp2(top - higher), tl.exp2(part_top - higher)
            total = total * faded + part_total * weight
            acc = acc * faded[:, None] + part_out * weight[:, None]
            top = higher
    return total, acc


@triton.jit(do_not_specialize=["lanes", "start", "fewest"])  # type: ignore[untyped-decorator]
def decode_shares(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    k_tiles,
    v_tiles,
    out,
    lengths,
    query_lens,
    slots,
    part_tops,
    part_totals,
    part_outs,
    arrived,
    of_slot,
    of_token,
    of_head,
    lanes,
    start,
    fewest,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    PART_ROWS: tl.constexpr,
    HAS_QUERY_LENS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """Decode attention: q, out ``[lanes, QUERIES, KV_HEADS * GROUP, DIM]``.

    K and V of a token are at element ``slot * of_slot + token * of_token + head * of_head``. A row is one query of one
    query head; a KV head has `ROW_BLOCKS` blocks of `ROWS` rows. The cost of starting a sequence counts as `start`
    tiles; a program takes at least `fewest` tiles.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    lane_range = tl.arange(0, LANES)
    n = tl.load(lengths + lane_range, mask=lane_range < lanes, other=0)
    if HAS_QUERY_LENS:
        n = tl.where(tl.load(query_lens + lane_range, mask=lane_range < lanes, other=0) > 0, n, 0)
    weight = tl.where(n > 0, tl.cdiv(n, TILE) + start, 0) * (KV_HEADS * ROW_BLOCKS)
    begins = tl.cumsum(weight, 0) - weight
    share = tl.maximum(tl.cdiv(tl.sum(weight, 0), programs), fewest)
    at = program * share
    end = tl.minimum(at + share, tl.sum(weight, 0))
    places = (begins.to(tl.int64) << 32) | lane_range
    d = tl.arange(0, DIMS)
    row_range = tl.arange(0, ROWS)
    kv_dtype = q.dtype.element_ty

    while at < end:
        # The last lane that begins at or before `at`; a lane of length 0 begins where the next one does.
        place = tl.max(tl.where(begins <= at, places, 0), 0)
        lane = (place & 0xFFFFFFFF).to(tl.int32)
        length = tl.load(lengths + lane)
        count = tl.load(query_lens + lane) if HAS_QUERY_LENS else QUERIES
        slot = tl.load(slots + lane).to(tl.int64) if HAS_SLOTS else lane.to(tl.int64)
        tiles = tl.cdiv(length, TILE)
        offset = at - (place >> 32).to(tl.int32)
        unit = offset // (tiles + start)
        head = unit // ROW_BLOCKS
        from_start = offset - unit * (tiles + start)
        until = tl.minimum(tiles + start, from_start + end - at)
        first = tl.maximum(from_start - start, 0)
        last = tl.maximum(until - start, 0)

        k_head = (k + (slot * of_slot + head * of_head) * (kv_dtype.primitive_bitwidth // 8)).to(
            tl.pointer_type(kv_dtype)
        )
        v_head = (v + (slot * of_slot + head * of_head) * (kv_dtype.primitive_bitwidth // 8)).to(
            tl.pointer_type(kv_dtype)
        )
        k_head, v_head = tl.multiple_of(k_head, 16), tl.multiple_of(v_head, 16)
        seen_by_all = length - count + 1
        whole = tl.minimum(last, seen_by_all // TILE)
        # All that was read so far is older than the kernel before this one. A second wait costs nothing.
        if PDL:
            tl.extra.cuda.gdc_wait()

        rows = (unit % ROW_BLOCKS) * ROWS + row_range
        query = rows // GROUP
        here = rows < GROUP * QUERIES
        from_lane = _row_offsets(rows, lane, head, KV_HEADS, GROUP, QUERIES)[:, None] * DIM + d[None, :]
        queries = tl.load(q + from_lane, mask=here[:, None] & (d < DIM)[None, :], other=0.0)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIMS], tl.float32)
        for tile in tl.range(first, whole, num_stages=STAGES):
            keys = _tiles_of(k_head, k_tiles, slot, tile * TILE, head, of_token, d, TILE, DIM, TMA)
            values = _tiles_of(v_head, v_tiles, slot, tile * TILE, head, of_token, d, TILE, DIM, TMA)
            top, total, acc = _attend(queries, keys, values, True, scale, top, total, acc, False)
        for tile in tl.range(tl.maximum(first, whole), last, num_stages=2):
            token = tile * TILE + tl.arange(0, TILE)
            mask = (token < length)[:, None] & (d < DIM)[None, :]
            from_head = token.to(tl.int64)[:, None] * of_token + d[None, :]
            keys = tl.load(k_head + from_head, mask=mask, other=0.0)
            values = tl.load(v_head + from_head, mask=mask, other=0.0)
            visible = token[None, :] < (seen_by_all + query)[:, None]
            visible &= (token < length)[None, :]
            top, total, acc = _attend(queries, keys, values, visible, scale, top, total, acc, True)

        if (first == 0) & (last == tiles):
            _store(out, total, acc, rows, lane, head, count, d, KV_HEADS, GROUP, QUERIES, DIM)
        elif last > first:
            # A program has at most two partial results: the end of one head and the beginning of another.
            part = (program * 2 + (first == 0).to(tl.int32)) * ROWS
            tl.store(part_tops + part + row_range, top, mask=here)
            tl.store(part_totals + part + row_range, total, mask=here)
            tl.store(part_outs + (part + row_range)[:, None] * DIMS + d[None, :], acc, mask=here[:, None])
            tl.debug_barrier()
            begin = at - from_start
            first_program = (begin + start) // share
            last_program = (begin + start + tiles - 1) // share
            counter = arrived + lane * (KV_HEADS * ROW_BLOCKS) + unit
            before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            if before == last_program - first_program:
                block_rows = (unit % ROW_BLOCKS) * ROWS + tl.arange(0, PART_ROWS)
                whole_total, whole_acc = _combined(
                    part_tops,
                    part_totals,
                    part_outs,
                    first_program,
                    last_program,
                    block_rows < GROUP * QUERIES,
                    d,
                    ROWS,
                    PART_ROWS,
                    PARTS,
                )
                _store(out, whole_total, whole_acc, block_rows, lane, head, count, d, KV_HEADS, GROUP, QUERIES, DIM)
                tl.store(counter, 0)
        at += until - from_start

    if PDL:
        tl.extra.cuda.gdc_wait()
    idle = program
    while idle < lanes:
        length = tl.load(lengths + idle)
        if HAS_QUERY_LENS:
            length = tl.where(tl.load(query_lens + idle) > 0, length, 0)
        if length <= 0:
            elements: tl.constexpr = QUERIES * KV_HEADS * GROUP * DIM
            for some in range(0, elements, 1024):
                element = some + tl.arange(0, 1024)
                zeros = tl.zeros([1024], out.dtype.element_ty)
                tl.store(out + idle.to(tl.int64) * elements + element, zeros, mask=element < elements)
        idle += programs
