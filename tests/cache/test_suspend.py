"""Sequences whose tokens go to host memory and come back at the same addresses, each byte checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from time import perf_counter

import numpy as np
import pytest
import torch
from contents import admit, expect, expect_in, fill
from failing import fail_each_call
from shapes import SHAPE

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.cache.blocks import BlockKVCache
from trtllm_vattn.cache.config import CacheConfig, Layout
from trtllm_vattn.cache.host_tier import measure_link
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import (
    CacheAsleep,
    ConfigError,
    DriverError,
    DuplicateSequence,
    HostMemoryFull,
    KVCacheOutOfMemory,
    MemoryQuarantined,
    NoFreeSlot,
    SequenceSuspended,
    UnknownSequence,
)
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.wrappers import CountingDriver, FaultyDriver

HOST = CacheConfig(lookahead=0, host_memory="512MiB")


@pytest.fixture(params=[1, 2, 4])
def build(request: pytest.FixtureRequest, driver: Driver) -> Iterator[Callable[..., KVCacheManager]]:
    """Builds a cache of so many pages on either driver."""
    made: list[KVCacheManager] = []

    def make(pages: int = 200, config: CacheConfig = HOST) -> KVCacheManager:
        budget = pages * driver.granularity()
        made.append(KVCacheManager(SHAPE, driver, budget, request.param, config=config))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def addresses(cache: KVCacheManager) -> list[int]:
    return [cache.layer(layer).k.data_ptr() for layer in range(SHAPE.num_layers)]


def test_a_suspended_sequence_has_nothing_mapped_and_comes_back_where_it_was(
    build: Callable[..., KVCacheManager],
) -> None:
    cache = build()
    before = addresses(cache)
    admit(cache, "other", 30)
    slot = admit(cache, "a", 37)
    held = cache.arena.used_bytes
    copied = cache.suspend("a")
    assert copied == 37 * SHAPE.token_bytes
    assert cache.is_suspended("a")
    assert cache.mappings_in(slot) == 0
    assert (cache.lengths[slot], cache.frontiers[slot], cache.sequence_at(slot)) == (0, 0, None)
    assert cache.arena.used_bytes == held - cache.bytes_of(37)
    stats = cache.stats()
    assert (stats.sequences, stats.suspended_sequences) == (1, 1)
    assert stats.host_held_bytes >= stats.host_bytes >= copied
    # Others take its memory, and not its slot.
    taken = [admit(cache, f"new {n}", 50) for n in range(2)]
    assert slot not in taken
    for n in range(2):
        cache.release(f"new {n}")
    cache.check_integrity()
    assert cache.resume("a") == slot
    assert (cache.lengths[slot], cache.stats().host_bytes) == (37, 0)
    expect(cache, "a", range(37))
    expect(cache, "other", range(30))
    assert addresses(cache) == before
    cache.extend("a", 3)
    fill(cache, "a", range(37, 40))
    expect(cache, "a", range(40))
    cache.check_integrity()


def test_nothing_past_the_length_is_copied_or_comes_back(build: Callable[..., KVCacheManager]) -> None:
    cache = build(config=replace(HOST, lookahead=40))
    slot = admit(cache, "a", 50)
    cache.truncate("a", 3)
    assert cache.suspend("a") == 3 * SHAPE.token_bytes
    cache.resume("a")
    assert cache.arena.slots[slot].mapped_bytes == cache.bytes_of(3)
    expect(cache, "a", range(3))


def test_copies_are_as_large_as_they_can_be(host_driver: HostDriver) -> None:
    driver = CountingDriver(host_driver)
    with KVCacheManager(SHAPE, driver, 200 * 4096, 2, config=HOST) as cache:
        admit(cache, "a", 1)
        for _ in range(40):
            cache.extend("a", 1)
        fill(cache, "a", range(41))
        assert cache.mappings_in(0) > 6
        cache.suspend("a")
        cache.resume("a")
        assert (driver.calls["copy_to_host"], driver.calls["copy_to_device"]) == (2, 2)
        # What grew page by page comes back in the fewest extents.
        assert cache.mappings_in(0) < 10
        expect(cache, "a", range(41))


def test_it_may_be_resumed_for_more_tokens(build: Callable[..., KVCacheManager]) -> None:
    cache = build()
    slot = admit(cache, "a", 20)
    cache.suspend("a")
    with pytest.raises(ConfigError, match="has 20 tokens"):
        cache.resume("a", 19)
    cache.resume("a", 48)
    assert cache.lengths[slot] == 48 <= cache.frontiers[slot]
    fill(cache, "a", range(20, 48))
    expect(cache, "a", range(48))
    cache.check_integrity()


def test_until_then_it_can_be_released_and_nothing_else(build: Callable[..., KVCacheManager]) -> None:
    cache = build()
    slot = admit(cache, "a", 20)
    cache.suspend("a")
    for call in (
        lambda: cache.extend("a", 1),
        lambda: cache.truncate("a", 1),
        lambda: cache.suspend("a"),
        lambda: cache.fork("a", "b", 3),
        lambda: cache.retain("a"),
    ):
        with pytest.raises(SequenceSuspended, match="resume it first"):
            call()
    with pytest.raises(DuplicateSequence):
        cache.admit("a", 1)
    lengths = np.zeros(SHAPE.num_slots, np.int64)
    lengths[slot] = 1
    with pytest.raises(UnknownSequence):
        cache.prepare_step(lengths)
    with pytest.raises(UnknownSequence, match="suspended"):
        cache.resume("nobody")
    for n in range(3):
        admit(cache, f"new {n}", 5)
    with pytest.raises(NoFreeSlot, match="1 are kept for suspended sequences"):
        cache.admit("new 3", 5)
    cache.release("a")
    assert cache.stats().host_bytes == 0
    assert admit(cache, "a", 5) == slot
    cache.check_integrity()


def test_a_full_host_says_so_and_changes_nothing(driver: Driver) -> None:
    block = 4 * driver.granularity()
    config = replace(HOST, host_memory=block)
    with KVCacheManager(SHAPE, driver, 400 * driver.granularity(), 4, config=config) as cache:
        tokens = min(SHAPE.max_seq_len, block // SHAPE.token_bytes)
        admit(cache, "a", tokens)
        admit(cache, "b", tokens)
        cache.suspend("a")
        with pytest.raises(HostMemoryFull, match="raise host_memory"):
            cache.suspend("b")
        expect(cache, "b", range(tokens))
        cache.check_integrity()
        cache.release("a")
        cache.suspend("b")
        cache.resume("b")
        expect(cache, "b", range(tokens))


def test_what_a_suspended_sequence_reads_is_not_cut_off(build: Callable[..., KVCacheManager]) -> None:
    cache = build()
    owner = admit(cache, "owner", 30)
    cache.admit("reader", 40, prefix=(owner, 20))
    fill(cache, "reader", range(20, 40))
    cache.suspend("reader")
    with pytest.raises(ConfigError, match="read the first 20 tokens of slot 0"):
        cache.truncate("owner", 19)
    cache.truncate("owner", 20)
    cache.check_integrity()
    cache.resume("reader", 40)
    expect(cache, "reader", range(20), "owner")
    expect(cache, "reader", range(20, 40))


def test_without_host_memory_nothing_is_suspended(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 200 * 4096) as cache:
        cache.admit("a", 5)
        with pytest.raises(HostMemoryFull, match="left of 0"):
            cache.suspend("a")
        assert host_driver.live_host_bytes == 0


def test_who_finds_no_memory_stays_suspended(build: Callable[..., KVCacheManager]) -> None:
    cache = build()
    admit(cache, "a", 50)
    cache.suspend("a")
    admit(cache, "b", 50)
    cache.set_budget(cache.arena.used_bytes)
    with pytest.raises(KVCacheOutOfMemory):
        cache.resume("a")
    assert cache.is_suspended("a")
    cache.check_integrity()
    cache.release("b")
    cache.resume("a")
    expect(cache, "a", range(50))


def test_what_it_reads_elsewhere_is_held_and_what_it_shares_becomes_its_own(
    build: Callable[..., KVCacheManager],
) -> None:
    cache = build()
    owner = admit(cache, "owner", 40)
    cache.admit("reads", 48, prefix=(owner, 40))
    fill(cache, "reads", range(40, 48))
    cache.fork("owner", "shares", 40)
    with pytest.raises(ConfigError, match="read the first 40 tokens"):
        cache.suspend("owner")
    cache.suspend("reads")
    cache.suspend("shares")
    assert cache.segments is None or not len(cache.segments)
    with pytest.raises(ConfigError, match="release them first"):
        cache.release("owner")
    kept = cache.retain("owner")
    cache.check_integrity()
    # Not even pressure takes what it reads.
    admit(cache, "new", 50)
    cache.set_budget(cache.arena.used_bytes)
    assert cache.retained_tokens(kept) == 40
    cache.set_budget(200 * cache.layout.granularity)
    cache.release("new")
    for sequence in ("shares", "reads"):
        cache.resume(sequence)
        expect(cache, sequence, range(40), "owner")
    expect(cache, "reads", range(40, 48))
    assert cache.stats().segment_tokens == 40
    cache.release("shares")
    cache.release("reads")
    cache.check_integrity()


@pytest.mark.parametrize("kind", ["blocks", "tensors", "own lengths", "heads"])
def test_every_layout_is_suspended(kind: str, host_driver: HostDriver) -> None:
    budget = 600 * 4096
    if kind == "blocks":
        config = replace(HOST, layout=Layout.BLOCKS, tokens_per_block=16)
        cache: KVCacheManager = BlockKVCache(SHAPE, host_driver, budget, config=config)
    else:
        given = {"tensors": {"layout": Layout.TENSORS}, "own lengths": {"own_lengths": True, "layers_per_range": 1}}
        config = replace(HOST, **given.get(kind, {}))  # type: ignore[arg-type]
        cache = KVCacheManager(SHAPE, host_driver, budget, config=config)
    with cache:
        admit(cache, "a", 45)
        if kind == "own lengths":
            cache.set_length("a", 2, 7)
            host_driver.complete()
        cache.suspend("a")
        admit(cache, "b", 50)
        slot = cache.resume("a")
        if kind == "own lengths":
            assert [int(cache.lengths_of(group)[slot]) for group in range(4)] == [45, 45, 7, 45]
            assert cache.length_deficits is not None
            assert cache.length_deficits[:, slot].tolist() == [0, 0, 38, 0]
        else:
            expect(cache, "a", range(45))
        cache.check_integrity()


def test_a_raised_lower_edge_comes_back(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 200 * 4096, 4, config=replace(HOST, extent_classes=1)) as cache:
        slot = admit(cache, "a", 50)
        cache.arena.raise_lower_edge(slot, 20, host_driver.record(0))
        edge = cache.arena.lower_edge(slot)
        assert edge > 0
        cache.suspend("a")
        cache.resume("a")
        assert cache.arena.lower_edge(slot) == edge
        expect(cache, "a", range(edge, 50))
        cache.check_integrity()


@pytest.mark.parametrize(
    "call",
    ["suspend", "suspend beside", "resume", "resume beside", "resume for more", "sleep", "wake", "drop"],
)
def test_every_driver_call_may_fail_once(call: str) -> None:
    """The sequence runs, or is suspended, as before; its bytes are there."""

    def build(driver: FaultyDriver) -> KVCacheManager:
        cache = KVCacheManager(SHAPE, driver, 200 * 4096, 2, config=replace(HOST, extent_classes=3))
        admit(cache, "a", 30)
        for _ in range(10):
            cache.extend("a", 1)
        fill(cache, "a", range(30, 40))
        if call == "sleep" or call == "wake":
            cache.fork("a", "shares", 35)
            cache.admit("reads", 20, prefix=(cache.slot_of("a"), 13))
            fill(cache, "reads", range(13, 20))
        if not call.startswith("suspend") and call != "sleep":
            cache.sleep(keep=True) if call == "wake" else cache.suspend("a", wait=call != "resume beside")
        return cache

    calls: dict[str, Callable[[KVCacheManager], object]] = {
        "suspend": lambda cache: cache.suspend("a"),
        "suspend beside": lambda cache: cache.suspend("a", wait=False),
        "resume": lambda cache: cache.resume("a"),
        "resume beside": lambda cache: cache.resume("a", wait=False),
        "resume for more": lambda cache: cache.resume("a", 50),
        "sleep": lambda cache: cache.sleep(keep=True),
        "wake": lambda cache: cache.wake(),
        "drop": lambda cache: cache.sleep(keep=False),
    }

    def check(cache: KVCacheManager, failed: bool) -> None:
        if call in ("sleep", "wake"):
            assert cache.is_asleep is (failed == (call == "wake"))
        cache.wake()
        if cache.is_suspended("a"):
            assert failed != call.startswith("suspend") or call == "drop"
            cache.resume("a")
        else:
            assert failed == call.startswith("suspend") or call in ("sleep", "wake")
        cache.check_integrity()
        expect(cache, "a", range(40))
        if call in ("sleep", "wake"):
            expect(cache, "shares", range(35), "a")
            expect(cache, "reads", range(13), "a")
            expect(cache, "reads", range(13, 20))

    assert fail_each_call(build, calls[call], check) >= (2 if call in ("drop", "suspend beside") else 6)


def test_copies_go_on_beside_the_steps_of_others(build: Callable[..., KVCacheManager]) -> None:
    cache = build(60)
    admit(cache, "other", 20)
    admit(cache, "a", 37)
    used = cache.arena.used_bytes
    assert cache.suspend("a", wait=False) == 37 * SHAPE.token_bytes
    assert cache.is_suspended("a")
    cache.extend("other", 3)
    fill(cache, "other", range(20, 23))
    # Who comes waits for the memory, where there is no other, and does not write into what is copied.
    while True:
        try:
            admit(cache, f"new {cache.stats().sequences}", 20)
        except (KVCacheOutOfMemory, NoFreeSlot):
            break
    assert cache.arena.used_bytes >= used
    for sequence in [each for each in cache.sequences if each != "other"]:
        cache.release(sequence)
    slot = cache.resume("a", 40, wait=False)
    cache.extend("other", 2)
    fill(cache, "other", range(23, 25))
    while not cache.has_arrived("a"):
        pass
    assert cache.slot_of("a") == slot
    expect(cache, "a", range(37))
    expect(cache, "other", range(25))
    # Suspended and gone at once: what is suspended next may have its host memory.
    cache.suspend("a", wait=False)
    cache.release("a")
    cache.suspend("other", wait=False)
    cache.resume("other", wait=False)
    # Whoever names it waits.
    cache.extend("other", 1)
    expect(cache, "other", range(25))
    cache.check_integrity()
    assert cache.transfers.out_bytes >= (37 + 37 + 25) * SHAPE.token_bytes


def test_memory_is_unmapped_and_steps_are_taken_behind_their_fences(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 60 * host_driver.granularity(), 2, config=HOST) as cache:
        admit(cache, "other", 20)
        slot = admit(cache, "a", 37)
        host_driver.hold()
        cache.suspend("a", wait=False)
        pending = cache.arena.slots[slot].pending_unmap
        assert pending
        cache.arena.complete_pending_unmaps()
        assert cache.arena.slots[slot].pending_unmap
        cache.check_integrity()
        # It cannot be mapped again before that.
        with pytest.raises(DriverError, match="held"):
            cache.resume("a")
        assert cache.is_suspended("a")
        cache.extend("other", 2)
        host_driver.complete()
        cache.arena.complete_pending_unmaps()
        assert not cache.arena.slots[slot].pending_unmap
        cache.check_integrity()
        host_driver.hold()
        assert cache.resume("a", wait=False) == slot
        assert not cache.has_arrived("a")
        cache.check_integrity()
        lengths = cache.lengths.copy()
        lengths[slot] = 0
        cache.prepare_step(lengths)
        lengths[slot] = 38
        for call in (lambda: cache.prepare_step(lengths), lambda: cache.slot_of("a")):
            with pytest.raises(DriverError, match="held"):
                call()
            assert not cache.has_arrived("a")
        host_driver.complete()
        assert cache.has_arrived("a")
        cache.prepare_step(lengths)
        expect(cache, "a", range(37))


@pytest.mark.gpu
def test_nobody_waits_for_copies_on_a_gpu() -> None:
    driver = open_driver("cuda:0")
    with KVCacheManager(SHAPE, driver, 200 * driver.granularity(), 2, config=HOST) as cache:
        admit(cache, "other", 20)
        admit(cache, "a", 37)
        cache.suspend("a")
        cache.resume("a")
        torch.cuda.synchronize()
        # A step that takes long, which the copies are behind.
        torch.cuda._sleep(1 << 30)
        started = perf_counter()
        cache.suspend("a", wait=False)
        taken = perf_counter() - started
        fill(cache, "other", range(20))
        torch.cuda.synchronize()
        took = perf_counter() - started
        assert taken < took / 4
        cache.resume("a", wait=False)
        while not cache.has_arrived("a"):
            pass
        expect(cache, "a", range(37))
        expect(cache, "other", range(20))


def test_where_an_unmap_failed_in_its_slot_it_comes_back_in_another() -> None:
    host = HostDriver()
    driver = FaultyDriver(host)
    with KVCacheManager(SHAPE, driver, 200 * 4096, 2, config=HOST) as cache:
        slot = admit(cache, "a", 40)
        cache.suspend("a")
        # The copy back fails, and so does undoing the mapping before it.
        driver.fail("copy_to_device")
        driver.fail("unmap")
        with pytest.raises(Exception, match="copy_to_device"):
            cache.resume("a")
        assert cache.broken_slots() == [slot]
        assert cache.is_suspended("a")
        cache.check_integrity()
        other = cache.resume("a")
        assert other != slot
        expect(cache, "a", range(40))
        cache.check_integrity()
    host.close()


def test_a_slot_that_is_broken_is_not_suspended() -> None:
    host = HostDriver()
    driver = FaultyDriver(host)
    with KVCacheManager(SHAPE, driver, 200 * 4096, 2, config=HOST) as cache:
        slot = admit(cache, "a", 40)
        cache.arena.slots[slot].mark_broken()
        with pytest.raises(MemoryQuarantined, match="cannot come back"):
            cache.suspend("a")
        with pytest.raises(MemoryQuarantined, match="release their sequences"):
            cache.sleep(keep=True)
        expect(cache, "a", range(40))
    host.close()


# -- sleep -----------------------------------------------------------------------------------------------------------


def test_a_cache_that_sleeps_has_no_memory_and_wakes_with_all_its_tokens(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 200 * 4096, 2, config=replace(HOST, extent_classes=2)) as cache:
        before = addresses(cache)
        owner = admit(cache, "owner", 40)
        cache.admit("reads", 48, prefix=(owner, 40))
        fill(cache, "reads", range(40, 48))
        cache.fork("owner", "shares", 40)
        kept = cache.retain("owner")
        cache.touch(kept, 2.0)
        admit(cache, "suspended", 20)
        cache.suspend("suspended")
        held, shared = cache.held_bytes, dict(cache.arena.extent_refs)
        used = cache.arena.used_bytes
        assert shared
        assert cache.sleep(keep=True) == held
        assert (cache.held_bytes, host_driver.physical_bytes, host_driver.live_mappings) == (0, 0, 0)
        assert (cache.stats().held_bytes, cache.stats().sequences) == (0, 0)
        for call in (
            lambda: cache.admit("new", 1),
            lambda: cache.resume("suspended"),
            lambda: cache.prepare_step(cache.lengths + 1),
            lambda: cache.slot_of("reads"),
            cache.map_ahead,
            lambda: cache.set_budget("1GiB"),
            lambda: cache.sleep(keep=True),
        ):
            with pytest.raises(CacheAsleep, match="wake"):
                call()
        copied = cache.wake()
        assert copied == cache.transfers.in_bytes
        # What they share was copied once, with the rest of the last page of it.
        assert 48 * SHAPE.token_bytes <= copied < 96 * SHAPE.token_bytes
        assert cache.wake() == 0
        cache.check_integrity()
        assert addresses(cache) == before
        # What was shared is shared again: it takes no more memory than before.
        assert cache.arena.used_bytes == used
        assert len(cache.arena.extent_refs) == len(shared)
        assert cache.retained_tokens(kept) == 40
        assert cache.arena.slots[kept.slot].priority == 2.0
        expect(cache, "reads", range(40), "owner")
        expect(cache, "reads", range(40, 48))
        expect(cache, "shares", range(40), "owner")
        expect_in(cache, kept.slot, range(40), "owner")
        cache.resume("suspended")
        expect(cache, "suspended", range(20))
        adopted = cache.release("reads"), cache.release("shares"), cache.adopt(kept, "again", 40)
        assert adopted[2] == kept.slot
        expect(cache, "again", range(40), "owner")


def asleep(driver: FaultyDriver, layers_per_range: int) -> KVCacheManager:
    cache = KVCacheManager(SHAPE, driver, 200 * 4096, layers_per_range, config=HOST)
    admit(cache, "a", 40)
    cache.fork("a", "shares", 35)
    cache.sleep(keep=True)
    return cache


@pytest.mark.parametrize("layers_per_range", [4, 1])
@pytest.mark.parametrize("code", ["CUDA_ERROR_UNKNOWN", "CUDA_ERROR_OUT_OF_MEMORY"])
def test_a_wake_that_fails_and_cannot_be_undone_can_be_called_again(code: str, layers_per_range: int) -> None:
    """Memory that somebody else has meanwhile, and one unmap that fails, are enough for that."""
    host = HostDriver()
    driver = FaultyDriver(host)
    cache = asleep(driver, layers_per_range)
    before = driver.seen
    cache.wake()
    calls = driver.seen - before
    cache.close()
    refused = set()
    for first in range(calls):
        for skip in range(3):
            cache = asleep(driver, layers_per_range)
            driver.fail("*", skip=first, code=code)
            driver.fail("unmap", skip=skip)
            with pytest.raises((DriverError, KVCacheOutOfMemory)):
                cache.wake()
            if broken := [index for index, slot in enumerate(cache.arena.slots) if slot.broken]:
                # What is in the way is still not to be unmapped.
                for _ in range(4):
                    driver.fail("unmap")
                with pytest.raises(MemoryQuarantined, match="nothing comes back there; try again"):
                    cache.wake()
                refused.update(broken)
            driver.disarm()
            assert cache.is_asleep
            cache.check_integrity()
            cache.wake()
            assert cache.stats().quarantined == 0
            cache.check_integrity()
            expect(cache, "a", range(40))
            expect(cache, "shares", range(35), "a")
            cache.layer(0).k[cache.dummy_slot, 0] = 1.0
            cache.close()
    assert {0, 1, cache.dummy_slot} <= refused | ({cache.dummy_slot} if layers_per_range == 4 else set())
    assert (host.live_mappings, host.live_handles, host.live_reservations) == (0, 0, 0)
    host.close()


@pytest.mark.parametrize("undoing", ["map", "set_access"])
def test_a_sleep_that_fails_and_cannot_be_undone_leaves_a_dummy_slot_with_memory(undoing: str) -> None:
    host = HostDriver()
    driver = CountingDriver(host)
    cache = KVCacheManager(SHAPE, driver, 200 * 4096, 1, config=HOST)
    slot = admit(cache, "a", 40)
    before = driver.calls["unmap"]
    cache.sleep(keep=True)
    unmaps = driver.calls["unmap"] - before
    cache.close()
    # All but the first of the dummy slot, whose unmaps are the last.
    for first in range(unmaps - SHAPE.num_layers + 1, unmaps):
        driver = FaultyDriver(host)
        cache = KVCacheManager(SHAPE, driver, 200 * 4096, 1, config=HOST)
        admit(cache, "a", 40)
        driver.fail("unmap", skip=first)
        for _ in range(50):
            driver.fail(undoing)
            driver.fail("unmap", skip=first + 1)
        with pytest.raises(DriverError, match="unmap"):
            cache.sleep(keep=True)
        assert not cache.is_asleep
        assert not cache.arena.has_dummy
        for launch, given in (
            (cache.note_placements, ()),
            (cache.prepare_step, (cache.lengths,)),
            (cache.slot_of, ("a",)),
        ):
            with pytest.raises((DriverError, MemoryQuarantined)):
                launch(*given)  # type: ignore[operator]
        driver.disarm()
        cache.note_placements()
        for layer in range(SHAPE.num_layers):
            cache.layer(layer).k[cache.dummy_slot, 0] = 1.0
        cache.check_integrity()
        # A sequence that lost memory is admitted anew, as ever.
        assert cache.broken_slots() == [slot]
        cache.release("a")
        cache.reset()
        admit(cache, "later", 40)
        cache.sleep(keep=True)
        cache.wake()
        expect(cache, "later", range(40))
        assert cache.stats().quarantined == 0
        cache.close()
    assert (host.live_mappings, host.live_handles, host.live_reservations) == (0, 0, 0)
    host.close()


def test_contents_are_dropped_where_they_are_not_wanted(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 200 * 4096, 2, config=HOST) as cache:
        owner = admit(cache, "owner", 40)
        cache.admit("reads", 48, prefix=(owner, 40))
        fill(cache, "reads", range(40, 48))
        read = cache.retain("owner")
        forgotten = cache.retain(cache.sequence_at(admit(cache, "gone", 10)))
        with pytest.raises(ConfigError, match="1 sequences run"):
            cache.sleep(keep=False)
        cache.suspend("reads")
        cache.sleep(keep=False)
        assert host_driver.physical_bytes == 0
        cache.wake()
        cache.check_integrity()
        assert cache.retained_tokens(forgotten) == 0
        assert (forgotten, 0) in cache.take_evicted()
        # A suspended sequence is kept, with what it reads.
        assert cache.retained_tokens(read) == 40
        cache.resume("reads")
        expect(cache, "reads", range(40), "owner")
        expect(cache, "reads", range(40, 48))


def test_the_thread_takes_no_memory_while_the_cache_sleeps(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 200 * 4096, 2, config=HOST) as cache:
        cache.start_thread()
        cache.preallocate(2, 20)
        admit(cache, "a", 20)
        assert cache.wait_ahead()
        cache.sleep(keep=True)
        cache._wake()
        assert cache.wait_ahead()
        assert host_driver.physical_bytes == 0
        cache.wake()
        expect(cache, "a", range(20))


@pytest.mark.parametrize("asleep", [False, True])
def test_reset_and_close_give_back_what_is_on_the_host(asleep: bool, host_driver: HostDriver) -> None:
    cache = KVCacheManager(SHAPE, host_driver, 200 * 4096, 2, config=HOST)
    admit(cache, "a", 20)
    admit(cache, "b", 20)
    cache.suspend("a")
    if asleep:
        cache.sleep(keep=True)
    cache.reset()
    cache.wake()
    assert cache.stats().host_bytes == 0
    assert not cache.is_suspended("a")
    cache.check_integrity()
    admit(cache, "b", 20)
    cache.suspend("b")
    if asleep:
        cache.sleep(keep=True)
    cache.close()
    assert host_driver.live_host_bytes == 0


def test_caches_that_have_their_memory_for_life_say_so(cache: KVCache) -> None:
    if cache.remaps:
        return
    cache.admit("a", 3)
    for call in (lambda: cache.suspend("a"), lambda: cache.resume("a"), lambda: cache.sleep(True), cache.wake):
        with pytest.raises(ConfigError, match="use the vattn cache"):
            call()
    assert not cache.is_asleep
    assert not cache.is_suspended("a")


def test_make_cache_takes_host_memory(host_driver: HostDriver) -> None:
    with make_cache("vattn", SHAPE, "cpu", host_memory="1MiB", driver=host_driver) as cache:
        cache.admit("a", 3)
        cache.suspend("a")
        assert cache.is_suspended("a")


def test_the_link_is_measured_and_nothing_is_left(host_driver: HostDriver) -> None:
    out, back = measure_link(host_driver, 100_000)
    assert min(out, back) > 1e6
    assert host_driver.live_host_bytes == 0
    driver = FaultyDriver(host_driver)
    for name in ("create", "map", "create_host", "copy_to_host", "copy_to_device"):
        driver.fail(name)
        with pytest.raises(Exception, match="injected"):
            measure_link(driver, 4096)
    assert (host_driver.live_handles, host_driver.live_mappings, host_driver.live_reservations) == (0, 0, 0)
