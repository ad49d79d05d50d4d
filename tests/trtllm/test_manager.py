"""The adapter under the fake's scheduler iterations, with page contents checked through its pointers and tables."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trtllm_vattn.errors import ConfigError, DriverError, KVCacheOutOfMemory
from trtllm_vattn.trtllm.config import TrtllmConfig
from trtllm_vattn.trtllm.features import UnsupportedFeature

Make = Callable[..., Any]


def executor_of(fake: SimpleNamespace, manager: Any, sized: bool = True) -> Any:
    executor = fake.executor.PyExecutor(manager, manager.max_batch_size, manager.max_seq_len)
    if sized:
        manager.vattn.set_initial_budget()
    return executor


def ask(fake: SimpleNamespace, number: int, prompt: int, new: int) -> Any:
    return fake.managers.LlmRequest(number, prompt, new)


def healthy(executor: Any) -> None:
    """Histories hold what was written, the cache is consistent, and no more blocks run than are backed."""
    assert executor.wrong == []
    executor.manager.vattn.cache.check_integrity()


def test_requests_keep_their_history_while_others_come_and_go(make: Make, fake: SimpleNamespace) -> None:
    executor = executor_of(fake, make())
    choose = random.Random(5)
    for number in range(14):
        executor.submit(ask(fake, number, choose.randint(1, 60), choose.randint(1, 40)))
    executor.run()
    healthy(executor)
    assert sorted(executor.finished) == list(range(14))
    stats = executor.manager.get_kv_cache_stats()
    assert stats.used_num_blocks == 1  # the padding dummy
    assert stats.tokens_per_block == 16


@pytest.mark.parametrize("layers_per_range", [1, 3])
@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
def test_every_block_size_and_number_of_pools(
    make: Make, fake: SimpleNamespace, tokens: int, layers_per_range: int
) -> None:
    config = TrtllmConfig(layers_per_range=layers_per_range)
    executor = executor_of(fake, make(config, tokens_per_block=tokens))
    assert executor.manager.num_pools == 3 // layers_per_range
    assert executor.manager.kv_cache_pool_mapping.tolist() == [
        [layer // layers_per_range, layer % layers_per_range] for layer in range(3)
    ]
    for number in range(3):
        executor.submit(ask(fake, number, 30 + number, 20))
    executor.run()
    healthy(executor)


def test_warm_up_at_full_length_takes_no_memory(make: Make, fake: SimpleNamespace) -> None:
    manager = make()
    executor = executor_of(fake, manager, sized=False)
    pages = manager.vattn.slots
    assert pages.cache.stats().held_bytes == pages.least_bytes
    assert fake.bindings.KVCacheManagerCpp.pool_bytes_allocated < manager.vattn.total_blocks * 16 * 64
    # The first request has the budget set, by what the stock class says is free by then.
    executor.submit(ask(fake, 1, 20, 4))
    executor.run()
    assert manager.vattn.target == manager.stock_blocks * pages.block_bytes
    backed = pages.blocks_backed_by(manager.vattn.target)
    assert manager.get_max_resource_count() == backed
    # Two blocks are for us, and rounding takes up to a page a request.
    assert manager.stock_blocks - 6 < backed < manager.stock_blocks - 2
    healthy(executor)


def test_dummies_live_in_block_0_whatever_their_length(make: Make, fake: SimpleNamespace) -> None:
    manager = make()
    executor_of(fake, manager)
    held = manager.vattn.cache.stats().held_bytes
    free = manager.get_num_free_blocks()
    (dummy,) = manager.add_dummy_requests([1 << 63], [128], is_gen=True)
    assert manager.get_batch_cache_indices([1 << 63]) == [[0] * 8]
    table = torch.full((1, 4, 2, 8), -1, dtype=torch.int32)
    manager.copy_batch_block_offsets(table, [1 << 63, 1 << 63], 1, 0, 2)
    assert table[0, :2].tolist() == [[[0] * 8, [1] * 8]] * 2
    assert table[0, 2:].eq(-1).all()
    assert manager.vattn.cache.stats().held_bytes == held
    # Nor do they take any of the capacity that requests are promised.
    assert manager.get_num_free_blocks() == free
    manager.free_resources(dummy)
    assert manager.get_num_free_blocks() == free


def test_a_padding_dummy_is_had_when_nothing_is_free(make: Make, fake: SimpleNamespace) -> None:
    manager = make()
    executor = executor_of(fake, manager)
    executor.submit(ask(fake, 1, 100, 20))
    executor.step()
    while manager.get_num_free_blocks():
        number = 100 + manager.get_num_free_blocks()
        request = ask(fake, number, min(100, 16 * manager.get_num_free_blocks()), 1)
        batch = fake.managers.ScheduledRequests([request], [])
        if len(manager.vattn.running) == manager.max_batch_size:
            break
        manager.prepare_resources(batch)
    manager.vattn.holdback.hold(manager.vattn.holdback.blocks + manager.get_num_free_blocks())
    assert manager.get_num_free_blocks() == 0
    assert manager.add_dummy_requests([(1 << 64) - 3], is_gen=True) is not None


def test_tables_are_gathered_when_the_batch_changes_and_not_else(make: Make, fake: SimpleNamespace) -> None:
    manager = make()
    executor = executor_of(fake, manager)
    for number in (1, 2):
        executor.submit(ask(fake, number, 20, 30))
    executor.step()
    executor.step()
    before = manager.vattn.rows.copies
    constant = manager.vattn.rows.tables.offsets.clone()
    for _ in range(10):
        executor.step()
    assert manager.vattn.rows.copies == before
    executor.submit(ask(fake, 3, 5, 3))
    executor.step()
    assert manager.vattn.rows.copies == before + 1
    assert torch.equal(manager.vattn.rows.tables.offsets, constant)
    # What somebody else writes is not taken for ours.
    ids = [1, 2]
    executor.table.fill_(-7)
    manager.copy_batch_block_offsets(executor.table, ids, 1, 0, 2)
    slots = [manager.vattn.cache.slot_of(number) for number in ids]
    assert torch.equal(executor.table[0, :2], manager.vattn.rows.tables.offsets[slots])
    assert torch.equal(manager.host_kv_cache_block_offsets[0, :2], executor.table[0, :2])
    healthy(executor)


def test_a_request_that_was_paused_may_come_back_in_another_slot(make: Make, fake: SimpleNamespace) -> None:
    manager = make()
    executor_of(fake, manager)
    first, second = ask(fake, 1, 20, 9), ask(fake, 2, 90, 9)
    table = torch.zeros((1, 4, 2, 8), dtype=torch.int32)
    manager.prepare_resources(fake.managers.ScheduledRequests([first], []))
    manager.copy_batch_block_offsets(table, [1], 1, 1, 1)
    before = table.clone()
    manager.free_resources(first)
    manager.prepare_resources(fake.managers.ScheduledRequests([second, first], []))
    manager.copy_batch_block_offsets(table, [1], 1, 1, 1)
    assert not torch.equal(table, before)
    slot = manager.vattn.cache.slot_of(1)
    assert torch.equal(table[0, 0, :, :2], manager.vattn.rows.tables.offsets[slot][:, :2])


def test_tables_hold_the_offsets_of_k_and_v(make: Make, fake: SimpleNamespace) -> None:
    manager = make()
    executor_of(fake, manager)
    layout, tables = manager.vattn.cache.layout, manager.vattn.rows.tables
    offsets = tables.offsets[[1, 3]]
    first = [slot * layout.blocks_per_slot for slot in (1, 3)]
    assert offsets[:, 0].tolist() == [[(start + j) * 3 * 2 for j in range(8)] for start in first]
    assert torch.equal(offsets[:, 1], offsets[:, 0] + 1)
    assert tables.offsets[tables.dummy_row].tolist() == [[0] * 8, [1] * 8]


def test_rejected_draft_tokens_are_rewound(make: Make, fake: SimpleNamespace) -> None:
    manager = make(spec_config=SimpleNamespace(max_total_draft_tokens=3))
    executor = executor_of(fake, manager)
    request = ask(fake, 1, 30, 25)
    request.draft_tokens = 3
    executor.submit(request)
    executor.step()
    for _ in range(20):
        executor.step()
    # A context step and 20 that each keep one token of four.
    assert executor.lengths[1] == 30 + 20
    slot = manager.vattn.cache.slot_of(1)
    assert manager.vattn.cache.lengths[slot] == 33 + 20
    healthy(executor)


def test_mapping_ahead_that_fails_ends_no_step(
    make: Make, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager = make()
    executor = executor_of(fake, manager)
    for number in range(3):
        executor.submit(ask(fake, number, 20, 60))

    def fail() -> bool:
        raise DriverError("CUDA_ERROR_UNKNOWN", "map", ())

    monkeypatch.setattr(manager.vattn.cache, "map_ahead", fail)
    while executor.waiting or executor.running:
        executor.step()
    assert sorted(executor.finished) == [0, 1, 2]
    healthy(executor)
    assert "mapping ahead failed and is left to the next step" in caplog.text


def test_a_cancelled_request_leaves_its_memory_to_the_next(make: Make, fake: SimpleNamespace) -> None:
    executor = executor_of(fake, make())
    cache = executor.manager.vattn.cache
    for number in (1, 2):
        executor.submit(ask(fake, number, 60, 60))
    for _ in range(5):
        executor.step()
    executor.cancel(1)
    assert cache.stats().retained_bytes > 0
    executor.submit(ask(fake, 3, 50, 30))
    executor.run()
    healthy(executor)
    assert executor.finished == [1, 3, 2]


def test_more_than_fits_waits_and_is_never_short(make: Make, fake: SimpleNamespace) -> None:
    manager = make(cache_config=None)
    type(manager).stock_blocks = 22
    executor = executor_of(fake, manager)
    assert manager.get_max_resource_count() in (17, 18)
    choose = random.Random(3)
    together = []
    for number in range(20):
        executor.submit(ask(fake, number, choose.randint(1, 90), choose.randint(1, 38)))
    while executor.waiting or executor.running:
        together.append(executor.step())
        healthy(executor)
    assert len(executor.finished) == 20
    assert 1 < max(together) <= 4
    held = manager.vattn.cache.stats().held_bytes
    assert held <= manager.vattn.target


def test_a_batch_beyond_all_promises_changes_nothing(make: Make, fake: SimpleNamespace) -> None:
    manager = make()
    type(manager).stock_blocks = 13
    executor_of(fake, manager)
    free = manager.get_num_free_blocks()
    requests = [ask(fake, number, 120, 1) for number in range(3)]
    with pytest.raises(KVCacheOutOfMemory, match="release or preempt"):
        manager.prepare_resources(fake.managers.ScheduledRequests(requests, []))
    assert manager.get_num_free_blocks() == free
    assert manager.vattn.cache.stats().sequences == 1
    manager.vattn.cache.check_integrity()


def test_buffers_are_the_memory_that_kernels_write(make: Make, fake: SimpleNamespace) -> None:
    manager = make()
    executor = executor_of(fake, manager)
    executor.submit(ask(fake, 5, 20, 9))
    executor.step()
    (ids,) = manager.get_batch_cache_indices([5])
    assert ids == manager.get_cache_indices(executor.running[0])
    for layer in range(3):
        heads_first, tokens_first = manager.get_buffers(layer, "HND"), manager.get_buffers(layer)
        assert heads_first.shape[1:] == (2, 2, 16, 8)
        assert tokens_first.shape[1:] == (2, 16, 2, 8)
        assert heads_first.data_ptr() == tokens_first.data_ptr()
        for token in range(20):
            for field in (0, 1):
                for head in (0, 1):
                    value = executor.kernels.value(5, layer, field, head, token)
                    assert heads_first[ids[token // 16], field, head, token % 16].tolist() == [value] * 8
    with pytest.raises(ConfigError, match="NHD and HND"):
        manager.get_buffers(0, "HDN")
    assert not manager.check_invalid_values_in_kv_cache()
    manager.get_buffers(1, "HND")[ids[0], 0, 0, 3] = torch.nan
    assert manager.check_invalid_values_in_kv_cache(fill_with_zero=True)
    assert manager.get_buffers(2, "HND")[ids[0]].eq(0).all()
    assert not manager.check_invalid_values_in_kv_cache()


def test_memory_is_mapped_ahead_not_in_the_step(make: Make, fake: SimpleNamespace) -> None:
    executor = executor_of(fake, make())
    for number in (1, 2, 3):
        executor.submit(ask(fake, number, 17 + number, 70))
    executor.run()
    stats = executor.manager.vattn.cache.stats()
    assert stats.critical_path_maps == 0
    assert stats.ahead_maps > 0
    healthy(executor)


def test_what_only_the_cpp_pool_can_do_is_refused(make: Make, fake: SimpleNamespace) -> None:
    manager = make()
    executor_of(fake, manager)
    request = ask(fake, 1, 5, 5)
    for call in (
        lambda: manager.free_resources(request, pin_on_release=True),
        lambda: manager.store_blocks_for_reuse(request),
        lambda: manager.pin_blocks(1),
        lambda: manager.get_unique_primary_pool(),
        lambda: manager.get_last_block_id(1),
        lambda: manager.copy_batch_block_offsets(torch.zeros(1, 4, 2, 8), [1], 2, 0, 1),
    ):
        with pytest.raises(UnsupportedFeature, match="not supported by the fixed-address KV cache"):
            call()


def test_shutdown_gives_everything_back(make: Make, fake: SimpleNamespace) -> None:
    executor = executor_of(fake, make())
    executor.submit(ask(fake, 1, 40, 9))
    executor.step()
    executor.manager.shutdown()
    assert fake.bindings.KVCacheManagerCpp.pool_bytes_allocated == 0
    assert executor.manager.vattn.cache.driver.live_handles == 0
