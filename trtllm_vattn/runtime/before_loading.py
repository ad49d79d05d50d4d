"""What `Engine.from_pretrained` refuses before weights are read, which may take minutes: what settings rule out in one
another, and what a model's configuration does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from transformers import PreTrainedConfig

from trtllm_vattn.cache.compression import CompressionPolicy
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import has_windows, positions_of, refuse_longer
from trtllm_vattn.runtime.compression import LATENTS, SINKS, SOFTCAPS, WINDOWS, refuse_together, wrong_settings
from trtllm_vattn.runtime.models import config_of
from trtllm_vattn.runtime.speculation import Speculation
from trtllm_vattn.runtime.speculation_draft import check_vocabularies

WITH_SINKS = ("gpt_oss",)
"""Model types whose attention has sink logits, of which their configurations say nothing."""


def check_before_loading(
    model: str, max_seq_len: int, settings: Mapping[str, Any], policy: CompressionPolicy | None
) -> None:
    """Raise ConfigError where a named model cannot be served with drafts or a policy that evicts tokens. `settings` are
    as `check_settings` has them."""
    if policy is not None:
        refuse_together(wrong_settings(policy, settings))
        config = config_of(model)
        refuse_together(_wrong_layers(config, max_seq_len))
        policy.check(config.num_hidden_layers)
    speculation: Speculation | None = settings["speculation"]
    if speculation is not None:
        _check_drafts(model, max_seq_len, speculation)


def _wrong_layers(config: Any, max_seq_len: int) -> dict[str, bool]:
    """What a policy is not served with, and whether a configuration says that its model has it. (What none says, the
    model's dry passes find.)"""
    return {
        WINDOWS: has_windows(config, max_seq_len),
        SINKS: config.model_type in WITH_SINKS,
        SOFTCAPS: bool(getattr(config, "attn_logit_softcapping", None)),
        LATENTS: bool(getattr(config, "kv_lora_rank", None)),
    }


def check_ranks_before_loading(model: str, max_seq_len: int, size: int) -> None:
    """Raise ConfigError where so many ranks cannot serve a named model, as each of them would once it has loaded."""
    config = config_of(model)
    if has_windows(config, max_seq_len):
        refuse_windows(model)
    check_sizes(config, f"{model} ({config.model_type})", size)


def check_sizes(config: PreTrainedConfig, name: str, size: int) -> None:
    """Raise ConfigError where so many ranks do not divide what a model's configuration has; `name` is the model's."""
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    if heads % size:
        raise ConfigError(f"{name} has {heads} query heads, which {size} ranks do not divide; take a divisor of them")
    if kv_heads % size and size % kv_heads:
        raise ConfigError(
            f"{name} has {kv_heads} KV heads for {size} ranks; one number must be a multiple of the other"
        )
    inner = getattr(config, "intermediate_size", size)
    if inner % size:
        raise ConfigError(f"{name} has an intermediate_size of {inner}, which {size} ranks do not divide")


def refuse_windows(name: str) -> NoReturn:
    """Raise ConfigError for a model some of whose layers keep windows of tokens."""
    raise ConfigError(f"{name} has layers that keep windows, which tensor_parallel does not serve; use one rank")


def _check_drafts(model: str, max_seq_len: int, speculation: Speculation) -> None:
    config = config_of(model)
    if has_windows(config, max_seq_len):
        raise ConfigError(
            f"drafts that are rejected are taken back, and layers of {model} keep windows of tokens alone; leave "
            "speculation out"
        )
    if not isinstance(speculation.model, str):
        return
    drafts = config_of(speculation.model)
    check_vocabularies(config, drafts)
    refuse_longer(max_seq_len, positions_of(drafts), f"the draft model {speculation.model}")
