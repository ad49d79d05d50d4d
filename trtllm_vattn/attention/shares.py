"""The shares backend: decode attention of our own, made for fixed addresses and uneven lengths.

One Triton kernel (shares_kernel.py) gives every program of the GPU an equal share of all tokens, so that a few long
sequences among many short ones keep the whole card reading. Lengths, slots and counts of queries are read on the
device: no table, no plan on the host, and one captured graph serves any lengths. Nothing past a length is loaded and
nothing of a lane of length 0 (tests/attention shows it on the card, over unmapped pages). Into which parts a sequence
is cut depends on the lengths of its neighbours, and so do the last bits of its output; equal lengths give equal bits.

On compute capability 9 whole tiles come by TMA, and a layer's launch overlaps the end of the kernel before it
(programmatic dependent launch); elsewhere the same source loads by ordinary instructions and waits. On the host, a
reference of the same interface takes the kernel's place. Prompts go through another backend (cuDNN's, else torch's).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from trtllm_vattn.attention.base import Attention, Chunks
from trtllm_vattn.attention.gather import GatheringAttention
from trtllm_vattn.attention.reference import TorchAttention
from trtllm_vattn.cache.base import FlatKV, KVCache
from trtllm_vattn.errors import ConfigError

MOST_QUERIES = 8
"""Of a lane: a token and the drafts that are verified with it."""
HEAD_SIZES = (64, 96, 128, 192, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_CAPABILITY = (8, 0)
HOPPER = 9
"""The major compute capability whose TMA and dependent launches are used."""
MOST_ROWS = 64
MOST_OUTPUTS = 64 * 128
"""Queries of a KV head in one tile, and numbers of their output; a head with more is gone through again for the rest.
"""


def why_not() -> str:
    """``yes`` where the kernel runs on this machine, else the reason."""
    if not torch.cuda.is_available():
        return "no GPU; over a cache on the host a reference in torch takes its place"
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return f"the kernel needs compute capability {LEAST_CAPABILITY}, this GPU is older"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it comes with torch for CUDA"
    return "yes"


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
        return cls(importlib.util.find_spec("triton.tools.tensor_descriptor") is not None and fits_tma(kv), dependent)


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
    of_warp = -(-kernel.n_regs * 32 // 256) * 256
    by_registers = REGISTERS // (of_warp * kernel.metadata.num_warps)
    return max(1, min(by_registers, shared_bytes // (kernel.metadata.shared + 1024)))


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


class SharesAttention(GatheringAttention):
    """Decode by equal shares, over flat K and V; for launches on one stream.

    Lengths and slots of a step are the same tensors for all its layers, and layers come in order; where they do not, a
    launch only waits for the kernel before it.

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
        self._context = self._choose_context()
        self._on_gpu = cache.device.type == "cuda"
        if not self._on_gpu:
            return
        if why_not() != "yes":
            raise ConfigError(f"the shares backend does not work here: {why_not()}")
        shape = cache.shape
        if shape.head_dim not in HEAD_SIZES or shape.dtype not in DTYPES:
            raise ConfigError(
                f"the shares backend takes heads of {', '.join(map(str, HEAD_SIZES))} and bfloat16, float16 or "
                f"float32, not {shape.head_dim} of {shape.dtype}; use the torch backend"
            )
        self._card = torch.cuda.get_device_properties(cache.device)
        most = Rows.of(self._group, MOST_QUERIES, shape.head_dim)
        programs = self._card.multi_processor_count * most_programs(shape.head_dim)
        self._workspace = Workspace(cache.device, programs, shape.num_slots, shape.num_kv_heads, most, shape.head_dim)
        self._fitting: dict[tuple[object, ...], int] = {}
        """Programs of a multiprocessor, by what the kernel is compiled for; known once it was launched."""
        self._features = Features.of(cache.device, first)
        self._maps: dict[tuple[int, int], list[Any]] = {}
        self._step: tuple[torch.Tensor | None, ...] = ()
        self._last_layer = -1

    def _choose_context(self) -> Attention:
        """The backend of prompts."""
        cache = self.cache
        half = cache.shape.dtype in (torch.bfloat16, torch.float16)
        if cache.device.type != "cuda" or not half or importlib.util.find_spec("cudnn") is None:
            return TorchAttention(cache, self.num_heads, self.scale)
        from trtllm_vattn.attention.cudnn import CudnnAttention

        return CudnnAttention(cache, self.num_heads, self.scale)

    def storages(self) -> list[torch.Tensor]:
        own = self._workspace.storages() if self._on_gpu else []
        return [*super().storages(), *own, *self._context.storages()]

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
        """Up to `MOST_QUERIES` query tokens a lane: q ``[lanes, queries, num_heads, head_dim]`` to the same shape.

        Of lane i the first `query_lens[i]` are there (int32 ``[lanes]`` on the device; None: all), the last of them at
        position ``lengths[i] - 1``, and each sees the tokens up to its own. The others' output is zeros, and that of a
        lane without queries or of length 0, which reads nothing. The rest is as in `decode`.

        Raises ConfigError for more queries or lanes than there may be.
        """
        lanes, queries = q.shape[:2]
        if not 1 <= queries <= MOST_QUERIES or lanes > self.cache.shape.num_slots:
            raise ConfigError(
                f"{lanes} lanes of {queries} queries; there may be {self.cache.shape.num_slots} lanes, the cache's "
                f"slots, of 1 to {MOST_QUERIES} queries: give longer rows of queries to prefill"
            )
        if not self._on_gpu:
            assert isinstance(self._context, TorchAttention)
            return self._context.decode_queries(layer, q, query_lens, lengths, slots, out)
        kv = self.cache.layer(layer)
        assert isinstance(kv, FlatKV)
        q = q.contiguous()
        out = torch.empty_like(q) if out is None else out
        settings, multiprocessors = self._settings(lanes, queries), self._card.multi_processor_count
        dependent = self._features.pdl and self._follows(layer, lengths, query_lens, slots)
        kind = (settings, queries, lanes, query_lens is None, slots is None, dependent)
        kernel = launch(
            q,
            kv,
            out,
            lengths,
            query_lens,
            slots,
            scale=self.scale,
            workspace=self._workspace,
            programs=multiprocessors * self._fitting.get(kind, 2),
            settings=settings,
            features=Features(self._features.tma, dependent),
            tiles=self._tiles(layer, kv, settings.tile) if self._features.tma else None,
        )
        if kind not in self._fitting:
            fitting = programs_at_once(kernel, self._card.shared_memory_per_multiprocessor)
            self._fitting[kind] = min(fitting, most_programs(self.cache.shape.head_dim))
        return out

    def _settings(self, lanes: int, queries: int) -> Settings:
        shape = self.cache.shape
        return settings_for(
            self._card.shared_memory_per_multiprocessor,
            shape.head_dim,
            shape.dtype.itemsize,
            Rows.of(self._group, queries, shape.head_dim).rows,
            lanes,
            lanes * shape.num_kv_heads <= self._card.multi_processor_count,
        )

    def _follows(self, layer: int, *step: torch.Tensor | None) -> bool:
        """Whether a launch is of a later layer of the same step as the one before.

        Only then may it read lengths before it waits for the kernel that it follows: they are older than that kernel.
        """
        same = len(step) == len(self._step) and all(a is b for a, b in zip(step, self._step, strict=True))
        follows = same and layer > self._last_layer
        self._step, self._last_layer = step, layer
        return follows

    def _tiles(self, layer: int, kv: FlatKV, tile: int) -> list[Any]:
        maps = self._maps.get((layer, tile))
        if maps is None:
            maps = self._maps[layer, tile] = tensor_maps(kv, tile)
        return maps

    def prefill(
        self,
        layer: int,
        q: torch.Tensor,
        slot: torch.Tensor,
        query_len: torch.Tensor,
        length: torch.Tensor,
        max_length: int,
    ) -> torch.Tensor:
        return self._context.prefill(layer, q, slot, query_len, length, max_length)

    def prefill_together(self, layer: int, q: torch.Tensor, chunks: Chunks) -> torch.Tensor:
        return self._context.prefill_together(layer, q, chunks)
