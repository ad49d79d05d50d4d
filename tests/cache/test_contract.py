"""What every cache promises (cache/base.py, C1 to C5), over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from contents import admit, expect, fill

from trtllm_vattn.cache.base import CacheShape, FlatKV, KVCache
from trtllm_vattn.cache.paged import PagedCache
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import (
    ConfigError,
    DuplicateSequence,
    KVCacheOutOfMemory,
    ManagerClosed,
    NoFreeSlot,
    SequenceTooLong,
    UnknownSequence,
    VattnError,
)


def after(cache: KVCache, **lengths: int) -> np.ndarray:
    """Lengths by slot for `prepare_step`."""
    step = np.zeros(cache.shape.num_slots, np.int64)
    for sequence, length in lengths.items():
        step[cache.slot_of(sequence)] = length
    return step


def test_sequences_hold_what_was_written_while_others_come_and_go(cache: KVCache) -> None:
    admit(cache, "a", 11)
    admit(cache, "b", 30)
    cache.prepare_step(after(cache, a=12, b=31))
    fill(cache, "a", range(11, 12))
    cache.release("b")
    admit(cache, "c", 50)
    cache.extend("a", 20)
    fill(cache, "a", range(12, 32))
    cache.map_ahead()
    expect(cache, "a", range(32))
    expect(cache, "c", range(50))
    cache.check_integrity()


def test_every_position_below_the_frontier_is_backed_in_every_layer(cache: KVCache) -> None:
    cache.admit("a", 17)
    frontier = int(cache.frontiers[cache.slot_of("a")])
    assert frontier >= 17
    fill(cache, "a", range(frontier))
    expect(cache, "a", range(frontier))


def test_views_stay_the_same_objects_at_the_same_addresses(cache: KVCache) -> None:
    before = [cache.layer(layer) for layer in range(4)]
    addresses = [(kv.k.data_ptr(), kv.v.data_ptr()) for kv in before]
    cache.admit("a", 50)
    cache.release("a")
    cache.admit("b", 3)
    assert all(cache.layer(layer) is kv for layer, kv in enumerate(before))
    assert [(kv.k.data_ptr(), kv.v.data_ptr()) for kv in before] == addresses
    held = {tensor.untyped_storage().data_ptr() for tensor in cache.storages()}
    assert {tensor.untyped_storage().data_ptr() for kv in before for tensor in (kv.k, kv.v)} <= held


def test_the_dummy_slot_takes_a_token_at_any_time(cache: KVCache) -> None:
    kv = cache.layer(3)
    if isinstance(kv, FlatKV):
        assert kv.k.shape == (5, 50, 2, 24)
        kv.k[cache.dummy_slot, 0] = 5.0
        assert bool((kv.k[cache.dummy_slot, 0] == 5.0).all())
    else:
        (dummy,) = set(kv.table[cache.dummy_slot].tolist())
        kv.k[dummy, 0] = 5.0
        assert bool((kv.k[dummy, 0] == 5.0).all())


def test_truncating_keeps_the_memory_and_what_is_left(cache: KVCache) -> None:
    admit(cache, "a", 40)
    frontier = cache.frontiers.copy()
    cache.truncate("a", 13)
    assert cache.lengths[cache.slot_of("a")] == 13
    assert (cache.frontiers == frontier).all()
    expect(cache, "a", range(40))
    cache.extend("a", 1)
    cache.check_integrity()


def test_stats_count_live_bytes(cache: KVCache) -> None:
    assert cache.stats().live_bytes == cache.stats().sequences == 0
    cache.admit("a", 10)
    cache.admit("b", 7)
    stats = cache.stats()
    assert stats.sequences == 2
    assert stats.live_bytes == 17 * cache.shape.token_bytes
    assert stats.live_bytes <= stats.mapped_bytes <= stats.held_bytes
    cache.release("a")
    assert cache.stats().live_bytes == 7 * cache.shape.token_bytes


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.admit("a", 3), DuplicateSequence, "'a' is in slot 0 already; release it"),
        (lambda c: c.admit("x", 51), SequenceTooLong, "'x' would have 51 tokens of a max_seq_len of 50"),
        (lambda c: c.admit("x", 0), ConfigError, "has 0 tokens; at least 1"),
        (lambda c: c.extend("x", 1), UnknownSequence, "no sequence 'x' in the cache, which holds 1; admit it"),
        (lambda c: c.extend("a", 41), SequenceTooLong, "'a' would have 51 tokens"),
        (lambda c: c.extend("a", -1), ConfigError, "by -1 tokens; use truncate"),
        (lambda c: c.truncate("a", 11), ConfigError, "has 10 tokens; it can be truncated to between 1"),
        (lambda c: c.truncate("a", 0), ConfigError, "not to 0"),
        (lambda c: c.truncate("x", 1), UnknownSequence, "no sequence 'x'"),
        (lambda c: c.release("x"), UnknownSequence, "no sequence 'x'"),
        (lambda c: c.prepare_step(after(c, a=9)), ConfigError, r"slots \[0\] would become shorter; use truncate"),
        (lambda c: c.prepare_step(after(c, a=51)), SequenceTooLong, "'a' would have 51 tokens"),
        (lambda c: c.prepare_step(np.array([0, 5, 0, 0])), UnknownSequence, r"slots \[1\] hold no sequence"),
        (lambda c: c.prepare_step(np.zeros(3, np.int64)), ConfigError, r"shape \(3,\); one entry a slot"),
        (lambda c: c.layer(4), ConfigError, "layer 4 asked for; the cache has layers 0 to 3"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(
    cache: KVCache, call: Callable[[KVCache], object], error: type[VattnError], message: str
) -> None:
    admit(cache, "a", 10)
    before = (cache.stats(), cache.lengths.tolist(), cache.frontiers.tolist())
    with pytest.raises(error, match=message):
        call(cache)
    assert (cache.stats(), cache.lengths.tolist(), cache.frontiers.tolist()) == before
    expect(cache, "a", range(10))
    cache.check_integrity()


def test_a_full_house_is_refused(cache: KVCache) -> None:
    for sequence in range(4):
        cache.admit(sequence, 5)
    with pytest.raises(NoFreeSlot, match="found all 4 slots taken"):
        cache.admit("more", 1)
    cache.release(2)
    assert cache.admit("more", 1) == 2


def test_a_closed_cache_refuses_everything_and_closes_again(cache: KVCache) -> None:
    cache.admit("a", 10)
    cache.close()
    cache.close()
    calls: list[Callable[[], object]] = [
        lambda: cache.admit("b", 1),
        lambda: cache.extend("a", 1),
        lambda: cache.truncate("a", 1),
        lambda: cache.release("a"),
        lambda: cache.prepare_step(np.zeros(4, np.int64)),
        lambda: cache.layer(0),
        lambda: cache.stats(),
        lambda: cache.check_integrity(),
    ]
    for call in calls:
        with pytest.raises(ManagerClosed, match="build another"):
            call()


def test_memory_that_runs_out_takes_nothing_and_serves_what_fits(small: Callable[[int], KVCache]) -> None:
    cache = small(384)
    admit(cache, "a", 160)
    before = cache.stats()
    with pytest.raises(KVCacheOutOfMemory):
        cache.admit("b", 320)
    assert cache.stats() == before
    cache.admit("b", 128)
    lengths, frontiers = cache.lengths.copy(), cache.frontiers.copy()
    with pytest.raises(KVCacheOutOfMemory):
        cache.prepare_step(after(cache, a=320, b=320))
    assert (cache.lengths == lengths).all()
    assert (cache.frontiers == frontiers).all()
    cache.release("b")
    cache.prepare_step(after(cache, a=320))
    expect(cache, "a", range(160))
    cache.check_integrity()


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "head_dim", "num_slots", "max_seq_len"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_a_shape_of_nothing_is_refused(name: str, value: float) -> None:
    shape = CacheShape(1, 1, 8, torch.float32, 1, 8)
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        replace(shape, **{name: value})


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16", None])
def test_a_dtype_that_cannot_hold_keys_is_refused(dtype: object) -> None:
    with pytest.raises(ConfigError, match=r"dtype is .*; K and V are of a floating-point torch dtype"):
        CacheShape(1, 1, 8, dtype, 1, 8)  # type: ignore[arg-type]


def test_a_shape_with_three_roles_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_factor is 3"):
        CacheShape(1, 1, 8, torch.float32, 1, 8, kv_factor=3)


def test_bad_settings_of_a_cache_are_refused() -> None:
    shape = CacheShape(4, 1, 8, torch.float32, 1, 8)
    with pytest.raises(
        ConfigError, match="no cache 'orca'; there are contiguous, paged, paged-64, token, published, vattn"
    ):
        make_cache("orca", shape, "cpu")
    with pytest.raises(ConfigError, match="a contiguous cache of 1 slots takes 2,048 bytes, the budget is 5"):
        make_cache("contiguous", shape, "cpu", 5)
    with pytest.raises(ConfigError, match="num_blocks is 0"):
        make_cache("paged", shape, "cpu", 5)
    with pytest.raises(ConfigError, match="block_size is 0"):
        PagedCache(shape, "cpu", block_size=0)
    with pytest.raises(
        ConfigError, match=r"budget of 8,192 bytes is smaller than the least that can be mapped in each of 4 ranges"
    ):
        make_cache("vattn", shape, "cpu", 8192, layers_per_range=1)
    with pytest.raises(ConfigError, match="lookahead is -1"):
        make_cache("vattn", shape, "cpu", lookahead=-1)
    with pytest.raises(ConfigError, match="must divide the 4 layers"):
        make_cache("vattn", shape, "cpu", 1 << 20, layers_per_range=3)
