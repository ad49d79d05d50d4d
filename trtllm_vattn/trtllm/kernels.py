"""What kernels and metadata are given: pool addresses, tables, buffers, block numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trtllm.books import Books
from trtllm_vattn.trtllm.features import UnsupportedFeature
from trtllm_vattn.trtllm.tables import AffineTables, RowGatherer


class KernelViews(Books):
    """The stock class's views, over our memory."""

    def _vattn_publish(self) -> None:
        """Put our addresses and tables where kernels and metadata look for them."""
        cache = self._vattn_pages.cache
        layout = cache.layout
        self.num_pools = layout.num_ranges
        bases = [[reservation.base, 0] for reservation in cache.arena.reservations]
        self.kv_cache_pool_pointers = torch.tensor(bases, dtype=torch.int64)
        layers = [divmod(layer, layout.layers_per_range) for layer in range(layout.num_layers)]
        self.kv_cache_pool_mapping = torch.tensor(layers, dtype=torch.int32)
        self.host_kv_cache_block_offsets = torch.zeros(
            (self.num_pools, self.max_batch_size, 2, self.max_blocks_per_seq),
            dtype=torch.int32,
            pin_memory=cache.device.type == "cuda",
        )
        tables = AffineTables(layout, self.max_blocks_per_seq, 0, cache.device)
        self._vattn_rows = RowGatherer(
            tables, self._vattn_requests, self._vattn_backed, self.host_kv_cache_block_offsets
        )

    def copy_batch_block_offsets(
        self, dst_tensor: torch.Tensor, request_ids: Sequence[int], beam_width: int, num_context: int, num_seqs: int
    ) -> None:
        """Gather the batch's rows of the constant table, if they are others than before. Raises UnmappedAccess, by
        request, where the stock books are ahead of the memory."""
        self._vattn_refuse_beams(beam_width)
        self._vattn_check_frontiers(request_ids)
        self._vattn_rows.fill(dst_tensor, request_ids, num_context)

    def get_buffers(self, layer_idx: int, kv_layout: str = "NHD") -> torch.Tensor:
        """A layer's blocks, ``[blocks, kv_factor, heads, tokens, dim]`` (HND), or the same memory taken as
        ``[blocks, kv_factor, tokens, heads, dim]`` (NHD). Most blocks have no memory."""
        blocks = self._vattn_pages.cache.blocks(self.layer_offsets[layer_idx])
        if kv_layout == "HND":
            return blocks
        if kv_layout != "NHD":
            raise ConfigError(f"kv_layout is {kv_layout!r}; there are NHD and HND")
        count, factor, heads, tokens, dim = blocks.shape
        return blocks.as_strided((count, factor, tokens, heads, dim), (*blocks.stride()[:2], heads * dim, dim, 1))

    def get_batch_cache_indices(
        self, request_ids: Sequence[int], layer_idx: int | None = None, **named: Any
    ) -> list[list[int]]:
        """Block numbers of each request; of a dummy, zeros. Later versions ask for the first few of each
        (`num_blocks_per_seq`), and name a window and a beam width. Raises as `copy_batch_block_offsets`."""
        self._vattn_refuse_beams(named.get("beam_width") or 1)
        self._vattn_check_frontiers(request_ids)
        dummies = [number for number in request_ids if number in self._vattn_dummies]
        counts = dict(zip(dummies, self._vattn_booked(dummies), strict=True))
        found = [
            [0] * counts[number] if number in counts else self._vattn_pages.block_ids(number) for number in request_ids
        ]
        wanted = named.get("num_blocks_per_seq")
        return found if wanted is None else [ids[:count] for ids, count in zip(found, wanted, strict=True)]

    def _vattn_refuse_beams(self, width: int) -> None:
        if width > 1:
            raise UnsupportedFeature("beam search is not supported by the fixed-address KV cache; use beam width 1")

    def _vattn_backed(self, numbers: Sequence[int]) -> list[int]:
        """Blocks of requests that have memory; a dummy has none but the tail."""
        return [0 if number in self._vattn_dummies else len(self._vattn_pages.block_ids(number)) for number in numbers]

    def get_cache_indices(self, request: Any, window_size: int | None = None) -> list[int]:
        """Block numbers of a request."""
        return self.get_batch_cache_indices([request.py_request_id])[0]

    def check_invalid_values_in_kv_cache(self, fill_with_zero: bool = False) -> bool:
        """Whether anything mapped is NaN or infinite; then zeroed, if so asked."""
        with self._vattn_lock:
            return self._vattn_pages.has_invalid(fill_with_zero)
