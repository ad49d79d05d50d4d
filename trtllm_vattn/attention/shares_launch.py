"""Compile and launch the shares kernel: its settings, workspace and TMA descriptors."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trtllm_vattn.attention.options import FP8, PLAIN, LayerOptions, PrefixTables
from trtllm_vattn.cache.base import FlatKV

LEAST_CAPABILITY = (8, 0)
"""The compute capability that this project's attention kernels need."""
HOPPER = 9
"""The major compute capability on which the kernel uses TMA and PDL."""
MOST_ROWS = 64
MOST_OUTPUTS = 64 * 128
"""The most queries of a KV head in one tile, and the most elements of their output; for more queries, K and V are read
again."""


def availability() -> str:
    """``yes`` if this project's attention kernels run on this machine, else the reason."""
    if not torch.cuda.is_available():
        return "no GPU; over a cache on the host a reference in torch takes its place"
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return f"the kernels need compute capability {least}, this GPU is older"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it comes with torch for CUDA"
    return "yes"


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
        return cls(described and kv.k.itemsize <= 2 and fits_tma(kv), dependent)


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
    room = (shared_bytes if large or itemsize == 4 else shared_bytes // 2) - RESERVE
    if itemsize == 4:
        # Queries of 32 bits stay in shared memory, those of 16 in registers; one program runs.
        room -= rows * power_of_two(head_dim) * itemsize
    tile = 128 if lanes <= MANY_LANES and not large else 64
    while tile > 16 and _tile_bytes(tile, head_dim, itemsize) > room:
        tile //= 2
    # One of the stages is in use and not in shared memory.
    fitting = 1 + room // _tile_bytes(tile, head_dim, itemsize)
    return Settings(tile, 8 if large else 4, min(3, fitting), start=(2 if few else 1) if tile > 64 else 3)


MANY_LANES = 64
"""With more lanes than these, tiles are smaller."""
RESERVE = 8 << 10
"""Bytes of shared memory that a program needs besides its tiles."""


def _tile_bytes(tile: int, head_dim: int, itemsize: int) -> int:
    return 2 * tile * power_of_two(head_dim) * itemsize


def power_of_two(least: int) -> int:
    """The smallest power of two that is not below a positive number."""
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


LEAST_PIECE = 512
"""Tokens. Shorter ones keep more of the GPU busy for few lanes, and cost more starts; not measured."""
MOST_PIECES = 32
MOST_PIECES_BYTES = 256 << 20


@dataclass(frozen=True)
class Pieces:
    """How sequences are cut whatever the other lanes are: `tokens` a piece, `most` pieces of a sequence at most."""

    tokens: int
    most: int

    @classmethod
    def of(cls, longest: int, lanes: int, kv_heads: int, rows: Rows, head_dim: int) -> Pieces:
        """For sequences of up to `longest` tokens: pieces of 512 tokens, or of as many times two as it takes to have
        no more than `MOST_PIECES` of a sequence and `MOST_PIECES_BYTES` of partial results."""
        tokens = LEAST_PIECE
        while True:
            made = cls(tokens, max(1, -(-longest // tokens)))
            parts, part_rows = made.parts(lanes, kv_heads, rows)
            if made.most == 1 or (
                made.most <= MOST_PIECES and parts * part_rows * (power_of_two(head_dim) + 2) * 4 <= MOST_PIECES_BYTES
            ):
                return made
            tokens *= 2

    def parts(self, lanes: int, kv_heads: int, rows: Rows) -> tuple[int, int]:
        """Partial results of so many lanes, and rows of each. Sequences of one piece leave none."""
        return lanes * kv_heads * rows.blocks * self.most if self.most > 1 else 1, part_rows(rows)


def part_rows(rows: Rows) -> int:
    """Rows of a block's partial results that are looked at."""
    return min(rows.rows, power_of_two(rows.real))


class Workspace:
    """Memory in which programs leave partial results of heads; for launches of up to `lanes` lanes on one stream, by
    `programs` programs or, with `pieces`, by any number of them."""

    def __init__(
        self,
        device: torch.device,
        programs: int,
        lanes: int,
        kv_heads: int,
        rows: Rows,
        head_dim: int,
        pieces: Pieces | None = None,
    ) -> None:
        parts, each = (2 * programs, rows.rows) if pieces is None else pieces.parts(lanes, kv_heads, rows)
        self.tops, self.totals = torch.empty(2, parts, each, dtype=torch.float32, device=device)
        self.outs = torch.empty(parts, each, power_of_two(head_dim), dtype=torch.float32, device=device)
        self.arrived = torch.zeros(lanes * kv_heads * rows.blocks, dtype=torch.int32, device=device)
        """For each head, how many partial results are there; the program that combines them resets it to 0."""

    def storages(self) -> list[torch.Tensor]:
        """All tensors."""
        return [self.tops, self.outs, self.arrived]


class SharedReads:
    """Memory for what groups of lanes read together (prefix_kernel.py): results by query head, for launches of up to
    `lanes` lanes of `queries` queries on one stream, and partial results."""

    def __init__(
        self, device: torch.device, programs: int, lanes: int, queries: int, heads: int, kv_heads: int, head_dim: int
    ) -> None:
        dims = power_of_two(head_dim)
        self.rows = min(MOST_ROWS, MOST_OUTPUTS // dims)
        """Queries of a KV head in one tile."""
        results = lanes * queries * heads
        self.tops = torch.empty(results, dtype=torch.float32, device=device)
        self.outs = torch.empty(results, dims, dtype=torch.float32, device=device)
        rows = Rows(self.rows, self.rows, 1)
        # A group's blocks of rows are counted from its first lane's, plus one for each group before it.
        counted = lanes * queries * (heads // kv_heads) // self.rows + max(1, lanes // 2) + 2
        self.workspace = Workspace(device, programs, counted, kv_heads, rows, head_dim)

    def storages(self) -> list[torch.Tensor]:
        """All tensors."""
        return [self.tops, self.outs, *self.workspace.storages()]


@dataclass(frozen=True, eq=False)
class HeadTables:
    """Where K and V of a layer's heads are that have lengths of their own: bases int64 ``[num_kv_heads, 2]``, addresses
    of the first slot; groups int32 ``[num_kv_heads]``, rows of deficits int32 ``[num_groups, num_slots + 1]``."""

    bases: torch.Tensor
    groups: torch.Tensor
    deficits: torch.Tensor

    @classmethod
    def of(cls, parts: Sequence[FlatKV], groups: Sequence[int], deficits: torch.Tensor) -> HeadTables:
        """Of the parts of a layer's heads, which have the same strides, and their range groups."""
        bases, rows = [], []
        for kv, group in zip(parts, groups, strict=True):
            for head in range(kv.k.shape[2]):
                bases.append([x.data_ptr() + head * x.stride(2) * x.itemsize for x in (kv.k, kv.v)])
                rows.append(group)
        device = deficits.device
        on_device = torch.tensor(bases, dtype=torch.int64, device=device)
        return cls(on_device, torch.tensor(rows, dtype=torch.int32, device=device), deficits)

    def storages(self) -> list[torch.Tensor]:
        """The tables."""
        return [self.bases, self.groups]


@dataclass(frozen=True, eq=False)
class Extras:
    """What a launch of decode or of prompts uses beyond lengths and slots; nothing by default.

    Of decode, `shared` are what groups of lanes read before, by `launch_prefixes` with the same `prefixes`.
    """

    options: LayerOptions = PLAIN
    prefixes: PrefixTables | None = None
    shared: SharedReads | None = None
    heads: HeadTables | None = None

    def arguments(self, unused: torch.Tensor, kv_heads: int) -> dict[str, Any]:
        """The arguments of the kernels of decode and of prompts; `unused` takes the place of tensors that they do not
        read."""
        options, tables, heads = self.options, self.prefixes, self.heads
        logits, k_scale, v_scale = options.sink_logits, options.k_scale, options.v_scale
        return {
            "base_slots": unused if tables is None else tables.base_slots,
            "borders": unused if tables is None else tables.borders,
            "sink_logits": unused if logits is None else logits,
            "k_scale": unused if k_scale is None else k_scale,
            "v_scale": unused if v_scale is None else v_scale,
            "head_bases": unused if heads is None else heads.bases,
            "head_groups": unused if heads is None else heads.groups,
            "deficits": unused if heads is None else heads.deficits,
            "of_group": 0 if heads is None else heads.deficits.stride(0),
            "WINDOW": options.window or 0,
            "FIRST": options.first_tokens,
            "PREFIXES": tables is not None,
            "SINKS": logits is not None,
            "SOFTCAP": softcap_of(options),
            "K_SCALES": scales_of(k_scale),
            "V_SCALES": scales_of(v_scale),
            "HEADS": 0 if heads is None else power_of_two(kv_heads),
        }

    def shared_arguments(self, unused: torch.Tensor) -> dict[str, Any]:
        """The arguments of the kernel of decode about what groups of lanes have read."""
        tables, shared = self.prefixes, self.shared
        return {
            "shared": unused if tables is None else tables.shared,
            "shared_tops": unused if shared is None else shared.tops,
            "shared_outs": unused if shared is None else shared.outs,
            "SHARED": shared is not None,
        }


NOTHING = Extras()


def softcap_of(options: LayerOptions) -> float:
    """What the kernels are told about a soft cap: it in powers of two, as their scores are, or 0 for none."""
    return 0.0 if options.softcap is None else options.softcap * LOG2_E


def scales_of(scale: torch.Tensor | None) -> int:
    """What the kernels are told about a scale: 0 for none, 1 for one of a tensor, 2 for one a head."""
    return 0 if scale is None else 1 + (len(scale) > 1)


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
    extras: Extras = NOTHING,
    pieces: Pieces | None = None,
) -> Any:
    """Launch the kernel: q and out ``[lanes, queries, num_heads, head_dim]``, contiguous; the rest as in
    `SharesAttention.decode_queries`. `tiles` are tensor maps of K and V (`tensor_maps`), needed for TMA. `kv` is the
    first part of a layer's heads where `extras.heads` has them. With `pieces`, for which the workspace has to be made,
    too, sequences are cut by them; a piece is a multiple of a tile. Returns the compiled kernel."""
    from trtllm_vattn.attention.shares_kernel import decode_shares

    lengths = lengths.contiguous()
    query_lens, slots = (None if x is None else x.contiguous() for x in (query_lens, slots))
    lanes, queries, heads, dim = q.shape
    kv_heads = kv.k.shape[2] if extras.heads is None else len(extras.heads.groups)
    rows = Rows.of(heads // kv_heads, queries, dim)
    dims, each = power_of_two(dim), part_rows(rows)
    more = {"launch_pdl": True} if features.pdl else {}
    return decode_shares[(programs,)](
        q,
        out=out,
        lengths=lengths,
        query_lens=lengths if query_lens is None else query_lens,
        slots=lengths if slots is None else slots,
        lanes=lanes,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        QUERIES=queries,
        ROWS=rows.rows,
        ROW_BLOCKS=rows.blocks,
        LANES=max(64, power_of_two(lanes)) if extras.heads is None else max(16, power_of_two(lanes)),
        PARTS=max(1, min(16, MOST_OUTPUTS // (each * dims))),
        PART_ROWS=each,
        PIECE=0 if pieces is None else pieces.tokens // settings.tile,
        MOST_PIECES=1 if pieces is None else pieces.most,
        HAS_QUERY_LENS=query_lens is not None,
        HAS_SLOTS=slots is not None,
        **extras.arguments(lengths, kv_heads),
        **extras.shared_arguments(lengths),
        **_reading(kv, workspace, settings, features, tiles, scale, dim),
        **more,
    )


def launch_prefixes(
    q: torch.Tensor,
    kv: FlatKV,
    tables: PrefixTables,
    reads: SharedReads,
    *,
    scale: float,
    options: LayerOptions,
    programs: int,
    settings: Settings,
    features: Features,
    tiles: Sequence[Any] | None = None,
) -> Any:
    """Launch the kernel that reads what groups of lanes share, for q ``[lanes, queries, num_heads, head_dim]``,
    contiguous. Returns the compiled kernel."""
    from trtllm_vattn.attention.prefix_kernel import read_prefixes

    lanes, queries, heads, dim = q.shape
    kv_heads, dims = kv.k.shape[2], power_of_two(dim)
    more = {"launch_pdl": True} if features.pdl else {}
    return read_prefixes[(programs,)](
        q,
        tops=reads.tops,
        outs=reads.outs,
        groups=tables.groups,
        members=tables.members,
        k_scale=q if options.k_scale is None else options.k_scale,
        num_groups=len(tables.groups),
        lanes=lanes,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        QUERIES=queries,
        ROWS=reads.rows,
        GROUPS=max(16, power_of_two(len(tables.groups))),
        PARTS=max(1, MOST_OUTPUTS // (reads.rows * dims)),
        K_SCALES=scales_of(options.k_scale),
        SOFTCAP=softcap_of(options),
        **_reading(kv, reads.workspace, settings, features, tiles, scale, dim),
        **more,
    )


def _reading(
    kv: FlatKV,
    workspace: Workspace,
    settings: Settings,
    features: Features,
    tiles: Sequence[Any] | None,
    scale: float,
    dim: int,
) -> dict[str, Any]:
    """The arguments by which both kernels read K and V, share out the work, and leave partial results."""
    of_slot, of_token, of_head, _ = kv.k.stride()
    k_tiles, v_tiles = tiles if tiles is not None else (0, 0)
    return {
        "k": kv.k.data_ptr(),
        "v": kv.v.data_ptr(),
        "k_tiles": k_tiles,
        "v_tiles": v_tiles,
        "part_tops": workspace.tops,
        "part_totals": workspace.totals,
        "part_outs": workspace.outs,
        "arrived": workspace.arrived,
        "of_slot": of_slot,
        "of_token": of_token,
        "of_head": of_head,
        "start": settings.start,
        "fewest": settings.fewest,
        "scale": scale * LOG2_E,
        "DIM": dim,
        "DIMS": power_of_two(dim),
        "TILE": settings.tile,
        "STAGES": settings.stages,
        "TMA": tiles is not None,
        "PDL": features.pdl,
        "FP8": kv.k.dtype == FP8,
        "num_warps": settings.warps,
    }


LOG2_E = 1.4426950408889634
"""The kernel computes powers of two instead of exponentials."""


def tensor_maps(kv: FlatKV, tile: int) -> list[Any]:
    """TMA descriptors of K and V of a layer, for loads of `tile` tokens of a head."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    box = [1, tile, 1, power_of_two(kv.k.shape[3])]
    return [TensorDescriptor(x, list(x.shape), list(x.stride()), box) for x in (kv.k, kv.v)]
