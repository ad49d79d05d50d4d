"""Attention backends by name."""

from __future__ import annotations

import importlib.util

import torch

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.attention.reference import TorchAttention
from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.errors import ConfigError

BACKENDS = ("auto", "torch", "cudnn", "xqa", "xqa-fmha", "shares")


def make_attention(name: str, cache: KVCache, num_heads: int, scale: float | None = None) -> Attention:
    """A backend over a cache; ``auto`` is cudnn where it works, else torch.

    Raises ConfigError for an unknown name, or query heads that are not a multiple of the cache's kv heads.
    """
    if num_heads < 1 or num_heads % cache.shape.num_kv_heads:
        raise ConfigError(
            f"{num_heads} query heads over {cache.shape.num_kv_heads} kv heads; there must be a multiple of the latter"
        )
    if name == "auto":
        half = cache.shape.dtype in (torch.float16, torch.bfloat16)
        name = "cudnn" if cache.device.type == "cuda" and half and available()["cudnn"] == "yes" else "torch"
    if name == "torch":
        return TorchAttention(cache, num_heads, scale)
    if name == "cudnn":
        from trtllm_vattn.attention.cudnn import CudnnAttention

        return CudnnAttention(cache, num_heads, scale)
    if name == "shares":
        from trtllm_vattn.attention.shares import SharesAttention

        return SharesAttention(cache, num_heads, scale)
    if name == "xqa":
        from trtllm_vattn.attention.xqa import XqaAttention

        return XqaAttention(cache, num_heads, scale)
    if name == "xqa-fmha":
        from trtllm_vattn.attention.fmha import XqaFmhaAttention

        return XqaFmhaAttention(cache, num_heads, scale)
    raise ConfigError(f"no attention backend {name!r}; there are {', '.join(BACKENDS)}")


def available() -> dict[str, str]:
    """Each backend with ``yes``, or why it does not work here."""
    cudnn = "yes"
    if not torch.cuda.is_available():
        cudnn = "no GPU"
    elif importlib.util.find_spec("cudnn") is None:
        cudnn = "nvidia-cudnn-frontend is not installed: pip install 'trtllm-vattn[cuda]'"
    from trtllm_vattn.attention import fmha, shares, xqa

    return {
        "torch": "yes",
        "cudnn": cudnn,
        "shares": shares.why_not(),
        "xqa": xqa.why_not(),
        "xqa-fmha": fmha.why_not(),
    }
