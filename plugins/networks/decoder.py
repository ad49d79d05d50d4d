"""One description of a decoder, emitted by operations: to TensorRT's network API, to ONNX, or to torch eagerly.

Operations follow transformers' code step by step (norms in float32, RoPE in the model's dtype), so that a network
differs from the model only by rounding in its kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import torch

from trtllm_vattn.plugins.fields import AttentionFields
from trtllm_vattn.plugins.networks.spec import DecoderSpec, PlanLimits

T = TypeVar("T")


class NetworkEmitter(Protocol[T]):
    """Emits a network's operations. T is the emitter's tensor; shapes of results are numpy's."""

    def weight(self, name: str, value: torch.Tensor) -> T:
        """A constant."""

    def gather(self, table: T, indices: T) -> T:
        """Rows of a table ``[rows, width]``."""

    def linear(self, x: T, weight: T) -> T:
        """x ``[tokens, in]`` times weight ``[out, in]`` transposed."""

    def add(self, a: T, b: T) -> T:
        """Elementwise with broadcasting, as `subtract` and `multiply`."""

    def subtract(self, a: T, b: T) -> T: ...

    def multiply(self, a: T, b: T) -> T: ...

    def reshape(self, x: T, shape: Sequence[int]) -> T:
        """As numpy; -1 is inferred."""

    def slice(self, x: T, start: int, stop: int) -> T:
        """``x[..., start:stop]`` of a tensor of three dimensions."""

    def concat(self, a: T, b: T) -> T:
        """Along the last of three dimensions."""

    def rms_norm(self, x: T, weight: T, eps: float) -> T:
        """Over the last dimension, in float32, then scaled in x's dtype; x has as many dimensions as weight."""

    def silu(self, x: T) -> T: ...

    def to_float(self, x: T) -> T:
        """Cast to float32."""

    def attention(self, fields: AttentionFields, given: Mapping[str, T]) -> T:
        """The plugin's layer; `given` has the names of `AttentionFields.inputs`."""


def inputs_of(limits: PlanLimits) -> dict[str, str]:
    """The network's inputs, all int32, with the name of their one dimension.

    ``last`` names the rows whose logits are wanted; the others are those of `AttentionFields.inputs`.
    """
    names = {"input_ids": "tokens", "positions": "tokens", "lengths": "lanes"}
    if limits.slots:
        names["slots"] = "lanes"
    if limits.max_chunk:
        names.update(query_lengths="lanes", extent="most")
    return {**names, "last": "lanes"}


def build_decoder(emitter: NetworkEmitter[T], spec: DecoderSpec, limits: PlanLimits, given: Mapping[str, T]) -> T:
    """Emit the network over its inputs (`inputs_of`); returns the logits, float32 ``[lanes, vocab]``."""
    weights = spec.weights

    def weight(name: str) -> T:
        return emitter.weight(name, weights[name])

    def norm(x: T, name: str, dimensions: int = 2) -> T:
        value = weights[name]
        return emitter.rms_norm(x, emitter.weight(name, value.view(*[1] * (dimensions - 1), -1)), spec.eps)

    def linear(x: T, name: str) -> T:
        out = emitter.linear(x, weight(f"{name}.weight"))
        if f"{name}.bias" in weights:
            out = emitter.add(out, emitter.weight(f"{name}.bias", weights[f"{name}.bias"].view(1, -1)))
        return out

    def rotated(x: T, heads: int, norm_name: str) -> T:
        x = emitter.reshape(x, [-1, heads, spec.head_dim])
        if norm_name in weights:
            x = norm(x, norm_name, dimensions=3)
        half = spec.head_dim // 2
        a, b = emitter.slice(x, 0, half), emitter.slice(x, half, spec.head_dim)
        turned = emitter.concat(
            emitter.subtract(emitter.multiply(a, cos), emitter.multiply(b, sin)),
            emitter.add(emitter.multiply(b, cos), emitter.multiply(a, sin)),
        )
        return emitter.reshape(turned, [-1, heads * spec.head_dim])

    cos, sin = (
        emitter.reshape(emitter.gather(weight(name), given["positions"]), [-1, 1, spec.head_dim // 2])
        for name in ("rope.cos", "rope.sin")
    )
    x = emitter.gather(weight("model.embed_tokens.weight"), given["input_ids"])
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}"
        fields = spec.layer_fields(layer, limits)
        h = norm(x, f"{prefix}.input_layernorm.weight")
        attn = f"{prefix}.self_attn"
        own = {
            "q": rotated(linear(h, f"{attn}.q_proj"), spec.num_heads, f"{attn}.q_norm.weight"),
            "k": rotated(linear(h, f"{attn}.k_proj"), spec.num_kv_heads, f"{attn}.k_norm.weight"),
            "v": linear(h, f"{attn}.v_proj"),
        }
        out = emitter.attention(fields, {name: own[name] if name in own else given[name] for name in fields.inputs})
        x = emitter.add(x, linear(out, f"{attn}.o_proj"))
        h = norm(x, f"{prefix}.post_attention_layernorm.weight")
        gated = emitter.multiply(emitter.silu(linear(h, f"{prefix}.mlp.gate_proj")), linear(h, f"{prefix}.mlp.up_proj"))
        x = emitter.add(x, linear(gated, f"{prefix}.mlp.down_proj"))
    x = norm(emitter.gather(x, given["last"]), "model.norm.weight")
    return emitter.to_float(linear(x, "lm_head"))
