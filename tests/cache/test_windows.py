"""Layers with sliding windows keep a window's memory: rows that later tokens take in turns, in ranges of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from contents import pattern
from failing import fail_each_call
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from shapes import SHAPE

from trtllm_vattn.cache.base import FlatKV, KVCache, RetainedSlot
from trtllm_vattn.cache.config import CacheConfig, Layout
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.paged import PagedCache
from trtllm_vattn.cache.prefix import PrefixCache, Way
from trtllm_vattn.cache.prefix.managed import ManagedReuse
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError, HostMemoryFull, KVCacheOutOfMemory, NoFreeSlot, PrefixEvicted
from trtllm_vattn.graphs.guard import Guard
from trtllm_vattn.memory.layout import SlotLayout
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import CountingDriver

W = 12
WINDOWED = replace(SHAPE, max_seq_len=400, windows=(W, None, W, None))
PAGE = 4096


def kept(shape_window: int | None, tokens: range, length: int) -> range:
    """Those of some tokens that a layer keeps of a sequence of `length` tokens."""
    return tokens if shape_window is None else range(max(tokens.start, length - shape_window), tokens.stop)


def put(cache: KVCache, sequence: int, tokens: range) -> None:
    """Write a sequence's tokens, the last ones of it, as a backend does: each to its row."""
    slot = cache.slot_of(sequence)
    for layer in range(cache.shape.num_layers):
        window, kv = cache.shape.window_of(layer), cache.layer(layer)
        assert isinstance(kv, FlatKV)
        mine = kept(window, tokens, tokens.stop)
        rows = torch.arange(mine.start, mine.stop) % (window or cache.shape.max_seq_len)
        kv.k[slot, rows], kv.v[slot, rows] = pattern(cache, sequence, layer, mine)


def check(cache: KVCache, slot: int, authors: list[int], length: int | None = None) -> None:
    """A slot of `length` tokens holds what was written of each token that a layer keeps."""
    length = len(authors) if length is None else length
    for layer in range(cache.shape.num_layers):
        window, kv = cache.shape.window_of(layer), cache.layer(layer)
        assert isinstance(kv, FlatKV)
        for author in set(authors):
            mine = torch.tensor(
                [t for t in kept(window, range(length), length) if authors[t] == author], dtype=torch.long
            )
            k, v = pattern(cache, author, layer, range(length))[:, mine]
            rows = mine % (window or cache.shape.max_seq_len)
            assert torch.equal(kv.k[slot, rows], k), (slot, layer, author)
            assert torch.equal(kv.v[slot, rows], v), (slot, layer, author)


def manager(driver: object, budget: int = 400 * PAGE, **options: object) -> KVCacheManager:
    return KVCacheManager(WINDOWED, driver, budget, config=CacheConfig(**{"lookahead": 0, **options}))  # type: ignore[arg-type]


@pytest.fixture
def cache(host_driver: HostDriver) -> Iterator[KVCacheManager]:
    with manager(host_driver, host_memory=400 * PAGE) as made:
        yield made


# -- layout ----------------------------------------------------------------------------------------------------------


def test_layers_of_different_windows_are_in_different_ranges() -> None:
    layout = SlotLayout(6, 2, 64, 100, 3, 4096, windows=(8, None, 8, 8, None, 8))
    assert [(list(kind.ranges), kind.window) for kind in layout.kinds] == [([0, 1], 8), ([2], None)]
    assert [layout.place_of(layer) for layer in range(6)] == [(0, 0), (2, 0), (0, 64), (1, 0), (2, 64), (1, 64)]
    assert layout.needs(50) == [(4096, 2), (8192, 1)]
    with pytest.raises(ConfigError, match="4 and 2 layers of different windows: one of"):
        SlotLayout(6, 4, 64, 100, 3, 4096, windows=(8, None, 8, 8, None, 8))


def test_windows_of_a_shape_are_checked() -> None:
    assert replace(WINDOWED, max_seq_len=W).windows == ()
    assert WINDOWED.kept_bytes(50) == 2 * (50 + W) * WINDOWED.layer_token_bytes
    for wrong, why in (((4,), "1 windows for 4 layers"), ((0, 1, 2, 3), "a window is 0")):
        with pytest.raises(ConfigError, match=why):
            replace(WINDOWED, windows=wrong)


