"""Pinned host memory and copies, over both drivers."""

from __future__ import annotations

import ctypes

import pytest

from trtllm_vattn.errors import DriverError
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.owners import Extent, Reservation
from trtllm_vattn.vmm.wrappers import CountingDriver, FaultyDriver


def test_bytes_go_out_and_come_back_across_mappings(driver: CountingDriver) -> None:
    size = driver.granularity()
    reservation = Reservation(driver, 3 * size)
    extents = [Extent(driver, size) for _ in range(2)]
    mappings = reservation.map(0, extents)
    host = driver.create_host(2 * size)
    pattern = bytes(range(256)) * (2 * size // 256)
    ctypes.memmove(host, pattern, 2 * size)
    driver.copy_to_device(reservation.base, host, 2 * size, 0)
    driver.record(0).wait()
    ctypes.memset(host, 0, 2 * size)
    driver.copy_to_host(host + 100, reservation.base + 100, size, 0)
    driver.record(0).wait()
    assert ctypes.string_at(host, 2 * size) == bytes(100) + pattern[100 : size + 100] + bytes(size - 100)
    assert (driver.calls["copy_to_device"], driver.calls["copy_to_host"]) == (1, 1)
    driver.release_host(host, 2 * size)
    for owner in (*mappings, *extents, reservation):
        owner.close()


def test_the_host_driver_refuses_copies_of_what_is_not_there(host_driver: HostDriver) -> None:
    size = host_driver.granularity()
    reservation, extent = Reservation(host_driver, 3 * size), Extent(host_driver, size)
    (mapping,) = reservation.map(size, [extent])
    host = host_driver.create_host(size)
    inside, outside = reservation.base + size, reservation.base
    for call in (
        lambda: host_driver.copy_to_host(host, outside, size, 0),
        lambda: host_driver.copy_to_host(host, inside + 1, size, 0),
        lambda: host_driver.copy_to_device(inside, host + 1, size, 0),
        lambda: host_driver.release_host(host, size - 1),
    ):
        with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_VALUE"):
            call()
    assert host_driver.live_host_bytes == size
    host_driver.release_host(host, size)
    assert host_driver.live_host_bytes == 0
    for owner in (mapping, extent, reservation):
        owner.close()


@pytest.mark.parametrize("name", ["create_host", "release_host", "copy_to_host", "copy_to_device"])
def test_each_of_its_calls_can_be_failed(host_driver: HostDriver, name: str) -> None:
    driver = FaultyDriver(host_driver)
    driver.fail(name)
    with pytest.raises(DriverError, match=f"{name}.*injected"):
        getattr(driver, name)(*range(1, 2 + (name == "release_host") + 3 * name.startswith("copy")))


def test_a_driver_without_copies_says_so() -> None:
    class Nothing(Driver):
        device = "cpu"
        granularity = reserve = free = create = release = map = set_access = unmap = record = None  # type: ignore

    with pytest.raises(DriverError, match="NOT_SUPPORTED"):
        Nothing().create_host(1)
