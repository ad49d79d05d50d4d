"""Hugging Face models, unmodified, over one of our caches.

The model's own code calls a cache object to store K and V and an attention function found by name; both are ours.
Which tokens a call is about stands in a `Step`, handed through the model's keyword arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, Cache, PreTrainedModel

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.errors import ConfigError

ATTENTION_NAME = "trtllm_vattn"


class Step(Protocol):
    """One forward pass: where its tokens' K and V go, and what its queries attend to."""

    @property
    def attention(self) -> Attention: ...

    @property
    def slots(self) -> torch.Tensor: ...

    @property
    def positions(self) -> torch.Tensor: ...

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """q ``[tokens, num_heads, head_dim]`` to the same shape."""


@dataclass(frozen=True)
class DecodeStep:
    """One token a lane. slots, positions int64 ``[lanes]``; lengths int32 ``[lanes]``; all on the device."""

    attention: Attention
    slots: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        return self.attention.decode(layer, q, self.lengths)


@dataclass(frozen=True)
class PrefillStep:
    """A padded chunk of one prompt. slots, positions int64 ``[padded]``; query_len, length int32 ``[1]``."""

    attention: Attention
    slots: torch.Tensor
    positions: torch.Tensor
    slot: int
    query_len: torch.Tensor
    length: torch.Tensor
    max_length: int

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        return self.attention.prefill(layer, q, self.slot, self.query_len, self.length, self.max_length)


class BoundCache(Cache):  # type: ignore[misc]
    """What the model takes for its cache: stores this step's K and V through the attention backend."""

    def __init__(self, step: Step) -> None:
        super().__init__(layers=[])
        self.step = step

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """key_states, value_states ``[batch, num_kv_heads, tokens, head_dim]``; given back as they are."""
        heads, dim = key_states.shape[1], key_states.shape[3]
        k = key_states.transpose(1, 2).reshape(-1, heads, dim)
        v = value_states.transpose(1, 2).reshape(-1, heads, dim)
        self.step.attention.write(layer_idx, k, v, self.step.slots, self.step.positions)
        return key_states, value_states


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    vattn_step: Step | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function registered with transformers: query ``[batch, num_heads, tokens, head_dim]`` to
    ``[batch, tokens, num_heads, head_dim]``, over the cache instead of `key` and `value`."""
    if vattn_step is None:
        raise ConfigError("this model is bound to a trtllm_vattn cache; run it through its Engine")
    if scaling is not None and scaling != vattn_step.attention.scale:
        raise ConfigError(
            f"the model scales attention by {scaling}, the backend by {vattn_step.attention.scale}; make the backend "
            "with the model's scale"
        )
    batch, heads, tokens, dim = query.shape
    q = query.transpose(1, 2).reshape(batch * tokens, heads, dim)
    out = vattn_step.attend(module.layer_idx, q)  # type: ignore[arg-type]
    return out.view(batch, tokens, heads, dim), None


def shape_of(model: PreTrainedModel, num_slots: int, max_seq_len: int) -> CacheShape:
    """The shape of a cache for this model.

    Raises
    ------
    ConfigError
        The model attends in a way the cache does not serve: a sliding window shorter than `max_seq_len`, or positions
        fewer than that.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    windowed = "sliding_attention" in kinds or (not getattr(config, "layer_types", None) and window is not None)
    if kinds - {"full_attention", "sliding_attention"} or (windowed and window and window < max_seq_len):
        raise ConfigError(
            f"{type(model).__name__} uses attention of kinds {sorted(kinds)} with a window of {window} tokens; a cache "
            f"of max_seq_len {max_seq_len} serves full attention only: lower max_seq_len to the window"
        )
    if max_seq_len > config.max_position_embeddings:
        raise ConfigError(
            f"max_seq_len is {max_seq_len}, the model has {config.max_position_embeddings} positions; lower it"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return CacheShape(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        dtype=model.dtype,
        num_slots=num_slots,
        max_seq_len=max_seq_len,
    )


def check_fit(model: PreTrainedModel, shape: CacheShape) -> None:
    """Raise ConfigError where a cache's shape is not the model's, naming what differs."""
    needed = shape_of(model, shape.num_slots, shape.max_seq_len)
    differing = [
        f"{name} is {getattr(shape, name)}, the model's {getattr(needed, name)}"
        for name in ("num_layers", "num_kv_heads", "head_dim", "dtype", "kv_factor")
        if getattr(shape, name) != getattr(needed, name)
    ]
    if differing:
        raise ConfigError(
            f"the cache does not fit the model: {'; '.join(differing)}; build it with shape_of(model, ...)"
        )


def scale_of(model: PreTrainedModel) -> float | None:
    """The factor by which the model's attention scales scores; None where it does not say."""
    return next((module.scaling for module in model.modules() if hasattr(module, "scaling")), None)


def bind(model: PreTrainedModel) -> None:
    """Point the model's attention at ours; its code stays as it is."""
    AttentionInterface.register(ATTENTION_NAME, attend)
    model.set_attn_implementation(ATTENTION_NAME)
    model.eval()


def forward(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    step: Step,
    last: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits ``[batch, tokens, vocab]`` of tokens, positions int64 ``[batch, tokens]``; of row `last` alone (int64
    ``[1]`` on the device) where given."""
    keep = {} if last is None else {"logits_to_keep": last}
    output = model(
        input_ids=tokens,
        position_ids=positions,
        past_key_values=BoundCache(step),
        use_cache=True,
        vattn_step=step,
        **keep,
    )
    logits: torch.Tensor = output.logits
    return logits
