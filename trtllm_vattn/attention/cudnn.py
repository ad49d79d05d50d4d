"""The cuDNN backend: dense and block-table attention of one library, with lengths on the device.

On flat KV a lane is a slot and K and V are strided tensors. Where lanes are not slots, the same memory is seen as
blocks behind an affine table: block j of slot s is block ``s * blocks_per_slot + j``. Nothing past a length is loaded
and nothing of a lane of length 0 (tests/attention shows both on the card, over unmapped pages).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch

from trtllm_vattn.attention.affine import affine_table, as_blocks, fitting_block
from trtllm_vattn.attention.base import Chunks
from trtllm_vattn.attention.cudnn_plan import Operand, Plan, PlanShape
from trtllm_vattn.attention.gather import GatheringAttention
from trtllm_vattn.attention.packed import Packed
from trtllm_vattn.cache.base import FlatKV, KVCache, PagedKV
from trtllm_vattn.errors import ConfigError

BLOCK = 16
"""Tokens of the blocks that flat memory is seen as where lanes are not slots."""


class CudnnAttention(GatheringAttention):
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
        self._table: torch.Tensor | None = None
        self._tables: dict[int, torch.Tensor] = {}
        self._packed: WeakKeyDictionary[Chunks, Packed] = WeakKeyDictionary()
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

    def prefill(
        self,
        layer: int,
        q: torch.Tensor,
        slot: torch.Tensor,
        query_len: torch.Tensor,
        length: torch.Tensor,
        max_length: int,
    ) -> torch.Tensor:
        # The kernel loads whole tiles of keys, past the length too; the tiles must be mapped and finite. So it is given
        # a copy. Its extent is rounded up, and the count of queries, so that few shapes are planned for.
        extent = min(self.cache.shape.max_seq_len, max(128, 1 << (max_length - 1).bit_length()))
        k, v = self._gather(layer, slot, length, extent)
        rows = 1 << (len(q) - 1).bit_length()
        shape = self._flat_shape(FlatKV(k, v), 1, rows=rows, causal=True)
        padded = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, rows - len(q))) if rows > len(q) else q
        return self._run(shape, padded, k, v, query_len, length)[: len(q)]

    def prefill_together(self, layer: int, q: torch.Tensor, chunks: Chunks) -> torch.Tensor:
        packed = self._packed.get(chunks)
        if packed is None:
            packed = self._packed[chunks] = Packed.of(chunks.spans, q, self.cache)
        # A copy, for the reason that `prefill` has one.
        k, v = self._rows_at(layer, packed.slots, packed.tokens)
        _, heads, dim = k.shape
        kv_shape = (packed.lanes, heads, packed.most_keys, dim)
        strides = (heads * packed.most_keys * dim, dim, heads * dim, 1)
        shape = PlanShape(packed.lanes, packed.most_rows, self.num_heads, kv_shape, strides, True, packed=True)
        more = {
            Operand.QUERY_OFFSETS: packed.query_offsets,
            Operand.OUT_OFFSETS: packed.query_offsets,
            Operand.KEY_OFFSETS: packed.key_offsets,
            Operand.VALUE_OFFSETS: packed.key_offsets,
        }
        return self._run(shape, q, k, v, packed.query_lengths, packed.lengths, more)

    def _rows(self, table: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """A table's rows of some slots, in a buffer that all layers share."""
        rows = self._tables.get(len(slots))
        if rows is None:
            rows = self._tables[len(slots)] = table.new_empty(len(slots), table.shape[1])
        return torch.index_select(table, 0, slots, out=rows)

    def _as_blocks(self, kv: FlatKV) -> PagedKV:
        """Flat memory as blocks of `BLOCK` tokens behind the affine table; slots must be whole blocks apart."""
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
