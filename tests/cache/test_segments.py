"""Sequences that begin with tokens of another slot: read there, aliased, or copied; every byte checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from contents import admit, expect, fill
from failing import fail_each_call
from shapes import SHAPE

from trtllm_vattn.cache.blocks import BlockKVCache
from trtllm_vattn.cache.config import CacheConfig, Layout
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import (
    ConfigError,
    InvariantViolation,
    SequenceTooLong,
    UnmappedAccess,
)
from trtllm_vattn.graphs.guard import Guard
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import FaultyDriver

PAGE = 4096
PAGES = CacheConfig(extent_classes=1, lookahead=0)
"""Every extent is a page: how much is shared does not hang on how a prompt was divided."""


@pytest.fixture(params=[1, 2, 4])
def cache(request: pytest.FixtureRequest, host_driver: HostDriver) -> Iterator[KVCacheManager]:
    config = replace(PAGES, layers_per_range=request.param)
    with KVCacheManager(SHAPE, host_driver, 400 * PAGE, config=config) as made:
        yield made


def check(guard: Guard, slot: int, length: int, position: int) -> None:
    guard.check(np.array([length]), np.array([slot]), np.array([position]))


def test_a_prefix_is_read_in_its_owner_and_costs_no_memory(cache: KVCacheManager) -> None:
    owner = admit(cache, "owner", 30)
    before = cache.stats().mapped_bytes
    slot = cache.admit("reader", 40, prefix=(owner, 30))
    own = cache.layout.bytes_for(40) - cache.layout.whole_bytes(30) // PAGE * PAGE
    assert cache.stats().mapped_bytes - before == own * cache.layout.num_ranges
    fill(cache, "reader", range(30, 40))
    expect(cache, "reader", range(30), "owner")
    expect(cache, "reader", range(30, 40))
    expect(cache, "owner", range(30))
    assert cache.segments is not None
    assert cache.segments.tolist() == [[slot, owner, 0, 30]]
    assert cache.stats().segment_tokens == 30
    assert cache.lower_edges is not None
    assert 0 < cache.lower_edges[slot] <= 30 < 40 <= cache.frontiers[slot]
    cache.extend("reader", 10)
    fill(cache, "reader", range(40, 50))
    expect(cache, "reader", range(30, 50))
    cache.extend("owner", 5)
    fill(cache, "owner", range(30, 35))
    expect(cache, "reader", range(30), "owner")
    cache.check_integrity()
    cache.release("reader")
    assert cache.stats().segment_tokens == 0
    cache.release("owner")
    cache.check_integrity()


def test_an_owner_keeps_its_place_and_tokens_while_it_is_read(cache: KVCacheManager) -> None:
    owner = admit(cache, "owner", 30)
    cache.admit("reader", 40, prefix=(owner, 20))
    message = r"slots \[1\] read the first 20 tokens of slot 0: release them first, or retain"
    for call in (
        lambda: cache.release("owner"),
        lambda: cache.move("owner", 3),
        lambda: cache.truncate("owner", 19),
        lambda: cache.make_writable("owner", 19),
        lambda: cache.arena.raise_lower_edge(owner, 8, cache.driver.record(0)),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
        cache.check_integrity()
    cache.truncate("owner", 20)
    cache.replace("owner")  # other memory, the same place and bytes
    expect(cache, "reader", range(20), "owner")
    cache.release("reader")
    cache.move("owner", 3)
    expect(cache, "owner", range(20))


def test_a_reader_moves_and_is_forked_with_its_segments(cache: KVCacheManager) -> None:
    owner = admit(cache, "owner", 20)
    cache.admit("reader", 40, prefix=(owner, 20))
    fill(cache, "reader", range(20, 40))
    cache.move("reader", 2)
    assert cache.segments is not None
    assert cache.segments.tolist() == [[2, 0, 0, 20]]
    expect(cache, "reader", range(20), "owner")
    expect(cache, "reader", range(20, 40))
    fork = cache.fork("reader", "fork", 35)
    expect(cache, "fork", range(20), "owner")
    expect(cache, "fork", range(20, 35), "reader")
    short = cache.fork("reader", "short", 12)
    assert cache.segments.tolist() == sorted([[2, 0, 0, 20], [fork, 0, 0, 20], [short, 0, 0, 12]])
    expect(cache, "short", range(12), "owner")
    cache.extend("short", 5)
    fill(cache, "short", range(12, 17))
    expect(cache, "short", range(12, 17))
    expect(cache, "owner", range(20))
    cache.check_integrity()
    with pytest.raises(ConfigError, match=r"slots \[1, 2, 3\] read the first 20 tokens of slot 0"):
        cache.release("owner")
    for sequence in ("reader", "fork", "short", "owner"):
        cache.release(sequence)
        cache.check_integrity()


def test_a_prefix_of_a_reader_has_a_segment_in_each_slot_that_it_lies_in(cache: KVCacheManager) -> None:
    admit(cache, "first", 15)
    cache.admit("second", 33, prefix=(0, 15))
    fill(cache, "second", range(15, 33))
    cache.admit("third", 40, prefix=(1, 33))
    fill(cache, "third", range(33, 40))
    assert cache.segments is not None
    assert cache.segments.tolist() == [[1, 0, 0, 15], [2, 0, 0, 15], [2, 1, 15, 33]]
    expect(cache, "third", range(15), "first")
    expect(cache, "third", range(15, 33), "second")
    expect(cache, "third", range(33, 40))
    guard = Guard(cache)
    guard.check(np.array([15, 33, 40]), np.array([0, 1, 2]), np.array([14, 32, 39]))
    # A copy has them all in one place.
    cache.admit("copy", 45)
    cache.copy_prefix(2, "copy", 40)
    cache.release("third")
    cache.release("second")
    expect(cache, "copy", range(15), "first")
    expect(cache, "copy", range(15, 33), "second")
    expect(cache, "copy", range(33, 40), "third")
    cache.check_integrity()


def test_an_alias_shares_whole_extents_and_copies_the_rest(cache: KVCacheManager) -> None:
    owner = admit(cache, "owner", 30)
    slot = cache.admit("alias", 45, alias=(owner, 25))
    expect(cache, "alias", range(25), "owner")
    fill(cache, "alias", range(25, 45))
    expect(cache, "alias", range(25, 45))
    expect(cache, "owner", range(30))
    assert cache.segments is None
    whole = cache.layout.whole_bytes(25) // PAGE
    stripes = cache.arena.slots[slot].stripes
    assert [stripe[0].extent.mappings for stripe in stripes[:whole]] == [2] * whole
    assert {stripe[0].extent.mappings for stripe in stripes[whole:]} == {1}
    # Its owner may end before it, and be written where it is not shared.
    cache.release("owner")
    cache.arena.complete_pending_unmaps(wait=True)
    expect(cache, "alias", range(25), "owner")
    cache.check_integrity()


def test_nobody_writes_what_others_read(cache: KVCacheManager) -> None:
    owner = admit(cache, "owner", 30)
    guard = Guard(cache)
    reader = cache.admit("reader", 40, prefix=(owner, 20))
    check(guard, reader, 40, 20)
    with pytest.raises(UnmappedAccess, match=r"'reader' in slot 1 would write from position 19, but .* below 20;"):
        check(guard, reader, 40, 19)
    cache.release("reader")
    alias = cache.admit("alias", 40, alias=(owner, 30))
    floors = cache.write_floors
    assert floors is not None
    shared = cache.layout.whole_bytes(30) // PAGE * PAGE
    assert floors[alias] == floors[owner] == cache.layout.first_token(shared)
    check(guard, alias, 40, 30)
    with pytest.raises(UnmappedAccess, match="'alias' in slot 1 would write from position 3"):
        check(guard, alias, 40, 3)
    cache.truncate("alias", 3)
    check(guard, alias, 4, 3)
    cache.release("alias")
    assert cache.write_floors is None
    check(guard, owner, 30, 3)


def test_the_guard_sees_a_segment_without_memory(cache: KVCacheManager) -> None:
    owner = admit(cache, "owner", 30)
    reader = cache.admit("reader", 40, prefix=(owner, 30))
    guard = Guard(cache)
    check(guard, reader, 40, 39)
    while cache.arena.slots[owner].mapped:
        cache.arena.unmap_tail(owner)  # the arena's insides, on purpose
    with pytest.raises(
        UnmappedAccess, match="'reader' in slot 1 reads tokens 0 to 30 in slot 0, where 0 to 0 are mapped"
    ):
        check(guard, reader, 40, 39)
    with pytest.raises(InvariantViolation, match="tokens 0 to 30 lie in slot 0, which backs 0 to 0"):
        cache.arena.check_integrity()


def test_what_cannot_be_begun_with_is_refused(cache: KVCacheManager) -> None:
    owner = admit(cache, "owner", 20)
    cases: list[tuple[dict[str, object], str]] = [
        ({"prefix": (owner, 21)}, "21 tokens of the sequence in slot 0 asked for; it has 20"),
        ({"alias": (9, 5)}, "5 tokens of the sequence in slot 9 asked for; there is none"),
        ({"prefix": (owner, 0)}, "cannot begin with"),
        ({"prefix": (owner, 31)}, "cannot begin with"),
        ({"prefix": (owner, 5), "alias": (owner, 5)}, "not with both"),
    ]
    for begun, message in cases:
        with pytest.raises(ConfigError, match=message):
            cache.admit("new", 30, **begun)  # type: ignore[arg-type]
    with pytest.raises(SequenceTooLong):
        cache.admit("new", 51, prefix=(owner, 20))
    reader = cache.admit("reader", 30, prefix=(owner, 20))
    with pytest.raises(ConfigError, match="first 20 tokens of slot 1 lie in other slots, so those from 19 on cannot"):
        cache.truncate("reader", 19)
    with pytest.raises(ConfigError, match="does not have its first 10 tokens to itself"):
        cache.copy_prefix(owner, "reader", 10)
    with pytest.raises(ConfigError, match="does not have its first 10 tokens to itself"):
        cache.copy_prefix(owner, "owner", 10)
    with pytest.raises(ConfigError, match=f"25 tokens of the sequence in slot {reader}|{owner} asked for; it has 20"):
        cache.copy_prefix(reader, "owner", 25)
    assert cache.stats().sequences == 2
    cache.check_integrity()


def test_blocks_are_read_whole(host_driver: HostDriver) -> None:
    config = replace(PAGES, layout=Layout.BLOCKS, tokens_per_block=16)
    with BlockKVCache(SHAPE, host_driver, 400 * PAGE, config=config) as cache:
        owner = admit(cache, "owner", 40)
        with pytest.raises(ConfigError, match="20 tokens in slot 0 do not end with a block; read whole blocks of it"):
            cache.admit("reader", 45, prefix=(owner, 20))
        cache.admit("reader", 45, prefix=(owner, 32))
        fill(cache, "reader", range(32, 45))
        cache.admit("alias", 45, alias=(owner, 21))
        fill(cache, "alias", range(21, 45))
        cache.admit("copy", 45)
        cache.copy_prefix(1, "copy", 40)
        for sequence, tokens in (("reader", 32), ("alias", 21), ("copy", 32)):
            expect(cache, sequence, range(tokens), "owner")
        expect(cache, "reader", range(32, 45))
        expect(cache, "alias", range(21, 45))
        expect(cache, "copy", range(32, 40), "reader")
        cache.check_integrity()


CALLS: dict[str, Callable[[KVCacheManager], object]] = {
    "prefix": lambda cache: cache.admit("new", 40, prefix=(0, 18)),
    "prefix of a reader": lambda cache: cache.admit("new", 40, prefix=(1, 27)),
    "alias": lambda cache: cache.admit("new", 40, alias=(0, 18)),
    "alias of a reader": lambda cache: cache.admit("new", 40, alias=(1, 27)),
    "copy": lambda cache: cache.copy_prefix(0, "target", 18),
    "move": lambda cache: cache.move("reader", 3),
    "release": lambda cache: cache.release("reader"),
}


@pytest.mark.parametrize("layers_per_range", [4, 2])
@pytest.mark.parametrize("name", CALLS)
def test_every_driver_call_may_fail_once(name: str, layers_per_range: int) -> None:
    def build(driver: FaultyDriver) -> KVCacheManager:
        config = replace(PAGES, layers_per_range=layers_per_range)
        cache = KVCacheManager(SHAPE, driver, 300 * PAGE, config=config)
        admit(cache, "owner", 20)
        cache.admit("reader", 30, prefix=(0, 20))
        fill(cache, "reader", range(20, 30))
        if name == "copy":
            admit(cache, "target", 20)
        return cache

    def check_contents(cache: KVCacheManager, failed: bool) -> None:
        expect(cache, "owner", range(20))
        if name != "release" or failed:
            expect(cache, "reader", range(20), "owner")
            expect(cache, "reader", range(20, 30))
        if failed:
            assert cache.lengths.tolist() == [20, 30, 20 if name == "copy" else 0, 0]
            assert cache.segments is not None
            assert cache.segments.tolist() == [[1, 0, 0, 20]]

    failures = fail_each_call(build, CALLS[name], check_contents)
    assert failures > 1 or name in ("release", "copy")
