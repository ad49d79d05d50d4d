"""Prompts straight over flat KV: the Triton kernel of prompt_kernel.py on a GPU, the torch backend on the host.

All chunks of a pass are attended to in one launch, which reads them on the device: a captured pass serves any chunks.
Nothing past a sequence's length is loaded; tests/attention shows this on a GPU over unmapped pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from trtllm_vattn.attention.base import PackedPrefill, PrefillChunk, Span
from trtllm_vattn.attention.gather import GatheringAttention
from trtllm_vattn.attention.options import PLAIN, LayerOptions, PrefixTables
from trtllm_vattn.attention.prompt_launch import (
    MOST_BLOCK_M,
    PromptPlan,
    PromptSettings,
    PromptWorkspace,
    attend,
    plan,
    prompt_settings,
)
from trtllm_vattn.attention.reference import TorchAttention
from trtllm_vattn.attention.shares_launch import HOPPER, Extras, Features, HeadTables, programs_at_once, tensor_maps
from trtllm_vattn.cache.base import FlatKV, KVCache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.values import typed
from trtllm_vattn.vmm.tensors import upload


class PromptKernel:
    """Causal attention of chunks over the flat KV of one cache on a GPU; all launches must be on one stream.

    Into how many pieces keys are divided depends on the programs that run at once, which the first launch by some
    settings finds out. With `fixed` they are as many as the settings say, so that the bits of a pass depend on its
    chunks alone, and those of a pass of one chunk on its rows and its length.
    """

    name: ClassVar[str] = "triton"

    def __init__(self, cache: KVCache, num_heads: int, scale: float, fixed: bool = False) -> None:
        first = cache.head_groups(0)[0]
        assert isinstance(first, FlatKV)
        self.cache, self.num_heads, self.scale = cache, num_heads, scale
        self.fixed = fixed
        self.heads = head_tables(cache)
        self._card = torch.cuda.get_device_properties(cache.device)
        self._hopper = torch.cuda.get_device_capability(cache.device)[0] == HOPPER
        self._tma = self.heads is None and Features.of(cache.device, first).tma
        self._workspace = PromptWorkspace(cache.device, self._card.multi_processor_count, cache.shape.head_dim)
        self._resident: dict[PromptSettings, int] = {}
        """Programs of a multiprocessor, by settings; known after the first launch."""
        self._maps: dict[tuple[int, int], list[Any]] = {}

    def storages(self) -> list[torch.Tensor]:
        """Tensors that a captured step may touch."""
        heads = [tensor for tables in self.heads or () for tensor in tables.storages()]
        return [*self._workspace.storages(), *heads]

    def plan(self, descriptors: torch.Tensor, rows: int, keep: int, options: LayerOptions = PLAIN) -> PromptPlan:
        """What `attend` needs for a step of `rows` rows with these chunks, int32 ``[chunks, 4]``
        (`PackedPrefill.descriptors`), in layers with the window of `options`. Rows of no chunk stay as they are before
        `keep` and before the last chunk's end, and get zeros behind them."""
        shape, card = self.cache.shape, self._card
        multiprocessors: int = card.multi_processor_count
        tiles = -(-rows * self.num_heads // MOST_BLOCK_M)
        shared = card.shared_memory_per_multiprocessor
        settings = prompt_settings(shape.head_dim, shape.dtype.itemsize, shared, tiles, multiprocessors, self._hopper)
        programs = multiprocessors * self._resident.get(settings, settings.resident)
        most_parts = self._workspace.most_parts
        heads, kv_heads = self.num_heads, shape.num_kv_heads
        return plan(descriptors, rows, keep, heads, kv_heads, settings, programs, most_parts, options)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        out: torch.Tensor,
        planned: PromptPlan,
        options: LayerOptions = PLAIN,
        prefixes: PrefixTables | None = None,
    ) -> None:
        """Attend with the rows of the chunks in q ``[rows, num_heads, head_dim]``, contiguous; the result goes to the
        same rows of `out`, of the same shape. The plan is for this layer's window."""
        kv = self.cache.head_groups(layer)[0]
        assert isinstance(kv, FlatKV)
        maps = self._maps_of(layer, kv, planned.settings.block_n) if self._tma else None
        extras = Extras(options, prefixes, heads=None if self.heads is None else self.heads[layer])
        kernel = attend(q, kv, out, planned, self._workspace, self.scale, maps, extras)
        if planned.settings not in self._resident and not self.fixed:
            fitting = programs_at_once(kernel, self._card.shared_memory_per_multiprocessor)
            self._resident[planned.settings] = min(fitting, planned.settings.resident)

    def _maps_of(self, layer: int, kv: FlatKV, block: int) -> list[Any]:
        maps = self._maps.get((layer, block))
        if maps is None:
            maps = self._maps[layer, block] = tensor_maps(kv, block)
        return maps


