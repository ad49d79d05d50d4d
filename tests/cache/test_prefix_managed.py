"""`PrefixCache` over the cache at fixed addresses: every byte that a sequence is given was computed from its tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from shapes import SHAPE

from trtllm_vattn.cache.base import FlatKV
from trtllm_vattn.cache.blocks import BlockKVCache
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.prefix import Admission, ManagedReuse, PrefixCache, PrefixKey, Way
from trtllm_vattn.errors import DriverError, KVCacheOutOfMemory
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import CountingDriver, FaultyDriver

PAGE = 4096
SLOTS = replace(SHAPE, num_slots=10, max_seq_len=64)
"""1,536 bytes a token: a page holds 2 tokens and two thirds of one."""


def values(tokens: list[int], key: object = "") -> torch.Tensor:
    """float32 ``[tokens]``, exact: what the KV at each position is computed from, all tokens up to it."""
    found, state = [], hash(key)
    for token in tokens:
        state = hash((state, token))
        found.append(float(state % 65521))
    return torch.tensor(found)


class Computing:
    """A cache whose sequences' KV is written as a model would, and read back where it lies."""

    def __init__(self, cache: KVCacheManager, **options: Any) -> None:
        self.cache = cache
        self.prefix = PrefixCache(ManagedReuse(cache), block_size=4, **options)
        self.tokens: dict[int, list[int]] = {}
        self.keys: dict[int, PrefixKey] = {}
        self.first: dict[int, int] = {}

    def write(self, slot: int, start: int, new: torch.Tensor) -> None:
        floors = self.cache.write_floors
        assert floors is None or start >= floors[slot], "others read what would be written"
        for layer in range(self.cache.shape.num_layers):
            views = self.cache.layer(layer)
            assert isinstance(views, FlatKV)
            for part, offset in ((views.k, 0), (views.v, 1)):
                part[slot, start : start + len(new)] = (new * 8 + 2 * layer + offset).view(-1, 1, 1)

    def admit(self, sequence: int, tokens: list[int], key: PrefixKey = PrefixKey(), **options: Any) -> Admission:  # noqa: B008
        found = self.prefix.lookup_and_admit(sequence, tokens, key, **options)
        self.tokens[sequence], self.keys[sequence], self.first[sequence] = tokens, key, found.cached_tokens
        self.write(found.slot, found.cached_tokens, values(tokens, key)[found.cached_tokens :])
        self.expect(sequence)
        return found

    def decode(self, sequence: int, token: int) -> None:
        self.cache.extend(sequence, 1)
        self.tokens[sequence] = [*self.tokens[sequence], token]
        new = values(self.tokens[sequence], self.keys[sequence])[-1:]
        self.write(self.cache.slot_of(sequence), len(self.tokens[sequence]) - 1, new)

    def finish(self, sequence: int, ok: bool = True) -> None:
        slot, tokens = self.cache.slot_of(sequence), self.tokens.pop(sequence)
        self.prefix.finish(sequence, tokens, ok)
        del self.keys[sequence]
        assert self.cache.sequence_at(slot) is None

    def expect(self, sequence: int) -> None:
        """All KV of a sequence, wherever it lies, is what its tokens make it."""
        slot, tokens = self.cache.slot_of(sequence), self.tokens[sequence]
        wanted = values(tokens, self.keys[sequence])
        for owner, start, stop in self.cache.arena.segments_below(slot, len(tokens)):
            for layer in range(self.cache.shape.num_layers):
                views = self.cache.layer(layer)
                assert isinstance(views, FlatKV)
                for part, offset in ((views.k, 0), (views.v, 1)):
                    seen = part[owner, start:stop]
                    right = (wanted[start:stop] * 8 + 2 * layer + offset).view(-1, 1, 1).expand_as(seen)
                    assert torch.equal(seen, right), f"sequence {sequence}, layer {layer}, tokens {start} to {stop}"


def manager(driver: Any, pages: int = 100, slots: int = 10, **config: Any) -> KVCacheManager:
    settings = {"lookahead": 0, "layers_per_range": 4, **config}
    return KVCacheManager(replace(SLOTS, num_slots=slots), driver, pages * PAGE, config=CacheConfig(**settings))


