"""Ranges with lengths of their own: each holds its own tokens and memory, and the guard and the device know of each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from failing import fail_each_call
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from shapes import SHAPE

from trtllm_vattn.cache.base import FlatKV, RetainedSlot
from trtllm_vattn.cache.config import CacheConfig, Layout
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import (
    ConfigError,
    DriverError,
    KVCacheOutOfMemory,
    NoFreeSlot,
    PrefixEvicted,
    SequenceTooLong,
    UnmappedAccess,
)
from trtllm_vattn.graphs.guard import Guard
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import FaultyDriver

PAGE = 4096
CONFIG = CacheConfig(extent_classes=1, lookahead=0, layers_per_range=2, heads_per_range=1, own_lengths=True)
"""Four ranges, of two layers and one head each; 384 bytes a token, so that a page holds ten tokens and more."""


@pytest.fixture
def cache(host_driver: HostDriver) -> Iterator[KVCacheManager]:
    with KVCacheManager(SHAPE, host_driver, 200 * PAGE, config=CONFIG) as made:
        yield made


def value(sequence: int, layer: int, part: int, tensor: int, tokens: range) -> torch.Tensor:
    places = torch.arange(tokens.start, tokens.stop, dtype=torch.float32)[:, None, None]
    return 1000.0 * sequence + 100 * layer + 10 * part + tensor + places / 64


def parts(cache: KVCacheManager, layer: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    views = [each for each in cache.head_groups(layer) if isinstance(each, FlatKV)]
    return [(each.k, each.v) for each in views]


def write(cache: KVCacheManager, sequence: int, tokens: range) -> None:
    """These tokens, in all groups, each behind what its group holds."""
    slot = cache.slot_of(sequence)
    for layer in range(SHAPE.num_layers):
        for part, tensors in enumerate(parts(cache, layer)):
            held = cache.lengths_of(cache.group_of(layer, part))[slot] - len(tokens)
            for number, tensor in enumerate(tensors):
                tensor[slot, held : held + len(tokens)] = value(sequence, layer, part, number, tokens)


def check(cache: KVCacheManager, sequence: int, held: Callable[[int], list[int]], author: int | None = None) -> None:
    """Each group holds just these tokens of the sequence, in order."""
    slot, author = cache.slot_of(sequence), sequence if author is None else author
    for layer in range(SHAPE.num_layers):
        for part, tensors in enumerate(parts(cache, layer)):
            group = cache.group_of(layer, part)
            tokens = held(group)
            assert cache.lengths_of(group)[slot] == len(tokens)
            for number, tensor in enumerate(tensors):
                want = value(author, layer, part, number, range(60))[tokens].expand(-1, 1, SHAPE.head_dim)
                assert torch.equal(tensor[slot, : len(tokens)], want)


def compact(cache: KVCacheManager, sequence: int, group: int, keep: list[int]) -> None:
    """Move the tokens that are kept to the front, as a policy does, and say how many there are."""
    slot = cache.slot_of(sequence)
    cache.make_writable(sequence, 0)
    for layer in range(SHAPE.num_layers):
        for part, tensors in enumerate(parts(cache, layer)):
            if cache.group_of(layer, part) == group:
                for tensor in tensors:
                    tensor[slot, : len(keep)] = tensor[slot, keep].clone()
    cache.set_length(sequence, group, len(keep))


KEPT = {0: list(range(0, 40, 2)), 1: [0, 39], 2: list(range(40)), 3: list(range(5, 40))}


def compacted(cache: KVCacheManager) -> None:
    cache.admit(0, 40)
    write(cache, 0, range(40))
    for group, keep in KEPT.items():
        compact(cache, 0, group, keep)


def test_layers_and_heads_have_views_and_groups_of_their_own(cache: KVCacheManager) -> None:
    assert cache.num_groups == cache.layout.num_ranges == 4
    groups = [[cache.group_of(layer, part) for part in range(2)] for layer in range(4)]
    assert groups == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [tuple(k.shape) for k, _ in parts(cache, 0)] == [(5, 50, 1, 24)] * 2
    with pytest.raises(ConfigError, match=r"use head_groups\(\) instead of layer\(\)"):
        cache.layer(0)
    cache.admit(0, 40)
    write(cache, 0, range(40))
    check(cache, 0, lambda group: list(range(40)))
    assert cache.head_groups(1) is cache.head_groups(1)


def test_each_group_gives_back_what_lies_behind_its_own_length(cache: KVCacheManager) -> None:
    before = cache.stats().mapped_bytes
    compacted(cache)
    check(cache, 0, KEPT.__getitem__)
    assert cache.lengths[0] == 40
    pages = [len(group.stripes) for group in cache.arena.slots[0].groups]
    assert pages == [cache.layout.bytes_for(len(KEPT[group])) // PAGE for group in range(4)]
    assert cache.stats().mapped_bytes == sum(pages) * PAGE > before
    assert cache.length_deficits is not None
    assert cache.length_deficits[:, 0].tolist() == [20, 38, 0, 5]
    cache.check_integrity()
    # All grow by what a step adds.
    cache.extend(0, 6)
    write(cache, 0, range(40, 46))
    check(cache, 0, lambda group: [*KEPT[group], *range(40, 46)])
    cache.check_integrity()
    # When the longest becomes shorter, so does the sequence; deficits follow.
    address = cache.length_deficits.data_ptr()
    compact(cache, 0, 2, list(range(10)))
    assert (cache.lengths[0], cache.length_deficits[:, 0].tolist()) == (41, [15, 33, 31, 0])
    assert cache.length_deficits.data_ptr() == address
    cache.check_integrity()
    cache.release(0)
    cache.admit(1, 12)
    write(cache, 1, range(12))
    check(cache, 1, lambda group: list(range(12)))
    assert cache.length_deficits[:, cache.slot_of(1)].tolist() == [0, 0, 0, 0]
    cache.check_integrity()


def test_memory_behind_a_length_goes_back_behind_its_fence(cache: KVCacheManager, host_driver: HostDriver) -> None:
    cache.admit(0, 40)
    mapped = host_driver.live_mappings
    host_driver.hold()
    cache.set_length(0, 1, 5)
    cache.check_integrity()
    assert host_driver.live_mappings == mapped
    with pytest.raises(DriverError, match="the work is held"):
        cache.extend(0, 10)  # the group grows to where memory is still in use
    host_driver.complete()
    cache.extend(0, 10)
    cache.check_integrity()


def test_the_guard_looks_at_each_group(cache: KVCacheManager) -> None:
    compacted(cache)
    guard = Guard(cache)
    slots = np.array([0])
    guard.check(np.array([40]), slots, np.array([39]))
    frontier = int(cache.frontiers[0])
    room = [
        cache.layout.tokens_in(group.frontier) - len(KEPT[index])
        for index, group in enumerate(cache.arena.slots[0].groups)
    ]
    assert frontier == 40 + min(room)
    with pytest.raises(UnmappedAccess, match=f"but {frontier} are mapped in the range group that has least"):
        guard.check(np.array([frontier + 1]), slots, np.array([frontier]))


def test_they_move_fork_and_are_retained(cache: KVCacheManager) -> None:
    compacted(cache)
    cache.move(0, 2)
    check(cache, 0, KEPT.__getitem__)
    assert cache.length_deficits is not None
    assert cache.length_deficits[:, 2].tolist() == [20, 38, 0, 5]
    cache.fork(0, 1, 40)
    cache.replace(0)
    check(cache, 0, KEPT.__getitem__)
    check(cache, 1, KEPT.__getitem__, author=0)
    cache.extend(1, 3)
    write(cache, 1, range(40, 43))
    cache.truncate(1, 40)
    check(cache, 1, KEPT.__getitem__, author=0)
    with pytest.raises(ConfigError, match="holds 38 tokens fewer, so none of its first 38"):
        cache.truncate(1, 38)
    with pytest.raises(ConfigError, match="hold different tokens, which no other slot can read; alias them"):
        cache.admit(2, 45, prefix=(2, 20))
    cache.admit(3, 12)
    with pytest.raises(ConfigError, match="hold different tokens; fork the sequence"):
        cache.copy_prefix(2, 3, 12)
    kept = cache.retain(0)
    cache.check_integrity()
    assert cache.retained_tokens(kept) == 40
    cache.adopt(kept, 0, 40)
    check(cache, 0, KEPT.__getitem__)
    kept = cache.retain(0)
    cache.release(1)
    cache.set_budget(cache.layout.least_bytes + cache.stats().mapped_bytes)
    assert cache.retained_tokens(kept) == 0
    cache.check_integrity()


def test_what_cannot_be_set_is_refused(cache: KVCacheManager, host_driver: HostDriver) -> None:
    cache.admit(0, 40)
    for group, tokens, message in (
        (4, 5, "range group 4 asked for; there are 4"),
        (0, 0, "range group 0 holds 40 tokens of sequence 0; keep 1 to 40"),
        (0, 41, "range group 0 holds 40 tokens"),
    ):
        with pytest.raises(ConfigError, match=message):
            cache.set_length(0, group, tokens)
    cache.admit(1, 45, prefix=(0, 40))
    with pytest.raises(ConfigError, match=r"slots \[1\] read the first 40 tokens of slot 0"):
        cache.set_length(0, 0, 39)
    with pytest.raises(ConfigError, match="the first 40 tokens of slot 1 lie in other slots"):
        cache.set_length(1, 0, 44)
    with KVCacheManager(SHAPE, host_driver, 100 * PAGE) as plain:
        plain.admit(0, 5)
        assert (plain.num_groups, plain.group_of(3), plain.length_deficits) == (1, 0, None)
        assert plain.lengths_of(0) is plain.lengths
        assert plain.head_groups(0) == (plain.layer(0),)
        with pytest.raises(ConfigError, match=r"build it with CacheConfig\(own_lengths=True\)"):
            plain.set_length(0, 0, 3)
    with pytest.raises(ConfigError, match="heads_per_range is 3; it must divide the 4 KV heads"):
        KVCacheManager(replace(SHAPE, num_kv_heads=4), host_driver, config=CacheConfig(heads_per_range=3))
    with pytest.raises(ConfigError, match="heads_per_range is for rows; the layout is blocks"):
        CacheConfig(layout=Layout.BLOCKS, heads_per_range=1)


def test_every_driver_call_may_fail_once() -> None:
    def build(driver: FaultyDriver) -> KVCacheManager:
        cache = KVCacheManager(SHAPE, driver, 200 * PAGE, config=CONFIG)
        compacted(cache)
        return cache

    def check_failed(cache: KVCacheManager, failed: bool) -> None:
        if failed:
            check(cache, 0, KEPT.__getitem__)

    assert fail_each_call(build, lambda cache: cache.set_length(0, 2, 7), check_failed) == 1


class LengthsMachine(RuleBasedStateMachine):
    """`model` maps each sequence to the tokens that each group holds: who wrote them, and where they stood."""

    @initialize()
    def start(self) -> None:
        self.host = HostDriver()
        self.cache = KVCacheManager(SHAPE, self.host, 120 * PAGE, config=replace(CONFIG, lookahead=None))
        self.model: dict[int, list[list[int]]] = {}
        self.kept: dict[RetainedSlot, list[list[int]]] = {}
        self.count = 0

    def draw(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.model)))

    def put(self, sequence: int, count: int) -> None:
        """New tokens at the end of each group; a token is known by its number."""
        slot, number = self.cache.slot_of(sequence), 100 * sequence
        for group, held in enumerate(self.model[sequence]):
            new = [number + len(held) + each for each in range(count)]
            for layer, part in places(self.cache, group):
                for tensor in parts(self.cache, layer)[part]:
                    tensor[slot, len(held) : len(held) + count] = torch.tensor(new)[:, None, None] + layer / 8
            held += new

    @rule(tokens=st.integers(1, 30))
    def admit(self, tokens: int) -> None:
        with contextlib.suppress(KVCacheOutOfMemory, NoFreeSlot):
            self.cache.admit(self.count, tokens)
            self.model[self.count] = [[] for _ in range(4)]
            self.put(self.count, tokens)
            self.count += 1

    @precondition(lambda self: self.model)
    @rule(data=st.data(), more=st.integers(1, 15))
    def extend(self, data: st.DataObject, more: int) -> None:
        sequence = self.draw(data)
        with contextlib.suppress(KVCacheOutOfMemory, SequenceTooLong):
            self.cache.extend(sequence, more)
            self.put(sequence, more)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), group=st.integers(0, 3))
    def set_length(self, data: st.DataObject, group: int) -> None:
        """A policy keeps some tokens of a group, in order."""
        sequence = self.draw(data)
        held = self.model[sequence][group]
        keep = sorted(data.draw(st.sets(st.integers(0, len(held) - 1), min_size=1)))
        slot = self.cache.slot_of(sequence)
        with contextlib.suppress(KVCacheOutOfMemory):
            self.cache.make_writable(sequence, 0)
            for layer, part in places(self.cache, group):
                for tensor in parts(self.cache, layer)[part]:
                    tensor[slot, : len(keep)] = tensor[slot, keep].clone()
            self.cache.set_length(sequence, group, len(keep))
            self.model[sequence][group] = [held[place] for place in keep]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), less=st.integers(0, 10))
    def truncate(self, data: st.DataObject, less: int) -> None:
        sequence = self.draw(data)
        groups = self.model[sequence]
        with contextlib.suppress(KVCacheOutOfMemory):
            try:
                self.cache.truncate(sequence, max(map(len, groups)) - less)
            except ConfigError:
                assert less >= min(map(len, groups))
            else:
                self.model[sequence] = [held[: len(held) - less] for held in groups]

    @precondition(lambda self: self.model and self.cache.free_slots())
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        self.cache.move(self.draw(data), data.draw(st.sampled_from(self.cache.free_slots())))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        sequence = self.draw(data)
        with contextlib.suppress(KVCacheOutOfMemory, NoFreeSlot):
            self.cache.fork(sequence, self.count, max(map(len, self.model[sequence])))
            self.model[self.count] = [list(held) for held in self.model[sequence]]
            self.count += 1

    @precondition(lambda self: self.model)
    @rule(data=st.data(), retains=st.booleans())
    def end(self, data: st.DataObject, retains: bool) -> None:
        sequence = self.draw(data)
        groups = self.model.pop(sequence)
        if retains:
            self.kept[self.cache.retain(sequence)] = groups
        else:
            self.cache.release(sequence)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        kept = data.draw(st.sampled_from(sorted(self.kept)))
        groups = self.kept.pop(kept)
        with contextlib.suppress(KVCacheOutOfMemory, PrefixEvicted, NoFreeSlot):
            self.cache.adopt(kept, self.count, max(map(len, groups)))
            self.model[self.count] = groups
            self.count += 1

    @rule()
    def map_ahead(self) -> None:
        self.cache.map_ahead()

    @invariant()
    def every_group_holds_its_tokens(self) -> None:
        self.cache.check_integrity()
        assert self.cache.length_deficits is not None
        for sequence, groups in self.model.items():
            slot = self.cache.slot_of(sequence)
            assert self.cache.lengths[slot] == max(map(len, groups))
            deficits = [max(map(len, groups)) - len(held) for held in groups]
            assert self.cache.length_deficits[:, slot].tolist() == deficits
            for group, held in enumerate(groups):
                for layer, part in places(self.cache, group):
                    for tensor in parts(self.cache, layer)[part]:
                        want = (torch.tensor(held)[:, None, None] + layer / 8).expand(-1, 1, SHAPE.head_dim)
                        assert torch.equal(tensor[slot, : len(held)], want)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()
            assert (self.host.live_mappings, self.host.live_handles, self.host.live_reservations) == (0, 0, 0)


def places(cache: KVCacheManager, group: int) -> list[tuple[int, int]]:
    """Layers and parts of their heads that are in a group."""
    return [
        (layer, part) for layer in range(SHAPE.num_layers) for part in range(2) if cache.group_of(layer, part) == group
    ]


TestLengthsMachine = LengthsMachine.TestCase
TestLengthsMachine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
