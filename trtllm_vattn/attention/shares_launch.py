"""Compile and launch the shares kernel: its settings, workspace and TMA descriptors."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trtllm_vattn.cache.base import FlatKV

HOPPER = 9
"""The major compute capability on which the kernel uses TMA and PDL."""
MOST_ROWS = 64
MOST_OUTPUTS = 64 * 128
"""The most queries of a KV head in one tile, and the most elements of their output; for more queries, K and V are read
again."""


@dataclass(frozen=True)
class Settings:
    """How the kernel is compiled and launched.

    A program of `warps` warps loads tiles of `tile` tokens, `stages` of them in flight. The cost of starting a sequence
    counts as `start` tiles; a program takes at least `fewest` tiles.
    """

    tile: int
    warps: int
    stages: int
    start: int
    fewest: int = 2


@dataclass(frozen=True)
class Features:
    """Features of Hopper that the kernel uses: loads by TMA, and programmatic dependent launch (PDL)."""

    tma: bool
    pdl: bool

    @classmethod
    def of(cls, device: torch.device, kv: FlatKV) -> Features:
        """The features that the GPU, Triton, and the layout of K and V allow."""
        if torch.cuda.get_device_capability(device)[0] != HOPPER:
            return cls(False, False)
        import triton.language as tl

        dependent = hasattr(tl.extra.cuda, "gdc_wait")
        described = importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
        return cls(described and kv.k.itemsize == 2 and fits_tma(kv), dependent)


def fits_tma(kv: FlatKV) -> bool:
    """Whether a TMA descriptor can hold the addresses and strides: multiples of 16 bytes, strides below 2**40."""
    return all(
        x.data_ptr() % 16 == 0
        and x.stride(3) == 1
        and all(step * x.itemsize % 16 == 0 and step * x.itemsize < 1 << 40 for step in x.stride()[:3])
        for x in (kv.k, kv.v)
    )


@dataclass(frozen=True)
class Rows:
    """The queries of one KV head as `blocks` tiles of `rows` rows; `real` rows hold queries, the others are padding."""

    real: int
    rows: int
    blocks: int

    @classmethod
    def of(cls, group: int, queries: int, head_dim: int) -> Rows:
        """For `group` query heads per KV head and `queries` queries per lane."""
        real = group * queries
        most = min(MOST_ROWS, MOST_OUTPUTS // power_of_two(head_dim))
        rows = min(most, max(16, power_of_two(real)))
        return cls(real, rows, -(-real // rows))


def settings_for(shared_bytes: int, head_dim: int, itemsize: int, rows: int, lanes: int, few: bool) -> Settings:
    """Settings for a multiprocessor with `shared_bytes` of shared memory, on which two programs of small tiles run.

    `few` says that the KV heads of all lanes are no more than the GPU's multiprocessors. The choice was measured on an
    H200 with the heads of Llama-3-8B: large tiles are slow for many lanes, whose sequences are mostly short.
    """
    large = rows * power_of_two(head_dim) > MOST_OUTPUTS // 2
    shared_bytes = shared_bytes if large else shared_bytes // 2
    tile = 128 if lanes <= MANY_LANES and not large else 64
    while tile > 16 and _tile_bytes(tile, head_dim, itemsize) > shared_bytes - RESERVE:
        tile //= 2
    # One of the stages is in use and not in shared memory.
    fitting = 1 + (shared_bytes - RESERVE) // _tile_bytes(tile, head_dim, itemsize)
    return Settings(tile, 8 if large else 4, min(3, fitting), start=(2 if few else 1) if tile > 64 else 3)


MANY_LANES = 64
"""With more lanes than these, tiles are smaller."""
RESERVE = 8 << 10
"""Bytes of shared memory that a program needs besides its tiles."""


def _tile_bytes(tile: int, head_dim: int, itemsize: int) -> int:
    return 2 * tile * power_of_two(head_dim) * itemsize


def power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


REGISTERS = 65536
"""Registers of a multiprocessor, for compute capabilities 8.0 to 10.0."""


def programs_at_once(kernel: Any, shared_bytes: int) -> int:
    """Programs of a compiled kernel that fit on a multiprocessor with `shared_bytes` of shared memory.

    A launch starts this many per multiprocessor. With fewer, programs of the next launch would take the free places and
    wait there, and a launch's programs would be spread unevenly. A warp takes registers in units of 256; a program
    takes 1 KiB of shared memory besides its own (CUDA C++ Programming Guide, compute capabilities).
    """
    of_warp = -(-int(kernel.n_regs) * 32 // 256) * 256
    by_registers = REGISTERS // (of_warp * int(kernel.metadata.num_warps))
    return max(1, min(by_registers, shared_bytes // (int(kernel.metadata.shared) + 1024)))


def most_programs(head_dim: int) -> int:
    """Programs per multiprocessor for which a `Workspace` has room."""
    return 8 if head_dim <= 64 else 4


class Workspace:
    """Memory in which programs leave partial results of heads; for launches of up to `lanes` lanes on one stream."""

    def __init__(self, device: torch.device, programs: int, lanes: int, kv_heads: int, rows: Rows, head_dim: int):
        parts, dims = 2 * programs, power_of_two(head_dim)
        self.tops, self.totals = torch.empty(2, parts, rows.rows, dtype=torch.float32, device=device)
        self.outs = torch.empty(parts, rows.rows, dims, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(lanes * kv_heads * rows.blocks, dtype=torch.int32, device=device)
        """For each head, how many partial results are there; the program that combines them resets it to 0."""

    def storages(self) -> list[torch.Tensor]:
        """All tensors."""
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
    dims, part_rows = power_of_two(dim), min(rows.rows, power_of_two(rows.real))
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
        LANES=max(64, power_of_two(lanes)),
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
"""The kernel computes powers of two instead of exponentials."""


def tensor_maps(kv: FlatKV, tile: int) -> list[Any]:
    """TMA descriptors of K and V of a layer, for loads of `tile` tokens of a head."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    box = [1, tile, 1, power_of_two(kv.k.shape[3])]
    return [TensorDescriptor(x, list(x.shape), list(x.stride()), box) for x in (kv.k, kv.v)]
