"""Triton kernels that add up the attention which tokens have, without a matrix of queries and keys in memory.

The first streams over the keys and leaves each row's largest score and the sum of its weights, a row being one query of
one query head, as FlashAttention does (arXiv 2205.14135); keys may be divided into several pieces. The second goes over
the keys once more, a tile a program, and adds up each token's weights over all rows, which it knows the sums of.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _scores(  # type: ignore[no-untyped-def]
    q,
    keys,
    row,
    rows,
    place,
    held,
    sees_first,
    of_query,
    of_group,
    of_token,
    scale,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Scores of rows and places, ``[rows, places]``, minus infinity where a row does not see a place."""
    d = tl.arange(0, DIMS)
    query = row // GROUP
    at = query.to(tl.int64) * of_query + (row % GROUP).to(tl.int64) * of_group
    asked = tl.load(q + at[:, None] + d[None, :], mask=(row < rows)[:, None] & (d < DIM)[None, :], other=0.0)
    from_head = place.to(tl.int64)[:, None] * of_token + d[None, :]
    stored = tl.load(keys + from_head, mask=(place < held)[:, None] & (d < DIM)[None, :], other=0.0)
    scores = tl.dot(asked.to(stored.dtype), tl.trans(stored), input_precision="ieee") * scale
    seen = (place[None, :] < sees_first + query[:, None]) & (row < rows)[:, None]
    return tl.where(seen, scores, float("-inf"))


@triton.jit(do_not_specialize=["rows", "held", "sees_first", "each"])  # type: ignore[untyped-decorator]
def row_sums(  # type: ignore[no-untyped-def]
    q,
    keys,
    tops,
    totals,
    rows,
    held,
    sees_first,
    each,
    of_query,
    of_q_head,
    of_group,
    of_token,
    of_head,
    scale,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of pieces of `each` keys: each row's largest score, and the sum of its weights beside that; tops, totals float32
    ``[pieces, heads, rows]``. The grid is pieces, blocks of rows, heads. The first query sees `sees_first` places, each
    later one a place more."""
    piece, block, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(piece * each, tl.minimum((piece + 1) * each, held), TILE):
        scores = _scores(
            q + head * of_q_head, keys + head * of_head, row, rows, start + tl.arange(0, TILE), held, sees_first,
            of_query, of_group, of_token, scale, GROUP, DIM, DIMS,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen no place yet has no largest score: its weights, all 0, are taken beside any number.
        beside = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - beside) + tl.sum(tl.exp2(scores - beside[:, None]), 1)
        top = higher
    to = (piece * tl.num_programs(2) + head) * rows + row
    tl.store(tops + to, top, mask=row < rows)
    tl.store(totals + to, total, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "held", "sees_first", "first_position", "local"])  # type: ignore[untyped-decorator]
def token_mass(  # type: ignore[no-untyped-def]
    q,
    keys,
    sums,
    positions,
    mass,
    rows,
    held,
    sees_first,
    first_position,
    local,
    of_query,
    of_q_head,
    of_group,
    of_token,
    of_head,
    scale,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    LOCAL: tl.constexpr,
):
    """Each token's weights added up over all rows: mass float32 ``[heads, held]``. sums float32 ``[heads, rows]`` are
    logarithms to base 2 of each row's sum of weights. With `LOCAL`, of each row only those of tokens less than `local`
    positions before its query, the first of which is at `first_position`; positions int64 ``[heads, held]``. The grid
    is tiles of keys, heads."""
    head = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    found = tl.zeros([TILE], tl.float32)
    if LOCAL:
        at = tl.load(positions + head * held + place, mask=place < held, other=0)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        scores = _scores(
            q + head * of_q_head, keys + head * of_head, row, rows, place, held, sees_first, of_query, of_group,
            of_token, scale, GROUP, DIM, DIMS,
        )  # fmt: skip
        if LOCAL:
            near = at[None, :] > (first_position - local + row // GROUP)[:, None]
            scores = tl.where(near, scores, float("-inf"))
        summed = tl.load(sums + head * rows + row, mask=row < rows, other=0.0)
        found += tl.sum(tl.exp2(scores - summed[:, None]), 0)
    tl.store(mass + head * held + place, found, mask=place < held)
