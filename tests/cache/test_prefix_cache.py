"""`PrefixCache` over counted pages: its rules P1 to P6, without memory."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pytest

from trtllm_vattn.bench.harness.retained_pages import RetainedPages
from trtllm_vattn.cache.prefix import PrefixCache, PrefixKey, Retention, ReuseCosts, Way
from trtllm_vattn.errors import ConfigError, DuplicateSequence, KVCacheOutOfMemory, UnknownSequence

PAGE = 8
TOKEN = 1000


class Pages(RetainedPages):
    """Counted pages that can fail, and evict on their own."""

    def __init__(self, pages: int = 64, largest: int = 8) -> None:
        super().__init__(pages * PAGE * TOKEN, TOKEN, 2, PAGE, largest)
        self.failing: set[str] = set()
        self.evicted: list[tuple[Any, int]] = []
        self.calls: list[str] = []

    def _note(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing:
            raise KVCacheOutOfMemory(f"{name} fails in this test")

    def admit(self, sequence: Hashable, prompt_len: int, **options: Any) -> int:
        self._note("admit")
        return super().admit(sequence, prompt_len, **options)

    def adopt(self, retained: Any, sequence: Hashable, keep_tokens: int, prompt_len: int) -> int:
        self._note("adopt")
        return super().adopt(retained, sequence, keep_tokens, prompt_len)

    def copy_prefix(self, owner: Any, sequence: Hashable, tokens: int) -> None:
        self._note("copy_prefix")
        super().copy_prefix(owner, sequence, tokens)

    def take_evicted(self) -> list[tuple[Any, int]]:
        found, self.evicted = self.evicted, []
        return found


def prefix(cache: Pages, *ways: Way, **options: Any) -> PrefixCache:
    return PrefixCache(cache, block_size=4, ways=ways or tuple(Way), **options)


def leave(made: PrefixCache, sequence: Hashable, tokens: Sequence[int], **options: Any) -> int:
    """A sequence comes and ends; returns the tokens that it found."""
    found = made.lookup_and_admit(sequence, tokens, **options)
    made.finish(sequence, tokens)
    made.cache.check()  # type: ignore[attr-defined]
    return found.cached_tokens


A = list(range(1000, 1048))


def test_p1_one_token_at_least_is_computed_anew() -> None:
    made = prefix(Pages())
    assert leave(made, 0, A) == 0
    assert leave(made, 1, A) == 47
    assert leave(made, 2, [*A, 5]) == 48
    assert made.as_dict()["hit_rate"] == pytest.approx(95 / 145)


def test_a_slot_is_adopted_and_grows() -> None:
    cache = Pages()
    made = prefix(cache)
    leave(made, 0, A)
    found = made.lookup_and_admit(1, [*A, *range(100)])
    assert (found.cached_tokens, found.way) == (48, Way.ADOPT)
    assert cache.length_of(found.slot) == 148
    assert "0 tokens behind the prefix are lost" in found.reason
    assert made.stats.ways == {"none": 1, "adopt": 1}
    assert made.stats.last_reason["adopt"] == found.reason


@pytest.mark.parametrize("way", [Way.ALIAS, Way.COPY, Way.TABLE])
def test_each_way_gives_the_same_tokens(way: Way) -> None:
    cache = Pages()
    made = prefix(cache, way, max_segments=2)
    leave(made, 0, A)
    found = made.lookup_and_admit(1, [*A[:36], *range(10)])
    assert (found.cached_tokens, found.way) == (36, way)
    made.finish(1, [*A[:36], *range(10)])
    assert made.match([*A, 0]) == 48
    assert made.match([*A[:36], *range(10), 3]) == 46
    cache.check()


def test_what_is_shared_is_stored_once() -> None:
    def pages(way: Way) -> int:
        cache = Pages(largest=1)
        made = prefix(cache, way, max_segments=2)
        for number in range(4):
            leave(made, number, [*A[:40], *range(number * 10, number * 10 + 8)])
        return cache.used_pages

    assert pages(Way.TABLE) == pages(Way.ALIAS) == 5 + 4
    assert pages(Way.COPY) == 4 * 6


@pytest.mark.parametrize("key", [PrefixKey("salt"), PrefixKey("", 1), PrefixKey(adapter=2), PrefixKey(policy="sinks")])
def test_p2_keys_do_not_meet(key: PrefixKey) -> None:
    made = prefix(Pages())
    leave(made, 0, A)
    assert leave(made, 1, A, key=key) == 0
    assert leave(made, 2, A, key=key) == 47


def test_p2_nothing_of_an_error_is_kept() -> None:
    cache = Pages()
    made = prefix(cache)
    made.lookup_and_admit(0, A)
    made.finish(0, A, ok=False)
    assert made.match(A) == 0
    assert cache.used_pages == 0
    assert made.stats.dropped == 1


def test_p2_an_error_withdraws_what_a_running_sequence_offered() -> None:
    cache = Pages()
    made = prefix(cache, Way.TABLE, max_segments=2)
    made.lookup_and_admit(0, A)
    made.computed(0, A)
    assert made.lookup_and_admit(1, [*A, 1, 2, 3, 4]).cached_tokens == 48
    made.finish(0, A, ok=False)
    assert made.match([*A, 5]) == 48, "sequence 1 has them too"
    made.finish(1, [*A, 1, 2, 3, 4], ok=False)
    assert made.match([*A, 5]) == 0
    assert cache.used_pages == 0


def test_p3_a_slot_that_others_read_is_not_adopted_below_that() -> None:
    made = prefix(Pages(), Way.TABLE, Way.ADOPT, max_segments=2)
    leave(made, 0, A)
    reader = made.lookup_and_admit(1, [*A[:40], *range(20)])
    assert reader.way is Way.TABLE
    assert made.lookup_and_admit(2, [*A[:36], *range(30)]).way is Way.TABLE
    assert made.lookup_and_admit(3, [*A, 1]).way is Way.ADOPT


def test_a_table_reads_no_more_slots_than_attention_can() -> None:
    def ways(most: int) -> list[Way]:
        made = prefix(Pages(), Way.TABLE, Way.ALIAS, max_segments=most)
        found, tokens = [], A[:16]
        leave(made, 0, [*tokens, 1, 1, 1, 1])
        for number in range(2, 5):
            tokens = [*tokens, *range(number * 100, number * 100 + 16)]
            found.append(made.lookup_and_admit(number, [*tokens, number]).way)
            made.computed(number, [*tokens, number])
        return found

    assert ways(4) == [Way.TABLE] * 3
    # What an alias's source reads in other slots, it reads there too: no slot more.
    assert ways(2) == [Way.TABLE, Way.ALIAS, Way.ALIAS]
    assert ways(1) == [Way.ALIAS] * 3


def test_p4_the_least_recently_used_tail_goes_and_no_more_than_is_needed() -> None:
    cache = Pages(pages=20, largest=1)
    made = prefix(cache, Way.ADOPT)
    leave(made, 0, list(range(80)))
    leave(made, 1, list(range(200, 280)))
    assert cache.used_pages == 20
    leave(made, 2, list(range(400, 424)))
    assert made.match([*range(80), 1]) == 56
    assert made.match([*range(200, 280), 1]) == 80
    assert made.stats.evicted_tokens == 24


def test_p4_whole_extents_are_what_is_evicted() -> None:
    cache = Pages(pages=16, largest=8)
    made = prefix(cache, Way.ADOPT)
    leave(made, 0, list(range(64)))
    leave(made, 1, list(range(200, 264)))
    assert cache.used_pages == 16
    leave(made, 2, list(range(400, 408)))
    assert made.match([*range(64), 1]) == 0, "its one extent went, and all its tokens with it"
    assert made.match([*range(200, 264), 1]) == 64


def test_p4_a_tail_that_gives_nothing_back_stays_until_its_page_goes() -> None:
    cache = Pages(pages=4, largest=1)
    made = prefix(cache, Way.ADOPT)
    leave(made, 0, A[:12])
    leave(made, 1, list(range(16)))
    found = made.tree.match([*A[:8], 0])
    assert found is not None
    made.tree.touch(found)
    # The 4 oldest tokens begin a page; the page before them is newer than sequence 1.
    leave(made, 2, list(range(50, 66)))
    assert made.match([*A[:8], 0]) == 8
    assert made.match([*A[:12], 0]) == 8
    assert made.match([*range(16), 0]) == 8


def test_p4_an_extent_that_begins_in_what_others_hold_goes_with_its_slot() -> None:
    cache = Pages(pages=18, largest=8)
    made = prefix(cache, Way.COPY)
    leave(made, 0, A[:48])
    leave(made, 1, [*A[:20], *range(44)])
    # Both have extents that begin before token 20 and end behind it: of neither is one wholly its own tokens'.
    leave(made, 2, list(range(500, 560)))
    assert made.match([*A[:48], 1]) == 20
    assert made.match([*A[:20], *range(44), 1]) == 64


def test_p4_pinned_tokens_and_what_runs_stay() -> None:
    cache = Pages(pages=10, largest=1)
    made = prefix(cache, Way.ADOPT)
    leave(made, 0, A[:40])
    assert made.pin(A[:18]) == 16
    made.lookup_and_admit(1, list(range(40)))
    with pytest.raises(KVCacheOutOfMemory):
        made.lookup_and_admit(2, list(range(200, 240)))
    assert made.match([*A, 0]) == 16
    assert made.unpin(A[:18]) == 16
    made.finish(1, list(range(40)))
    leave(made, 3, list(range(300, 380)))
    assert made.match([*A, 0]) == 0
    assert cache.used_pages == 10


def test_p4_a_request_of_low_priority_goes_first() -> None:
    cache = Pages(pages=12, largest=1)
    made = prefix(cache, Way.ADOPT)
    leave(made, 0, A[:24], priority=90)
    leave(made, 1, list(range(24)), priority=10)
    leave(made, 2, list(range(100, 124)))
    leave(made, 3, list(range(200, 248)))
    assert [made.match([*tokens, 0]) for tokens in (A[:24], range(24), range(100, 124))] == [24, 0, 24]


def test_p4_what_was_worth_more_for_a_time_goes_when_that_is_over() -> None:
    cache, now = Pages(pages=12, largest=1), [0.0]
    made = prefix(cache, Way.ADOPT)
    made.tree._clock = lambda: now[0]
    leave(made, 0, A[:24], priority=[Retention(0, 90, 5.0)])
    leave(made, 1, list(range(24)), priority=50)
    now[0] = 6.0
    leave(made, 2, list(range(100, 148)))
    leave(made, 3, list(range(200, 224)))
    assert [made.match([*tokens, 0]) for tokens in (A[:24], range(24))] == [0, 24]


def test_no_more_than_a_multiple_is_used() -> None:
    made = prefix(Pages(), Way.COPY)
    leave(made, 0, A[:22])
    found = made.lookup_and_admit(1, [*A[:22], 0], multiple=8)
    assert found.cached_tokens == 16
    assert made.lookup_and_admit(2, [*A[:7], 0], multiple=8).way is Way.NONE


def test_p5_a_slot_whose_tokens_others_hold_goes_at_once() -> None:
    cache = Pages()
    made = prefix(cache, Way.COPY)
    leave(made, 0, A[:40])
    leave(made, 1, [*A, 1])
    assert made.as_dict()["retained_slots"] == 1
    assert cache.used_pages == 7
    leave(made, 2, A[:24])
    assert made.as_dict()["retained_slots"] == 1
    assert made.stats.covered_slots == 2
    assert made.match([*A, 1, 2]) == 49


@pytest.mark.parametrize("way", [Way.ADOPT, Way.ALIAS, Way.TABLE])
def test_p6_a_refused_admission_changes_nothing(way: Way) -> None:
    cache = Pages()
    made = prefix(cache, way, max_segments=2)
    leave(made, 0, A)
    cache.failing = {"admit", "adopt"}
    with pytest.raises(KVCacheOutOfMemory):
        made.lookup_and_admit(1, [*A, 1])
    cache.failing = set()
    assert made.match([*A, 1]) == 48
    assert made.stats.requests == 1
    assert made.lookup_and_admit(1, [*A, 1]).cached_tokens == 48
    made.finish(1, [*A, 1])
    cache.check()


def test_p6_a_failed_copy_leaves_no_sequence_behind() -> None:
    cache = Pages()
    made = prefix(cache, Way.COPY)
    leave(made, 0, A)
    used = cache.used_pages
    cache.failing = {"copy_prefix"}
    # It is computed anew then, which needs no more room.
    assert made.lookup_and_admit(1, [*A, 1]).way is Way.NONE
    made.finish(1, (), ok=False)
    assert cache.used_pages == used
    cache.failing = set()
    assert leave(made, 1, [*A, 1]) == 48


def test_what_the_cache_itself_evicted_is_not_given_away() -> None:
    cache = Pages()
    made = prefix(cache, Way.ADOPT)
    made.lookup_and_admit(0, A)
    slot = cache.slot_of(0)
    made.finish(0, A)
    retained = made.retained_in(slot)
    cache.release_retained(retained, 16)
    cache.evicted.append((retained, 16))
    assert made.match([*A, 1]) == 16
    cache.release_retained(retained)
    cache.evicted.append((retained, 0))
    assert leave(made, 1, A) == 0


def test_flush_forgets_all_and_what_runs_is_not_kept() -> None:
    cache = Pages()
    made = prefix(cache, Way.TABLE, max_segments=2, events=True)
    leave(made, 0, A)
    made.pin(A)
    made.lookup_and_admit(1, [*A, 1])
    made.take_events()
    assert made.flush() == 48
    assert made.match([*A, 1]) == 0
    assert [event.as_dict()["type"] for event in made.take_events()] == ["AllBlocksCleared"]
    made.computed(1, [*A, 1])
    made.finish(1, [*A, 1])
    assert made.match([*A, 1]) == 0
    assert cache.used_pages == 0


def test_others_may_begin_with_a_running_prompt() -> None:
    cache = Pages()
    made = prefix(cache, Way.TABLE, Way.ADOPT, max_segments=2)
    made.lookup_and_admit(0, A)
    assert made.match([*A, 1]) == 0
    made.computed(0, A)
    found = made.lookup_and_admit(1, [*A, 1])
    assert (found.cached_tokens, found.way) == (48, Way.TABLE)
    cache.extend(1, 4)
    made.finish(0, A)
    made.finish(1, [*A, 1, 2, 3, 4, 5])
    assert made.match([*A, 1, 2, 3, 4, 5, 6]) == 53


def test_the_last_token_has_no_kv() -> None:
    cache = Pages()
    made = prefix(cache)
    made.lookup_and_admit(0, A)
    cache.extend(0, 3)
    made.finish(0, [*A, 1, 2, 3, 4])
    assert made.match([*A, 1, 2, 3, 4, 5]) == 51


def test_a_chance_of_reuse_is_counted() -> None:
    made = prefix(Pages(pages=400), costs=ReuseCosts(reuse_chance=1.0))
    for number in range(64):
        leave(made, number, [number] * 8)
    found = made.lookup_and_admit(100, [*([3] * 7), *range(10)])
    assert found.way is Way.ADOPT, "nothing was ever asked for again, so what adopting loses is worth nothing"


def test_bad_arguments_are_refused() -> None:
    made = prefix(Pages())
    with pytest.raises(ConfigError, match="no tokens"):
        made.lookup_and_admit(0, [])
    steps = [], [Retention(1, 5)], [Retention(0, 5), Retention(9, 101)], [Retention(0, 1), Retention(9, 1), (4, 5)]
    for priority in (-1, 101, 1.5, True, "high", *steps):
        with pytest.raises(ConfigError, match="priority"):
            made.lookup_and_admit(0, A, priority=priority)  # type: ignore[arg-type]
    with pytest.raises(UnknownSequence):
        made.finish(0, A)
    with pytest.raises(UnknownSequence):
        made.computed(0, A)
    made.lookup_and_admit(0, A)
    with pytest.raises(DuplicateSequence):
        made.lookup_and_admit(0, A)


@pytest.mark.parametrize("seed", range(6))
def test_a_random_life_keeps_its_promises(seed: int) -> None:
    """Tokens that a sequence is said to find were computed before, by somebody who did not end in an error."""
    random = np.random.default_rng(seed)
    cache = Pages(pages=24, largest=4)
    made = prefix(cache, max_segments=int(random.integers(1, 4)))
    known: set[tuple[int, ...]] = set()
    running: dict[int, list[int]] = {}
    for sequence in range(300):
        prompt = random.integers(0, 2, int(random.integers(1, 40))).tolist()
        try:
            found = made.lookup_and_admit(sequence, prompt)
        except KVCacheOutOfMemory:
            cache.check()
        else:
            assert found.cached_tokens < len(prompt)
            assert not found.cached_tokens or tuple(prompt[: found.cached_tokens]) in known
            running[sequence] = prompt
            if random.random() < 0.5:
                made.computed(sequence, prompt)
                known |= {tuple(prompt[:n]) for n in range(len(prompt) + 1)}
        while running and (len(running) > 3 or random.random() < 0.4):
            ended = int(random.choice(list(running)))
            tokens, ok = running.pop(ended), bool(random.random() < 0.8)
            made.finish(ended, tokens, ok)
            if ok:
                known |= {tuple(tokens[:n]) for n in range(len(tokens) + 1)}
        if sequence == 150:
            made.flush()
            known = set()
        cache.check()
    assert made.stats.cached_tokens > 150
    for ended, tokens in running.items():
        made.finish(ended, tokens)
    made.flush()
    assert cache.used_pages == 0
