from __future__ import annotations

import pytest
import torch
from contents import admit, expect, fill
from shapes import SHAPE

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.vattention_paper import vattention_paper
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.wrappers import CountingDriver


def test_a_sequence_holds_a_page_in_each_tensor_and_every_page_is_mapped_alone(driver: Driver) -> None:
    counting = CountingDriver(driver)
    granularity = driver.granularity()
    with vattention_paper(SHAPE, counting, 1 << 30) as cache:
        assert cache.layout.num_ranges == 2 * SHAPE.num_layers
        before = dict(counting.calls)
        admit(cache, "a", 1)
        assert cache.stats().mapped_bytes == 2 * SHAPE.num_layers * granularity
        new = {name: counting.calls[name] - before.get(name, 0) for name in ("create", "map", "set_access")}
        assert new == dict.fromkeys(("create", "map", "set_access"), 2 * SHAPE.num_layers)
        cache.extend("a", 49)
        fill(cache, "a", range(1, 50))
        expect(cache, "a", range(50))
        assert counting.calls["set_access"] == counting.calls["map"]
        cache.check_integrity()


def test_the_next_step_finds_its_page_there(driver: Driver) -> None:
    with vattention_paper(SHAPE, driver, 1 << 30) as cache:
        cache.admit("a", int(driver.granularity()) // cache.layout.row_bytes if driver.device == "cpu" else 1)
        cache.map_ahead()
        assert cache.frontiers[0] > cache.lengths[0]
        cache.extend("a", 1)
        assert cache.stats().critical_path_maps == 0


def test_ours_maps_a_prompt_by_far_fewer_calls(driver: Driver) -> None:
    shape = CacheShape(8, 2, 64, torch.float32, 2, 2048)
    calls = {}
    for kind in (vattention_paper, KVCacheManager):
        counting = CountingDriver(driver)
        with kind(shape, counting, 1 << 30) as cache:
            before = counting.calls["set_access"]
            cache.admit("a", 2000)
            calls[kind] = counting.calls["set_access"] - before
    assert calls[vattention_paper] >= 8 * calls[KVCacheManager]


@pytest.mark.parametrize("kv_factor", [1, 2])
def test_k_and_v_are_tensors_of_their_own_unless_they_are_one(driver: Driver, kv_factor: int) -> None:
    shape = CacheShape(2, 1, 32, torch.float32, 2, 40, kv_factor=kv_factor)
    with vattention_paper(shape, driver, 1 << 30) as cache:
        cache.admit("a", 10)
        kv = cache.layer(1)
        assert (kv.k.data_ptr() == kv.v.data_ptr()) == (kv_factor == 1)
        if kv_factor == 2:
            fill(cache, "a", range(10))
            expect(cache, "a", range(10))
