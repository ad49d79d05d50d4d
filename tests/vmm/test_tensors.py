from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.owners import Extent, Reservation
from trtllm_vattn.vmm.tensors import copy_bytes, current_stream, strided, tensor_at, upload

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_strided_view_made_before_anything_is_mapped(driver: Driver, dtype: torch.dtype) -> None:
    granule = driver.granularity()
    reservation = Reservation(driver, 4 * granule)
    flat = tensor_at(reservation.base, 4 * granule, driver.device)
    # Rows of 48 elements from an offset of one row on, 24 of each seen, in the second granule.
    row = 48 * dtype.itemsize
    view = strided(flat, dtype, (10, 24), (48, 1), offset_bytes=granule + row)
    assert view.data_ptr() == reservation.base + granule + row
    extent = Extent(driver, granule)
    (mapping,) = reservation.map(granule, [extent])
    view.copy_(torch.arange(240).view(10, 24).remainder(8).to(dtype))
    raw = tensor_at(reservation.base + granule, granule, driver.device).view(dtype)
    for index in range(10):
        got = raw[(index + 1) * 48 : (index + 1) * 48 + 24].float().cpu()
        assert torch.equal(got, torch.arange(index * 24, index * 24 + 24).remainder(8).float())
    assert not raw[:48].float().any()
    if driver.device != "cpu":
        torch.cuda.synchronize()
    for owner in (mapping, extent, reservation):
        owner.close()


def test_the_owner_lives_as_long_as_any_view(host_driver: HostDriver) -> None:
    reservation = Reservation(host_driver, 4096)

    class Owner:
        pass

    owner = Owner()
    alive = weakref.ref(owner)
    view = strided(tensor_at(reservation.base, 4096, "cpu", owner=owner), torch.float32, (4,), (1,))
    del owner
    gc.collect()
    assert alive() is not None
    del view
    gc.collect()
    assert alive() is None
    reservation.close()


def test_views_that_leave_the_bytes_are_refused(host_driver: HostDriver) -> None:
    reservation = Reservation(host_driver, 4096)
    flat = tensor_at(reservation.base, 4096, "cpu")
    with pytest.raises(ConfigError, match="ends at byte 4100 of 4096"):
        strided(flat, torch.float32, (5,), (256,))
    with pytest.raises(ConfigError, match="whole elements of 4"):
        strided(flat, torch.float32, (4,), (1,), offset_bytes=2)
    del flat
    reservation.close()


def test_the_host_has_one_stream() -> None:
    assert current_stream("cpu") == 0


@pytest.mark.gpu
def test_the_current_stream_is_torchs() -> None:
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        assert current_stream("cuda:0") == torch.cuda.current_stream().cuda_stream != 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_an_upload_does_not_see_later_changes(device: str) -> None:
    array = np.arange(1000)
    uploaded = upload(array, torch.device(device))
    array[:] = -1
    assert uploaded.cpu().tolist() == list(range(1000))


@pytest.mark.gpu
def test_a_fence_is_done_when_the_work_before_it_is() -> None:
    from trtllm_vattn.vmm.cuda import CudaDriver

    driver = CudaDriver()
    torch.cuda._sleep(200_000_000)
    fence = driver.record(current_stream("cuda:0"))
    assert not fence.done()
    fence.wait()
    assert fence.done()


def test_tensors_that_live_until_the_process_ends_end_with_it(run_apart) -> None:  # type: ignore[no-untyped-def]
    code = """
import torch
from trtllm_vattn.vmm.tensors import tensor_at

memory = torch.zeros(100, dtype=torch.uint8)
torch.kept = tensor_at(memory.data_ptr(), 100, "cpu", owner=memory)
"""
    done = run_apart(code)
    assert done.returncode == 0, done.stderr


def test_a_copy_that_fails_raises_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that die with an exception on its way must not hide it."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no copy")

    memory = torch.zeros(8192, dtype=torch.uint8)
    monkeypatch.setattr(torch.Tensor, "copy_", fail)
    with pytest.raises(RuntimeError, match="no copy"):
        copy_bytes("cpu", memory.data_ptr(), memory.data_ptr() + 4096, 4096)
