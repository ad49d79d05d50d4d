"""The torch backend, the reference: plain torch on any device, over flat KV and over block tables.

It gathers rows, those that no query sees as copies of the last one, so that it reads no row past a length and none
behind a window; and it computes in float32.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from trtllm_vattn.attention.base import MOST_QUERIES, PrefillChunk
from trtllm_vattn.attention.gather import GatheringAttention, restored
from trtllm_vattn.attention.options import Feature, PrefixTables
from trtllm_vattn.cache.base import FlatKV


class TorchAttention(GatheringAttention):
    """Attention in plain torch; correct for any shape, and slow."""

    name: ClassVar[str] = "torch"
    batch_invariant = True
    most_queries = MOST_QUERIES
    features: ClassVar[frozenset[Feature]] = frozenset(Feature)

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
        tables = self.prefixes if self._with_prefixes else None
        result = self._attend(layer, q, slots, lengths, sees, self._rows(layer), tables)
        return result if out is None else out.copy_(result)

    def decode_mixed(
        self, layer: int, q: torch.Tensor, lengths: torch.Tensor, slots: torch.Tensor, out: torch.Tensor
    ) -> None:
        result = self._attend(layer, q[:, None], slots, lengths, lengths[:, None].long(), self._rows(layer))
        out.copy_(result[:, 0])

    def _rows(self, layer: int) -> int:
        """The most tokens of a slot in a layer."""
        kv = self.cache.head_groups(layer)[0]
        return kv.k.shape[1] if isinstance(kv, FlatKV) else self.cache.shape.max_seq_len

    def prefill(self, layer: int, q: torch.Tensor, chunk: PrefillChunk) -> torch.Tensor:
        # Rows past query_len attend to the same keys as its last row.
        row = torch.arange(len(q), device=q.device).minimum(chunk.query_len - 1)
        sees = (chunk.length - chunk.query_len + 1 + row)[None]
        return self._attend(layer, q[None], chunk.slot, chunk.length, sees, chunk.max_length)[0]

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
            sees = torch.where(mine, length - count + 1 + rows - first, 0)[None]
            length = torch.where(count > 0, length, 0)
            result = self._attend(layer, q[None], slot.to(torch.int64), length, sees, extent)[0]
            out.copy_(result.where(mine[:, None, None], out))
        return out

    def _attend(
        self,
        layer: int,
        q: torch.Tensor,
        slots: torch.Tensor,
        lengths: torch.Tensor,
        sees: torch.Tensor,
        extent: int,
        shared: PrefixTables | None = None,
    ) -> torch.Tensor:
        """q ``[lanes, rows, num_heads, head_dim]`` to the same shape; slots, lengths ``[lanes]``; sees int64
        ``[lanes, rows]``: up to how many tokens a row sees, none of which gives zeros. Lanes are those of `shared`."""
        options, parts = self.options[layer], len(self.cache.head_groups(layer))
        heads, kv_heads = q.shape[2] // parts, self.cache.shape.num_kv_heads // parts
        slots = torch.where(lengths > 0, slots, self.cache.dummy_slot)
        tokens = self._range[:extent]
        outs = []
        for part in range(parts):
            deficits = self._deficits(layer, part)
            held = lengths if deficits is None else (lengths - deficits[slots]).clamp(min=0)
            until = (sees if deficits is None else (sees - deficits[slots][:, None]).clamp(min=0))[..., None]
            visible = tokens < until
            if options.window is not None:
                visible &= (tokens >= until - options.window) | (tokens < options.first_tokens)
            last = (held[:, None] - 1).clamp(min=0)
            places = torch.where(visible.any(dim=1), tokens, last)
            k, v = self._rows_at(layer, self._slots_of(slots, places, shared), places, part)
            own = slice(part * kv_heads, (part + 1) * kv_heads)
            k, v = (
                restored(x, scale if scale is None or len(scale) == 1 else scale[own])
                for x, scale in ((k, options.k_scale), (v, options.v_scale))
            )
            mine = slice(part * heads, (part + 1) * heads)
            sinks = None if options.sink_logits is None else options.sink_logits[mine]
            outs.append(self._weighted(q[:, :, mine], k, v, visible, sinks, options.softcap))
        return outs[0] if parts == 1 else torch.cat(outs, dim=2)

    def _slots_of(self, slots: torch.Tensor, places: torch.Tensor, shared: PrefixTables | None) -> torch.Tensor:
        """The slot that each of places ``[lanes, tokens]`` is read in, for lanes whose own are `slots` ``[lanes]``."""
        tables, found = self.prefixes, slots[:, None].expand_as(places)
        if tables is None:
            return found
        found = torch.where(places < tables.borders[slots][:, None], tables.base_slots[slots][:, None], found)
        if shared is not None:
            slot, _, first, count = shared.groups.unbind(1)
            member = torch.arange(len(shared.members), device=places.device)
            inside = (member >= first[:, None]) & (member < (first + count)[:, None])
            of_lane = torch.zeros_like(member).index_add_(0, shared.members, (inside * slot[:, None]).sum(0))
            read = places < shared.shared[: len(slots), None]
            found = torch.where(read, of_lane[: len(slots), None], found)
        return found

    def _weighted(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        visible: torch.Tensor,
        sinks: torch.Tensor | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """q ``[lanes, rows, heads, head_dim]`` to the same shape; k, v float32 ``[lanes, extent, kv_heads, head_dim]``;
        visible bool ``[lanes, rows, extent]``; sinks float32 ``[heads]``. A row that sees no key gives zeros."""
        heads = k.shape[2]
        grouped = q.reshape(*q.shape[:2], heads, q.shape[2] // heads, q.shape[3]).float()
        scores = torch.einsum("nrhgd,nthd->nhgrt", grouped, k) * self.scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        scores = scores.masked_fill(~visible[:, None, None], torch.finfo(scores.dtype).min)
        if sinks is None:
            weights = scores.softmax(dim=-1)
        else:
            more = sinks.view(1, heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            weights = torch.cat((scores, more), dim=-1).softmax(dim=-1)[..., :-1]
        out = torch.einsum("nhgrt,nthd->nrhgd", weights, v).flatten(2, 3)
        return out.where(visible.any(dim=-1)[..., None, None], 0.0).to(q.dtype)
