"""The Triton kernel of decode attention by equal shares, after LeanAttention (arXiv 2405.10480).

The work of a launch is a list of tiles of `TILE` tokens, ordered by lane and then by KV head. Every program takes an
equal part of the list, regardless of where sequences and heads begin. A program that has all tiles of a head stores the
head's output. If several programs share a head, each stores a partial result, and the last one to finish combines the
partial results in a fixed order, so that equal lengths give equal bits. Each program computes its part of the list from
the lengths, which it reads on the device.

With `PIECE`, a head's tiles are cut at every `PIECE`-th one, whatever the other lanes are and however many programs
there are, and a program takes the pieces that begin in its part of the list. A head's pieces are combined from the
first to the last, so that a lane's bits depend on its own length, queries, keys and values alone (the fixed split-size
of He et al., Defeating Nondeterminism in LLM Inference, 2025).

What a layer or a step does not use is not compiled. A window, a prefix in another slot and a prefix that a group of
lanes reads together (prefix_kernel.py) change which tiles a lane has: those that hold only tokens which every query of
the lane sees, in one slot, are read whole, and the others row by row, each row under its own conditions. Where heads
have lengths of their own, the list of tiles is ordered by lane and head with each head's own length, so uneven heads
cost what even ones do.

K and V are passed as plain numbers, because Triton asks the driver about pointers, and the first slot may have no
memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trtllm_vattn.attention.softmax_kernel import attend_tiles, merged, sunk_and_scaled


@triton.jit  # type: ignore[untyped-decorator]
def _planned(n, skip, TILE: tl.constexpr, QUERIES: tl.constexpr, WINDOW: tl.constexpr, FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of lanes of `n` tokens that do not read the first `skip`: how many tiles they read; how many of those hold first
    tokens before the window; and how far beyond its number in the list each tile behind those lies."""
    begin = skip
    if WINDOW:
        begin = tl.maximum(begin, n - (QUERIES - 1) - WINDOW)
    first = begin // TILE
    sinks = tl.minimum(first, (FIRST + TILE - 1) // TILE)
    return tl.maximum(tl.cdiv(n, TILE) - first + sinks, 0), sinks, first - sinks


@triton.jit
def share_of(weight, places, program, fewest):  # type: ignore[no-untyped-def]
    """Of a list of places with so much work each: where each begins (with its number, below 2**32, in one), how much a
    program takes, and where this program's share begins and ends."""
    begins = tl.cumsum(weight, 0) - weight
    work = tl.sum(weight, 0)
    share = tl.maximum(tl.cdiv(work, tl.num_programs(0)), fewest)
    at = program * share
    return begins, (begins.to(tl.int64) << 32) | places, share, at, tl.minimum(at + share, work)


@triton.jit
def unit_at(at, end, offset, tiles, start):  # type: ignore[no-untyped-def]
    """Of units of `start` and `tiles` work, of which work `at`, that far in a place, is in one: which one; where in it
    that is, and where the share ends in it; and the first tile, and the end of the last, between the two."""
    unit = offset // (tiles + start)
    from_start = offset - unit * (tiles + start)
    until = tl.minimum(tiles + start, from_start + end - at)
    return unit, from_start, until, tl.maximum(from_start - start, 0), tl.maximum(until - start, 0)


@triton.jit  # type: ignore[untyped-decorator]
def begin_of_piece(begins, places, at, end, lengths, start, TILE: tl.constexpr, PIECE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first work from `at` on with which a piece begins, `at` if that is not before `end`. Each piece costs `start`
    besides its tiles."""
    if at < end:
        place = tl.max(tl.where(begins <= at, places, 0), 0)
        tiles = tl.cdiv(tl.load(lengths + (place & 0xFFFFFFFF).to(tl.int32)), TILE)
        unit_work = tiles + start * tl.cdiv(tiles, PIECE)
        offset = (at - (place >> 32).to(tl.int32)) % unit_work
        at += tl.minimum(tl.cdiv(offset, PIECE + start) * (PIECE + start), unit_work) - offset
    return at


@triton.jit  # type: ignore[untyped-decorator]
def piece_at(offset, tiles, start, PIECE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of units of `tiles`, of which a piece begins at work `offset`: which unit, which of its pieces, and the first
    tile, and the end of the last, of the piece."""
    unit_work = tiles + start * tl.cdiv(tiles, PIECE)
    unit = offset // unit_work
    piece = (offset - unit * unit_work) // (PIECE + start)
    return unit, piece, piece * PIECE, tl.minimum((piece + 1) * PIECE, tiles)


@triton.jit
def _store_part(part_tops, part_totals, part_outs, part, top, total, acc, here, d):  # type: ignore[no-untyped-def]
    """Store what rows carry as part `part` of their places."""
    tl.store(part_tops + part, top, mask=here)
    tl.store(part_totals + part, total, mask=here)
    tl.store(part_outs + part[:, None] * d.shape[0] + d[None, :], acc, mask=here[:, None])
    tl.debug_barrier()


@triton.jit  # type: ignore[untyped-decorator]
def leave_piece(  # type: ignore[no-untyped-def]
    part_tops,
    part_totals,
    part_outs,
    counter,
    top,
    total,
    acc,
    here,
    d,
    first_part,
    piece,
    pieces,
    ROWS: tl.constexpr,
    PART_ROWS: tl.constexpr,
):
    """Leave a piece of a unit whose pieces' parts begin at `first_part`; returns whether all the others are left."""
    part = (first_part + piece) * PART_ROWS + tl.arange(0, ROWS)
    _store_part(part_tops, part_totals, part_outs, part, top, total, acc, here, d)
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == pieces - 1


@triton.jit  # type: ignore[untyped-decorator]
def leave_part(  # type: ignore[no-untyped-def]
    part_tops,
    part_totals,
    part_outs,
    counter,
    top,
    total,
    acc,
    here,
    d,
    program,
    first,
    tiles,
    begin,
    start,
    share,
    ROWS: tl.constexpr,
):
    """Leave a program's part of a unit that begins at work `begin`; returns the first and the last program that have
    parts of it, and whether all the others have left theirs."""
    # A program has at most two parts: the end of one unit and the beginning of another.
    part = (program * 2 + (first == 0).to(tl.int32)) * ROWS + tl.arange(0, ROWS)
    _store_part(part_tops, part_totals, part_outs, part, top, total, acc, here, d)
    first_program = (begin + start) // share
    last_program = (begin + start + tiles - 1) // share
    before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    return first_program, last_program, before == last_program - first_program


@triton.jit  # type: ignore[untyped-decorator]
def combined(  # type: ignore[no-untyped-def]
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
    PIECES: tl.constexpr = False,
):
    """Combine the parts of a unit, `PARTS` at a time: each row's largest score, the sum of its weights, and its
    output. They are those of programs, or with `PIECES` parts by their own numbers."""
    row_range = tl.arange(0, PART_ROWS)
    top = tl.full([PART_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([PART_ROWS], tl.float32)
    acc = tl.zeros([PART_ROWS, d.shape[0]], tl.float32)
    for some in range(first_program, last_program + 1, PARTS):
        for one in tl.static_range(PARTS):
            who = some + one
            there = here & (who <= last_program)
            if PIECES:
                part = who * PART_ROWS + row_range
            else:
                part = (who * 2 + (who == first_program).to(tl.int32)) * ROWS + row_range
            # Bypass the L1 cache, which is not coherent with other multiprocessors' stores.
            part_top = tl.load(part_tops + part, mask=there, other=float("-inf"), cache_modifier=".cg")
            part_total = tl.load(part_totals + part, mask=there, other=0.0, cache_modifier=".cg")
            at = part_outs + part[:, None] * d.shape[0] + d[None, :]
            part_out = tl.load(at, mask=there[:, None], other=0.0, cache_modifier=".cg")
            top, total, acc = merged(top, total, acc, part_top, part_total, part_out)
    return top, total, acc


@triton.jit  # type: ignore[untyped-decorator]
def _row_offsets(rows, lane, head, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The indices of a KV head's rows among all rows of q and out."""
    return (lane.to(tl.int64) * QUERIES + rows // GROUP) * (KV_HEADS * GROUP) + head * GROUP + rows % GROUP


@triton.jit  # type: ignore[untyped-decorator]
def _finish(  # type: ignore[no-untyped-def]
    out,
    top,
    total,
    acc,
    rows,
    lane,
    head,
    count,
    d,
    skip,
    shared_tops,
    shared_outs,
    sink_logits,
    v_scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    SHARED: tl.constexpr,
    SINKS: tl.constexpr,
    V_SCALES: tl.constexpr,
):
    """Store the output of some rows, with what the lane's group has read; zeros for queries past `count`."""
    there = rows < GROUP * QUERIES
    index = _row_offsets(rows, lane, head, KV_HEADS, GROUP, QUERIES)
    if SHARED:
        read = there & (skip > 0)
        other_top = tl.load(shared_tops + index, mask=read, other=float("-inf"))
        other = tl.load(shared_outs + index[:, None] * d.shape[0] + d[None, :], mask=read[:, None], other=0.0)
        top, total, acc = merged(top, total, acc, other_top, 1.0, other)
    total, acc = sunk_and_scaled(top, total, acc, head, rows, sink_logits, v_scale, GROUP, SINKS, V_SCALES)
    given = (rows // GROUP < count) & (total != 0)
    result = tl.where(given[:, None], acc / total[:, None], 0.0)
    to = out + index[:, None] * DIM + d[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=there[:, None] & (d < DIM)[None, :])


@triton.jit(do_not_specialize=["lanes", "start", "fewest", "of_group"])  # type: ignore[untyped-decorator]
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
    base_slots,
    borders,
    shared,
    shared_tops,
    shared_outs,
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
    WINDOW: tl.constexpr,
    FIRST: tl.constexpr,
    PREFIXES: tl.constexpr,
    SHARED: tl.constexpr,
    SINKS: tl.constexpr,
    FP8: tl.constexpr,
    K_SCALES: tl.constexpr,
    V_SCALES: tl.constexpr,
    HEADS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PIECE: tl.constexpr = 0,
    MOST_PIECES: tl.constexpr = 1,
):
    """Decode attention: q, out ``[lanes, QUERIES, KV_HEADS * GROUP, DIM]``.

    K and V of a token are at element ``slot * of_slot + token * of_token + head * of_head``. A row is one query of one
    query head; a KV head has `ROW_BLOCKS` blocks of `ROWS` rows. The cost of starting a sequence counts as `start`
    tiles; a program takes at least `fewest` tiles.

    With `PREFIXES`, tokens below ``borders[slot]`` are at ``base_slots[slot]``. With `SHARED`, a lane's first
    ``shared[lane]`` tokens were attended to already, with the results in `shared_tops` and `shared_outs`. `K_SCALES`
    and `V_SCALES` are 0 without scales, 1 for one of all heads, 2 for one a head. `SOFTCAP` is that of scores, in
    powers of two as they are, or 0. With `HEADS` (a power of two, the KV heads or more; 0: none), K and V of head h are
    at the addresses ``head_bases[h]`` instead, and a head has ``deficits[head_groups[h]][slot]`` tokens fewer than its
    lane's length. With `PIECE` a head is cut into pieces of so many tiles, `MOST_PIECES` at most.
    """
    tl.static_assert(not (SHARED and WINDOW > 0), "groups of lanes read nothing together in layers with a window")
    BOUNDED: tl.constexpr = SHARED or WINDOW > 0
    tl.static_assert(not (PIECE and (BOUNDED or HEADS)), "pieces are those of whole sequences")
    program = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if HEADS:
        place_range = tl.arange(0, LANES * HEADS)
        lane_range = place_range // HEADS
        head_range = place_range % HEADS
        inside = (lane_range < lanes) & (head_range < KV_HEADS)
    else:
        place_range = tl.arange(0, LANES)
        lane_range = place_range
        inside = lane_range < lanes
    n = tl.load(lengths + lane_range, mask=inside, other=0)
    if HAS_QUERY_LENS:
        n = tl.where(tl.load(query_lens + lane_range, mask=inside, other=0) > 0, n, 0)
    if HEADS:
        whose = tl.load(slots + lane_range, mask=inside, other=0).to(tl.int64) if HAS_SLOTS else lane_range.to(tl.int64)
        held = deficits + tl.load(head_groups + head_range, mask=inside, other=0).to(tl.int64) * of_group + whose
        n = tl.maximum(n - tl.load(held, mask=inside, other=0), 0)
    tiles_each = tl.cdiv(n, TILE)
    if BOUNDED:
        skips = tl.load(shared + lane_range, mask=inside, other=0) if SHARED else n * 0
        tiles_each, _, _ = _planned(n, skips, TILE, QUERIES, WINDOW, FIRST)
    starts_each = start * tl.cdiv(tiles_each, PIECE) if PIECE else start
    weight = tl.where(n > 0, tiles_each + starts_each, 0) * ((1 if HEADS else KV_HEADS) * ROW_BLOCKS)
    begins, places, share, at, end = share_of(weight, place_range, program, fewest)
    if PIECE:
        at = begin_of_piece(begins, places, at, end, lengths, start, TILE, PIECE)
    d = tl.arange(0, DIMS)
    kv_dtype: tl.constexpr = tl.float8e4nv if FP8 else q.dtype.element_ty
    # One instruction makes two numbers of 16 bits with 5 bits of exponent of two of 8; bfloat16 takes several.
    # Queries beyond 65,504 are infinite in it.
    dot_dtype: tl.constexpr = tl.float16 if FP8 else q.dtype.element_ty
    bytes_each: tl.constexpr = kv_dtype.primitive_bitwidth // 8

    while at < end:
        # The last lane that begins at or before `at`; a lane of length 0 begins where the next one does.
        place = tl.max(tl.where(begins <= at, places, 0), 0)
        lane = (place & 0xFFFFFFFF).to(tl.int32)
        if HEADS:
            head = lane % HEADS
            lane = lane // HEADS
        length = tl.load(lengths + lane)
        count = tl.load(query_lens + lane) if HAS_QUERY_LENS else QUERIES
        slot = tl.load(slots + lane).to(tl.int64) if HAS_SLOTS else lane.to(tl.int64)
        if HEADS:
            length -= tl.load(deficits + tl.load(head_groups + head).to(tl.int64) * of_group + slot)
        tiles = tl.cdiv(length, TILE)
        skip = 0
        sinks = 0
        shift = 0
        if SHARED:
            skip = tl.load(shared + lane)
        if BOUNDED:
            tiles, sinks, shift = _planned(length, skip, TILE, QUERIES, WINDOW, FIRST)
        if PIECE:
            unit, piece, first, last = piece_at(at - (place >> 32).to(tl.int32), tiles, start, PIECE)
        else:
            unit, from_start, until, first, last = unit_at(at, end, at - (place >> 32).to(tl.int32), tiles, start)
        if HEADS:
            unit += head * ROW_BLOCKS
            k_head = tl.load(head_bases + 2 * head).to(tl.pointer_type(kv_dtype))
            v_head = tl.load(head_bases + 2 * head + 1).to(tl.pointer_type(kv_dtype))
        else:
            head = unit // ROW_BLOCKS
            from_first = head.to(tl.int64) * of_head * bytes_each
            k_head, v_head = (
                (k + from_first).to(tl.pointer_type(kv_dtype)),
                (v + from_first).to(tl.pointer_type(kv_dtype)),
            )
        k_head, v_head = tl.multiple_of(k_head, 16), tl.multiple_of(v_head, 16)
        # All that was read so far is older than the kernel before this one. A second wait costs nothing.
        if PDL:
            tl.extra.cuda.gdc_wait()

        base = slot
        border = 0
        if PREFIXES:
            base = tl.load(base_slots + slot).to(tl.int64)
            border = tl.load(borders + slot)
        rows = (unit % ROW_BLOCKS) * ROWS + tl.arange(0, ROWS)
        here = rows < GROUP * QUERIES
        from_lane = _row_offsets(rows, lane, head, KV_HEADS, GROUP, QUERIES)[:, None] * DIM + d[None, :]
        queries = tl.load(q + from_lane, mask=here[:, None] & (d < DIM)[None, :], other=0.0).to(dot_dtype)
        head_scale = scale
        if K_SCALES:
            head_scale = scale * tl.load(k_scale + head * (K_SCALES - 1))
        seen_by_all = length - count + 1
        lowest = skip
        low = skip
        if WINDOW:
            lowest = seen_by_all - WINDOW
            low = tl.maximum(length - WINDOW, 0)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIMS], tl.float32)
        top, total, acc = attend_tiles(
            first, last, sinks, shift, low, seen_by_all // TILE, queries, seen_by_all + rows // GROUP, lowest, k_head,
            v_head, k_tiles, v_tiles, of_slot, of_token, head, slot, base, border, length, d, head_scale, top, total,
            acc, dot_dtype, TILE, DIM, STAGES, 2, WINDOW, FIRST, BOUNDED, PREFIXES, TMA, SOFTCAP,
        )  # fmt: skip

        if (first == 0) & (last == tiles):
            _finish(
                out, top, total, acc, rows, lane, head, count, d, skip, shared_tops, shared_outs, sink_logits, v_scale,
                KV_HEADS, GROUP, QUERIES, DIM, SHARED, SINKS, V_SCALES,
            )  # fmt: skip
        elif last > first:
            counter = arrived + lane * (KV_HEADS * ROW_BLOCKS) + unit
            if PIECE:
                first_part = (lane.to(tl.int64) * (KV_HEADS * ROW_BLOCKS) + unit) * MOST_PIECES
                pieces = tl.cdiv(tiles, PIECE)
                last_part = first_part + pieces - 1
                complete = leave_piece(
                    part_tops, part_totals, part_outs, counter, top, total, acc, here, d, first_part, piece, pieces,
                    ROWS, PART_ROWS,
                )  # fmt: skip
            else:
                first_part, last_part, complete = leave_part(
                    part_tops, part_totals, part_outs, counter, top, total, acc, here, d, program, first, tiles,
                    at - from_start, start, share, ROWS,
                )  # fmt: skip
            if complete:
                block_rows = (unit % ROW_BLOCKS) * ROWS + tl.arange(0, PART_ROWS)
                whole_top, whole_total, whole_acc = combined(
                    part_tops, part_totals, part_outs, first_part, last_part, block_rows < GROUP * QUERIES, d, ROWS,
                    PART_ROWS, PARTS, PIECE > 0,
                )  # fmt: skip
                _finish(
                    out, whole_top, whole_total, whole_acc, block_rows, lane, head, count, d, skip, shared_tops,
                    shared_outs, sink_logits, v_scale, KV_HEADS, GROUP, QUERIES, DIM, SHARED, SINKS, V_SCALES,
                )  # fmt: skip
                tl.store(counter, 0)
        if PIECE:
            at += last - first + start
        else:
            at += until - from_start

    if PDL:
        tl.extra.cuda.gdc_wait()
    idle = program
    while idle < lanes:
        length = tl.load(lengths + idle)
        if HAS_QUERY_LENS:
            length = tl.where(tl.load(query_lens + idle) > 0, length, 0)
        elements: tl.constexpr = QUERIES * KV_HEADS * GROUP * DIM
        if HEADS:
            # A head may hold nothing of a sequence that has tokens.
            slot = tl.load(slots + idle).to(tl.int64) if HAS_SLOTS else idle.to(tl.int64)
            for some in range(0, elements, 1024):
                element = some + tl.arange(0, 1024)
                row = tl.load(head_groups + element // DIM % (KV_HEADS * GROUP) // GROUP).to(tl.int64)
                empty = length - tl.load(deficits + row * of_group + slot) <= 0
                zeros = tl.zeros([1024], out.dtype.element_ty)
                tl.store(out + idle.to(tl.int64) * elements + element, zeros, mask=empty & (element < elements))
        elif length <= 0:
            for some in range(0, elements, 1024):
                element = some + tl.arange(0, 1024)
                zeros = tl.zeros([1024], out.dtype.element_ty)
                tl.store(out + idle.to(tl.int64) * elements + element, zeros, mask=element < elements)
        idle += tl.num_programs(0)
