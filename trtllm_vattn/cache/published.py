"""vAttention as published (arXiv 2405.04437), to compare with: a page a layer, 2 MiB pages, one handle at a time.

K and V of every layer are tensors of their own, so a sequence holds a page in each of ``2 × num_layers`` ranges however
short it is, and a page is created, mapped and made accessible by calls of its own. Pages of an ended sequence stay for
the next one, and those of the coming step are mapped beside the running one, as the paper has it.
"""

from __future__ import annotations

from typing import ClassVar

from trtllm_vattn.cache.base import CacheShape, FlatKV
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.memory.layout import SlotLayout
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.tensors import strided


class PublishedVattention(KVCacheManager):
    """`KVCacheManager` with the paper's layout and its way to map; it keeps the next step's token mapped ahead."""

    extent_classes: ClassVar[int] = 1
    one_by_one: ClassVar[bool] = True

    def __init__(self, shape: CacheShape, driver: Driver, budget: int | None = None) -> None:
        super().__init__(shape, driver, budget, lookahead=1)

    def _make_layout(self, layers_per_range: int | None) -> SlotLayout:
        shape = self.shape
        return SlotLayout(
            num_layers=shape.num_layers * shape.kv_factor,
            layers_per_range=1,
            layer_token_bytes=shape.layer_token_bytes // shape.kv_factor,
            max_seq_len=shape.max_seq_len,
            num_slots=shape.num_slots,
            granule=self.driver.granularity(),
        )

    def _view(self, layer: int) -> FlatKV:
        shape, itemsize = self.shape, self.shape.dtype.itemsize
        size = (shape.num_slots + 1, shape.max_seq_len, shape.num_kv_heads, shape.head_dim)
        strides = (self.layout.slot_stride // itemsize, self.layout.row_bytes // itemsize, shape.head_dim, 1)
        first = layer * shape.kv_factor
        k, v = (
            strided(self._flat[index], shape.dtype, size, strides) for index in (first, first + shape.kv_factor - 1)
        )
        return FlatKV(k, v)
