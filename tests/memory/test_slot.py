"""A slot's states are left and entered by its methods alone; its lower edge rises, and its front pages come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trtllm_vattn.errors import ConfigError, InvariantViolation, KVCacheOutOfMemory
from trtllm_vattn.memory import remap
from trtllm_vattn.memory.arena import Arena
from trtllm_vattn.memory.layout import BlockLayout, SlotLayout
from trtllm_vattn.memory.pool import ExtentPool
from trtllm_vattn.memory.slot import FREE, PARKED, PENDING_UNMAP, RETAINED, RETIRED, RUNNING, Slot, SlotState
from trtllm_vattn.vmm.base import Fence
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.tensors import copy_bytes
from trtllm_vattn.vmm.wrappers import FaultyDriver

PAGE = 4096
LAYOUT = SlotLayout(
    num_layers=4, layers_per_range=2, layer_token_bytes=512, max_seq_len=64, num_slots=4, granularity=PAGE
)
"""Four tokens a page, two ranges."""


@pytest.fixture
def arena(host_driver: HostDriver) -> Iterator[Arena]:
    made = Arena(ExtentPool(host_driver, 100 * PAGE, classes=1), LAYOUT)
    yield made
    host_driver.complete()
    made.close()


@pytest.fixture
def record(host_driver: HostDriver) -> Callable[[], Fence]:
    return lambda: host_driver.record(0)


def state_of(arena: Arena, index: int) -> SlotState:
    return arena.slots[index].state


def run(arena: Arena, tokens: int) -> int:
    return arena.allocate_slot(tokens, LAYOUT.num_slots)[0]


def share(arena: Arena, source: int, tokens: int, target: int, record: Callable[[], Fence]) -> None:
    """A fork, as far as it is done here."""
    driver = arena.pool.driver
    remap.share(arena, source, tokens, target, tokens, partial(copy_bytes, driver.device), record)


def test_a_transition_from_another_state_is_refused() -> None:
    slot = Slot([range(1)])
    with pytest.raises(InvariantViolation, match="a slot is free, where it must be running"):
        slot.stop()
    slot.start()
    with pytest.raises(InvariantViolation, match="a slot is running, where it must be free or parked"):
        slot.start()


def test_front_pages_come_back_behind_their_fence(
    arena: Arena, host_driver: HostDriver, record: Callable[[], Fence]
) -> None:
    index = run(arena, 40)
    (group,) = arena.slots[index].groups
    assert (group.lower, group.frontier, arena.lower_edge(index)) == (0, 10 * PAGE, 0)
    free = arena.pool.free_bytes
    host_driver.hold()
    arena.raise_lower_edge(index, 11, record())  # Tokens 0 to 7 are whole pages; page 2 still holds token 11.
    assert (group.lower, group.frontier, arena.lower_edge(index)) == (2 * PAGE, 10 * PAGE, 8)
    assert arena.lower_edges is not None
    assert (arena.lower_edges[index], arena.frontiers[index]) == (8, 40)
    arena.complete_pending_unmaps()
    assert arena.pool.free_bytes == free
    arena.check_integrity()
    host_driver.complete()
    arena.complete_pending_unmaps()
    assert arena.pool.free_bytes == free + 2 * 2 * PAGE
    assert arena.running_bytes == 2 * 8 * PAGE
    arena.check_integrity()
    # It grows at its frontier as before, and the lower edge does not fall.
    arena.grow({index: 48})
    arena.raise_lower_edge(index, 3, record())
    assert (arena.lower_edge(index), arena.frontiers[index]) == (8, 48)
    arena.check_integrity()


def test_the_last_page_stays_however_high_the_edge(arena: Arena, record: Callable[[], Fence]) -> None:
    index = run(arena, 10)
    arena.raise_lower_edge(index, 64, record())
    assert arena.lower_edge(index) == 8
    assert arena.frontiers[index] == 12
    arena.check_integrity()


def test_a_slot_without_its_front_is_not_adopted(arena: Arena, record: Callable[[], Fence]) -> None:
    index = run(arena, 40)
    arena.raise_lower_edge(index, 20, record())
    arena.park(index, record())
    assert state_of(arena, index) is PENDING_UNMAP
    assert index not in arena.free_slots()
    arena.complete_pending_unmaps(wait=True)
    assert state_of(arena, index) is FREE
    assert run(arena, 4) == index
    assert arena.lower_edge(index) == 0
    arena.check_integrity()


def test_a_lower_edge_moves_and_is_forked(arena: Arena, record: Callable[[], Fence]) -> None:
    index = run(arena, 40)
    arena.raise_lower_edge(index, 12, record())
    remap.move(arena, index, 2, record)
    assert (arena.lower_edge(2), arena.frontiers[2]) == (12, 40)
    arena.check_integrity()
    share(arena, 2, 30, 3, record)
    shared = [stripe[0].extent.serial in arena.extent_refs for stripe in arena.slots[3].stripes]
    assert shared == [True, True, True, True, False]  # tokens 12 to 27
    assert (arena.lower_edge(3), arena.frontiers[3]) == (12, 32)
    assert len(arena.extent_refs) == 4 * 2
    arena.check_integrity()
    with pytest.raises(ConfigError, match="slot 2 backs tokens from 12 on, so its first 12 cannot be forked"):
        share(arena, 2, 12, 0, record)
    # What one of the two gives back at its front stays mapped in the other.
    arena.raise_lower_edge(2, 20, record())
    arena.complete_pending_unmaps(wait=True)
    assert len(arena.extent_refs) == 2 * 2
    assert (arena.lower_edge(2), arena.lower_edge(3)) == (20, 12)
    arena.check_integrity()


def test_a_lower_edge_in_blocks_is_a_whole_block(host_driver: HostDriver) -> None:
    layout = BlockLayout(
        num_layers=1,
        layers_per_range=1,
        layer_token_bytes=96,
        max_seq_len=256,
        num_slots=2,
        granularity=PAGE,
        tokens_per_block=32,
        kv_factor=2,
    )
    arena = Arena(ExtentPool(host_driver, 100 * PAGE, classes=1), layout)
    arena.allocate_slot(256, 2)
    arena.raise_lower_edge(0, 100, host_driver.record(0))  # three blocks are 9,216 bytes: two pages lie wholly below
    assert (arena.slots[0].lower, arena.lower_edge(0)) == (2 * PAGE, 96)
    arena.check_integrity()
    arena.close()


def test_nothing_counts_lower_edges_before_one_is_raised(arena: Arena, record: Callable[[], Fence]) -> None:
    arena.raise_lower_edge(run(arena, 40), 3, record())
    before = arena.lower_edges
    assert before is None
    arena.raise_lower_edge(0, 4, record())
    assert arena.lower_edges is not None
    arena.park(0, record())
    assert arena.lower_edges.tolist() == [0, 0, 0, 0]


def test_integrity_sees_a_wrong_lower_edge(arena: Arena, record: Callable[[], Fence]) -> None:
    index = run(arena, 40)
    (group,) = arena.slots[index].groups
    group.lower += PAGE
    with pytest.raises(InvariantViolation, match="slot 0: 4,096 bytes at offset 0, expected 4,096 at 4,096"):
        arena.check_integrity()
    group.lower -= PAGE
    arena.raise_lower_edge(index, 8, record())
    group.lower -= 2 * PAGE
    with pytest.raises(InvariantViolation, match="slot 0"):
        arena.check_integrity()
    group.lower += 2 * PAGE
    arena.check_integrity()
    assert arena.lower_edges is not None
    arena.lower_edges[index] = 7
    with pytest.raises(InvariantViolation, match="lower edge 7, but tokens from 8 on are backed"):
        arena.check_integrity()
    arena.lower_edges[index] = 8


class SlotMachine(RuleBasedStateMachine):
    """Slots go from state to state as DESIGN.md draws them; rules are named after the transitions."""

    @initialize(own_lengths=st.booleans())
    def build(self, own_lengths: bool) -> None:
        self.driver = HostDriver()
        self.faulty = FaultyDriver(self.driver)
        self.arena = Arena(ExtentPool(self.faulty, 60 * PAGE), LAYOUT, own_lengths=own_lengths)

    def is_held(self, index: int) -> bool:
        return bool(self.arena.slots[index].holders)

    def of(self, *states: object) -> list[int]:
        return [index for index, slot in enumerate(self.arena.slots[:-1]) if slot.state in states]

    def record(self) -> Fence:
        return self.driver.record(0)

    @rule(tokens=st.integers(1, 64), ahead=st.integers(0, 16), exact=st.booleans())
    def start(self, tokens: int, ahead: int, exact: bool) -> None:
        free = self.of(FREE, PARKED)
        if not free:
            return
        try:
            index, _ = self.arena.allocate_slot(tokens, LAYOUT.num_slots, ahead, exact)
        except KVCacheOutOfMemory:
            assert set(free) <= set(self.of(FREE, PARKED))  # and those whose unmapping was pending
        else:
            assert index in free
            assert self.arena.slots[index].state is RUNNING
            assert self.arena.frontiers[index] >= tokens

    @precondition(lambda self: self.of(RUNNING))
    @rule(data=st.data(), tokens=st.integers(1, 64))
    def push(self, data: st.DataObject, tokens: int) -> None:
        index = data.draw(st.sampled_from(self.of(RUNNING)))
        before = int(self.arena.frontiers[index])
        try:
            self.arena.grow({index: tokens})
        except KVCacheOutOfMemory:
            assert self.arena.frontiers[index] == before
        else:
            assert self.arena.frontiers[index] >= max(tokens, before)

    @precondition(lambda self: self.of(RUNNING))
    @rule(data=st.data(), tokens=st.integers(0, 64))
    def raise_lower(self, data: st.DataObject, tokens: int) -> None:
        index = data.draw(st.sampled_from(self.of(RUNNING)))
        before, frontier = self.arena.lower_edge(index), self.arena.frontiers[index]
        if self.is_held(index) or self.arena.slots[index].segments:
            return
        self.arena.raise_lower_edge(index, tokens, self.record())
        assert before <= self.arena.lower_edge(index) <= max(before, tokens)
        assert self.arena.frontiers[index] == frontier

    @precondition(lambda self: self.of(RUNNING))
    @rule(data=st.data())
    def park(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(self.of(RUNNING)))
        slot = self.arena.slots[index]
        whole, broken = slot.lower == 0 and not self.arena.extent_refs and not slot.pending_unmap, slot.broken
        owners = {segment.owner for segment in slot.segments}
        if self.is_held(index):
            with pytest.raises(ConfigError, match="read the first"):
                self.arena.park(index, self.record())
            return
        self.arena.park(index, self.record())
        assert not any(index in self.arena.slots[owner].holders for owner in owners)
        assert self.arena.frontiers[index] == 0
        if whole:
            assert slot.state is (RETIRED if broken else PARKED)

    @precondition(lambda self: self.of(RUNNING))
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(self.of(RUNNING)))
        tokens = int(self.arena.frontiers[index])
        serial = self.arena.retain(index, tokens, self.record())
        assert self.arena.slots[index].state is RETAINED
        assert (self.arena.retained_tokens(index, serial), self.arena.retained_tokens(index, serial - 1)) == (tokens, 0)

    @precondition(lambda self: self.of(RETAINED))
    @rule(data=st.data(), undone=st.booleans())
    def adopt(self, data: st.DataObject, undone: bool) -> None:
        index = data.draw(st.sampled_from(self.of(RETAINED)))
        slot = self.arena.slots[index]
        tokens, segments = slot.tokens, slot.segments
        undo = self.arena.adopt(index)
        assert (slot.state, slot.segments) == (RUNNING, segments)
        assert self.arena.frontiers[index] >= tokens
        if undone:
            undo()
            assert (slot.state, slot.segments, slot.tokens) == (RETAINED, segments, tokens)

    @precondition(lambda self: self.of(RETAINED))
    @rule(data=st.data(), tokens=st.integers(0, 64))
    def shrink(self, data: st.DataObject, tokens: int) -> None:
        index = data.draw(st.sampled_from(self.of(RETAINED)))
        slot, held = self.arena.slots[index], self.arena.held_tokens(index)
        before = slot.tokens
        try:
            self.arena.shrink_retained(index, tokens)
        except ConfigError:
            assert held > tokens
            assert slot.tokens == before
        else:
            assert slot.tokens in (0, min(tokens, before))

    @precondition(lambda self: self.of(RETAINED))
    @rule(pages=st.integers(1, 40), priority=st.sampled_from([0.0, 1.0, float("inf")]))
    def evict(self, pages: int, priority: float) -> None:
        self.arena.slots[self.of(RETAINED)[0]].touch(priority)
        self.arena.complete_pending_unmaps(wait=True)
        could = self.arena.parked_bytes + self.arena.evictable_bytes
        assert self.arena.reclaim(pages * PAGE) >= min(pages * PAGE, could)
        self.arena.evicted.clear()

    @precondition(lambda self: self.of(RUNNING, RETAINED) and self.of(FREE, PARKED))
    @rule(data=st.data(), tokens=st.integers(1, 63))
    def hold(self, data: st.DataObject, tokens: int) -> None:
        """A sequence reads the first tokens of another slot there."""
        source = data.draw(st.sampled_from(self.of(RUNNING, RETAINED)))
        target = data.draw(st.sampled_from(self.of(FREE, PARKED)))
        slot = self.arena.slots[source]
        if tokens > (slot.tokens if slot.state is RETAINED else self.arena.frontiers[source]):
            return
        try:
            remap.reach(self.arena, source, tokens, target, 64)
        except ConfigError:
            raised = self.arena.lower_edge(source) > slot.prefix
            assert raised or any(group.deficit for group in slot.groups) or target not in self.arena.free_slots()
        except KVCacheOutOfMemory:
            assert not self.arena.slots[target].segments
        else:
            assert self.arena.slots[target].prefix == tokens
            assert self.arena.lower_edge(target) <= tokens < self.arena.frontiers[target]

    @precondition(lambda self: self.of(RUNNING))
    @rule(data=st.data(), tokens=st.integers(1, 64))
    def lower_frontier(self, data: st.DataObject, tokens: int) -> None:
        """A group of ranges holds fewer tokens than the others."""
        index = data.draw(st.sampled_from(self.of(RUNNING)))
        slot, frontier = self.arena.slots[index], int(self.arena.frontiers[index])
        if len(slot.groups) == 1 or slot.segments or slot.holders or slot.lower or slot.groups[0].deficit:
            return
        tokens = min(tokens, frontier)
        self.arena.set_deficits(index, [frontier - tokens, 0], {0: tokens}, self.record())
        assert self.arena.frontiers[index] >= frontier
        assert not slot.groups[0].ends_behind(LAYOUT.bytes_for(tokens))

    @precondition(lambda self: self.of(PARKED))
    @rule(pages=st.integers(1, 20))
    def pop(self, pages: int) -> None:
        # What is pending at another slot's addresses, after a move, is not released before it is unmapped there.
        self.arena.complete_pending_unmaps(wait=True)
        before = self.arena.parked_bytes
        assert self.arena.reclaim(pages * PAGE) >= min(pages * PAGE, before)

    @precondition(lambda self: self.of(RUNNING) and self.of(FREE, PARKED))
    @rule(data=st.data(), tokens=st.integers(1, 64), forks=st.booleans())
    def begin_unmap(self, data: st.DataObject, tokens: int, forks: bool) -> None:
        """A move leaves its source pending; so does the end of a sequence that shares memory with a fork."""
        source = data.draw(st.sampled_from(self.of(RUNNING)))
        target = data.draw(st.sampled_from(self.of(FREE, PARKED)))
        edges = self.arena.lower_edge(source), self.arena.frontiers[source]
        if self.arena.slots[source].segments and forks:
            return  # tests/cache/test_machine.py forks these, with their contents
        try:
            if not forks:
                remap.move(self.arena, source, target, self.record)
                assert self.arena.slots[source].state is PENDING_UNMAP
                assert (self.arena.lower_edge(target), self.arena.frontiers[target]) == edges
            elif edges[0] < tokens <= edges[1]:
                share(self.arena, source, tokens, target, self.record)
                assert self.arena.lower_edge(target) == edges[0]
        except KVCacheOutOfMemory:
            assert (self.arena.lower_edge(source), self.arena.frontiers[source]) == edges
        except ConfigError:
            assert target not in self.arena.free_slots() or self.is_held(source)

    @rule(wait=st.booleans())
    def complete_unmap(self, wait: bool) -> None:
        self.arena.complete_pending_unmaps(wait)
        assert not self.of(PENDING_UNMAP)

    @precondition(lambda self: self.of(PARKED))
    @rule()
    def mark_broken(self) -> None:
        parked = self.arena.reclaimable(wait=True)[0]
        self.faulty.fail("unmap")
        self.arena.reclaim(PAGE)
        self.faulty.disarm()
        assert self.arena.slots[parked].state is RETIRED

    @rule()
    def reset(self) -> None:
        self.arena.clear(self.record())
        assert self.of(FREE) == list(range(LAYOUT.num_slots))

    @invariant()
    def integrity(self) -> None:
        if hasattr(self, "arena"):
            self.arena.check_integrity()
            for index in range(LAYOUT.num_slots):
                running = self.arena.slots[index].state is RUNNING
                assert running == (self.arena.frontiers[index] > 0)

    def teardown(self) -> None:
        if hasattr(self, "arena"):
            self.arena.close()
            assert (self.driver.live_mappings, self.driver.live_handles, self.driver.live_reservations) == (0, 0, 0)
            self.driver.close()


TestSlotMachine = SlotMachine.TestCase
TestSlotMachine.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
