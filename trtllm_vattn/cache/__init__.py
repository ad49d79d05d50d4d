"""KV caches that keep one contract (`base.py`): contiguous, paged, and at fixed addresses (`KVCacheManager`).

May import `memory`, `vmm` and `errors`.
"""
