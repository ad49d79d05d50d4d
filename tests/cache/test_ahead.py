"""Mapping ahead by a thread: what it maps, that it rests, that it fails aloud, and what memory it keeps or returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from contents import admit, expect, fill
from shapes import SHAPE

from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import DriverError, KVCacheOutOfMemory
from trtllm_vattn.memory.lookahead import BackgroundThread, StepTimingModel
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import CountingDriver, FaultyDriver

PAGE = 4096
LONG = replace(SHAPE, max_seq_len=4000)


def step(cache: KVCacheManager) -> None:
    cache.prepare_step(np.where(cache.lengths > 0, cache.lengths + 1, 0))


class EvenPace(StepTimingModel):
    """Steps of 10 ms and mappings of 100 us, whatever the machine does."""

    def __init__(self) -> None:
        super().__init__()
        self.step_s, self.mapping_s = 10e-3, 100e-6

    def observe_lengths(self, lengths: np.ndarray) -> None:
        """They are as they are."""

    def observe_mappings(self, count: int, seconds: float) -> None:
        """So are they."""


@pytest.fixture
def faulty() -> Iterator[FaultyDriver]:
    host = HostDriver()
    yield FaultyDriver(host)
    assert (host.live_mappings, host.live_handles, host.live_reservations) == (0, 0, 0)


def test_steps_find_their_memory_there(driver: Driver) -> None:
    with KVCacheManager(LONG, driver, 256 << 20, 4) as cache:
        cache.start_thread()
        cache.start_thread()
        for sequence in range(3):
            admit(cache, sequence, 30)
        assert cache.wait_ahead()
        for length in range(30, 300):
            step(cache)
            for sequence in range(3):
                fill(cache, sequence, range(length, length + 1))
            cache.map_ahead()
            assert cache.wait_ahead()
        stats = cache.stats()
        assert stats.critical_path_maps == 0
        if driver.device == "cpu":
            assert stats.ahead_maps > 20
        for sequence in range(3):
            expect(cache, sequence, range(300))
        cache.check_integrity()


def test_it_rests_when_nothing_is_due(host_driver: HostDriver) -> None:
    with KVCacheManager(LONG, host_driver, 64 << 20, 4, lookahead=400) as cache:
        cache.start_thread()
        cache.admit("a", 10)
        cache.map_ahead()
        assert cache.wait_ahead()
        assert cache._thread is not None
        wakes = cache._thread.wakes
        mapped = cache.stats().ahead_maps
        for _ in range(100):
            step(cache)
            assert cache.map_ahead() in (0, mapped)
        assert cache.wait_ahead()
        assert (cache._thread.wakes, cache.stats().ahead_maps) == (wakes, mapped)


@pytest.mark.parametrize("call", ["create", "map", "set_access"])
def test_what_fails_in_the_thread_is_raised_by_the_next_call_and_tried_again(call: str, faulty: FaultyDriver) -> None:
    with KVCacheManager(LONG, faulty, 64 << 20, 4, lookahead=40) as cache:
        admit(cache, "a", 10)
        cache.start_thread()
        assert cache.wait_ahead()
        frontier = int(cache.frontiers[0])
        faulty.fail(call)
        cache.extend("a", frontier - 12)  # two tokens are left: time enough for the thread
        cache.map_ahead()
        assert cache.wait_ahead()
        assert cache.frontiers[0] == frontier
        cache.check_integrity()
        with pytest.raises(DriverError, match="injected"):
            cache.map_ahead()
        cache.map_ahead()
        assert cache.wait_ahead()
        assert cache.frontiers[0] > frontier
        expect(cache, "a", range(10))
        cache.check_integrity()


def test_what_fails_after_the_last_call_is_raised_by_close_which_closes_all_the_same(faulty: FaultyDriver) -> None:
    cache = KVCacheManager(LONG, faulty, 64 << 20, 4, lookahead=40)
    # A launch takes one token, for which the page of the prompt has room: nothing but the thread maps ahead.
    cache.ahead.timing = EvenPace()
    cache.start_thread()
    assert cache.wait_ahead()
    faulty.fail("create", skip=1)
    thread = cache._thread
    assert thread is not None
    wake, thread.wake = thread.wake, lambda: None  # type: ignore[method-assign]
    cache.admit("a", 1)  # its own page; the lookahead's is the thread's
    thread.wake = wake  # type: ignore[method-assign]
    cache.map_ahead()
    assert cache.wait_ahead()
    with pytest.raises(DriverError, match="injected"):
        cache.close()
    cache.close()


@pytest.mark.parametrize("lookahead", [40, None])
def test_where_nothing_is_due_no_call_is_made_and_the_thread_sleeps(
    host_driver: HostDriver, lookahead: int | None
) -> None:
    counting = CountingDriver(host_driver)
    with KVCacheManager(LONG, counting, 64 << 20, 4, lookahead) as cache:
        cache.ahead.timing = EvenPace()
        cache.start_thread()
        cache.admit("a", 10)
        cache.admit("b", 100)
        cache.map_ahead()
        assert cache.wait_ahead()
        assert cache._thread is not None
        calls, wakes = counting.calls.copy(), cache._thread.wakes
        for _ in range(100):
            cache.map_ahead()
        assert cache.wait_ahead()
        assert (counting.calls, cache._thread.wakes) == (calls, wakes)


def test_the_thread_is_not_woken_between_the_prompts_of_a_burst(host_driver: HostDriver) -> None:
    counting = CountingDriver(host_driver)
    with KVCacheManager(LONG, counting, 64 << 20, 4) as cache:
        cache.start_thread()
        cache.preallocate_for([300, 300])
        assert cache.wait_ahead()
        cache.preallocate_for([])
        assert cache.wait_ahead()
        assert cache._thread is not None
        calls, wakes = counting.calls.copy(), cache._thread.wakes
        for sequence in range(2):
            cache.admit(sequence, 300)
        assert cache.wait_ahead()
        assert counting.calls["create"] == calls["create"]
        assert cache._thread.wakes == wakes
        cache.map_ahead()
        assert cache.wait_ahead()
        assert cache._thread.wakes > wakes


def test_what_the_next_launch_needs_is_not_left_to_a_thread_that_comes_too_late(
    host_driver: HostDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with KVCacheManager(LONG, host_driver, 64 << 20, 4) as cache:
        monkeypatch.setattr(BackgroundThread, "wake", lambda thread: None)
        cache.start_thread()
        whole = [tokens for tokens in range(1, 60) if tokens == cache.layout.tokens_in(cache.layout.bytes_for(tokens))]
        assert len(whole) > 5
        for tokens in whole[:4]:
            assert cache.frontiers[cache.admit(tokens, tokens)] == tokens
        for _ in range(100):
            cache.map_ahead()
            step(cache)
        stats = cache.stats()
        assert stats.critical_path_maps == 0 < stats.ahead_maps
        monkeypatch.undo()
        cache.check_integrity()


def test_where_memory_is_short_the_thread_waits_for_the_step_to_ask(host_driver: HostDriver) -> None:
    with KVCacheManager(LONG, host_driver, 9 * PAGE, 4, lookahead=400) as cache:
        cache.start_thread()
        cache.admit("a", 10)
        for _ in range(5):
            cache.map_ahead()
            assert cache.wait_ahead()
        assert cache.stats().ahead_maps == 0


def test_a_closed_cache_has_no_thread(host_driver: HostDriver) -> None:
    cache = KVCacheManager(LONG, host_driver, 64 << 20, 4, lookahead=3000)
    cache.start_thread()
    cache.admit("a", 10)
    cache.close()
    assert cache._thread is not None
    assert not cache._thread._thread.is_alive()


# -- surplus of running slots ---------------------------------------------------------------------------------------


def test_a_prompt_takes_what_running_ones_hold_beyond_their_lookahead(driver: Driver) -> None:
    granularity = driver.granularity()
    page = granularity // 1536
    with KVCacheManager(replace(LONG, max_seq_len=9 * page), driver, 11 * granularity, 4, lookahead=0) as cache:
        cache.admit("long", 1)
        for pages in range(1, 8):
            cache.extend("long", pages * page - int(cache.lengths[0]))
        cache.release("long")
        # Up to twice the need comes along while memory is plenty.
        cache.admit("a", 4 * page)
        fill(cache, "a", range(4 * page))
        before = cache.arena.slots[0].mapped
        assert before > cache.layout.bytes_for(4 * page)
        cache.admit("b", 6 * page)
        fill(cache, "b", range(6 * page))
        assert cache.lengths[0] <= cache.frontiers[0]
        assert cache.arena.slots[0].mapped < before
        expect(cache, "a", range(4 * page))
        expect(cache, "b", range(6 * page))
        cache.check_integrity()
        frontiers = cache.frontiers.tolist()
        with pytest.raises(KVCacheOutOfMemory):
            cache.admit("c", 3 * page)
        assert cache.frontiers.tolist() == frontiers


def test_a_step_takes_the_lookahead_of_others_before_it_fails(host_driver: HostDriver) -> None:
    with KVCacheManager(LONG, host_driver, 16 * PAGE, 4, lookahead=20) as cache:
        cache.admit("a", 2)
        cache.map_ahead()
        ahead = int(cache.frontiers[0])
        assert ahead >= 20
        cache.admit("b", 2)
        while True:
            frontier = cache.frontiers[0]
            try:
                cache.extend("b", 1)
            except KVCacheOutOfMemory:
                break
            fill(cache, "b", range(cache.lengths[1] - 1, cache.lengths[1]))
            assert cache.frontiers[0] <= frontier
        assert cache.lengths[0] <= cache.frontiers[0] < ahead
        cache.check_integrity()
        # The dummy's page and a's one are all that b has not.
        assert cache.arena.slots[1].mapped == 14 * PAGE


def test_the_longest_running_gives_first(host_driver: HostDriver) -> None:
    with KVCacheManager(LONG, host_driver, 128 * PAGE, 4, lookahead=100) as cache:
        for sequence in ("young", "old"):
            cache.admit(sequence, 2)
        cache.map_ahead()
        cache.map_ahead()
        cache.arena.slots[cache.slot_of("old")].since = 0.0
        before = cache.frontiers[:2].tolist()
        cache.set_budget(cache.stats().held_bytes - 2 * PAGE)
        young, old = (int(cache.frontiers[cache.slot_of(name)]) for name in ("young", "old"))
        assert young == before[0]
        assert 2 <= old < before[1]


def test_the_thread_gives_a_surplus_found_at_adoption_to_the_stock(host_driver: HostDriver) -> None:
    with KVCacheManager(LONG, host_driver, 64 << 20, 4, lookahead=8) as cache:
        cache.admit("gone", 1000)
        cache.start_thread()
        host_driver.hold()
        cache.release("gone")
        assert cache.wait_ahead()
        parked = cache.stats().parked_bytes
        admit(cache, "a", 600)
        assert cache.wait_ahead()
        # What may still be read stays; it is nobody's all the same.
        assert (cache.arena.slots[0].mapped, cache.arena.pool.free_bytes) == (parked, 0)
        assert 608 <= cache.frontiers[0] < 620
        host_driver.complete()
        for length in range(600, 700):
            cache.map_ahead()
            assert cache.wait_ahead()
            step(cache)
            fill(cache, "a", range(length, length + 1))
        stats = cache.stats()
        assert (stats.critical_path_maps, cache.arena.trim_pending) == (0, set())
        assert cache.arena.slots[0].mapped + cache.arena.pool.free_bytes >= parked > cache.arena.slots[0].mapped
        expect(cache, "a", range(700))
        cache.check_integrity()


# -- limits and placement -------------------------------------------------------------------------------------------


def test_a_mapping_too_many_is_refused_before_the_driver_is_asked(host_driver: HostDriver) -> None:
    with KVCacheManager(LONG, host_driver, 64 << 20, 1, lookahead=0) as cache:
        admit(cache, "a", 50)
        stats = cache.stats()
        assert stats.live_mappings == host_driver.live_mappings
        assert stats.max_mappings == host_driver.max_mappings
        host_driver.max_mappings = stats.device_mappings + 3
        with pytest.raises(
            KVCacheOutOfMemory, match=r"4 mappings asked for; \d+ are alive, \d+ of them .* bears about \d+"
        ):
            cache.admit("b", 2)
        with pytest.raises(KVCacheOutOfMemory, match="mappings asked for"):
            cache.fork("a", "b", 50)
        cache.check_integrity()
        host_driver.max_mappings = stats.device_mappings + 4
        cache.admit("b", 2)
        expect(cache, "a", range(50))


def test_the_ceiling_is_that_of_all_caches_of_the_process(host_driver: HostDriver) -> None:
    """The limit is a context's: neither a second cache nor a second driver object has one of its own."""
    other = HostDriver()
    with (
        KVCacheManager(LONG, host_driver, 64 << 20, 4, lookahead=0) as one,
        KVCacheManager(LONG, other, 64 << 20, 4, lookahead=0) as two,
    ):
        one.admit("a", 20)
        stats = two.stats()
        assert stats.live_mappings == 1
        assert stats.device_mappings == one.stats().device_mappings >= stats.live_mappings + one.stats().live_mappings
        other.max_mappings = stats.device_mappings
        with pytest.raises(KVCacheOutOfMemory, match=r"1 mappings asked for; \d+ are alive, 1 of them in this cache"):
            two.admit("b", 2)
        one.release("a")
        one.arena.unmap_parked(0)
        two.admit("b", 2)
    other.close()


