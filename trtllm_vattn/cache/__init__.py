"""KV caches that keep one contract (`base.py`): contiguous, paged, and at fixed addresses (`KVCacheManager`).

May import `memory`, `vmm` and `errors`.
"""

from trtllm_vattn.cache.base import CacheShape, KVCache
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.select import make_cache

__all__ = ["CacheShape", "KVCache", "KVCacheManager", "make_cache"]
