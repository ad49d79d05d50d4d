"""Attention over latents (MLA), one row a token, by own Triton kernels (latents_kernel.py) on a GPU, by torch on the
host. Decode, mixed passes and prompts go through the same kernel, which reads all on the device."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from trtllm_vattn.attention.base import MOST_QUERIES
from trtllm_vattn.attention.options import PLAIN, LayerOptions, PrefixTables
from trtllm_vattn.attention.prompts import FlatPromptsAttention
from trtllm_vattn.attention.shares_launch import HOPPER, LOG2_E, availability
from trtllm_vattn.cache.base import FlatKV, KVCache
from trtllm_vattn.errors import ConfigError

DTYPES = (torch.bfloat16, torch.float16)
LONGEST_ROW = 1023
"""Numbers of a row; the largest power of two in it is a tile's width."""
TILE = 32
"""Rows of latents that a program holds at once."""
MOST_PIECES = 16
"""Into which a sequence's tokens are divided, where lanes alone do not fill the GPU."""
MOST_ROWS = 64
"""Rows of queries, one of each head, in a block, from compute capability 9.0 on; half as many before, where their
numbers lie in registers, too."""
PROGRAMS_EACH = 4
"""Programs of a divided launch for each multiprocessor, at most."""
RESERVE = 8 << 10
"""Bytes of shared memory that a program needs besides queries and two tiles."""


def serves(cache: KVCache) -> bool:
    """Whether the kernels run over this cache on this machine."""
    shape = cache.shape
    if cache.device.type != "cuda" or availability() != "yes" or shape.kv_factor != 1 or shape.dtype not in DTYPES:
        return False
    shared: int = torch.cuda.get_device_properties(cache.device).shared_memory_per_multiprocessor
    return fits(shape.head_dim, shared, torch.cuda.get_device_capability(cache.device)[0])


def fits(row: int, shared_bytes: int, major: int) -> bool:
    """Whether the kernels take rows of so many numbers on a multiprocessor with `shared_bytes` of shared memory, of a
    GPU of this major compute capability."""
    if not 16 <= row <= LONGEST_ROW:
        return False
    # On compute capability 10.0 a product's factors are copied once more.
    tiles = 4 if major == 10 else 2
    return (most_rows(major) + tiles * TILE) * sum(parts_of(row)) * 2 <= shared_bytes - RESERVE


def most_rows(major: int) -> int:
    """Rows of a block on a GPU of this major compute capability."""
    return MOST_ROWS if major >= HOPPER else MOST_ROWS // 2


class LatentPrompts:
    """Causal attention of chunks over a cache of latents on a GPU, as `PromptKernel` does it over keys and values."""

    name: ClassVar[str] = "latents"

    def __init__(self, cache: KVCache, scale: float, most: int = MOST_ROWS) -> None:
        self.cache, self.scale, self.most_rows = cache, scale, most

    def storages(self) -> list[torch.Tensor]:
        return []

    def plan(
        self, descriptors: torch.Tensor, rows: int, keep: int, options: LayerOptions = PLAIN
    ) -> tuple[torch.Tensor, int]:
        return descriptors.contiguous(), keep

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        out: torch.Tensor,
        planned: tuple[torch.Tensor, int],
        options: LayerOptions = PLAIN,
        prefixes: PrefixTables | None = None,
    ) -> None:
        descriptors, keep = planned
        # The kernel leaves rows of no chunk as they are.
        out[keep:] = 0
        launch_chunks(q, rows_of(self.cache, layer), out, descriptors, scale=self.scale, most=self.most_rows)


