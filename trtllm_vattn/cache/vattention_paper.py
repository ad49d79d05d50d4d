"""vAttention as its paper has it (arXiv 2405.04437), to compare with: pages of 2 MiB, one handle at a time.

K and V of every layer are tensors of their own, so a sequence holds a page in each of ``2 × num_layers`` ranges however
short it is, and a page is created, mapped and made accessible by calls of its own. Pages of an ended sequence stay for
the next one, and those of the coming step are mapped beside the running one.
"""

from __future__ import annotations

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.config import CacheConfig, Layout
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.vmm.base import Driver

PAPER = CacheConfig(layout=Layout.TENSORS, extent_classes=1, batch_access=False, lookahead=1)


def vattention_paper(shape: CacheShape, driver: Driver, budget: int | None = None) -> KVCacheManager:
    """A `KVCacheManager` configured as the paper's vAttention."""
    return KVCacheManager(shape, driver, budget, config=PAPER)