@pytest.fixture
def cache(host_driver: HostDriver) -> Iterator[KVCacheManager]:
    with manager(host_driver) as made:
        yield made


A = list(range(1000, 1040))


@pytest.mark.parametrize("way", [Way.ADOPT, Way.ALIAS, Way.COPY, Way.TABLE])
def test_each_way_gives_the_bytes_that_were_computed(cache: KVCacheManager, way: Way) -> None:
    made = Computing(cache, ways=[way], max_segments=2)
    made.admit(0, A)
    made.decode(0, 7)
    made.finish(0)
    found = made.admit(1, [*A, 7, 8, 9])
    assert (found.cached_tokens, found.way) == (41, way)
    for token in range(5):
        made.decode(1, token)
    made.expect(1)
    made.finish(1)
    cache.check_integrity()


@pytest.mark.parametrize("way", [Way.ALIAS, Way.COPY, Way.TABLE])
def test_two_go_different_ways_from_one_prompt(cache: KVCacheManager, way: Way) -> None:
    made = Computing(cache, ways=[way], max_segments=2)
    made.admit(0, A)
    made.finish(0)
    for sequence in (1, 2, 3):
        found = made.admit(sequence, [*A[:30], sequence])
        assert (found.cached_tokens, found.way) == (30, way)
    for token in range(8):
        for sequence in (1, 2, 3):
            made.decode(sequence, token)
    for sequence in (1, 2, 3):
        made.expect(sequence)
        made.finish(sequence)
    assert made.admit(4, [*A, 1]).cached_tokens == 40
    cache.check_integrity()


def test_adopting_makes_no_driver_call(host_driver: HostDriver) -> None:
    driver = CountingDriver(host_driver)
    with manager(driver) as cache:
        made = Computing(cache)
        made.admit(0, A)
        made.finish(0)
        before = driver.calls.copy()
        found = made.admit(1, [*A[:39], 5])
        assert (found.way, found.cached_tokens) == (Way.ADOPT, 39)
        made.finish(1)
        calls = {
            name: driver.calls[name] - before[name] for name in ("map", "set_access", "unmap", "create", "release")
        }
        assert not any(calls.values()), calls


def test_a_table_takes_memory_for_what_is_new_alone(cache: KVCacheManager) -> None:
    made = Computing(cache, ways=[Way.TABLE], max_segments=2)
    made.admit(0, A)
    made.finish(0)
    held = cache.stats().retained_bytes
    made.admit(1, [*A, 1])
    stats = cache.stats()
    assert stats.retained_bytes == held
    assert stats.mapped_bytes <= 2 * PAGE
    assert stats.segment_tokens == 40


def test_memory_is_made_of_the_least_recently_used_tails(host_driver: HostDriver) -> None:
    with manager(host_driver, pages=50, extent_classes=1) as cache:
        made = Computing(cache, ways=[Way.ADOPT])
        for sequence, first in enumerate((0, 100, 200)):
            made.admit(sequence, list(range(first, first + 36)))
            made.finish(sequence)
        # 14 pages each; the fourth needs some of the first one's.
        made.admit(3, list(range(300, 336)))
        held = [made.prefix.match([*range(first, first + 36), 1]) for first in (0, 100, 200)]
        assert 0 < held[0] < 36
        assert held[1:] == [36, 36]
        assert cache.take_evicted() == []
        cache.check_integrity()


def test_what_a_step_took_is_not_given_away(host_driver: HostDriver) -> None:
    with manager(host_driver, pages=31, extent_classes=1) as cache:
        made = Computing(cache, ways=[Way.TABLE, Way.ADOPT], max_segments=2)
        made.admit(0, A)
        made.finish(0)
        made.admit(1, list(range(36)))
        before = made.prefix.match([*A, 1])
        for token in range(9):
            made.decode(1, token)
        left = made.prefix.match([*A, 1])
        assert 8 < left < before
        assert made.prefix.stats.evicted_tokens == 40 - left
        made.finish(1)
        assert made.admit(2, [*A, 1]).cached_tokens == left


