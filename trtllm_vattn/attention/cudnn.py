"""The cuDNN backend: dense and block-table attention of one library, with lengths on the device.

On flat KV a lane is a slot and K and V are strided tensors; where lanes are not slots, int64 ragged offsets say where
each lane's slot begins. It loads nothing past a length and nothing of a lane of length 0 (tests/attention shows both
on the card, over unmapped pages).
"""

from __future__ import annotations

from typing import ClassVar

import torch

from trtllm_vattn.attention.cudnn_plan import Operand, Plan, PlanShape
from trtllm_vattn.attention.write import WritingAttention
from trtllm_vattn.cache.base import FlatKV, KVCache, PagedKV
from trtllm_vattn.errors import ConfigError


class CudnnAttention(WritingAttention):
    """Attention by nvidia-cudnn-frontend; bf16 and fp16 on a GPU.

    A shape is planned at its first call, which must be outside a capture; the runner's warm-up sees to that.
    """

    name: ClassVar[str] = "cudnn"

    def __init__(self, cache: KVCache, num_heads: int, scale: float | None = None) -> None:
        super().__init__(cache, num_heads, scale)
        if cache.device.type != "cuda":
            raise ConfigError(f"the cudnn backend needs a GPU, the cache is on {cache.device}; use the torch backend")
        if cache.shape.dtype not in (torch.bfloat16, torch.float16):
            raise ConfigError(f"the cudnn backend takes bfloat16 and float16, not {cache.shape.dtype}; use torch")
        try:
            import cudnn
        except ImportError as error:
            raise ConfigError(
                "the cudnn backend needs nvidia-cudnn-frontend: pip install 'trtllm-vattn[cuda]'"
            ) from error
        self._cudnn = cudnn
        self._handle = cudnn.create_handle()
        self._plans: dict[PlanShape, Plan] = {}
        self._ones = torch.ones(cache.shape.num_slots, dtype=torch.int32, device=cache.device)

    def decode(
        self, layer: int, q: torch.Tensor, lengths: torch.Tensor, slots: torch.Tensor | None = None
    ) -> torch.Tensor:
        kv = self.cache.layer(layer)
        lanes = len(q)
        if isinstance(kv, FlatKV):
            shape = self._flat_shape(kv, lanes, rows=1, causal=False, ragged=slots is not None)
            extra = {} if slots is None else {Operand.OFFSETS: self._offsets(kv, slots)}
        else:
            shape = self._paged_shape(kv, lanes, rows=1, causal=False)
            extra = {Operand.TABLE: kv.table if slots is None else kv.table[slots]}
        return self._run(shape, q, kv.k, kv.v, self._ones, lengths, extra)

    def prefill(
        self,
        layer: int,
        q: torch.Tensor,
        slot: int,
        query_len: torch.Tensor,
        length: torch.Tensor,
        max_length: int,
    ) -> torch.Tensor:
        kv = self.cache.layer(layer)
        if isinstance(kv, FlatKV):
            shape = self._flat_shape(kv, 1, rows=len(q), causal=True, ragged=False)
            return self._run(shape, q, kv.k[slot], kv.v[slot], query_len, length, {})
        shape = self._paged_shape(kv, 1, rows=len(q), causal=True)
        return self._run(shape, q, kv.k, kv.v, query_len, length, {Operand.TABLE: kv.table[slot]})

    def _flat_shape(self, kv: FlatKV, lanes: int, rows: int, causal: bool, ragged: bool) -> PlanShape:
        of_slot, of_token, of_head, of_dim = kv.k.stride()
        _, tokens, heads, dim = kv.k.shape
        return PlanShape(
            lanes,
            rows,
            self.num_heads,
            (lanes, heads, tokens, dim),
            (of_slot, of_head, of_token, of_dim),
            causal,
            ragged,
        )

    def _paged_shape(self, kv: PagedKV, lanes: int, rows: int, causal: bool) -> PlanShape:
        of_block, of_token, of_head, of_dim = kv.k.stride()
        blocks, tokens, heads, dim = kv.k.shape
        return PlanShape(
            lanes,
            rows,
            self.num_heads,
            (blocks, heads, tokens, dim),
            (of_block, of_head, of_token, of_dim),
            causal,
            blocks_per_lane=kv.table.shape[1],
        )

    def _offsets(self, kv: FlatKV, slots: torch.Tensor) -> torch.Tensor:
        """Where each lane begins, in elements, and an end that lengths make meaningless."""
        begins = slots * kv.k.stride(0)
        return torch.cat([begins, begins[-1:]])

    def _run(
        self,
        shape: PlanShape,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        query_lengths: torch.Tensor,
        lengths: torch.Tensor,
        extra: dict[Operand, torch.Tensor],
    ) -> torch.Tensor:
        plan = self._plans.get(shape)
        if plan is None:
            plan = Plan(self._cudnn, self._handle, shape, self.cache.shape.dtype, self.scale)
            self._plans[shape] = plan
        q = q.contiguous()
        out = torch.zeros_like(q) if shape.causal else torch.empty_like(q)
        tensors = {
            Operand.Q: q,
            Operand.K: k,
            Operand.V: v,
            Operand.OUT: out,
            Operand.QUERY_LENGTHS: query_lengths,
            Operand.LENGTHS: lengths,
            **extra,
        }
        self._cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream(q.device).cuda_stream)
        plan.execute({int(operand): tensor.data_ptr() for operand, tensor in tensors.items()})
        return out
