"""The shares backend: kernels of this project for flat KV, for decode with uneven lengths and for prompts.

One Triton kernel (shares_kernel.py) gives every program an equal share of all tokens, so that a few long sequences
among many short ones keep the whole GPU busy. The kernel reads lengths, slots and query counts on the device: there is
no table and no plan on the host, and one captured graph serves all lengths. It loads nothing past a length and nothing
of a lane of length 0; tests/attention shows this on a GPU over unmapped pages. How a sequence is split depends on the
other sequences' lengths, and so do the last bits of its output; equal lengths give equal bits.

On compute capability 9 the kernel loads whole tiles by TMA, and a layer's launch overlaps the end of the kernel before
it (programmatic dependent launch, PDL). Other GPUs use ordinary loads and launches. On the host the torch backend takes
the kernel's place. Prompts and mixed passes go through the kernel of prompts.py.

Decode serves everything that options.py names: windows, first tokens and sink logits, soft caps, rows of eight bits,
first tokens in another slot, lengths a range group. Lanes that share their first tokens (`PrefixTables.groups`) read
them once, by the kernel of prefix_kernel.py before this one, in layers without a window; there the lanes' own rests and
what they share are added up in another order, which may change the last bits of the output. A step in which no lane's
first tokens lie elsewhere or are shared runs the kernel that knows nothing of it.

`FixedSharesAttention` cuts every sequence at the same numbers of tokens instead, whatever the other lanes are: a lane's
bits depend on nothing else. Deterministic engines decode by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from trtllm_vattn.attention.base import MOST_QUERIES
from trtllm_vattn.attention.options import FP8, PREFIXES, Feature, LayerOptions, PrefixTables
from trtllm_vattn.attention.prompts import DevicePlanned, FlatPromptsAttention, head_tables
from trtllm_vattn.attention.shares_launch import (
    MANY_LANES,
    Extras,
    Features,
    Pieces,
    Rows,
    Settings,
    SharedReads,
    Workspace,
    availability,
    launch,
    launch_prefixes,
    most_programs,
    programs_at_once,
    settings_for,
    tensor_maps,
)
from trtllm_vattn.cache.base import FlatKV, KVCache
from trtllm_vattn.errors import ConfigError

HEAD_SIZES = (64, 96, 128, 192, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_CAPABILITY_FP8 = (8, 9)
"""Older GPUs have no instruction that converts e4m3."""


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
    fixed_shares: ClassVar[bool] = False
    """Whether sequences are cut by `Pieces`."""
    most_queries = MOST_QUERIES
    # Each by its name: what a kernel does not compute must not be among them.
    features: ClassVar[frozenset[Feature]] = frozenset(
        {
            Feature.WINDOW,
            Feature.FIRST_TOKENS,
            Feature.SINK_LOGITS,
            Feature.SOFTCAP,
            Feature.FP8,
            Feature.PREFIXES,
            Feature.LENGTHS,
        }
    )

    def __init__(
        self,
        cache: KVCache,
        num_heads: int,
        scale: float | None = None,
        prompts: DevicePlanned | None = None,
        *,
        plain: bool = False,
    ) -> None:
        self._check(cache)
        super().__init__(cache, num_heads, scale, prompts, fixed=self.fixed_shares)
        self._plain = plain
        self._group = num_heads // cache.shape.num_kv_heads
        self._launched_with: tuple[torch.Tensor | None, ...] = ()
        if not self._on_gpu:
            return
        first = cache.head_groups(0)[0]
        assert isinstance(first, FlatKV)
        shape = cache.shape
        self._card = torch.cuda.get_device_properties(cache.device)
        most = Rows.of(self._group, self.most_queries, shape.head_dim)
        self._most_programs = self._card.multi_processor_count * most_programs(shape.head_dim)
        heads, dim = shape.num_kv_heads, shape.head_dim
        longest = first.k.shape[1]
        self._pieces = Pieces.of(longest, shape.num_slots, heads, most, dim) if self.fixed_shares else None
        self._workspace = Workspace(cache.device, self._most_programs, shape.num_slots, heads, most, dim, self._pieces)
        self._fitting: dict[tuple[object, ...], int] = {}
        """Programs per multiprocessor, by what the kernel is compiled for; known after its first launch."""
        self._heads = head_tables(cache)
        features = Features(False, False) if plain else Features.of(cache.device, first)
        self._features = features if self._heads is None else Features(False, features.pdl)
        self._maps: dict[tuple[int, int], list[Any]] = {}
        self._reads: dict[int, SharedReads] = {}
        """Memory for what groups of lanes read together, by queries a lane."""

    @staticmethod
    def _check(cache: KVCache) -> None:
        """Raise ConfigError if the kernels do not run over the cache on this machine."""
        shape = cache.shape
        if cache.device.type != "cuda":
            return
        if availability() != "yes":
            raise ConfigError(f"the shares backend does not work here: {availability()}")
        if shape.head_dim not in HEAD_SIZES or shape.dtype not in (*DTYPES, FP8):
            raise ConfigError(
                f"the shares backend takes heads of {', '.join(map(str, HEAD_SIZES))} and bfloat16, float16, float32 "
                f"or float8_e4m3fn, not {shape.head_dim} of {shape.dtype}; use the torch backend"
            )
        capability = torch.cuda.get_device_capability(cache.device)
        if shape.dtype == FP8 and capability < LEAST_CAPABILITY_FP8:
            raise ConfigError(
                f"rows of float8_e4m3fn need compute capability {LEAST_CAPABILITY_FP8}, this GPU has {capability}; use "
                "a cache of bfloat16"
            )

    def set_options(self, options: Sequence[LayerOptions]) -> None:
        """As the base class. Raises ConfigError for windows over a cache whose ranges have lengths of their own, too:
        what such a range keeps has no positions, by which a window is measured."""
        super().set_options(options)
        if self.cache.length_deficits is not None and any(each.window is not None for each in options):
            raise ConfigError("windows are served over a cache of one length, not with own_lengths; leave one of them")

    def set_prefixes(self, tables: PrefixTables) -> None:
        """As the base class. Raises ConfigError over a cache whose ranges have lengths of their own, too."""
        if self.cache.length_deficits is not None:
            raise ConfigError("prefixes in other slots are served over a cache of one length, not with own_lengths")
        super().set_prefixes(tables)
        if self._on_gpu:
            self._shared_reads(1)

    def _shared_reads(self, queries: int) -> SharedReads:
        reads = self._reads.get(queries)
        if reads is None:
            assert self.prefixes is not None
            shape, lanes = self.cache.shape, len(self.prefixes.members)
            reads = self._reads[queries] = SharedReads(
                self.cache.device,
                self._most_programs,
                lanes,
                queries,
                self.num_heads,
                shape.num_kv_heads,
                shape.head_dim,
            )
        return reads

    def use(self, variant: str) -> None:
        super().use(variant)
        self._reference.use(self._reference.name + (PREFIXES if self._with_prefixes else ""))

    def begin_step(self) -> None:
        super().begin_step()
        self._launched_with = ()

    def storages(self) -> list[torch.Tensor]:
        if not self._on_gpu:
            return super().storages()
        given = [*(self._heads or ()), *self._reads.values()]
        return [*super().storages(), *self._workspace.storages(), *(x for each in given for x in each.storages())]

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

        Raises ConfigError for too many queries or lanes, and for queries of another dtype than the cache's; over rows
        of eight bits they are of 16 or 32.
        """
        return self._decode(layer, q, query_lens, lengths, slots, out, shared=self._with_prefixes)

    def decode_mixed(
        self, layer: int, q: torch.Tensor, lengths: torch.Tensor, slots: torch.Tensor, out: torch.Tensor
    ) -> None:
        if self._on_gpu:
            self._decode(layer, q[:, None], None, lengths, slots, out[:, None], shared=False)
        else:
            super().decode_mixed(layer, q, lengths, slots, out)

    def _decode(
        self,
        layer: int,
        q: torch.Tensor,
        query_lens: torch.Tensor | None,
        lengths: torch.Tensor,
        slots: torch.Tensor | None,
        out: torch.Tensor | None,
        *,
        shared: bool,
    ) -> torch.Tensor:
        """`decode_queries`; `shared` says whether groups of lanes read what they share together."""
        lanes, queries = q.shape[:2]
        self._check_queries(q)
        if not self._on_gpu:
            return self._reference.decode_queries(layer, q, query_lens, lengths, slots, out)
        kv, options = self.cache.head_groups(layer)[0], self.options[layer]
        assert isinstance(kv, FlatKV)
        q = q.contiguous()
        out = torch.empty_like(q) if out is None else out
        settings = self._settings(lanes, queries)
        dependent = self._features.pdl and self._follows(lengths, query_lens, slots)
        features = Features(self._features.tma, dependent)
        # A mixed pass may hold any sequence; a step of the kernel without prefixes holds none that has one.
        tables = self.prefixes if self._with_prefixes or not shared else None
        reads = None
        if tables is not None and shared and options.window is None:
            reads = self._read_shared(layer, kv, q, tables, features)
        beyond = options.sink_logits is None, options.softcap is None
        used = options.window, options.first_tokens, *beyond, tables is None, reads is None
        kind = (settings, queries, lanes, query_lens is None, slots is None, dependent, *used)
        kernel = launch(
            q,
            kv,
            out,
            lengths,
            query_lens,
            slots,
            scale=self.scale,
            workspace=self._workspace,
            programs=self._programs(kind),
            settings=settings,
            features=features,
            tiles=self._tiles(layer, kv, settings.tile) if self._features.tma else None,
            extras=Extras(options, tables, reads, None if self._heads is None else self._heads[layer]),
            pieces=self._pieces,
        )
        self._learn_programs(kind, kernel)
        return out

    def _check_queries(self, q: torch.Tensor) -> None:
        """Raise ConfigError for queries that the kernel does not take."""
        lanes, queries = q.shape[:2]
        dtype = self.cache.shape.dtype
        if q.dtype != dtype and not (dtype == FP8 and q.dtype in DTYPES):
            raise ConfigError(f"queries are {q.dtype}, the cache is {dtype}; convert the queries")
        if not 1 <= queries <= self.most_queries or lanes > self.cache.shape.num_slots:
            raise ConfigError(
                f"{lanes} lanes of {queries} queries; there may be {self.cache.shape.num_slots} lanes, the cache's "
                f"slots, of 1 to {self.most_queries} queries: give longer rows of queries to prefill"
            )

    def _read_shared(
        self, layer: int, kv: FlatKV, q: torch.Tensor, tables: PrefixTables, features: Features
    ) -> SharedReads:
        """Attend to what groups of lanes share, for the launch that follows."""
        shape = self.cache.shape
        reads = self._shared_reads(q.shape[1])
        settings = settings_for(
            self._card.shared_memory_per_multiprocessor, shape.head_dim, shape.dtype.itemsize, reads.rows, 1, False
        )
        kind = ("shared", settings, q.shape[1], features.pdl, self.options[layer].softcap is None)
        kernel = launch_prefixes(
            q,
            kv,
            tables,
            reads,
            scale=self.scale,
            options=self.options[layer],
            programs=self._programs(kind),
            settings=settings,
            features=features,
            tiles=self._tiles(layer, kv, settings.tile) if features.tma else None,
        )
        self._learn_programs(kind, kernel)
        return reads

    def _programs(self, kind: tuple[object, ...]) -> int:
        """Programs of a launch of what was compiled for `kind`."""
        multiprocessors: int = self._card.multi_processor_count
        return multiprocessors * self._fitting.get(kind, 2)

    def _learn_programs(self, kind: tuple[object, ...], kernel: Any) -> None:
        if kind not in self._fitting:
            fitting = programs_at_once(kernel, self._card.shared_memory_per_multiprocessor)
            self._fitting[kind] = min(fitting, most_programs(self.cache.shape.head_dim))

    def _settings(self, lanes: int, queries: int) -> Settings:
        shape = self.cache.shape
        if self.fixed_shares:
            # The size of a tile changes bits, too.
            lanes = shape.num_slots
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


class FixedSharesAttention(SharesAttention):
    """Decode whose bits of a lane depend on its own length, query, keys and values alone, in any lane of any batch.

    Every sequence is cut into pieces of the same number of tokens (`Pieces`, by the cache's shape), each of which one
    program attends to, and a lane's pieces are combined from the first to the last. Partial results take 256 MiB or
    less: that of each lane, query head and piece one row of float32. One query a lane; prompts as in
    `FlatPromptsAttention` with `fixed`. It takes no windows, sinks, soft caps, rows of eight bits and prefixes in other
    slots.
    """

    name: ClassVar[str] = "fixed-shares"
    fixed_shares: ClassVar[bool] = True
    batch_invariant = True
    most_queries = 1
    features: ClassVar[frozenset[Feature]] = frozenset()
