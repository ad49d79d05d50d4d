"""The adapter against the recorded interface: it overrides, calls, reads and sets nothing that is not in it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trtllm_shape import VERSIONS, drafts

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trtllm import events
from trtllm_vattn.trtllm.features import REQUIRED, REQUIRED_GLOBALS
from trtllm_vattn.trtllm.manager import CPP_HEAD_DIM, make_manager, shrunken_cpp_pool
from trtllm_vattn.trtllm.start import KINDS
from trtllm_vattn.trtllm.versions import RECORDED as SERIES
from trtllm_vattn.trtllm.versions import series_of

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "trtllm_interface.json").read_text())
pytestmark = pytest.mark.parametrize("series", list(RECORDED))


def methods(entry: Any) -> dict[str, list[str]]:
    return {each["name"]: [p.partition("=")[0] for p in each["params"] if p != "*"] for each in entry["methods"]}


def ours(name: str) -> bool:
    return name.startswith(("vattn", "_vattn", "__"))


def parameters(method: Any) -> list[str]:
    return [name for name in inspect.signature(method).parameters if name != "self"]


def public(kind: Any) -> set[str]:
    """Methods of a fake's class and of those of the fake that it is made of."""
    own = [each for each in kind.__mro__ if each.__module__.startswith("tensorrt_llm")]
    named = {name for each in own for name in vars(each) if callable(getattr(kind, name)) and name[0] != "_"}
    return named - {"Watched"}


def test_the_record_says_where_it_is_from(series: str) -> None:
    assert list(RECORDED) == list(SERIES)
    assert series_of(VERSIONS[series]) == series
    provenance = RECORDED[series]["provenance"]
    assert "NVIDIA/TensorRT-LLM" in provenance["repository"]
    assert provenance["files"]
    assert all(each["path"] and each["read"] for each in provenance["files"])
    assert provenance["not_read"]
    assert provenance["read_on"] >= "2026"


def test_the_stand_in_is_what_was_recorded(fake: SimpleNamespace, series: str) -> None:
    recorded = RECORDED[series]
    stock = fake.managers.KVCacheManager
    known = methods(recorded["KVCacheManager"])
    for name in {*public(stock), "__init__"}:
        # `*args` and `**kwargs` are recorded with their stars.
        assert parameters(getattr(stock, name)) == [each.strip("*") for each in known[name]], name
    assert public(fake.bindings.KVCacheManagerCpp) <= set(recorded["KVCacheManager"]["impl_methods_used"])
    util, executor = fake.util, fake.executor.PyExecutor
    assert parameters(util.get_kv_cache_manager_cls) == [
        each.partition("=")[0] for each in recorded["get_kv_cache_manager_cls"]["params"]
    ]
    for name in public(util.KvCacheCreator):
        assert parameters(getattr(util.KvCacheCreator, name)) == methods(recorded["KvCacheCreator"])[name], name
    fallback = "_fallback_if_unsupported_kv_cache_manager_v2"
    assert hasattr(util.KvCacheCreator, fallback) == (fallback in methods(recorded["KvCacheCreator"]))
    for name in ("start_worker", "_handle_errors"):
        assert parameters(getattr(executor, name)) == methods(recorded["PyExecutor"])[name]
    if recorded["KVCacheManagerV2"]:
        hook = util.KVCacheManagerV2._build_cache_config
        assert parameters(hook) == methods(recorded["KVCacheManagerV2"])["_build_cache_config"]


def test_what_is_required_was_recorded(series: str) -> None:
    recorded = RECORDED[series]["KVCacheManager"]
    for name, wanted in REQUIRED.items():
        assert set(wanted) <= set(methods(recorded)[name]), name
    assert set(REQUIRED_GLOBALS) <= set(recorded["module_globals_used"])
    assert "_kv_cache_manager_cls" in RECORDED[series]["KvCacheCreator"]["attributes"]
    executor = {"kv_cache_manager", "resource_manager.resource_managers", "is_warmup", "active_requests"}
    assert executor | {"dist.allgather"} <= set(RECORDED[series]["PyExecutor"]["attributes"])
    for name, attributes in RECORDED[series]["kv_cache_events"].items():
        if name != "serializer":
            assert set(attributes) <= {each.name for each in fields(getattr(events, name))}


def test_resource_managers_are_named_as_ours_are_looked_for(fake: SimpleNamespace) -> None:
    assert set(KINDS) <= {each.name for each in fake.managers.ResourceManagerType}


def test_only_recorded_methods_are_overridden(fake: SimpleNamespace, series: str) -> None:
    stock = fake.managers.KVCacheManager
    known = methods(RECORDED[series]["KVCacheManager"])
    kind = make_manager(stock)
    mixed_in = [each for each in kind.__mro__ if each.__module__.startswith("trtllm_vattn")]
    overridden = {name: each for mixin in mixed_in for name, each in vars(mixin).items() if callable(each)}
    overridden = {name: each for name, each in overridden.items() if not ours(name)}
    assert set(overridden) <= set(known)
    assert len(overridden) > 12
    for name, method in overridden.items():
        mine = inspect.signature(method).parameters.values()
        named = [each.name for each in mine if each.kind is not inspect.Parameter.VAR_KEYWORD][1:]
        named = [each for each in named if each != "arguments"]
        open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in mine)
        recorded = [each for each in known[name] if not each.startswith("*")]
        assert named == (recorded[: len(named)] if open_ended else recorded), name


