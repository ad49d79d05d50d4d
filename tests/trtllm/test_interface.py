"""The adapter against the recorded interface: it overrides, calls, reads and sets nothing that is not in it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trtllm.features import REQUIRED, REQUIRED_GLOBALS
from trtllm_vattn.trtllm.manager import books_alone, make_manager

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "trtllm_interface.json").read_text())
MANAGER = RECORDED["KVCacheManager"]
METHODS = {each["name"]: [p.partition("=")[0] for p in each["params"] if p != "*"] for each in MANAGER["methods"]}
ATTRIBUTES = set(MANAGER["attributes_used_by_others"])


def ours(name: str) -> bool:
    return name.startswith(("vattn", "_vattn", "__"))


def parameters(method: Any) -> list[str]:
    return [name for name in inspect.signature(method).parameters if name != "self"]


def test_the_stand_in_is_what_was_recorded(double: SimpleNamespace) -> None:
    stock = double.managers.KVCacheManager
    for name in {name for name in vars(stock) if callable(getattr(stock, name)) and not name.startswith("_")}:
        # `*args` and `**kwargs` are recorded with their stars.
        assert parameters(getattr(stock, name)) == [each.strip("*") for each in METHODS[name]], name
    assert parameters(stock.__init__) == [each.strip("*") for each in METHODS["__init__"]]
    impl = double.bindings.KVCacheManagerCpp
    assert {name for name in vars(impl) if callable(getattr(impl, name)) and name[0] != "_"} <= set(
        MANAGER["impl_methods_used"]
    )


def test_what_is_required_was_recorded() -> None:
    for name, wanted in REQUIRED.items():
        assert set(wanted) <= set(METHODS[name]), name
    assert set(REQUIRED_GLOBALS) <= set(MANAGER["module_globals_used"])


def test_only_recorded_methods_are_overridden(double: SimpleNamespace) -> None:
    stock = double.managers.KVCacheManager
    kind = make_manager(stock)
    mixed_in = [each for each in kind.__mro__ if each.__module__.startswith("trtllm_vattn")]
    overridden = {name: each for mixin in mixed_in for name, each in vars(mixin).items() if callable(each)}
    overridden = {name: each for name, each in overridden.items() if not ours(name)}
    assert set(overridden) <= set(METHODS)
    assert len(overridden) > 12
    for name, method in overridden.items():
        mine = inspect.signature(method).parameters.values()
        named = [each.name for each in mine if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD][1:]
        open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in mine)
        recorded = [each for each in METHODS[name] if not each.startswith("*")]
        assert named == (recorded[: len(named)] if open_ended else recorded), name


def test_only_recorded_names_are_used(make: Callable[..., Any], double: SimpleNamespace) -> None:
    watched = (
        double.managers.KVCacheManager,
        double.bindings.KVCacheManagerCpp,
        double.managers.LlmRequest,
        double.managers.ScheduledRequests,
    )
    for each in watched:
        each.used.clear()
    manager = make(spec_config=SimpleNamespace(max_total_draft_tokens=1))
    executor = double.executor.PyExecutor(manager, 4, 128)
    manager.vattn_size()
    for number in range(6):
        request = double.managers.LlmRequest(number, 20, 15)
        request.draft_tokens = number % 2
        executor.submit(request)
    executor.step()
    manager.vattn_set_budget(manager._vattn_target - 1)
    manager.get_buffers(0)
    manager.get_batch_cache_indices([0])
    manager.get_kv_cache_stats()
    manager.check_invalid_values_in_kv_cache()
    executor.cancel(3)
    executor.run()
    used = {each.__name__: {name for name in each.used if not ours(name)} for each in watched}
    assert used["KVCacheManager"] <= set(METHODS) | ATTRIBUTES
    assert len(used["KVCacheManager"]) > 15
    assert used["KVCacheManagerCpp"] <= set(MANAGER["impl_methods_used"])
    assert "max_num_blocks" in used["KVCacheManagerCpp"]
    requests = {text.split()[0] for text in RECORDED["requests"]["request"]}
    assert used["LlmRequest"] == {"py_request_id", "prompt_len", "is_first_context_chunk"}
    assert used["LlmRequest"] <= requests
    assert used["ScheduledRequests"] == {"context_requests", "generation_requests"}


def test_a_name_that_is_not_recorded_would_show(make: Callable[..., Any], double: SimpleNamespace) -> None:
    """The watch sees what our code does, and not what the stand-in does itself."""
    stock = double.managers.KVCacheManager
    manager = make()
    stock.used.clear()
    code = compile("manager.no_such_name = 1; manager.head_dim", "/x/trtllm_vattn/trtllm/y.py", "exec")
    exec(code, {"manager": manager})
    assert stock.used == {"no_such_name", "head_dim"}
    assert manager.get_needed_resource_to_completion(double.managers.LlmRequest(1, 20, 5)) == 2
    assert "tokens_per_block" not in stock.used


def test_another_interface_is_refused_by_what_it_lacks(double: SimpleNamespace) -> None:
    stock = double.managers.KVCacheManager
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(stock, "rewind_kv_cache")
        patch.setattr(stock, "get_buffers", lambda self, layer_idx: None)
        patch.delattr(double.managers, "KVCacheManagerCpp")
        with pytest.raises(
            ConfigError, match=r"lacks KVCacheManagerCpp, get_buffers\(… kv_layout …\), rewind_kv_cache"
        ):
            make_manager(stock)


def test_a_cpp_manager_of_other_arguments_is_refused(double: SimpleNamespace) -> None:
    module = SimpleNamespace(KVCacheManagerCpp=dict)
    with books_alone(module):
        books = module.KVCacheManagerCpp(num_kv_heads_per_layer=[8] * 32, size_per_head=128, tokens_per_block=32)
        assert books == {"num_kv_heads_per_layer": [1], "size_per_head": 8, "tokens_per_block": 32}
        later = module.KVCacheManagerCpp(num_kv_heads_per_layer=[8, 8], size_per_head_per_layer=[128, 128])
        assert later == {"num_kv_heads_per_layer": [1], "size_per_head_per_layer": [8]}
        with pytest.raises(ConfigError, match="is made of head_size, without num_kv_heads_per_layer or size_per_head"):
            module.KVCacheManagerCpp(head_size=128)
    assert module.KVCacheManagerCpp is dict