class LatentAttention(FlatPromptsAttention):
    """Attention over a cache of latents; all launches must be on one stream.

    Raises
    ------
    ConfigError
        The cache keeps keys and values, or the kernels do not run over it on this machine.
    """

    name: ClassVar[str] = "latents"
    most_queries = MOST_QUERIES

    def __init__(self, cache: KVCache, num_heads: int, scale: float | None = None) -> None:
        shape = cache.shape
        if shape.kv_factor != 1 or not isinstance(cache.head_groups(0)[0], FlatKV):
            raise ConfigError(
                "the latents backend attends over one latent a token in flat rows (kv_factor 1), and this cache keeps "
                "others; use attention='auto'"
            )
        if cache.device.type == "cuda" and not serves(cache):
            raise ConfigError(
                f"the latents backend takes rows of 16 to {LONGEST_ROW} numbers of bfloat16 or float16, not "
                f"{shape.head_dim} of {shape.dtype}, on a GPU where it works ({availability()}); use the torch backend"
            )
        scale = shape.head_dim**-0.5 if scale is None else scale
        on_gpu = cache.device.type == "cuda"
        most = most_rows(torch.cuda.get_device_capability(cache.device)[0]) if on_gpu else MOST_ROWS
        super().__init__(cache, num_heads, scale, LatentPrompts(cache, scale, most) if on_gpu else None)
        self._most_rows = most
        if on_gpu:
            self._multiprocessors: int = torch.cuda.get_device_properties(cache.device).multi_processor_count
            self._workspace = LatentWorkspace(cache.device, self._multiprocessors, shape.head_dim)

    def storages(self) -> list[torch.Tensor]:
        return [*super().storages(), *(self._workspace.storages() if self._on_gpu else [])]

    def decode_queries(
        self,
        layer: int,
        q: torch.Tensor,
        query_lens: torch.Tensor | None,
        lengths: torch.Tensor,
        slots: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not self._on_gpu:
            return self._reference.decode_queries(layer, q, query_lens, lengths, slots, out)
        lanes, queries = q.shape[:2]
        if q.dtype != self.cache.shape.dtype or not 1 <= queries <= MOST_QUERIES:
            raise ConfigError(
                f"{queries} queries a lane of {q.dtype}; give 1 to {MOST_QUERIES} of {self.cache.shape.dtype}, the "
                "cache's dtype"
            )
        q = q.contiguous()
        out = torch.empty_like(q) if out is None else out
        launch_lanes(
            q,
            rows_of(self.cache, layer),
            out,
            lengths.contiguous(),
            None if query_lens is None else query_lens.contiguous(),
            None if slots is None else slots.contiguous(),
            scale=self.scale,
            pieces=pieces_for(lanes * blocks_of(queries * self.num_heads, self._most_rows)[1], self._multiprocessors),
            workspace=self._workspace,
            most=self._most_rows,
        )
        return out


def rows_of(cache: KVCache, layer: int) -> torch.Tensor:
    """A layer's latents ``[slots, tokens, 1, row]``."""
    kv = cache.layer(layer)
    assert isinstance(kv, FlatKV)
    return kv.k


class LatentWorkspace:
    """Memory for partial results, for launches of any lanes on one stream."""

    def __init__(self, device: torch.device, multiprocessors: int, row: int) -> None:
        rows = PROGRAMS_EACH * multiprocessors * MOST_ROWS
        self.tops, self.totals = torch.empty(2, rows, dtype=torch.float32, device=device)
        self.outs = torch.empty(rows, sum(parts_of(row)), dtype=torch.float32, device=device)

    def storages(self) -> list[torch.Tensor]:
        """All tensors."""
        return [self.tops, self.totals, self.outs]


def parts_of(row: int) -> tuple[int, int]:
    """The two parts in which a row of so many numbers is read; the second is padded."""
    first = 1 << (row.bit_length() - 1)
    return first, max(16, 1 << (row - first - 1).bit_length()) if row > first else 16


def blocks_of(rows: int, most: int = MOST_ROWS) -> tuple[int, int]:
    """Rows of a block, and blocks of at most `most` rows, for so many rows of a lane or chunk."""
    size = 16 if rows <= 16 else 32 if rows <= 32 else most
    return size, -(-rows // size)


def pieces_for(units: int, multiprocessors: int) -> int:
    """Pieces of each sequence, a power of two: two programs a multiprocessor or more, and less than twice as many."""
    pieces = 1
    while pieces < MOST_PIECES and 2 * units * pieces < PROGRAMS_EACH * multiprocessors:
        pieces *= 2
    return pieces


def launch_lanes(
    q: torch.Tensor,
    latents: torch.Tensor,
    out: torch.Tensor,
    lengths: torch.Tensor,
    query_lens: torch.Tensor | None,
    slots: torch.Tensor | None,
    *,
    scale: float,
    pieces: int,
    workspace: LatentWorkspace,
    most: int = MOST_ROWS,
) -> None:
    """Launch for lanes: q, out ``[lanes, queries, heads, row]``, contiguous; latents ``[slots, tokens, 1, row]``; the
    rest as in `Attention.decode_queries`. There is room for partial results of `pieces_for` many pieces."""
    from trtllm_vattn.attention.latents_kernel import combine_pieces

    lanes, queries, heads, dim = q.shape
    size, blocks = blocks_of(queries * heads, most)
    sizes = _sizes(heads, dim, size, blocks, queries, query_lens is not None, slots is not None)
    given = {
        "descriptors": lengths,
        "lengths": lengths,
        "query_lens": lengths if query_lens is None else query_lens,
        "slots": lengths if slots is None else slots,
        "part_tops": workspace.tops,
        "part_totals": workspace.totals,
        "part_outs": workspace.outs,
    }
    _launch(q, latents, out, given, scale, lanes * blocks, pieces, sizes)
    if pieces > 1:
        combine_pieces[(lanes * blocks, size)](out, **given, PIECES=pieces, **sizes)


def launch_chunks(
    q: torch.Tensor,
    latents: torch.Tensor,
    out: torch.Tensor,
    descriptors: torch.Tensor,
    *,
    scale: float,
    most: int = MOST_ROWS,
) -> None:
    """Launch for chunks, descriptors int32 ``[chunks, 4]``: q, out ``[rows, heads, row]``, contiguous. Rows of no chunk
    stay as they are."""
    rows, heads, dim = q.shape
    size, blocks = blocks_of(rows * heads, most)
    sizes = _sizes(heads, dim, size, blocks, 0, False, False)
    names = ("descriptors", "lengths", "query_lens", "slots", "part_tops", "part_totals", "part_outs")
    _launch(q, latents, out, dict.fromkeys(names, descriptors), scale, len(descriptors) * blocks, 1, sizes)


def _sizes(
    heads: int, dim: int, rows: int, blocks: int, queries: int, has_query_lens: bool, has_slots: bool
) -> dict[str, Any]:
    first, rest = parts_of(dim)
    return {
        "HEADS": heads,
        "QUERIES": queries,
        "HAS_QUERY_LENS": has_query_lens,
        "HAS_SLOTS": has_slots,
        "DIM": dim,
        "FIRST": first,
        "REST": rest,
        "ROWS": rows,
        "BLOCKS": blocks,
    }


def _launch(
    q: torch.Tensor,
    latents: torch.Tensor,
    out: torch.Tensor,
    given: dict[str, torch.Tensor],
    scale: float,
    units: int,
    pieces: int,
    sizes: dict[str, Any],
) -> None:
    from trtllm_vattn.attention.latents_kernel import attend_latents

    of_slot, of_token = latents.stride()[:2]
    attend_latents[(pieces, units)](
        q,
        latents=latents.data_ptr(),
        out=out,
        **given,
        of_slot=of_slot,
        of_token=of_token,
        scale=scale * LOG2_E,
        **sizes,
        TILE=TILE,
        PIECES=pieces,
        STAGES=2,
        num_warps=8 if sizes["ROWS"] > 16 else 4,
    )
