"""How the kernel of decode by equal shares is built and launched: its settings, workspace and tensor maps."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trtllm_vattn.cache.base import FlatKV

HOPPER = 9
"""The major compute capability whose TMA and dependent launches are used."""
MOST_ROWS = 64
MOST_OUTPUTS = 64 * 128
"""Queries of a KV head in one tile, and numbers of their output; a head with more is gone through again for the rest.
"""


@dataclass(frozen=True)
class Settings:
    """How the kernel is built and launched.

    `tile` tokens are loaded at once and `stages` such tiles are under way, by `warps` warps. What beginning a sequence
    costs counts as `start` tiles; no program takes fewer than `fewest`.
    """

    tile: int
    warps: int
    stages: int
    start: int
    fewest: int = 2


@dataclass(frozen=True)
class Features:
    """What the kernel may use of Hopper's: tiles by TMA, and programmatic dependent launch."""

    tma: bool
    pdl: bool

    @classmethod
    def of(cls, device: torch.device, kv: FlatKV) -> Features:
        """What a GPU, its Triton, and the strides of K and V allow."""
        if torch.cuda.get_device_capability(device)[0] != HOPPER:
            return cls(False, False)
        import triton.language as tl

        dependent = hasattr(tl.extra.cuda, "gdc_wait")
        described = importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
        return cls(described and kv.k.itemsize == 2 and fits_tma(kv), dependent)


def fits_tma(kv: FlatKV) -> bool:
    """Whether strides and addresses are those that a tensor map can hold: multiples of 16 bytes, less than 2**40."""
    return all(
        x.data_ptr() % 16 == 0
        and x.stride(3) == 1
        and all(step * x.itemsize % 16 == 0 and step * x.itemsize < 1 << 40 for step in x.stride()[:3])
        for x in (kv.k, kv.v)
    )