def test_slots_that_run_out_are_taken_from_what_is_kept(host_driver: HostDriver) -> None:
    with manager(host_driver, slots=3) as cache:
        made = Computing(cache, ways=[Way.COPY])
        for sequence in range(8):
            made.admit(sequence, list(range(100 * sequence, 100 * sequence + 9)))
            made.finish(sequence)
        assert made.prefix.as_dict()["retained_slots"] == 3
        assert [made.prefix.match([*range(100 * n, 100 * n + 9), 1]) for n in (4, 5, 6, 7)] == [0, 9, 9, 9]


def test_a_layout_of_blocks_is_read_in_whole_blocks(host_driver: HostDriver) -> None:
    shape = replace(SLOTS, max_seq_len=128, num_slots=4)
    with BlockKVCache(shape, host_driver, "4MiB", lookahead=0) as cache:
        prefix = PrefixCache(ManagedReuse(cache), block_size=4, ways=[Way.TABLE], max_segments=2)
        tokens = list(range(100))
        prefix.lookup_and_admit(0, tokens)
        prefix.finish(0, tokens)
        size = cache.layout.tokens_per_block  # type: ignore[attr-defined]
        found = prefix.lookup_and_admit(1, [*tokens, 1])
        assert (found.way, found.cached_tokens) == (Way.TABLE, 100 // size * size)
        cache.check_integrity()


@pytest.mark.parametrize("way", [Way.ADOPT, Way.ALIAS, Way.COPY, Way.TABLE])
def test_a_driver_call_that_fails_changes_nothing_that_is_kept(host_driver: HostDriver, way: Way) -> None:
    failures = 0
    for index in range(30):
        driver = FaultyDriver(host_driver)
        with manager(driver, pages=45, extent_classes=2) as cache:
            made = Computing(cache, ways=[way], max_segments=2)
            for sequence, first in enumerate((1000, 2000)):
                made.admit(sequence, list(range(first, first + 40)))
                made.finish(sequence)
            driver.fail("*", skip=index)
            try:
                made.admit(9, [*A[:37], *range(20)])
            except (DriverError, KVCacheOutOfMemory):
                failures += 1
                assert made.prefix.stats.requests == 2
            driver.disarm()
            if 9 in made.tokens:
                made.expect(9)
                made.finish(9)
            found = made.admit(10, [*A[:37], 5])
            assert found.cached_tokens in (0, 37), "what making room evicted is gone, and nothing else"
            made.expect(10)
            made.finish(10)
            cache.check_integrity()
    assert failures > 2


@pytest.mark.parametrize("way", [Way.COPY, Way.NONE])
def test_an_admission_whose_undoing_fails_is_undone_before_the_next(
    host_driver: HostDriver, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    with manager(host_driver, pages=45) as cache:
        made = Computing(cache, ways=[way], max_segments=2)
        made.admit(0, A)
        made.finish(0)
        calls: list[str] = []

        def failing(*arguments: Any) -> None:
            calls.append("fails")
            raise DriverError("CUDA_ERROR_UNKNOWN", "record", ())

        with monkeypatch.context() as patched:
            patched.setattr(made.prefix.cache, "copy_prefix" if way is Way.COPY else "extend", failing)
            patched.setattr(made.prefix.cache, "release", failing)
            for _ in range(2):
                with pytest.raises(DriverError):
                    made.admit(9, [*A[:37], 5], share=way is Way.NONE)
        assert len(calls) == 3
        assert cache.stats().sequences == 1
        made.admit(9, [*A[:37], 5], share=way is Way.NONE)
        made.finish(9)
        assert cache.stats().sequences == 0
        cache.check_integrity()


class Life(RuleBasedStateMachine):
    """Prompts over two tokens, so that most begin alike; all ways, little memory, errors, pins, flushes."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = HostDriver(granularity=PAGE)
        self.numbers = 0
        self.pinned: list[list[int]] = []

    @initialize(pages=st.integers(30, 70), segments=st.integers(1, 3), classes=st.sampled_from([1, 3, 8]))
    def build(self, pages: int, segments: int, classes: int) -> None:
        self.cache = manager(self.driver, pages, extent_classes=classes)
        self.made = Computing(self.cache, max_segments=segments)

    @precondition(lambda self: len(self.made.tokens) < 5)
    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=40),
        ways=st.sets(st.sampled_from([Way.ADOPT, Way.ALIAS, Way.COPY, Way.TABLE]), min_size=1),
        key=st.sampled_from([PrefixKey(), PrefixKey("salt")]),
        offered=st.booleans(),
    )
    def admit(self, tokens: list[int], ways: set[Way], key: PrefixKey, offered: bool) -> None:
        self.numbers += 1
        self.made.prefix.ways = frozenset(ways)
        try:
            found = self.made.admit(self.numbers, tokens, key)
        except KVCacheOutOfMemory:
            assert self.numbers not in self.made.tokens
            return
        assert found.cached_tokens < len(tokens)
        assert found.way in {*ways, Way.NONE}
        if offered:
            self.made.prefix.computed(self.numbers, tokens)

    @precondition(lambda self: self.made.tokens)
    @rule(which=st.integers(0, 99), count=st.integers(1, 8))
    def decode(self, which: int, count: int) -> None:
        sequence = sorted(self.made.tokens)[which % len(self.made.tokens)]
        for token in range(min(count, SLOTS.max_seq_len - len(self.made.tokens[sequence]))):
            try:
                self.made.decode(sequence, token % 2)
            except KVCacheOutOfMemory:
                return

    @precondition(lambda self: self.made.tokens)
    @rule(which=st.integers(0, 99), ok=st.booleans())
    def finish(self, which: int, ok: bool) -> None:
        sequence = sorted(self.made.tokens)[which % len(self.made.tokens)]
        slot = self.cache.slot_of(sequence)
        if not ok and slot not in {each for each in self.made.prefix.tree.owners()}:
            # What it computed is wrong, and nobody was offered it.
            self.made.write(slot, self.made.first[sequence], torch.full((1,), 3.0))
        self.made.finish(sequence, ok)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=4, max_size=20))
    def pin(self, tokens: list[int]) -> None:
        if (held := self.made.prefix.pin(tokens)) and len(self.pinned) < 2:
            self.pinned.append(tokens[:held])
        elif held:
            self.made.prefix.unpin(tokens)

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self) -> None:
        tokens = self.pinned.pop()
        assert self.made.prefix.unpin(tokens) == len(tokens)

    @rule()
    def flush(self) -> None:
        self.made.prefix.flush()
        self.pinned.clear()
        assert self.made.prefix.match([0] * 60) == 0

    @invariant()
    def everything_is_right(self) -> None:
        self.cache.check_integrity()
        for sequence in self.made.tokens:
            self.made.expect(sequence)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for sequence in list(self.made.tokens):
                self.made.finish(sequence)
            self.made.prefix.flush()
            self.cache.check_integrity()
            assert self.cache.stats().retained_slots == 0
            self.cache.close()
        assert self.driver.mappings.alive == 0


Life.TestCase.settings = settings(
    max_examples=20, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLife = Life.TestCase


def test_chances_of_a_life_reach_every_way(host_driver: HostDriver) -> None:
    """A longer life from one seed, of which it is known that all ways are gone and that memory runs short."""
    draw = random.Random(5)
    with manager(host_driver, pages=60, extent_classes=2) as cache:
        made = Computing(cache, max_segments=3)
        for sequence in range(120):
            made.prefix.ways = frozenset(draw.sample([Way.ADOPT, Way.ALIAS, Way.COPY, Way.TABLE], 2))
            try:
                made.admit(sequence, [draw.randint(0, 1) for _ in range(draw.randint(8, 40))])
            except KVCacheOutOfMemory:
                assert made.tokens, "memory is short though nothing runs"
            for each in list(made.tokens):
                made.expect(each)
            while len(made.tokens) > 2:
                made.finish(next(iter(made.tokens)))
            cache.check_integrity()
        stats = made.prefix.stats
        assert all(stats.ways[way.value] for way in Way)
        assert stats.evicted_tokens > 100
        assert stats.covered_slots > 0
