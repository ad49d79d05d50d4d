"""Ended sequences whose tokens are kept in their slots: adopted, read by others, evicted when memory is short."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from contents import admit, expect, expect_in, fill
from failing import fail_each_call
from shapes import SHAPE

from trtllm_vattn.cache.base import KVCache, RetainedSlot
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.contiguous import ContiguousCache
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import (
    ConfigError,
    DriverError,
    InvariantViolation,
    KVCacheOutOfMemory,
    NoFreeSlot,
    PrefixEvicted,
    UnknownSequence,
)
from trtllm_vattn.graphs.guard import Guard
from trtllm_vattn.memory.slot import FREE, PARKED, RETAINED
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import CountingDriver, FaultyDriver

PAGE = 4096
PAGES = CacheConfig(extent_classes=1, lookahead=0, layers_per_range=4)
"""1,536 bytes a token, in one range: 20 tokens take 8 pages, 50 tokens 19."""


@pytest.fixture
def cache(host_driver: HostDriver) -> Iterator[KVCacheManager]:
    with KVCacheManager(SHAPE, host_driver, 60 * PAGE, config=PAGES) as made:
        yield made


def retain(cache: KVCache, sequence: str, tokens: int) -> RetainedSlot:
    admit(cache, sequence, tokens)
    return cache.retain(sequence)


def is_idle(cache: KVCacheManager, kept: RetainedSlot) -> bool:
    """Whether the fence is done behind which the slot's memory may be unmapped."""
    fence = cache.arena.slots[kept.slot].fence
    assert fence is not None
    return fence.done()


def state_of(cache: KVCacheManager, slot: int) -> object:
    return cache.arena.slots[slot].state


def test_a_retained_sequence_is_gone_and_its_tokens_are_kept(cache: KVCacheManager) -> None:
    kept = retain(cache, "a", 20)
    assert (kept.slot, cache.retained_tokens(kept), state_of(cache, 0)) == (0, 20, RETAINED)
    assert (cache.sequence_at(0), cache.lengths[0], cache.frontiers[0]) == (None, 0, 0)
    assert cache.retained_frontiers is not None
    assert cache.retained_frontiers[0] >= 20
    with pytest.raises(UnknownSequence):
        cache.slot_of("a")
    stats = cache.stats()
    assert (stats.sequences, stats.retained_slots, stats.retained_bytes) == (0, 1, 8 * PAGE)
    assert (stats.mapped_bytes, stats.parked_bytes) == (0, 0)
    assert admit(cache, "b", 20) == 1
    expect_in(cache, 0, range(20), "a")
    cache.check_integrity()
    cache.release_retained(kept)
    assert (cache.retained_tokens(kept), state_of(cache, 0), cache.stats().parked_bytes) == (0, PARKED, 8 * PAGE)
    cache.release_retained(kept)
    assert cache.take_evicted() == []  # whoever gave it back knows
    cache.check_integrity()


def test_it_is_adopted_without_a_driver_call() -> None:
    driver = CountingDriver(HostDriver())
    with KVCacheManager(SHAPE, driver, 60 * PAGE, config=PAGES) as cache:
        kept = retain(cache, "a", 20)
        calls = driver.calls.copy()
        assert cache.adopt(kept, "b", 18, 21) == 0
        assert driver.calls == calls
        expect(cache, "b", range(18), "a")
        fill(cache, "b", range(18, 21))
        assert (cache.lengths[0], cache.retained_tokens(kept)) == (21, 0)
        with pytest.raises(PrefixEvicted, match=r"10 tokens of .* asked for, of which 0 are kept"):
            cache.adopt(kept, "c", 10)
        again = cache.retain("b")
        assert again != kept
        assert cache.adopt(again, "c", 21, 50) == 0
        fill(cache, "c", range(21, 50))
        expect(cache, "c", range(18), "a")
        expect(cache, "c", range(18, 21), "b")
        cache.check_integrity()


