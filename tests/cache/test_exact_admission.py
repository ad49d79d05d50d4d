"""A cache whose sequences hold their need and no more, and whose fences cover further streams."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.blocks import BlockKVCache
from trtllm_vattn.cache.config import CacheConfig, Layout
from trtllm_vattn.vmm.base import Driver


@pytest.fixture
def cache(driver: Driver) -> Iterator[BlockKVCache]:
    config = CacheConfig(
        layout=Layout.BLOCKS,
        layers_per_range=2,
        tokens_per_block=16,
        exact_admission=True,
        fence_streams=(0,),
        lookahead=16,
    )
    made = BlockKVCache(CacheShape(4, 2, 24, torch.float32, 4, 96), driver, config=config)
    made.set_budget(12 * made.layout.num_ranges * made.layout.slot_stride)
    yield made
    made.close()


def test_fences_cover_further_streams(cache: BlockKVCache) -> None:
    slot = cache.arena.slots[cache.admit(1, 40)]
    cache.release(1)
    assert slot.fence is not None
    slot.fence.wait()
    assert slot.fence.done()


def test_a_sequence_gets_its_need_and_no_more(cache: BlockKVCache) -> None:
    """Memory that it found parked beyond that may have been promised to another."""
    cache.admit(1, 80)
    cache.release(1)
    slot = cache.arena.slots[cache.admit(2, 48)]
    assert slot.mapped == cache.layout.bytes_for(48)
    cache.check_integrity()


def test_a_budget_shrinks_as_far_as_running_sequences_allow(cache: BlockKVCache) -> None:
    cache.admit(1, 48)
    cache.admit(2, 90)
    cache.release(2)
    least = (cache.layout.bytes_for(48) * cache.layout.num_ranges) + cache.layout.least_bytes
    assert cache.shrink_towards(1) == least == cache.budget_bytes == cache.stats().held_bytes
    assert cache.shrink_towards(2 * least) == 2 * least == cache.budget_bytes
    cache.check_integrity()


def test_mapped_tensors_cover_what_is_mapped(cache: BlockKVCache) -> None:
    cache.admit(1, 48)
    tensors = list(cache.mapped_tensors())
    assert sum(tensor.nbytes for tensor in tensors) == cache.stats().held_bytes
    for tensor in tensors:
        tensor.fill_(3.0)
    assert cache.blocks(3)[cache.slot_of(1) * cache.layout.blocks_per_slot].eq(3.0).all()
