"""The driver's rules that everything relies on (vmm/base.py), over both drivers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from trtllm_vattn.errors import DriverError
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.tensors import tensor_at


@contextmanager
def refused(*codes: str) -> Iterator[None]:
    with pytest.raises(DriverError) as caught:
        yield
    assert caught.value.code in codes, caught.value


@contextmanager
def reserved(driver: Driver, count: int) -> Iterator[int]:
    size = count * driver.granularity()
    address = driver.reserve(size)
    yield address
    driver.free(address, size)


@contextmanager
def created(driver: Driver, count: int = 1) -> Iterator[int]:
    handle = driver.create(count * driver.granularity())
    yield handle
    driver.release(handle)


@contextmanager
def mapped(driver: Driver, address: int, handle: int, count: int = 1) -> Iterator[torch.Tensor]:
    size = count * driver.granularity()
    driver.map(address, size, handle)
    driver.set_access(address, size)
    yield tensor_at(address, size, driver.device)
    if driver.device != "cpu":
        torch.cuda.synchronize()
    driver.unmap(address, size)


def test_r1_sizes_and_addresses_are_multiples_of_the_granularity(driver: Driver) -> None:
    granularity = driver.granularity()
    with refused("CUDA_ERROR_INVALID_VALUE"):
        driver.create(granularity // 2)
    with refused("CUDA_ERROR_INVALID_VALUE"):
        driver.reserve(granularity + 1)
    with reserved(driver, 4) as base, created(driver) as handle:
        assert base % granularity == 0
        with refused("CUDA_ERROR_INVALID_VALUE"):
            driver.map(base + granularity // 2, granularity, handle)


def test_r2_a_handle_maps_whole(driver: Driver) -> None:
    granularity = driver.granularity()
    with reserved(driver, 4) as base, created(driver, 2) as handle:
        with refused("CUDA_ERROR_NOT_SUPPORTED", "CUDA_ERROR_INVALID_VALUE"):
            driver.map(base, granularity, handle)
        with refused("CUDA_ERROR_NOT_SUPPORTED", "CUDA_ERROR_INVALID_VALUE"):
            driver.map(base, 3 * granularity, handle)


def test_r3_nothing_is_mapped_over_a_mapping_or_outside_a_reservation(driver: Driver) -> None:
    granularity = driver.granularity()
    with reserved(driver, 4) as base, created(driver) as one, created(driver, 2) as two:
        with mapped(driver, base + granularity, one):
            for address in (base + granularity, base):
                with refused("CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_ALREADY_MAPPED"):
                    driver.map(address, 2 * granularity, two)
        with refused("CUDA_ERROR_INVALID_VALUE"):
            driver.map(base + 4 * granularity, granularity, one)


def test_r4_set_access_needs_mapped_memory(driver: Driver) -> None:
    granularity = driver.granularity()
    with (
        reserved(driver, 4) as base,
        created(driver) as handle,
        mapped(driver, base, handle),
        refused("CUDA_ERROR_INVALID_VALUE"),
    ):
        driver.set_access(base, 2 * granularity)


def test_r5_one_handle_at_two_addresses_is_one_memory(driver: Driver) -> None:
    granularity = driver.granularity()
    with (
        reserved(driver, 4) as base,
        created(driver) as handle,
        mapped(driver, base, handle) as here,
        mapped(driver, base + 2 * granularity, handle) as there,
    ):
        here[:] = torch.arange(granularity, device=here.device) % 251
        assert torch.equal(here, there)
        there[17] = 255
        assert int(here[17]) == 255


def test_r6_a_mapped_handle_may_be_released(driver: Driver) -> None:
    granularity = driver.granularity()
    with reserved(driver, 2) as base:
        handle = driver.create(granularity)
        driver.map(base, granularity, handle)
        driver.release(handle)
        driver.set_access(base, granularity)
        window = tensor_at(base, granularity, driver.device)
        window.fill_(7)
        assert int(window.sum()) == 7 * granularity
        driver.unmap(base, granularity)


def test_r7_a_reservation_is_freed_once_whole_and_empty(driver: Driver) -> None:
    granularity = driver.granularity()
    base = driver.reserve(4 * granularity)
    with created(driver) as handle, mapped(driver, base, handle), refused("CUDA_ERROR_INVALID_VALUE"):
        driver.free(base, 2 * granularity)
    driver.free(base, 4 * granularity)
    with refused("CUDA_ERROR_INVALID_VALUE"):
        driver.free(base, 4 * granularity)


def test_r7_the_host_driver_refuses_to_free_what_is_mapped(host_driver: Driver) -> None:
    granularity = host_driver.granularity()
    base = host_driver.reserve(granularity)
    with created(host_driver) as handle, mapped(host_driver, base, handle), refused("CUDA_ERROR_INVALID_VALUE"):
        host_driver.free(base, granularity)
    host_driver.free(base, granularity)


def test_r8_unmap_covers_whole_mappings(driver: Driver) -> None:
    granularity = driver.granularity()
    with reserved(driver, 4) as base, created(driver, 2) as one, created(driver) as two:
        driver.map(base, 2 * granularity, one)
        driver.map(base + 2 * granularity, granularity, two)
        with refused("CUDA_ERROR_INVALID_VALUE"):
            driver.unmap(base, granularity)
        driver.unmap(base, 3 * granularity)


def test_r8_the_host_driver_refuses_to_unmap_what_is_not_mapped(host_driver: Driver) -> None:
    """CUDA lets it pass; whoever does it has lost count."""
    with reserved(host_driver, 2) as base, refused("CUDA_ERROR_INVALID_VALUE"):
        host_driver.unmap(base, host_driver.granularity())


def test_r9_new_memory_reads_zero_used_before_or_not(driver: Driver) -> None:
    with reserved(driver, 1) as base:
        for _ in range(3):
            with created(driver) as handle, mapped(driver, base, handle) as window:
                assert not window.any()
                window.fill_(9)


@pytest.mark.gpu
def test_r10_every_call_is_legal_during_capture() -> None:
    from trtllm_vattn.vmm.cuda import CudaDriver

    driver = CudaDriver()
    granularity = driver.granularity()
    static = torch.ones(4, device="cuda")
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="global"):
        doubled = static * 2
        with reserved(driver, 1) as base:
            handle = driver.create(granularity)
            driver.map(base, granularity, handle)
            driver.set_access(base, granularity)
            driver.unmap(base, granularity)
            driver.release(handle)
    graph.replay()
    torch.cuda.synchronize()
    assert doubled.tolist() == [2.0] * 4


def test_remapping_shows_the_other_page_and_back(driver: Driver) -> None:
    with reserved(driver, 1) as base, created(driver) as first, created(driver) as second:
        for handle, value in ((first, 1), (second, 2)):
            with mapped(driver, base, handle) as window:
                window.fill_(value)
        seen = []
        for handle in (first, second, first):
            with mapped(driver, base, handle) as window:
                seen.append((int(window.min()), int(window.max())))
        assert seen == [(1, 1), (2, 2), (1, 1)]


def test_a_fence_is_asked_from_any_thread(driver: Driver) -> None:
    """A thread that made no other call yet asks it too."""
    fence = driver.record(0)
    answers: list[bool] = []

    def ask() -> None:
        fence.wait()
        answers.append(fence.done())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert answers == [True]
