"""The cudnn backend: cuDNN's attention over flat KV and over block tables, with lengths on the device.

Over flat KV, K and V are strided tensors and lane i is slot i. If lanes are not slots, flat KV is described as blocks
behind an affine table (affine.py). The decode kernels load nothing past a length and nothing of a lane of length 0;
tests/attention shows this on a GPU over unmapped pages.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import ClassVar

import torch

from trtllm_vattn.attention.affine import affine_table, as_blocks, fitting_block
from trtllm_vattn.attention.base import PackedPrefill, PrefillChunk
from trtllm_vattn.attention.cudnn_plan import Operand, Plan, PlanShape
from trtllm_vattn.attention.gather import GatheringAttention
from trtllm_vattn.attention.packed import PackedInputs
from trtllm_vattn.cache.base import FlatKV, KVCache, PagedKV
from trtllm_vattn.errors import ConfigError

BLOCK = 16
"""Tokens a block, if flat KV is described as blocks."""


def availability() -> str:
    """``yes`` if the backend works on this machine, else the reason."""
    if not torch.cuda.is_available():
        return "no GPU"
    if importlib.util.find_spec("cudnn") is None:
        return "nvidia-cudnn-frontend is not installed: pip install 'trtllm-vattn[cuda]'"
    return "yes"


class CudnnAttention(GatheringAttention):
    """Attention by nvidia-cudnn-frontend; bf16 and fp16 on a GPU.

    The first call of each shape builds a plan and must come outside of a capture: run a step once before capturing it.

    Raises
    ------
    ConfigError
        The cache is on the host, its dtype is another, or nvidia-cudnn-frontend is missing.
    """

    name: ClassVar[str] = "cudnn"
    # Not even the same call gives the same bits again: with 32 lanes and more, up to 99 of 100 differed (H200,
    # scripts/results/h200/decode_repeats.txt).
    batch_invariant = False

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
        self._table: torch.Tensor | None = None
        self._tables: dict[int, torch.Tensor] = {}
        self._ones = torch.ones(cache.shape.num_slots, dtype=torch.int32, device=cache.device)

    def storages(self) -> list[torch.Tensor]:
        return [*super().storages(), *self._tables.values(), *(plan.workspace for plan in self._plans.values())]

    def decode(
        self,
        layer: int,
        q: torch.Tensor,
        lengths: torch.Tensor,
        slots: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        kv = self.cache.layer(layer)
        if isinstance(kv, FlatKV):
            if slots is None:
                shape = self._flat_shape(kv, len(q), rows=1, causal=False)
                return self._run(shape, q, kv.k, kv.v, self._ones, lengths, out=out)
            kv = self._as_blocks(kv)
        shape = self._paged_shape(kv, len(q))
        table = kv.table if slots is None else self._rows(kv.table, slots)
        return self._run(shape, q, kv.k, kv.v, self._ones, lengths, {Operand.TABLE: table}, out)

    def prefill(self, layer: int, q: torch.Tensor, chunk: PrefillChunk) -> torch.Tensor:
        # The kernel loads whole tiles of keys, also past the length, and they must be mapped and finite: so it reads a
        # copy. The copy's extent and the number of queries are powers of two, so that there are few plans.
        extent = min(self.cache.shape.max_seq_len, max(128, 1 << (chunk.max_length - 1).bit_length()))
        k, v = self._gather(layer, chunk.slot, chunk.length, extent)
        rows = 1 << (len(q) - 1).bit_length()
        shape = self._flat_shape(FlatKV(k, v), 1, rows=rows, causal=True)
        padded = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, rows - len(q))) if rows > len(q) else q
        return self._run(shape, padded, k, v, chunk.query_len, chunk.length)[: len(q)]

    def prefill_packed(self, layer: int, q: torch.Tensor, packed: PackedPrefill) -> torch.Tensor:
        inputs = self._once_a_step(partial(PackedInputs.of, packed.spans, q, self.cache), packed)
        # A copy, for the same reason as in `prefill`.
        k, v = self._rows_at(layer, inputs.slots, inputs.tokens)
        _, heads, dim = k.shape
        kv_shape = (inputs.lanes, heads, inputs.most_keys, dim)
        strides = (heads * inputs.most_keys * dim, dim, heads * dim, 1)
        shape = PlanShape(inputs.lanes, inputs.most_rows, self.num_heads, kv_shape, strides, True, packed=True)
        more = {
            Operand.QUERY_OFFSETS: inputs.query_offsets,
            Operand.OUT_OFFSETS: inputs.query_offsets,
            Operand.KEY_OFFSETS: inputs.key_offsets,
            Operand.VALUE_OFFSETS: inputs.key_offsets,
        }
        return self._run(shape, q, k, v, inputs.query_lengths, inputs.lengths, more)

    def _rows(self, table: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """A table's rows for some slots, in a buffer that all layers share."""
        rows = self._tables.get(len(slots))
        if rows is None:
            rows = self._tables[len(slots)] = table.new_empty(len(slots), table.shape[1])
        return torch.index_select(table, 0, slots, out=rows)

    def _as_blocks(self, kv: FlatKV) -> PagedKV:
        """Flat KV as blocks of `BLOCK` tokens. Raises ConfigError if slots are no whole number of blocks apart."""
        block = fitting_block(kv, [BLOCK])
        if self._table is None:
            self._table = affine_table(kv, block)
        return as_blocks(kv, block, self._table)

    def _flat_shape(self, kv: FlatKV, lanes: int, rows: int, causal: bool) -> PlanShape:
        of_slot, of_token, of_head, of_dim = kv.k.stride()
        _, tokens, heads, dim = kv.k.shape
        return PlanShape(
            lanes, rows, self.num_heads, (lanes, heads, tokens, dim), (of_slot, of_head, of_token, of_dim), causal
        )

    def _paged_shape(self, kv: PagedKV, lanes: int) -> PlanShape:
        of_block, of_token, of_head, of_dim = kv.k.stride()
        blocks, tokens, heads, dim = kv.k.shape
        strides = (of_block, of_head, of_token, of_dim)
        return PlanShape(
            lanes, 1, self.num_heads, (blocks, heads, tokens, dim), strides, False, blocks_per_lane=kv.table.shape[1]
        )

    def _run(
        self,
        shape: PlanShape,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        query_lengths: torch.Tensor,
        lengths: torch.Tensor,
        more: Mapping[Operand, torch.Tensor] = MappingProxyType({}),
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        plan = self._plans.get(shape)
        if plan is None:
            plan = Plan(self._cudnn, self._handle, shape, self.cache.shape.dtype, self.scale)
            self._plans[shape] = plan
        q = q.contiguous()
        if out is None:
            out = torch.zeros_like(q) if shape.causal else torch.empty_like(q)
        tensors = {
            Operand.Q: q,
            Operand.K: k,
            Operand.V: v,
            Operand.OUT: out,
            Operand.QUERY_LENGTHS: query_lengths,
            Operand.LENGTHS: lengths,
            **more,
        }
        self._cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream(q.device).cuda_stream)
        plan.execute({int(operand): tensor.data_ptr() for operand, tensor in tensors.items()})
        return out
