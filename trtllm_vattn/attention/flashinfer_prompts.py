"""Prompts by FlashInfer's FlashAttention-3 kernel (Hopper), over flat KV described as blocks (affine.py).

Every pass is planned on the host, so the kernel serves passes that are not captured. FlashInfer compiles it on the
machine, which takes minutes: `compile_kernel`, which ``trtllm-vattn warm-up`` calls, does so once; a request never
does. The kernel loads nothing past a length with blocks of 16 or 64 tokens (measured on an H200); each machine checks
this before it is used (trust.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from trtllm_vattn.attention.affine import as_blocks, fitting_block
from trtllm_vattn.attention.base import Span
from trtllm_vattn.cache.base import CacheShape, FlatKV, KVCache

BLOCKS = (64, 16)
HEAD_SIZES = (64, 128, 256)
WORKSPACE = 128 << 20
COMMAND = "trtllm-vattn warm-up"


def availability(shape: CacheShape) -> str:
    """``yes`` if the kernel is compiled for such a cache and runs on this machine, else the reason."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return "FlashAttention-3 needs a GPU of compute capability 9"
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer-python is not installed: pip install 'trtllm-vattn[xqa]'"
    if shape.head_dim not in HEAD_SIZES or shape.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes heads of {', '.join(map(str, HEAD_SIZES))} of bfloat16 or float16"
    if not is_compiled(shape.head_dim, shape.dtype):
        return f"it is not compiled yet for heads of {shape.head_dim} of {shape.dtype}; run `{COMMAND}`, once"
    return "yes"


def _spec(head_dim: int, dtype: torch.dtype) -> Any:
    from flashinfer.jit.attention.modules import gen_batch_prefill_module

    return gen_batch_prefill_module("fa3", dtype, dtype, dtype, torch.int32, head_dim, head_dim, 0, False, False, False)


def is_compiled(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether FlashInfer has the kernel for such heads on this machine."""
    spec = _spec(head_dim, dtype)
    return bool(getattr(spec, "is_compiled", False) or getattr(spec, "is_aot", False))


def compile_kernel(head_dim: int, dtype: torch.dtype) -> None:
    """Compile the kernel for such heads; about two minutes, and nothing to do the next time."""
    _spec(head_dim, dtype).build_and_load()


class FlashInferPrompts:
    """Causal attention of chunks over the flat KV of one cache.

    Raises ConfigError if slots are no whole number of blocks apart.
    """

    name: ClassVar[str] = "flashinfer-fa3"

    def __init__(self, cache: KVCache, num_heads: int, scale: float) -> None:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        first = cache.layer(0)
        assert isinstance(first, FlatKV)
        self.cache, self.num_heads, self.scale = cache, num_heads, scale
        self._block = fitting_block(first, BLOCKS)
        self._per_slot = first.k.stride(0) // (self._block * first.k.stride(1))
        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=cache.device)
        self._wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa3")
        nothing = torch.empty(0, dtype=torch.int32, device=cache.device)
        layers = range(cache.shape.num_layers)
        flat = [kv for kv in map(cache.layer, layers) if isinstance(kv, FlatKV)]
        self._pools = [as_blocks(kv, self._block, nothing) for kv in flat]

    def plan(self, spans: Sequence[Span]) -> Any:
        """What `attend` needs for a pass over these chunks, whose rows follow one another."""
        block, shape = self._block, self.cache.shape
        rows = np.array([span.end - span.start for span in spans])
        blocks = np.array([-(-span.end // block) for span in spans])
        indices = np.concatenate(
            [span.slot * self._per_slot + np.arange(count) for span, count in zip(spans, blocks, strict=True)]
        )
        last = np.array([(span.end - 1) % block + 1 for span in spans])
        on_host = [np.r_[0, rows.cumsum()], np.r_[0, blocks.cumsum()], indices, last]
        self._wrapper.plan(
            *(torch.from_numpy(x.astype(np.int32)) for x in on_host),
            self.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            block,
            causal=True,
            sm_scale=self.scale,
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype,
        )
        return self._wrapper

    def attend(self, layer: int, q: torch.Tensor, out: torch.Tensor, planned: Any) -> None:
        """q ``[rows of all chunks, num_heads, head_dim]`` to `out`, of the same shape, contiguous."""
        pool = self._pools[layer]
        planned.run(q, (pool.k, pool.v), out=out)
