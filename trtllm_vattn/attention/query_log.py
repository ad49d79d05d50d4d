"""The last queries of every slot, for those who ask later what they attended to (cache/compression)."""

from __future__ import annotations

import torch

from trtllm_vattn.cache.base import CacheShape


class QueryLog:
    """A ring a layer and slot: the query at position p is in row ``p % size``. Storing is one kernel a layer and step,
    and may be captured.

    Parameters
    ----------
    shape : CacheShape
        Of the cache whose slots are meant.
    num_heads : int
        Query heads.
    size : int
        Queries of each slot.
    dtype, device
        What queries are of and where; the memory is ``layers × (slots + 1) × size × heads × head_dim`` of these.

    Attributes
    ----------
    rows : Tensor
        ``[layers, num_slots + 1, size, num_heads, head_dim]``.
    """

    def __init__(
        self, shape: CacheShape, num_heads: int, size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.size, self._dummy = size, shape.num_slots
        sizes = (shape.num_layers, shape.num_slots + 1, size, num_heads, shape.head_dim)
        self.rows = torch.zeros(sizes, dtype=dtype, device=device)

    def note(self, layer: int, q: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """Store the queries of a pass: q ``[rows, num_heads, head_dim]``, turned to their positions; slots, positions
        int64 ``[rows]``. Rows of a slot follow one another in it."""
        if len(q) > self.size:
            # What a later row of the same slot displaces goes to the dummy slot: no place is written twice.
            later = torch.nn.functional.pad(slots[self.size :], (0, self.size), value=self._dummy)
            slots = torch.where(slots == later, self._dummy, slots)
        self.rows[layer].index_put_((slots, positions.remainder(self.size)), q.to(self.rows.dtype))

    def last(self, layer: int, slot: int, start: int, stop: int) -> torch.Tensor:
        """The queries at positions `start` to `stop`, of which there are at most `size`: ``[queries, num_heads,
        head_dim]``."""
        at = torch.arange(start, stop, device=self.rows.device).remainder(self.size)
        return self.rows[layer, slot, at]
