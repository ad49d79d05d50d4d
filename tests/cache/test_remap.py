"""Memory that is resized, moved, shared and replaced beneath running sequences, its bytes checked each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from contents import admit, expect, fill
from shapes import SHAPE

from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import (
    ConfigError,
    DriverError,
    DuplicateSequence,
    KVCacheOutOfMemory,
    NoFreeSlot,
    UnmappedAccess,
)
from trtllm_vattn.graphs.guard import Guard
from trtllm_vattn.memory.arena import ATTEMPTS
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import FaultyDriver

PAGE = 4096


@pytest.fixture(params=[1, 2, 4])
def build(request: pytest.FixtureRequest, driver: Driver) -> Iterator[Callable[..., KVCacheManager]]:
    """Builds a cache of so many pages (on the card they are larger) on either driver."""
    made: list[KVCacheManager] = []

    def make(pages: int | None = 200) -> KVCacheManager:
        budget = None if pages is None else pages * driver.granularity()
        made.append(KVCacheManager(SHAPE, driver, budget, request.param, lookahead=0))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def serials(cache: KVCacheManager, sequence: str) -> list[int]:
    stripes = cache.arena.slots[cache.slot_of(sequence)].stripes
    return [mapping.extent.serial for stripe in stripes for mapping in stripe]


def lane(guard: Guard, slot: int, length: int) -> None:
    guard.check(np.array([length]), np.array([slot]), np.array([length - 1]))


def test_a_cache_without_a_budget_has_its_dummy_slot_and_grows_when_it_is_given_one(
    build: Callable[..., KVCacheManager],
) -> None:
    cache = build(None)
    assert cache.stats().held_bytes == cache.layout.least_bytes == cache.stats().budget_bytes
    addresses = [cache.layer(layer).k.data_ptr() for layer in range(SHAPE.num_layers)]
    with pytest.raises(KVCacheOutOfMemory):
        cache.admit("a", 1)
    for pages in (200, 100, 300):
        cache.set_budget(pages * cache.layout.granularity)
        admit(cache, "a", 50)
        expect(cache, "a", range(50))
        cache.check_integrity()
        cache.release("a")
    assert [cache.layer(layer).k.data_ptr() for layer in range(SHAPE.num_layers)] == addresses


def test_a_lower_budget_takes_what_is_parked_and_in_stock(build: Callable[..., KVCacheManager]) -> None:
    cache = build()
    admit(cache, "gone", 50)
    admit(cache, "stays", 20)
    cache.release("gone")
    least = cache.layout.least_bytes + cache.arena.running_bytes
    cache.set_budget(least)
    stats = cache.stats()
    assert (stats.held_bytes, stats.parked_bytes, stats.budget_bytes) == (least, 0, least)
    expect(cache, "stays", range(20))
    cache.check_integrity()
    with pytest.raises(KVCacheOutOfMemory, match="but running slots, and what they read, hold"):
        cache.set_budget(least - cache.layout.granularity)
    with pytest.raises(ConfigError, match="the dummy slot alone takes"):
        cache.set_budget(cache.layout.least_bytes - 1)
    assert cache.stats().budget_bytes == least


def test_a_moved_sequence_has_the_same_memory_at_other_addresses(build: Callable[..., KVCacheManager]) -> None:
    cache = build()
    admit(cache, "other", 5)
    admit(cache, "a", 30)
    memory = serials(cache, "a")
    assert cache.move("a", 3) == len(memory)
    assert (cache.slot_of("a"), cache.sequence_at(3), cache.sequence_at(1)) == (3, "a", None)
    assert serials(cache, "a") == memory
    expect(cache, "a", range(30))
    cache.extend("a", 10)
    fill(cache, "a", range(30, 40))
    expect(cache, "a", range(40))
    expect(cache, "other", range(5))
    cache.check_integrity()
    with pytest.raises(ConfigError, match=r"slot 0 is not free; free are \[1, 2\]|slot 0 is not free; free are \[2\]"):
        cache.move("a", 0)


def test_what_is_parked_where_a_sequence_moves_to_goes_back_to_the_pool(build: Callable[..., KVCacheManager]) -> None:
    cache = build()
    admit(cache, "parked", 50)
    admit(cache, "a", 20)
    cache.release("parked")
    assert cache.stats().parked_bytes > 0
    cache.move("a", 0)
    expect(cache, "a", range(20))
    cache.arena.complete_pending_unmaps(wait=True)
    assert cache.stats().parked_bytes == 0
    cache.check_integrity()


def test_nothing_is_unmapped_before_its_fence_and_nobody_may_use_it_meanwhile(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 200 * PAGE, lookahead=0) as cache:
        admit(cache, "a", 30)
        guard = Guard(cache)
        lane(guard, 0, 30)
        mapped = host_driver.live_mappings
        host_driver.hold()
        moved = cache.move("a", 2)
        cache.map_ahead()
        assert host_driver.live_mappings == mapped + moved
        assert 0 not in cache.arena.free_slots()
        # Still mapped, but about to go.
        with pytest.raises(UnmappedAccess, match="sequence None in slot 0"):
            lane(guard, 0, 30)
        lane(guard, 2, 30)
        cache.check_integrity()
        host_driver.complete()
        cache.map_ahead()
        assert host_driver.live_mappings == mapped
        assert 0 in cache.arena.free_slots()
        expect(cache, "a", range(30))
        # A parked slot is mapped too, and nobody's.
        cache.release("a")
        assert cache.arena.slots[2].mapped
        with pytest.raises(UnmappedAccess, match="sequence None in slot 2"):
            lane(guard, 2, 30)


def test_admission_waits_for_a_slot_that_is_being_left(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 400 * PAGE, lookahead=0) as cache:
        for sequence in "abc":
            admit(cache, sequence, 10)
        host_driver.hold()
        cache.move("a", 3)
        with pytest.raises(DriverError, match="the work is held"):
            cache.admit("d", 10)
        host_driver.complete()
        assert admit(cache, "d", 10) == 0
        for sequence in "abcd":
            expect(cache, sequence, range(10))


def test_a_fork_shares_what_lies_wholly_below_and_copies_the_rest(build: Callable[..., KVCacheManager]) -> None:
    cache = build()
    admit(cache, "a", 12)
    for more in range(12, 44, 4):
        cache.extend("a", 4)
        fill(cache, "a", range(more, more + 4))
    before = cache.arena.running_bytes
    slot = cache.fork("a", "b", 40)
    assert slot == cache.slot_of("b") == 1
    shared = set(serials(cache, "a")) & set(serials(cache, "b"))
    own = cache.arena.running_bytes - before
    row = cache.layout.row_bytes
    whole = 0
    for stripe in cache.arena.slots[0].stripes:
        if whole + stripe[0].size > 40 * row:
            break
        whole += stripe[0].size
    assert bool(shared) == bool(whole)
    assert own == (cache.layout.bytes_for(40) - whole) * cache.layout.num_ranges
    expect(cache, "b", range(40), "a")
    # Each goes its own way.
    cache.extend("b", 10)
    fill(cache, "b", range(40, 50))
    cache.extend("a", 6)
    fill(cache, "a", range(44, 50))
    expect(cache, "b", range(40), "a")
    expect(cache, "b", range(40, 50))
    expect(cache, "a", range(50))
    cache.check_integrity()
    # The first to go takes nothing from the other, and its memory is nobody's to adopt and write to.
    cache.release("a")
    cache.check_integrity()
    admit(cache, "c", 50)
    expect(cache, "b", range(40), "a")
    expect(cache, "c", range(50))
    cache.check_integrity()


def test_truncating_into_what_is_shared_copies_first(build: Callable[..., KVCacheManager]) -> None:
    cache = build()
    admit(cache, "a", 48)
    cache.fork("a", "b", 48)
    cache.fork("b", "c", 48)
    for sequence in ("b", "a"):
        cache.truncate(sequence, 3)
        cache.check_integrity()
        cache.extend(sequence, 40)
        fill(cache, sequence, range(3, 43))
    expect(cache, "a", range(43))
    expect(cache, "b", range(3), "a")
    expect(cache, "b", range(3, 43))
    expect(cache, "c", range(48), "a")


def test_a_fork_that_cannot_be_changes_nothing(build: Callable[..., KVCacheManager]) -> None:
    cache = build()
    admit(cache, "a", 20)
    for error, arguments in (
        (ConfigError, ("a", "b", 21)),
        (ConfigError, ("a", "b", 0)),
        (DuplicateSequence, ("a", "a", 5)),
    ):
        with pytest.raises(error):
            cache.fork(*arguments)
    cache.set_budget(cache.stats().held_bytes)
    with pytest.raises(KVCacheOutOfMemory):
        cache.fork("a", "b", 3)
    cache.check_integrity()
    assert cache.stats().sequences == 1
    cache.set_budget(300 * cache.layout.granularity)
    for name in "bcd":
        cache.fork("a", name, 20)
    with pytest.raises(NoFreeSlot):
        cache.fork("a", "e", 20)
    for name in "bcd":
        expect(cache, name, range(20), "a")


def test_replaced_memory_is_other_memory_with_the_same_bytes(build: Callable[..., KVCacheManager]) -> None:
    cache = build()
    admit(cache, "a", 45)
    admit(cache, "b", 10)
    before = serials(cache, "a")
    address = cache.layer(0).k[0].data_ptr()
    assert cache.replace("a") == len(before)
    assert not set(before) & set(serials(cache, "a"))
    assert cache.layer(0).k[0].data_ptr() == address
    expect(cache, "a", range(45))
    expect(cache, "b", range(10))
    cache.check_integrity()


OPERATIONS: dict[str, Callable[[KVCacheManager], object]] = {
    "move": lambda cache: cache.move("a", 3),
    "fork": lambda cache: cache.fork("a", "new", 17),
    "replace": lambda cache: cache.replace("a"),
    "truncate": lambda cache: cache.truncate("shared", 2),
    "release": lambda cache: cache.release("shared"),
    "lower budget": lambda cache: cache.set_budget(cache.stats().held_bytes - PAGE),
}


@pytest.mark.parametrize("layers_per_range", [4, 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_driver_call_of_an_operation_may_fail_once(name: str, layers_per_range: int) -> None:
    failures = 0
    for index in range(200):
        host = HostDriver()
        driver = FaultyDriver(host)
        cache = KVCacheManager(SHAPE, driver, 300 * PAGE, layers_per_range, lookahead=0)
        admit(cache, "a", 8)
        for length in (12, 16, 20):
            cache.extend("a", 4)
            fill(cache, "a", range(length - 4, length))
        cache.fork("a", "shared", 20)
        admit(cache, "parked", 20)
        cache.release("parked")
        before = [(cache.sequence_at(slot), int(cache.lengths[slot])) for slot in range(4)]
        driver.seen = 0
        driver.fail("*", skip=index)
        try:
            OPERATIONS[name](cache)
        except (DriverError, KVCacheOutOfMemory):
            failures += 1
            assert [(cache.sequence_at(slot), int(cache.lengths[slot])) for slot in range(4)] == before
            cache.check_integrity()
            expect(cache, "a", range(20))
            expect(cache, "shared", range(20), "a")
            if not cache.stats().quarantined:
                OPERATIONS[name](cache)
        done = driver.seen <= index
        driver.disarm()
        cache.check_integrity()
        for sequence in ("a", "shared", "new"):
            if sequence in cache._slot_of:
                length = int(cache.lengths[cache.slot_of(sequence)])
                expect(cache, sequence, range(length), "a")
        cache.close()
        assert (host.live_mappings, host.live_handles, host.live_reservations) == (0, 0, 0)
        if done:
            break
    assert done
    if name not in ("release", "lower budget"):
        assert failures > 1


def test_a_replacement_whose_way_back_fails_once_changes_nothing() -> None:
    driver = FaultyDriver(HostDriver())
    with KVCacheManager(SHAPE, driver, 300 * PAGE, 4, lookahead=0) as cache:
        admit(cache, "a", 20)
        before = serials(cache, "a")
        for _ in range(2):
            driver.fail("map", skip=len(before))
        with pytest.raises(DriverError):
            cache.replace("a")
        assert serials(cache, "a") == before
        expect(cache, "a", range(20))
        cache.check_integrity()


def test_a_replacement_whose_way_back_fails_cuts_the_sequence_and_says_so() -> None:
    host = HostDriver()
    driver = FaultyDriver(host)
    with KVCacheManager(SHAPE, driver, 300 * PAGE, 4, lookahead=0) as cache:
        admit(cache, "a", 20)
        admit(cache, "b", 20)
        # The scratch mapping succeeds, the one at the old address fails, and so does the way back, however often.
        for _ in range(1 + ATTEMPTS):
            driver.fail("map", skip=len(serials(cache, "a")))
        with pytest.raises(DriverError):
            cache.replace("a")
        cache.check_integrity()
        assert cache.frontiers[0] == 0
        with pytest.raises(UnmappedAccess, match="sequence 'a' in slot 0"):
            lane(Guard(cache), 0, 20)
        cache.release("a")
        cache.check_integrity()
        expect(cache, "b", range(20))
    assert (host.live_mappings, host.live_handles, host.live_reservations) == (0, 0, 0)
