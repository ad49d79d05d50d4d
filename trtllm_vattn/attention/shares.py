"""The shares backend: a decode kernel of this project for flat KV and uneven lengths.

One Triton kernel (shares_kernel.py) gives every program an equal share of all tokens, so that a few long sequences
among many short ones keep the whole GPU busy. The kernel reads lengths, slots and query counts on the device: there is
no table and no plan on the host, and one captured graph serves all lengths. It loads nothing past a length and nothing
of a lane of length 0; tests/attention shows this on a GPU over unmapped pages. How a sequence is split depends on the
other sequences' lengths, and so do the last bits of its output; equal lengths give equal bits.

On compute capability 9 the kernel loads whole tiles by TMA, and a layer's launch overlaps the end of the kernel before
it (programmatic dependent launch, PDL). Other GPUs use ordinary loads and launches. On the host the torch backend takes
the kernel's place.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from trtllm_vattn.attention.decode_only import DecodeOnlyAttention
from trtllm_vattn.attention.reference import TorchAttention
from trtllm_vattn.cache.base import FlatKV, KVCache
from trtllm_vattn.errors import ConfigError

MOST_QUERIES = 8
"""Queries of a lane: a token and the draft tokens to verify with it."""
HEAD_SIZES = (64, 96, 128, 192, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_CAPABILITY = (8, 0)
HOPPER = 9
"""The major compute capability on which the kernel uses TMA and PDL."""
MOST_ROWS = 64
MOST_OUTPUTS = 64 * 128
"""The most queries of a KV head in one tile, and the most elements of their output; for more queries, K and V are read
again."""


def availability() -> str:
    """``yes`` if the kernel runs on this machine, else the reason."""
    if not torch.cuda.is_available():
        return "no GPU; over a cache on the host a reference in torch takes its place"
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return f"the kernel needs compute capability {LEAST_CAPABILITY}, this GPU is older"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it comes with torch for CUDA"
    return "yes"


@dataclass(frozen=True)
class Settings:
    """How the kernel is compiled and launched.

    A program loads tiles of `tile` tokens, `stages` of them in flight. Each multiprocessor runs `programs` programs of
    `warps` warps. The cost of starting a sequence counts as `start` tiles; a program takes at least `fewest` tiles.
    """

    tile: int
    warps: int
    stages: int
    programs: int
    start: int
    fewest: int


@dataclass(frozen=True)
class Features:
    """Features of Hopper that the kernel uses: loads by TMA, and programmatic dependent launch."""

    tma: bool
    pdl: bool

    @classmethod
    def of(cls, device: torch.device, kv: FlatKV) -> Features:
        """The features that the GPU, Triton, and the strides of K and V allow."""
        if torch.cuda.get_device_capability(device)[0] != HOPPER:
            return cls(False, False)
        import triton.language as tl

        dependent = hasattr(tl.extra.cuda, "gdc_wait")
        return cls(importlib.util.find_spec("triton.tools.tensor_descriptor") is not None and fits_tma(kv), dependent)


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
        most = min(MOST_ROWS, MOST_OUTPUTS // _power_of_two(head_dim))
        rows = min(most, max(16, _power_of_two(real)))
        return cls(real, rows, -(-real // rows))


def settings_for(shared_bytes: int, head_dim: int, itemsize: int, rows: int) -> Settings:
    """Settings for a multiprocessor with `shared_bytes` of shared memory."""
    programs = 2 if rows * _power_of_two(head_dim) <= MOST_OUTPUTS // 2 else 1
    tile = 64
    while tile > 16 and 2 * _tile_bytes(tile, head_dim, itemsize) * programs > shared_bytes - RESERVE * programs:
        tile //= 2
    fitting = (shared_bytes // programs - RESERVE) // _tile_bytes(tile, head_dim, itemsize)
    return Settings(
        tile,
        warps=4 if rows * _power_of_two(head_dim) <= 4096 else 8,
        stages=max(2, min(4, fitting)),
        programs=programs,
        start=2,
        fewest=2,
    )


RESERVE = 8 << 10
"""Bytes of shared memory that a program needs besides its tiles."""


def _tile_bytes(tile: int, head_dim: int, itemsize: int) -> int:
    return 2 * tile * _power_of_two(head_dim) * itemsize


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


class Workspace:
    """Memory in which programs leave partial results of heads; for launches of up to `lanes` lanes on one stream."""

    def __init__(self, device: torch.device, programs: int, lanes: int, kv_heads: int, rows: Rows, head_dim: int):
        parts, dims = 2 * programs, _power_of_two(head_dim)
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
) -> None:
    """Launch the kernel: q, out ``[lanes, queries, num_heads, head_dim]``, contiguous; the other tensors as in
    `SharesAttention.decode_queries`. `tiles` are the TMA descriptors of K and V (`tensor_maps`), needed with TMA."""
    from trtllm_vattn.attention.shares_kernel import decode_shares

    lanes, queries, heads, dim = q.shape
    kv_heads = kv.k.shape[2]
    rows = Rows.of(heads // kv_heads, queries, dim)
    dims, part_rows = _power_of_two(dim), min(rows.rows, _power_of_two(rows.real))
    more = {"launch_pdl": True} if features.pdl else {}
    of_slot, of_token, of_head, _ = kv.k.stride()
    k_tiles, v_tiles = tiles if tiles is not None else (0, 0)
    decode_shares[(programs,)](
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
"""The kernel computes powers of two instead of exponentials."""


def tensor_maps(kv: FlatKV, tile: int) -> list[Any]:
    """TMA descriptors of K and V of a layer, for loads of `tile` tokens of a head."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    box = [1, tile, 1, _power_of_two(kv.k.shape[3])]
    return [TensorDescriptor(x, list(x.shape), list(x.stride()), box) for x in (kv.k, kv.v)]


