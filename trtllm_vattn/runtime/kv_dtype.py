"""Keys and values as numbers of eight bits (e4m3, ``kv_cache_dtype="fp8"``), and what they are divided by when stored.

A stored number is the key or value over its scale, rounded; e4m3 has 3 bits of mantissa and reaches 448. Without scales
all are 1, what is larger than 448 becomes 448, and numbers under 2**-6 lose bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from trtllm_vattn.attention.options import FP8, KV_CACHE_DTYPES
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.values import shown


class KVScales(NamedTuple):
    """Scales of keys and of values, float32 ``[layers, 1]``, or ``[layers, kv_heads]`` for one of each head."""

    k: torch.Tensor
    v: torch.Tensor


def check_kv_cache_dtype(given: Any) -> torch.dtype | None:
    """What keys and values are stored as; None is as the model's own. Raises ConfigError for another name."""
    if not isinstance(given, str) or given not in KV_CACHE_DTYPES:
        raise ConfigError(f"kv_cache_dtype is {shown(given)}; give one of {', '.join(KV_CACHE_DTYPES)}")
    return None if given == "auto" else FP8


def check_kv_scales(given: Any, shape: CacheShape) -> KVScales | None:
    """Scales for a cache of this shape. Raises ConfigError where they are not for it."""
    if given is None:
        return None
    if not isinstance(given, KVScales) or not all(isinstance(each, torch.Tensor) for each in given):
        raise ConfigError(f"kv_scales is {shown(given)}; give KVScales (runtime.kv_scales.calibrated_scales), or None")
    if shape.dtype != FP8:
        raise ConfigError(f"kv_scales are for a cache of {FP8}, this one is {shape.dtype}; leave them out")
    sizes = [(shape.num_layers, 1), (shape.num_layers, shape.num_kv_heads)]
    for name, each in (("k", given.k), ("v", given.v)):
        if tuple(each.shape) not in sizes or not bool((each.isfinite() & (each > 0)).all()):
            raise ConfigError(
                f"kv_scales.{name} is {list(each.shape)}; give finite numbers above 0, "
                f"{' or '.join(str(list(size)) for size in sizes)}"
            )
    return given