def test_what_keeps_no_windows_is_refused_by_name(host_driver: HostDriver) -> None:
    with pytest.raises(ConfigError, match="layout 'tensors' keeps all tokens of all layers"):
        manager(host_driver, layout=Layout.TENSORS)
    with pytest.raises(ConfigError, match="leave own_lengths out"):
        manager(host_driver, own_lengths=True)
    with pytest.raises(ConfigError, match="a paged cache keeps all tokens"):
        PagedCache(WINDOWED, "cpu", 16)
    for kind in ("paged", "blocks", "published"):
        with make_cache(kind, WINDOWED, "cpu", driver=host_driver) as made:
            assert made.shape.windows == ()


# -- memory ----------------------------------------------------------------------------------------------------------


def test_a_window_takes_its_memory_once_and_no_driver_call_afterwards() -> None:
    host = HostDriver()
    driver = CountingDriver(host)
    shape = replace(WINDOWED, windows=(W,) * 4, max_seq_len=200_000)
    with KVCacheManager(shape, driver, 64 * PAGE, 2, 0) as cache:
        cache.admit(0, 1)
        lengths = np.zeros(shape.num_slots, np.int64)
        base, guard = cache.layer(3), Guard(cache)
        for length in range(1, W + 1):
            lengths[cache.slot_of(0)] = length
            cache.prepare_step(lengths)
        held, before = cache.stats().mapped_bytes, sum(driver.calls.values())
        # Two ranges of two layers: the window's rows and no more than a page of each range beside them.
        ideal = W * shape.token_bytes
        assert ideal <= held <= ideal + 2 * PAGE
        for length in range(W + 1, 100_000, 997):
            lengths[cache.slot_of(0)] = length
            cache.prepare_step(lengths)
            cache.map_ahead()
            guard.check(lengths[:1], np.array([0]), lengths[:1] - 1)
        assert cache.stats().mapped_bytes == held
        assert sum(driver.calls.values()) == before
        assert cache.layer(3) is base
        assert cache.longest_alone == 200_000
        cache.check_integrity()
    host.close()


def test_bytes_count_what_is_kept(cache: KVCacheManager) -> None:
    layout = cache.layout
    for tokens in (1, W, W + 1, 400):
        cache.admit(0, tokens)
        each = [layout.bytes_for(min(tokens, W)), layout.bytes_for(tokens)]
        assert cache.bytes_of(tokens) == sum(each) * layout.num_ranges // 2 == cache.stats().mapped_bytes
        assert cache.stats().live_bytes == WINDOWED.kept_bytes(tokens)
        cache.release(0)
        cache.release_free_memory()
    cache.set_budget(layout.least_bytes + cache.bytes_of(300))
    assert cache.longest_alone >= 300 > cache.longest_alone - layout.granularity // layout.row_bytes - 1


def test_a_parked_window_is_adopted_without_a_driver_call(cache: KVCacheManager) -> None:
    cache.admit(0, 100)
    cache.release(0)
    maps = cache.stats().admission_maps
    cache.admit(1, 90)
    assert cache.stats().admission_maps == maps


# -- what a window that went on cannot give ---------------------------------------------------------------------------


def test_what_left_a_window_is_not_had_again(cache: KVCacheManager) -> None:
    cache.admit(0, 2 * W)
    put(cache, 0, range(2 * W))
    for call in (
        lambda: cache.truncate(0, 2 * W - 1),
        lambda: cache.fork(0, 1, 2 * W - 1),
        lambda: cache.admit(1, 2 * W, alias=(cache.slot_of(0), W)),
    ):
        with pytest.raises(ConfigError, match=f"has {2 * W} tokens, of which a layer keeps the last {W}"):
            call()
    with pytest.raises(ConfigError, match="ranges of slot 0 hold different tokens"):
        cache.admit(1, 2 * W, prefix=(cache.slot_of(0), 2 * W))
    cache.fork(0, 1, 2 * W)
    check(cache, cache.slot_of(1), [0] * 2 * W)
    retained = cache.retain(0)
    with pytest.raises(PrefixEvicted, match="whose windows later tokens took the place of"):
        cache.adopt(retained, 2, 2 * W - 1)
    slot = cache.adopt(retained, 2, 2 * W)
    check(cache, slot, [0] * 2 * W)
    cache.check_integrity()


def test_a_window_that_did_not_go_on_is_shared_as_any_memory(cache: KVCacheManager) -> None:
    cache.admit(0, W)
    put(cache, 0, range(W))
    cache.fork(0, 1, W - 3)
    cache.extend(1, 3)
    put(cache, 1, range(W - 3, W))
    check(cache, cache.slot_of(1), [0] * (W - 3) + [1] * 3)
    check(cache, cache.slot_of(0), [0] * W)
    cache.truncate(1, 4)
    # A fork's window is its own: neither sees what the other writes, although both go on through all rows.
    cache.extend(0, 3 * W)
    put(cache, 0, range(W, 4 * W))
    check(cache, cache.slot_of(1), [0] * 4)


