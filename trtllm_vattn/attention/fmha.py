"""The xqa-fmha backend: both of TensorRT-LLM's kernels over the block layout, XQA for decode, FMHAv2 for prompts.

FMHAv2 finds K of page p of a pool at ``2 p`` pages from its start and V right behind it (FlashInfer's way of telling
it). A block of ours holds the K and V of several layers, so a layer's pool starts at that layer of the first block, and
block b is its page ``b × layers_per_range``: one table for all layers, made once. The kernel's bulk loads take whole
blocks, up to the one of a sequence's last token; the cache never maps a part of one.
"""

from __future__ import annotations

from typing import ClassVar

import torch

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
            torch.nn.functional.pad(query_len, (1, 0)),
            torch.nn.functional.pad(length, (1, 0)),
            block_tables=self._pages[slot],
            out=out,
        )
        return out
