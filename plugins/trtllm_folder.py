"""Reading engine folders that `trtllm-build` wrote with the model file of `plugins.models`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.plugins.networks.spec import PlanLimits

PLAN = "rank0.engine"


def is_trtllm_folder(folder: Path) -> bool:
    """Whether `trtllm-build` wrote a folder."""
    return (folder / PLAN).is_file()


def read_trtllm_folder(folder: Path) -> tuple[Any, dict[str, Any], PlanLimits]:
    """The model's configuration for transformers, the decoder's sizes, and the plan's limits.

    Raises ConfigError where ``config.json`` does not say them, or the engine has several ranks.
    """
    try:
        whole = json.loads((folder / "config.json").read_text())
        model, build = whole["pretrained_config"], whole["build_config"]
        if model["mapping"]["world_size"] != 1:
            raise ConfigError(f"{folder} is an engine of {model['mapping']['world_size']} ranks; one is supported")
        heads, kv_heads, dim = model["num_attention_heads"], model["num_key_value_heads"], model["head_size"]
        limits = PlanLimits(
            max_lanes=build["max_batch_size"],
            max_chunk=min(build["max_input_len"], build["max_num_tokens"] or build["max_input_len"]),
            max_seq_len=build["max_seq_len"],
            cache=os.environ.get("VATTN_CACHE", "kv"),
        )
        decoder = {
            "num_layers": model["num_hidden_layers"],
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": dim,
            "vocab_size": model["vocab_size"],
            "scale": model.get("attention_multiplier", 1.0) * dim**-0.5,
            "dtype": model["dtype"],
        }
        config = AutoConfig.for_model(
            "llama",
            vocab_size=model["vocab_size"],
            hidden_size=model["hidden_size"],
            num_hidden_layers=model["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=dim,
            max_position_embeddings=max(model["max_position_embeddings"], limits.max_seq_len),
            # trtllm-build's files do not say what ends a text: give stop_token_ids.
            eos_token_id=None,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{folder / 'config.json'} is not one of trtllm-build's: {error!r}") from error
    return config, decoder, limits