def test_it_is_read_aliased_and_copied(cache: KVCacheManager) -> None:
    kept = retain(cache, "a", 20)
    cache.admit("reader", 30, prefix=(kept, 20))
    fill(cache, "reader", range(20, 30))
    cache.admit("alias", 25, alias=(kept, 19))
    fill(cache, "alias", range(19, 25))
    admit(cache, "copy", 22)
    cache.copy_prefix(kept, "copy", 20)
    expect(cache, "reader", range(20), "a")
    expect(cache, "alias", range(19), "a")
    expect(cache, "copy", range(20), "a")
    expect(cache, "copy", range(20, 22))
    guard = Guard(cache)
    guard.check_chunk(1, 30)
    with pytest.raises(ConfigError, match=r"slots \[1\] read the first 20 tokens of slot 0"):
        cache.release_retained(kept)
    with pytest.raises(ConfigError, match=r"slots \[1\] read the first 20 tokens of slot 0"):
        cache.adopt(kept, "b", 19)
    # A reader may be retained, too, and what it reads stays.
    both = cache.retain("reader")
    assert cache.adopt(both, "again", 30) == 1
    expect(cache, "again", range(20), "a")
    expect(cache, "again", range(20, 30), "reader")
    with pytest.raises(ConfigError, match="the first 20 tokens of slot 1 lie in other slots"):
        cache.adopt(cache.retain("again"), "less", 19)
    cache.check_integrity()


def test_an_adopted_slot_gets_its_own_copy_of_what_it_will_write(cache: KVCacheManager) -> None:
    kept = retain(cache, "a", 20)
    cache.admit("alias", 20, alias=(kept, 20))
    cache.adopt(kept, "b", 10, 20)
    fill(cache, "b", range(10, 20))
    expect(cache, "alias", range(20), "a")
    expect(cache, "b", range(10), "a")
    expect(cache, "b", range(10, 20))
    cache.check_integrity()


def test_memory_that_is_needed_is_taken_from_the_longest_unused(cache: KVCacheManager) -> None:
    cache.set_budget(50 * PAGE)
    first, second = retain(cache, "a", 50), retain(cache, "b", 50)
    admit(cache, "parked", 20)
    cache.release("parked")  # 47 pages are used, with the dummy's
    cache.touch(first)
    admit(cache, "c", 20)  # what is parked goes first
    assert (cache.retained_tokens(first), cache.retained_tokens(second)) == (50, 50)
    admit(cache, "d", 20)  # 3 pages are left, so 5 more are needed: the other 14 hold 37 tokens
    assert (cache.retained_tokens(first), cache.retained_tokens(second)) == (50, 37)
    expect_in(cache, first.slot, range(50), "a")
    expect_in(cache, second.slot, range(37), "b")
    assert cache.take_evicted() == [(second, 37)]
    assert cache.take_evicted() == []
    cache.check_integrity()
    cache.extend("c", 30)
    cache.extend("d", 30)
    assert cache.retained_tokens(second) == 0
    assert cache.take_evicted()[-1][0] in (first, second)
    cache.check_integrity()


def test_priorities_come_before_last_use_and_infinite_ones_are_never_evicted(cache: KVCacheManager) -> None:
    first, second, third = (retain(cache, name, 22) for name in "abc")  # 9 pages each
    cache.touch(first, 1.0)
    cache.touch(third, math.inf)
    admit(cache, "d", 50)  # 60 - 1 - 27 = 32 pages are left
    cache.release("d")
    cache.set_budget((1 + 9 + 9) * PAGE)
    assert [cache.retained_tokens(each) for each in (first, second, third)] == [22, 0, 22]
    cache.set_budget((1 + 9) * PAGE)
    assert [cache.retained_tokens(each) for each in (first, second, third)] == [0, 0, 22]
    with pytest.raises(KVCacheOutOfMemory, match="running slots, and what they read, hold"):
        cache.set_budget(9 * PAGE)
    cache.touch(third)
    cache.set_budget(1 * PAGE)
    assert cache.retained_tokens(third) == 0
    cache.touch(third, 3.0)  # nobody is there any more
    cache.check_integrity()


