"""Compaction: what is kept is at the front, positions stay, and the memory behind goes back behind a fence."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from failing import fail_each_call
from shapes import SHAPE

from trtllm_vattn.cache.base import FlatKV
from trtllm_vattn.cache.compression import Compacted, compact
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import ConfigError, KVCacheOutOfMemory, NoFreeSlot, SequenceTooLong
from trtllm_vattn.graphs.guard import Guard
from trtllm_vattn.memory.reclaim import trim
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import FaultyDriver

PAGE = 4096
CONFIG = CacheConfig(extent_classes=1, lookahead=0, layers_per_range=2, heads_per_range=1, own_lengths=True)
"""Four ranges, of two layers and one head each; 384 bytes a token."""
LONG = replace(SHAPE, max_seq_len=2000)
Held = list[list[list[int]]]
"""By layer and head: the position of each token that is held."""


def tensors(cache: KVCacheManager, layer: int, head: int) -> list[torch.Tensor]:
    """K and V ``[slots, tokens, head_dim]`` of one head."""
    parts = [each for each in cache.head_groups(layer) if isinstance(each, FlatKV)]
    part, within = divmod(head, SHAPE.num_kv_heads // len(parts))
    return [parts[part].k[:, :, within], parts[part].v[:, :, within]]


def put(cache: KVCacheManager, sequence: int, author: int, held: Held, positions: range) -> None:
    """New tokens, behind what each head holds."""
    slot = cache.slot_of(sequence)
    for layer, heads in enumerate(held):
        for head, there in enumerate(heads):
            for number, tensor in enumerate(tensors(cache, layer, head)):
                new = 1e4 * author + torch.tensor(positions) + layer / 8 + head / 32 + number / 64
                tensor[slot, len(there) : len(there) + len(positions)] = new[:, None]
            there += positions


def expect(cache: KVCacheManager, sequence: int, author: int, held: Held) -> None:
    slot, deficits = cache.slot_of(sequence), cache.length_deficits
    assert deficits is not None
    for layer, heads in enumerate(held):
        for head, there in enumerate(heads):
            group = cache.group_of(layer, head * cache.layout.head_groups // SHAPE.num_kv_heads)
            assert cache.lengths_of(group)[slot] == len(there)
            assert deficits[group, slot] == cache.lengths[slot] - len(there)
            for number, tensor in enumerate(tensors(cache, layer, head)):
                want = 1e4 * author + torch.tensor(there) + layer / 8 + head / 32 + number / 64
                assert torch.equal(tensor[slot, : len(there)], want[:, None].expand(-1, SHAPE.head_dim))


def nothing() -> Held:
    return [[[] for _ in range(SHAPE.num_kv_heads)] for _ in range(SHAPE.num_layers)]


def admitted(cache: KVCacheManager, tokens: int, sequence: int = 0) -> Held:
    held = nothing()
    cache.admit(sequence, tokens)
    put(cache, sequence, sequence, held, range(tokens))
    return held


def every(kept: list[int]) -> list[list[torch.Tensor]]:
    """The same places of every layer and head."""
    return [[torch.tensor(kept) for _ in range(SHAPE.num_kv_heads)] for _ in range(SHAPE.num_layers)]


def after(held: Held, done: Compacted) -> Held:
    """What is held behind a compaction."""
    rows = [[row.tolist() for part in parts for row in part] for parts in done.places]
    return [
        [[there[place] for place in row] for there, row in zip(heads, layer, strict=True)]
        for heads, layer in zip(held, rows, strict=True)
    ]


def test_a_sequence_goes_on_at_its_positions_behind_what_is_kept(host_driver: HostDriver) -> None:
    with KVCacheManager(LONG, host_driver, 800 * PAGE, config=CONFIG) as cache:
        guard = Guard(cache)
        held = admitted(cache, 1000)
        addresses = [tensor.data_ptr() for tensor in tensors(cache, 3, 1)]
        before = cache.stats().mapped_bytes
        done = compact(cache, 0, every([0, *range(0, 1000, 10)][1:]))
        held = after(held, done)
        assert held[2][1] == list(range(0, 1000, 10))
        assert cache.lengths[0] == 1000
        expect(cache, 0, 0, held)
        assert done.evicted_bytes == 900 * SHAPE.token_bytes
        assert done.returned_bytes == before - cache.stats().mapped_bytes >= 0.95 * done.evicted_bytes
        # Behind its fence it is in the pool.
        cache.map_ahead()
        assert cache.arena.pool.free_bytes + PAGE * 800 - cache.held_bytes >= done.returned_bytes
        cache.extend(0, 50)
        put(cache, 0, 0, held, range(1000, 1050))
        expect(cache, 0, 0, held)
        assert cache.lengths[0] == 1050
        guard.check_chunk(0, 1050, 1000)
        assert [tensor.data_ptr() for tensor in tensors(cache, 3, 1)] == addresses
        # A second time, other places of each head.
        random = np.random.default_rng(0)
        kept = [[torch.tensor(sorted(random.choice(150, 40 + head, False))) for head in range(2)] for _ in range(4)]
        held = after(held, compact(cache, 0, kept))
        assert [len(held[0][head]) for head in range(2)] == [40, 41]
        expect(cache, 0, 0, held)
        assert cache.stats().live_bytes == sum(len(h) for heads in held for h in heads) * 2 * 24 * 4
        cache.check_integrity()


def test_a_head_that_keeps_less_gives_back_what_has_a_range_of_its_own(host_driver: HostDriver) -> None:
    """One head of two keeps everything."""
    kept = [[torch.arange(1000), torch.tensor([0, 999])] for _ in range(SHAPE.num_layers)]
    for heads_per_range, share in ((1, 0.95), (None, 0.0)):
        config = replace(CONFIG, heads_per_range=heads_per_range)
        with KVCacheManager(LONG, host_driver, 900 * PAGE, config=config) as cache:
            held = admitted(cache, 1000)
            done = compact(cache, 0, kept)
            assert done.evicted_bytes == 998 * SHAPE.token_bytes // 2
            assert share * done.evicted_bytes <= done.returned_bytes <= (done.evicted_bytes if share else 0)
            # Rows that cannot go hold their tokens.
            held = after(held, done)
            assert held[0][1] == ([0, 999] if share else list(range(1000)))
            expect(cache, 0, 0, held)


def test_what_came_before_cannot_be_gone_back_to(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 200 * PAGE, config=CONFIG) as cache:
        held = after(admitted(cache, 40), compact(cache, 0, every([1, 5, 39])))
        cache.extend(0, 5)
        put(cache, 0, 0, held, range(40, 45))
        says = "were evicted when it had 40"
        with pytest.raises(ConfigError, match=says):
            cache.truncate(0, 39)
        with pytest.raises(ConfigError, match=says):
            cache.roll_back(np.array([39, 0, 0, 0]))
        with pytest.raises(ConfigError, match=says):
            cache.fork(0, 1, 39)
        with pytest.raises(ConfigError, match=says):
            cache.set_length(0, 0, 2)
        with pytest.raises(ConfigError, match="nobody can begin with it; release it"):
            cache.retain(0)
        cache.truncate(0, 42)
        held = [[there[:5] for there in heads] for heads in held]
        expect(cache, 0, 0, held)
        cache.fork(0, 1, 42)
        expect(cache, 1, 0, held)
        with pytest.raises(ConfigError, match="were evicted when it had 40"):
            cache.truncate(1, 39)
        cache.release(0)
        cache.release(1)
        admitted(cache, 40, 2)
        cache.truncate(2, 1)


def test_wrong_places_are_refused_and_change_nothing(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 200 * PAGE, config=CONFIG) as cache:
        held = admitted(cache, 40)
        for kept, says in (
            ([3, 3], "do not ascend"),
            ([5, 2], "do not ascend"),
            ([-1, 2], "do not ascend"),
            ([2, 40], "lie behind its tokens"),
        ):
            rows = [[torch.tensor([kept]) for _ in range(2)] for _ in range(4)]
            with pytest.raises(ConfigError, match=says):
                cache.keep_places(0, rows)
        with pytest.raises(ConfigError, match="places are for 4 layers, of 2 parts"):
            cache.keep_places(0, rows[:3])
        with pytest.raises(ConfigError, match=r"are torch.float32 \[1, 2\]; give int64 \[1, tokens\]"):
            cache.keep_places(0, [[each.float() for each in row] for row in rows])
        uneven = [[torch.tensor([list(range(1 + layer))]) for _ in range(2)] for layer in range(4)]
        with pytest.raises(ConfigError, match="as many in each layer and head of a range"):
            cache.keep_places(0, uneven)
        expect(cache, 0, 0, held)
        cache.admit(1, 40, prefix=(0, 30))
        with pytest.raises(ConfigError, match="read the first 30 tokens of slot 0"):
            compact(cache, 0, every([1]))
        with pytest.raises(ConfigError, match="lie in other slots"):
            compact(cache, 1, every([1]))
        expect(cache, 0, 0, held)
    with KVCacheManager(SHAPE, host_driver, 200 * PAGE) as plain:
        plain.admit(0, 3)
        with pytest.raises(ConfigError, match="own_lengths=True"):
            compact(plain, 0, every([1]))


@pytest.mark.parametrize("shares", [False, True])
def test_every_driver_call_may_fail_once(shares: bool) -> None:
    """With shared extents the sequence gets memory of its own first."""

    def build(driver: FaultyDriver) -> KVCacheManager:
        cache = KVCacheManager(SHAPE, driver, 200 * PAGE, config=CONFIG)
        admitted(cache, 25)
        if shares:
            cache.fork(0, 1, 25)
        return cache

    whole = [[list(range(25)) for _ in range(2)] for _ in range(4)]
    kept = [[[0, 7, 24] for _ in range(2)] for _ in range(4)]

    def check(cache: KVCacheManager, failed: bool) -> None:
        expect(cache, 0, 0, whole if failed else kept)
        if shares:
            expect(cache, 1, 0, whole)
        cache.map_ahead()
        cache.check_integrity()

    raised = fail_each_call(build, lambda cache: compact(cache, 0, every([0, 7, 24])), check)
    assert raised > 1 if shares else raised == 1


def test_rows_of_eight_bits_move(host_driver: HostDriver) -> None:
    shape = replace(SHAPE, dtype=torch.float8_e4m3fn)
    with KVCacheManager(shape, host_driver, 200 * PAGE, config=CONFIG) as cache:
        cache.admit(0, 40)
        kv = cache.head_groups(1)[1]
        kv.k[0, :40].view(torch.uint8).copy_(torch.arange(40)[:, None, None].expand(-1, 1, 24))
        compact(cache, 0, every([2, 3, 30]))
        assert kv.k[0, :3, 0, 5].view(torch.uint8).tolist() == [2, 3, 30]


def test_a_random_life() -> None:
    """Sequences come, grow, are compacted, forked, moved, suspended and end; each head holds what it should."""
    random, host = np.random.default_rng(7), HostDriver()
    shape = replace(SHAPE, max_seq_len=120)
    config = replace(CONFIG, lookahead=None, host_memory=1 << 20)
    model: dict[int, tuple[int, Held]] = {}
    count = compacted = 0
    with KVCacheManager(shape, host, 150 * PAGE, config=config) as cache:
        for _ in range(110):
            act = random.choice(["admit", "extend", "compact", "compact", "fork", "move", "suspend", "end", "ahead"])
            chosen = int(random.choice(sorted(model))) if model else -1
            with contextlib.suppress(KVCacheOutOfMemory, NoFreeSlot, SequenceTooLong):
                if act == "admit":
                    model[count] = count, admitted(cache, int(random.integers(1, 60)), count)
                elif act == "ahead":
                    cache.map_ahead()
                    trim(cache.arena)
                elif chosen < 0:
                    continue
                elif act == "extend":
                    length, more = int(cache.lengths[cache.slot_of(chosen)]), int(random.integers(1, 20))
                    cache.extend(chosen, more)
                    put(cache, chosen, *model[chosen], range(length, length + more))
                elif act == "compact":
                    author, held = model[chosen]
                    kept = [[_some(random, len(there)) for there in heads] for heads in held]
                    model[chosen] = author, after(held, compact(cache, chosen, kept))
                    compacted += 1
                elif act == "fork":
                    cache.fork(chosen, count, int(cache.lengths[cache.slot_of(chosen)]))
                    author, held = model[chosen]
                    model[count] = author, [[list(there) for there in heads] for heads in held]
                elif act == "move" and cache.free_slots():
                    cache.move(chosen, int(random.choice(cache.free_slots())))
                elif act == "suspend":
                    cache.suspend(chosen)
                    cache.resume(chosen)
                elif act == "end":
                    cache.release(chosen)
                    del model[chosen]
            count += 1
            cache.check_integrity()
            for sequence, (author, held) in model.items():
                expect(cache, sequence, author, held)
    assert compacted > 10
    assert (host.live_mappings, host.live_handles, host.live_reservations) == (0, 0, 0)


def _some(random: np.random.Generator, held: int) -> torch.Tensor:
    return torch.tensor(sorted(random.choice(held, int(random.integers(1, held + 1)), replace=False)))
