"""Caches of this process by name, for the layers of plans.

A plan holds only a cache's name. The process that runs the plan attaches a cache under that name first.
"""

from __future__ import annotations

import numpy as np
import torch

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.errors import ConfigError


class AttachedCache:
    """One cache with its attention backends, each made when a layer first needs it.

    Parameters
    ----------
    backend : str
        ``auto``, ``torch`` or ``cudnn``.
    """

    def __init__(self, name: str, cache: KVCache, backend: str) -> None:
        self.name, self.cache, self.backend = name, cache, backend
        self._attentions: dict[tuple[int, float], Attention] = {}
        self._buffers: dict[tuple[torch.Size, torch.dtype], torch.Tensor] = {}

    def attention(self, num_heads: int, scale: float) -> Attention:
        """The backend for so many query heads and a scale; the same object every time."""
        scale = float(np.float32(scale))  # as plans hold it
        made = self._attentions.get((num_heads, scale))
        if made is None:
            made = make_attention(self.backend, self.cache, num_heads, scale)
            self._attentions[num_heads, scale] = made
        return made

    def buffer(self, size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Scratch memory of a size, shared by all layers, because they run one after another."""
        made = self._buffers.get((size, dtype))
        if made is None:
            made = self._buffers[size, dtype] = torch.empty(size, dtype=dtype, device=self.cache.device)
        return made

    def storages(self) -> list[torch.Tensor]:
        """Every tensor that a captured step may touch, except the cache's."""
        own = [tensor for attention in self._attentions.values() for tensor in attention.storages()]
        return [*own, *self._buffers.values()]

    @property
    def attentions(self) -> list[Attention]:
        return list(self._attentions.values())


_attached: dict[str, AttachedCache] = {}


def attach(name: str, cache: KVCache, backend: str = "auto") -> AttachedCache:
    """Let the plans of this process find `cache` under `name`. A cache may have several names.

    Raises ConfigError where another cache has the name.
    """
    there = _attached.get(name)
    if there is not None and there.cache is not cache:
        raise ConfigError(
            f"another cache is attached as {name!r}; detach it first, or build the plan with another name"
        )
    if there is None:
        there = _attached[name] = AttachedCache(name, cache, backend)
    return there


def detach(name: str) -> None:
    """Forget a name; nothing happens where it is not attached."""
    _attached.pop(name, None)


def is_attached(name: str) -> bool:
    """Whether a cache has the name."""
    return name in _attached


def attached(name: str) -> AttachedCache:
    """The cache attached under a name. Raises ConfigError where there is none."""
    there = _attached.get(name)
    if there is None:
        names = ", ".join(repr(each) for each in _attached) or "none"
        raise ConfigError(
            f"no cache is attached as {name!r} in this process (attached: {names}); call "
            f"trtllm_vattn.plugins.registry.attach({name!r}, cache) before the plan runs"
        )
    return there
