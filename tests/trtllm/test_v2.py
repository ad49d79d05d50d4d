"""KVCacheManagerV2 by what is official: its quota at start and at run time, its hook's two forms, its start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from trtllm_shape import SHAPE

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trtllm import TrtllmConfig, elastic, install
from trtllm_vattn.trtllm.features import UnsupportedFeature
from trtllm_vattn.trtllm.v2 import make_manager_v2

both = pytest.mark.parametrize("series", ["1.3.0rc", "1.4.0rc"])


@pytest.fixture
def series() -> str:
    return "1.4.0rc"


@pytest.fixture
def make_v2(fake: SimpleNamespace) -> Iterator[Callable[..., Any]]:
    made = []

    def build(config: TrtllmConfig, cache_config: Any = None, **named: Any) -> Any:
        kind = make_manager_v2(fake.util.KVCacheManagerV2, config)
        given = cache_config or fake.managers.KvCacheConfig()
        made.append(kind(given, fake.bindings.CacheType.SELF, mapping=fake.managers.Mapping(), **named))
        return made[-1]

    yield build
    for manager in made:
        manager.shutdown()


def start(fake: SimpleNamespace, config: Any = None, **named: Any) -> tuple[Any, bool]:
    """A start with V2 chosen by TensorRT-LLM."""
    creator = fake.util.KvCacheCreator(
        model_config=SimpleNamespace(manager=fake.util.KVCacheManagerV2),
        llm_args=SimpleNamespace(cache_transceiver_config=None),
        kv_cache_config=config or fake.managers.KvCacheConfig(),
        mapping=fake.managers.Mapping(),
        dtype=fake.bindings.DataType.FLOAT,
        **{**SHAPE, **named},
    )
    executor, estimating = fake.util.create_py_executor(creator)
    return executor.kv_cache_manager, estimating


@both
def test_a_budget_alone_is_enough_to_start(make_v2: Callable[..., Any], fake: SimpleNamespace) -> None:
    """Without it, and without an estimate, the stock class has no quota and says so by an assertion."""
    manager = make_v2(TrtllmConfig(budget="100KiB"))
    assert manager.impl.get_quota(0) == 100 << 10
    assert manager.impl.get_quota(1) == 7
    with pytest.raises(AssertionError, match="Quota not set"):
        make_v2(TrtllmConfig())


@both
def test_other_limits_that_are_lower_stay(make_v2: Callable[..., Any], fake: SimpleNamespace) -> None:
    config = fake.managers.KvCacheConfig(max_gpu_total_bytes=50_000)
    assert make_v2(TrtllmConfig(budget=80_000), config).impl.get_quota(0) == 50_000
    assert make_v2(TrtllmConfig(), config).impl.get_quota(0) == 50_000
    assert config.max_gpu_total_bytes == 50_000
    tokens = fake.managers.KvCacheConfig(max_tokens=300)
    assert make_v2(TrtllmConfig(budget=80_000), tokens).impl.get_quota(0) == 30_000


@both
def test_a_quota_that_was_rounded_up_is_cut_to_the_budget(
    make_v2: Callable[..., Any], fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake.util.KVCacheManagerV2, "rounds_up", 500)
    assert make_v2(TrtllmConfig(budget=80_000)).impl.get_quota(0) == 80_000


def test_a_version_that_does_not_heed_it_is_refused(
    make_v2: Callable[..., Any], fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = fake.util.KVCacheManagerV2
    monkeypatch.setattr(stock, "rounds_up", 500)
    # As bindings do that give copies of what they hold.
    frozen = property(lambda self: [SimpleNamespace(quota=each.quota) for each in self.__dict__["cache_tiers"]])
    config_class = type(stock._build_base_config(stock, None, tokens_per_block=16, cache_tiers=[]))
    monkeypatch.setattr(
        config_class,
        "cache_tiers",
        frozen.setter(lambda self, tiers: self.__dict__.__setitem__("cache_tiers", tiers)),
        raising=False,
    )
    with pytest.raises(ConfigError, match=r"takes 80,500 bytes and does not heed a budget of 80,000"):
        make_v2(TrtllmConfig(budget=80_000))
    with pytest.raises(ConfigError, match="no fixed-address KV cache"):
        elastic.release()
    with pytest.raises(ConfigError, match="has no max_gpu_total_bytes"):
        make_v2(TrtllmConfig(budget=80_000), SimpleNamespace(max_tokens=3))


@both
def test_a_start_estimates_within_the_budget_and_announces_once(
    fake: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    install(budget=300_000)
    manager, estimating = start(fake)
    assert estimating
    assert isinstance(manager, fake.util.KVCacheManagerV2)
    assert not manager.is_estimating_kv_cache
    assert manager.impl.get_quota(0) == 300_000
    (record,) = caplog.records
    assert "KVCacheManagerV2 keeps its addresses fixed by itself" in record.message
    assert "300,000 bytes" in record.message
    manager.shutdown()


def test_without_a_budget_it_has_what_was_estimated(fake: SimpleNamespace) -> None:
    install()
    config = fake.managers.KvCacheConfig()
    manager, estimating = start(fake, config)
    assert estimating
    assert manager.impl.get_quota(0) == fake.util.ESTIMATE
    manager.shutdown()


@both
def test_the_fallback_to_v1_gives_ours(fake: SimpleNamespace) -> None:
    install()
    chosen = fake.util.KvCacheCreator(
        model_config=SimpleNamespace(manager=fake.util.KVCacheManagerV2),
        llm_args=SimpleNamespace(cache_transceiver_config=None),
        kv_cache_config=fake.managers.KvCacheConfig(),
        max_beam_width=4,
    )
    assert chosen._kv_cache_manager_cls.__name__ == "FixedAddressKVCacheManager"
    assert not chosen.try_prepare_estimation()
    # And ours refuses what it cannot do, by name, where the stock class would have served it silently.
    with pytest.raises(UnsupportedFeature, match="beam search"):
        start(fake, max_beam_width=4)
    with pytest.raises(UnsupportedFeature, match="KV connectors"):
        start(fake, kv_connector_manager=object())


def test_the_same_class_chosen_twice_is_the_same_class_of_ours(fake: SimpleNamespace) -> None:
    install(budget=100_000)
    model = SimpleNamespace(manager=fake.util.KVCacheManagerV2)
    first = fake.util.get_kv_cache_manager_cls(model, None)
    assert first is fake.util.get_kv_cache_manager_cls(model, None)
    assert issubclass(first, fake.util.KVCacheManagerV2)


@both
def test_it_is_resized_while_no_request_runs(make_v2: Callable[..., Any], series: str) -> None:
    manager = make_v2(TrtllmConfig(budget=100_000))
    assert elastic.set_budget("64KiB") == 64 << 10 == manager.impl.get_quota(0)
    assert elastic.release() == elastic.resume() == 64 << 10
    manager.vattn.set_initial_budget()
    manager.kv_cache_map[7] = object()
    manager.impl.active.add(7)
    with pytest.raises(ConfigError, match=r"only while no request runs, and 1 do \(the first: 7\)"):
        elastic.set_budget(50_000)
    manager.impl.active.clear()
    manager.impl.refuses = True
    with pytest.raises(ConfigError, match="could not be resized to 50,000 bytes; its quota is 65,536 as before"):
        elastic.set_budget(50_000)
    manager.impl.refuses = False
    assert elastic.set_budget(50_000) == manager.impl.get_quota(0) == 50_000
    manager.impl = SimpleNamespace()
    with pytest.raises(ConfigError, match="cannot be resized at run time"):
        elastic.set_budget(60)
    manager.impl = SimpleNamespace(active=set())


def test_without_its_hook_it_is_refused() -> None:
    bare = type("KVCacheManagerV2", (), {})
    with pytest.raises(ConfigError, match="use_kv_cache_manager_v2: false"):
        make_manager_v2(bare, TrtllmConfig())
