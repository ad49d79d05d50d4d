"""The plugin's layers of a decoder, called as TensorRT calls them, over K and V that can be computed from lane and
position.

The K and V of a lane depend on its offset alone, so an output can be checked at any time without a second cache:
token t of a sequence has the row ``(t + offset) mod rows`` of the layer's tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from trtllm_vattn.graphs.capture import Outputs
from trtllm_vattn.plugins.emulated import built_layer, run_layer
from trtllm_vattn.plugins.fields import AttentionFields
from trtllm_vattn.plugins.registry import AttachedCache
from trtllm_vattn.vmm.tensors import current_stream

ROWS = 997
"""Rows of the tables; a prime, so that no page or block of tokens repeats another."""


class EmulatedLayers:
    """All attention layers of a decoder, in several execution contexts.

    Parameters
    ----------
    fields : AttentionFields
        Of layer 0; the others differ by their number. With a context phase and slots for it.
    contexts : int
        Execution contexts, each with clones of its own.
    """

    def __init__(
        self, trt: Any, fields: AttentionFields, attached: AttachedCache, lanes: int, contexts: int, seed: int
    ) -> None:
        self.trt, self.attached, self.lanes = trt, attached, lanes
        cache = attached.cache
        count = cache.shape.num_layers
        self.fields = [replace(fields, layer=layer) for layer in range(count)]
        built = [built_layer(trt, each) for each in self.fields]
        self.contexts = [[layer.attach_to_context(None) for layer in built] for _ in range(contexts)]
        self.prompts = [layer.attach_to_context(None) for layer in built]
        """The context that prompts go in by."""
        self._shaped: dict[int, tuple[int, ...]] = {}
        self.enqueued = 0
        generator = torch.Generator().manual_seed(seed)

        def table(width: int) -> torch.Tensor:
            values = torch.randn(ROWS, width, generator=generator)
            return values.to(cache.shape.dtype).to(cache.device)

        self.q, self.k, self.v = (
            [table(width) for _ in range(count)] for width in (fields.q_width, fields.kv_width, fields.kv_width)
        )
        self.out = [table(fields.q_width)[:1].repeat(lanes, 1) for _ in range(count)]
        self.integers = {
            name: torch.zeros(lanes, dtype=torch.int32, device=cache.device)
            for name in ("lengths", "slots", "query_lengths")
        }
        self.integers["extent"] = torch.zeros(1, dtype=torch.int32, device=cache.device)
        self.offsets = torch.zeros(lanes, dtype=torch.int64, device=cache.device)

    @property
    def static(self) -> list[torch.Tensor]:
        """What a captured step touches."""
        own = [*self.q, *self.k, *self.v, *self.out, *self.integers.values(), self.offsets]
        return [*own, *self.attached.storages(), *self.attached.cache.storages()]

    def step(self, context: int, bucket: int) -> Outputs:
        """One decode step of all layers and lanes, new K and V from the tables."""
        assert bucket == self.lanes
        rows = (self.integers["lengths"] - 1 + self.offsets).remainder(ROWS)
        for layer, out in enumerate(self.out):
            given = [table[layer].index_select(0, rows) for table in (self.q, self.k, self.v)]
            self.enqueue(self.contexts[context][layer], layer, given, self.integers, out)
        return tuple(self.out)

    def enqueue(
        self, plugin: Any, layer: int, own: Sequence[torch.Tensor], integers: dict[str, torch.Tensor], out: torch.Tensor
    ) -> None:
        """`on_shape_change` where shapes are new to a clone, then `enqueue` with raw addresses."""
        given = {**dict(zip(("q", "k", "v"), own, strict=True)), **integers}
        self.enqueued += 1
        stream = current_stream(self.attached.cache.device)
        run_layer(self.trt, plugin, self.fields[layer], given, out, self._shaped, stream)

    def prefill(self, slot: int, offset: int, tokens: int, padded: int) -> torch.Tensor:
        """A prompt into a slot, in one chunk of `padded` rows; returns the first layer's output of its tokens."""
        device = self.attached.cache.device
        integers = {
            name: torch.tensor([value], dtype=torch.int32, device=device)
            for name, value in (("lengths", tokens), ("slots", slot), ("query_lengths", tokens))
        }
        integers["extent"] = torch.zeros(tokens, dtype=torch.int32, device=device)
        rows = (torch.arange(padded, device=device) + offset).remainder(ROWS)
        first = None
        for layer, plugin in enumerate(self.prompts):
            own = [table[layer][rows] for table in (self.q, self.k, self.v)]
            out = torch.zeros_like(own[0])
            self.enqueue(plugin, layer, own, integers, out)
            first = out[:tokens] if first is None else first
        assert first is not None
        return first

    def expected(self, layer: int, offset: int, length: int, last: int | None = None) -> torch.Tensor:
        """Attention of the token at `last` (default: the newest) over its sequence, float32 ``[q_width]``."""
        fields = self.fields[layer]
        last = length - 1 if last is None else last
        rows = (torch.arange(last + 1, device=self.offsets.device) + offset).remainder(ROWS)
        group = fields.num_heads // fields.num_kv_heads
        k, v = (
            table[layer][rows].float().view(last + 1, fields.num_kv_heads, fields.head_dim).repeat_interleave(group, 1)
            for table in (self.k, self.v)
        )
        q = self.q[layer][rows[-1]].float().view(fields.num_heads, fields.head_dim)
        weights = (torch.einsum("hd,thd->ht", q, k) * fields.scale).softmax(-1)
        return torch.einsum("ht,thd->hd", weights, v).flatten()

    def error(self, layer: int, lane: int, offset: int, length: int) -> float:
        """Distance of a lane's output from `expected`, relative to its size."""
        want = self.expected(layer, offset, length)
        return float((self.out[layer][lane].float() - want).norm() / want.norm())

    # -- the same layers without the plugin ------------------------------------------------------------------------

    def plugin_alone(self, bucket: int) -> Outputs:
        """The plugin's layers on rows that are there already; nothing else is timed."""
        for layer, out in enumerate(self.out):
            own = [table[layer][:bucket] for table in (self.q, self.k, self.v)]
            self.enqueue(self.contexts[0][layer], layer, own, self.integers, out)
        return tuple(self.out)

    def without_plugin(self, bucket: int, slots: torch.Tensor, positions: torch.Tensor) -> Outputs:
        """The same calls straight to the attention backend, as the Engine makes them."""
        fields = self.fields[0]
        attention = self.attached.attention(fields.num_heads, fields.scale)
        outputs = []
        attention.begin_step()
        for layer in range(len(self.fields)):
            q = self.q[layer][:bucket].view(bucket, fields.num_heads, fields.head_dim)
            k, v = (
                table[layer][:bucket].view(bucket, fields.num_kv_heads, fields.head_dim) for table in (self.k, self.v)
            )
            attention.write(layer, k, v, slots, positions)
            outputs.append(attention.decode(layer, q, self.integers["lengths"]))
        return tuple(outputs)