def test_prefixes_are_kept_until_a_window_goes_on(cache: KVCacheManager) -> None:
    prefixes = PrefixCache(ManagedReuse(cache), block_size=4, ways=(Way.ADOPT, Way.ALIAS, Way.COPY))
    tokens = list(range(60))

    def begin(sequence: int, length: int) -> int:
        cached = prefixes.lookup_and_admit(sequence, tokens[:length]).cached_tokens
        put(cache, sequence, range(cached, length))
        prefixes.computed(sequence, tokens[:length])
        return cached

    assert begin(0, W) == 0
    prefixes.finish(0, tokens[:W])
    assert begin(1, 3 * W) == W
    check(cache, cache.slot_of(1), [0] * W + [1] * 2 * W)
    # All of it may be begun with, and no less: of fewer tokens the windows are gone.
    assert prefixes.match([*tokens[: 3 * W], 99]) == 3 * W
    assert prefixes.match([*tokens[: 2 * W], 99]) == 0
    assert begin(2, 3 * W + 2) == 3 * W
    cache.extend(1, 1)
    prefixes.finish(1, tokens[: 3 * W])
    assert prefixes.stats.dropped == 1
    prefixes.finish(2, tokens[: 3 * W + 2])
    assert begin(3, 3 * W) == 0
    assert begin(4, 3 * W + 5) == 3 * W + 2
    cache.check_integrity()


# -- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["extend", "fork", "suspend", "resume", "move", "replace"])
def test_a_driver_call_that_fails_changes_nothing(call: str) -> None:
    def build(driver: object) -> KVCacheManager:
        made = manager(driver, host_memory=400 * PAGE)
        made.admit(0, W - 2 if call == "extend" else 2 * W)
        put(made, 0, range(W - 2 if call == "extend" else 2 * W))
        if call == "resume":
            made.suspend(0)
        return made

    calls = {
        "extend": lambda cache: cache.extend(0, 3 * W),
        "fork": lambda cache: cache.fork(0, 1, 2 * W),
        "suspend": lambda cache: cache.suspend(0),
        "resume": lambda cache: cache.resume(0),
        "move": lambda cache: cache.move(0, 2),
        "replace": lambda cache: cache.replace(0),
    }

    def whole(cache: KVCacheManager, failed: bool) -> None:
        if cache.is_suspended(0):
            cache.resume(0)
        slot = cache.slot_of(0)
        if slot not in cache.broken_slots():
            length = W - 2 if call == "extend" else 2 * W
            check(cache, slot, [0] * length, length) if call != "extend" or failed else None
        if call == "fork" and not failed:
            check(cache, cache.slot_of(1), [0] * 2 * W)

    assert fail_each_call(build, calls[call], whole) > 1


# -- a random life ---------------------------------------------------------------------------------------------------


