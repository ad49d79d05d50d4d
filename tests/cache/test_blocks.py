"""The block layout over either driver: contents through its affine table, whatever happens beneath."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from contents import admit, expect, fill
from shapes import SHAPE

from trtllm_vattn.cache.blocks import BlockKVCache
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import KVCacheOutOfMemory
from trtllm_vattn.vmm.base import Driver

BLOCK = 16


@pytest.fixture(params=[1, 2, 4])
def build(request: pytest.FixtureRequest, driver: Driver) -> Iterator[Callable[..., BlockKVCache]]:
    made: list[BlockKVCache] = []

    def make(pages: int = 400, lookahead: int = 0) -> BlockKVCache:
        budget = pages * driver.granularity()
        made.append(BlockKVCache(SHAPE, driver, budget, request.param, lookahead, BLOCK))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def test_the_table_is_affine_and_made_once(build: Callable[..., BlockKVCache]) -> None:
    cache = build()
    before = cache.table.clone()
    per_slot = cache.layout.blocks_per_slot
    assert cache.table.shape == (5, 4)
    assert cache.table[:4].tolist() == [[s * per_slot + j for j in range(4)] for s in range(4)]
    admit(cache, "a", 50)
    cache.release("a")
    admit(cache, "b", 20)
    assert torch.equal(cache.table, before)
    assert all(cache.layer(layer).table is cache.table for layer in range(4))  # type: ignore[union-attr]


def test_a_layers_blocks_lie_k_then_v_head_by_head(build: Callable[..., BlockKVCache]) -> None:
    cache = build()
    admit(cache, "a", 20)
    blocks = cache.blocks(2)
    assert blocks.shape == (5 * cache.layout.blocks_per_slot, 2, 2, BLOCK, 24)
    assert blocks[0].is_contiguous()
    assert blocks.stride(0) * 4 == cache.layout.block_bytes
    kv = cache.layer(2)
    assert torch.equal(blocks[1, 0, :, :4], kv.k[1, :4].transpose(0, 1))
    assert torch.equal(blocks[1, 1, :, :4], kv.v[1, :4].transpose(0, 1))
    # The next layer of the same range lies right behind.
    index, offset = cache.layout.place_of(2)
    after = [layer for layer in range(4) if cache.layout.place_of(layer)[0] == index and layer == 3]
    assert all(cache.layout.place_of(layer)[1] - offset == 2 * cache.layout.part_bytes for layer in after)


def test_frontiers_are_whole_blocks(build: Callable[..., BlockKVCache]) -> None:
    cache = build(lookahead=BLOCK)
    admit(cache, "a", 1)
    # On the card one page holds more than a slot.
    assert cache.frontiers[0] % BLOCK == 0 < cache.frontiers[0] or cache.frontiers[0] == SHAPE.max_seq_len
    for length in range(2, 51):
        cache.prepare_step(np.array([length, 0, 0, 0]))
        fill(cache, "a", range(length - 1, length))
        cache.map_ahead()
        assert cache.frontiers[0] % BLOCK == 0 or cache.frontiers[0] == 50
    expect(cache, "a", range(50))
    cache.check_integrity()


def test_a_fork_shares_whole_blocks_and_copies_the_rest(build: Callable[..., BlockKVCache]) -> None:
    cache = build()
    admit(cache, "a", 16)
    for end in (32, 48):
        cache.extend("a", 16)
        fill(cache, "a", range(end - 16, end))
    cache.fork("a", "b", 40)
    expect(cache, "b", range(40), "a")
    cache.extend("b", 10)
    fill(cache, "b", range(40, 50))
    cache.truncate("a", 21)
    cache.extend("a", 5)
    fill(cache, "a", range(21, 26))
    expect(cache, "b", range(40), "a")
    expect(cache, "b", range(40, 50))
    expect(cache, "a", range(26))
    cache.check_integrity()


def test_contents_stay_when_memory_is_moved_and_replaced(build: Callable[..., BlockKVCache]) -> None:
    cache = build()
    admit(cache, "a", 37)
    assert cache.replace("a") > 0
    expect(cache, "a", range(37))
    cache.move("a", 3)
    expect(cache, "a", range(37))
    cache.extend("a", 13)
    fill(cache, "a", range(37, 50))
    expect(cache, "a", range(50))
    cache.check_integrity()


def test_what_is_short_is_refused_whole(build: Callable[..., BlockKVCache]) -> None:
    cache = build()
    admit(cache, "a", 1)
    cache.set_budget(cache.arena.pool.held_bytes)
    frontier = int(cache.frontiers[0])
    if frontier < 50:
        with pytest.raises(KVCacheOutOfMemory):
            cache.extend("a", frontier)
        assert cache.lengths[0] == 1
    expect(cache, "a", range(1))


def test_it_is_made_by_name(driver: Driver) -> None:
    with make_cache("blocks", SHAPE, driver.device, tokens_per_block=64, driver=driver) as cache:
        assert isinstance(cache, BlockKVCache)
        admit(cache, "a", 50)
        expect(cache, "a", range(50))
