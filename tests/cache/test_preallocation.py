"""Memory created ahead, for bursts announced and prompts that wait; and memory that nobody uses, which goes back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from threading import get_ident
from time import monotonic, sleep

import pytest
from contents import admit, expect
from shapes import SHAPE

from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import CountingDriver, FaultyDriver

PAGE = 4096
LONG = replace(SHAPE, max_seq_len=4000)


@pytest.fixture
def faulty() -> Iterator[FaultyDriver]:
    host = HostDriver()
    yield FaultyDriver(host)
    assert (host.live_mappings, host.live_handles, host.live_reservations) == (0, 0, 0)


def test_a_stock_is_kept_and_filled_again(faulty: FaultyDriver) -> None:
    with KVCacheManager(LONG, faulty, 64 << 20, 4, lookahead=0) as cache:
        cache.preallocate(3, 1000)
        stocked = cache.arena.pool.free_bytes
        assert stocked == 3 * cache.layout.bytes_for(1000)
        cache.start_thread()
        faulty.fail("create")
        cache.admit("a", 1000)
        assert cache.wait_ahead()
        # One of three is not worth while yet; with the second, less than half is left.
        assert cache.arena.pool.free_bytes == stocked * 2 // 3
        faulty.disarm()
        cache.admit("b", 1000)
        assert cache.wait_ahead()
        assert cache.arena.pool.free_bytes == stocked
        cache.preallocate(0, 1)
        cache.check_integrity()


def test_a_stock_stays_within_the_budget(host_driver: HostDriver) -> None:
    with KVCacheManager(LONG, host_driver, 100 * PAGE, 4) as cache:
        cache.preallocate(1000, 40)
        stats = cache.stats()
        assert stats.held_bytes <= stats.budget_bytes
        assert cache.arena.pool.free_bytes > 80 * PAGE
        # It is as good as free memory.
        cache.admit("a", 98 * PAGE // 1536)
        with pytest.raises(ConfigError, match="preallocation for -1 prompts of 40 tokens asked for"):
            cache.preallocate(-1, 40)
        with pytest.raises(ConfigError, match="of 1 to 4000 tokens"):
            cache.preallocate(1, 4001)
        cache.check_integrity()


def test_a_device_without_memory_ends_the_stocking_quietly() -> None:
    host = HostDriver(capacity=20 * PAGE)
    with KVCacheManager(LONG, host, 100 * PAGE, 4, lookahead=0) as cache:
        cache.preallocate(50, 2)
        assert cache.arena.pool.free_bytes == 19 * PAGE
        cache.check_integrity()
    host.close()


def test_idle_memory_goes_back_to_the_driver_but_for_the_floor(host_driver: HostDriver) -> None:
    floor = 10 * PAGE
    with KVCacheManager(LONG, host_driver, 64 << 20, 4, 0, idle_after_s=0.5, idle_floor=floor) as cache:
        admit(cache, "kept", 500)
        cache.admit("gone", 1000)
        cache.release("gone")
        parked = cache.stats().parked_bytes
        cache.start_thread()
        assert cache.wait_ahead()
        assert cache.stats().parked_bytes == parked
        until = monotonic() + 10
        while cache.stats().parked_bytes + cache.arena.pool.free_bytes > floor and monotonic() < until:
            sleep(0.01)
        stats = cache.stats()
        assert stats.parked_bytes + cache.arena.pool.free_bytes <= floor
        assert stats.held_bytes < parked
        expect(cache, "kept", range(500))
        cache.check_integrity()


def test_settings_out_of_range_are_refused(host_driver: HostDriver) -> None:
    with pytest.raises(ConfigError, match="idle_after_s is 0"):
        KVCacheManager(LONG, host_driver, 1 << 20, idle_after_s=0)
    with pytest.raises(ConfigError, match="idle_floor is -1"):
        KVCacheManager(LONG, host_driver, 1 << 20, idle_floor=-1)


def test_the_next_prompts_are_stocked_by_the_thread_as_far_as_the_budget_goes(host_driver: HostDriver) -> None:
    made_by: list[int] = []

    class Watched(CountingDriver):
        def create(self, size: int) -> int:
            made_by.append(get_ident())
            return super().create(size)

    with KVCacheManager(LONG, Watched(host_driver), 200 * PAGE, 4, lookahead=0) as cache:
        cache.preallocate_for([40, 40])
        assert cache.wait_ahead()
        assert cache.arena.pool.free_bytes == 0  # nobody but the stepping thread could create it
        cache.start_thread()
        made_by.clear()
        each = cache.layout.bytes_for(40)
        cache.preallocate_for([40, 40, 100])
        assert cache.wait_ahead()
        assert cache.arena.pool.free_bytes == 2 * each + cache.layout.bytes_for(100)
        # The third is longer than what the budget has left, so what is behind it waits, too.
        cache.preallocate_for([40, 40, 500, 40])
        assert cache.arena.pool.next_to_create() is None
        for sequence in range(2):
            cache.admit(sequence, 40)
        assert made_by
        assert get_ident() not in made_by
        cache.check_integrity()
        # What is parked is adopted, and need not be created.
        cache.release(0)
        cache.preallocate_for([40])
        assert cache._preallocation.expected == ()
        # An announced burst stays announced.
        cache.preallocate(1, 40)
        cache.preallocate_for([])
        assert cache.arena.pool._targets == dict.fromkeys(cache.arena.pool.split(each), 1)


def test_what_is_mapped_is_noted_before_a_stock_is_filled(host_driver: HostDriver) -> None:
    """A step would wait for the note else, until all of the stock is there."""
    with KVCacheManager(LONG, host_driver, 64 << 20, 4, lookahead=0) as cache:
        cache.preallocate(3, 1000)
        cache.admit("a", 1000)
        cache.admit("b", 1000)
        noted: list[int] = []
        pool = cache.arena.pool
        cache._memory.after_mapping = lambda: noted.append(pool.free_bytes)
        before = pool.free_bytes
        assert cache._memory.work()
        assert pool.free_bytes > before
        assert noted == [before]
