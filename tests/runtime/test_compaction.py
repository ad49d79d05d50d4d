"""Moves to lower slots beside slots that share: bytes stay, and who is read by others stays where it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from trtllm_vattn.cache.base import CacheShape, FlatKV
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import ConfigError, DriverError
from trtllm_vattn.runtime.compaction import Compaction
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import FaultyDriver

TOKENS = 96
"""Of each sequence: six pages of 16."""
REPLAY_S = {2: 1.0, 5: 2.0, 8: 4.0}


@pytest.fixture
def driver() -> Iterator[FaultyDriver]:
    inner = HostDriver()
    yield FaultyDriver(inner)
    inner.close()


@pytest.fixture
def cache(driver: FaultyDriver) -> Iterator[KVCacheManager]:
    """Sequences 0 to 7 in the slots 0 to 7: 5 reads its first tokens in the slot of 1, 6 shares pages with 0 as an
    alias and 7 as a fork; 2, 3 and 4 have gone."""
    shape = CacheShape(2, 1, 16, torch.float32, 8, 128)
    with KVCacheManager(shape, driver, lookahead=0) as made:
        made.set_budget(64 * driver.granularity())
        for number in range(5):
            assert made.admit(number, TOKENS) == number
            write(made, number, 0)
        assert made.admit(5, TOKENS, prefix=(1, 64)) == 5
        assert made.admit(6, TOKENS, alias=(0, 64)) == 6
        assert made.fork(0, 7, TOKENS) == 7
        for number in (5, 6):
            write(made, number, 64)
        for number in (2, 3, 4):
            made.release(number)
        yield made


def rows(cache: KVCacheManager, slot: int, start: int = 0, stop: int = TOKENS) -> torch.Tensor:
    """Keys and values of tokens of a slot, float32 ``[2 * layers, tokens, dim]``."""
    views = [cache.layer(layer) for layer in range(cache.shape.num_layers)]
    assert all(isinstance(each, FlatKV) for each in views)
    return torch.stack([kv[slot, start:stop, 0] for each in views for kv in (each.k, each.v)])  # type: ignore[union-attr]


def write(cache: KVCacheManager, sequence: int, start: int) -> None:
    slot = cache.slot_of(sequence)
    for layer in range(cache.shape.num_layers):
        views = cache.layer(layer)
        assert isinstance(views, FlatKV)
        for number, kv in enumerate((views.k, views.v)):
            kv[slot, start:TOKENS] = sequence + 1 + 0.25 * (2 * layer + number)


def contents(cache: KVCacheManager, sequence: int) -> torch.Tensor:
    """What a sequence's attention reads: its segments, and its own slot behind them."""
    slot, segments = cache.slot_of(sequence), cache.segments
    if sequence != 5:
        return rows(cache, slot)
    assert segments is not None
    (owner,) = (owner for holder, owner, *_ in segments.tolist() if holder == slot)
    return torch.cat([rows(cache, owner, stop=64), rows(cache, slot, start=64)], dim=1)


def test_who_shares_moves_and_who_is_read_stays(cache: KVCacheManager) -> None:
    before = {number: contents(cache, number) for number in cache.sequences}
    compaction = Compaction(cache, REPLAY_S)
    left = dict.fromkeys(map(cache.slot_of, cache.sequences), 1000)
    # All five go into five lanes; 1 stays in its slot, which 5 reads, and so does 0.
    moves = compaction.plan(left)
    assert moves == [(5, 2), (6, 3), (7, 4)]
    for source, target in moves:
        compaction.move(source, target)
        cache.check_integrity()
    assert cache.slot_of(1) == 1
    for number, want in before.items():
        assert torch.equal(contents(cache, number), want), number
    # What the moved ones write from now on is theirs.
    for number in (6, 7):
        cache.make_writable(number, 0)
        write(cache, number, 0)
    write(cache, 5, 64)
    for number in (0, 1, 5, 6, 7):
        own = rows(cache, cache.slot_of(number), 64 if number == 5 else 0)
        values = number + 1 + 0.25 * torch.arange(4).view(-1, 1, 1)
        assert torch.equal(own, values.expand_as(own)), number
    cache.check_integrity()


def test_nothing_moves_where_a_slot_that_others_read_would_have_to(cache: KVCacheManager) -> None:
    compaction = Compaction(cache, REPLAY_S)
    for number in (0, 6, 7):
        cache.release(number)
    # Three sequences would fit five lanes, but for the slot of 5, which is read.
    slot = cache.admit("reader", TOKENS, prefix=(5, 80))
    assert slot == 0
    left = dict.fromkeys(map(cache.slot_of, cache.sequences), 1000)
    assert compaction.plan(left) == []
    with pytest.raises(ConfigError, match="read the first"):
        compaction.move(5, 3)
    cache.check_integrity()
    # Retained, it reads still.
    retained = cache.retain("reader")
    del left[0]
    assert compaction.plan(left) == []
    cache.release_retained(retained)
    assert compaction.plan(left) != []


@pytest.mark.parametrize(("call", "skip"), [("map", 0), ("map", 1), ("set_access", 0)])
def test_a_driver_that_fails_leaves_everybody_where_it_is(
    cache: KVCacheManager, driver: FaultyDriver, call: str, skip: int
) -> None:
    before = {number: contents(cache, number) for number in cache.sequences}
    slots = {number: cache.slot_of(number) for number in cache.sequences}
    compaction = Compaction(cache, REPLAY_S)
    expected = compaction.seconds_per_mapping
    driver.fail(call, skip=skip)
    with pytest.raises(DriverError):
        compaction.move(6, 3)
    cache.check_integrity()
    assert {number: cache.slot_of(number) for number in cache.sequences} == slots
    assert all(torch.equal(contents(cache, number), want) for number, want in before.items())
    assert (compaction.moves, compaction.seconds_per_mapping) == (0, 2 * expected)
    compaction.move(6, 3)
    assert torch.equal(contents(cache, 6), before[6])
