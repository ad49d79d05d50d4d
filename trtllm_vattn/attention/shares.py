"""The shares backend: kernels of this project for flat KV, for decode with uneven lengths and for prompts.

One Triton kernel (shares_kernel.py) gives every program an equal share of all tokens, so that a few long sequences
among many short ones keep the whole GPU busy. The kernel reads lengths, slots and query counts on the device: there is
no table and no plan on the host, and one captured graph serves all lengths. It loads nothing past a length and nothing
of a lane of length 0; tests/attention shows this on a GPU over unmapped pages. How a sequence is split depends on the
other sequences' lengths, and so do the last bits of its output; equal lengths give equal bits.

On compute capability 9 the kernel loads whole tiles by TMA, and a layer's launch overlaps the end of the kernel before
it (programmatic dependent launch, PDL). Other GPUs use ordinary loads and launches. On the host the torch backend takes
the kernel's place. Prompts and mixed passes go through the kernel of prompts.py.
"""

from __future__ import annotations

import importlib.util
from typing import Any, ClassVar

import torch

from trtllm_vattn.attention.base import MOST_QUERIES
from trtllm_vattn.attention.prompts import FlatPromptsAttention, PromptKernel
from trtllm_vattn.attention.shares_launch import (
    MANY_LANES,
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

HEAD_SIZES = (64, 96, 128, 192, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_CAPABILITY = (8, 0)


def availability() -> str:
    """``yes`` if the kernel runs on this machine, else the reason."""
    if not torch.cuda.is_available():
        return "no GPU; over a cache on the host a reference in torch takes its place"
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return f"the kernel needs compute capability {LEAST_CAPABILITY}, this GPU is older"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it comes with torch for CUDA"
    return "yes"


class SharesAttention(FlatPromptsAttention):
    """Decode by equal shares over flat KV; all launches must be on one stream.

    With `plain`, many lanes too get large tiles, by ordinary loads and launches: on an H200 this is up to 3 % faster
    for 256 sequences of very unequal lengths, and slower for others. `prompts` is shared with another backend.

    Give all layers of a step the same tensors of lengths and slots: only then do launches overlap by PDL.

    Raises
    ------
    ConfigError
        The cache keeps blocks, its head size or dtype is not the kernel's, or the kernel does not run on this machine.
    """

    name: ClassVar[str] = "shares"
    most_queries = MOST_QUERIES

    def __init__(
        self,
        cache: KVCache,
        num_heads: int,
        scale: float | None = None,
        prompts: PromptKernel | None = None,
        *,
        plain: bool = False,
    ) -> None:
        self._check(cache)
        super().__init__(cache, num_heads, scale, prompts)
        self._plain = plain
        self._group = num_heads // cache.shape.num_kv_heads
        self._launched_with: tuple[torch.Tensor | None, ...] = ()
        if not self._on_gpu:
            return
        first = cache.layer(0)
        assert isinstance(first, FlatKV)
        shape = cache.shape
        self._card = torch.cuda.get_device_properties(cache.device)
        most = Rows.of(self._group, MOST_QUERIES, shape.head_dim)
        programs = self._card.multi_processor_count * most_programs(shape.head_dim)
        self._workspace = Workspace(cache.device, programs, shape.num_slots, shape.num_kv_heads, most, shape.head_dim)
        self._fitting: dict[tuple[object, ...], int] = {}
        """Programs per multiprocessor, by what the kernel is compiled for; known after its first launch."""
        self._features = Features(False, False) if plain else Features.of(cache.device, first)
        self._maps: dict[tuple[int, int], list[Any]] = {}

    @staticmethod
    def _check(cache: KVCache) -> None:
        """Raise ConfigError if the kernels do not run over the cache on this machine."""
        shape = cache.shape
        if cache.device.type != "cuda":
            return
        if availability() != "yes":
            raise ConfigError(f"the shares backend does not work here: {availability()}")
        if shape.head_dim not in HEAD_SIZES or shape.dtype not in DTYPES:
            raise ConfigError(
                f"the shares backend takes heads of {', '.join(map(str, HEAD_SIZES))} and bfloat16, float16 or "
                f"float32, not {shape.head_dim} of {shape.dtype}; use the torch backend"
            )

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

        Raises ConfigError for too many queries or lanes, and for queries of another dtype than the cache's.
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
            return self._reference.decode_queries(layer, q, query_lens, lengths, slots, out)
        kv = self.cache.layer(layer)
        assert isinstance(kv, FlatKV)
        q = q.contiguous()
        out = torch.empty_like(q) if out is None else out
        settings, multiprocessors = self._settings(lanes, queries), self._card.multi_processor_count
        dependent = self._features.pdl and self._follows(lengths, query_lens, slots)
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
            min(lanes, MANY_LANES) if self._plain else lanes,
            lanes * shape.num_kv_heads <= self._card.multi_processor_count,
        )

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
