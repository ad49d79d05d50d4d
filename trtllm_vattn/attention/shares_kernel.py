"""The Triton kernel of decode attention by equal shares, after LeanAttention (arXiv 2405.10480).

The work of a launch is a list of tiles of `TILE` tokens, ordered by lane and then by KV head. Every program takes an
equal part of the list, regardless of where sequences and heads begin. A program that has all tiles of a head stores the
head's output. If several programs share a head, each stores a partial result, and the last one to finish combines the
partial results in a fixed order, so that equal lengths give equal bits. Each program computes its part of the list from
the lengths, which it reads on the device.

What a layer or a step does not use is not compiled. A window, a prefix in another slot and a prefix that a group of
lanes reads together (prefix_kernel.py) change which tiles a lane has: those that hold only tokens which every query of
the lane sees, in one slot, are read whole, and the others row by row, each row under its own conditions. Where heads
have lengths of their own, the list of tiles is ordered by lane and head with each head's own length, so uneven heads
cost what even ones do.

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
def _planned(n, skip, TILE: tl.constexpr, QUERIES: tl.constexpr, WINDOW: tl.constexpr, FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of lanes of `n` tokens that do not read the first `skip`: how many tiles they read; how many of those hold first
    tokens before the window; and how far beyond its number in the list each tile behind those lies."""
    begin = skip
    if WINDOW:
        begin = tl.maximum(begin, n - (QUERIES - 1) - WINDOW)
    first = begin // TILE
    sinks = tl.minimum(first, (FIRST + TILE - 1) // TILE)
    return tl.maximum(tl.cdiv(n, TILE) - first + sinks, 0), sinks, first - sinks


@triton.jit  # type: ignore[untyped-decorator]
def _attend_masked(  # type: ignore[no-untyped-def]
    begin,
    end,
    sinks,
    shift,
    q,
    query,
    k_head,
    v_head,
    of_slot,
    of_token,
    slot,
    base,
    border,
    length,
    seen_by_all,
    skip,
    d,
    scale,
    top,
    total,
    acc,
    kv_dtype: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    FIRST: tl.constexpr,
    PREFIXES: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Attend to tiles `begin` to `end` (by their numbers in the list) row by row; heads' addresses are without slot."""
    for tile in tl.range(begin, end, num_stages=2):
        token = tl.where(tile < sinks, tile, tile + shift) * TILE + tl.arange(0, TILE)
        there = (token < length) & (token >= skip)
        if WINDOW:
            there &= (token >= seen_by_all - WINDOW) | (token < FIRST)
        here = slot
        if PREFIXES:
            here = tl.where(token < border, base, slot)
        row = (here * of_slot + token.to(tl.int64) * of_token)[:, None] + d[None, :]
        mask = there[:, None] & (d < DIM)[None, :]
        keys = tl.load(k_head + row, mask=mask, other=0.0).to(kv_dtype)
        values = tl.load(v_head + row, mask=mask, other=0.0).to(kv_dtype)
        sees = (seen_by_all + query)[:, None]
        visible = (token[None, :] < sees) & there[None, :]
        if WINDOW:
            visible &= (token[None, :] >= sees - WINDOW) | (token < FIRST)[None, :]
        top, total, acc = _attend(q, keys, values, visible, scale, top, total, acc, SOFTCAP, True)
    return top, total, acc


@triton.jit  # type: ignore[untyped-decorator]
def capped(scores, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores between -SOFTCAP and SOFTCAP, by a hyperbolic tangent; 0 is no cap."""
    if SOFTCAP > 0:
        scores = SOFTCAP * (2 * tl.sigmoid(scores * (2 / SOFTCAP)) - 1)
    return scores


@triton.jit  # type: ignore[untyped-decorator]
def _attend(q, k, v, visible, scale, top, total, acc, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add a tile to each row's online softmax: its largest score, the sum of its weights, and its output."""
    scores = capped(tl.dot(q, tl.trans(k), input_precision="ieee") * scale, SOFTCAP)
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
def _attend_whole(  # type: ignore[no-untyped-def]
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
    kv_dtype: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Attend to tiles `begin` to `end` (by their numbers in the list), which lie in one slot and are seen whole."""
    k_slot, v_slot = tl.multiple_of(k_head + slot * of_slot, 16), tl.multiple_of(v_head + slot * of_slot, 16)
    for tile in tl.range(begin, end, num_stages=STAGES):
        token = (tile + shift) * TILE
        keys = _tiles_of(k_slot, k_tiles, slot, token, head, of_token, d, TILE, DIM, TMA).to(kv_dtype)
        values = _tiles_of(v_slot, v_tiles, slot, token, head, of_token, d, TILE, DIM, TMA).to(kv_dtype)
        top, total, acc = _attend(q, keys, values, True, scale, top, total, acc, SOFTCAP, False)
    return top, total, acc


@triton.jit  # type: ignore[untyped-decorator]
def _attend_pieces(  # type: ignore[no-untyped-def]
    first,
    last,
    sinks,
    shift,
    q,
    query,
    k_head,
    v_head,
    k_tiles,
    v_tiles,
    of_slot,
    of_token,
    head,
    slot,
    base_slots,
    borders,
    length,
    seen_by_all,
    skip,
    d,
    scale,
    top,
    total,
    acc,
    kv_dtype: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOW: tl.constexpr,
    FIRST: tl.constexpr,
    PREFIXES: tl.constexpr,
    SHARED: tl.constexpr,
    TMA: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Attend to tiles `first` to `last` of a lane (by their numbers in the list) whose tokens are not all in one slot,
    or not all seen: whole tiles of each slot, and row by row what lies before, between and behind them."""
    base = slot
    border = 0
    if PREFIXES:
        base = tl.load(base_slots + slot).to(tl.int64)
        border = tl.load(borders + slot)
    low = skip
    if WINDOW:
        low = tl.maximum(low, length - WINDOW)
    whole = tl.minimum(tl.maximum(tl.cdiv(low, TILE) - shift, first), last)
    high = tl.minimum(tl.maximum(seen_by_all // TILE - shift, whole), last)
    if WINDOW > 0 or SHARED:
        top, total, acc = _attend_masked(
            first, whole, sinks, shift, q, query, k_head, v_head, of_slot, of_token, slot, base, border, length,
            seen_by_all, skip, d, scale, top, total, acc, kv_dtype, TILE, DIM, WINDOW, FIRST, PREFIXES, SOFTCAP,
        )  # fmt: skip
    own = whole
    if PREFIXES:
        based = tl.minimum(tl.maximum(border // TILE - shift, whole), high)
        own = tl.minimum(tl.maximum(tl.cdiv(border, TILE) - shift, based), high)
        top, total, acc = _attend_whole(
            whole, based, shift, q, k_head, v_head, k_tiles, v_tiles, of_slot, of_token, head, base, d, scale, top,
            total, acc, kv_dtype, TILE, DIM, STAGES, TMA, SOFTCAP,
        )  # fmt: skip
        top, total, acc = _attend_masked(
            based, own, sinks, shift, q, query, k_head, v_head, of_slot, of_token, slot, base, border, length,
            seen_by_all, skip, d, scale, top, total, acc, kv_dtype, TILE, DIM, WINDOW, FIRST, PREFIXES, SOFTCAP,
        )  # fmt: skip
    top, total, acc = _attend_whole(
        own, high, shift, q, k_head, v_head, k_tiles, v_tiles, of_slot, of_token, head, slot, d, scale, top, total,
        acc, kv_dtype, TILE, DIM, STAGES, TMA, SOFTCAP,
    )  # fmt: skip
    return _attend_masked(
        high, last, sinks, shift, q, query, k_head, v_head, of_slot, of_token, slot, base, border, length,
        seen_by_all, skip, d, scale, top, total, acc, kv_dtype, TILE, DIM, WINDOW, FIRST, PREFIXES, SOFTCAP,
    )  # fmt: skip


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
    given = (rows // GROUP < count) & (total != 0)
    result = tl.where(given[:, None], acc / total[:, None], 0.0)
    to = out + _row_offsets(rows, lane, head, KV_HEADS, GROUP, QUERIES)[:, None] * DIM + d[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=(rows < GROUP * QUERIES)[:, None] & (d < DIM)[None, :])


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
    """`_store`, with what the lane's group has read, the sink logits, and the scale of values."""
    if SHARED:
        index = _row_offsets(rows, lane, head, KV_HEADS, GROUP, QUERIES)
        there = (rows < GROUP * QUERIES) & (skip > 0)
        other_top = tl.load(shared_tops + index, mask=there, other=float("-inf"))
        other = tl.load(shared_outs + index[:, None] * d.shape[0] + d[None, :], mask=there[:, None], other=0.0)
        higher = tl.maximum(top, other_top)
        higher = tl.where(higher == float("-inf"), 0.0, higher)
        faded, weight = tl.exp2(top - higher), tl.exp2(other_top - higher)
        total = total * faded + weight
        acc = acc * faded[:, None] + other * weight[:, None]
        top = higher
    if SINKS:
        logit = tl.load(sink_logits + head * GROUP + rows % GROUP) * 1.4426950408889634
        higher = tl.maximum(top, logit)
        faded = tl.exp2(top - higher)
        total = total * faded + tl.exp2(logit - higher)
        acc = acc * faded[:, None]
    if V_SCALES:
        acc = acc * tl.load(v_scale + head * (V_SCALES - 1))
    _store(out, total, acc, rows, lane, head, count, d, KV_HEADS, GROUP, QUERIES, DIM)


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
    """Combine the partial results of a head, `PARTS` at a time: each row's largest score, the sum of its weights, and
    its output."""
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
    return top, total, acc


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
    lane's length.
    """
    PIECED: tl.constexpr = PREFIXES or SHARED or WINDOW > 0
    program = tl.program_id(0)
    programs = tl.num_programs(0)
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
    if PIECED:
        skips = tl.load(shared + lane_range, mask=inside, other=0) if SHARED else n * 0
        tiles_each, _, _ = _planned(n, skips, TILE, QUERIES, WINDOW, FIRST)
    weight = tl.where(n > 0, tiles_each + start, 0) * ((1 if HEADS else KV_HEADS) * ROW_BLOCKS)
    begins = tl.cumsum(weight, 0) - weight
    share = tl.maximum(tl.cdiv(tl.sum(weight, 0), programs), fewest)
    at = program * share
    end = tl.minimum(at + share, tl.sum(weight, 0))
    places = (begins.to(tl.int64) << 32) | place_range
    d = tl.arange(0, DIMS)
    row_range = tl.arange(0, ROWS)
    kv_dtype: tl.constexpr = tl.float8e4nv if FP8 else q.dtype.element_ty
    # One instruction makes two numbers of 16 bits with 5 bits of exponent of two of 8; bfloat16 takes several.
    dot_dtype: tl.constexpr = tl.float16 if FP8 else q.dtype.element_ty

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
        if PIECED:
            if SHARED:
                skip = tl.load(shared + lane)
            tiles, sinks, shift = _planned(length, skip, TILE, QUERIES, WINDOW, FIRST)
        offset = at - (place >> 32).to(tl.int32)
        unit = offset // (tiles + start)
        from_start = offset - unit * (tiles + start)
        if HEADS:
            unit += head * ROW_BLOCKS
        else:
            head = unit // ROW_BLOCKS
        until = tl.minimum(tiles + start, from_start + end - at)
        first = tl.maximum(from_start - start, 0)
        last = tl.maximum(until - start, 0)

        bytes_each: tl.constexpr = kv_dtype.primitive_bitwidth // 8
        # Where rows of a tile may lie in different slots, addresses are without slot.
        slot_offset = 0 if PIECED else slot * of_slot
        if HEADS:
            k_head = (tl.load(head_bases + 2 * head) + slot_offset * bytes_each).to(tl.pointer_type(kv_dtype))
            v_head = (tl.load(head_bases + 2 * head + 1) + slot_offset * bytes_each).to(tl.pointer_type(kv_dtype))
        else:
            k_head = (k + (slot_offset + head * of_head) * bytes_each).to(tl.pointer_type(kv_dtype))
            v_head = (v + (slot_offset + head * of_head) * bytes_each).to(tl.pointer_type(kv_dtype))
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
        queries = tl.load(q + from_lane, mask=here[:, None] & (d < DIM)[None, :], other=0.0).to(dot_dtype)
        head_scale = scale
        if K_SCALES:
            head_scale = scale * tl.load(k_scale + head * (K_SCALES - 1))
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIMS], tl.float32)
        if PIECED:
            top, total, acc = _attend_pieces(
                first,
                last,
                sinks,
                shift,
                queries,
                query,
                k_head,
                v_head,
                k_tiles,
                v_tiles,
                of_slot,
                of_token,
                head,
                slot,
                base_slots,
                borders,
                length,
                seen_by_all,
                skip,
                d,
                head_scale,
                top,
                total,
                acc,
                dot_dtype,
                TILE,
                DIM,
                STAGES,
                WINDOW,
                FIRST,
                PREFIXES,
                SHARED,
                TMA,
                SOFTCAP,
            )
        else:
            for tile in tl.range(first, whole, num_stages=STAGES):
                keys = _tiles_of(k_head, k_tiles, slot, tile * TILE, head, of_token, d, TILE, DIM, TMA).to(dot_dtype)
                values = _tiles_of(v_head, v_tiles, slot, tile * TILE, head, of_token, d, TILE, DIM, TMA).to(dot_dtype)
                top, total, acc = _attend(queries, keys, values, True, head_scale, top, total, acc, SOFTCAP, False)
            for tile in tl.range(tl.maximum(first, whole), last, num_stages=2):
                token = tile * TILE + tl.arange(0, TILE)
                mask = (token < length)[:, None] & (d < DIM)[None, :]
                from_head = token.to(tl.int64)[:, None] * of_token + d[None, :]
                keys = tl.load(k_head + from_head, mask=mask, other=0.0).to(dot_dtype)
                values = tl.load(v_head + from_head, mask=mask, other=0.0).to(dot_dtype)
                visible = token[None, :] < (seen_by_all + query)[:, None]
                visible &= (token < length)[None, :]
                top, total, acc = _attend(queries, keys, values, visible, head_scale, top, total, acc, SOFTCAP, True)

        if (first == 0) & (last == tiles):
            _finish(
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
                KV_HEADS,
                GROUP,
                QUERIES,
                DIM,
                SHARED,
                SINKS,
                V_SCALES,
            )
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
                whole_top, whole_total, whole_acc = _combined(
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
                _finish(
                    out,
                    whole_top,
                    whole_total,
                    whole_acc,
                    block_rows,
                    lane,
                    head,
                    count,
                    d,
                    skip,
                    shared_tops,
                    shared_outs,
                    sink_logits,
                    v_scale,
                    KV_HEADS,
                    GROUP,
                    QUERIES,
                    DIM,
                    SHARED,
                    SINKS,
                    V_SCALES,
                )
                tl.store(counter, 0)
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
        idle += programs