def test_what_running_sequences_read_is_not_evicted_and_what_their_owners_have_beyond_is(cache: KVCacheManager) -> None:
    kept = retain(cache, "a", 50)
    cache.admit("reader", 30, prefix=(kept, 20))
    fill(cache, "reader", range(20, 30))
    with pytest.raises(KVCacheOutOfMemory):
        cache.set_budget(8 * PAGE)
    assert cache.retained_tokens(kept) == 50
    cache.set_budget((1 + 8 + 5) * PAGE)
    assert cache.retained_tokens(kept) == 21  # 8 pages
    expect(cache, "reader", range(20), "a")
    expect(cache, "reader", range(20, 30))
    cache.check_integrity()
    # With its reader, both go: the reader's tokens are worth nothing without its prefix.
    behind = cache.retain("reader")
    cache.set_budget(PAGE)
    assert (cache.retained_tokens(kept), cache.retained_tokens(behind)) == (0, 0)
    assert state_of(cache, 0) == state_of(cache, 1) == FREE
    cache.check_integrity()


def test_slots_that_share_extents_are_evicted_together(cache: KVCacheManager) -> None:
    kept = retain(cache, "a", 40)
    cache.admit("alias", 40, alias=(kept, 40))
    held = cache.stats().held_bytes
    with pytest.raises(KVCacheOutOfMemory):
        cache.set_budget(held - 8 * PAGE)
    assert cache.retained_tokens(kept) == 40  # its extents are the alias's, too: evicting it gives nothing back
    both = cache.retain("alias")
    cache.set_budget(PAGE)
    assert (cache.retained_tokens(kept), cache.retained_tokens(both)) == (0, 0)
    cache.check_integrity()


def test_a_sequence_without_a_slot_takes_one_that_is_retained(cache: KVCacheManager) -> None:
    kept = [retain(cache, name, 5) for name in "abcd"]
    cache.touch(kept[0])
    cache.admit("reader", 9, prefix=(kept[1], 5))  # takes the place of the next one, not of its prefix
    expect(cache, "reader", range(5), "b")
    assert [cache.retained_tokens(each) for each in kept] == [5, 5, 0, 5]
    admit(cache, "e", 5)
    assert [cache.retained_tokens(each) for each in kept] == [5, 5, 0, 0]
    admit(cache, "f", 5)
    assert [cache.retained_tokens(each) for each in kept] == [0, 5, 0, 0]
    with pytest.raises(
        NoFreeSlot, match="1 for tokens that are pinned, have an infinite priority or are read by others"
    ):
        admit(cache, "g", 5)  # the last one is being read
    assert [slot for slot, _ in (each for each in cache.take_evicted())] == [kept[2], kept[3], kept[0]]
    cache.check_integrity()


def test_nothing_is_unmapped_before_its_last_reader_is_done(cache: KVCacheManager, host_driver: HostDriver) -> None:
    kept = retain(cache, "a", 20)
    cache.admit("reader", 30, prefix=(kept, 20))
    host_driver.hold()
    assert is_idle(cache, kept)
    cache.release("reader")
    assert not is_idle(cache, kept)
    with pytest.raises(DriverError, match="the work is held"):
        cache.set_budget(PAGE)
    expect_in(cache, 0, range(20), "a")
    host_driver.complete()
    cache.set_budget(60 * PAGE)
    # Nor before what was copied from it is there.
    kept = retain(cache, "b", 20)
    host_driver.hold()
    cache.admit("alias", 20, alias=(kept, 19))
    assert not is_idle(cache, kept)
    cache.release("alias")
    with pytest.raises(DriverError, match="the work is held"):
        cache.set_budget(PAGE)
    expect_in(cache, kept.slot, range(20), "b")
    host_driver.complete()
    cache.set_budget(PAGE)
    cache.check_integrity()


