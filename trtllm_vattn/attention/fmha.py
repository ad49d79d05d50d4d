"""The xqa-fmha backend: both of TensorRT-LLM's kernels over the block layout, XQA for decode, FMHAv2 for prompts.

FMHAv2 finds K of page p of a pool at ``2 p`` pages from its start and V right behind it (FlashInfer's way of telling
it). A block of ours holds the K and V of several layers, so a layer's pool starts at that layer of the first block, and
block b is its page ``b × layers_per_range``: one table for all layers, made once. The kernel's bulk loads take whole
blocks, up to the one of a sequence's last token; the cache never maps a part of one. What lies in that block past the
last token is multiplied by zero, and has to be finite for that: it is overwritten first, whoever left it there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from trtllm_vattn.attention.fmha_reference import fmha_reference
from trtllm_vattn.attention.xqa import XqaAttention
from trtllm_vattn.attention.xqa import why_not as why_not_xqa
from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.cache.blocks import BlockKVCache
from trtllm_vattn.errors import ConfigError

HEAD_DIMS = (32, 40, 48, 64, 80, 96, 104, 128, 160, 192, 256)
"""That FlashInfer builds the kernel for on Hopper."""
WORKSPACE = 1 << 20
"""Bytes; the kernel keeps a counter there."""


def why_not() -> str:
    """``yes`` where the kernel runs on this machine, else the reason."""
    missing = why_not_xqa()
    if missing == "yes" and torch.cuda.get_device_capability()[0] != 9:
        return "the context kernel over blocks is built for compute capability 9.0, this GPU is another"
    return missing


@dataclass(frozen=True)
class Chunk:
    """What is the same for all layers of a chunk of a prompt; `layer` is the last one that asked for it."""

    layer: int
    pages: torch.Tensor
    query_ends: torch.Tensor
    ends: torch.Tensor
    rest: tuple[torch.Tensor, torch.Tensor]
    """Slots and positions of what is left of the last token's block; of no token but the dummy slot's beyond."""


class XqaFmhaAttention(XqaAttention):
    """XQA for decode, FMHAv2 for prompts; bf16 on a GPU, any dtype by references on the host.

    FlashInfer compiles FMHAv2 at its first use, for every head size and option: minutes, once a machine.

    Raises
    ------
    ConfigError
        The cache is not a `BlockKVCache` with K and V, its head size or dtype is not the kernel's, or FlashInfer is
        missing.
    """

    name: ClassVar[str] = "xqa-fmha"

    def __init__(self, cache: KVCache, num_heads: int, scale: float | None = None) -> None:
        if not isinstance(cache, BlockKVCache) or cache.shape.kv_factor != 2:
            raise ConfigError(f"xqa-fmha reads K and V in blocks, not a {type(cache).__name__}; use the blocks cache")
        super().__init__(cache, num_heads, scale)
        shape, layout = cache.shape, cache.layout
        if cache.device.type == "cuda":
            if shape.head_dim not in HEAD_DIMS:
                raise ConfigError(f"head_dim is {shape.head_dim}; the context kernel has {HEAD_DIMS}; use xqa")
            if shape.dtype != torch.bfloat16:
                raise ConfigError(f"the context kernel adds up bfloat16 alone in float32, not {shape.dtype}; use xqa")
            if why_not() != "yes":
                raise ConfigError(f"the xqa-fmha backend does not work here: {why_not()}")
            from flashinfer.prefill import trtllm_fmha_v2_prefill

            self._context_kernel = trtllm_fmha_v2_prefill
        else:
            self._context_kernel = fmha_reference
        self._pages = cache.table * layout.layers_per_range
        self._pools = [self._pairs(cache, layer) for layer in range(shape.num_layers)]
        self._scratch = torch.zeros(WORKSPACE, dtype=torch.uint8, device=cache.device)
        self._nothing = torch.zeros(
            self.block, shape.num_kv_heads, shape.head_dim, dtype=shape.dtype, device=cache.device
        )
        self._within = torch.arange(self.block, device=cache.device)
        self._chunks = WeakTensorKeyDictionary()
        """By the tensor that holds the length."""

    def _choose_context(self) -> None:
        return None

    def _pairs(self, cache: BlockKVCache, layer: int) -> torch.Tensor:
        """``[pages, 2, num_kv_heads, tokens_per_block, head_dim]``, contiguous, from a layer's first K on."""
        first = cache.blocks(layer)
        pages = (len(first) - 1) * cache.layout.layers_per_range + 1
        part = first.shape[2] * first.shape[3] * first.shape[4]
        strides = (2 * part, part, *first.stride()[2:])
        return first.as_strided((pages, *first.shape[1:]), strides)

    def prefill(
        self,
        layer: int,
        q: torch.Tensor,
        slot: torch.Tensor,
        query_len: torch.Tensor,
        length: torch.Tensor,
        max_length: int,
    ) -> torch.Tensor:
        chunk = self._chunks[length] = self._chunk_of(layer, slot, query_len, length)
        self.write(layer, self._nothing, self._nothing, *chunk.rest)
        # Rows past query_len are not written.
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        self._context_kernel(
            (q.contiguous(), self._pools[layer]),
            "Q_PAGED_KV_HND",
            self._scratch,
            length,
            len(q),
            max_length,
            self.scale,
            1.0,
            1,
            chunk.query_ends,
            chunk.ends,
            block_tables=chunk.pages,
            out=out,
        )
        return out

    def _chunk_of(self, layer: int, slot: torch.Tensor, query_len: torch.Tensor, length: torch.Tensor) -> Chunk:
        """Made at a chunk's first layer; layers come in order, those of several chunks in turns."""
        known: Chunk | None = self._chunks.get(length)  # type: ignore[no-untyped-call]
        if known is not None and known.layer < layer:
            return replace(known, layer=layer)
        positions = length + self._within
        within = positions < (length + self.block - 1) // self.block * self.block
        return Chunk(
            layer,
            self._pages[slot],
            torch.nn.functional.pad(query_len, (1, 0)),
            torch.nn.functional.pad(length, (1, 0)),
            (torch.where(within, slot, self.cache.dummy_slot), torch.where(within, positions, 0)),
        )
