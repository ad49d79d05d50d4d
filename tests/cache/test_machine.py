"""A random life of the fixed-address cache against a model that knows what every (sequence, layer, token) holds.

The bytes of all live tokens and the integrity of the cache are checked after every step, over both drivers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from math import inf

import numpy as np
import pytest
import torch
from contents import admit, expect, expect_in, fill
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from interrupting import interrupt_at
from shapes import SHAPE

from trtllm_vattn.cache.base import RetainedSlot
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import (
    ConfigError,
    HostMemoryFull,
    KVCacheOutOfMemory,
    NoFreeSlot,
    PrefixEvicted,
    SequenceTooLong,
)
from trtllm_vattn.memory.slot import RETAINED, SUSPENDED
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.cuda import CudaDriver
from trtllm_vattn.vmm.host import HostDriver


class CacheMachine(RuleBasedStateMachine):
    """`model` maps each sequence to its length, `authors` to who wrote its tokens, and `kept` retained slots to the
    same; contents are a function of author, layer and token."""

    def open_driver(self) -> Driver:
        self.host = HostDriver()
        return self.host

    @initialize(
        layers_per_range=st.sampled_from([1, 2, 4]),
        lookahead=st.sampled_from([0, 1, 7, 16, None]),
        spare=st.integers(0, 40),
        threaded=st.booleans(),
        stocked=st.integers(0, 3),
    )
    def start(self, layers_per_range: int, lookahead: int | None, spare: int, threaded: bool, stocked: int) -> None:
        driver = self.open_driver()
        ranges = 4 // layers_per_range
        granularity = driver.granularity()
        # From a little more than the dummy slot needs to about half of what all slots could take.
        budget = granularity * (2 * ranges + spare)
        # Host memory for some sequences, and not for all.
        config = CacheConfig(host_memory=24 * granularity)
        self.cache = KVCacheManager(SHAPE, driver, budget, layers_per_range, lookahead, config=config)
        if threaded:
            self.cache.start_thread()
        self.cache.preallocate(stocked, 20)
        self.model: dict[int, int] = {}
        self.authors: dict[int, list[int]] = {}
        self.kept: dict[RetainedSlot, list[int]] = {}
        self.suspended: dict[int, list[int]] = {}
        self.count = 0

    def room(self) -> int:
        """Bytes that an operation may still take: free, pending unmap, parked, preallocated or retained for nobody; the
        thread is at rest then."""
        return self.room_besides_retained() + self.cache.arena.evictable_bytes

    def room_besides_retained(self) -> int:
        assert self.cache.wait_ahead()
        self.cache.arena.complete_pending_unmaps(wait=True)
        return self.cache.arena.pool.available_bytes + self.cache.arena.parked_bytes

    def held(self, sequence: int) -> int:
        """How many of a sequence's first tokens others read in its slot."""
        return self.held_in(self.cache.slot_of(sequence))

    def held_in(self, slot: int) -> int:
        """How many of a slot's first tokens others read there, suspended ones among them."""
        slots = self.cache.arena.slots
        rows = [segment for holder in slots[slot].holders for segment in slots[holder].segments]
        return max((segment.stop for segment in rows if segment.owner == slot), default=0)

    def prefix(self, slot: int) -> int:
        """How many of a slot's first tokens lie in other slots."""
        segments = self.cache.segments
        return 0 if segments is None else int(segments[segments[:, 0] == slot, 3].max(initial=0))

    def has_no_slot(self, source: int | None = None) -> bool:
        """Whether every slot has a sequence, or is `source`, or has tokens that another one reads, or that must not be
        evicted."""
        return all(
            self.cache.sequence_at(n) is not None
            or n == source
            or slot.holders
            or slot.state is SUSPENDED
            or (slot.state is RETAINED and slot.priority == inf)
            for n, slot in enumerate(self.cache.arena.slots[: SHAPE.num_slots])
        )

    def surplus(self, needed: dict[int, int]) -> int:
        """Bytes of whole mappings that running slots have to themselves beyond the tokens that their sequences need."""
        found = 0
        layout, slots = self.cache.layout, self.cache.arena.slots
        for sequence, tokens in needed.items():
            slot = slots[self.cache.slot_of(sequence)]
            left = slot.frontier
            for stripe in reversed(slot.stripes):
                left -= stripe[0].size
                if left < layout.bytes_for(tokens):
                    break
                found += sum(m.size for m in stripe if m.extent.mappings == 1)
        return found

    def write(self, sequence: int, tokens: range) -> None:
        fill(self.cache, sequence, tokens)
        self.authors[sequence][tokens.start :] = [sequence] * len(tokens)

    def missing(self, lengths: dict[int, int]) -> int:
        """Bytes that must be mapped for sequences to have these lengths."""
        layout, slots = self.cache.layout, self.cache.arena.slots
        each = (layout.bytes_for(n) - slots[self.cache.slot_of(s)].frontier for s, n in lengths.items())
        return sum(max(0, size) for size in each) * layout.num_ranges

    @rule(tokens=st.integers(1, SHAPE.max_seq_len + 2))
    def admit(self, tokens: int) -> None:
        room, sequence = self.room(), self.count
        ahead = self.cache.stats().lookahead
        room += self.surplus({s: min(n + ahead, SHAPE.max_seq_len) for s, n in self.model.items()})
        need = self.cache.layout.bytes_for(tokens) * self.cache.layout.num_ranges
        try:
            slot = self.cache.admit(sequence, tokens)
        except SequenceTooLong:
            assert tokens > SHAPE.max_seq_len
        except NoFreeSlot:
            assert self.has_no_slot()
        except KVCacheOutOfMemory:
            assert need > room
        else:
            assert self.cache.sequence_at(slot) == sequence
            self.count += 1
            self.authors[sequence] = []
            self.write(sequence, range(tokens))
            self.model[sequence] = tokens

    @precondition(lambda self: self.model)
    @rule(data=st.data(), more=st.integers(0, 20))
    def extend(self, data: st.DataObject, more: int) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.model)))
        length = self.model[sequence] + more
        try:
            self.cache.extend(sequence, more)
        except SequenceTooLong:
            assert length > SHAPE.max_seq_len
        except KVCacheOutOfMemory:
            assert self.missing({sequence: length}) > self.room() + self.surplus({**self.model, sequence: length})
        else:
            self.write(sequence, range(self.model[sequence], length))
            self.model[sequence] = length

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.model)))
        length = data.draw(st.integers(1, self.model[sequence]))
        room = self.room()
        try:
            self.cache.truncate(sequence, length)
        except KVCacheOutOfMemory:
            # What it shares and may write to again has to become its own.
            slot = self.cache.arena.slots[self.cache.slot_of(sequence)]
            shared = sum(m.size for stripe in slot.stripes for m in stripe if m.extent.mappings > 1)
            assert shared
            assert slot.mapped * self.cache.layout.num_ranges > room
        except ConfigError:
            assert length < max(self.held(sequence), self.prefix(self.cache.slot_of(sequence)))
        else:
            self.model[sequence] = length
            del self.authors[sequence][length:]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.model)))
        try:
            self.cache.release(sequence)
        except ConfigError:
            assert self.held(sequence)
        else:
            del self.model[sequence], self.authors[sequence]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def suspend(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.model)))
        slot = self.cache.slot_of(sequence)
        try:
            self.cache.suspend(sequence)
        except ConfigError:
            assert self.held(sequence)
        except HostMemoryFull:
            assert not self.fits_host(self.model[sequence])
        else:
            del self.model[sequence]
            self.suspended[sequence] = self.authors.pop(sequence)
            assert not self.cache.mappings_in(slot)

    def fits_host(self, tokens: int) -> bool:
        """Whether so many tokens find host memory, which is given out in blocks."""
        block = 4 * self.cache.layout.granularity
        return -(-tokens * SHAPE.token_bytes // block) * block + self.cache.stats().host_bytes <= 6 * block

    @precondition(lambda self: self.suspended)
    @rule(data=st.data(), more=st.integers(0, 20))
    def resume(self, data: st.DataObject, more: int) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.suspended)))
        tokens = len(self.suspended[sequence])
        room, layout = self.room(), self.cache.layout
        try:
            self.cache.resume(sequence, tokens + more)
        except SequenceTooLong:
            assert tokens + more > SHAPE.max_seq_len
        except KVCacheOutOfMemory:
            assert layout.bytes_for(tokens + more) * layout.num_ranges > room
        else:
            self.authors[sequence] = self.suspended.pop(sequence)
            self.write(sequence, range(tokens, tokens + more))
            self.model[sequence] = tokens + more

    @precondition(lambda self: self.suspended)
    @rule(data=st.data())
    def release_suspended(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.suspended)))
        self.cache.release(sequence)
        del self.suspended[sequence]

    @rule(keep=st.booleans())
    def sleep_and_wake(self, keep: bool) -> None:
        try:
            self.cache.sleep(keep)
        except ConfigError:
            assert self.model
            assert not keep
        except HostMemoryFull:
            # Of those that an interrupted call retained, nobody got to know.
            slots = enumerate(self.cache.arena.slots)
            kept = [RetainedSlot(n, slot.serial) for n, slot in slots if slot.state is RETAINED]
            tokens = sum(self.cache.retained_tokens(each) + self.held_in(each.slot) for each in kept)
            assert not self.fits_host(sum(self.model.values()) + tokens)
        else:
            assert self.cache.held_bytes == 0
            self.cache.check_integrity()
            self.cache.wake()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.model)))
        kept = self.cache.retain(sequence)
        assert self.cache.retained_tokens(kept) == self.model.pop(sequence)
        self.kept[kept] = self.authors.pop(sequence)

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), more=st.integers(0, 12))
    def adopt(self, data: st.DataObject, more: int) -> None:
        kept, sequence = data.draw(st.sampled_from(sorted(self.kept))), self.count
        tokens = data.draw(st.integers(1, len(self.kept[kept])))
        left, prefix = self.cache.retained_tokens(kept), self.prefix(kept.slot)
        held = self.held_in(kept.slot)
        room = self.room_besides_retained()
        try:
            self.cache.adopt(kept, sequence, tokens, tokens + more)
        except PrefixEvicted:
            assert tokens > left
        except (SequenceTooLong, NoFreeSlot):
            assert tokens + more > SHAPE.max_seq_len or len(self.model) == SHAPE.num_slots
        except ConfigError:
            assert tokens < max(held, prefix)
        except KVCacheOutOfMemory:
            assert self.cache.layout.bytes_for(tokens + more) * self.cache.layout.num_ranges > room
        else:
            self.count += 1
            self.authors[sequence] = self.kept.pop(kept)[:tokens]
            self.write(sequence, range(tokens, tokens + more))
            self.model[sequence] = tokens + more

    @precondition(lambda self: self.model or self.kept)
    @rule(data=st.data(), more=st.integers(0, 20), reads=st.booleans())
    def begin_with(self, data: st.DataObject, more: int, reads: bool) -> None:
        """A sequence begins with the tokens of another slot: reads them there, or aliases its extents."""
        source, authors, have = self.draw_source(data)
        tokens, sequence = data.draw(st.integers(1, len(authors))), self.count
        room = self.room_besides_retained()
        given = {"prefix" if reads else "alias": (source, tokens)}
        try:
            self.cache.admit(sequence, tokens + more, **given)  # type: ignore[arg-type]
        except PrefixEvicted:
            assert tokens > have
        except SequenceTooLong:
            assert tokens + more > SHAPE.max_seq_len
        except NoFreeSlot:
            assert self.has_no_slot(source.slot if isinstance(source, RetainedSlot) else source)
        except KVCacheOutOfMemory:
            assert self.cache.layout.bytes_for(tokens + more) * self.cache.layout.num_ranges > room
        else:
            self.count += 1
            self.authors[sequence] = authors[:tokens]
            self.write(sequence, range(tokens, tokens + more))
            self.model[sequence] = tokens + more

    def draw_source(self, data: st.DataObject) -> tuple[int | RetainedSlot, list[int], int]:
        """A slot to begin with: a running sequence's or a retained one, who wrote its tokens, how many it has."""
        if self.kept and (not self.model or data.draw(st.booleans())):
            kept = data.draw(st.sampled_from(sorted(self.kept)))
            return kept, self.kept[kept], self.cache.retained_tokens(kept)
        sequence = data.draw(st.sampled_from(sorted(self.model)))
        return self.cache.slot_of(sequence), self.authors[sequence], self.model[sequence]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def copy_prefix(self, data: st.DataObject) -> None:
        source, authors, have = self.draw_source(data)
        target = data.draw(st.sampled_from(sorted(self.model)))
        tokens = data.draw(st.integers(1, min(len(authors), self.model[target])))
        floors, slot = self.cache.write_floors, self.cache.slot_of(target)
        if self.held(target):
            return  # whoever reads it would see other tokens
        try:
            self.cache.copy_prefix(source, target, tokens)
        except PrefixEvicted:
            assert tokens > have
        except ConfigError:
            assert source == slot or self.prefix(slot) or (floors is not None and floors[slot])
        else:
            self.authors[target][:tokens] = authors[:tokens]

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), tokens=st.integers(0, 20))
    def release_retained(self, data: st.DataObject, tokens: int) -> None:
        kept = data.draw(st.sampled_from(sorted(self.kept)))
        try:
            self.cache.release_retained(kept, tokens)
        except ConfigError:
            assert self.held_in(kept.slot) > tokens
        else:
            assert self.cache.retained_tokens(kept) <= tokens

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), priority=st.sampled_from([0.0, 1.0, inf]))
    def touch(self, data: st.DataObject, priority: float) -> None:
        self.cache.touch(data.draw(st.sampled_from(sorted(self.kept))), priority)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        taking_part = data.draw(st.sets(st.sampled_from(sorted(self.model))))
        wanted = {s: self.model[s] + 1 for s in taking_part}
        lengths = np.zeros(SHAPE.num_slots, np.int64)
        for sequence, length in wanted.items():
            lengths[self.cache.slot_of(sequence)] = length
        try:
            self.cache.prepare_step(lengths)
        except SequenceTooLong:
            assert max(wanted.values()) > SHAPE.max_seq_len
        except KVCacheOutOfMemory:
            assert self.missing(wanted) > self.room() + self.surplus(self.model | wanted)
        else:
            for sequence, length in wanted.items():
                self.write(sequence, range(length - 1, length))
            self.model.update(wanted)

    @rule()
    def map_ahead(self) -> None:
        self.cache.map_ahead()

    @precondition(lambda self: self.model and self.cache.arena.free_slots())
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.model)))
        slot = data.draw(st.sampled_from(self.cache.arena.free_slots()))
        old = self.cache.slot_of(sequence)
        frontier = self.cache.frontiers[old]
        try:
            self.cache.move(sequence, slot)
        except ConfigError:
            assert self.held(sequence)
            return
        assert self.cache.slot_of(sequence) == slot
        assert (self.cache.frontiers[old], self.cache.frontiers[slot]) == (0, frontier)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        sequence, new = data.draw(st.sampled_from(sorted(self.model))), self.count
        tokens = data.draw(st.integers(1, self.model[sequence]))
        room = self.room_besides_retained()
        need = self.cache.layout.bytes_for(tokens) * self.cache.layout.num_ranges
        try:
            self.cache.fork(sequence, new, tokens)
        except NoFreeSlot:
            assert self.has_no_slot()
        except KVCacheOutOfMemory:
            assert need > room
        else:
            self.count += 1
            self.model[new] = tokens
            self.authors[new] = self.authors[sequence][:tokens]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def replace(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.model)))
        room, slot = self.room_besides_retained(), self.cache.slot_of(sequence)
        before = [m.extent.serial for stripe in self.cache.arena.slots[slot].stripes for m in stripe]
        try:
            self.cache.replace(sequence)
        except KVCacheOutOfMemory:
            assert self.cache.arena.slots[slot].mapped * self.cache.layout.num_ranges > room
        else:
            after = [m.extent.serial for stripe in self.cache.arena.slots[slot].stripes for m in stripe]
            assert not set(before) & set(after)

    @rule(pages=st.integers(0, 60))
    def set_budget(self, pages: int) -> None:
        budget = pages * self.cache.layout.granularity
        self.room()
        pool, arena = self.cache.arena.pool, self.cache.arena
        used = pool.held_bytes - pool.free_bytes - arena.parked_bytes - arena.evictable_bytes
        surplus = self.surplus(self.model)
        try:
            self.cache.set_budget(budget)
        except ConfigError:
            assert budget < self.cache.layout.least_bytes
        except KVCacheOutOfMemory:
            assert used - surplus > budget
        else:
            assert pool.budget == budget

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.model.clear()
        self.authors.clear()
        assert not any(map(self.cache.retained_tokens, self.kept))
        self.kept.clear()
        self.suspended.clear()

    @rule(data=st.data(), at=st.integers(0, 400), then_reset=st.booleans())
    def interrupt(self, data: st.DataObject, at: int, then_reset: bool) -> None:
        """Ctrl-C at some instruction of some call: it is done whole or not at all, and the cache goes on."""
        new = self.count
        calls: list[Callable[[], object]] = [lambda: self.cache.admit(new, 7), self.cache.map_ahead]
        if self.model:
            sequence = data.draw(st.sampled_from(sorted(self.model)))
            calls += [
                lambda: self.cache.release(sequence),
                lambda: self.cache.extend(sequence, 5),
                lambda: self.cache.fork(sequence, new, self.model[sequence]),
                lambda: self.cache.replace(sequence),
                lambda: self.cache.truncate(sequence, 1),
                lambda: self.cache.retain(sequence),
                lambda: self.cache.suspend(sequence),
                lambda: self.cache.admit(new, 40, prefix=(self.cache.slot_of(sequence), self.model[sequence])),
            ]
        self.count += 1
        with contextlib.suppress(KVCacheOutOfMemory, NoFreeSlot, SequenceTooLong, ConfigError, HostMemoryFull):
            interrupt_at(at, data.draw(st.sampled_from(calls)))
        if then_reset:
            self.reset()
        here = {self.cache.sequence_at(slot) for slot in range(SHAPE.num_slots)}
        for gone in set(self.model) - here:
            if self.cache.is_suspended(gone):
                self.suspended[gone] = self.authors[gone]
            del self.model[gone], self.authors[gone]
        for known in self.model:
            length = int(self.cache.lengths[self.cache.slot_of(known)])
            before, self.model[known] = self.model[known], length
            del self.authors[known][length:]
            if length > before:
                self.write(known, range(before, length))
        if new in here:
            # Admitted or forked: its tokens are whoever's until somebody writes them, which copies what is shared.
            self.cache.release(new)

    @rule(pages=st.integers(1, 5))
    def reclaim(self, pages: int) -> None:
        """Someone needs memory: parked slots give it up, from their tails."""
        self.room()
        before = self.cache.arena.parked_bytes
        wanted = pages * self.cache.layout.granularity
        with self.cache._lock:
            assert self.cache.arena.reclaim(wanted) >= min(before, wanted)

    @invariant()
    def every_live_token_holds_what_was_written(self) -> None:
        for sequence, length in self.model.items():
            assert self.cache.lengths[self.cache.slot_of(sequence)] == length
            for author, run in groupby(range(length), key=self.authors[sequence].__getitem__):
                tokens = list(run)
                expect(self.cache, sequence, range(tokens[0], tokens[-1] + 1), author)

    @invariant()
    def every_kept_token_holds_what_was_written(self) -> None:
        # The thread evicts what is kept, and would between the look at how much there is and the reading of it.
        assert self.cache.wait_ahead()
        for kept, authors in self.kept.items():
            for author, run in groupby(range(self.cache.retained_tokens(kept)), key=authors.__getitem__):
                tokens = list(run)
                expect_in(self.cache, kept.slot, range(tokens[0], tokens[-1] + 1), author)

    @invariant()
    def the_books_agree(self) -> None:
        # The next rule, and what it draws from, must not hang on how far the thread has come.
        assert self.cache.wait_ahead()
        self.cache.check_integrity()
        stats = self.cache.stats()
        assert (stats.sequences, stats.suspended_sequences) == (len(self.model), len(self.suspended))
        assert stats.segment_tokens == sum(self.prefix(self.cache.slot_of(sequence)) for sequence in self.model)
        assert stats.live_bytes == sum(self.model.values()) * SHAPE.token_bytes
        assert stats.held_bytes <= stats.budget_bytes

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()
            self.leaves_nothing()

    def leaves_nothing(self) -> None:
        assert (self.host.live_mappings, self.host.live_handles, self.host.live_reservations) == (0, 0, 0)


TestCacheMachine = CacheMachine.TestCase


class CudaCacheMachine(CacheMachine):
    """The same life on the card."""

    def open_driver(self) -> Driver:
        return CudaDriver()

    def leaves_nothing(self) -> None:
        torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.timeout(200)
def test_the_same_life_on_the_card() -> None:
    run_state_machine_as_test(
        CudaCacheMachine, settings=settings(max_examples=12, stateful_step_count=25, deadline=None)
    )


def test_the_model_itself_sees_a_wrong_byte() -> None:
    """A check that cannot fail proves nothing: one changed element is found."""
    with KVCacheManager(replace(SHAPE), HostDriver(), 1 << 20) as cache:
        admit(cache, 0, 5)
        expect(cache, 0, range(5))
        cache.layer(2).v[0, 4, 1, 23] += 1
        with pytest.raises(AssertionError):
            expect(cache, 0, range(5))
