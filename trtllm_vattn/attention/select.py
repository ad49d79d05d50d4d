"""Attention backends by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from trtllm_vattn.attention import cudnn, fmha, latents, shares, xqa
from trtllm_vattn.attention.base import Attention
from trtllm_vattn.attention.decode_only import default_attention
from trtllm_vattn.attention.options import FP8, Feature, LayerOptions
from trtllm_vattn.attention.picked import PickedAttention
from trtllm_vattn.attention.reference import TorchAttention
from trtllm_vattn.attention.shares_launch import availability
from trtllm_vattn.attention.windows import WindowedAttention
from trtllm_vattn.cache.base import FlatKV, KVCache
from trtllm_vattn.errors import ConfigError


def automatic(cache: KVCache, num_heads: int, scale: float | None = None, *, deterministic: bool = False) -> Attention:
    """The picked backend (picked.py) if its kernels work over this cache, else `default_attention`; over latents their
    own backend if its kernels do and it need not be deterministic, else the torch backend. Where it must be
    deterministic, nothing is by cuDNN: where the project's own kernel does not work, the torch backend."""
    shape = cache.shape
    if shape.kv_factor == 1:
        # Whether bits of the own kernels depend on other lanes was not looked at.
        kind = latents.LatentAttention if latents.serves(cache) and not deterministic else TorchAttention
        return kind(cache, num_heads, scale)
    flat = isinstance(cache.head_groups(0)[0], FlatKV) and shape.kv_factor == 2
    half = shape.dtype in (torch.float16, torch.bfloat16, FP8) and shape.head_dim in shares.HEAD_SIZES
    own = cache.device.type == "cuda" and flat and half and availability() == "yes"
    if own and (deterministic or cudnn.availability() == "yes"):
        return PickedAttention(cache, num_heads, scale, deterministic=deterministic)
    return TorchAttention(cache, num_heads, scale) if deterministic else default_attention(cache, num_heads, scale)


_BACKENDS: dict[str, Callable[..., Attention]] = {
    "torch": TorchAttention,
    "cudnn": cudnn.CudnnAttention,
    "xqa": xqa.XqaAttention,
    "xqa-fmha": fmha.XqaFmhaAttention,
    "shares": shares.SharesAttention,
    "latents": latents.LatentAttention,
}
BACKENDS = ("auto", *_BACKENDS)


def make_attention(
    name: str,
    cache: KVCache,
    num_heads: int,
    scale: float | None = None,
    *,
    deterministic: bool = False,
    options: Sequence[LayerOptions] = (),
    most_rows: int = 2048,
) -> Attention:
    """Make a backend over a cache, and tell it how each layer attends (`Attention.set_options`; empty is nothing).

    ``auto`` is, over flat KV on a GPU, cudnn or shares by the lengths at hand, and elsewhere cudnn if it works over the
    cache, else torch; if `deterministic`, it is fixed shares (shares.py) over flat KV on a GPU, else torch. Where those
    cannot do what `options` ask for, it is shares, else torch. The other backends have one kernel. Over a cache that
    keeps windows of some layers it is two of the named backend (windows.py), for passes of at most `most_rows` rows.

    Raises ConfigError for an unknown name, for query heads that are no multiple of the cache's KV heads, and if the
    backend does not support the cache, the options or this machine.
    """
    if num_heads < 1 or num_heads % cache.shape.num_kv_heads:
        raise ConfigError(
            f"{num_heads} query heads over {cache.shape.num_kv_heads} kv heads; there must be a multiple of the latter"
        )
    if name not in BACKENDS:
        raise ConfigError(f"no attention backend {name!r}; there are {', '.join(BACKENDS)}")
    needed = {feature for each in options for feature in each.features()}
    made: Attention
    if cache.shape.windows:
        name = _capable(cache, needed) if name == "auto" else name
        make = partial(_BACKENDS[name], num_heads=num_heads, scale=scale)
        made = WindowedAttention(cache, num_heads, scale, make=make, most_rows=most_rows)
    elif name == "auto" and cache.length_deficits is not None:
        made = _BACKENDS[_capable(cache, needed)](cache, num_heads, scale)
    elif name != "auto":
        made = _BACKENDS[name](cache, num_heads, scale)
    else:
        made = automatic(cache, num_heads, scale, deterministic=deterministic)
        if not needed <= made.features:
            made = _BACKENDS[_capable(cache, needed)](cache, num_heads, scale)
    if options:
        made.set_options(options)
    return made


def _capable(cache: KVCache, needed: set[Feature]) -> str:
    """The backend that can do most, and what is needed."""
    flat = isinstance(cache.head_groups(0)[0], FlatKV)
    half = cache.shape.dtype.itemsize <= 2 and cache.shape.kv_factor == 2 and flat
    return "shares" if half and _shares_runs(cache) and needed <= shares.SharesAttention.features else "torch"


def _shares_runs(cache: KVCache) -> bool:
    on_gpu = cache.device.type == "cuda"
    return on_gpu and cache.shape.head_dim in shares.HEAD_SIZES and availability() == "yes"


def available() -> dict[str, str]:
    """For each backend ``yes``, or why it does not work on this machine."""
    return {
        "torch": "yes",
        "cudnn": cudnn.availability(),
        "shares": availability(),
        "latents": availability(),
        "xqa": xqa.availability(),
        "xqa-fmha": fmha.availability(),
    }