def head_tables(cache: KVCache) -> list[HeadTables] | None:
    """Where K and V of each layer's heads are, for a cache whose ranges have lengths of their own; else None."""
    deficits = cache.length_deficits
    if deficits is None:
        return None
    tables = []
    for layer in range(cache.shape.num_layers):
        parts = [kv for kv in cache.head_groups(layer) if isinstance(kv, FlatKV)]
        groups = [cache.group_of(layer, part) for part in range(len(parts))]
        tables.append(HeadTables.of(parts, groups, deficits))
    return tables


class DevicePlanned(Protocol):
    """A kernel for chunks that it reads on the device, `PromptKernel` or one of another kind of rows."""

    name: ClassVar[str]

    def storages(self) -> list[torch.Tensor]:
        """Tensors that a captured step may touch."""

    def plan(self, descriptors: torch.Tensor, rows: int, keep: int, options: LayerOptions = PLAIN) -> Any:
        """As `PromptKernel.plan`."""

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        out: torch.Tensor,
        planned: Any,
        options: LayerOptions = PLAIN,
        prefixes: PrefixTables | None = None,
    ) -> None:
        """As `PromptKernel.attend`."""


class HostPlanned(Protocol):
    """Another library's kernel for chunks that the host knows, which plans every pass on the host."""

    name: ClassVar[str]

    def plan(self, spans: Sequence[Span]) -> Any:
        """What `attend` needs for a pass over these chunks, whose rows follow one another."""

    def attend(self, layer: int, q: torch.Tensor, out: torch.Tensor, planned: Any) -> None:
        """q ``[rows of all chunks, num_heads, head_dim]`` to `out`, of the same shape, contiguous."""


