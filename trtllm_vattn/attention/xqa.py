"""The xqa backend: XQA, TensorRT-LLM's decode kernel, as FlashInfer ships it, over block tables.

The kernel takes a pool of blocks with strides, a block table, and lengths on the device; the host plans nothing. A
`BlockKVCache` has the pool and the table as TensorRT-LLM has them. Flat KV is described as blocks (affine.py), so that
the same kernel runs over all caches. On the host a reference with the same arguments replaces the kernel.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch

from trtllm_vattn.attention.affine import affine_table, as_blocks, fitting_block
from trtllm_vattn.attention.decode_only import DecodeOnlyAttention
from trtllm_vattn.attention.gather import GatheringAttention
from trtllm_vattn.attention.xqa_reference import xqa_reference
from trtllm_vattn.cache.base import FlatKV, KVCache, PagedKV
from trtllm_vattn.errors import ConfigError

BLOCKS = (64, 32, 16, 128)
"""Tokens a block that the kernel supports, fastest first (on an H200, 64 read 13 % faster than 32)."""
WORKSPACE = 256 << 20
ARCHITECTURES = (9, 10, 12)
"""Major compute capabilities for which FlashInfer builds the kernel."""


def availability() -> str:
    """``yes`` if the kernel runs on this machine, else the reason."""
    if not torch.cuda.is_available():
        return "no GPU; over a cache on the host a reference in torch takes its place"
    if torch.cuda.get_device_capability()[0] not in ARCHITECTURES:
        return f"the kernel is built for compute capabilities {ARCHITECTURES}, this GPU is another"
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer-python is not installed: pip install 'trtllm-vattn[xqa]'"
    return "yes"


class XqaDecode(GatheringAttention):
    """Decode by XQA; bf16 and fp16 on a GPU, any dtype by the reference on the host.

    Each lane's table row and its length are computed once a step. An idle lane reads one token of the dummy slot.

    Raises
    ------
    ConfigError
        The cache's blocks are not 16, 32, 64 or 128 tokens, its dtype is not the kernel's, or FlashInfer is missing.
    """

    def __init__(self, cache: KVCache, num_heads: int, scale: float | None = None) -> None:
        super().__init__(cache, num_heads, scale)
        first = cache.layer(0)
        flat = isinstance(first, FlatKV)
        self.block = fitting_block(first, BLOCKS) if isinstance(first, FlatKV) else first.k.shape[1]
        if self.block not in BLOCKS:
            raise ConfigError(f"the cache's blocks hold {self.block} tokens; XQA reads blocks of {sorted(BLOCKS)}")
        self._kernel = self._choose_kernel()
        self._layout = "NHD" if flat else "HND"
        self._table = affine_table(first, self.block) if isinstance(first, FlatKV) else first.table
        self._dummies = self._table[cache.dummy_slot, :1].expand(self._table.shape[1]).contiguous()
        lanes = cache.shape.num_slots * cache.shape.num_kv_heads
        on_gpu = cache.device.type == "cuda"
        self._workspace = torch.zeros(WORKSPACE if on_gpu else 1, dtype=torch.uint8, device=cache.device)
        # Two counters for each lane and head, and the padding that FlashInfer's own test of the kernel has.
        self._semaphores = torch.zeros(2 * lanes + 6, dtype=torch.int32, device=cache.device).view(torch.uint32)
        for layer in range(cache.shape.num_layers):
            # Idle lanes read the dummy token, which nothing may have written yet.
            kv = cache.layer(layer)
            dummy = cache.dummy_slot if flat else int(self._dummies[0])
            kv.k[dummy, 0], kv.v[dummy, 0] = 0.0, 0.0
        self._views = [self._pool(layer) for layer in range(cache.shape.num_layers)]

    def _choose_kernel(self) -> Callable[..., Any]:
        """The kernel, or on the host its reference."""
        cache = self.cache
        if cache.device.type != "cuda":
            return xqa_reference
        if cache.shape.dtype not in (torch.bfloat16, torch.float16):
            raise ConfigError(f"XQA takes bfloat16 and float16 here, not {cache.shape.dtype}; use the torch backend")
        if availability() != "yes":
            raise ConfigError(f"the xqa backend does not work here: {availability()}")
        from flashinfer.xqa import xqa

        kernel: Callable[..., Any] = xqa
        return kernel

    def _pool(self, layer: int) -> PagedKV:
        """K and V as the kernel takes them, in the layout that `_layout` names."""
        kv = self.cache.layer(layer)
        if isinstance(kv, FlatKV):
            return as_blocks(kv, self.block, self._table)
        return PagedKV(kv.k.transpose(1, 2), kv.v.transpose(1, 2), kv.table)

    def decode(
        self,
        layer: int,
        q: torch.Tensor,
        lengths: torch.Tensor,
        slots: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows, counts = self._once_a_step(partial(self._rows, lengths, slots), lengths, slots)
        kv, q = self._views[layer], q.contiguous()
        out = torch.empty_like(q) if out is None else out
        self._kernel(
            q[:, None],
            kv.k,
            kv.v,
            rows,
            counts,
            out[:, None],
            self._workspace,
            self._semaphores,
            self.cache.shape.num_kv_heads,
            self.block,
            q_scale=self.scale * q.shape[2] ** 0.5,
            kv_layout=self._layout,
        )
        return out

    def _rows(self, lengths: torch.Tensor, slots: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Each lane's row of the table, int32 ``[lanes, blocks]``, and its length, uint32 ``[lanes, 1]``."""
        rows = self._table[: len(lengths)] if slots is None else self._table[slots]
        rows = torch.where(lengths[:, None] > 0, rows, self._dummies)
        return rows, lengths.clamp(min=1)[:, None].to(torch.int32).contiguous().view(torch.uint32)


class XqaAttention(DecodeOnlyAttention, XqaDecode):
    """XQA for decode; prompts go through `default_attention`."""

    name: ClassVar[str] = "xqa"
