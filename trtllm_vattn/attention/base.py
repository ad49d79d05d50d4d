"""The contract of an attention backend: write a step's K and V, attend over a cache by lengths that live on the device.

Nothing here synchronises with the host or depends on the values of a device tensor, so every call may be captured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch.nn import functional

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.vmm.regions import STATIC, Region, tensor_regions

FEWEST_ROWS = 16
"""Of a prompt's chunk that `Attention.prefill` is given."""


class Span(NamedTuple):
    """Tokens `start` to `end` of a slot's sequence, as the host knows them."""

    slot: int
    start: int
    end: int


@dataclass(frozen=True)
class Part:
    """`rows` rows of a pass that are a chunk of one prompt, as `Attention.prefill` takes them."""

    rows: int
    slot: torch.Tensor
    query_len: torch.Tensor
    length: torch.Tensor
    max_length: int


@dataclass(frozen=True, eq=False)
class Chunks:
    """Chunks of different prompts, one behind another in the rows of a pass.

    The same chunks as parts on the device and as `spans` on the host; of a captured pass there are no spans.
    """

    parts: Sequence[Part]
    spans: Sequence[Span] = ()


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

    def regions(self) -> list[Region]:
        """Where the addresses lie that a captured step may touch: the cache's regions and the backend's tensors."""
        return [*self.cache.regions(), *tensor_regions(STATIC, self.storages())]

    @abstractmethod
    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """Store K and V of some tokens.

        k, v ``[tokens, num_kv_heads, head_dim]``; slots, positions int64 ``[tokens]`` on the device. Padding tokens
        name the dummy slot at position 0.
        """

    def rotate_and_write(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """`write` of keys that are turned first, by rotary position embeddings; returns the turned queries.

        q ``[tokens, num_heads, head_dim]`` to the same shape, contiguous; cos, sin ``[tokens, head_dim]``.
        """
        self.write(layer, rotated(k, cos, sin), v, slots, positions)
        return rotated(q, cos, sin)

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

    def prefill_together(self, layer: int, q: torch.Tensor, chunks: Chunks) -> torch.Tensor:
        """`prefill` of several chunks: q ``[rows, num_heads, head_dim]`` to the same; what is in no part is finite."""
        out = torch.zeros_like(q)
        row = 0
        for part in chunks.parts:
            mine = q[row : row + part.rows]
            padded = functional.pad(mine, (0, 0, 0, 0, 0, max(0, FEWEST_ROWS - part.rows)))
            attended = self.prefill(layer, padded, part.slot, part.query_len, part.length, part.max_length)
            out[row : row + part.rows] = attended[: part.rows]
            row += part.rows
        return out


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x ``[tokens, heads, head_dim]`` turned by angles ``[tokens, head_dim]``, the halves of a head being the two
    coordinates (RoFormer, arXiv 2104.09864, in the form of GPT-NeoX)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
