"""Slots, budget and tables of the adapter over either driver, without TensorRT-LLM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from contents import expect, fill

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.errors import ConfigError, KVCacheOutOfMemory, NoFreeSlot
from trtllm_vattn.memory.layout import BlockLayout
from trtllm_vattn.trtllm.slots import RequestSlots, slots_to_keep
from trtllm_vattn.trtllm.tables import AffineTables, RowGatherer
from trtllm_vattn.vmm.base import Driver

SHAPE = CacheShape(4, 2, 24, torch.float32, 3, 96)


@pytest.fixture
def slots(driver: Driver) -> Iterator[RequestSlots]:
    made = RequestSlots(SHAPE, driver, 2, 16, 16)
    made.cache.shrink_towards(made.budget_for(12))
    yield made
    made.cache.close()


def test_block_0_is_mapped_and_zero_for_good(slots: RequestSlots) -> None:
    for layer in range(4):
        assert slots.cache.blocks(layer)[0].eq(0).all()
    slots.prepare_step({1: 20}, {})
    slots.cache.release(1)
    slots.cache.shrink_towards(slots.least_bytes)
    assert slots.cache.stats().held_bytes == slots.least_bytes
    assert slots.cache.blocks(0)[0].eq(0).all()


def test_as_many_blocks_as_were_promised_can_be_had_however_they_are_shared(slots: RequestSlots) -> None:
    assert slots.blocks_backed_by(slots.budget_for(12)) == 12
    for shares in ((96, 95, 0), (33, 96, 40), (16, 16, 96)):
        admitted = {number: tokens for number, tokens in enumerate(shares, 1) if tokens}
        assert sum(-(-tokens // 16) for tokens in shares) <= 12
        slots.prepare_step(admitted, {})
        for number, tokens in admitted.items():
            fill(slots.cache, number, range(tokens))
        for number, tokens in admitted.items():
            expect(slots.cache, number, range(tokens))
            slots.cache.release(number)
        slots.cache.check_integrity()


def test_what_is_mapped_ahead_of_one_is_taken_back_for_another(slots: RequestSlots) -> None:
    slots.prepare_step({1: 14, 2: 14}, {})
    fill(slots.cache, 1, range(14))
    while slots.cache.map_ahead():
        pass
    assert slots.cache.frontiers[slots.cache.slot_of(1)] >= 32
    # On the card a page holds a request's blocks and more, so there is nothing to map ahead.
    assert slots.cache.stats().ahead_maps > 0 or slots.cache.layout.granularity > slots.cache.layout.block_bytes
    slots.cache.shrink_towards(slots.budget_for(8))
    slots.prepare_step({3: 96}, {})
    assert slots.cache.frontiers[slots.cache.slot_of(3)] == 96
    expect(slots.cache, 1, range(14))
    slots.cache.check_integrity()


def test_what_is_mapped_ahead_of_one_is_taken_back_for_anothers_next_token(slots: RequestSlots) -> None:
    slots.cache.shrink_towards(slots.budget_for(4))
    slots.prepare_step({1: 14, 2: 14}, {})
    while slots.cache.map_ahead():
        pass
    slots.prepare_step({}, {1: 34})
    fill(slots.cache, 1, range(48))
    expect(slots.cache, 1, range(48))
    assert slots.cache.frontiers[slots.cache.slot_of(2)] >= 14
    slots.cache.check_integrity()


def test_a_step_is_for_all_or_for_none(slots: RequestSlots) -> None:
    slots.prepare_step({1: 20}, {})
    with pytest.raises((NoFreeSlot, KVCacheOutOfMemory)):
        slots.prepare_step({2: 20, 3: 20, 4: 20}, {1: 1})
    assert slots.cache.stats().sequences == 2
    assert slots.cache.lengths[slots.cache.slot_of(1)] == 20
    slots.prepare_step({2: 5}, {1: 3})
    slots.rewind(1, 3)
    assert slots.cache.lengths[slots.cache.slot_of(1)] == 20
    assert slots.block_ids(1) == [slots.cache.layout.blocks_per_slot * slots.cache.slot_of(1) + j for j in (0, 1)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_rows_are_gathered_on_the_device_only_when_they_change(slots: RequestSlots, device: str) -> None:
    layout = slots.cache.layout
    tables = AffineTables(layout, 8, 0, torch.device(device))
    # Beyond a slot's own blocks a row names the tail.
    assert (tables.offsets[2, 0] // (layout.layers_per_range * layout.kv_factor)).tolist() == [
        2 * layout.blocks_per_slot + j if j < layout.blocks_per_slot else 0 for j in range(8)
    ]
    host = torch.zeros((2, 4, 2, 8), dtype=torch.int32)
    rows = RowGatherer(tables, lambda ids: [number % 4 for number in ids], lambda ids: [2] * len(ids), host)
    table = torch.full((2, 4, 2, 8), -1, dtype=torch.int32, device=device)
    other = table.clone()
    assert rows.fill(table, [1, 7])
    assert not rows.fill(table, [1, 7])
    assert rows.fill(other, [1, 7])
    assert torch.equal(table, other)
    assert table[1, :2].tolist() == tables.offsets[[1, 3]].tolist() == host[0, :2].tolist()
    assert rows.fill(table, [7, 1])
    rows.epoch += 1
    assert rows.fill(table, [7, 1])
    # A prompt's row names the tail behind its last block, on the device and on the host.
    assert rows.fill(table, [1, 7], 1)
    assert not rows.fill(table, [1, 7], 1)
    assert table[1, 0, 0, :3].tolist() == [*tables.offsets[1, 0, :2].tolist(), 0]
    assert table[0, 0, 1, 2:].tolist() == [1] * 6
    assert table[0, 1].tolist() == tables.offsets[3].tolist()
    assert torch.equal(table[:, :2].cpu(), host[:, :2])
    assert rows.fill(table, [1, 7])
    with torch.inference_mode():
        uncounted = torch.zeros_like(table)
        assert rows.fill(uncounted, [2])
        assert not rows.fill(uncounted, [2])
    with pytest.raises(ConfigError, match="raise max_batch_size"):
        rows.fill(table, [1, 2, 3, 4, 5])


def test_slots_to_keep_are_as_many_as_offsets_and_addresses_reach() -> None:
    sizes = dict(num_layers=32, layers_per_range=32, layer_token_bytes=4096, granularity=2 << 20, tokens_per_block=32)
    plain = BlockLayout(**sizes, max_seq_len=8192, num_slots=65, kv_factor=2)
    assert slots_to_keep(plain) == 4 * 65
    few = BlockLayout(**sizes, max_seq_len=8192, num_slots=3, kv_factor=2)
    assert slots_to_keep(few) == 64
    # 2^31 offsets of 32 layers, K and V: 8,192 slots of 4,096 blocks; 2^44 bytes are 1,024 of them.
    long = BlockLayout(**sizes, max_seq_len=131072, num_slots=1025, kv_factor=2)
    assert slots_to_keep(long) == 1024
    small = dict(sizes, num_layers=80, layers_per_range=80, layer_token_bytes=64, tokens_per_block=16)
    for slots in (800, 1600, 1630):
        layout = BlockLayout(**small, max_seq_len=131072, num_slots=slots, kv_factor=2)
        BlockLayout(**small, max_seq_len=131072, num_slots=slots + slots_to_keep(layout), kv_factor=2)
        assert slots + slots_to_keep(layout) == 1636
