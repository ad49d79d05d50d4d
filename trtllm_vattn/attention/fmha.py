"""The xqa-fmha backend: TensorRT-LLM's kernels over its block layout, XQA for decode and FMHAv2 for prompts.

FMHAv2 expects K of page p at ``2 p`` pages from the start of a pool, and V right behind it. A block of `BlockKVCache`
holds K and V of several layers. So a layer's pool starts at that layer of the first block, and block b is the pool's
page ``b × layers_per_range``: one table serves all layers. The kernel loads whole blocks, up to the block of a
sequence's last token, and the cache maps whole blocks. What lies in that block past the last token is multiplied by
zero and must be finite, so the backend zeroes it first.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, NamedTuple

import torch

from trtllm_vattn.attention import xqa
from trtllm_vattn.attention.base import PrefillChunk
from trtllm_vattn.attention.fmha_reference import fmha_reference
from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.cache.blocks import BlockKVCache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.values import typed

HEAD_DIMS = (32, 40, 48, 64, 80, 96, 104, 128, 160, 192, 256)
"""Head sizes for which FlashInfer builds the kernel on Hopper."""
WORKSPACE = 1 << 20
"""Bytes in which the kernel keeps a counter."""


def availability() -> str:
    """``yes`` if the kernel runs on this machine, else the reason."""
    of_xqa = xqa.availability()
    if of_xqa == "yes" and torch.cuda.get_device_capability()[0] != 9:
        return "the context kernel over blocks is built for compute capability 9.0, this GPU is another"
    return of_xqa


class ChunkTables(NamedTuple):
    """What the context kernel is given for a chunk; the same for all layers."""

    pages: torch.Tensor
    """int32 ``[1, pages of the sequence]``."""
    query_ends: torch.Tensor
    """int32 ``[2]``: 0, and the chunk's queries."""
    ends: torch.Tensor
    """int32 ``[2]``: 0, and the sequence's length."""
    tail_slots: torch.Tensor
    """int64 ``[block]``: slots of the positions between the length and the end of its block, then the dummy slot."""
    tail_positions: torch.Tensor
    """int64 ``[block]``: these positions, then 0."""


class XqaFmhaAttention(xqa.XqaDecode):
    """XQA for decode, FMHAv2 for prompts; bf16 on a GPU, any dtype by references on the host.

    FlashInfer compiles FMHAv2 at its first use on a machine, for every head size and option; this takes minutes.

    Raises
    ------
    ConfigError
        The cache is not a `BlockKVCache` with K and V, its head size or dtype is not the kernel's, or FlashInfer is
        missing.
    """

    name: ClassVar[str] = "xqa-fmha"

    def __init__(self, cache: KVCache, num_heads: int, scale: float | None = None) -> None:
        if not isinstance(cache, BlockKVCache) or cache.shape.kv_factor != 2:
            raise ConfigError(f"xqa-fmha reads K and V in blocks, not {typed(cache)}; use the blocks cache")
        super().__init__(cache, num_heads, scale)
        shape, layout = cache.shape, cache.layout
        if cache.device.type == "cuda":
            if shape.head_dim not in HEAD_DIMS:
                raise ConfigError(f"head_dim is {shape.head_dim}; the context kernel has {HEAD_DIMS}; use xqa")
            if shape.dtype != torch.bfloat16:
                raise ConfigError(f"the context kernel adds up bfloat16 alone in float32, not {shape.dtype}; use xqa")
            if availability() != "yes":
                raise ConfigError(f"the xqa-fmha backend does not work here: {availability()}")
            from flashinfer.prefill import trtllm_fmha_v2_prefill

            self._context_kernel = trtllm_fmha_v2_prefill
        else:
            self._context_kernel = fmha_reference
        self._pages = cache.table * layout.layers_per_range
        self._pools = [self._pairs(cache, layer) for layer in range(shape.num_layers)]
        self._scratch = torch.zeros(WORKSPACE, dtype=torch.uint8, device=cache.device)
        self._zeros = torch.zeros(
            self.block, shape.num_kv_heads, shape.head_dim, dtype=shape.dtype, device=cache.device
        )
        self._within = torch.arange(self.block, device=cache.device)

    def _pairs(self, cache: BlockKVCache, layer: int) -> torch.Tensor:
        """A layer's pool, ``[pages, 2, num_kv_heads, tokens_per_block, head_dim]``, contiguous."""
        first = cache.blocks(layer)
        pages = (len(first) - 1) * cache.layout.layers_per_range + 1
        part = first.shape[2] * first.shape[3] * first.shape[4]
        strides = (2 * part, part, *first.stride()[2:])
        return first.as_strided((pages, *first.shape[1:]), strides)

    def prefill(self, layer: int, q: torch.Tensor, chunk: PrefillChunk) -> torch.Tensor:
        tables = self._once_a_step(partial(self._tables_of, chunk), chunk)
        self.write(layer, self._zeros, self._zeros, tables.tail_slots, tables.tail_positions)
        # The kernel does not write rows past query_len.
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        self._context_kernel(
            (q.contiguous(), self._pools[layer]),
            "Q_PAGED_KV_HND",
            self._scratch,
            chunk.length,
            len(q),
            chunk.max_length,
            self.scale,
            1.0,
            1,
            tables.query_ends,
            tables.ends,
            block_tables=tables.pages,
            out=out,
        )
        return out

    def _tables_of(self, chunk: PrefillChunk) -> ChunkTables:
        positions = chunk.length + self._within
        within = positions < (chunk.length + self.block - 1) // self.block * self.block
        return ChunkTables(
            self._pages[chunk.slot],
            torch.nn.functional.pad(chunk.query_len, (1, 0)),
            torch.nn.functional.pad(chunk.length, (1, 0)),
            torch.where(within, chunk.slot, self.cache.dummy_slot),
            torch.where(within, positions, 0),
        )
