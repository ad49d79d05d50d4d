"""Stand-ins of what chooses and makes managers."""

from __future__ import annotations

from typing import Any

from tensorrt_llm._torch.pyexecutor.kv_cache_manager_v2 import KVCacheManagerV2
from tensorrt_llm._torch.pyexecutor.py_executor import PyExecutor
from tensorrt_llm._torch.pyexecutor.resource_manager import CacheTypeCpp, KVCacheManager, ResourceManagerType
from tensorrt_llm.version import MINOR

__all__ = ["KVCacheManager", "KvCacheCreator", "PyExecutor", "create_py_executor", "get_kv_cache_manager_cls"]

ESTIMATE = 900_000
"""Bytes that measuring finds free for V2."""

if MINOR < 3:

    def get_kv_cache_manager_cls(model_config: Any) -> type:
        return getattr(model_config, "manager", None) or KVCacheManager

else:

    def get_kv_cache_manager_cls(
        model_config: Any, kv_cache_config: Any, is_disagg: bool = False, cache_transceiver_config: Any = None
    ) -> type:
        return getattr(model_config, "manager", None) or KVCacheManager


class KvCacheCreator:
    """Makes the manager of a model; estimates its size first, unless told otherwise."""

    def __init__(
        self,
        *,
        model_config: Any,
        llm_args: Any,
        kv_cache_config: Any,
        is_disagg: bool = False,
        kv_connector_manager: Any = None,
        max_beam_width: int = 1,
        **shape: Any,
    ) -> None:
        self._kv_cache_config, self._shape, self._is_disagg = kv_cache_config, shape, is_disagg
        self._max_gpu_total_bytes_in = kv_cache_config.max_gpu_total_bytes
        self._kv_connector_manager, self._max_beam_width = kv_connector_manager, max_beam_width
        self._kv_cache_manager_cls = self._get_model_kv_cache_manager_cls(model_config)
        self._is_kv_cache_manager_v2 = issubclass(self._kv_cache_manager_cls, KVCacheManagerV2)

    def _get_model_kv_cache_manager_cls(self, model_config: Any) -> type:
        if MINOR < 3:
            return get_kv_cache_manager_cls(model_config)
        chosen = get_kv_cache_manager_cls(model_config, self._kv_cache_config, is_disagg=self._is_disagg)
        return self._fallback_if_unsupported_kv_cache_manager_v2(chosen, model_config, self._kv_cache_config)

    if MINOR >= 3:

        def _fallback_if_unsupported_kv_cache_manager_v2(
            self, kv_cache_manager_cls: type, model_config: Any, kv_cache_config: Any = None
        ) -> type:
            """Falls back with a line in the log."""
            if issubclass(kv_cache_manager_cls, KVCacheManagerV2) and (
                self._kv_connector_manager is not None or self._max_beam_width > 1
            ):
                return KVCacheManager
            return kv_cache_manager_cls

    def try_prepare_estimation(self) -> bool:
        self._kv_cache_config.max_tokens = 256
        if self._is_kv_cache_manager_v2:
            given = self._max_gpu_total_bytes_in
            self._kv_cache_config.max_gpu_total_bytes = min(ESTIMATE, given) if given else ESTIMATE
        return True

    def configure_kv_cache_capacity(self, py_executor: Any) -> None:
        py_executor.is_warmup = True
        py_executor.start_worker()
        py_executor.is_warmup = False
        self._kv_cache_config.max_tokens = None
        given = self._max_gpu_total_bytes_in
        self._kv_cache_config.max_gpu_total_bytes = min(ESTIMATE, given) if given else ESTIMATE

    def build_managers(self, resources: dict[Any, Any], estimating_kv_cache: bool = False) -> None:
        resources[ResourceManagerType.KV_CACHE_MANAGER] = self._kv_cache_manager_cls(
            self._kv_cache_config,
            CacheTypeCpp.SELF,
            is_estimating_kv_cache=estimating_kv_cache,
            kv_connector_manager=self._kv_connector_manager,
            max_beam_width=self._max_beam_width,
            **self._shape,
        )

    def teardown_managers(self, resources: dict[Any, Any]) -> None:
        resources.pop(ResourceManagerType.KV_CACHE_MANAGER).shutdown()


def create_py_executor(creator: KvCacheCreator) -> tuple[PyExecutor, bool]:
    """What the function of that name does with a creator; an executor, and whether the size was estimated first."""
    estimating = creator.try_prepare_estimation()
    resources: dict[Any, Any] = {}
    creator.build_managers(resources, estimating)
    executor = PyExecutor.over(resources)
    if estimating:
        creator.configure_kv_cache_capacity(executor)
        creator.teardown_managers(resources)
        creator.build_managers(resources, False)
        executor = PyExecutor.over(resources)
    executor.start_worker()
    return executor, estimating
