from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest

from trtllm_vattn.errors import ConfigError, DriverError, InvariantViolation, KVCacheOutOfMemory, MemoryQuarantined
from trtllm_vattn.memory.pool import ExtentPool
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.owners import Extent, Reservation
from trtllm_vattn.vmm.wrappers import CountingDriver, FaultyDriver

G = 4096


class LendingPool(ExtentPool):
    """Knows what it has lent, so that a test need not give it back."""

    def __init__(self, driver: Driver, budget: int) -> None:
        super().__init__(driver, budget)
        self.lent: dict[int, Extent] = {}

    def acquire(self, size: int, ahead: bool = False) -> list[Extent]:
        taken = super().acquire(size, ahead)
        self.lent.update({extent.serial: extent for extent in taken})
        return taken

    def release(self, extents: Iterable[Extent]) -> None:
        for extent in list(extents):
            super().release([extent])
            self.lent.pop(extent.serial, None)


@pytest.fixture
def make_pool() -> Iterator[Callable[[Driver, int], LendingPool]]:
    made: list[LendingPool] = []

    def make(driver: Driver, budget: int) -> LendingPool:
        made.append(LendingPool(driver, budget))
        return made[-1]

    yield make
    for pool in made:
        pool.release(pool.lent.values())
        pool.close()


MakePool = Callable[[Driver, int], LendingPool]


def test_take_answers_with_the_fewest_extents_largest_first(host_driver: HostDriver, make_pool: MakePool) -> None:
    pool = make_pool(host_driver, 1024 * G)
    assert [extent.size // G for extent in pool.acquire(300 * G)] == [128, 128, 32, 8, 4]
    pool.release(pool.acquire(0))
    assert [extent.size // G for extent in pool.acquire(5 * G - 1)] == [4, 1]
    assert pool.held_bytes == 305 * G


def test_a_class_never_exceeds_128_times_the_granularity(host_driver: HostDriver, make_pool: MakePool) -> None:
    pool = make_pool(host_driver, 1024 * G)
    assert {extent.size for extent in pool.acquire(512 * G)} == {128 * G}


def test_stock_goes_out_in_creation_order(host_driver: HostDriver, make_pool: MakePool) -> None:
    pool = make_pool(host_driver, 64 * G)
    first = [pool.acquire(G)[0] for _ in range(4)]
    pool.release([first[2], first[0], first[3], first[1]])
    assert [pool.acquire(G)[0].serial for _ in range(4)] == [extent.serial for extent in first]


def test_stock_is_reused_without_a_driver_call(host_driver: HostDriver, make_pool: MakePool) -> None:
    counting = CountingDriver(host_driver)
    pool = make_pool(counting, 64 * G)
    pool.release(pool.acquire(7 * G))
    before = counting.calls["create"]
    pool.release(pool.acquire(7 * G))
    assert counting.calls["create"] == before == 3


def test_stock_of_other_classes_is_converted_under_pressure(host_driver: HostDriver, make_pool: MakePool) -> None:
    pool = make_pool(host_driver, 8 * G)
    pool.release([pool.acquire(G)[0] for _ in range(8)])
    assert [extent.size for extent in pool.free_extents()] == 8 * [G]
    (large,) = pool.acquire(8 * G)
    assert large.size == 8 * G
    assert pool.held_bytes == 8 * G
    assert pool.available_bytes == 0


def test_out_of_pages_takes_nothing_and_says_what_there_is(host_driver: HostDriver, make_pool: MakePool) -> None:
    pool = make_pool(host_driver, 8 * G)
    pool.acquire(5 * G)
    with pytest.raises(KVCacheOutOfMemory, match=r"16,384 bytes asked for, 12,288 left of a budget of 32,768"):
        pool.acquire(4 * G)
    assert pool.available_bytes == 3 * G
    assert sum(extent.size for extent in pool.acquire(3 * G)) == 3 * G


def test_a_device_without_memory_is_out_of_pages(make_pool: MakePool) -> None:
    pool = make_pool(HostDriver(granularity=G, capacity=4 * G), 64 * G)
    with pytest.raises(KVCacheOutOfMemory, match="the device has no memory"):
        pool.acquire(4 * G + 2 * G)
    assert pool.available_bytes == 64 * G
    assert sum(extent.size for extent in pool.acquire(3 * G)) == 3 * G


def test_a_failed_create_gives_back_what_was_taken(host_driver: HostDriver, make_pool: MakePool) -> None:
    driver = FaultyDriver(host_driver)
    pool = make_pool(driver, 64 * G)
    driver.fail("create", skip=1)
    with pytest.raises(DriverError):
        pool.acquire(3 * G)
    assert pool.available_bytes == 64 * G
    assert len(pool.free_extents()) == 1
    assert [extent.size // G for extent in pool.acquire(3 * G)] == [2, 1]


def test_a_failed_release_is_quarantined_and_retried_at_close(host_driver: HostDriver, make_pool: MakePool) -> None:
    driver = FaultyDriver(host_driver)
    pool = make_pool(driver, 8 * G)
    pool.release(pool.acquire(7 * G))
    driver.fail("release")
    with pytest.raises(MemoryQuarantined, match=r"1 extents of .* bytes could not be released; call close\(\) again"):
        pool.close()
    assert len(pool.quarantine) == 1
    assert pool.held_bytes == pool.quarantine[0].size
    pool.close()
    assert pool.held_bytes == 0
    pool.close()


def test_a_mapped_extent_is_not_taken_back(host_driver: HostDriver, make_pool: MakePool) -> None:
    pool = make_pool(host_driver, 8 * G)
    reservation = Reservation(host_driver, 8 * G)
    extents = pool.acquire(G)
    (mapping,) = reservation.map(0, extents)
    with pytest.raises(InvariantViolation, match="1 mappings"):
        pool.release(extents)
    mapping.close()
    reservation.close()


def test_a_budget_below_the_granularity_is_refused(host_driver: HostDriver) -> None:
    with pytest.raises(ConfigError, match="less than the driver's granularity of 4,096"):
        ExtentPool(host_driver, G - 1)


def test_extents_that_were_created_for_prompts_are_not_taken_to_map_ahead(
    host_driver: HostDriver, make_pool: MakePool
) -> None:
    pool = make_pool(host_driver, 4 * G)
    pool.set_targets({G: 2})
    while pool.create_one():
        pass
    kept = [extent.serial for extent in pool.free_extents()]
    ahead = pool.acquire(G, ahead=True) + pool.acquire(G, ahead=True)
    assert not {extent.serial for extent in ahead} & set(kept)
    with pytest.raises(KVCacheOutOfMemory, match="the free extents of 4,096 bytes are kept for prompts"):
        pool.acquire(G, ahead=True)
    # Who needs memory gets it; what is free beyond the targets is anybody's.
    assert [pool.acquire(G)[0].serial for _ in range(2)] == kept
    pool.set_targets({})
    pool.release(ahead)
    assert len(pool.acquire(G, ahead=True)) == 1
