"""Every driver call of a scripted life fails once: no leak, state unchanged, the next operation works."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from contents import expect, fill
from interrupting import numbers
from shapes import SHAPE

from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import DriverError, MemoryQuarantined
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import FaultyDriver

PAGE = 4096
State = tuple[object, ...]


class Script:
    """A life that uses every driver call: prompts, steps, parking, adoption, reclaiming under pressure.

    `lengths` is what the sequences must hold; each operation is tried again where a driver call failed in it.
    """

    def __init__(self, cache: KVCacheManager) -> None:
        self.cache = cache
        self.lengths: dict[str, int] = {}
        self.failures: list[str] = []

    def state(self) -> State:
        arena = self.cache.arena
        return (
            self.cache.lengths.tolist(),
            [self.cache.sequence_at(slot) for slot in range(SHAPE.num_slots)],
            arena.running_bytes,
        )

    def attempt(self, operation: Callable[[], object]) -> None:
        before = self.state()
        try:
            operation()
        except (DriverError, MemoryQuarantined) as error:
            self.failures.append(error.call if isinstance(error, DriverError) else "quarantine")
            assert self.state() == before
            self.check()
            operation()
        self.check()

    def check(self) -> None:
        self.cache.check_integrity()
        for sequence, length in self.lengths.items():
            expect(self.cache, sequence, range(length))

    def admit(self, sequence: str, tokens: int) -> None:
        self.attempt(lambda: self.cache.admit(sequence, tokens))
        fill(self.cache, sequence, range(tokens))
        self.lengths[sequence] = tokens

    def step(self) -> None:
        wanted = np.where(self.cache.lengths > 0, self.cache.lengths + 1, 0)
        self.attempt(lambda: self.cache.prepare_step(wanted))
        for sequence, length in self.lengths.items():
            fill(self.cache, sequence, range(length, length + 1))
            self.lengths[sequence] = length + 1
        self.attempt(self.cache.map_ahead)

    def release(self, sequence: str) -> None:
        del self.lengths[sequence]
        self.attempt(lambda: self.cache.release(sequence))

    def run(self) -> None:
        self.admit("a", 20)
        self.admit("b", 9)
        for _ in range(6):
            self.step()
        self.release("a")
        self.admit("c", 12)
        self.admit("d", 30)
        self.release("c")
        self.release("b")
        for _ in range(4):
            self.step()
        self.admit("e", 40)
        self.release("d")
        self.attempt(self.give_back)
        self.admit("f", 10)

    def give_back(self) -> None:
        """Parked memory to the pool, and from there to the driver."""
        self.cache.arena.reclaim(4 * PAGE)
        while self.cache.arena.pool.shrink():
            pass


def life(layers_per_range: int, fail_at: int | None) -> tuple[Script, FaultyDriver, HostDriver]:
    """Run the script with call number `fail_at` failing; the cache is left open."""
    host = HostDriver()
    driver = FaultyDriver(host)
    pages = {4: 40, 1: 48}[layers_per_range]
    cache = KVCacheManager(SHAPE, driver, pages * PAGE, layers_per_range, lookahead=4)
    driver.seen = 0
    if fail_at is not None:
        driver.fail("*", skip=fail_at)
    script = Script(cache)
    script.run()
    return script, driver, host


def close(script: Script, host: HostDriver) -> None:
    script.cache.close()
    assert (host.live_mappings, host.live_handles, host.live_reservations) == (0, 0, 0)


@pytest.mark.parametrize("layers_per_range", [4, 1])
def test_every_call_of_a_life_may_fail(layers_per_range: int) -> None:
    script, driver, host = life(layers_per_range, None)
    calls = driver.seen
    assert script.failures == []
    close(script, host)
    seen, quarantined = set(), 0
    for index in numbers(calls, 3):
        script, driver, host = life(layers_per_range, index)
        seen.update(script.failures)
        stats = script.cache.stats()
        if not script.failures:
            # What fails to go away is set aside instead of failing the operation that made room.
            assert stats.quarantined >= 1, f"call {index} failed and nobody noticed"
            quarantined += 1
        close(script, host)
    assert {"create", "map", "set_access", "record"} <= seen
    assert quarantined > 0


@pytest.mark.parametrize("layers_per_range", [4, 1])
def test_every_call_of_a_construction_may_fail(layers_per_range: int) -> None:
    host = HostDriver()
    for index in range(100):
        driver = FaultyDriver(host)
        driver.fail("*", skip=index)
        try:
            cache = KVCacheManager(SHAPE, driver, 1 << 20, layers_per_range)
        except DriverError:
            assert (host.live_mappings, host.live_reservations) == (0, 0)
            assert host.live_handles == 0
        else:
            driver.disarm()
            cache.close()
            break
    assert index == {4: 4, 1: 16}[layers_per_range]


@pytest.mark.parametrize("call", ["unmap", "release", "free"])
def test_every_call_of_a_close_may_fail_and_is_tried_again(call: str) -> None:
    script, _, host = life(1, None)
    calls = {"unmap": host.live_mappings, "release": host.live_handles, "free": host.live_reservations}[call]
    close(script, host)
    assert calls > 3
    for index in [*numbers(calls, 3), calls]:
        script, driver, host = life(1, None)
        driver.fail(call, skip=index)
        try:
            script.cache.close()
        except MemoryQuarantined:
            assert call != "free"
            script.cache.close()
        except DriverError:
            assert call == "free"
            script.cache.close()
        assert (host.live_mappings, host.live_handles, host.live_reservations) == (0, 0, 0)
        # There are so many calls and no more.
        assert bool(driver._orders) is (index == calls)


def test_a_slot_whose_unmap_failed_is_not_used_again() -> None:
    host = HostDriver()
    driver = FaultyDriver(host)
    with KVCacheManager(SHAPE, driver, 40 * PAGE, lookahead=0) as cache:
        cache.admit("a", 20)
        cache.release("a")
        driver.fail("unmap")
        cache.arena.reclaim(PAGE)
        assert cache.stats().quarantined == 1
        assert cache.arena.free_slots() == [1, 2, 3]
        assert cache.admit("b", 20) == 1
        fill(cache, "b", range(20))
        expect(cache, "b", range(20))
        cache.check_integrity()
    assert (host.live_mappings, host.live_handles, host.live_reservations) == (0, 0, 0)


def test_a_rollback_that_fails_too_costs_the_slot_and_nothing_else() -> None:
    host = HostDriver()
    driver = FaultyDriver(host)
    with KVCacheManager(SHAPE, driver, 60 * PAGE, lookahead=0) as cache:
        cache.admit("a", 10)
        cache.admit("b", 10)
        for sequence in ("a", "b"):
            fill(cache, sequence, range(10))
        driver.fail("set_access")
        driver.fail("unmap")
        with pytest.raises(DriverError, match="1 mappings could not be taken back"):
            cache.extend("a", 5)
        cache.check_integrity()
        assert cache.stats().quarantined == 1
        with pytest.raises(MemoryQuarantined, match="an unmap failed in slot 0, so it cannot grow; release"):
            cache.extend("a", 5)
        cache.extend("b", 5)
        fill(cache, "b", range(10, 15))
        expect(cache, "a", range(10))
        expect(cache, "b", range(15))
        cache.release("a")
        assert cache.arena.free_slots() == [2, 3]
        cache.check_integrity()
    assert (host.live_mappings, host.live_handles, host.live_reservations) == (0, 0, 0)


@pytest.mark.parametrize("call", ["release", "unmap"])
def test_a_budget_is_lowered_as_far_as_the_driver_takes_memory_back(call: str) -> None:
    host = HostDriver()
    driver = FaultyDriver(host)
    cache = KVCacheManager(SHAPE, driver, budget=64 * PAGE)
    cache.admit("one", 40)
    cache.release("one")
    least, whole = cache.layout.least_bytes, cache.bytes_for_sequences
    assert cache.held_bytes > least
    driver.fail(call)
    reached = cache.shrink_towards(least)
    assert reached == cache.budget_bytes == cache.held_bytes > least
    stuck = cache.arena.quarantined_bytes
    assert reached == least + stuck
    cache.check_integrity()
    # What is stuck is for no sequence.
    cache.set_budget(64 * PAGE)
    assert cache.bytes_for_sequences == whole - stuck
    cache.close()
    assert host.live_handles == 0
    host.close()
