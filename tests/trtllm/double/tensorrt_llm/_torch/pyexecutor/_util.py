"""Stand-ins of what chooses and makes managers."""

from __future__ import annotations

from typing import Any

from tensorrt_llm._torch.pyexecutor.py_executor import PyExecutor
from tensorrt_llm._torch.pyexecutor.resource_manager import CacheTypeCpp, KVCacheManager

__all__ = ["KVCacheManager", "KvCacheCreator", "PyExecutor", "get_kv_cache_manager_cls"]


def get_kv_cache_manager_cls(model_config: Any) -> type:
    return getattr(model_config, "manager", None) or KVCacheManager


class KvCacheCreator:
    """Makes the manager of a model; estimates its size first, unless told otherwise."""

    def __init__(self, *, model_config: Any, llm_args: Any, kv_cache_config: Any, **shape: Any) -> None:
        self._kv_cache_config, self._shape = kv_cache_config, shape
        self._kv_cache_manager_cls = get_kv_cache_manager_cls(model_config)

    def try_prepare_estimation(self) -> bool:
        self._kv_cache_config.max_tokens = 256
        return True

    def build_managers(self, resources: dict[str, Any], estimating_kv_cache: bool = False) -> None:
        resources["kv"] = self._kv_cache_manager_cls(
            self._kv_cache_config, CacheTypeCpp.SELF, is_estimating_kv_cache=estimating_kv_cache, **self._shape
        )
