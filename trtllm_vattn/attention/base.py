"""The contract of an attention backend: store a step's K and V in a cache, and attend over the cache.

Lengths and slots are tensors on the device. No call waits for the device or depends on the values of a device tensor,
so every call may be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch.nn import functional

from trtllm_vattn.attention.options import FP8, PLAIN, PREFIXES, Feature, LayerOptions, PrefixTables
from trtllm_vattn.attention.query_log import QueryLog
from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.vmm.regions import STATIC, Region, tensor_regions

MIN_CHUNK_ROWS = 16
"""The fewest rows that `Attention.prefill` is given; shorter chunks are padded."""
MOST_QUERIES = 8
"""Queries of a lane in `Attention.decode_queries`: a token and the draft tokens to verify with it."""

T = TypeVar("T")


class Span(NamedTuple):
    """Tokens `start` to `end` (exclusive) of the sequence in `slot`."""

    slot: int
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class PrefillChunk:
    """One chunk of a prompt.

    Attributes
    ----------
    rows : int
        Rows of the pass that belong to the chunk, padding included.
    slot : Tensor
        int64 ``[1]`` on the device.
    query_len : Tensor
        int32 ``[1]`` on the device: the chunk's tokens.
    length : Tensor
        int32 ``[1]`` on the device: the sequence's length after the chunk.
    max_length : int
        An upper bound of `length`.
    """

    rows: int
    slot: torch.Tensor
    query_len: torch.Tensor
    length: torch.Tensor
    max_length: int


@dataclass(frozen=True, eq=False)
class PackedPrefill:
    """Chunks of different prompts, packed one after another in the rows of a pass.

    Attributes
    ----------
    chunks : sequence of PrefillChunk
        None where the pass is captured for any chunks (`Attention.captures_prompts`).
    spans : sequence of Span
        The same chunks as the host knows them; a captured pass has none.
    descriptors : Tensor or None
        int32 ``[chunks, 4]`` on the device: each chunk's first row in the pass, its rows, the sequence's length after
        it, and its slot; rows is 0 where there is no chunk.
    """

    chunks: Sequence[PrefillChunk]
    spans: Sequence[Span] = ()
    descriptors: torch.Tensor | None = None


class Attention(ABC):
    """Attention over one cache.

    A step calls `begin_step` once, then for each layer `write` or `rotate_and_write`, and `decode`, `prefill`,
    `prefill_packed` or `attend_mixed`. Layers may come in any order.

    Parameters
    ----------
    cache : KVCache
        The cache to read and write; the backend must support its layout.
    num_heads : int
        Query heads; a multiple of the cache's KV heads.
    scale : float or None
        Softmax scale; None is ``head_dim ** -0.5``.
    """

    name: ClassVar[str]
    batch_invariant: bool = False
    """Whether a lane's output of a step of so many lanes has the same bits whatever the other lanes are."""
    over_read: ClassVar[int] = 0
    """Tokens past a sequence's length that a kernel may load; the guard requires that they are mapped."""
    captures_prompts: ClassVar[bool] = False
    """Whether `attend_mixed` reads all about the chunks from `PackedPrefill.descriptors` on the device, so that one
    captured pass serves any chunks."""
    keeps_windows: ClassVar[bool] = False
    """Whether it serves caches that keep a window of some layers' tokens (`CacheShape.windows`)."""
    most_chunks: int | None = None
    """Most chunks of a pass that is captured for any chunks; None is no limit."""
    most_queries: int = 1
    """Queries of a lane that `decode_queries` takes; 1 where there is `decode` alone."""
    features: ClassVar[frozenset[Feature]] = frozenset()
    """What the backend can do beyond causal attention to all tokens of a sequence's own slot, in rows of the cache's
    dtype, all of one length."""

    def __init__(self, cache: KVCache, num_heads: int, scale: float | None = None) -> None:
        self.cache, self.num_heads = cache, num_heads
        self.scale = cache.shape.head_dim**-0.5 if scale is None else scale
        if not 0 < self.scale < math.inf:
            raise ConfigError(f"a softmax scale of {scale}; give a positive number, or None for head_dim ** -0.5")
        self._of_step: dict[tuple[int, ...], tuple[tuple[object, ...], Any]] = {}
        self.options: tuple[LayerOptions, ...] = (PLAIN,) * cache.shape.num_layers
        """How each layer attends."""
        if cache.shape.windows and not self.keeps_windows:
            raise ConfigError(
                f"the {self.name} backend alone cannot serve a cache that keeps windows; use select.make_attention"
            )
        self.prefixes: PrefixTables | None = None
        """Where first tokens lie that are not in their sequence's own slot; None where all are."""
        self.query_log: QueryLog | None = None
        """Where the queries of every pass are put; None where nobody asks for them."""
        self._with_prefixes = False
        """Whether the kernel of decode in use honours them."""
        self._require(self._needed_by_cache())

    def _needed_by_cache(self) -> set[Feature]:
        needed = {Feature.FP8} if self.cache.shape.dtype == FP8 else set()
        return needed | ({Feature.LENGTHS} if self.cache.length_deficits is not None else set())

    def _require(self, needed: set[Feature]) -> None:
        if missing := sorted(feature.value for feature in needed - self.features):
            raise ConfigError(
                f"the {self.name} backend cannot serve {', '.join(missing)}; use the shares backend over a flat cache, "
                "or the torch backend"
            )

    def set_options(self, options: Sequence[LayerOptions]) -> None:
        """Say how each layer attends; once, before the first step. Raises ConfigError for what the backend cannot do
        and for options that make no sense."""
        shape = self.cache.shape
        if len(options) != shape.num_layers:
            raise ConfigError(f"{len(options)} options for {shape.num_layers} layers; give one a layer")
        for layer, each in enumerate(options):
            each.check(shape, self.num_heads, layer)
        self._require({feature for each in options for feature in each.features()})
        self.options = tuple(options)

    def set_prefixes(self, tables: PrefixTables) -> None:
        """Have first tokens be read where these tables say; once, before the first step. `variants` has kernels of
        decode then that honour them, named with `PREFIXES` at the end; prompts do anyway. Raises ConfigError where the
        backend cannot."""
        self._require({Feature.PREFIXES})
        self.prefixes = tables

    def begin_step(self) -> None:
        """Say that the calls which follow belong to a new step; call it before the first layer of every step.

        Until the next call, a backend reuses what it computed from the same tensors for another layer.
        """
        self._of_step.clear()

    def begin_prompts(self, packed: PackedPrefill) -> None:  # noqa: B027
        """Say, behind `begin_step`, which chunks of prompts the step has; only before a step with any. For backends
        that have to know before the first `write`."""

    def _once_a_step(self, make: Callable[[], T], *inputs: object) -> T:
        """The result of `make`, which is called once a step for the same `inputs` (the same objects)."""
        key = tuple(map(id, inputs))
        if key not in self._of_step:
            # The inputs are kept too: an id is an object's own only as long as the object lives.
            self._of_step[key] = (inputs, make())
        made: T = self._of_step[key][1]
        return made

    @property
    def variants(self) -> tuple[str, ...]:
        """Kernels of `decode`, of which `pick` names one; a step is captured once for each. With `set_prefixes` there
        are some that honour its tables."""
        return (self.name,) if self.prefixes is None else (self.name, self.name + PREFIXES)

    def measure(self, lanes: Sequence[int], anywhere: bool = False) -> None:  # noqa: B027
        """Find out what `pick` needs to know for batches of so many lanes; measured once on a machine and stored.

        `anywhere` says that lane i need not be slot i. Called outside of a capture.
        """

    def token_us(self, lanes: int, anywhere: bool = False) -> float | None:
        """Microseconds in which a layer reads one token of a batch of so many lanes by the kernel that honours
        prefixes, as `measure` found it; None where it is not known."""
        return None

    def pick(self, lengths: np.ndarray, anywhere: bool = False, prefixes: bool = False) -> str:
        """The fastest of `variants` for lengths int ``[lanes]``, 0 for idle lanes; the host alone is asked.

        `prefixes` says that some lane's first tokens lie in another slot, or are shared: only a kernel that honours the
        tables (`set_prefixes`) will do.
        """
        return next(name for name in self.variants if not prefixes or name.endswith(PREFIXES))

    def use(self, variant: str) -> None:
        """Decode by this one of `variants` from now on. Raises ConfigError if it is not among them."""
        if variant not in self.variants:
            raise ConfigError(f"no kernel {variant!r} to pick from; there are {', '.join(self.variants)}")
        self._with_prefixes = variant.endswith(PREFIXES)

    def describe(self) -> str:
        """The kernels of decode and of prompts, for people."""
        return self.name

    def storages(self) -> list[torch.Tensor]:
        """Tensors of the backend itself (index ranges, workspaces) and its options that a captured step may touch."""
        given = [value for each in self.options for value in vars(each).values() if isinstance(value, torch.Tensor)]
        tables = [] if self.prefixes is None else self.prefixes.storages()
        if self.query_log is not None:
            tables.append(self.query_log.rows)
        return [*(value for value in vars(self).values() if isinstance(value, torch.Tensor)), *given, *tables]

    def regions(self) -> list[Region]:
        """Where the addresses lie that a captured step may touch: the cache's regions and the backend's tensors."""
        return [*self.cache.regions(), *tensor_regions(STATIC, self.storages())]

    @abstractmethod
    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """Store K and V of some tokens.

        k, v ``[tokens, num_kv_heads, head_dim]``; slots, positions int64 ``[tokens]`` on the device. Padding tokens go
        to position 0 of the dummy slot.
        """

    def rotate_and_write(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Apply rotary position embeddings to q and k, and `write` k and v; returns the rotated q.

        q ``[tokens, num_heads, head_dim]`` to the same shape, contiguous; cos, sin ``[tokens, head_dim]``.
        """
        self.write(layer, rotated(k, cos, sin), v, slots, positions)
        return rotated(q, cos, sin)

    @abstractmethod
    def decode(
        self,
        layer: int,
        q: torch.Tensor,
        lengths: torch.Tensor,
        slots: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one query token per lane: q ``[lanes, num_heads, head_dim]`` to the same shape.

        lengths int32 ``[lanes]`` on the device, this step's token included. A lane of length 0 reads nothing; its
        output is finite and means nothing. Lane i reads slot i, or with `slots` (int64 or int32 ``[lanes]`` on the
        device) ``slots[i]``. The result is written to `out` if given.
        """

    def decode_queries(
        self,
        layer: int,
        q: torch.Tensor,
        query_lens: torch.Tensor | None,
        lengths: torch.Tensor,
        slots: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Up to `most_queries` query tokens per lane: q ``[lanes, queries, num_heads, head_dim]`` to the same shape.

        Lane i has ``query_lens[i]`` queries (int32 ``[lanes]`` on the device; None: all). The last one is at position
        ``lengths[i] - 1``, and each attends to the tokens up to its own. Other rows of the output are finite and mean
        nothing. The other parameters are those of `decode`. Raises ConfigError where the backend has `decode` alone.
        """
        raise ConfigError(
            f"the {self.name} backend decodes one query a lane; use the shares backend over flat KV, or the torch "
            "backend"
        )

    def decode_mixed(
        self, layer: int, q: torch.Tensor, lengths: torch.Tensor, slots: torch.Tensor, out: torch.Tensor
    ) -> None:
        """`decode` of rows that are not the lanes of the decode step, those of a mixed pass: first tokens are read
        where `prefixes` say, and nothing for several lanes at once."""
        out.copy_(self.decode(layer, q, lengths, slots))

    @abstractmethod
    def prefill(self, layer: int, q: torch.Tensor, chunk: PrefillChunk) -> torch.Tensor:
        """Causal attention of a chunk's queries: q ``[rows, num_heads, head_dim]`` to the same shape.

        `rows` is `chunk.rows` or more, at least `MIN_CHUNK_ROWS`. Query i of the first `query_len` is at position
        ``length - query_len + i``; the other rows of the result are finite and mean nothing.
        """

    def prefill_packed(self, layer: int, q: torch.Tensor, packed: PackedPrefill) -> torch.Tensor:
        """`prefill` of several chunks: q ``[rows, num_heads, head_dim]`` to the same shape; rows behind the last chunk
        are finite and mean nothing. This default calls `prefill` for each chunk."""
        out = torch.zeros_like(q)
        row = 0
        for chunk in packed.chunks:
            own = q[row : row + chunk.rows]
            padded = functional.pad(own, (0, 0, 0, 0, 0, max(0, MIN_CHUNK_ROWS - chunk.rows)))
            out[row : row + chunk.rows] = self.prefill(layer, padded, chunk)[: chunk.rows]
            row += chunk.rows
        return out

    def attend_mixed(
        self,
        layer: int,
        q: torch.Tensor,
        decode_lengths: torch.Tensor,
        decode_slots: torch.Tensor,
        packed: PackedPrefill,
    ) -> torch.Tensor:
        """Attention of a mixed pass: q ``[rows, num_heads, head_dim]`` to the same shape.

        The first rows are one token each of decoding sequences: row i attends to ``decode_lengths[i]`` tokens (int32
        ``[lanes]``, its own included) of ``decode_slots[i]`` (int64 ``[lanes]``). A row of length 0 is no such token.
        The prompts' chunks lie where `packed.descriptors` say. Other rows are finite and mean nothing.

        This default calls `decode_mixed` and `prefill_packed`, or `prefill` for one chunk; it needs `packed.chunks`, of
        which the first begins at row `lanes`. A backend with `captures_prompts` reads the descriptors alone; there
        chunks may begin at any row behind the last token of a decoding sequence.
        """
        lanes = len(decode_lengths)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if lanes:
            self.decode_mixed(layer, q[:lanes], decode_lengths, decode_slots, out[:lanes])
        prompts = q[lanes:]
        if len(packed.chunks) > 1:
            out[lanes:] = self.prefill_packed(layer, prompts, packed)
        else:
            out[lanes:] = self.prefill(layer, prompts, packed.chunks[0])
        return out


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary position embeddings (RoFormer, arXiv 2104.09864, in the layout of GPT-NeoX).

    x ``[tokens, heads, head_dim]`` to the same shape; cos, sin ``[tokens, head_dim]``.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