class FlatPromptsAttention(GatheringAttention):
    """Base of backends over flat KV whose prompts, and mixed passes, go through a kernel that reads chunks on the
    device; on the host the torch backend takes all kernels' place. Decode is `decode_queries` of one query.

    Parameters
    ----------
    prompts : DevicePlanned or None
        The kernel, which another backend over the same cache may share; None makes a `PromptKernel`, on a GPU.
    fixed : bool
        How that one is made.

    Raises
    ------
    ConfigError
        The cache keeps blocks.
    """

    captures_prompts: ClassVar[bool] = True

    def __init__(
        self,
        cache: KVCache,
        num_heads: int,
        scale: float | None = None,
        prompts: DevicePlanned | None = None,
        *,
        fixed: bool = False,
    ) -> None:
        super().__init__(cache, num_heads, scale)
        if not isinstance(cache.head_groups(0)[0], FlatKV):
            raise ConfigError(
                f"the {self.name} backend reads flat K and V, not the blocks of {typed(cache)}; use the "
                "vattn cache, or the cudnn or xqa backend"
            )
        self._on_gpu = cache.device.type == "cuda"
        self.prompts = prompts
        if prompts is None and self._on_gpu:
            self.prompts = PromptKernel(cache, num_heads, self.scale, fixed)
        self.host_planned: HostPlanned | None = None
        """If set, it attends in passes whose chunks the host knows."""
        self._windows: dict[tuple[int | None, int], LayerOptions] = {}
        """The first layer's options with each window: layers of one window have one plan a step."""
        self._reference = TorchAttention(cache, num_heads, scale)
        """On the host it takes the kernels' place."""

    def begin_step(self) -> None:
        super().begin_step()
        self._reference.begin_step()

    def set_options(self, options: Sequence[LayerOptions]) -> None:
        super().set_options(options)
        self._reference.set_options(options)

    def set_prefixes(self, tables: PrefixTables) -> None:
        super().set_prefixes(tables)
        self._reference.set_prefixes(tables)

    def storages(self) -> list[torch.Tensor]:
        own = self.prompts.storages() if self.prompts is not None else []
        return [*super().storages(), *self._reference.storages(), *own]

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

    def decode_mixed(
        self, layer: int, q: torch.Tensor, lengths: torch.Tensor, slots: torch.Tensor, out: torch.Tensor
    ) -> None:
        if self._on_gpu:
            self.decode(layer, q, lengths, slots, out)
        else:
            self._reference.decode_mixed(layer, q, lengths, slots, out)

    def prefill(self, layer: int, q: torch.Tensor, chunk: PrefillChunk) -> torch.Tensor:
        packed = self._once_a_step(partial(PackedPrefill, [chunk]), chunk)
        return self.prefill_packed(layer, q, packed)

    def prefill_packed(self, layer: int, q: torch.Tensor, packed: PackedPrefill) -> torch.Tensor:
        q = q.contiguous()
        out = torch.empty_like(q) if self._on_gpu and not _has_gaps(packed) else torch.zeros_like(q)
        self._attend_prompts(layer, q, out, packed, 0)
        return out

    def attend_mixed(
        self,
        layer: int,
        q: torch.Tensor,
        decode_lengths: torch.Tensor,
        decode_slots: torch.Tensor,
        packed: PackedPrefill,
    ) -> torch.Tensor:
        q = q.contiguous()
        out = torch.empty_like(q) if self._on_gpu and not _has_gaps(packed) else torch.zeros_like(q)
        lanes = len(decode_lengths)
        if lanes:
            self.decode_mixed(layer, q[:lanes], decode_lengths, decode_slots, out[:lanes])
        self._attend_prompts(layer, q, out, packed, lanes)
        return out

    def _attend_prompts(
        self, layer: int, q: torch.Tensor, out: torch.Tensor, packed: PackedPrefill, decode_rows: int
    ) -> None:
        options = self.options[layer]
        if self._plans_on_host(options) and self.host_planned is not None and packed.spans and not _has_gaps(packed):
            planned_by_host = self._once_a_step(partial(self.host_planned.plan, packed.spans), packed)
            end = decode_rows + sum(span.end - span.start for span in packed.spans)
            self.host_planned.attend(layer, q[decode_rows:end], out[decode_rows:end], planned_by_host)
            out[end:] = 0
            return
        make = partial(descriptors_of, packed, decode_rows, self.cache.device)
        descriptors = self._once_a_step(make, packed)
        if self.prompts is None:
            extent = max(chunk.max_length for chunk in packed.chunks) if packed.chunks else None
            self._reference.attend_chunks(layer, q, out, descriptors, extent)
            return
        make_plan = partial(self.prompts.plan, descriptors, len(q), decode_rows, options)
        window = self._windows.setdefault((options.window, options.first_tokens), options)
        planned = self._once_a_step(make_plan, packed, descriptors, window)
        self.prompts.attend(layer, q, out, planned, options, self.prefixes)

    def _plans_on_host(self, options: LayerOptions) -> bool:
        """Whether another library's kernel does for a layer."""
        return self.prefixes is None and not options.features() and not self._needed_by_cache()


def descriptors_of(packed: PackedPrefill, first_row: int, device: torch.device) -> torch.Tensor:
    """`PackedPrefill.descriptors`; where chunks have none, the first one begins at `first_row`."""
    if packed.descriptors is not None:
        return packed.descriptors
    firsts = first_row + np.cumsum([0, *(chunk.rows for chunk in packed.chunks)])[:-1]
    if packed.spans:
        numbers = [(span.end - span.start, span.end, span.slot) for span in packed.spans]
        return upload(np.column_stack([firsts, np.array(numbers)]).astype(np.int32), device)
    made = [
        torch.cat([chunk.length.new_full((1,), int(first)), chunk.query_len, chunk.length, chunk.slot.to(torch.int32)])
        for first, chunk in zip(firsts, packed.chunks, strict=True)
    ]
    return torch.stack(made)


def _has_gaps(packed: PackedPrefill) -> bool:
    """Whether rows between chunks may belong to none: padding of a chunk that is not the last."""
    if len(packed.chunks) <= 1:
        return False
    if not packed.spans:
        return packed.descriptors is None
    pairs = list(zip(packed.chunks, packed.spans, strict=True))
    return any(chunk.rows != span.end - span.start for chunk, span in pairs[:-1])