class SharesAttention(DecodeOnlyAttention):
    """Decode by equal shares over flat KV; all launches must be on one stream.

    Give all layers of a step the same tensors of lengths and slots: only then do launches overlap by PDL.

    Raises
    ------
    ConfigError
        The cache keeps blocks, its head size or dtype is not the kernel's, or the kernel does not run on this machine.
    """

    name: ClassVar[str] = "shares"

    def __init__(self, cache: KVCache, num_heads: int, scale: float | None = None) -> None:
        super().__init__(cache, num_heads, scale)
        first = cache.layer(0)
        if not isinstance(first, FlatKV):
            raise ConfigError(
                f"the shares backend reads flat K and V, not the blocks of a {type(cache).__name__}; use the vattn "
                "cache, or the cudnn or xqa backend"
            )
        self._group = num_heads // cache.shape.num_kv_heads
        self._launched_with: tuple[torch.Tensor | None, ...] = ()
        self._on_gpu = cache.device.type == "cuda"
        if not self._on_gpu:
            return
        if availability() != "yes":
            raise ConfigError(f"the shares backend does not work here: {availability()}")
        shape = cache.shape
        if shape.head_dim not in HEAD_SIZES or shape.dtype not in DTYPES:
            raise ConfigError(
                f"the shares backend takes heads of {', '.join(map(str, HEAD_SIZES))} and bfloat16, float16 or "
                f"float32, not {shape.head_dim} of {shape.dtype}; use the torch backend"
            )
        card = torch.cuda.get_device_properties(cache.device)
        self._multiprocessors: int = card.multi_processor_count
        self._settings = [
            settings_for(
                card.shared_memory_per_multiprocessor,
                shape.head_dim,
                shape.dtype.itemsize,
                Rows.of(self._group, queries, shape.head_dim).rows,
            )
            for queries in range(1, MOST_QUERIES + 1)
        ]
        programs = self._multiprocessors * max(settings.programs for settings in self._settings)
        most = Rows.of(self._group, MOST_QUERIES, shape.head_dim)
        self._workspace = Workspace(cache.device, programs, shape.num_slots, shape.num_kv_heads, most, shape.head_dim)
        self._features = Features.of(cache.device, first)
        self._maps: dict[tuple[int, int], list[Any]] = {}

    def begin_step(self) -> None:
        super().begin_step()
        self._launched_with = ()

    def storages(self) -> list[torch.Tensor]:
        own = self._workspace.storages() if self._on_gpu else []
        return [*super().storages(), *own]

    def decode(
        self,
        layer: int,
        q: torch.Tensor,
        lengths: torch.Tensor,
        slots: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        result = self.decode_queries(layer, q[:, None], None, lengths, slots, None if out is None else out[:, None])
        return result[:, 0] if out is None else out

    def decode_queries(
        self,
        layer: int,
        q: torch.Tensor,
        query_lens: torch.Tensor | None,
        lengths: torch.Tensor,
        slots: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Up to `MOST_QUERIES` query tokens per lane: q ``[lanes, queries, num_heads, head_dim]`` to the same shape.

        Lane i has ``query_lens[i]`` queries (int32 ``[lanes]`` on the device; None: all). The last one is at position
        ``lengths[i] - 1``, and each attends to the tokens up to its own. The output is zeros for the other rows, and
        for a lane without queries or of length 0, which reads nothing. The other parameters are those of `decode`.

        Raises ConfigError for too many queries or lanes.
        """
        lanes, queries = q.shape[:2]
        if not 1 <= queries <= MOST_QUERIES or lanes > self.cache.shape.num_slots:
            raise ConfigError(
                f"{lanes} lanes of {queries} queries; there may be {self.cache.shape.num_slots} lanes, the cache's "
                f"slots, of 1 to {MOST_QUERIES} queries: give longer rows of queries to prefill"
            )
        if not self._on_gpu:
            assert isinstance(self._prefill, TorchAttention)
            return self._prefill.decode_queries(layer, q, query_lens, lengths, slots, out)
        kv = self.cache.layer(layer)
        assert isinstance(kv, FlatKV)
        q = q.contiguous()
        out = torch.empty_like(q) if out is None else out
        settings = self._settings[queries - 1]
        launch(
            q,
            kv,
            out,
            lengths,
            query_lens,
            slots,
            scale=self.scale,
            workspace=self._workspace,
            programs=self._multiprocessors * settings.programs,
            settings=settings,
            features=Features(self._features.tma, self._features.pdl and self._follows(lengths, query_lens, slots)),
            tiles=self._tiles(layer, kv, settings.tile) if self._features.tma else None,
        )
        return out

    def _follows(self, *given: torch.Tensor | None) -> bool:
        """Whether an earlier launch of this step was given the same tensors.

        Only then may a launch read lengths before it waits for the kernel before it: they are older than that kernel.
        """
        before, self._launched_with = self._launched_with, given
        return len(before) == len(given) and all(a is b for a, b in zip(before, given, strict=True))

    def _tiles(self, layer: int, kv: FlatKV, tile: int) -> list[Any]:
        maps = self._maps.get((layer, tile))
        if maps is None:
            maps = self._maps[layer, tile] = tensor_maps(kv, tile)
        return maps
