"""Attention backends by name."""

from __future__ import annotations

from trtllm_vattn.attention import cudnn, fmha, shares, xqa
from trtllm_vattn.attention.base import Attention
from trtllm_vattn.attention.decode_only import default_attention
from trtllm_vattn.attention.reference import TorchAttention
from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.errors import ConfigError

_BACKENDS = {
    "auto": default_attention,
    "torch": TorchAttention,
    "cudnn": cudnn.CudnnAttention,
    "xqa": xqa.XqaAttention,
    "xqa-fmha": fmha.XqaFmhaAttention,
    "shares": shares.SharesAttention,
}
BACKENDS = tuple(_BACKENDS)


def make_attention(name: str, cache: KVCache, num_heads: int, scale: float | None = None) -> Attention:
    """Make a backend over a cache; ``auto`` is cudnn if it works over the cache, else torch.

    Raises ConfigError for an unknown name, for query heads that are no multiple of the cache's KV heads, and if the
    backend does not support the cache or this machine.
    """
    if num_heads < 1 or num_heads % cache.shape.num_kv_heads:
        raise ConfigError(
            f"{num_heads} query heads over {cache.shape.num_kv_heads} kv heads; there must be a multiple of the latter"
        )
    if name not in _BACKENDS:
        raise ConfigError(f"no attention backend {name!r}; there are {', '.join(BACKENDS)}")
    return _BACKENDS[name](cache, num_heads, scale)


def available() -> dict[str, str]:
    """For each backend ``yes``, or why it does not work on this machine."""
    return {
        "torch": "yes",
        "cudnn": cudnn.availability(),
        "shares": shares.availability(),
        "xqa": xqa.availability(),
        "xqa-fmha": fmha.availability(),
    }
