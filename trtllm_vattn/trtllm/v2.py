"""`KVCacheManagerV2` of TensorRT-LLM's main: a thin adapter on its documented hooks.

V2 sits on virtual memory of its own already: a pool group's base never changes while it grows and shrinks at its tail.
What is left to give it is the budget, at start through `_build_cache_config` and at run time through ``impl.resize``.
Its internals are not touched.
"""

from __future__ import annotations

import logging
from typing import Any

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trtllm import elastic
from trtllm_vattn.trtllm.config import TrtllmConfig

logger = logging.getLogger(__name__)

GPU_LEVEL = 0
"""The first cache tier."""


def is_v2(chosen: Any) -> bool:
    """Whether a class is V2 or a subclass of it."""
    return any(each.__name__ == "KVCacheManagerV2" for each in chosen.__mro__)


def make_manager_v2(stock: Any, config: TrtllmConfig) -> Any:
    """A subclass of an installed `KVCacheManagerV2` with our budget. Raises ConfigError where its hook is missing."""
    if not hasattr(stock, "_build_cache_config"):
        raise ConfigError(
            f"the installed {stock.__name__} has no hook _build_cache_config; set "
            "kv_cache_config.use_kv_cache_manager_v2: false, or run without trtllm-vattn"
        )

    class BudgetedKVCacheManagerV2(stock):  # type: ignore[misc]
        """V2 under a budget that may change."""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            elastic.register(self)
            logger.warning("KVCacheManagerV2 has fixed addresses of its own; trtllm-vattn gives it its budget only")

        def _build_cache_config(self, config_given: Any) -> Any:
            """The stock configuration with our quota for the GPU."""
            built = super()._build_cache_config(config_given)
            if config.budget is not None:
                built.cache_tiers[GPU_LEVEL].quota = config.budget
            self._vattn_quota = built.cache_tiers[GPU_LEVEL].quota
            return built

        def vattn_size(self) -> None:
            """Nothing: V2 has its quota from the start."""

        def vattn_set_budget(self, budget: int) -> int:
            """Resize the GPU's quota, in bytes; returns it. Raises ConfigError where this version cannot."""
            if not hasattr(self.impl, "resize"):
                raise ConfigError("this KVCacheManagerV2 cannot be resized at run time; give the budget at start")
            self.impl.resize(GPU_LEVEL, budget)
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
