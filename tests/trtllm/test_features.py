"""What the adapter does not serve is refused by name, before anything is made."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.features import ADAPTER, FEATURES
from trtllm_vattn.trtllm.config import TrtllmConfig
from trtllm_vattn.trtllm.features import UnsupportedFeature

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"host_cache_size": 1 << 30}, "host offload"),
        ({"event_buffer_max_size": 10, "enable_block_reuse": False}, "KV cache events without block reuse"),
        ({"sink_token_length": 4}, "attention sinks"),
        ({"max_attention_window": [64, 128]}, r"sliding windows \(max_attention_window \[64, 128\]\): leave .* to 64"),
    ],
)
def test_settings_of_the_cpp_pool(make: Make, fake: SimpleNamespace, settings: dict[str, Any], name: str) -> None:
    config = fake.managers.KvCacheConfig(**settings)
    with pytest.raises(UnsupportedFeature, match=name):
        make(cache_config=config)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"max_beam_width": 4}, "beam search"),
        ({"kv_connector_manager": object()}, "KV connectors"),
        ({"is_draft": True}, "a draft model"),
        ({"enable_indexer_k_cache": True}, "sparse attention"),
        ({"num_kv_heads": [2, 4, 2]}, "different numbers of KV heads"),
        ({"layer_mask": [True, False, True]}, "a mask of layers"),
        ({"max_beam_width": 2, "is_draft": True}, "beam search.*; a draft model"),
    ],
)
def test_arguments(make: Make, arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(UnsupportedFeature, match=name):
        make(**arguments)


def test_context_parallelism_and_cache_types(make: Make, fake: SimpleNamespace) -> None:
    with pytest.raises(UnsupportedFeature, match="context parallelism"):
        make(mapping=fake.managers.Mapping(cp_size=2))
    with pytest.raises(UnsupportedFeature, match=r"dtype NVFP4 is not supported.*HALF, BF16, FLOAT, FP8"):
        make(dtype=fake.bindings.DataType.NVFP4)


def test_reuse_on_several_ranks_is_switched_off_and_said_or_refused(
    make: Make, fake: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    config, ranks = fake.managers.KvCacheConfig(), fake.managers.Mapping(world_size=2)
    manager = make(cache_config=config, mapping=ranks)
    assert (manager.enable_block_reuse, manager.enable_partial_reuse) == (False, False)
    assert config.enable_block_reuse  # the user's own is left alone
    assert "block reuse, on by default, is switched off" in caplog.text
    assert manager.vattn.reuse is None
    asked = fake.managers.KvCacheConfig(model_fields_set={"enable_block_reuse"})
    with pytest.raises(UnsupportedFeature, match=r"block reuse for a model on 2 ranks.*set enable_block_reuse: false"):
        make(cache_config=asked, mapping=ranks)
    with pytest.raises(UnsupportedFeature, match="KV cache events for a model on 2 ranks"):
        make(cache_config=fake.managers.KvCacheConfig(event_buffer_max_size=10), mapping=ranks)


def test_reuse_is_served_by_default_and_may_be_switched_off(make: Make, fake: SimpleNamespace) -> None:
    config = fake.managers.KvCacheConfig()
    manager = make(cache_config=config)
    assert (manager.enable_block_reuse, manager.enable_partial_reuse) == (True, True)
    manager.vattn.set_initial_budget()
    assert "in blocks of 16, which are reused" in manager.vattn.describe()
    manager = make(cache_config=fake.managers.KvCacheConfig(enable_block_reuse=False))
    assert not manager.enable_block_reuse
    manager.vattn.set_initial_budget()
    assert "in blocks of 16, which are not reused" in manager.vattn.describe()
    assert manager.vattn.reuse is None
    assert manager.get_latest_events(0) == []
    manager.reset_reuse_state()
    manager.flush_iteration_events()


def test_a_full_window_is_none(make: Make, fake: SimpleNamespace) -> None:
    assert make(cache_config=fake.managers.KvCacheConfig(max_attention_window=[128])).max_seq_len == 128


def test_other_dtypes_and_a_latent(make: Make, fake: SimpleNamespace) -> None:
    for name in ("HALF", "BF16", "FP8"):
        manager = make(dtype=getattr(fake.bindings.DataType, name))
        assert not manager.check_invalid_values_in_kv_cache(fill_with_zero=True)


def test_a_budget_for_less_than_one_request_is_refused(make: Make) -> None:
    with pytest.raises(
        ConfigError, match=r"backs 2 blocks of 6,144 bytes, but one request of 128 tokens needs 8: raise"
    ):
        make(TrtllmConfig(budget=40000))


NEAREST: dict[str, dict[str, Any]] = {
    "drafts": {"is_draft": True},
    "compression": {"enable_indexer_k_cache": True},
    "fork": {"max_beam_width": 4},
    "windows": {"max_attention_window": [64, 128]},
    "sleep": {"host_cache_size": 1 << 30},
    "tenancy": {"broker": "/run/vattn.sock"},
}
"""What comes nearest to a feature that the adapter does not serve: arguments, settings of the pool, or its own."""


def test_the_matrix_says_what_the_adapter_serves(make: Make, fake: SimpleNamespace) -> None:
    assert set(ADAPTER) == set(FEATURES)
    assert {name for name, said in ADAPTER.items() if said not in ("served", "own")} == set(NEAREST)
    for name, given in NEAREST.items():
        if name == "tenancy":
            with pytest.raises(ConfigError, match=ADAPTER[name]):
                TrtllmConfig.of(given)
            continue
        pool = name in ("windows", "sleep")
        arguments = {"cache_config": fake.managers.KvCacheConfig(**given)} if pool else given
        with pytest.raises(UnsupportedFeature, match=ADAPTER[name]):
            make(**arguments)
    assert [name for name, said in ADAPTER.items() if said == "served"] == ["prefix", "fp8"]
    manager = make(dtype=fake.bindings.DataType.FP8)
    assert manager.enable_block_reuse
