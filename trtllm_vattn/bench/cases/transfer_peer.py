"""`bench transfer --measure peer`: memory of one GPU mapped for another one of the same host, beside copying it.

One handle is made accessible to both GPUs by one call, so that kernels of the second read the first one's memory at the
same address. What is read once is cheaper to read there; what is read many times, as decoding does, is cheaper to copy
first. Needs two GPUs that reach each other (NVLink).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from time import perf_counter
from typing import Any

import torch

from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.cuda import CudaDriver
from trtllm_vattn.vmm.tensors import finish, tensor_at

SIZES = (2 << 20, 64 << 20, 1 << 30)
"""Bytes of the handles that are mapped."""
ROUNDS = 5

COLUMNS = "megabytes map_us own_map_us peer_read_gb_s own_read_gb_s copy_gb_s reads_until_copying_wins wrong_bytes"


def why_not() -> str | None:
    """Why it cannot be measured here; None where it can."""
    there = torch.cuda.device_count()
    if there < 2:
        return f"peer mapping needs two GPUs, and there are {there}"
    if not torch.cuda.can_device_access_peer(1, 0):
        return "GPU 1 cannot reach the memory of GPU 0"
    return None


def measure_peer() -> list[dict[str, Any]]:
    """A row for each size of a handle."""
    owner = CudaDriver(0)
    # Its context, in which kernels of GPU 1 run.
    CudaDriver(1)
    return [_measure(owner, size) for size in SIZES]


def _measure(owner: CudaDriver, size: int) -> dict[str, Any]:
    own_us = _mapped(owner, size, (0,), lambda address: None)[0]
    map_us, row = _mapped(owner, size, (0, 1), lambda address: _read(address, size))
    assert row is not None
    return {"megabytes": size / 1e6, "map_us": map_us, "own_map_us": own_us, **row}


@contextmanager
def mapped(driver: Driver, size: int) -> Iterator[int]:
    """The address of one extent, which is not accessible yet."""
    with ExitStack() as undo:
        address = driver.reserve(size)
        undo.callback(driver.free, address, size)
        handle = driver.create(size)
        undo.callback(driver.release, handle)
        driver.map(address, size, handle)
        undo.callback(driver.unmap, address, size)
        yield address


def _mapped(owner: CudaDriver, size: int, gpus: tuple[int, ...], use: Any) -> tuple[float, dict[str, Any] | None]:
    """Microseconds of making a handle accessible, and what is done with it meanwhile."""
    with mapped(owner, size) as address, ExitStack() as undo:
        for gpu in gpus:
            undo.callback(finish, f"cuda:{gpu}")
        access = [_access(owner, gpu) for gpu in gpus]
        started = perf_counter()
        owner.call("cuMemSetAccess", address, size, access, len(access))
        seconds = perf_counter() - started
        return 1e6 * seconds, use(address)


def _access(owner: CudaDriver, gpu: int) -> Any:
    cuda = owner.cuda
    access = cuda.CUmemAccessDesc()
    access.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = gpu
    access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return access


def _read(address: int, size: int) -> dict[str, Any]:
    """Rates of reading the memory by kernels of GPU 1, and of copying it there first."""
    first = tensor_at(address, size, "cuda:0").view(torch.int32)
    first.copy_(torch.arange(len(first), dtype=torch.int32, device="cuda:0"))
    finish("cuda:0")
    there = tensor_at(address, size, "cuda:1").view(torch.int32)
    here = torch.empty_like(there)
    peer = _seconds(lambda: there.max())
    copy = _seconds(lambda: here.copy_(there))
    own = _seconds(lambda: here.max())
    wrong = int((here != torch.arange(len(here), dtype=torch.int32, device="cuda:1")).sum())
    # Reading r times there costs r × peer, and copying first copy + r × own.
    gain = peer - own
    return {
        "peer_read_gb_s": size / peer / 1e9,
        "own_read_gb_s": size / own / 1e9,
        "copy_gb_s": size / copy / 1e9,
        "reads_until_copying_wins": copy / gain if gain > 0 else float("inf"),
        "wrong_bytes": 4 * wrong,
    }


def _seconds(call: Any) -> float:
    """Of one call on GPU 1."""
    samples = []
    with torch.cuda.device(1):
        for _ in range(ROUNDS + 1):
            finish("cuda:1")
            started = perf_counter()
            call()
            finish("cuda:1")
            samples.append(perf_counter() - started)
    return median(samples[1:])