def test_it_keeps_less_where_that_is_asked(cache: KVCacheManager) -> None:
    kept = retain(cache, "a", 40)
    cache.release_retained(kept, 10)
    assert cache.retained_tokens(kept) == 10
    with pytest.raises(PrefixEvicted, match=r"11 tokens of .* asked for, of which 10 are kept"):
        cache.admit("b", 20, prefix=(kept, 11))
    cache.admit("b", 20, prefix=(kept, 10))
    expect(cache, "b", range(10), "a")
    # What lies behind is the first to go, before any kept token.
    other = retain(cache, "other", 20)
    cache.set_budget((1 + 4 + 8 + 5) * PAGE)
    assert (cache.retained_tokens(kept), cache.retained_tokens(other)) == (10, 20)
    cache.check_integrity()


def test_a_reset_forgets_them_and_others_cannot(cache: KVCacheManager) -> None:
    kept = retain(cache, "a", 40)
    cache.admit("b", 50, prefix=(kept, 40))
    cache.reset()
    cache.check_integrity()
    assert (cache.retained_tokens(kept), cache.stats().retained_slots, cache.segments) == (0, 0, None)
    with ContiguousCache(SHAPE, "cpu") as other:
        other.admit("a", 5)
        for call in (
            lambda: other.retain("a"),
            lambda: other.admit("b", 5, prefix=(0, 5)),
            lambda: other.copy_prefix(0, "a", 5),
            lambda: other.touch(kept),
        ):
            with pytest.raises(ConfigError, match="a ContiguousCache has its memory for life and cannot"):
                call()
        assert other.take_evicted() == []


def test_integrity_sees_what_is_not_kept(cache: KVCacheManager) -> None:
    kept = retain(cache, "a", 20)
    cache.admit("reader", 30, prefix=(kept, 20))
    slots = cache.arena.slots
    slots[0].tokens = 30
    with pytest.raises(InvariantViolation, match="slot 0 keeps 30 tokens, but 21 are backed"):
        cache.check_integrity()
    slots[0].tokens = 20
    slots[0].holders.clear()
    with pytest.raises(InvariantViolation, match=r"slot 0 \(retained\) is held by slots \[\], but read by \[1\]"):
        cache.check_integrity()
    slots[0].holders.add(1)
    cache.arena.retained_frontiers[0] = 5
    with pytest.raises(InvariantViolation, match="5 tokens are backed for others, but its memory backs 21"):
        cache.check_integrity()
    cache.arena.retained_frontiers[0] = 21
    cache.check_integrity()


CALLS: dict[str, Callable[[KVCacheManager, RetainedSlot], object]] = {
    "retain": lambda cache, kept: cache.retain("running"),
    "adopt": lambda cache, kept: cache.adopt(kept, "new", 10, 40),
    "prefix": lambda cache, kept: cache.admit("new", 40, prefix=(kept, 18)),
    "alias": lambda cache, kept: cache.admit("new", 40, alias=(kept, 18)),
    "copy": lambda cache, kept: cache.copy_prefix(kept, "running", 18),
    "release": lambda cache, kept: cache.release_retained(kept),
    "shrink": lambda cache, kept: cache.release_retained(kept, 5),
}


@pytest.mark.parametrize("layers_per_range", [4, 2])
@pytest.mark.parametrize("name", CALLS)
def test_every_driver_call_may_fail_once(name: str, layers_per_range: int) -> None:
    kept: list[RetainedSlot] = []

    def build(driver: FaultyDriver) -> KVCacheManager:
        config = replace(PAGES, layers_per_range=layers_per_range)
        cache = KVCacheManager(SHAPE, driver, 300 * PAGE, config=config)
        kept.append(retain(cache, "a", 20))
        cache.admit("alias", 20, alias=(kept[-1], 20))
        admit(cache, "running", 20)
        return cache

    def check(cache: KVCacheManager, failed: bool) -> None:
        expect(cache, "alias", range(20), "a")
        if failed:
            assert (cache.lengths.tolist(), cache.retained_tokens(kept[-1])) == ([0, 20, 20, 0], 20)
            expect_in(cache, 0, range(20), "a")
            expect(cache, "running", range(18, 20))

    failures = fail_each_call(build, lambda cache: CALLS[name](cache, kept[-1]), check)
    assert failures or name in ("release", "shrink")
