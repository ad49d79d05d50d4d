"""`KVCacheManagerV2`: a thin adapter on what is official.

V2 sits on virtual memory of its own already: a pool group's base never changes while it grows and shrinks at its tail.
What is left to give it is the budget: at start through ``kv_cache_config.max_gpu_total_bytes``, which it makes its
quota of, and at run time through ``impl.resize``. The hook `_build_cache_config` is where the quota is seen; its
arguments differ between versions and are handed on as they come. Internals are not touched.
"""

from __future__ import annotations

import copy
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


def make_manager_v2(stock: Any, config: TrtllmConfig) -> Any:
    """A subclass of an installed `KVCacheManagerV2` with our budget. Raises ConfigError where its hook is missing."""
    if not hasattr(stock, "_build_cache_config"):
        raise ConfigError(
            f"the installed {stock.__name__} has no hook _build_cache_config; set "
            "kv_cache_config.use_kv_cache_manager_v2: false, or run without trtllm-vattn"
        )
    budget = config.budget_bytes

    class BudgetedKVCacheManagerV2(stock):  # type: ignore[misc]
        """V2 under a budget that may change."""

        def __init__(self, kv_cache_config: Any, *arguments: Any, **named: Any) -> None:
            """As the stock class, within the budget. Raises ConfigError where this version does not heed it."""
            if budget is not None:
                kv_cache_config = copy.copy(kv_cache_config)
                limit_bytes(kv_cache_config, budget)
            super().__init__(kv_cache_config, *arguments, **named)
            elastic.register(self)

        def _build_cache_config(self, *arguments: Any, **named: Any) -> Any:
            """The stock configuration; its quota for the GPU is ours, or lower by what else limits it."""
            built = super()._build_cache_config(*arguments, **named)
            if budget is not None and built.cache_tiers[GPU_LEVEL].quota > budget:
                # Where ranks agree on tokens, some versions round the bytes up.
                built.cache_tiers[GPU_LEVEL].quota = budget
            self._vattn_quota = int(built.cache_tiers[GPU_LEVEL].quota)
            if budget is not None and self._vattn_quota > budget:
                raise ConfigError(
                    f"KVCacheManagerV2 of the installed TensorRT-LLM takes {self._vattn_quota:,} bytes and does not "
                    f"heed a budget of {budget:,}: leave the budget out, or set "
                    "kv_cache_config.use_kv_cache_manager_v2: false"
                )
            return built

        def vattn_describe(self) -> str:
            """What is served, in a line."""
            return (
                "KVCacheManagerV2 keeps its addresses fixed by itself; trtllm-vattn gives it its budget alone, of "
                f"{self._vattn_quota:,} bytes"
            )

        def vattn_size(self) -> None:
            """Nothing: V2 has its quota from the start."""

        def vattn_check_budget(self, budget: int) -> None:
            """Raise ConfigError where this version cannot be resized, or requests run: `resize` wants none active."""
            if not hasattr(self.impl, "resize") or not hasattr(self, "kv_cache_map"):
                raise ConfigError("this KVCacheManagerV2 cannot be resized at run time; give the budget at start")
            active = getattr(self, "is_request_active", lambda number: True)
            running = [number for number in list(self.kv_cache_map) if active(number)]
            if running:
                raise ConfigError(
                    f"KVCacheManagerV2 is resized only while no request runs, and {len(running)} do (the first: "
                    f"{running[0]}); wait until they have ended, or give the budget at start"
                )

        def vattn_set_budget(self, budget: int) -> int:
            """Resize the GPU's quota, in bytes; returns it. For when the executor is idle.

            Raises ConfigError as `vattn_check_budget`, and where V2 says that it could not.
            """
            self.vattn_check_budget(budget)
            if self.impl.resize(GPU_LEVEL, budget) is False:
                raise ConfigError(
                    f"KVCacheManagerV2 could not be resized to {budget:,} bytes; its quota is {self._vattn_quota:,} as "
                    "before"
                )
            self._vattn_quota = budget
            return budget

        def vattn_release(self) -> int:
            """Nothing more than `vattn_set_budget` can do; returns the quota."""
            return int(self._vattn_quota)

        def vattn_resume(self) -> int:
            """The quota stays as it is; returns it."""
            return int(self._vattn_quota)

        def shutdown(self) -> None:
            """The stock shutdown."""
            elastic.forget(self)
            super().shutdown()

    return BudgetedKVCacheManagerV2
