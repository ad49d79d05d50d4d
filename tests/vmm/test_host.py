from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
from collections.abc import Callable

import pytest

from trtllm_vattn.errors import AddressSpaceExhausted, ConfigError, DriverError
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.owners import Reservation

RunApart = Callable[..., subprocess.CompletedProcess[str]]

READ_UNMAPPED = """
import sys
import torch
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.owners import Extent, Reservation
from trtllm_vattn.vmm.tensors import tensor_at

driver = open_driver(sys.argv[1])
granularity = driver.granularity()
reservation = Reservation(driver, 2 * granularity)
extent = Extent(driver, granularity)
(mapping,) = reservation.map(0, [extent])
window = tensor_at(reservation.base, 2 * granularity, driver.device)
print("mapped page reads", int(window[granularity - 1]), flush=True)
if sys.argv[2] == "after unmap":
    mapping.close()
    print("unmapped", flush=True)
    print("survived", int(window[:9].sum()), flush=True)
else:
    print("survived", int(window[granularity:].sum()), flush=True)
"""


@pytest.mark.parametrize("when", ["never mapped", "after unmap"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_reader_of_an_unmapped_page_dies(run_apart: RunApart, device: str, when: str) -> None:
    done = run_apart(READ_UNMAPPED, device, when)
    assert "mapped page reads 0" in done.stdout
    assert "survived" not in done.stdout
    if device == "cpu":
        assert done.returncode == -signal.SIGSEGV
    else:
        assert done.returncode != 0
        assert "illegal memory access" in done.stderr


def test_physical_memory_is_limited_and_counted_until_the_last_mapping_goes() -> None:
    driver = HostDriver(capacity=2 * mmap.PAGESIZE)
    granularity = driver.granularity()
    first = driver.create(granularity)
    second = driver.create(granularity)
    with pytest.raises(DriverError, match=r"CUDA_ERROR_OUT_OF_MEMORY \(8,192 of 8,192 bytes are taken\)"):
        driver.create(granularity)
    base = driver.reserve(granularity)
    driver.map(base, granularity, first)
    driver.release(first)
    with pytest.raises(DriverError, match="OUT_OF_MEMORY"):
        driver.create(granularity)
    driver.unmap(base, granularity)
    driver.release(driver.create(granularity))
    driver.release(second)
    driver.free(base, granularity)
    assert driver.live_handles == 0


def test_a_granularity_of_two_mebibytes_mirrors_the_card() -> None:
    driver = HostDriver(granularity=2 << 20)
    base = driver.reserve(4 << 20)
    assert base % (2 << 20) == 0
    handle = driver.create(2 << 20)
    driver.map(base + (2 << 20), 2 << 20, handle)
    driver.unmap(base + (2 << 20), 2 << 20)
    driver.release(handle)
    driver.free(base, 4 << 20)


@pytest.mark.parametrize("granularity", [0, 1000, mmap.PAGESIZE + 512])
def test_a_granularity_of_part_pages_is_refused(granularity: int) -> None:
    with pytest.raises(ConfigError, match="multiple of the page size"):
        HostDriver(granularity=granularity)


def test_fences_wait_for_work_that_a_test_holds(host_driver: HostDriver) -> None:
    done = host_driver.record(0)
    assert done.done()
    done.wait()
    host_driver.hold()
    held = host_driver.record(0)
    assert done.done()
    assert not held.done()
    with pytest.raises(DriverError, match="NOT_READY"):
        held.wait()
    host_driver.complete()
    held.wait()
    assert host_driver.record(0).done()


def test_close_tears_down_what_is_left_and_may_be_repeated() -> None:
    driver = HostDriver()
    granularity = driver.granularity()
    base = driver.reserve(granularity)
    driver.map(base, granularity, driver.create(granularity))
    assert (driver.live_mappings, driver.live_handles, driver.live_reservations) == (1, 1, 1)
    driver.close()
    driver.close()
    assert (driver.live_mappings, driver.live_handles, driver.live_reservations) == (0, 0, 0)


def test_an_unknown_handle_is_refused(host_driver: HostDriver) -> None:
    with pytest.raises(DriverError, match="no such handle"):
        host_driver.release(99)
    with pytest.raises(DriverError, match="not inside a reservation"):
        host_driver.set_access(4096, 4096)


def test_more_addresses_than_there_are_is_exhaustion(host_driver: HostDriver) -> None:
    with pytest.raises(AddressSpaceExhausted, match="lower the number of slots or max_seq_len"):
        Reservation(host_driver, 1 << 60)


def test_a_driver_is_opened_by_device() -> None:
    assert open_driver("cpu").device == "cpu"
    with pytest.raises(ConfigError, match="no driver for device 'tpu'"):
        open_driver("tpu")


def test_without_a_gpu_the_cuda_driver_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"no GPU 77 .*host driver"):
        open_driver("cuda:77")


def test_a_file_that_cannot_grow_is_a_driver_error(host_driver: HostDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", full)
        with pytest.raises(DriverError, match=r"CUDA_ERROR_OUT_OF_MEMORY .No space left on device: a handle is a file"):
            host_driver.create(4096)
    assert len(os.listdir("/proc/self/fd")) == before
    host_driver.release(host_driver.create(4096))