def test_only_recorded_names_are_used(make: Callable[..., Any], fake: SimpleNamespace, series: str) -> None:
    watched = (
        fake.managers.KVCacheManager,
        fake.bindings.KVCacheManagerCpp,
        fake.managers.LlmRequest,
        fake.managers.ScheduledRequests,
    )
    for each in watched:
        each.used.clear()
    manager = make(spec_config=drafts(1))
    executor = fake.executor.PyExecutor(manager, 4, 128)
    manager.vattn.set_initial_budget()
    for number in range(6):
        request = fake.managers.LlmRequest(number, 20, 15)
        request.draft_tokens = number % 2
        executor.submit(request)
    alike = list(range(40))
    executor.submit(fake.managers.LlmRequest(6, 40, 2, alike))
    executor.submit(fake.managers.LlmRequest(7, 40, 2, alike))
    executor.step()
    manager.vattn.set_budget(manager.vattn.target - 1)
    manager.get_buffers(0)
    manager.get_batch_cache_indices([0])
    manager.get_kv_cache_stats()
    manager.check_invalid_values_in_kv_cache()
    executor.cancel(3)
    executor.run()
    used = {each.__name__: {name for name in each.used if not ours(name)} for each in watched}
    recorded = RECORDED[series]["KVCacheManager"]
    reserve = "_kv_reserve_draft_tokens"
    attributes = {*recorded["attributes_used_by_others"], reserve}
    assert used["KVCacheManager"] <= {*methods(recorded), *attributes}
    assert len(used["KVCacheManager"]) > 15
    # Asked for where it is not there, too: that is how it is found out.
    assert hasattr(manager, reserve) == (reserve in recorded["attributes_used_by_others"])
    cpp = used[fake.bindings.KVCacheManagerCpp.__name__] - {"get_token_count"}
    assert cpp <= set(recorded["impl_methods_used"])
    assert hasattr(manager.impl, "get_token_count") == ("get_token_count" in recorded["impl_methods_used"])
    assert "max_num_blocks" in cpp
    requests = {text.split()[0].partition("(")[0] for text in RECORDED[series]["requests"]["request"]}
    always = {"py_request_id", "prompt_len", "is_first_context_chunk", "get_tokens", "get_num_tokens"}
    assert always <= used["LlmRequest"]
    # Asked for where they are not there, too.
    later = {"set_prepopulated_prompt_len", "cache_salt", "kv_cache_retention_config"}
    assert used["LlmRequest"] <= requests | later
    assert later.isdisjoint(requests) == (series == "1.2")
    batch = {text.partition("(")[0] for text in RECORDED[series]["requests"]["scheduled_batch"]}
    assert used["ScheduledRequests"] == {"context_requests", "generation_requests", "reset_context_requests"}
    assert used["ScheduledRequests"] - {"reset_context_requests"} <= batch
    assert ("reset_context_requests" in batch) == (series != "1.2")


def test_a_name_that_is_not_recorded_would_show(make: Callable[..., Any], fake: SimpleNamespace) -> None:
    """The watch sees what our code does, and not what the fake does itself."""
    stock = fake.managers.KVCacheManager
    manager = make()
    stock.used.clear()
    code = compile("manager.no_such_name = 1; manager.head_dim", "/x/trtllm_vattn/trtllm/y.py", "exec")
    exec(code, {"manager": manager})
    assert stock.used == {"no_such_name", "head_dim"}
    assert manager.get_needed_resource_to_completion(fake.managers.LlmRequest(1, 20, 5)) == 2
    assert "tokens_per_block" not in stock.used


def test_another_interface_is_refused_by_what_it_lacks(fake: SimpleNamespace) -> None:
    stock = fake.managers.KVCacheManager
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(next(each for each in stock.__mro__ if "rewind_kv_cache" in vars(each)), "rewind_kv_cache")
        patch.setattr(stock, "get_buffers", lambda self, layer_idx: None)
        patch.delattr(fake.managers, "KVCacheManagerCpp")
        with pytest.raises(
            ConfigError, match=r"lacks KVCacheManagerCpp, get_buffers\(… kv_layout …\), rewind_kv_cache"
        ):
            make_manager(stock)


def test_a_cpp_manager_of_other_arguments_is_refused(fake: SimpleNamespace) -> None:
    module = SimpleNamespace(KVCacheManagerCpp=dict, PoolConfigurationCpp=fake.bindings.PoolConfiguration)
    pools = [fake.bindings.PoolConfiguration(window_size=4096, size_per_head=256, dtype="BF16")]
    with shrunken_cpp_pool(module):
        made = module.KVCacheManagerCpp(num_kv_heads_per_layer=[8] * 32, size_per_head=128, tokens_per_block=32)
        assert made == {"num_kv_heads_per_layer": [1], "size_per_head": CPP_HEAD_DIM, "tokens_per_block": 32}
        later = module.KVCacheManagerCpp(num_kv_heads_per_layer=[8, 8], size_per_head_per_layer=[128, 128])
        assert later == {"num_kv_heads_per_layer": [1], "size_per_head_per_layer": [CPP_HEAD_DIM]}
        pooled = module.KVCacheManagerCpp(
            num_kv_heads_per_layer=[8, 8],
            size_per_head=256,
            max_attention_window_vec=[4096, 4096],
            pool_configurations=pools,
        )
        assert pooled["pool_configurations"] == [
            fake.bindings.PoolConfiguration(window_size=4096, size_per_head=CPP_HEAD_DIM, dtype="BF16")
        ]
        assert pooled["max_attention_window_vec"] == [4096]
        assert pools[0].size_per_head == 256
        with pytest.raises(ConfigError, match="is made of head_size, without num_kv_heads_per_layer or size_per_head"):
            module.KVCacheManagerCpp(head_size=128)
    assert module.KVCacheManagerCpp is dict
