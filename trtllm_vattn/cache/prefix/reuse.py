"""`PrefixCache`: what ended sequences left in their slots, given to sequences that begin with the same tokens.

Rules (tests/cache/test_prefix_cache.py names them):

P1. A sequence is given no more than all but one of its tokens: one is computed anew, so that there are logits.
P2. KV of one `PrefixKey` never serves another; nothing of a request that ended in an error is given to anybody after
    that.
P3. Whoever reads a slot, by a table or by aliased extents, keeps what it reads; nobody writes what others read.
P4. Eviction takes tokens from the ends of branches, of the lowest priority the least recently used first, and of those
    only as many as give whole extents back; what is pinned, or what a running sequence began with, stays.
P5. A slot whose tokens others hold too is released at once, where nobody reads it: it costs memory and serves nobody.
P6. A call succeeds whole or raises and changes nothing but what was evicted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from trtllm_vattn.cache.prefix.events import KVCacheEvent
from trtllm_vattn.cache.prefix.hybrid import Decision, Hit, ReuseCosts, Way, choose
from trtllm_vattn.cache.prefix.tree import DEFAULT_PRIORITY, Match, PrefixKey, PrefixTree, Priorities, Retention, Run
from trtllm_vattn.errors import (
    CacheAsleep,
    ConfigError,
    DriverError,
    DuplicateSequence,
    KVCacheOutOfMemory,
    NoFreeSlot,
    PrefixEvicted,
    UnknownSequence,
)

logger = logging.getLogger(__name__)

Tokens = Sequence[int] | np.ndarray
PINNED_PRIORITY = 101.0
"""Of slots that hold pinned tokens: where a step needs memory, the cache takes theirs after all others'."""


class ReusableCache(Protocol):
    """What a `PrefixCache` asks of a cache. A *source* is the number of a running sequence's slot, or what `retain`
    returned."""

    token_bytes: int
    """Of one token in all layers."""
    table_multiple: int
    """What is read in another slot is a multiple of so many tokens: those of a block, where memory is in blocks."""

    def admit(self, sequence: Hashable, prompt_len: int, *, prefix: Any = None, alias: Any = None) -> int:
        """A new sequence's slot; `prefix` and `alias` are (source, tokens): read there, or mapped and copied from."""

    def adopt(self, retained: Any, sequence: Hashable, keep_tokens: int, prompt_len: int) -> int:
        """A new sequence in a retained slot, which keeps so many tokens."""

    def copy_prefix(self, owner: Any, sequence: Hashable, tokens: int) -> None:
        """The first tokens of a source, over those of a running sequence."""

    def retain(self, sequence: Hashable) -> Any:
        """End a sequence, keep its tokens."""

    def extend(self, sequence: Hashable, tokens: int) -> None:
        """Lengthen a running sequence, backed."""

    def release(self, sequence: Hashable) -> None:
        """End a sequence."""

    def release_retained(self, retained: Any, keep_tokens: int = 0) -> None:
        """Keep no more than so many tokens."""

    def retained_tokens(self, retained: Any) -> int:
        """Tokens that are still kept."""

    def touch(self, retained: Any, priority: float = 0.0) -> None:
        """It was used now; those of lower priority go first where the cache itself has to choose."""

    def take_evicted(self) -> Sequence[tuple[Any, int]]:
        """What the cache itself had to evict since the last call: (retained, tokens left)."""

    def slot_of(self, sequence: Hashable) -> int:
        """The slot of a running sequence."""

    def length_of(self, slot: int) -> int:
        """Tokens of the sequence in a slot."""

    def has_first(self, source: Any, tokens: int) -> bool:
        """Whether a source has all that layers keep of its first `tokens` tokens: where layers have windows, later
        tokens take the places of those before."""

    def available_bytes(self) -> int:
        """Bytes that can be mapped while every retained token stays."""

    def evictable_bytes(self, but: int | None) -> int:
        """Bytes that evicting all retained tokens that nobody reads would give, but for those of one slot; what
        `available_bytes` counts is among it."""

    def needed_bytes(self, prompt_len: int, present: int) -> int:
        """Bytes to map for a prompt whose first `present` tokens need none of their own."""

    def bytes_behind(self, retained: Any, tokens: int) -> int:
        """Bytes that keeping no more than so many tokens would make available: whole extents that nobody shares."""

    def held_tokens(self, slot: int) -> int:
        """How many of a slot's first tokens other slots read in it."""

    def own_start(self, slot: int) -> int:
        """The first token of a slot that lies in its own memory; those before it are read in other slots."""

    def adoption_bytes(self, slot: int, keep_tokens: int, prompt_len: int) -> int | None:
        """Bytes to map for a prompt in a retained slot that keeps so many tokens; None where it cannot be adopted
        without copying: others read or share what would be written, or it lies in other slots; or where it would hold
        more than the prompt needs, in a cache that promises its memory to the byte."""

    def segments_of(self, slot: int, tokens: int) -> int:
        """Slots that the first `tokens` tokens of a slot lie in."""

    def whole_extents(self, slot: int, tokens: int) -> tuple[int, int]:
        """How many of a slot's first tokens need no copy where its whole extents are mapped once more, and their
        handles; 0 tokens where no extent is whole. What lies in other slots before `own_start` is read there."""

    def whole_pages(self, tokens: int) -> int:
        """Of so many tokens, as many as fill whole pages."""

    def handles_for(self, tokens: int) -> int:
        """Handles that a prompt of so many tokens takes."""

    def mappings_left(self) -> int | None:
        """Mappings that the driver still bears; None where there is no limit."""


