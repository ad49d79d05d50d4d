"""What the fixed-address cache does beyond the contract: layouts, lookahead, parking, adoption, reclaiming, fences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from contents import admit, expect, fill
from shapes import SHAPE

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import AddressSpaceExhausted, ConfigError, DriverError, InvariantViolation, KVCacheOutOfMemory
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import CountingDriver

PAGE = 4096


def steps(cache: KVCacheManager, count: int) -> None:
    """Every sequence grows by a token, `count` times, mapping ahead after each."""
    for _ in range(count):
        cache.prepare_step(np.where(cache.lengths > 0, cache.lengths + 1, 0))
        cache.map_ahead()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("kv_factor", [1, 2])
@pytest.mark.parametrize("layers_per_range", [1, 2, 4])
def test_every_layout_holds_every_token_apart(
    driver: Driver, layers_per_range: int, kv_factor: int, dtype: torch.dtype
) -> None:
    # 300 tokens of 192 bytes and more a layer straddle pages of 4 KiB; on the card two slots lie in pages of their own.
    shape = replace(SHAPE, dtype=dtype, kv_factor=kv_factor, num_slots=2, max_seq_len=300)
    with KVCacheManager(shape, driver, 64 << 20, layers_per_range, lookahead=0) as cache:
        for sequence in ("a", "b"):
            cache.admit(sequence, 300)
        marks = {}
        for layer in range(4):
            kv = cache.layer(layer)
            assert kv.k.dtype == dtype
            assert kv.k.shape == (3, 300, 2, 24)
            for slot in range(2):
                for role, view in enumerate((kv.k, kv.v)[:kv_factor]):
                    mark = 1.0 + layer * 4 + slot * 2 + role
                    view[slot] = torch.full((300, 2, 24), mark).to(dtype)
                    marks[layer, slot, role] = mark
        for (layer, slot, role), mark in marks.items():
            kv = cache.layer(layer)
            assert bool(((kv.k, kv.v)[role][slot].float() == mark).all())
        if kv_factor == 1:
            assert cache.layer(0).k.data_ptr() == cache.layer(0).v.data_ptr()
        if driver.device != "cpu":
            torch.cuda.synchronize()
        cache.check_integrity()


def test_a_prompt_takes_the_fewest_extents(host_driver: HostDriver) -> None:
    driver = CountingDriver(host_driver)
    shape = replace(SHAPE, max_seq_len=2000)
    with KVCacheManager(shape, driver, 64 << 20, lookahead=0) as cache:
        before = driver.calls["create"]
        cache.admit("a", 2000)  # 750 pages of 4 KiB: 5 × 128, then 64, 32, 8, 4, 2
        assert driver.calls["create"] - before == 10
        assert cache.stats().admission_maps == 10


def test_steady_decode_maps_ahead_and_never_in_a_step(host_driver: HostDriver) -> None:
    shape = replace(SHAPE, max_seq_len=400, num_slots=3)
    with KVCacheManager(shape, host_driver, 16 << 20, lookahead=16) as cache:
        for sequence, prompt in (("a", 5), ("b", 5), ("c", 100)):
            cache.admit(sequence, prompt)
        cache.map_ahead()
        cache.map_ahead()
        cache.map_ahead()
        steps(cache, 250)
        stats = cache.stats()
        assert stats.critical_path_maps == 0
        assert stats.ahead_maps > 0
        # A token takes 1,536 bytes in its row; the lookahead and a page's rounding are all that is mapped beyond.
        beyond = cache.frontiers - cache.lengths
        assert (beyond > 0).all()
        assert (beyond <= 16 + 3).all()


def test_without_lookahead_a_step_maps_for_itself(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 1 << 20, lookahead=0) as cache:
        cache.admit("a", 2)
        steps(cache, 10)
        assert cache.stats().critical_path_maps > 0
        assert cache.stats().ahead_maps == 0


def test_sequences_of_one_length_do_not_all_map_in_one_step(host_driver: HostDriver) -> None:
    shape = replace(SHAPE, num_slots=64, max_seq_len=400)
    with KVCacheManager(shape, host_driver, 64 << 20, lookahead=64) as cache:
        for sequence in range(64):
            cache.admit(sequence, 20)
        most = 0
        for _ in range(300):
            cache.prepare_step(cache.lengths + 1)
            before = cache.stats().ahead_maps
            cache.map_ahead()
            most = max(most, cache.stats().ahead_maps - before)
        assert 0 < most <= 4 * 6  # four slots at a time, each of at most six extents
        assert cache.stats().critical_path_maps <= 64 * 6  # before the first lookahead was filled


def test_a_freed_slot_is_adopted_without_a_driver_call(host_driver: HostDriver) -> None:
    driver = CountingDriver(host_driver)
    with KVCacheManager(SHAPE, driver, 1 << 20, lookahead=0) as cache:
        cache.admit("a", 30)
        cache.release("a")
        assert cache.stats().parked_bytes == cache.layout.bytes_for(30)
        before = driver.calls.copy()
        assert cache.admit("b", 28) == 0
        assert driver.calls == before
        assert cache.stats().parked_bytes == 0


def test_adoption_takes_the_best_fit_within_the_bucket(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 4 << 20, lookahead=0) as cache:
        for sequence, prompt in enumerate((50, 20, 30, 1)):
            assert cache.admit(sequence, prompt) == sequence
        for sequence in (0, 1, 2):
            cache.release(sequence)
        assert cache.admit("fits the second best", 29) == 2
        assert cache.admit("fits the smallest", 3) == 1
        cache.release(3)
        cache.release("fits the second best")
        cache.release("fits the smallest")
        # Nothing runs: slots 2 and 3 would need a larger bucket than one lane.
        assert cache.admit("alone", 25) == 0


def test_pressure_takes_the_tail_of_the_longest_parked(host_driver: HostDriver) -> None:
    pages = 1 + 3 * 12
    with KVCacheManager(replace(SHAPE, max_seq_len=64), host_driver, pages * PAGE, lookahead=0) as cache:
        for sequence in ("a", "b", "c"):
            cache.admit(sequence, 32)  # 12 pages
        cache.release("b")
        cache.release("a")
        fill(cache, "c", range(32))
        cache.extend("c", 8)  # 3 pages more
        assert cache.arena.slots[1].mapped < 12 * PAGE  # b was parked first
        assert cache.arena.slots[0].mapped == 12 * PAGE
        assert cache.frontiers.tolist()[:2] == [0, 0]
        fill(cache, "c", range(32, 40))
        expect(cache, "c", range(40))
        cache.check_integrity()


def test_nothing_is_unmapped_before_its_fence(host_driver: HostDriver) -> None:
    """I5: the work in flight when a slot was parked may still read it."""
    pages = 1 + 12 + 4
    with KVCacheManager(replace(SHAPE, max_seq_len=64), host_driver, pages * PAGE, lookahead=0) as cache:
        cache.admit("a", 32)
        host_driver.hold()
        cache.release("a")
        cache.admit("b", 10)  # adopts: the same stream orders it after what a still does
        cache.release("b")
        before = host_driver.live_mappings
        cache.arena.slots[0].state = type(cache.arena.slots[0].state).FREE
        with pytest.raises(Exception, match="NOT_READY"):
            cache.arena.reclaim(PAGE)
        assert host_driver.live_mappings == before
        host_driver.complete()
        assert cache.arena.reclaim(PAGE) >= PAGE
        cache.check_integrity()


def test_out_of_pages_names_what_there_is(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 10 * PAGE, lookahead=0) as cache:
        cache.admit("a", 20)  # 8 pages; one is the dummy slot's
        with pytest.raises(KVCacheOutOfMemory, match=r"only 4,096 are free, 0 parked and 0 retained for nobody"):
            cache.admit("b", 10)


def test_mapping_ahead_yields_where_memory_is_short(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 9 * PAGE, lookahead=32) as cache:
        cache.admit("a", 20)
        assert cache.map_ahead() == 0
        cache.check_integrity()


def test_addresses_are_never_those_of_another_slot(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 4 << 20) as cache:
        k = cache.layer(3).k
        assert k.stride(0) * 4 == cache.layout.slot_stride >= 50 * cache.layout.row_bytes
        assert k.stride(0) * 4 % PAGE == 0


def test_too_many_addresses_are_refused_and_nothing_is_left(host_driver: HostDriver) -> None:
    with pytest.raises(AddressSpaceExhausted):
        KVCacheManager(replace(SHAPE, num_slots=1000, max_seq_len=10**11), host_driver, 1 << 20)


def test_the_books_are_checked(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 1 << 20) as cache:
        cache.admit("a", 10)
        cache.check_integrity()
        cache.frontiers[0] += 1
        with pytest.raises(
            InvariantViolation, match=r"slot 0 \(running\): frontier 11, but 16,384 bytes back 10 tokens"
        ):
            cache.check_integrity()
        cache.frontiers[0] -= 1
        cache.lengths[0] = 49
        with pytest.raises(InvariantViolation, match=r"sequence 'a': length 49, frontier 10"):
            cache.check_integrity()
        cache.lengths[0] = 10
        cache.arena.pool.held_bytes += 1
        with pytest.raises(InvariantViolation, match="extents add up to"):
            cache.check_integrity()
        cache.arena.pool.held_bytes -= 1
        (extent,) = cache.arena.pool.acquire(PAGE)
        with pytest.raises(InvariantViolation, match="extents add up to"):
            cache.check_integrity()
        cache.arena.pool.release([extent])
        cache.check_integrity()


def test_two_managers_share_a_driver(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 1 << 20) as one, KVCacheManager(SHAPE, host_driver, 1 << 20) as other:
        for cache in (one, other):
            cache.admit("a", 10)
        fill(one, "a", range(10))
        assert not other.layer(0).k[0, :10].any()
        one.close()
        fill(other, "a", range(10))
        expect(other, "a", range(10))


def test_layers_per_range_must_divide(host_driver: HostDriver) -> None:
    with pytest.raises(ConfigError, match="must divide"):
        KVCacheManager(CacheShape(4, 1, 8, torch.float32, 1, 8), host_driver, 1 << 20, layers_per_range=3)


def parked(host_driver: Driver, budget: int, *prompts: int) -> KVCacheManager:
    """A cache in which sequences of so many tokens have come and gone, the first in slot 0."""
    cache = KVCacheManager(SHAPE, host_driver, budget, 4, lookahead=0)
    for sequence, tokens in enumerate(prompts):
        cache.admit(sequence, tokens)
    for sequence in range(len(prompts)):
        cache.release(sequence)
    return cache


def test_a_parked_slot_more_than_twice_too_large_is_left_for_who_needs_it(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 1 << 20, 4, lookahead=0) as cache:
        for sequence, tokens in (("large", 50), ("small", 5), ("stays", 5)):
            cache.admit(sequence, tokens)
        cache.release("large")
        cache.release("small")
        assert cache.admit("a", 5) == 1
        assert cache.admit("b", 5) == 3
        assert cache.admit("long", 45) == 0
        assert cache.stats().parked_bytes == 0


def test_a_surplus_comes_along_while_memory_is_plenty_and_is_there_when_it_is_needed(host_driver: HostDriver) -> None:
    driver = CountingDriver(host_driver)
    with parked(driver, 1 << 20, 30) as cache:
        before = driver.calls.copy()
        assert cache.admit("a", 20) == 0
        # 8 of 12 pages hold 21 tokens; the rest is mapped, but nobody's.
        assert cache.frontiers[0] == 21
        assert cache.arena.slots[0].mapped == 12 * PAGE
        cache.extend("a", 3)
        assert cache.frontiers[0] == 24
        cache.map_ahead()
        # Of the extent of four pages one is needed, so all of it stays.
        assert cache.frontiers[0] == 32
        assert driver.calls == before
        fill(cache, "a", range(32))
        expect(cache, "a", range(32))
        cache.check_integrity()


def test_a_surplus_goes_to_the_stock_beside_the_next_step_behind_its_fence(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 1 << 20, 4, lookahead=0) as cache:
        cache.admit("gone", 30)
        host_driver.hold()
        cache.release("gone")
        cache.admit("a", 20)
        cache.map_ahead()
        assert cache.arena.slots[0].mapped == 12 * PAGE
        cache.check_integrity()
        host_driver.complete()
        cache.map_ahead()
        assert cache.arena.slots[0].mapped == 8 * PAGE
        assert cache.arena.pool.free_bytes == 4 * PAGE
        assert cache.stats().surplus_bytes == 0
        fill(cache, "a", range(21))
        cache.extend("a", 10)
        assert cache.arena.pool.free_bytes == 0
        expect(cache, "a", range(21))
        cache.check_integrity()


def test_a_surplus_that_others_took_first_is_not_looked_for_again(host_driver: HostDriver) -> None:
    with parked(host_driver, 1 << 20, 30) as cache:
        cache.admit("a", 20)
        assert cache.arena.trim_pending == {0}
        used = cache.stats().held_bytes - cache.arena.pool.free_bytes
        cache.set_budget(used - 2 * PAGE)
        assert cache.arena.slots[0].mapped == 8 * PAGE
        cache.map_ahead()
        assert not cache.arena.has_pending_work
        assert cache.frontiers[0] == 21
        cache.check_integrity()


def test_memory_kept_back_follows_its_sequence_to_another_slot(host_driver: HostDriver) -> None:
    with parked(host_driver, 1 << 20, 30) as cache:
        admit(cache, "a", 20)
        cache.move("a", 2)
        assert cache.frontiers.tolist() == [0, 0, 21, 0]
        cache.check_integrity()
        cache.map_ahead()
        assert cache.arena.slots[2].mapped == 8 * PAGE
        cache.arena.complete_pending_unmaps(wait=True)
        assert cache.arena.pool.free_bytes == 4 * PAGE
        expect(cache, "a", range(20))
        cache.check_integrity()


def test_a_surplus_is_taken_away_first_where_memory_is_short(host_driver: HostDriver) -> None:
    # The dummy slot's page, and little more than what is parked.
    budget = (1 + 12) * 4096
    with parked(host_driver, budget, 30) as cache:
        assert cache.admit("a", 27) == 0
        assert cache.arena.slots[0].mapped == cache.layout.bytes_for(27) == 11 * 4096
        fill(cache, "a", range(27))
        expect(cache, "a", range(27))
        assert cache.admit("b", 2) == 1
        cache.check_integrity()


def test_a_surplus_still_in_use_is_waited_for(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 13 * 4096, 4, lookahead=0) as cache:
        cache.admit("gone", 30)
        host_driver.hold()
        cache.release("gone")
        mapped = host_driver.live_mappings
        with pytest.raises(DriverError, match="the work is held"):
            cache.admit("a", 27)
        assert host_driver.live_mappings == mapped
        host_driver.complete()
        assert cache.admit("a", 27) == 0
        cache.check_integrity()