@dataclass(frozen=True)
class Rows:
    """Queries of one KV head as rows of tiles: `blocks` times `rows`, of which `real` in all are there."""

    real: int
    rows: int
    blocks: int

    @classmethod
    def of(cls, group: int, queries: int, head_dim: int) -> Rows:
        """For `group` query heads a KV head and `queries` of each lane."""
        real = group * queries
        most = min(MOST_ROWS, MOST_OUTPUTS // _power_of_two(head_dim))
        rows = min(most, max(16, _power_of_two(real)))
        return cls(real, rows, -(-real // rows))


def settings_for(shared_bytes: int, head_dim: int, itemsize: int, rows: int, lanes: int, few: bool) -> Settings:
    """Settings by the shared memory of a multiprocessor and the size of a tile, for two programs on each; by the number
    of lanes, and by whether the heads of all lanes are `few`, no more than multiprocessors.

    Measured on the H200 with Llama-3-8B's heads: many lanes are mostly short sequences, which larger tiles do not fit.
    """
    large = rows * _power_of_two(head_dim) > MOST_OUTPUTS // 2
    shared_bytes = shared_bytes if large else shared_bytes // 2
    tile = 128 if lanes <= MANY_LANES and not large else 64
    while tile > 16 and _tile_bytes(tile, head_dim, itemsize) > shared_bytes - RESERVE:
        tile //= 2
    # One of the stages is being used or on its way there.
    fitting = 1 + (shared_bytes - RESERVE) // _tile_bytes(tile, head_dim, itemsize)
    return Settings(tile, 8 if large else 4, min(3, fitting), start=(2 if few else 1) if tile > 64 else 3)


MANY_LANES = 64
"""With more than these, tiles are smaller."""
RESERVE = 8 << 10
"""Bytes of shared memory that a program needs besides its tiles."""


def _tile_bytes(tile: int, head_dim: int, itemsize: int) -> int:
    return 2 * tile * _power_of_two(head_dim) * itemsize


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


REGISTERS = 65536
"""Of a multiprocessor, from compute capability 8.0 to 10.0."""


def programs_at_once(kernel: Any, shared_bytes: int) -> int:
    """Programs of a compiled kernel that a multiprocessor with so many bytes of shared memory holds.

    That many are launched on each: places left over would be taken by programs of the launch that follows, which wait
    there, and then those of one launch lie unevenly. A warp takes registers 256 at a time; a program 1 KiB of shared
    memory besides its own (CUDA C++ Programming Guide, compute capabilities).
    """
    of_warp = -(-int(kernel.n_regs) * 32 // 256) * 256
    by_registers = REGISTERS // (of_warp * int(kernel.metadata.num_warps))
    return max(1, min(by_registers, shared_bytes // (int(kernel.metadata.shared) + 1024)))


def most_programs(head_dim: int) -> int:
    """Of a multiprocessor, that there is room in a `Workspace` for."""
    return 8 if head_dim <= 64 else 4


class Workspace:
    """Where programs leave parts of heads for one another; for launches on one stream, of up to `lanes` lanes."""

    def __init__(self, device: torch.device, programs: int, lanes: int, kv_heads: int, rows: Rows, head_dim: int):
        parts, dims = 2 * programs, _power_of_two(head_dim)
        self.tops, self.totals = torch.empty(2, parts, rows.rows, dtype=torch.float32, device=device)
        self.outs = torch.empty(parts, rows.rows, dims, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(lanes * kv_heads * rows.blocks, dtype=torch.int32, device=device)
        """Of each head, how many parts are there; left at 0 by whoever combines them."""

    def storages(self) -> list[torch.Tensor]:
        """All of it."""
        return [self.tops, self.outs, self.arrived]


def launch(
    q: torch.Tensor,
    kv: FlatKV,
    out: torch.Tensor,
    lengths: torch.Tensor,
    query_lens: torch.Tensor | None,
    slots: torch.Tensor | None,
    *,
    scale: float,
    workspace: Workspace,
    programs: int,
    settings: Settings,
    features: Features,
    tiles: Sequence[Any] | None = None,
) -> Any:
    """Launch the kernel: q and out ``[lanes, queries, num_heads, head_dim]``, contiguous; the rest as in
    `SharesAttention.decode_queries`. `tiles` are tensor maps of K and V (`tensor_maps`), needed for TMA. Returns the
    compiled kernel."""
    from trtllm_vattn.attention.shares_kernel import decode_shares

    lengths = lengths.contiguous()
    query_lens, slots = (None if x is None else x.contiguous() for x in (query_lens, slots))
    lanes, queries, heads, dim = q.shape
    kv_heads = kv.k.shape[2]
    rows = Rows.of(heads // kv_heads, queries, dim)
    dims, part_rows = _power_of_two(dim), min(rows.rows, _power_of_two(rows.real))
    more = {"launch_pdl": True} if features.pdl else {}
    of_slot, of_token, of_head, _ = kv.k.stride()
    k_tiles, v_tiles = tiles if tiles is not None else (0, 0)
    return decode_shares[(programs,)](
        q,
        kv.k.data_ptr(),
        kv.v.data_ptr(),
        k_tiles,
        v_tiles,
        out,
        lengths,
        lengths if query_lens is None else query_lens,
        lengths if slots is None else slots,
        workspace.tops,
        workspace.totals,
        workspace.outs,
        workspace.arrived,
        of_slot,
        of_token,
        of_head,
        lanes,
        settings.start,
        settings.fewest,
        scale * LOG2_E,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        QUERIES=queries,
        DIM=dim,
        DIMS=dims,
        TILE=settings.tile,
        ROWS=rows.rows,
        ROW_BLOCKS=rows.blocks,
        LANES=max(64, _power_of_two(lanes)),
        STAGES=settings.stages,
        PARTS=max(1, min(16, MOST_OUTPUTS // (part_rows * dims))),
        PART_ROWS=part_rows,
        HAS_QUERY_LENS=query_lens is not None,
        HAS_SLOTS=slots is not None,
        TMA=features.tma,
        PDL=features.pdl,
        num_warps=settings.warps,
        **more,
    )


LOG2_E = 1.4426950408889634
"""The kernel's exponentials are powers of two."""


def tensor_maps(kv: FlatKV, tile: int) -> list[Any]:
    """K and V of a layer as TMA reads them, `tile` tokens of a head at once."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    box = [1, tile, 1, _power_of_two(kv.k.shape[3])]
    return [TensorDescriptor(x, list(x.shape), list(x.stride()), box) for x in (kv.k, kv.v)]