@dataclass(frozen=True)
class Admission:
    """Where a sequence lies, and how many of its first tokens need not be computed: they are those of the sequence that
    the slot `owner` holds, or held; None without any."""

    slot: int
    cached_tokens: int
    way: Way
    reason: str
    owner: int | None = None


@dataclass
class PrefixStats:
    """Counts since the start.

    Attributes
    ----------
    requests, prompt_tokens, cached_tokens : int
        Sequences admitted, their tokens, and those of them that were not computed anew.
    ways : Counter
        Admissions by `Way.value`.
    last_reason : dict
        Of each way, the reason of its last choice, with the costs of all.
    evicted_tokens, covered_slots, dropped : int
        Tokens evicted for room; slots released because others hold their tokens; sequences that were not kept, since
        they ended in an error, are shorter than a block, are of before a flush, or have gone beyond a layer's window.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    ways: Counter[str] = field(default_factory=Counter)
    last_reason: dict[str, str] = field(default_factory=dict)
    evicted_tokens: int = 0
    covered_slots: int = 0
    dropped: int = 0


def _check_priority(priority: Priorities) -> None:
    """Raise ConfigError for what is no priority."""
    given: Any = priority
    steps = given if isinstance(given, list | tuple) and given else [Retention(0, given)]
    are_steps = all(isinstance(step, Retention) for step in steps)
    starts = [step.start for step in steps] if are_steps else []
    if starts[:1] != [0] or starts != sorted(starts) or not all(map(_is_priority, (step.priority for step in steps))):
        raise ConfigError(
            f"priority is {priority!r}; give a whole number from 0 to 100, or `Retention`s in order, the first from "
            "token 0 on"
        )


def _is_priority(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 100


@dataclass
class _Running:
    slot: int
    key: PrefixKey
    priority: Priorities
    generation: int


class PrefixCache:
    """Admits sequences into a cache with as much of their prompt as is held there, and keeps what they leave.

    Parameters
    ----------
    cache : ReusableCache
        Whose slots; everything else may use it too, but only this object calls `retain` and `release_retained`.
    block_size : int
        Tokens a block of the tree and of its events.
    costs : ReuseCosts
        What the ways to a hit cost on this machine.
    ways : collection of Way
        Those that may be chosen.
    max_segments : int
        Slots that attention can read one sequence's tokens in; 1 is no table.
    events : bool
        Keep events of stored and removed blocks for `take_events`.
    """

    def __init__(
        self,
        cache: ReusableCache,
        block_size: int = 16,
        costs: ReuseCosts | None = None,
        ways: Collection[Way] = tuple(Way),
        max_segments: int = 1,
        events: bool = False,
    ) -> None:
        self.cache, self.ways, self.max_segments = cache, frozenset(ways), max_segments
        self.costs = costs or ReuseCosts()
        self.tree = PrefixTree(block_size, events)
        self.stats = PrefixStats()
        self._retained: dict[int, Any] = {}
        self._running: dict[Hashable, _Running] = {}
        self._unwanted: dict[int, Any] = {}
        """Retained slots of which nothing may be given away, but which others still read."""
        self._generation = 0
        self._left: list[Hashable] = []
        """Sequences whose admission failed, and then their release."""
        self._wanted: int | None = None
        """A slot that a sequence is about to begin with."""

    # -- sequences ----------------------------------------------------------------------------------------------------

    def match(self, tokens: Tokens, key: PrefixKey = PrefixKey()) -> int:  # noqa: B008
        """How many of a prompt's tokens are held now; a router or a scheduler may ask. Changes nothing."""
        self._note_evicted()
        found = self._find(tokens, key)
        return 0 if found is None else found.tokens

    def _find(self, tokens: Tokens, key: PrefixKey, multiple: int = 1) -> Match | None:
        """What is held of a prompt, of whole multiples of so many tokens, and can be begun with."""
        found = self.tree.match(tokens, key)
        if found is not None and multiple > 1:
            found = found._replace(tokens=found.tokens // multiple * multiple)
        if found is None or self.cache.has_first(self._retained.get(found.owner, found.owner), found.tokens):
            return found
        return None

    def lookup_and_admit(
        self,
        sequence: Hashable,
        tokens: Tokens,
        key: PrefixKey = PrefixKey(),  # noqa: B008
        priority: Priorities = DEFAULT_PRIORITY,
        expected_tokens: int = 256,
        reserve_tokens: int = 0,
        share: bool = False,
        multiple: int = 1,
    ) -> Admission:
        """Give a sequence a slot backed for its prompt, with as many of its first tokens in it as are held.

        Parameters
        ----------
        tokens : sequence of int, or int64 array
            The prompt.
        priority : int or sequence of Retention
            0 to 100: with what priority its tokens are kept once it has ended.
        expected_tokens : int
            That it will generate, as far as is known.
        reserve_tokens : int
            Tokens behind the prompt that room is made for too, by evicting; they are not mapped.
        share : bool
            Whether others will begin with all of it, and memory counts more than time: nothing is copied that whole
            extents hold, which are aliased; and of a prompt that is computed anew, an extent ends at the page of its
            last token. Memory that was parked keeps its extents.
        multiple : int
            No more of what is held is used than a multiple of so many tokens.

        Returns
        -------
        Admission
            Computing goes on at token `cached_tokens`. Where the way is `COPY` or `ALIAS`, the copy is on the current
            stream.

        Raises
        ------
        ConfigError
            No tokens, or a priority that is not 0 to 100.
        DuplicateSequence, SequenceTooLong, NoFreeSlot, KVCacheOutOfMemory, DriverError
            As the cache raises them.
        """
        if len(tokens) < 1:
            raise ConfigError(f"the prompt of sequence {sequence!r} has no tokens; at least 1 is needed")
        _check_priority(priority)
        if sequence in self._running:
            raise DuplicateSequence(f"sequence {sequence!r} runs in slot {self._running[sequence].slot}; finish it")
        self._release_left()
        ways = self.ways
        while True:
            self._note_evicted()
            found = self._find(tokens, key, multiple)
            decision = Decision(Way.NONE, "nobody holds as much as a block of it", {})
            if found is not None and found.tokens >= self.tree.block_size:
                decision = self._decide(found, len(tokens), expected_tokens, ways, share)
            if decision.way is Way.TABLE and found is not None:
                found = Match(found.owner, self._for_table(found.tokens), found.owner_tokens)
            try:
                slot = self._admit(sequence, len(tokens), found, decision.way, reserve_tokens, share)
                break
            except (NoFreeSlot, KVCacheOutOfMemory):
                # What it would begin with may be what takes its place: another way needs less beside it.
                if decision.way is Way.NONE:
                    raise
                ways = ways - {decision.way}
            except PrefixEvicted:
                # The cache's own thread took it meanwhile.
                if found is None or not self._forget_evicted(found.owner):
                    raise
        self._note_evicted()
        cached = found.tokens if found is not None and decision.way is not Way.NONE else 0
        self._running[sequence] = _Running(slot, key, priority, self._generation)
        if found is not None and cached:
            self.tree.insert(slot, tokens[:cached], key, priority, evictable=False, like=found.owner)
        self._count(len(tokens), cached, decision)
        owner = found.owner if found is not None and cached else None
        return Admission(slot, cached, decision.way, decision.reason, owner)

    def computed(self, sequence: Hashable, tokens: Tokens) -> None:
        """The KV of these first tokens of a running sequence is right: others may begin with them from now on, while it
        runs. Call it when the prompt's logits were found finite. Raises UnknownSequence."""
        running = self._of(sequence)
        self._note_evicted()
        tokens = tokens[: self.cache.length_of(running.slot)]
        if running.generation == self._generation and len(tokens) >= self.tree.block_size:
            self.tree.insert(running.slot, tokens, running.key, running.priority, evictable=False)

    def finish(self, sequence: Hashable, tokens: Tokens, ok: bool = True) -> None:
        """End a sequence. Its tokens are kept for others, as many as its slot holds KV of; not where it ended in an
        error (`ok` is False).

        Parameters
        ----------
        tokens : sequence of int
            Prompt and output; the last one generated may be among them, although its KV was never written.

        Raises
        ------
        UnknownSequence
            It was not admitted here.
        """
        running = self._of(sequence)
        self._note_evicted()
        slot = running.slot
        tokens = tokens[: self.cache.length_of(slot)]
        wanted = ok and running.generation == self._generation and len(tokens) >= self.tree.block_size
        wanted = wanted and self.cache.has_first(slot, len(tokens))
        held = self.cache.held_tokens(slot) > 0
        if not wanted and not held:
            self.cache.release(sequence)
        else:
            self._retained[slot] = self.cache.retain(sequence)
        del self._running[sequence]
        if not wanted:
            self.stats.dropped += 1
            if slot in self.tree:
                self.tree.remove(slot)
            if held:
                self._unwanted[slot] = self._retained.pop(slot)
        else:
            self.cache.release_retained(self._retained[slot], len(tokens))
            self.tree.insert(slot, tokens, running.key, running.priority)
            self._touch(slot)
            if not self._release_if_covered(slot):
                self._release_covered_by(slot)
        self._release_unwanted()

    def moved(self, sequence: Hashable) -> None:
        """The cache has given a running sequence another slot. Raises UnknownSequence."""
        running = self._of(sequence)
        old, running.slot = running.slot, self.cache.slot_of(sequence)
        if old in self.tree:
            self.tree.rename(old, running.slot)

    def suspended(self, sequence: Hashable) -> None:
        """The cache has put a running sequence's tokens to host memory: nobody begins with them. Raises
        UnknownSequence."""
        running = self._of(sequence)
        if running.slot in self.tree:
            self.tree.remove(running.slot)

    def resumed(self, sequence: Hashable) -> None:
        """A suspended sequence runs again. Raises UnknownSequence."""
        self._of(sequence).slot = self.cache.slot_of(sequence)

    def _of(self, sequence: Hashable) -> _Running:
        try:
            return self._running[sequence]
        except KeyError:
            raise UnknownSequence(f"sequence {sequence!r} was not admitted here; call lookup_and_admit first") from None

    def retained_in(self, slot: int) -> Any:
        """What `retain` returned for the tokens that are kept in a slot; None where none are."""
        return self._retained.get(slot)

    def _admit(
        self, sequence: Hashable, prompt_len: int, found: Match | None, way: Way, reserve_tokens: int, share: bool
    ) -> int:
        cache, total = self.cache, prompt_len + reserve_tokens
        if found is None or way is Way.NONE:
            self.make_room(cache.needed_bytes(total, 0))
            whole = cache.whole_pages(prompt_len - 1) if share else 0
            if not whole:
                return cache.admit(sequence, prompt_len)
            slot = cache.admit(sequence, whole)
            try:
                cache.extend(sequence, prompt_len - whole)
            except BaseException:
                self._undo(sequence)
                raise
            return slot
        self.tree.touch(found)
        self._wanted = found.owner
        try:
            with self.tree.keeping(found):
                slot = self._admit_with(sequence, prompt_len, found, way, total)
        finally:
            self._wanted = None
        if found.owner in self._retained:
            self._touch(found.owner)
        return slot

    def _touch(self, owner: int) -> None:
        """Tell the cache that a retained slot was used now, and what it is worth."""
        priority = PINNED_PRIORITY if self.tree.is_pinned(owner) else float(self.tree.priority_of(owner))
        self.cache.touch(self._retained[owner], priority)

    def _admit_with(self, sequence: Hashable, prompt_len: int, found: Match, way: Way, total: int) -> int:
        """Admit by a way that uses what was found, with room for `total` tokens."""
        cache, owner, tokens = self.cache, found.owner, found.tokens
        if way is Way.ADOPT:
            # Its memory is what the sequence goes on in.
            self.tree.set_evictable(owner, False)
            try:
                self.make_room(cache.adoption_bytes(owner, tokens, total) or 0)
                slot = cache.adopt(self._retained[owner], sequence, tokens, prompt_len)
            except BaseException:
                self.tree.set_evictable(owner, True)
                raise
            del self._retained[owner]
            self.tree.truncate(owner, tokens)
            return slot
        source = self._retained.get(owner, owner)
        if way is Way.TABLE:
            self.make_room(cache.needed_bytes(total, tokens))
            return cache.admit(sequence, prompt_len, prefix=(source, tokens))
        if way is Way.ALIAS:
            self.make_room(cache.needed_bytes(total, cache.whole_extents(owner, tokens)[0]))
            return cache.admit(sequence, prompt_len, alias=(source, tokens))
        self.make_room(cache.needed_bytes(total, 0))
        slot = cache.admit(sequence, prompt_len)
        try:
            cache.copy_prefix(source, sequence, tokens)
        except BaseException:
            self._undo(sequence)
            raise
        return slot

    def _undo(self, sequence: Hashable) -> None:
        """Release what a failed admission has in the cache; where that fails as well, before the next admission."""
        self._left.append(sequence)
        try:
            self._release_left()
        except DriverError as error:
            logger.warning("what a failed admission has is released before the next one: %s", error)

    def _release_left(self) -> None:
        while self._left:
            self.cache.release(self._left[-1])
            self._left.pop()

    def _decide(
        self, found: Match, prompt_len: int, expected_tokens: int, ways: frozenset[Way], share: bool
    ) -> Decision:
        cache, owner, tokens = self.cache, found.owner, found.tokens
        adoptable = (
            owner in self._retained
            and cache.adoption_bytes(owner, tokens, prompt_len) is not None
            and not self.tree.keeps_pinned(owner, tokens)
        )
        through = self._for_table(tokens)
        segments = cache.segments_of(owner, through) + 1
        alias_tokens, alias_handles = cache.whole_extents(owner, tokens)
        if cache.segments_of(owner, min(tokens, cache.own_start(owner))) + 1 > self.max_segments:
            # What lies in other slots lies there for an alias too.
            alias_tokens = alias_handles = 0
        hit = Hit(
            tokens,
            cache.token_bytes,
            # What others hold as well is not lost.
            lost_tokens=None if not adoptable else 0 if self.tree.is_covered(owner) else found.owner_tokens - tokens,
            alias_tokens=alias_tokens,
            alias_handles=alias_handles,
            own_handles=cache.handles_for(tokens),
            segments=segments if through >= self.tree.block_size and segments <= self.max_segments else None,
            expected_tokens=expected_tokens,
            displaces=cache.needed_bytes(prompt_len, 0) > cache.available_bytes(),
            mappings_left=cache.mappings_left(),
        )
        if share and alias_tokens:
            ways = ways - {Way.COPY}
        decision = choose(hit, self._costs_now(), ways)
        if share and decision.way is Way.NONE and Way.ALIAS in decision.costs:
            decision = replace(decision, way=Way.ALIAS, reason="memory counts more than time")
        return decision

    def _for_table(self, tokens: int) -> int:
        return tokens // self.cache.table_multiple * self.cache.table_multiple

    def _costs_now(self) -> ReuseCosts:
        stats = self.stats
        if stats.requests < 64:
            return self.costs
        return replace(self.costs, reuse_chance=stats.cached_tokens / stats.prompt_tokens)

    def _count(self, prompt_tokens: int, cached: int, decision: Decision) -> None:
        self.stats.requests += 1
        self.stats.prompt_tokens += prompt_tokens
        self.stats.cached_tokens += cached
        self.stats.ways[decision.way.value] += 1
        self.stats.last_reason[decision.way.value] = decision.reason

    # -- eviction -----------------------------------------------------------------------------------------------------

    def make_room(self, size: int) -> int:
        """Have `size` bytes available to be mapped, by keeping fewer tokens; returns how many were evicted. Nothing is
        where all of it would not be enough; less is available where what is left is pinned."""
        for owner in self.tree.expire():
            if owner in self._retained:
                self._touch(owner)
        evicted, went_on = 0, False
        aside: list[Run] = []
        short = size - self.cache.available_bytes()
        if short > 0 and size > self.cache.evictable_bytes(self._wanted):
            return 0
        while short > 0:
            run = self.tree.pop_oldest()
            if run is None:
                if not (aside and went_on):
                    break
                # What was cut meanwhile may have left whole extents to them.
                for each in aside:
                    self.tree.requeue(each)
                aside, went_on = [], False
                continue
            keep = self._choose_cut(run, short)
            if keep is None:
                aside.append(run)
                continue
            if keep < run.start:
                # Evicting down to there takes tokens that were used later: it has its turn then.
                at = next(bound for bound in run.bounds if bound[0] <= keep)
                self.tree.requeue(run, (keep, *at[1:]))
                continue
            covered, freed = self.stats.covered_slots, self._freed(run, keep)
            evicted += self._cut(run, keep)
            # Counting anew takes a look at every retained slot.
            short = short - freed if covered == self.stats.covered_slots else size - self.cache.available_bytes()
            went_on = True
        for each in aside:
            self.tree.requeue(each)
        self.stats.evicted_tokens += evicted
        return evicted

    def _choose_cut(self, run: Run, short: int) -> int | None:
        """How many tokens a run's owners keep: as many as leave `short` bytes, or what the run has; fewer than
        `run.start` where none of its extents is whole; None where nothing comes back down to where it branches off."""
        start = run.start
        if not (most := self._freed(run, start)):
            starts = [first for first, _, _ in run.bounds if first < start]
            found = next((first for first in starts if self._freed(run, first)), None)
            read = any(owner == self._wanted or self.cache.held_tokens(owner) for owner in run.owners)
            if found is None and run.branches_off and not read and self._freed(run, 0):
                # Cut down to there its owners are covered, and released with extents that begin before it.
                found = run.bounds[-1][0]
            return found
        wanted = min(short, most)
        low, high = start, run.stop
        while low < high:
            middle = (low + high + 1) // 2
            if self._freed(run, middle) >= wanted:
                low = middle
            else:
                high = middle - 1
        return low

    def _freed(self, run: Run, tokens: int) -> int:
        """Bytes that a run's owners give back where they keep so many tokens."""
        kept = {owner: self._at_least(owner, tokens) for owner in run.owners}
        return sum(self.cache.bytes_behind(self._retained[owner], least) for owner, least in kept.items())

    def _at_least(self, owner: int, tokens: int) -> int:
        """How many tokens a slot keeps where it is cut to so many: a match may end inside a block, and what others read
        there stays; and so does a slot that a sequence is about to begin with, whose own memory keeps its place."""
        least = max(tokens, self.cache.held_tokens(owner))
        return max(least, self.cache.own_start(owner) + 1) if owner == self._wanted else least

    def _cut(self, run: Run, keep: int) -> int:
        evicted = 0
        for owner in run.owners:
            retained, before = self._retained[owner], self.tree.tokens_of(owner)
            least = self._at_least(owner, keep)
            self.cache.release_retained(retained, least if least >= self.tree.block_size else 0)
            evicted += before - self._shorten(owner, self.cache.retained_tokens(retained))
        return evicted

    def _shorten(self, owner: int, tokens: int) -> int:
        """A retained slot keeps fewer tokens; returns how many the tree has of it then."""
        above = self.tree.ends_above(owner)
        if tokens < self.tree.block_size:
            self._forget(owner)
        else:
            self.tree.truncate(owner, tokens)
            if self._release_if_covered(owner):
                tokens = 0
        for each in above:
            if each in self._retained:
                self._release_if_covered(each)
        return tokens if tokens >= self.tree.block_size else 0

    def _forget(self, owner: int) -> None:
        """A retained slot serves nobody any more."""
        retained = self._retained.pop(owner)
        self.tree.remove(owner)
        if self.cache.held_tokens(owner):
            self._unwanted[owner] = retained
        else:
            self.cache.release_retained(retained)

    def _release_if_covered(self, owner: int) -> bool:
        """Release a retained slot whose blocks others hold too, unless somebody reads it; returns whether."""
        if not self.tree.is_covered(owner) or owner == self._wanted or self.cache.held_tokens(owner):
            return False
        self._forget(owner)
        self.stats.covered_slots += 1
        return True

    def _release_covered_by(self, owner: int) -> None:
        for each in self.tree.ends_above(owner):
            if each in self._retained:
                self._release_if_covered(each)

    def _release_unwanted(self) -> None:
        for slot, retained in list(self._unwanted.items()):
            if not self.cache.held_tokens(slot):
                try:
                    self.cache.release_retained(retained)
                except CacheAsleep:
                    return  # by the next call that finds it awake
                del self._unwanted[slot]

    def _note_evicted(self) -> None:
        """Forget what the cache itself had to evict, when a step found no memory."""
        for retained, left in self.cache.take_evicted():
            owner = next((slot for slot, each in self._retained.items() if each == retained), None)
            if owner is not None and left < (before := self.tree.tokens_of(owner)):
                self.stats.evicted_tokens += before - self._shorten(owner, left)

    def _forget_evicted(self, owner: int) -> bool:
        """The cache keeps fewer tokens of a slot than the tree says; returns whether."""
        self._note_evicted()
        if owner not in self._retained:
            return True
        left, before = self.cache.retained_tokens(self._retained[owner]), self.tree.tokens_of(owner)
        if left < before:
            self.stats.evicted_tokens += before - self._shorten(owner, left)
        return left < before

    # -- the whole ----------------------------------------------------------------------------------------------------

    def pin(self, tokens: Tokens, key: PrefixKey = PrefixKey()) -> int:  # noqa: B008
        """Keep the whole blocks of these tokens that are held now until `unpin`; returns how many tokens that is. Calls
        are counted."""
        self._note_evicted()
        before = self._pinned()
        pinned = self.tree.pin(tokens, key)
        for owner in self._pinned() - before:
            self._touch(owner)
        return pinned

    def unpin(self, tokens: Tokens, key: PrefixKey = PrefixKey()) -> int:  # noqa: B008
        """Undo one `pin` of the same tokens. Raises ConfigError where there is none."""
        self._note_evicted()
        before = self._pinned()
        unpinned = self.tree.unpin(tokens, key)
        for owner in before - self._pinned():
            self._touch(owner)
        return unpinned

    def _pinned(self) -> set[int]:
        """Retained slots that hold pinned tokens."""
        return {owner for owner in self._retained if self.tree.is_pinned(owner)}

    def flush(self) -> int:
        """Forget everything, pinned or not; returns the tokens forgotten. Running sequences go on, and are not kept
        when they end. For new weights, say, where no key tells old from new."""
        forgotten = sum(map(self.tree.tokens_of, self._retained))
        self.tree.clear()
        self._generation += 1
        self._unwanted |= self._retained
        self._retained.clear()
        before = -1
        # A slot that others read goes after them.
        while before != len(self._unwanted):
            before = len(self._unwanted)
            self._release_unwanted()
        return forgotten

    def begin_anew(self) -> None:
        """The cache was reset: nobody runs, nothing is kept. Begins from any state that an interrupted call left."""
        self._retained, self._running, self._unwanted, self._wanted = {}, {}, {}, None
        self._left.clear()
        self._generation += 1
        self.tree.clear()

    def take_events(self) -> list[KVCacheEvent]:
        """Events of stored and removed blocks since the last call, in order."""
        return self.tree.take_events()

    def as_dict(self) -> dict[str, Any]:
        """The counts, for stats and metrics; ``hit_rate`` is of prompt tokens."""
        stats = self.stats
        return {
            **{name: value for name, value in vars(stats).items() if not isinstance(value, dict)},
            "ways": dict(stats.ways),
            "reasons": dict(stats.last_reason),
            "hit_rate": stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0,
            "retained_slots": len(self._retained),
            "blocks": self.tree.num_blocks,
        }
