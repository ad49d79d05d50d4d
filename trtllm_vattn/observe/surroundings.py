"""What a process may take where it runs: limits of files and locked memory, containers, MPS, MIG."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trtllm_vattn.errors import DriverError
from trtllm_vattn.machine import nvml
from trtllm_vattn.vmm.base import Driver

MOST_PINNED = 64 << 20
"""Bytes that are pinned at most, to try."""
INITIAL_PID_NAMESPACE = "pid:[4026531836]"
"""The kernel's own number of it (PROC_PID_INIT_INO)."""


class Condition(NamedTuple):
    """One thing about the surroundings: whether it is as it should be, and what there is or what to change."""

    name: str
    works: bool
    detail: str


def conditions(driver: Driver | None, device_bytes: int | None) -> list[Condition]:
    """All of them; `driver` is the GPU's, or None without one, and `device_bytes` its memory."""
    most = device_bytes // (2 << 20) if device_bytes else None
    return [
        open_files(resource.getrlimit(resource.RLIMIT_NOFILE), most),
        locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], driver),
        file_sizes(resource.getrlimit(resource.RLIMIT_FSIZE)[0]),
        container(Path("/")),
        mps(os.environ),
        mig(),
    ]


def open_files(limits: tuple[int, int], most_extents: int | None) -> Condition:
    """A descriptor is taken by each extent on the host driver, and on a GPU by each that another process is given."""
    soft, hard = (None if each == resource.RLIM_INFINITY else each for each in limits)
    wanted = most_extents or 16384
    whose = "an extent that is given to another process" if most_extents else "an extent of the host driver"
    there = f"{'unlimited' if soft is None else f'{soft:,}'}, may be raised to {'any' if hard is None else f'{hard:,}'}"
    needs = f"{whose} takes one, up to {wanted:,}" + (
        " (2 MiB each; larger extents take fewer)" if most_extents else ""
    )
    if hard is not None and hard < wanted:
        how = f"`ulimit -Hn {wanted}`, `docker run --ulimit nofile={wanted}`, LimitNOFILE={wanted} in a unit"
        return Condition("open files", False, f"{there}; {needs}: raise it by {how}")
    return Condition("open files", True, f"{there}; {needs}")


def locked_memory(limit: int, driver: Driver | None) -> Condition:
    """Pinned host memory (`host_memory`, sleep) is tried beyond the limit, where there is one and a GPU."""
    unlimited = limit == resource.RLIM_INFINITY
    shown = "unlimited" if unlimited else f"{limit / 2**20:,.0f} MiB"
    change = "raise it by `ulimit -l unlimited`, `docker run --ulimit memlock=-1`, LimitMEMLOCK=infinity in a unit"
    if driver is None:
        return Condition("locked memory", True, f"{shown}; the host driver locks none")
    size = MOST_PINNED if unlimited else min(limit + (1 << 20), MOST_PINNED)
    try:
        address = driver.create_host(size)
        driver.release_host(address, size)
    except DriverError as error:
        return Condition("locked memory", False, f"{shown}; pinning {size >> 20} MiB failed: {error}; {change}")
    beyond = "" if unlimited else f"; registration for RDMA (NIXL, UCX) is within it: {change}"
    return Condition("locked memory", True, f"{shown}; {size >> 20} MiB were pinned{beyond}")


def file_sizes(limit: int) -> Condition:
    """Traces, results, and the host driver's memory are files."""
    if limit == resource.RLIM_INFINITY:
        return Condition("file sizes", True, "unlimited")
    works = limit >= 1 << 20
    change = (
        "" if works else "; an extent of the host driver is a file, up to 512 KiB: raise it by `ulimit -f unlimited`"
    )
    return Condition("file sizes", works, f"{limit / 2**20:,.1f} MiB{change}")


def container(root: Path) -> Condition:
    """Whether this is one, and its memory limit. Handles go between processes as descriptors over a socket, so that a
    PID namespace of one's own does not matter."""
    found = [str(each) for each in (root / ".dockerenv", root / "run/.containerenv") if each.exists()]
    namespace = _text(root / "proc/self/ns/pid", os.readlink)
    if namespace and namespace != INITIAL_PID_NAMESPACE:
        found.append("a PID namespace of its own, in which NVML may show no processes")
    limit = _text(root / "sys/fs/cgroup/memory.max", lambda path: Path(path).read_text().strip())
    if limit and limit.isdecimal():
        found.append(
            f"a memory limit of {int(limit) / 2**30:,.1f} GiB, which host_memory and the host driver count under"
        )
    share = "; processes that share KV need one directory for their socket in common"
    return Condition("container", True, f"{', '.join(found)}{share}" if found else "none")


def _text(path: Path, read: Callable[[str], str]) -> str | None:
    try:
        return read(str(path))
    except OSError:
        return None


def mps(environment: Mapping[str, str]) -> Condition:
    """Whether CUDA's Multi-Process Service would be used."""
    named = environment.get("CUDA_MPS_PIPE_DIRECTORY")
    folder = Path(named or "/tmp/nvidia-mps")
    if not (folder / "control").exists():
        if named is None:
            return Condition("MPS", True, "not used")
        how = "start it by `nvidia-cuda-mps-control -d`, or leave the variable out"
        return Condition("MPS", False, f"CUDA_MPS_PIPE_DIRECTORY is {named}, where no daemon is; {how}")
    limit = environment.get("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT")
    bound = f"; CUDA_MPS_PINNED_DEVICE_MEM_LIMIT is {limit}: give a budget within it" if limit else ""
    text = f"used, by {folder}; a client's fatal error may end the other clients' work, too{bound}"
    return Condition("MPS", True, text)


def mig() -> Condition:
    """Whether the first GPU is divided into slices, and which."""
    with nvml() as library:
        return Condition("MIG", True, "no GPU") if library is None else _mig(library)


def _mig(library: Any) -> Condition:
    try:
        handle = library.nvmlDeviceGetHandleByIndex(0)
        enabled = library.nvmlDeviceGetMigMode(handle)[0] == library.NVML_DEVICE_MIG_ENABLE
    except library.NVMLError:
        return Condition("MIG", True, "this GPU has none")
    if not enabled:
        return Condition("MIG", True, "off")
    slices = []
    for index in range(library.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            each = library.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
        except library.NVMLError:
            continue
        size = library.nvmlDeviceGetMemoryInfo(each).total / 2**30
        slices.append(f"{library.nvmlDeviceGetUUID(each)} of {size:,.1f} GiB")
    if not slices:
        how = "have some made (`nvidia-smi mig -cgi … -C`), or MIG switched off"
        return Condition("MIG", False, f"on, and no slice is set up; {how}")
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = (
        f"CUDA_VISIBLE_DEVICES is {seen}" if seen else "a process gets the first, unless CUDA_VISIBLE_DEVICES names one"
    )
    return Condition("MIG", True, f"on, with {', '.join(slices)}; {chosen}")
