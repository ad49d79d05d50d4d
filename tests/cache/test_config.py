"""Settings of a cache are checked; what not every cache can do is a capability that says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from shapes import SHAPE

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.cache.blocks import BlockKVCache
from trtllm_vattn.cache.config import CacheConfig, Layout
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import ConfigError, KVCacheOutOfMemory, OutOfPages
from trtllm_vattn.vmm.host import HostDriver

PAGE = 4096


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "rows"}, "layout is 'rows'"),
        ({"layout": Layout.TENSORS, "layers_per_range": 2}, "tensors have ranges of their own"),
        ({"extent_classes": 0}, "extent_classes is 0"),
        ({"lookahead": -1}, "lookahead is -1"),
        ({"lookahead": 1.5}, "lookahead is 1.5"),
        ({"idle_after_s": 0}, "idle_after_s is 0"),
        ({"idle_floor": "much"}, "idle_floor is 'much'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheConfig(**settings)


def test_what_is_given_takes_the_place_of_the_config(host_driver: HostDriver) -> None:
    config = CacheConfig(lookahead=7, idle_floor="1MiB")
    with KVCacheManager(SHAPE, host_driver, 1 << 20, lookahead=3, config=config) as cache:
        assert (cache.ahead.tokens, cache.config.idle_floor) == (3, 1 << 20)
    with KVCacheManager(SHAPE, host_driver, 1 << 20, config=config) as cache:
        assert cache.ahead.tokens == 7


def test_a_class_refuses_another_layout(host_driver: HostDriver) -> None:
    with pytest.raises(ConfigError, match="KVCacheManager has no layout 'blocks'"):
        KVCacheManager(SHAPE, host_driver, 1 << 20, config=CacheConfig(layout=Layout.BLOCKS))
    with pytest.raises(ConfigError, match="BlockKVCache has no layout 'rows'"):
        BlockKVCache(SHAPE, host_driver, 1 << 20, config=CacheConfig())


def test_single_extents_and_single_calls(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 1 << 20, config=CacheConfig(extent_classes=1)) as cache:
        cache.admit("a", 40)
        assert {mapping.size for stripe in cache.arena.slots[0].stripes for mapping in stripe} == {PAGE}


def test_a_cache_that_cannot_remap_says_so(cache: KVCache) -> None:
    cache.admit("a", 5)
    calls: list[Callable[[], object]] = [
        lambda: cache.set_budget(1 << 30),
        lambda: cache.move("a", 2),
        lambda: cache.replace("a"),
        lambda: cache.fork("a", "b", 3),
    ]
    for call in calls:
        if cache.remaps:
            call()
        else:
            with pytest.raises(ConfigError, match=r"has its memory for life and cannot .*; use the vattn cache"):
                call()
    cache.check_integrity()


def test_every_cache_answers_for_its_slots_and_memory(cache: KVCache) -> None:
    slot = cache.admit("a", 5)
    assert cache.free_slots() == [other for other in range(SHAPE.num_slots) if other != slot]
    assert cache.broken_slots() == []
    assert cache.held_bytes == cache.stats().held_bytes
    assert cache.budget_bytes == cache.stats().budget_bytes
    assert (cache.mappings_in(slot) > 0) == cache.remaps
    cache.preallocate(1, 5)
    cache.preallocate_for([5])
    for tensor in cache.storages():
        base = tensor.untyped_storage().data_ptr()
        assert any(region.base <= base < region.base + region.size for region in cache.regions())
    cache.release("a")
    held = cache.held_bytes
    assert cache.release_free_memory() == held - cache.held_bytes
    assert (cache.held_bytes < held) == cache.remaps


def test_free_memory_comes_back_by_size_or_whole(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 1 << 20, lookahead=0) as cache:
        cache.admit("a", 40)
        cache.release("a")
        held, parked = cache.held_bytes, cache.stats().parked_bytes
        assert cache.release_free_memory(1) >= 1
        assert (cache.held_bytes, cache.stats().parked_bytes < parked) == (held, True)
        assert cache.release_free_memory() == held - cache.layout.least_bytes


def test_old_names_are_the_new_ones(host_driver: HostDriver) -> None:
    assert OutOfPages is KVCacheOutOfMemory
    with KVCacheManager(SHAPE, host_driver, 8 * PAGE, lookahead=0) as cache, pytest.raises(OutOfPages):
        cache.admit("a", 50)
    assert KVCacheManager.stock_up is KVCacheManager.preallocate
    assert KVCacheManager.stock_for is KVCacheManager.preallocate_for
