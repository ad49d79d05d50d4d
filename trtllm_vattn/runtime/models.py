"""Where models come from: a checkpoint, local or on the Hugging Face Hub, or a named shape with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.planner import ModelShape
from trtllm_vattn.runtime.checkpoint import load_checkpoint, positions_in, read_config
from trtllm_vattn.runtime.hub import check_repo_id, is_local_only
from trtllm_vattn.sizes import USUAL_MAX_SEQ_LEN

_TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 16384,
    # Activations as large as in a model 64 times as wide; with the usual 0.02 attention would hardly change a token.
    "initializer_range": 0.16,
}

SHAPES: dict[str, dict[str, Any]] = {
    "tiny-llama": {"model_type": "llama", **_TINY},
    "tiny-qwen2": {"model_type": "qwen2", **_TINY},
    "tiny-qwen3": {"model_type": "qwen3", **_TINY},
    "tiny-mistral": {"model_type": "mistral", "sliding_window": None, **_TINY},
    "tiny-gemma3": {
        "model_type": "gemma3_text",
        **_TINY,
        "num_hidden_layers": 2,
        "max_position_embeddings": 131072,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "sliding_window": 512,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "small-llama": {
        "model_type": "llama",
        **_TINY,
        "vocab_size": 1024,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "initializer_range": 0.06,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "llama-3-70b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
}
"""Shapes as published in the models' configurations."""


def longest_of(name: str) -> int:
    """Tokens of the longest sequence unless it is said: `USUAL_MAX_SEQ_LEN`, or as many as the model of a name has
    positions, where they are fewer."""
    shape = SHAPES.get(name) if not Path(name).is_dir() else None
    positions = positions_in(name, SHAPES) if shape is None else shape["max_position_embeddings"]
    return min(USUAL_MAX_SEQ_LEN, positions or USUAL_MAX_SEQ_LEN)


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of the text model that `load_model` would load; nothing else is read. Raises ConfigError where
    there is none."""
    if name in SHAPES and not Path(name).is_dir():
        return AutoConfig.for_model(**SHAPES[name])
    return read_config(name, SHAPES).get_text_config()


def planned_shape(name: str, dtype: torch.dtype) -> ModelShape:
    """What the planner needs of a model that `load_model` would load with weights of a dtype; nothing is loaded but its
    configuration. Raises ConfigError for a model that no plan is made for."""
    if name in SHAPES and not Path(name).is_dir():
        return ModelShape.from_config(name, SHAPES[name], dtype.itemsize)
    if not Path(name).is_dir():
        check_repo_id(name, tuple(SHAPES))
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=is_local_only(name)).get_text_config().to_dict()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no configuration of {name!r} ({str(error).splitlines()[0]}); give a checkpoint, or one of "
            f"{', '.join(SHAPES)}"
        ) from error
    return ModelShape.from_config(name, config, dtype.itemsize)


def load_model(name: str, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """A causal language model on a device.

    Parameters
    ----------
    name : str
        A directory with a Hugging Face checkpoint; or a name in `SHAPES`, which gets random weights from `seed`, and no
        end of text, since its tokens mean nothing; or else a name on the Hugging Face Hub (checkpoint.py).

    Raises
    ------
    ConfigError
        It is none of them, or the checkpoint is not whole.
    """
    if name not in SHAPES or Path(name).is_dir():
        return load_checkpoint(name, device, dtype, SHAPES)
    config = AutoConfig.for_model(**SHAPES[name], eos_token_id=None)
    torch.manual_seed(seed)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model