class WindowMachine(RuleBasedStateMachine):
    """`running` maps each sequence to who wrote its tokens, `retained` retained slots, `asleep` suspended ones."""

    @initialize(lookahead=st.sampled_from([0, 5, None]), spare=st.integers(0, 60), threaded=st.booleans())
    def start(self, lookahead: int | None, spare: int, threaded: bool) -> None:
        self.host = HostDriver()
        budget = (4 + spare) * self.host.granularity()
        shape = replace(WINDOWED, max_seq_len=60)
        self.cache = KVCacheManager(shape, self.host, budget, 1, lookahead, config=CacheConfig(host_memory=20 * PAGE))
        if threaded:
            self.cache.start_thread()
        self.running: dict[int, list[int]] = {}
        self.retained: dict[RetainedSlot, list[int]] = {}
        self.asleep: dict[int, list[int]] = {}
        self.count = 0

    def went_on(self, written: int, tokens: int) -> bool:
        return written > W and tokens != written

    def begin(self, sequence: int, authors: list[int], more: int) -> None:
        self.count += 1
        self.running[sequence] = authors + [sequence] * more
        if more:
            put(self.cache, sequence, range(len(authors), len(authors) + more))

    @rule(tokens=st.integers(1, 50))
    def admit(self, tokens: int) -> None:
        try:
            self.cache.admit(self.count, tokens)
        except (KVCacheOutOfMemory, NoFreeSlot):
            return
        self.begin(self.count, [], tokens)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), more=st.integers(1, 9))
    def slide(self, data: st.DataObject, more: int) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.running)))
        length = len(self.running[sequence])
        more = min(more, 60 - length)
        try:
            self.cache.extend(sequence, more)
        except KVCacheOutOfMemory:
            return
        put(self.cache, sequence, range(length, length + more))
        self.running[sequence] += [sequence] * more

    @precondition(lambda self: self.running)
    @rule(data=st.data(), how=st.sampled_from(["release", "retain", "truncate", "suspend", "move", "replace"]))
    def change(self, data: st.DataObject, how: str) -> None:
        cache, sequence = self.cache, data.draw(st.sampled_from(sorted(self.running)))
        authors = self.running[sequence]
        free = [slot for slot in cache.free_slots() if slot not in cache.broken_slots()]
        try:
            if how == "truncate":
                tokens = data.draw(st.integers(1, len(authors)))
                cache.truncate(sequence, tokens)
                del authors[tokens:]
            elif how == "retain":
                self.retained[cache.retain(sequence)] = self.running.pop(sequence)
            elif how == "suspend":
                cache.suspend(sequence)
                self.asleep[sequence] = self.running.pop(sequence)
            elif how == "release":
                cache.release(sequence)
                del self.running[sequence]
            elif how == "replace":
                cache.replace(sequence)
            elif free:
                cache.move(sequence, data.draw(st.sampled_from(free)))
        except ConfigError:
            assert how == "truncate"
            assert self.went_on(len(authors), tokens)
        except (HostMemoryFull, KVCacheOutOfMemory):
            assert how in ("suspend", "replace", "truncate")

    @precondition(lambda self: self.asleep)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.asleep)))
        try:
            self.cache.resume(sequence)
        except KVCacheOutOfMemory:
            return
        self.running[sequence] = self.asleep.pop(sequence)

    @rule(keep=st.booleans())
    def sleep(self, keep: bool) -> None:
        try:
            self.cache.sleep(keep)
        except (ConfigError, HostMemoryFull):
            return
        self.cache.wake()

    @precondition(lambda self: self.running or self.retained)
    @rule(data=st.data(), more=st.integers(0, 9), how=st.sampled_from(["alias", "prefix", "adopt"]))
    def begin_with(self, data: st.DataObject, more: int, how: str) -> None:
        cache = self.cache
        sources: list[tuple[object, list[int]]] = [(slot, self.retained[slot]) for slot in sorted(self.retained)]
        if how != "adopt":
            sources += [(cache.slot_of(one), self.running[one]) for one in sorted(self.running)]
        if not sources:
            return
        source, authors = data.draw(st.sampled_from(sources))
        tokens = data.draw(st.sampled_from([len(authors), data.draw(st.integers(1, len(authors)))]))
        more = min(more, 60 - tokens)
        try:
            if how == "adopt":
                cache.adopt(source, self.count, tokens, tokens + more)  # type: ignore[arg-type]
                del self.retained[source]  # type: ignore[arg-type]
            else:
                cache.admit(self.count, tokens + more, **{how: (source, tokens)})  # type: ignore[arg-type]
        except ConfigError:
            assert how == "prefix" or self.went_on(len(authors), tokens)
        except PrefixEvicted:
            kept_tokens = cache.retained_tokens(source)  # type: ignore[arg-type]
            assert kept_tokens < tokens or self.went_on(len(authors), tokens)
        except (KVCacheOutOfMemory, NoFreeSlot):
            return
        else:
            self.begin(self.count, authors[:tokens], more)

    @rule(pages=st.integers(4, 60))
    def set_budget(self, pages: int) -> None:
        try:
            self.cache.set_budget(pages * PAGE)
        except KVCacheOutOfMemory:
            return

    @rule()
    def map_ahead(self) -> None:
        self.cache.map_ahead()

    @invariant()
    def everything_kept_holds_what_was_written(self) -> None:
        for sequence, authors in self.running.items():
            check(self.cache, self.cache.slot_of(sequence), authors)
        for retained, authors in self.retained.items():
            if self.cache.retained_tokens(retained) == len(authors):
                check(self.cache, retained.slot, authors)

    @invariant()
    def the_books_agree(self) -> None:
        assert self.cache.wait_ahead()
        self.cache.check_integrity()
        stats = self.cache.stats()
        assert stats.live_bytes == sum(self.cache.shape.kept_bytes(len(each)) for each in self.running.values())
        for sequence in self.running:
            slot = self.cache.arena.slots[self.cache.slot_of(sequence)]
            assert all(g.frontier <= g.window_bytes for g in slot.groups if g.window_bytes is not None)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()
            assert (self.host.live_mappings, self.host.live_handles, self.host.live_reservations) == (0, 0, 0)
            self.host.close()


TestWindowMachine = WindowMachine.TestCase
TestWindowMachine.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)
