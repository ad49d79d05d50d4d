"""`KVCacheManagerV2` under a budget; nothing else of it is changed.

V2 has virtual memory of its own: a pool group's base never changes while the group grows and shrinks at its tail. It
gets a budget in bytes by official means: at start from ``kv_cache_config.max_gpu_total_bytes``, later from
``impl.resize``, which wants no active request. The hook `_build_cache_config` shows the quota; its arguments differ
between versions and are passed on unread.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trtllm import elastic
from trtllm_vattn.trtllm.config import TrtllmConfig

GPU_LEVEL = 0
"""The first cache tier."""


def is_v2(chosen: Any) -> bool:
    """Whether a class is V2 or a subclass of it."""
    return any(each.__name__ == "KVCacheManagerV2" for each in chosen.__mro__)


def limit_bytes(config: Any, budget: int) -> None:
    """Set ``max_gpu_total_bytes`` of a `KvCacheConfig` to a budget, or leave it where it is lower. Raises ConfigError
    where this version has no such field."""
    if not hasattr(config, "max_gpu_total_bytes"):
        raise ConfigError(
            "kv_cache_config of the installed TensorRT-LLM has no max_gpu_total_bytes, so KVCacheManagerV2 cannot be "
            "given a budget: leave the budget out, or set kv_cache_config.use_kv_cache_manager_v2: false"
        )
    given = config.max_gpu_total_bytes or 0
    config.max_gpu_total_bytes = min(given, budget) if given > 0 else budget


class V2Budget:
    """The GPU quota of one V2 manager, with the methods by which `ManagerMemory` sets a budget."""

    quota: int
    """Bytes; known once the manager is made."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def limit(self, built: Any, budget: int | None) -> None:
        """Take the quota of a configuration that is being built, lowered to `budget`.

        Raises ConfigError where this version takes more all the same.
        """
        tiers = built.cache_tiers
        if budget is not None and tiers[GPU_LEVEL].quota > budget:
            # Some versions round up so that ranks agree on tokens.
            tiers[GPU_LEVEL].quota = budget
        self.quota = int(built.cache_tiers[GPU_LEVEL].quota)
        if budget is not None and self.quota > budget:
            raise ConfigError(
                f"KVCacheManagerV2 of the installed TensorRT-LLM takes {self.quota:,} bytes and does not heed a budget "
                f"of {budget:,}: leave the budget out, or set kv_cache_config.use_kv_cache_manager_v2: false"
            )

    def describe(self) -> str:
        """What is served, in one line."""
        return (
            "KVCacheManagerV2 keeps its addresses fixed by itself; trtllm-vattn gives it its budget alone, of "
            f"{self.quota:,} bytes"
        )

    def set_initial_budget(self) -> None:
        """Nothing: V2 has its quota from the start."""

    def fail(self, numbers: Iterable[int]) -> None:
        """Nothing: V2 reuses blocks by itself."""

    def check_budget(self, budget: int) -> None:
        """Raise ConfigError where this version cannot be resized, or while requests run."""
        manager = self._manager
        if not hasattr(manager.impl, "resize") or not hasattr(manager, "kv_cache_map"):
            raise ConfigError("this KVCacheManagerV2 cannot be resized at run time; give the budget at start")
        is_active = getattr(manager, "is_request_active", lambda number: True)
        running = [number for number in list(manager.kv_cache_map) if is_active(number)]
        if running:
            raise ConfigError(
                f"KVCacheManagerV2 is resized only while no request runs, and {len(running)} do (the first: "
                f"{running[0]}); wait until they have ended, or give the budget at start"
            )

    def set_budget(self, budget: int) -> int:
        """Resize the GPU's quota, in bytes, while the executor is idle; returns it.

        Raises ConfigError as `check_budget`, and where V2 says that it could not.
        """
        self.check_budget(budget)
        if self._manager.impl.resize(GPU_LEVEL, budget) is False:
            raise ConfigError(
                f"KVCacheManagerV2 could not be resized to {budget:,} bytes; its quota is {self.quota:,} as before"
            )
        self.quota = budget
        return budget

    def release(self) -> int:
        """Nothing more than `set_budget` can do; returns the quota."""
        return self.quota

    resume = release


def make_manager_v2(stock: Any, config: TrtllmConfig) -> Any:
    """A subclass of an installed `KVCacheManagerV2` with a budget. Raises ConfigError where its hook is missing."""
    if not hasattr(stock, "_build_cache_config"):
        raise ConfigError(
            f"the installed {stock.__name__} has no hook _build_cache_config; set "
            "kv_cache_config.use_kv_cache_manager_v2: false, or run without trtllm-vattn"
        )
    budget = config.budget_bytes

    class BudgetedKVCacheManagerV2(stock):  # type: ignore[misc]
        """V2 under a budget that may change."""

        def __init__(self, kv_cache_config: Any, *arguments: Any, **named: Any) -> None:
            """As the stock class, within the budget. Raises ConfigError where this version exceeds it."""
            if budget is not None:
                kv_cache_config = copy.copy(kv_cache_config)
                limit_bytes(kv_cache_config, budget)
            self.vattn = V2Budget(self)
            super().__init__(kv_cache_config, *arguments, **named)
            elastic.register(self)

        def _build_cache_config(self, *arguments: Any, **named: Any) -> Any:
            """The stock configuration with the budget as its GPU quota, where that is not lower already."""
            built = super()._build_cache_config(*arguments, **named)
            self.vattn.limit(built, budget)
            return built

        def shutdown(self) -> None:
            """The stock shutdown."""
            elastic.forget(self)
            super().shutdown()

    return BudgetedKVCacheManagerV2
