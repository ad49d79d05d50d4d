"""The torch backend, the reference: plain torch on any device, over flat KV and over block tables.

It gathers rows with indices clamped to length - 1, so it reads no row past a length, and computes in float32.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from trtllm_vattn.attention.base import MOST_QUERIES, PrefillChunk
from trtllm_vattn.attention.gather import GatheringAttention


class TorchAttention(GatheringAttention):
    """Attention in plain torch; correct for any shape, and slow."""

    name: ClassVar[str] = "torch"
    most_queries = MOST_QUERIES

    def decode(
        self,
        layer: int,
        q: torch.Tensor,
        lengths: torch.Tensor,
        slots: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        result = self.decode_queries(layer, q[:, None], None, lengths, slots)[:, 0]
        return result if out is None else out.copy_(result)

    def decode_queries(
        self,
        layer: int,
        q: torch.Tensor,
        query_lens: torch.Tensor | None,
        lengths: torch.Tensor,
        slots: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Several query tokens per lane, the last at position ``lengths - 1``; see `SharesAttention.decode_queries`.

        q ``[lanes, queries, num_heads, head_dim]`` to the same shape; query_lens int32 ``[lanes]`` (None: all queries).
        """
        lanes, queries = q.shape[:2]
        slots = self._lanes[:lanes] if slots is None else slots
        row = self._range[:queries]
        counts = lengths.new_full((lanes,), queries) if query_lens is None else query_lens
        lengths = torch.where(counts > 0, lengths, 0)
        sees = torch.where(row < counts[:, None], lengths[:, None] - counts[:, None] + 1 + row, 0)
        k, v = self._gather(layer, slots, lengths, self.cache.shape.max_seq_len)
        result = self._attend(q, k, v, self._range < sees[..., None])
        return result if out is None else out.copy_(result)

    def prefill(self, layer: int, q: torch.Tensor, chunk: PrefillChunk) -> torch.Tensor:
        k, v = self._gather(layer, chunk.slot, chunk.length, chunk.max_length)
        # Rows past query_len attend to the same keys as its last row.
        row = torch.arange(len(q), device=q.device).minimum(chunk.query_len - 1)
        visible = self._range[: chunk.max_length] <= (chunk.length - chunk.query_len + row)[:, None]
        return self._attend(q[None], k, v, visible[None])[0]

    def attend_chunks(
        self, layer: int, q: torch.Tensor, out: torch.Tensor, descriptors: torch.Tensor, extent: int | None = None
    ) -> torch.Tensor:
        """Causal attention of chunks that are read on the device (`PackedPrefill.descriptors`): q
        ``[rows, num_heads, head_dim]`` to their rows of `out`, of the same shape; the others stay as they are.

        `extent` is an upper bound of the lengths; None is the cache's `max_seq_len`.
        """
        rows = torch.arange(len(q), device=q.device)
        extent = self.cache.shape.max_seq_len if extent is None else extent
        for first, count, length, slot in (chunk.split(1) for chunk in descriptors):
            count = torch.where(length >= count, count, 0)
            mine = (rows >= first) & (rows < first + count)
            sees = torch.where(mine, length - count + 1 + rows - first, 0)
            k, v = self._gather(layer, slot.to(torch.int64), torch.where(count > 0, length, 0), extent)
            result = self._attend(q[None], k, v, (self._range[:extent] < sees[:, None])[None])[0]
            out.copy_(result.where(mine[:, None, None], out))
        return out

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """q ``[lanes, rows, num_heads, head_dim]`` to the same shape; k, v ``[lanes, extent, num_kv_heads, head_dim]``;
        visible bool ``[lanes, rows, extent]``. A row that sees no key gives zeros."""
        heads = k.shape[2]
        grouped = q.reshape(*q.shape[:2], heads, q.shape[2] // heads, q.shape[3]).float()
        scores = torch.einsum("nrhgd,nthd->nhgrt", grouped, k.float()) * self.scale
        lowest = torch.finfo(scores.dtype).min
        weights = scores.masked_fill(~visible[:, None, None], lowest).softmax(dim=-1)
        out = torch.einsum("nhgrt,nthd->nrhgd", weights, v.float()).flatten(2, 3)
        return out.where(visible.any(dim=-1)[..., None, None], 0.0).to(q.dtype)
