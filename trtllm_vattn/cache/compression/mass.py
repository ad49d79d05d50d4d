"""How much attention tokens have: the scores by which policies choose."""

from __future__ import annotations

import importlib.util

import torch

BLOCK = 256
"""Queries whose attention is held at once, by torch."""
MOST_TILE = 64
"""Most keys, and rows, of a program's tile."""
TILES_BYTES = 64 << 10
"""Bytes of shared memory for a tile of rows and three of keys; every card since compute capability 8.0 has more."""
PIECES = 16
"""Most pieces that keys are divided into for the sums of rows."""
LOG2_E = 1.4426950408889634
"""The kernels compute powers of two instead of exponentials."""


def maps(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, first: int = 0, stop: int | None = None
) -> torch.Tensor:
    """Attention of queries `first` to `stop` to all places, float32 ``[heads, group, queries, held]``: each row adds up
    to 1, and is 0 where the query does not see the place. The parameters are those of `attended`."""
    some, held = queries[first:stop].float(), len(keys)
    scores = torch.einsum("qhgd,thd->hgqt", some, keys.float()) * scale
    seen = held - len(queries) + 1 + first + torch.arange(len(some), device=scores.device)
    places = torch.arange(held, device=scores.device)
    return scores.masked_fill(places >= seen[:, None], float("-inf")).softmax(-1)


def attended(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    *,
    positions: torch.Tensor | None = None,
    first_position: int = 0,
    local: int | None = None,
) -> torch.Tensor:
    """The attention that each token has, added up over queries and the query heads that share its KV head: float32
    ``[heads, held]``. On a GPU that is two small kernels, and no matrix of queries and keys is in memory.

    Parameters
    ----------
    queries : Tensor
        ``[queries, heads, group, head_dim]``; the last one sees all places, each one before a place less.
    keys : Tensor
        ``[held, heads, head_dim]``.
    scale : float
        Of scores, in the softmax.
    positions : Tensor or None
        int64 ``[heads, held]``, for `local`.
    first_position : int
        Of the first query, for `local`.
    local : int or None
        Of each query, count what it attends to less than so many positions before it alone; None is all.
    """
    if keys.is_cuda and importlib.util.find_spec("triton") is not None:
        return by_kernel(queries, keys, scale, positions, first_position, local)
    total = torch.zeros(keys.shape[1], len(keys), dtype=torch.float32, device=keys.device)
    for first in range(0, len(queries), BLOCK):
        some = maps(queries, keys, scale, first, first + BLOCK)
        if local is not None:
            assert positions is not None
            at = first_position + first + torch.arange(some.shape[2], device=some.device)
            some = some * (positions[:, None] > at[:, None] - local)[:, None]
        total += some.sum(dim=(1, 2))
    return total


def tile_of(dims: int, itemsize: int) -> int:
    """Keys, and rows, of a tile, a power of two, for heads padded to `dims` numbers of `itemsize` bytes."""
    tile = MOST_TILE
    while tile > 16 and 4 * tile * dims * itemsize > TILES_BYTES:
        tile //= 2
    return tile


def by_kernel(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    positions: torch.Tensor | None,
    first_position: int,
    local: int | None,
) -> torch.Tensor:
    """`attended` by the kernels of mass_kernel.py."""
    from trtllm_vattn.cache.compression.mass_kernel import row_sums, token_mass

    count, heads, group, dim = queries.shape
    held, rows = len(keys), count * group
    # Numbers next to one another, whatever view they came as.
    queries = queries if queries.stride(3) == 1 else queries.contiguous()
    keys = keys if keys.stride(2) == 1 else keys.contiguous()
    # A product takes 16 numbers at least.
    dims = max(16, 1 << (dim - 1).bit_length())
    tile = tile_of(dims, keys.itemsize)
    tiles = -(-held // tile)
    each = tile * -(-tiles // PIECES)
    pieces = -(-held // each)
    tops, totals = torch.empty(2, pieces, heads, rows, dtype=torch.float32, device=keys.device)
    mass = torch.empty(heads, held, dtype=torch.float32, device=keys.device)
    sizes = {"GROUP": group, "DIM": dim, "DIMS": dims, "ROWS": tile, "TILE": tile}
    steps = (*queries.stride()[:3], *keys.stride()[:2])
    sees_first = held - count + 1
    row_sums[(pieces, -(-rows // tile), heads)](
        queries, keys, tops, totals, rows, held, sees_first, each, *steps, scale * LOG2_E, **sizes
    )
    highest = tops.amax(dim=0)
    sums = highest + (totals * torch.exp2(tops - highest)).sum(dim=0).log2()
    token_mass[(tiles, heads)](
        queries,
        keys,
        sums,
        mass if positions is None else positions.contiguous(),
        mass,
        rows,
        held,
        sees_first,
        first_position,
        0 if local is None else local,
        *steps,
        scale * LOG2_E,
        **sizes,
        LOCAL=local is not None,
    )
    return mass
