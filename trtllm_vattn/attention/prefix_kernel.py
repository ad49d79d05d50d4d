"""The Triton kernel that reads what groups of lanes share once for all of a group's lanes.

Cascade inference (FlashInfer, 2024) and Hydragen (arXiv 2402.05099): the queries of a group's lanes are rows of one
tile, so that a key is loaded once for as many queries as a tile has rows. The results go to a buffer, by query head, as
the logarithm of the sum of weights and the weighted mean of values; the shares kernel, launched next, reads the rest of
each lane and combines the two, exactly up to rounding. The work is shared out as it is there (shares_kernel.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from trtllm_vattn.attention.shares_kernel import combined, leave_part, share_of, unit_at
from trtllm_vattn.attention.softmax_kernel import attend_tiles


@triton.jit
def _leave(tops, outs, top, total, acc, index, here, d):  # type: ignore[no-untyped-def]
    """Store rows' results, index int64 ``[rows]`` by lane, query and query head."""
    given = here & (total != 0)
    tl.store(tops + index, tl.where(given, top + tl.log2(total), float("-inf")), mask=here)
    result = tl.where(given[:, None], acc / total[:, None], 0.0)
    tl.store(outs + index[:, None] * d.shape[0] + d[None, :], result, mask=here[:, None])


@triton.jit(do_not_specialize=["num_groups", "lanes", "start", "fewest"])  # type: ignore[untyped-decorator]
def read_prefixes(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    k_tiles,
    v_tiles,
    tops,
    outs,
    groups,
    members,
    part_tops,
    part_totals,
    part_outs,
    arrived,
    k_scale,
    of_slot,
    of_token,
    of_head,
    num_groups,
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
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
    FP8: tl.constexpr,
    K_SCALES: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Attention of q ``[lanes, QUERIES, KV_HEADS * GROUP, DIM]`` to the tokens that its lanes' groups share.

    groups int32 ``[num_groups, 4]`` and members int32 ``[lanes]`` are those of `PrefixTables`. tops float32
    ``[lanes, QUERIES, KV_HEADS * GROUP]`` and outs, with `DIMS` behind; lanes of no group are left as they are. K and V
    are scaled and placed as in `decode_shares`, but for `v_scale`, which is applied there.
    """
    program = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    group_range = tl.arange(0, GROUPS)
    inside = group_range < num_groups
    n = tl.load(groups + group_range * 4 + 1, mask=inside, other=0)
    counts = tl.load(groups + group_range * 4 + 3, mask=inside, other=0)
    blocks = tl.cdiv(counts * (QUERIES * GROUP), ROWS)
    weight = tl.where(n > 0, tl.cdiv(n, TILE) + start, 0) * KV_HEADS * blocks
    begins, places, share, at, end = share_of(weight, group_range, program, fewest)
    d = tl.arange(0, DIMS)
    kv_dtype: tl.constexpr = tl.float8e4nv if FP8 else q.dtype.element_ty
    dot_dtype: tl.constexpr = tl.float16 if FP8 else q.dtype.element_ty

    while at < end:
        place = tl.max(tl.where(begins <= at, places, 0), 0)
        group = (place & 0xFFFFFFFF).to(tl.int32)
        slot = tl.load(groups + group * 4).to(tl.int64)
        length = tl.load(groups + group * 4 + 1)
        first_member = tl.load(groups + group * 4 + 2)
        count = tl.load(groups + group * 4 + 3)
        row_blocks = tl.cdiv(count * (QUERIES * GROUP), ROWS)
        tiles = tl.cdiv(length, TILE)
        unit, from_start, until, first, last = unit_at(at, end, at - (place >> 32).to(tl.int32), tiles, start)
        head = unit // row_blocks

        from_first = head.to(tl.int64) * of_head * (kv_dtype.primitive_bitwidth // 8)
        k_head = tl.multiple_of((k + from_first).to(tl.pointer_type(kv_dtype)), 16)
        v_head = tl.multiple_of((v + from_first).to(tl.pointer_type(kv_dtype)), 16)
        rows = (unit % row_blocks) * ROWS + tl.arange(0, ROWS)
        member = rows // (QUERIES * GROUP)
        here = member < count
        lane = tl.load(members + first_member + member, mask=here, other=0)
        # A group may have lanes that are idle, and of which the launch has none.
        here &= lane < lanes
        row = rows % (QUERIES * GROUP)
        query_head = head * GROUP + row % GROUP
        index = (lane.to(tl.int64) * QUERIES + row // GROUP) * (KV_HEADS * GROUP) + query_head
        if PDL:
            tl.extra.cuda.gdc_wait()
        queries = tl.load(q + index[:, None] * DIM + d[None, :], mask=here[:, None] & (d < DIM)[None, :], other=0.0)
        queries = queries.to(dot_dtype)
        head_scale = scale
        if K_SCALES:
            head_scale = scale * tl.load(k_scale + head * (K_SCALES - 1))
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIMS], tl.float32)
        # Every query of the lanes sees all of these tokens.
        sees = length + rows * 0
        top, total, acc = attend_tiles(
            first, last, 0, 0, 0, length // TILE, queries, sees, 0, k_head, v_head, k_tiles, v_tiles, of_slot, of_token,
            head, slot, slot, 0, length, d, head_scale, top, total, acc, dot_dtype, TILE, DIM, STAGES, 1, 0, 0, False,
            False, TMA, SOFTCAP,
        )  # fmt: skip

        if (first == 0) & (last == tiles):
            _leave(tops, outs, top, total, acc, index, here, d)
        elif last > first:
            # No two blocks of rows of two groups count in the same place.
            before_group = (first_member * (QUERIES * GROUP) // ROWS + group) * KV_HEADS
            counter = arrived + before_group + unit
            first_program, last_program, complete = leave_part(
                part_tops, part_totals, part_outs, counter, top, total, acc, here, d, program, first, tiles,
                at - from_start, start, share, ROWS,
            )  # fmt: skip
            if complete:
                whole_top, whole_total, whole_acc = combined(
                    part_tops, part_totals, part_outs, first_program, last_program, here, d, ROWS, ROWS, PARTS
                )
                _leave(tops, outs, whole_top, whole_total, whole_acc, index, here, d)
                tl.store(counter, 0)
        at += until - from_start
    if PDL:
        tl.extra.cuda.gdc_wait()
