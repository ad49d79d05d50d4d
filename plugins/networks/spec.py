"""A decoder's sizes and weights, taken from a Hugging Face model, and the limits of its plan."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import PreTrainedModel

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.plugins.fields import DTYPES, LARGEST_FIELD, AttentionFields, Slots, check_cache_name
from trtllm_vattn.plugins.networks.config_fields import check_config, check_weights
from trtllm_vattn.runtime.binding import scale_of, shape_of
from trtllm_vattn.values import truth, whole

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
"""Model types that `build_decoder` knows."""


@dataclass(frozen=True)
class PlanLimits:
    """The most that a plan can be asked for.

    Parameters
    ----------
    max_lanes : int
        Sequences of a decode step.
    max_chunk : int
        Prompt tokens of one call; 0 for a plan without a context phase.
    max_seq_len : int
        Tokens of a sequence.
    any_slot : bool
        Whether a decode step reads its lanes' slots from an input; otherwise lane i is slot i.
    cache : str
        The name under which the cache is attached.
    """

    max_lanes: int = 8
    max_chunk: int = 512
    max_seq_len: int = 2048
    any_slot: bool = False
    cache: str = "kv"

    def __post_init__(self) -> None:
        for name, least in (("max_lanes", 1), ("max_chunk", 0), ("max_seq_len", 1)):
            object.__setattr__(self, name, whole(name, getattr(self, name), least, LARGEST_FIELD))
        truth("any_slot", self.any_slot)
        check_cache_name(self.cache)

    @property
    def slots(self) -> Slots:
        if self.any_slot:
            return Slots.ALWAYS
        return Slots.CONTEXT if self.max_chunk else Slots.NONE


@dataclass(frozen=True)
class DecoderSpec:
    """Sizes and weights of a decoder of one of `FAMILIES`.

    `weights` are named as transformers names them, with ``rope.cos`` and ``rope.sin`` ``[positions, head_dim / 2]``
    beside them; RoPE is part of the network and the attention layer gets rotated queries and keys.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    eps: float
    scale: float
    window: int
    dtype: str
    weights: dict[str, torch.Tensor] = field(compare=False, repr=False)

    @classmethod
    def of(cls, model: PreTrainedModel, max_seq_len: int) -> DecoderSpec:
        """The spec of a model in memory.

        Raises ConfigError for a family that is not known, a field of its configuration or a tensor that the network
        would leave out (config_fields.py), or too few positions.
        """
        config = model.config.get_text_config()
        if config.model_type not in FAMILIES:
            raise ConfigError(f"no network for a {config.model_type} model; there are {', '.join(FAMILIES)}")
        check_config(config)
        dtype = next((name for name, each in DTYPES.items() if each == model.dtype), None)
        if dtype is None:
            raise ConfigError(f"the model is of {model.dtype}; load it as one of {', '.join(DTYPES)}")
        shape = shape_of(model, 1, max_seq_len)
        if windows := sorted({window for window in shape.windows if window}):
            raise ConfigError(
                f"the model has layers with a window of {windows[0]} tokens, and the network attends to all of "
                f"{max_seq_len}: lower max_seq_len to the window"
            )
        weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        check_weights(weights, shape.num_layers)
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
        with torch.inference_mode():
            positions = torch.arange(max_seq_len, device=model.device)[None]
            cos, sin = model.model.rotary_emb(weights["model.norm.weight"], positions)
        if cos.shape[-1] != shape.head_dim:
            raise ConfigError(
                f"the model turns {cos.shape[-1]} of {shape.head_dim} dimensions of a head; the network turns all"
            )
        half = shape.head_dim // 2
        weights.update({"rope.cos": cos[0, :, :half].contiguous(), "rope.sin": sin[0, :, :half].contiguous()})
        return cls(
            num_layers=shape.num_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            vocab_size=config.vocab_size,
            eps=config.rms_norm_eps,
            scale=scale_of(model) or shape.head_dim**-0.5,
            window=0,
            dtype=dtype,
            weights=weights,
        )

    def layer_fields(self, layer: int, limits: PlanLimits) -> AttentionFields:
        """The plugin's fields of one layer."""
        return AttentionFields(
            cache=limits.cache,
            layer=layer,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.scale,
            window=self.window,
            dtype=self.dtype,
            packed_qkv=0,
            slots=int(limits.slots),
            context=int(limits.max_chunk > 0),
        )

    def sizes(self) -> dict[str, Any]:
        """All but the weights, for JSON."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "weights"}
