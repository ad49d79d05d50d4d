"""Pinned host memory: bounded, pinned when it is needed, in blocks that do not fragment."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_vattn.errors import DriverError, HostMemoryFull
from trtllm_vattn.memory import host_pool
from trtllm_vattn.memory.host_pool import HostPool
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import CountingDriver, FaultyDriver

BLOCK = 4 * 4096


@pytest.fixture
def driver(host_driver: HostDriver, monkeypatch: pytest.MonkeyPatch) -> CountingDriver:
    """Chunks of three blocks."""
    monkeypatch.setattr(host_pool, "CHUNK", 3 * BLOCK + 5)
    return CountingDriver(host_driver)


def test_nothing_is_pinned_before_it_is_needed_and_nothing_beyond_the_bound(driver: CountingDriver) -> None:
    pool = HostPool(driver, 8 * BLOCK + 100)
    assert (pool.held_bytes, pool.available_bytes) == (0, 8 * BLOCK)
    first = pool.acquire(BLOCK + 1)
    assert (pool.held_bytes, pool.used_bytes) == (3 * BLOCK, 2 * BLOCK)
    pool.acquire(6 * BLOCK)
    assert pool.held_bytes == 8 * BLOCK
    with pytest.raises(HostMemoryFull, match="1 bytes of host memory asked for, 0 left of"):
        pool.acquire(1)
    pool.release(first)
    assert pool.available_bytes == 2 * BLOCK
    assert pool.acquire(2 * BLOCK) == first
    assert driver.calls["create_host"] == 3
    pool.close()
    assert driver.calls["release_host"] == 3
    assert pool.held_bytes == 0


def test_neighbours_are_one_span_but_never_across_allocations(driver: CountingDriver) -> None:
    pool = HostPool(driver, 9 * BLOCK)
    spans = pool.acquire(9 * BLOCK)
    assert [size for _, size in spans] == [3 * BLOCK] * 3
    pool.release(spans)
    assert [size for _, size in pool.acquire(2 * BLOCK)] == [2 * BLOCK]
    pool.close()


@given(sizes=st.lists(st.integers(1, 5 * BLOCK), max_size=12), seed=st.integers(0, 99))
def test_whatever_is_taken_and_given_back_is_disjoint(sizes: list[int], seed: int) -> None:
    order = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_pool, "CHUNK", 3 * BLOCK)
        host = HostDriver()
        pool = HostPool(host, 20 * BLOCK)
        taken: list[list[host_pool.Span]] = []
        for size in sizes:
            if size > pool.available_bytes:
                pool.release(taken.pop(order.randrange(len(taken))))
            if size <= pool.available_bytes:
                taken.append(pool.acquire(size))
                assert size <= sum(span.size for span in taken[-1]) < size + BLOCK
            blocks = [b for spans in taken for at, n in spans for b in range(at, at + n, BLOCK)]
            assert len(set(blocks)) == len(blocks) == pool.used_bytes // BLOCK
        pool.close()
        assert host.live_host_bytes == 0
        host.close()


def test_a_failed_pinning_changes_nothing(host_driver: HostDriver) -> None:
    driver = FaultyDriver(host_driver)
    pool = HostPool(driver, 4 * BLOCK)
    driver.fail("create_host")
    with pytest.raises(DriverError, match="injected"):
        pool.acquire(BLOCK)
    assert (pool.held_bytes, pool.used_bytes) == (0, 0)
    pool.acquire(BLOCK)
    driver.fail("release_host")
    with pytest.raises(DriverError):
        pool.close()
    assert pool.held_bytes == 4 * BLOCK
    pool.close()
    assert host_driver.live_host_bytes == 0
