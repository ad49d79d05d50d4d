"""V1 of 1.3 and 1.4 beside 1.2: drafts reserved at every step, pools of their own shape, what is asked of a manager."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trtllm_shape import VERSIONS, drafts

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trtllm.config import TrtllmConfig
from trtllm_vattn.trtllm.features import UnsupportedFeature

Make = Callable[..., Any]
every = pytest.mark.parametrize("series", list(VERSIONS))
later = pytest.mark.parametrize("series", ["1.3.0rc", "1.4.0rc"])


def serve(fake: SimpleNamespace, manager: Any, requests: list[tuple[int, int, int]]) -> Any:
    """Runs requests of prompt, new tokens and drafts a step to their end."""
    longest = manager.max_seq_len - manager.num_extra_kv_tokens
    executor = fake.executor.PyExecutor(manager, manager.max_batch_size, longest)
    manager.vattn.set_initial_budget()
    for number, (prompt, new, drafted) in enumerate(requests, 1):
        request = fake.managers.LlmRequest(number, prompt, new)
        request.draft_tokens = drafted
        executor.submit(request)
    return executor


@every
def test_counts_and_memory_agree_where_drafts_are_shorter_than_the_most(
    make: Make, fake: SimpleNamespace, series: str
) -> None:
    manager = make(spec_config=drafts(4, extra=1))
    executor = serve(fake, manager, [(20, 60, 1), (33, 40, 0), (5, 50, 4), (17, 30, 2), (9, 30, 3)])
    while executor.waiting or executor.running:
        executor.step()
        assert executor.wrong == []
        cache = manager.vattn.cache
        for number in manager.vattn.running:
            counted = manager.impl._tokens[number]
            assert counted == cache.lengths[cache.slot_of(number)], number
        cache.check_integrity()
    assert len(executor.finished) == 5


@later
def test_the_cpp_pool_is_shrunken_in_pools_of_their_own_shape(make: Make, fake: SimpleNamespace) -> None:
    pool = fake.managers.PoolConfiguration(window_size=128, head_dim=8, dtype=fake.bindings.DataType.FLOAT)
    manager = make(pool_configurations=[pool])
    allocated = fake.bindings.KVCacheManagerCpp.pool_bytes_allocated
    assert 0 < allocated <= manager.vattn.total_blocks * 2 * 16 * 8 * 4
    executor = serve(fake, manager, [(40, 30, 0)])
    executor.run()
    assert executor.wrong == []


@later
@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"head_dim": 16}, "layers of different head sizes"),
        ({"dtype": "HALF"}, "layers of different head sizes"),
    ],
)
def test_pools_of_other_shapes_are_refused(
    make: Make, fake: SimpleNamespace, changes: dict[str, Any], name: str
) -> None:
    usual = {"window_size": 128, "head_dim": 8, "dtype": fake.bindings.DataType.FLOAT}
    with pytest.raises(UnsupportedFeature, match=name):
        make(pool_configurations=[fake.managers.PoolConfiguration(**{**usual, **changes})])
    with pytest.raises(UnsupportedFeature, match=r"linear attention's states"):
        make(linear_attention_metadata=object())


@every
def test_a_pool_that_is_not_shrunken_is_noticed(
    make: Make, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the argument is called by which a later version sizes it."""
    monkeypatch.setattr("trtllm_vattn.trtllm.manager.CPP_HEAD_DIM", 4)
    cpp = fake.managers.KVCacheManagerCpp
    wide = lambda **named: cpp(**{**named, "size_per_head": 1024})  # noqa: E731
    monkeypatch.setattr(fake.managers, "KVCacheManagerCpp", wide)
    with pytest.raises(ConfigError, match=r"allocated [\d,]+ bytes to count blocks, which needs"):
        make()
    assert fake.bindings.KVCacheManagerCpp.pool_bytes_allocated == 0


@later
def test_blocks_are_asked_for_in_later_ways_too(make: Make, fake: SimpleNamespace) -> None:
    manager = make()
    executor = serve(fake, manager, [(40, 30, 0)])
    executor.step()
    (ids,) = manager.get_batch_cache_indices([1], layer_idx=0)
    assert len(ids) == 3
    assert manager.get_batch_cache_indices([1], num_blocks_per_seq=[2]) == [ids[:2]]
    assert torch.equal(manager.get_batch_cache_indices_flat([1], [2]), torch.tensor(ids[:2], dtype=torch.int32))
    with pytest.raises(UnsupportedFeature, match="beam search"):
        manager.get_batch_cache_indices([1], beam_width=2)
    with pytest.raises(UnsupportedFeature, match=r"places in the C\+\+ pool"):
        manager.get_memory_pool_block_indices(ids, window_size=128)


@pytest.mark.parametrize("series", ["1.4.0rc"])
def test_what_can_never_fit_is_known_when_it_comes(make: Make, fake: SimpleNamespace) -> None:
    """The stock class answers for itself alone, and for every subclass not at all."""
    manager = make(TrtllmConfig(budget=200_000))
    manager.vattn.set_initial_budget()
    assert manager.kv_block_budget_applies()
    request = fake.managers.LlmRequest(1, 100, 60)
    needed, backed = manager.get_request_kv_block_budget(request)
    assert (needed, backed) == (10, manager.vattn.slots.blocks_backed_by(200_000))
    assert manager.blocks_in_primary_pool > backed


@pytest.mark.parametrize("series", ["1.4.0rc"])
def test_ranks_agree_where_the_stock_constructor_would_have(make: Make, fake: SimpleNamespace) -> None:
    manager = make(TrtllmConfig(budget=300_000), mapping=fake.managers.Mapping(world_size=2))
    mine = manager.vattn.slots.blocks_backed_by(300_000)
    type(manager).other_ranks_blocks = mine - 5
    manager.vattn.set_initial_budget()
    assert manager.get_max_resource_count() == mine - 5


@every
def test_dummies_do_not_take_a_running_requests_id(make: Make, fake: SimpleNamespace) -> None:
    manager = make()
    executor = serve(fake, manager, [(40, 30, 0)])
    executor.step()
    with pytest.raises(ConfigError, match=r"cannot take the ids \[1\], which running requests have"):
        manager.add_dummy_requests([7, 1], is_gen=True)
    executor.run()
    assert executor.wrong == []


@every
def test_dummies_that_fail_leave_the_promise_as_it_was(
    make: Make, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room was made for them in the C++ manager's count, beyond what memory backs."""
    manager = make(TrtllmConfig(budget=200_000))
    manager.vattn.set_initial_budget()
    backed, free = manager.get_max_resource_count(), manager.get_num_free_blocks()
    with pytest.raises(RuntimeError, match="too long"):
        manager.add_dummy_requests([1 << 61], [10_000], is_gen=True)
    assert (manager.get_max_resource_count(), manager.get_num_free_blocks()) == (backed, free)
