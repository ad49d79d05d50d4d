"""The XQA backend: TensorRT-LLM's own decode kernel, as FlashInfer ships it, over affine block tables.

The kernel takes a pool of blocks by strides, a table, and lengths that lie on the device, and has no plan on the host.
Over a `BlockKVCache` the pool and the table are what TensorRT-LLM itself would be given; a flat cache is seen as blocks
(affine.py), so that the same kernel runs over every cache that is compared. On the host, or without FlashInfer, a
reference of the same arguments takes the kernel's place. Prompts go through another backend (cuDNN's, else torch's).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from trtllm_vattn.attention.affine import affine_table, as_blocks, fitting_block
from trtllm_vattn.attention.base import Attention
from trtllm_vattn.attention.gather import GatheringAttention
from trtllm_vattn.attention.reference import TorchAttention
from trtllm_vattn.attention.xqa_reference import xqa_reference
from trtllm_vattn.cache.base import FlatKV, KVCache, PagedKV
from trtllm_vattn.errors import ConfigError

BLOCKS = (64, 32, 16, 128)
"""Tokens a block that the kernel is built for, the best first (on the H200, 64 read 13 % faster than 32)."""
WORKSPACE = 256 << 20
ARCHITECTURES = (9, 10, 12)
"""Major compute capabilities that FlashInfer builds the kernel for."""


def why_not() -> str:
    """``yes`` where the kernel runs on this machine, else the reason."""
    if not torch.cuda.is_available():
        return "no GPU; over a cache on the host a reference in torch takes its place"
    if torch.cuda.get_device_capability()[0] not in ARCHITECTURES:
        return f"the kernel is built for compute capabilities {ARCHITECTURES}, this GPU is another"
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer-python is not installed: pip install 'trtllm-vattn[xqa]'"
    return "yes"


class XqaAttention(GatheringAttention):
    """Decode by XQA; bf16 and fp16 on a GPU, any dtype by the reference on the host.

    What is the same for all layers of a step (each lane's row of the table, and its length) is made at the step's first
    layer: layers must come in order. An idle lane reads one token of the dummy slot.

    Raises
    ------
    ConfigError
        The cache's blocks are not 16, 32, 64 or 128 tokens, its dtype is not the kernel's, or FlashInfer is missing.
    """

    name: ClassVar[str] = "xqa"

    def __init__(self, cache: KVCache, num_heads: int, scale: float | None = None) -> None:
        super().__init__(cache, num_heads, scale)
        first = cache.layer(0)
        flat = isinstance(first, FlatKV)
        self.block = fitting_block(first, BLOCKS) if isinstance(first, FlatKV) else first.k.shape[1]
        if self.block not in BLOCKS:
            raise ConfigError(f"the cache's blocks hold {self.block} tokens; XQA reads blocks of {sorted(BLOCKS)}")
        self._kernel = self._choose()
        self._context = self._choose_context()
        self._layout = "NHD" if flat else "HND"
        self._table = affine_table(first, self.block) if isinstance(first, FlatKV) else first.table
        self._dummies = self._table[cache.dummy_slot, :1].expand(self._table.shape[1]).contiguous()
        lanes = cache.shape.num_slots * cache.shape.num_kv_heads
        on_gpu = cache.device.type == "cuda"
        self._workspace = torch.zeros(WORKSPACE if on_gpu else 1, dtype=torch.uint8, device=cache.device)
        # Two counters for every pair of lane and head, in the two parts that the kernel's authors' test has.
        self._semaphores = torch.zeros(2 * lanes + 6, dtype=torch.int32, device=cache.device).view(torch.uint32)
        for layer in range(cache.shape.num_layers):
            # Idle lanes read it, before anything was written there.
            kv = cache.layer(layer)
            dummy = cache.dummy_slot if flat else int(self._dummies[0])
            kv.k[dummy, 0], kv.v[dummy, 0] = 0.0, 0.0
        self._views = [self._pool(layer) for layer in range(cache.shape.num_layers)]
        self._asked: tuple[torch.Tensor, torch.Tensor | None, int] | None = None
        self._step = (self._table, self._table)

    def _choose(self) -> Callable[..., Any]:
        """The kernel, or what stands for it on the host."""
        cache = self.cache
        if cache.device.type != "cuda":
            return xqa_reference
        if cache.shape.dtype not in (torch.bfloat16, torch.float16):
            raise ConfigError(f"XQA takes bfloat16 and float16 here, not {cache.shape.dtype}; use the torch backend")
        if why_not() != "yes":
            raise ConfigError(f"the xqa backend does not work here: {why_not()}")
        from flashinfer.xqa import xqa

        kernel: Callable[..., Any] = xqa
        return kernel

    def _choose_context(self) -> Attention | None:
        """The backend of prompts; None where a subclass has its own."""
        cache = self.cache
        if cache.device.type != "cuda" or importlib.util.find_spec("cudnn") is None:
            return TorchAttention(cache, self.num_heads, self.scale)
        from trtllm_vattn.attention.cudnn import CudnnAttention

        return CudnnAttention(cache, self.num_heads, self.scale)

    def _pool(self, layer: int) -> PagedKV:
        """K and V as the kernel takes them, with the layout that `_layout` names."""
        kv = self.cache.layer(layer)
        if isinstance(kv, FlatKV):
            return as_blocks(kv, self.block, self._table)
        return PagedKV(kv.k.transpose(1, 2), kv.v.transpose(1, 2), kv.table)

    def storages(self) -> list[torch.Tensor]:
        return [*super().storages(), *(self._context.storages() if self._context else [])]

    def decode(
        self,
        layer: int,
        q: torch.Tensor,
        lengths: torch.Tensor,
        slots: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows, counts = self._rows(layer, lengths, slots)
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

    def _rows(self, layer: int, lengths: torch.Tensor, slots: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Each lane's row of the table, int32 ``[lanes, blocks]``, and length, uint32 ``[lanes, 1]``, once a step."""
        asked = self._asked
        if asked is None or asked[0] is not lengths or asked[1] is not slots or layer <= asked[2]:
            rows = self._table[: len(lengths)] if slots is None else self._table[slots]
            rows = torch.where(lengths[:, None] > 0, rows, self._dummies)
            self._step = (rows, lengths.clamp(min=1)[:, None].to(torch.int32).contiguous().view(torch.uint32))
        self._asked = (lengths, slots, layer)
        return self._step

    def prefill(
        self,
        layer: int,
        q: torch.Tensor,
        slot: torch.Tensor,
        query_len: torch.Tensor,
        length: torch.Tensor,
        max_length: int,
    ) -> torch.Tensor:
        assert self._context is not None
        return self._context.prefill(layer, q, slot, query_len, length, max_length)
