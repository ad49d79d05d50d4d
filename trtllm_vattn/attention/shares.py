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
from typing import Any, ClassVar

import torch

from trtllm_vattn.attention.base import Attention, Chunks
from trtllm_vattn.attention.gather import GatheringAttention
from trtllm_vattn.attention.reference import TorchAttention
from trtllm_vattn.attention.shares_launch import (
    Features,
    Rows,
    Settings,
    Workspace,
    launch,
    most_programs,
    programs_at_once,
    settings_for,
    tensor_maps,
)
from trtllm_vattn.cache.base import FlatKV, KVCache
from trtllm_vattn.errors import ConfigError

MOST_QUERIES = 8
"""Of a lane: a token and the drafts that are verified with it."""
HEAD_SIZES = (64, 96, 128, 192, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_CAPABILITY = (8, 0)


def why_not() -> str:
    """``yes`` where the kernel runs on this machine, else the reason."""
    if not torch.cuda.is_available():
        return "no GPU; over a cache on the host a reference in torch takes its place"
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return f"the kernel needs compute capability {LEAST_CAPABILITY}, this GPU is older"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it comes with torch for CUDA"
    return "yes"


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

        Raises ConfigError for more queries or lanes than there may be, or queries of another dtype than the cache's.
        """
        lanes, queries = q.shape[:2]
        if q.dtype != self.cache.shape.dtype:
            raise ConfigError(f"queries are {q.dtype}, the cache is {self.cache.shape.dtype}; convert the queries")
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
