"""The contract of an attention backend: write a step's K and V, attend over a cache by lengths that live on the device.

Nothing here synchronises with the host or depends on the values of a device tensor, so every call may be captured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from trtllm_vattn.cache.base import KVCache


class Attention(ABC):
    """Attention over one cache.

    Parameters
    ----------
    cache : KVCache
        What is read and written; its layout must be one of the backend's.
    num_heads : int
        Query heads; a multiple of the cache's kv heads.
    scale : float or None
        Softmax scale; ``head_dim ** -0.5`` where None.
    """

    name: ClassVar[str]
    over_read: ClassVar[int] = 0
    """Tokens past a lane's length that a kernel may load. The guard adds it; 0 was shown on the card for ours."""

    def __init__(self, cache: KVCache, num_heads: int, scale: float | None = None) -> None:
        self.cache, self.num_heads = cache, num_heads
        self.scale = cache.shape.head_dim**-0.5 if scale is None else scale

    def storages(self) -> list[torch.Tensor]:
        """Tensors of the backend's own (index ranges, workspaces) that a captured step may touch."""
        return [value for value in vars(self).values() if isinstance(value, torch.Tensor)]

    @abstractmethod
    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """Store K and V of some tokens.

        k, v ``[tokens, num_kv_heads, head_dim]``; slots, positions int64 ``[tokens]`` on the device. Padding tokens
        name the dummy slot at position 0.
        """

    @abstractmethod
    def decode(
        self,
        layer: int,
        q: torch.Tensor,
        lengths: torch.Tensor,
        slots: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One query token a lane: q ``[lanes, num_heads, head_dim]`` to the same shape, in `out` where given.

        lengths int32 ``[lanes]`` on the device, this step's token included; a lane of length 0 reads nothing and
        its output is finite but means nothing. Lane i reads slot i, or `slots[i]` (int64 or int32
        ``[lanes]``, on the device).
        """

    @abstractmethod
    def prefill(
        self,
        layer: int,
        q: torch.Tensor,
        slot: torch.Tensor,
        query_len: torch.Tensor,
        length: torch.Tensor,
        max_length: int,
    ) -> torch.Tensor:
        """A chunk of a prompt in `slot`, int64 ``[1]``, causal: q ``[padded_tokens, num_heads, head_dim]`` to the same.

        Query i (of the first `query_len`, int32 ``[1]`` on the device) sits at position ``length - query_len + i``;
        length int32 ``[1]`` on the device counts the chunk and what was there before; `max_length` is a host-side
        bound on it (a multiple of nothing in particular). Rows past `query_len` are finite and mean nothing.
        """
