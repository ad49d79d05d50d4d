"""The model file for ``trtllm-build --model_cls_file``: Llama and Qwen whose attention is VattnAttention.

TensorRT-LLM 1.2.x. The classes keep TensorRT-LLM's own modules, so its checkpoints load unchanged, but build another
network from them: RoPE outside the attention layer, lengths and slots on the device, no KV tensors among the inputs.
The engine's inputs are those of `networks.decoder.inputs_of`, which `EngineSession` feeds; TensorRT-LLM's own C++
executor does not know them.

The cache's name is the environment's VATTN_CACHE, ``kv`` where that is not set. One rank only.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any

import numpy as np
from tensorrt_llm._common import default_trtnet
from tensorrt_llm.functional import Tensor, _create_tensor, cast, concat, constant, index_select, split
from tensorrt_llm.models import LLaMAForCausalLM, QWenForCausalLM

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.plugins.build import profile_sizes, profiles_of
from trtllm_vattn.plugins.fields import AttentionFields
from trtllm_vattn.plugins.networks.config_fields import unsupported_trtllm_fields
from trtllm_vattn.plugins.networks.decoder import inputs_of
from trtllm_vattn.plugins.networks.spec import PlanLimits
from trtllm_vattn.plugins.networks.trt_emitter import add_attention
from trtllm_vattn.plugins.tensorrt import load_tensorrt

PLAIN_SCALING = ("none", "linear", "llama3", "default")
"""RoPE scalings that are frequencies alone."""


class VattnDecoder:
    """The network of both families; a mixin before TensorRT-LLM's class."""

    config: Any
    transformer: Any
    lm_head: Any
    rotary_inv_freq: Any

    def prepare_inputs(
        self,
        max_batch_size: int,
        max_input_len: int,
        max_seq_len: int,
        max_num_tokens: int,
        use_cache: bool,
        max_beam_width: int = 1,
        **others: Any,
    ) -> dict[str, Any]:
        """The network's inputs by name, in two profiles: decode, and a chunk of one prompt.

        Raises ConfigError for what the plugin does not do: beams, drafts, LoRA, prompt tables, several ranks.
        """
        asked = sorted(name for name, value in others.items() if value and not name.startswith("opt_"))
        asked = [name for name in asked if name not in ("num_hidden_layers", "streamingllm")]
        if max_beam_width != 1 or not use_cache or asked:
            raise ConfigError(
                f"max_beam_width is {max_beam_width}, use_cache {use_cache}, and {', '.join(asked) or 'nothing'} was "
                "asked for beside: VattnAttention decodes one beam over its cache and nothing else; build without them"
            )
        self._check_config()
        self.limits = PlanLimits(
            max_lanes=max_batch_size,
            max_chunk=min(max_input_len, max_num_tokens or max_input_len),
            max_seq_len=max_seq_len,
            cache=os.environ.get("VATTN_CACHE", "kv"),
        )
        sizes = [profile_sizes(self.limits, profile) for profile in profiles_of(self.limits)]
        trt = load_tensorrt("tensorrt")
        return {
            name: Tensor(
                name=name,
                dtype=trt.DataType.INT32,
                shape=[-1],
                dim_range=OrderedDict([(dimension, [list(each[dimension]) for each in sizes])]),
            )
            for name, dimension in inputs_of(self.limits).items()
        }

    def _check_config(self) -> None:
        config = self.config
        wrong = []
        if config.mapping.world_size != 1:
            wrong.append(f"{config.mapping.world_size} ranks (1 is supported)")
        if config.kv_dtype != config.dtype:
            wrong.append(f"KV of {config.kv_dtype} under {config.dtype}")
        if config.moe.has_moe():
            wrong.append("experts")
        scaling = getattr(config, "rotary_scaling", None) or {}
        kind = scaling.get("type", scaling.get("rope_type", "none"))
        if kind not in PLAIN_SCALING:
            wrong.append(f"RoPE scaled by {kind} (there are {', '.join(PLAIN_SCALING)})")
        wrong += unsupported_trtllm_fields(vars(config), getattr(config, "head_size", None))
        if wrong:
            raise ConfigError(f"this checkpoint has {'; '.join(wrong)}: not supported; use TensorRT-LLM's own model")

    def forward(self, **given: Any) -> Any:
        """Build the network; marks ``logits`` ``[lanes, vocab]`` as its output."""
        cos, sin = self._rotations(given["positions"])
        hidden = self.transformer.vocab_embedding(given["input_ids"])
        for number, layer in enumerate(self.transformer.layers):
            attended = self._attend(number, layer.attention, layer.input_layernorm(hidden), cos, sin, given)
            hidden = hidden + attended
            hidden = hidden + layer.mlp(layer.post_layernorm(hidden))
        hidden = self.transformer.ln_f(index_select(hidden, 0, given["last"]))
        logits = self.lm_head(hidden)
        logits.mark_output("logits", self.config.logits_dtype)
        return logits

    def _rotations(self, positions: Any) -> tuple[Any, Any]:
        """Cosines and sines ``[tokens, 1, head_dim / 2]`` by the model's own, scaled frequencies."""
        frequencies = np.asarray(self.rotary_inv_freq.raw_value, np.float32).reshape(-1)
        angles = np.outer(np.arange(self.limits.max_seq_len, dtype=np.float32), frequencies)
        cos, sin = (
            cast(index_select(constant(table.astype(np.float32)), 0, positions), self.config.dtype).view(
                concat([-1, 1, frequencies.size])
            )
            for table in (np.cos(angles), np.sin(angles))
        )
        return cos, sin

    def _attend(self, number: int, attention: Any, hidden: Any, cos: Any, sin: Any, given: dict[str, Any]) -> Any:
        heads, kv_heads, dim = (
            attention.num_attention_heads,
            attention.num_attention_kv_heads,
            attention.attention_head_size,
        )
        q, k, v = split(attention.qkv(hidden), [heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
        norms = (attention.q_layernorm, attention.k_layernorm) if attention.qk_layernorm else (None, None)
        fields = AttentionFields(
            cache=self.limits.cache,
            layer=number,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            scale=1.0 / (attention.q_scaling * dim**0.5),
            window=0,
            dtype=self.config.dtype,
            packed_qkv=0,
            slots=int(self.limits.slots),
            context=1,
        )
        own = {
            "q": _rotated(q, heads, dim, norms[0], cos, sin),
            "k": _rotated(k, kv_heads, dim, norms[1], cos, sin),
            "v": v,
        }
        inputs = [(own[name] if name in own else given[name]).trt_tensor for name in fields.inputs]
        layer = add_attention(load_tensorrt("tensorrt"), default_trtnet(), fields, inputs)
        return attention.dense(_create_tensor(layer.get_output(0), layer))


def _rotated(x: Any, heads: int, dim: int, norm: Any, cos: Any, sin: Any) -> Any:
    """A projection's heads, normed where the model does that, and rotated: ``[tokens, heads * dim]``."""
    x = x.view(concat([-1, heads, dim]))
    if norm is not None:
        x = norm(x)
    a, b = split(x, dim // 2, dim=2)
    return concat([a * cos - b * sin, b * cos + a * sin], dim=2).view(concat([-1, heads * dim]))


class VattnLlamaForCausalLM(VattnDecoder, LLaMAForCausalLM):  # type: ignore[misc]
    """``--model_cls_name VattnLlamaForCausalLM``: Llama and Mistral checkpoints."""


class VattnQWenForCausalLM(VattnDecoder, QWenForCausalLM):  # type: ignore[misc]
    """``--model_cls_name VattnQWenForCausalLM``: Qwen2 and Qwen3 checkpoints."""
