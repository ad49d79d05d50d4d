"""When an executor starts, the manager that it really uses is looked at, whichever way it came there."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
from trtllm_shape import SHAPE, VERSIONS

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trtllm import install
from trtllm_vattn.trtllm.features import UnsupportedFeature


def autodeploy(fake: SimpleNamespace) -> Any:
    """An executor made as AutoDeploy makes it."""
    interface = importlib.import_module("tensorrt_llm._torch.auto_deploy.shim.interface")
    config = fake.managers.KvCacheConfig()
    shape = {**SHAPE, "mapping": fake.managers.Mapping(), "dtype": fake.bindings.DataType.FLOAT}
    return interface.create_autodeploy_executor(config, **shape)


@pytest.mark.parametrize("series", list(VERSIONS))
def test_autodeploys_own_manager_is_refused_and_nothing_announced(
    fake: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    install(budget="1GiB")
    executor = autodeploy(fake)
    with pytest.raises(UnsupportedFeature) as refused:
        executor.start_worker()
    assert not executor.started
    assert "the executor runs on TensorRT-LLM's own KVCacheManager" in str(refused.value)
    assert "AutoDeploy" in str(refused.value)
    assert "--allow-stock" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not caplog.records


def test_allowed_it_starts_and_says_so(fake: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    install(allow_stock=True)
    executor = autodeploy(fake)
    executor.start_worker()
    assert executor.started
    (record,) = caplog.records
    assert "TensorRT-LLM's own KVCacheManager, not on a KV cache at fixed addresses; carrying on" in record.message


def test_a_draft_models_manager_is_looked_at_too(fake: SimpleNamespace, make: Any) -> None:
    install()
    kinds = fake.managers.ResourceManagerType
    ours, stock = make(), autodeploy(fake).kv_cache_manager
    executor = fake.executor.PyExecutor.over({kinds.KV_CACHE_MANAGER: ours, kinds.DRAFT_KV_CACHE_MANAGER: stock})
    with pytest.raises(UnsupportedFeature, match="own KVCacheManager"):
        executor.start_worker()
    assert not ours.vattn.is_budget_set
    others = {kinds.KV_CACHE_MANAGER: ours, kinds.SEQ_SLOT_MANAGER: object()}
    fake.executor.PyExecutor.over(others).start_worker()
    assert ours.vattn.is_budget_set


def test_a_manager_that_was_shut_down_is_not_ours_any_more(fake: SimpleNamespace, make: Any) -> None:
    install()
    manager = make()
    executor = fake.executor.PyExecutor.over({fake.managers.ResourceManagerType.KV_CACHE_MANAGER: manager})
    manager.shutdown()
    with pytest.raises(UnsupportedFeature, match="own FixedAddressKVCacheManager"):
        executor.start_worker()


def test_no_kv_cache_and_another_executor(fake: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    install()
    executor = fake.executor.PyExecutor.over({})
    executor.start_worker()
    assert "this model has no KV cache" in caplog.text
    del executor.kv_cache_manager
    with pytest.raises(ConfigError, match="PyExecutor is another than the adapter knows"):
        executor.start_worker()


def test_a_mask_of_all_layers_is_none(make: Any) -> None:
    assert make(layer_mask=[True] * 3).num_local_layers == 3
