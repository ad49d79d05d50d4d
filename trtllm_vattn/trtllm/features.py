"""What the installed TensorRT-LLM must have, and which of its features the fixed-address KV cache refuses.

Names and parameters are those that the `KVCacheManager` of every recorded version has
(tensorrt_llm/_torch/pyexecutor/resource_manager.py; tests/data/trtllm_interface.json). A feature that needs the C++
pool's own memory is refused by its name, at start. Nothing here imports torch or TensorRT-LLM.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

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
"""Methods that the adapter overrides or calls, and the parameters with which it does."""
REQUIRED_GLOBALS = ("KVCacheManagerCpp", "CacheTypeCpp", "get_draft_token_length")
"""Names that the class's module must have."""


class UnsupportedFeature(ConfigError):
    """TensorRT-LLM was asked for something that this KV cache does not serve."""


def check_interface(manager: type, module: Any) -> None:
    """Raise ConfigError, naming what is missing, where a class lacks a name or a parameter that the adapter needs."""
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


def enum_name(value: Any) -> str:
    """The name of an enumerator of TensorRT-LLM's bindings."""
    return str(getattr(value, "name", value)).rpartition(".")[2]


def unsupported(what: str, instead: str = "run without trtllm-vattn") -> UnsupportedFeature:
    """The error for a call that this KV cache does not serve."""
    return UnsupportedFeature(f"{what} is not supported by the fixed-address KV cache; {instead}")


def _asked(config: Any, name: str) -> bool:
    """Whether a user set a field of a configuration to something true; a default does not count."""
    chosen = getattr(config, "model_fields_set", None)
    return chosen is not None and name in chosen and bool(getattr(config, name, None))


def cannot_reuse(arguments: Mapping[str, Any]) -> str | None:
    """For whom blocks cannot be reused, of a manager's arguments; None where they can."""
    ranks = getattr(arguments["mapping"], "world_size", 1)
    # What is held depends on the order in which each rank's memory runs short.
    return f"a model on {ranks} ranks, which would have to hold the same blocks" if ranks > 1 else None


def refuse(config: Any, cache_type: str, arguments: Mapping[str, Any]) -> None:
    """Raise UnsupportedFeature, naming every feature that a manager is asked for and this cache does not serve.

    Parameters
    ----------
    config : KvCacheConfig
        The manager's first argument.
    cache_type : str
        Name of the manager's ``kv_cache_type``.
    arguments : mapping
        The manager's other arguments.
    """
    window = getattr(config, "max_attention_window", None) or []
    mapping, heads, longest = arguments["mapping"], arguments["num_kv_heads"], arguments["max_seq_len"]
    why = cannot_reuse(arguments)
    reuses, events = (bool(getattr(config, name, 0)) for name in ("enable_block_reuse", "event_buffer_max_size"))
    another = "serve another model"
    found = [
        (why and _asked(config, "enable_block_reuse"), f"block reuse for {why}", "set enable_block_reuse: false"),
        (why and events, f"KV cache events for {why}", "leave event_buffer_max_size out"),
        (events and not reuses, "KV cache events without block reuse", "set enable_block_reuse: true"),
        (bool(getattr(config, "host_cache_size", None)), "host offload", "leave host_cache_size out"),
        (bool(getattr(config, "sink_token_length", None)), "attention sinks", "leave sink_token_length out"),
        (
            min(window, default=longest) < longest,
            f"sliding windows (max_attention_window {window})",
            f"leave max_attention_window out, or set max_seq_len to {min(window, default=longest)}",
        ),
        (arguments.get("max_beam_width", 1) > 1, "beam search", "set max_beam_width: 1"),
        (arguments.get("kv_connector_manager") is not None, "KV connectors", "leave kv_connector_config out"),
        (
            bool(arguments.get("is_draft", False)),
            "a draft model with a KV cache of its own",
            "draft by another speculative_config (n-grams, MTP, one-model EAGLE)",
        ),
        (bool(arguments.get("enable_indexer_k_cache", False)), "sparse attention's indexer cache", another),
        (cache_type not in ("SELF", "SELFKONLY"), "cross attention", another),
        (not isinstance(heads, int) and len(set(heads)) > 1, "layers of different numbers of KV heads", another),
        (not all(arguments.get("layer_mask") or ()), "a mask of layers", another),
        (
            not isinstance(arguments["head_dim"], int) or _pools_differ(arguments),
            "layers of different head sizes or dtypes (pool_configurations)",
            another,
        ),
        (
            arguments.get("linear_attention_metadata") is not None,
            "linear attention's states (linear_attention_metadata)",
            another,
        ),
        (getattr(mapping, "cp_size", 1) > 1, "context parallelism", "set context_parallel_size: 1"),
    ]
    names = [f"{name}: {instead}" for asked, name, instead in found if asked]
    if names:
        raise UnsupportedFeature(
            f"the fixed-address KV cache does not support {'; '.join(names)}. Or run without trtllm-vattn"
        )


def _pools_differ(arguments: Mapping[str, Any]) -> bool:
    """Whether `pool_configurations` asks for a pool of another head size or dtype than the manager's own."""
    own = {"head_dim": arguments["head_dim"], "dtype": arguments.get("dtype")}
    pools = arguments.get("pool_configurations") or ()
    return any(getattr(pool, name) != value for pool in pools for name, value in own.items() if value is not None)
