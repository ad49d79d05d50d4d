"""What the installed TensorRT-LLM must have, and what it must not be asked for while we keep its KV cache.

Names and parameters are those that the `KVCacheManager` of every recorded version has
(tensorrt_llm/_torch/pyexecutor/resource_manager.py; tests/data/trtllm_interface.json). A feature that lives in the C++
pool's own memory is refused by its name, at start.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trtllm.versions import RANGE

REQUIRED: dict[str, tuple[str, ...]] = {
    "__init__": (
        "kv_cache_config",
        "kv_cache_type",
        "num_layers",
        "num_kv_heads",
        "head_dim",
        "tokens_per_block",
        "max_seq_len",
        "max_batch_size",
        "mapping",
        "dtype",
    ),
    "shutdown": (),
    "get_max_resource_count": (),
    "get_needed_resource_to_completion": ("request",),
    "prepare_resources": ("scheduled_batch",),
    "update_resources": ("scheduled_batch",),
    "free_resources": ("request",),
    "add_dummy_requests": ("request_ids", "token_nums"),
    "calculate_max_num_blocks": (),
    "get_num_free_blocks": (),
    "get_cache_bytes_per_token": (),
    "get_cache_indices": ("request",),
    "get_batch_cache_indices": ("request_ids",),
    "get_buffers": ("layer_idx", "kv_layout"),
    "check_invalid_values_in_kv_cache": ("fill_with_zero",),
    "get_kv_cache_stats": (),
    "rewind_kv_cache": ("request", "rewind_len"),
    "copy_batch_block_offsets": ("dst_tensor", "request_ids", "beam_width", "num_context", "num_seqs"),
}
"""Methods that are overridden or called, and the parameters they are overridden or called with."""
REQUIRED_GLOBALS = ("KVCacheManagerCpp", "CacheTypeCpp", "get_draft_token_length")
"""Names of the module that the class is in."""

DTYPES: dict[str, torch.dtype] = {
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FLOAT": torch.float32,
    "FP8": torch.float8_e4m3fn,
}
"""Of K and V, by TensorRT-LLM's names."""


class UnsupportedFeature(ConfigError):
    """TensorRT-LLM was asked for something that this KV cache does not serve; switch it off, or run without us."""


def check_interface(manager: type, module: Any) -> None:
    """Raise ConfigError, naming what is missing, where a class is not one that the adapter fits."""
    missing = [name for name in REQUIRED_GLOBALS if not hasattr(module, name)]
    for name, parameters in REQUIRED.items():
        method = getattr(manager, name, None)
        if method is None:
            missing.append(f"{name}()")
            continue
        there = inspect.signature(method).parameters
        any_name = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in there.values())
        missing += [f"{name}(… {each} …)" for each in parameters if each not in there and not any_name]
    if missing:
        raise ConfigError(
            f"{manager.__module__}.{manager.__qualname__} of the installed TensorRT-LLM lacks {', '.join(missing)}; "
            f"the fixed-address cache fits {RANGE}: install one of these, or run without trtllm-vattn"
        )


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a TensorRT-LLM KV dtype by name. Raises UnsupportedFeature."""
    if name not in DTYPES:
        raise UnsupportedFeature(
            f"KV cache of dtype {name} is not supported at fixed addresses; there are {', '.join(DTYPES)}: set "
            "kv_cache_config.dtype"
        )
    return DTYPES[name]


def _asked(config: Any, name: str) -> bool:
    """Whether a user has set a field of a configuration, and not only its default stands there."""
    chosen = getattr(config, "model_fields_set", None)
    return chosen is not None and name in chosen and bool(getattr(config, name, None))


def refuse(config: Any, cache_type: str, arguments: Mapping[str, Any]) -> None:
    """Raise UnsupportedFeature naming every feature asked for that the cache does not serve.

    Parameters
    ----------
    config : KvCacheConfig
        As the manager is given it.
    cache_type : str
        Name of the manager's ``kv_cache_type``.
    arguments : mapping
        The manager's other arguments.
    """
    window = getattr(config, "max_attention_window", None) or []
    mapping = arguments["mapping"]
    found = {
        "block reuse (kv_cache_config.enable_block_reuse)": _asked(config, "enable_block_reuse"),
        "host offload (kv_cache_config.host_cache_size)": bool(getattr(config, "host_cache_size", None)),
        "KV cache events (kv_cache_config.event_buffer_max_size)": bool(getattr(config, "event_buffer_max_size", 0)),
        "attention sinks (kv_cache_config.sink_token_length)": bool(getattr(config, "sink_token_length", None)),
        "sliding windows (kv_cache_config.max_attention_window)": min(window, default=arguments["max_seq_len"])
        < arguments["max_seq_len"],
        "beam search (max_beam_width)": arguments.get("max_beam_width", 1) > 1,
        "KV connectors (kv_connector_config)": arguments.get("kv_connector_manager") is not None,
        "a draft model with a KV cache of its own (speculative_config)": bool(arguments.get("is_draft", False)),
        "sparse attention's indexer cache": bool(arguments.get("enable_indexer_k_cache", False)),
        "cross attention": cache_type not in ("SELF", "SELFKONLY"),
        "layers of different numbers of KV heads": _differ(arguments["num_kv_heads"]),
        "a mask of layers": not all(arguments.get("layer_mask") or ()),
        "layers of different head sizes": not isinstance(arguments["head_dim"], int) or _pools_differ(arguments),
        "linear attention's states (linear_attention_metadata)": arguments.get("linear_attention_metadata") is not None,
        "context parallelism": getattr(mapping, "cp_size", 1) > 1,
    }
    names = [name for name, asked in found.items() if asked]
    if names:
        raise UnsupportedFeature(
            f"the fixed-address KV cache does not support: {'; '.join(names)}. Switch it off, or run "
            "without trtllm-vattn"
        )


def _pools_differ(arguments: Mapping[str, Any]) -> bool:
    """Whether pools are asked for whose head size or dtype is not the manager's own (`pool_configurations`)."""
    own = {"head_dim": arguments["head_dim"], "dtype": arguments.get("dtype")}
    pools = arguments.get("pool_configurations") or ()
    return any(getattr(pool, name) != value for pool in pools for name, value in own.items() if value is not None)


def _differ(heads: int | Iterable[int | None]) -> bool:
    return not isinstance(heads, int) and len(set(heads)) > 1
