"""Prompts by vLLM's built FlashAttention-3 (Hopper), where vLLM is installed, over flat KV described as blocks.

Of vLLM only the extension ``_vllm_fa3_C`` is loaded. It takes chunks as the host knows them. With blocks of 16, 32 or
64 tokens it loads nothing past a length; with larger ones, or without a table, it loads whole tiles (measured on an
H200). Each machine checks this before the kernel is used (trust.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from trtllm_vattn.attention.affine import affine_table, as_blocks, fitting_block
from trtllm_vattn.attention.base import Span
from trtllm_vattn.cache.base import CacheShape, FlatKV, KVCache
from trtllm_vattn.vmm.tensors import upload

BLOCKS = (64, 32, 16)
HEAD_SIZES = (64, 96, 128, 192, 256)
EXTENSION = "_vllm_fa3_C*.so"
PLACES = ("vllm", "vllm_flash_attn")
"""Packages in whose folder, or a folder ``vllm_flash_attn`` of it, the extension lies."""


def extension() -> Path | None:
    """The extension's file; None if it is not installed. The packages are not imported."""
    for package in PLACES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            for found in (*Path(folder).glob(EXTENSION), *Path(folder, "vllm_flash_attn").glob(EXTENSION)):
                return found
    return None


def availability(shape: CacheShape) -> str:
    """``yes`` if the kernel serves such a cache on this machine, else the reason."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return "FlashAttention-3 needs a GPU of compute capability 9"
    if extension() is None:
        return "neither vllm nor its vllm_flash_attn is installed"
    if shape.head_dim not in HEAD_SIZES or shape.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes heads of {', '.join(map(str, HEAD_SIZES))} of bfloat16 or float16"
    return "yes"


@dataclass(frozen=True)
class Varlen:
    """Chunks as the extension takes them."""

    query_ends: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor
    most_rows: int
    most_keys: int


class VllmPrompts:
    """Causal attention of chunks over the flat KV of one cache.

    Raises ConfigError if slots are no whole number of blocks apart.
    """

    name: ClassVar[str] = "vllm-fa3"

    def __init__(self, cache: KVCache, num_heads: int, scale: float) -> None:
        first = cache.layer(0)
        assert isinstance(first, FlatKV)
        self.cache, self.num_heads, self.scale = cache, num_heads, scale
        torch.ops.load_library(str(extension()))  # type: ignore[no-untyped-call]
        self._op = torch.ops._vllm_fa3_C.fwd.default
        block = fitting_block(first, BLOCKS)
        self._table = affine_table(first, block)
        layers = range(cache.shape.num_layers)
        flat = [kv for kv in map(cache.layer, layers) if isinstance(kv, FlatKV)]
        self._pools = [as_blocks(kv, block, self._table) for kv in flat]

    def plan(self, spans: Sequence[Span]) -> Varlen:
        """What `attend` needs for a pass over these chunks, whose rows follow one another."""
        rows, lengths = np.array([(span.end - span.start, span.end) for span in spans], np.int32).T
        on_device = upload(np.stack([rows.cumsum(), lengths]).astype(np.int32), self.cache.device)
        slots = upload(np.array([span.slot for span in spans]), self.cache.device)
        ends = torch.nn.functional.pad(on_device[0], (1, 0))
        return Varlen(ends, on_device[1].contiguous(), self._table[slots], int(rows.max()), int(lengths.max()))

    def attend(self, layer: int, q: torch.Tensor, out: torch.Tensor, planned: Varlen) -> None:
        """q ``[rows of all chunks, num_heads, head_dim]`` to `out`, of the same shape, contiguous."""
        pool = self._pools[layer]
        given = {
            "q": q,
            "k": pool.k,
            "v": pool.v,
            "out": out,
            "cu_seqlens_q": planned.query_ends,
            "seqused_k": planned.lengths,
            "max_seqlen_q": planned.most_rows,
            "max_seqlen_k": planned.most_keys,
            "page_table": planned.table,
            "softmax_scale": self.scale,
            "is_causal": True,
        }
        self._op(*arguments_of(self._op, given))


WITHOUT: dict[str, Any] = {
    "window_size_left": -1,
    "window_size_right": -1,
    "attention_chunk": 0,
    "softcap": 0.0,
    "is_rotary_interleaved": True,
    "num_splits": 0,
    "sm_margin": 0,
    "cp_world_size": 1,
    "cp_rank": 0,
}
"""What the extension's arguments are where nothing is asked for; tensors and options that may be missing are None."""


def arguments_of(op: Any, given: dict[str, Any]) -> list[Any]:
    """An operator's arguments by name, in its order, which differs between vLLM's versions.

    Raises KeyError for one that is neither given nor known.
    """
    names = [argument.name for argument in op._schema.arguments]
    optional = {argument.name for argument in op._schema.arguments if str(argument.type).startswith("Optional")}
    return [given[name] if name in given else None if name in optional else WITHOUT[name] for name in names]