def test_parked_mappings_make_room_under_the_ceiling(host_driver: HostDriver) -> None:
    with KVCacheManager(LONG, host_driver, 64 << 20, 4, lookahead=0) as cache:
        cache.admit("a", 2)
        cache.admit("b", 20)
        cache.release("b")
        host_driver.max_mappings = host_driver.mappings.alive
        cache.extend("a", 5)
        cache.check_integrity()


def test_placement_counts_neighbours_in_order(host_driver: HostDriver) -> None:
    with KVCacheManager(LONG, host_driver, 64 << 20, 4, lookahead=0) as cache:
        cache.admit("a", 2)
        cache.admit("b", 2)
        for _ in range(5):
            cache.extend("a", 3)
            cache.extend("b", 3)
        placed = cache.placement()
        assert placed.mappings == host_driver.live_mappings - 1
        assert placed.neighbours == placed.ascending == placed.mappings - 2
        assert placed.adjacent < placed.neighbours
        cache.replace("a")
        for sequence in ("a", "b"):
            cache.release(sequence)
        cache.admit("c", 300)
        assert cache.placement().ascending < cache.placement().neighbours


def test_other_caches_have_nothing_to_start() -> None:
    with make_cache("contiguous", SHAPE, "cpu") as cache:
        cache.start_thread()
        assert cache.map_ahead() == 0
