"""`doctor` says of limits, containers, MPS and MIG what there is, and what to change."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trtllm_vattn.cli.main import main
from trtllm_vattn.errors import DriverError
from trtllm_vattn.machine import free_bytes
from trtllm_vattn.observe.surroundings import (
    INITIAL_PID_NAMESPACE,
    container,
    file_sizes,
    locked_memory,
    mig,
    mps,
    open_files,
)
from trtllm_vattn.vmm.host import HostDriver

ANY = resource.RLIM_INFINITY


def test_open_files_are_held_against_extents() -> None:
    assert open_files((1024, ANY), 71_000).works
    few = open_files((1024, 4096), 71_000)
    assert not few.works
    assert "docker run --ulimit nofile=71000" in few.detail
    assert "another process" in few.detail
    assert not open_files((100, 100), None).works
    assert open_files((1024, 20_000), None).detail.startswith("1,024, may be raised to 20,000; an extent of the host")


def test_the_host_driver_says_what_to_change_where_descriptors_end() -> None:
    if (child := os.fork()) == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            driver = HostDriver()
            for _ in range(100):
                driver.create(4096)
        except DriverError as error:
            code = 42 if "ulimit -n" in str(error) and error.code == "CUDA_ERROR_OUT_OF_MEMORY" else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42


class Pinning:
    """A GPU's driver that pins so many bytes."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    def create_host(self, size: int) -> int:
        if size > self.most:
            raise DriverError("CUDA_ERROR_OUT_OF_MEMORY", "create_host", (size,))
        self.held += size
        return 1

    def release_host(self, address: int, size: int) -> None:
        self.held -= size


def test_locked_memory_is_tried_beyond_its_limit() -> None:
    pinning: Any = Pinning(64 << 20)
    beyond = locked_memory(8 << 20, pinning)
    assert (beyond.works, pinning.held) == (True, 0)
    assert "9 MiB were pinned" in beyond.detail
    assert "--ulimit memlock=-1" in beyond.detail
    assert locked_memory(ANY, pinning).detail == "unlimited; 64 MiB were pinned"
    refused = locked_memory(8 << 20, Pinning(1 << 20))  # type: ignore[arg-type]
    assert not refused.works
    assert "pinning 9 MiB failed" in refused.detail
    assert locked_memory(8 << 20, None).works


def test_file_sizes() -> None:
    assert file_sizes(ANY).works
    assert file_sizes(1 << 30).works
    assert "ulimit -f" in file_sizes(4096).detail


def test_a_container_is_told_with_its_limits(tmp_path: Path) -> None:
    assert container(tmp_path).detail == "none"
    for folder in ("proc/self/ns", "sys/fs/cgroup"):
        (tmp_path / folder).mkdir(parents=True)
    namespace, limit = tmp_path / "proc/self/ns/pid", tmp_path / "sys/fs/cgroup/memory.max"
    namespace.symlink_to(INITIAL_PID_NAMESPACE)
    limit.write_text("max\n")
    assert container(tmp_path).detail == "none"
    namespace.unlink()
    namespace.symlink_to("pid:[4026532999]")
    limit.write_text(f"{16 << 30}\n")
    (tmp_path / ".dockerenv").touch()
    found = container(tmp_path).detail
    for text in (".dockerenv", "a PID namespace of its own", "16.0 GiB", "one directory for their socket"):
        assert text in found


def test_mps_is_used_where_its_daemon_is(tmp_path: Path) -> None:
    named = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    absent = mps(named)
    assert not absent.works
    assert "nvidia-cuda-mps-control -d" in absent.detail
    (tmp_path / "control").touch()
    assert mps(named).works
    assert "is 0=4G: give a budget within it" in mps({**named, "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=4G"}).detail


class NVML:
    """Stands in for pynvml: one GPU, with MIG on, and slices at these places; its UUID is known by this kind."""

    NVML_DEVICE_MIG_ENABLE = 1

    class NVMLError(Exception):
        pass

    def __init__(self, mode: int | None = 1, slices: tuple[int, ...] = (), kind: str = "MIG") -> None:
        self.mode, self.slices, self.kind, self.opened = mode, slices, kind, 0

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return "card"

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        if self.mode is None:
            raise self.NVMLError
        return [self.mode, self.mode]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, index: int) -> str:
        if index not in self.slices:
            raise self.NVMLError
        return f"slice {index}"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(total=18 << 30, free=5)

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return f"MIG-{handle}"

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes) -> str:
        if uuid != f"{self.kind}-x".encode():
            raise self.NVMLError
        return "found"


@pytest.mark.parametrize(
    ("nvml", "works", "text"),
    [
        (NVML(None), True, "has none"),
        (NVML(0), True, "off"),
        (NVML(), False, "no slice is set up"),
        (NVML(slices=(0, 3)), True, "on, with MIG-slice 0 of 18.0 GiB, MIG-slice 3 of 18.0 GiB"),
    ],
    ids=["no MIG", "off", "no slice", "slices"],
)
def test_mig_slices_are_told(nvml: NVML, works: bool, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", nvml)
    found = mig()
    assert (found.works, nvml.opened) == (works, 0)
    assert text in found.detail


@pytest.mark.parametrize(("kind", "free"), [("GPU", 5), ("MIG", 5), ("other", None)])
def test_the_free_memory_of_a_card_or_a_slice_is_found(
    kind: str, free: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = NVML(kind=kind)
    monkeypatch.setitem(__import__("sys").modules, "pynvml", nvml)
    assert (free_bytes("x"), nvml.opened) == (free, 0)


def test_doctor_reports_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    names = {finding["name"] for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert {"open files", "locked memory", "file sizes", "container", "MPS", "MIG"} <= names
