"""What a figure was measured on, and how samples are summed up."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import torch

_PACKAGES = ("trtllm-vattn", "torch", "triton", "cuda-bindings", "nvidia-cudnn-frontend", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Versions of what is installed, by package; and Python's."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        found["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return found


def machine() -> dict[str, Any]:
    """The GPU as NVML names it, or none; processors, memory, and system."""
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_bytes": pages * page,
        "gpu": gpu(),
    }


@contextmanager
def nvml() -> Iterator[Any]:
    """NVML's module, open; None where there is no NVML."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def gpu(index: int = 0) -> dict[str, Any] | None:
    """Name, memory, driver and CUDA version of a GPU; None where NVML finds none."""
    with nvml() as library:
        if library is None:
            return None
        try:
            handle = library.nvmlDeviceGetHandleByIndex(index)
            cuda = library.nvmlSystemGetCudaDriverVersion_v2()
            return {
                "name": library.nvmlDeviceGetName(handle),
                "memory_bytes": int(library.nvmlDeviceGetMemoryInfo(handle).total),
                "driver": library.nvmlSystemGetDriverVersion(),
                "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
            }
        except library.NVMLError:
            return None


def free_bytes(uuid: str) -> int | None:
    """Free bytes of a GPU, or of a MIG slice of one, by the UUID that CUDA gives it; None where NVML knows neither."""
    with nvml() as library:
        for kind in ("GPU", "MIG") if library is not None else ():
            try:
                handle = library.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}".encode())
                return int(library.nvmlDeviceGetMemoryInfo(handle).free)
            except library.NVMLError:
                continue
    return None


def bytes_by_process(library: Any, uuid: str) -> dict[int, int | None] | None:
    """What each process with a context on a GPU has there, None where NVML cannot tell; by NVML's open module, and the
    UUID that CUDA gives the GPU, with hyphens or without. None where NVML does not know it."""
    try:
        handle = library.nvmlDeviceGetHandleByUUID(f"GPU-{UUID(uuid)}".encode())
        return {
            process.pid: None if process.usedGpuMemory is None else int(process.usedGpuMemory)
            for process in library.nvmlDeviceGetComputeRunningProcesses(handle)
        }
    except library.NVMLError:
        return None


def processes(uuid: str) -> int:
    """How many processes have a context on a GPU, by the UUID that CUDA gives it; 0 where NVML does not know it."""
    with nvml() as library:
        return 0 if library is None else len(bytes_by_process(library, uuid) or ())


def card(machine: dict[str, Any]) -> str:
    """The folder of a machine's results, by the name of its GPU: ``h200``, ``h100``, ``h100-pcie``, ``a100-sxm4-80gb``.

    ``host`` without a GPU. Memory of its own words in the name, as in "NVIDIA H100 80GB HBM3", is left out.
    """
    if machine["gpu"] is None:
        return "host"
    name = re.sub(r" \d+GB( HBM\w+)?$", "", machine["gpu"]["name"].removeprefix("NVIDIA "))
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The project's commit, ``-dirty`` where files differ from it.

    What the environment's VATTN_COMMIT says goes before: a copy of the files may not know. ``unknown`` without either.
    """
    if os.environ.get("VATTN_COMMIT"):
        return os.environ["VATTN_COMMIT"]
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
