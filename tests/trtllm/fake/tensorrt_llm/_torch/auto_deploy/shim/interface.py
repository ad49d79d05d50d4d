"""A stand-in of AutoDeploy's: it imports the manager's class itself and makes one, with a mask of all layers."""

from __future__ import annotations

from typing import Any

from tensorrt_llm._torch.pyexecutor.py_executor import PyExecutor
from tensorrt_llm._torch.pyexecutor.resource_manager import CacheTypeCpp, KVCacheManager, ResourceManagerType


def create_autodeploy_executor(kv_cache_config: Any, **shape: Any) -> PyExecutor:
    manager = KVCacheManager(
        kv_cache_config=kv_cache_config,
        kv_cache_type=CacheTypeCpp.SELF,
        layer_mask=[True] * shape["num_layers"],
        is_estimating_kv_cache=False,
        **shape,
    )
    return PyExecutor.over({ResourceManagerType.KV_CACHE_MANAGER: manager})
