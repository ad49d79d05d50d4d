"""KVCacheManagerV2 by its documented hooks; a version without them is refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trtllm import TrtllmConfig, elastic, install
from trtllm_vattn.trtllm.installation import TARGET
from trtllm_vattn.trtllm.v2 import make_manager_v2

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "trtllm_interface.json").read_text())["KVCacheManagerV2"]


class Quotas:
    """V2's implementation, as far as budgets go."""

    def __init__(self, config: Any) -> None:
        self.quotas = [tier.quota for tier in config.cache_tiers]

    def resize(self, level: int, quota: int) -> None:
        self.quotas[level] = quota


class KVCacheManagerV2:
    """A stand-in with the hook that is recorded."""

    def __init__(self, quota: int) -> None:
        self.mapping = SimpleNamespace(world_size=1)
        tiers = [SimpleNamespace(quota=quota), SimpleNamespace(quota=7)]
        self.impl = Quotas(self._build_cache_config(SimpleNamespace(cache_tiers=tiers)))

    def _build_cache_config(self, config: Any) -> Any:
        return config

    def shutdown(self) -> None:
        self.impl = None  # type: ignore[assignment]


def test_it_gets_a_budget_at_start_and_at_run_time() -> None:
    hooks = {each["name"] for each in RECORDED["methods"]}
    assert {name for name in vars(KVCacheManagerV2) if callable(getattr(KVCacheManagerV2, name))} <= hooks
    manager = make_manager_v2(KVCacheManagerV2, TrtllmConfig(budget=100))(quota=50)
    assert manager.impl.quotas == [100, 7]
    assert elastic.set_budget(80) == 80 == manager.impl.quotas[0]
    assert elastic.release() == elastic.resume() == 80
    elastic.size_all()
    assert manager.impl.quotas == [80, 7]
    manager.shutdown()
    with pytest.raises(ConfigError, match="no fixed-address KV cache"):
        elastic.release()


def test_without_a_budget_it_keeps_its_own() -> None:
    manager = make_manager_v2(KVCacheManagerV2, TrtllmConfig())(quota=50)
    assert manager.impl.quotas == [50, 7]
    manager.impl = object()
    with pytest.raises(ConfigError, match="cannot be resized at run time"):
        elastic.set_budget(60)
    manager.shutdown()


def test_it_is_chosen_where_tensorrt_llm_chooses_it(double: SimpleNamespace) -> None:
    install(budget=100)
    chosen = importlib.import_module(TARGET).get_kv_cache_manager_cls(SimpleNamespace(manager=KVCacheManagerV2))
    assert issubclass(chosen, KVCacheManagerV2)
    assert chosen is not KVCacheManagerV2


def test_without_its_hook_it_is_refused() -> None:
    bare = type("KVCacheManagerV2", (), {})
    with pytest.raises(ConfigError, match="use_kv_cache_manager_v2: false"):
        make_manager_v2(bare, TrtllmConfig())
