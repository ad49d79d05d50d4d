"""What a tenant has on the device that its broker did not lend.

On a card NVML says what each process holds; a tenant's weights and context are in that, and so is what it imported,
where the driver counts it there. On the host, in place of NVML, the memory files of host drivers that a process has
open.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from trtllm_vattn.machine import bytes_by_process, nvml
from trtllm_vattn.vmm.base import Driver


def host_bytes_beside(pid: int, lent: Collection[int]) -> int | None:
    """Bytes of a process's extents of host drivers whose inodes are not `lent`; None where it may not be looked at."""
    try:
        entries = list(os.scandir(f"/proc/{pid}/fd"))
    except OSError:
        return None
    found: dict[int, int] = {}
    for entry in entries:
        try:
            if os.readlink(entry.path).startswith("/memfd:vattn "):
                there = Path(entry.path).stat()
                found[there.st_ino] = there.st_size
        except OSError:
            continue
    return sum(size for inode, size in found.items() if inode not in lent)


class Look:
    """What the processes on a device had at one moment."""

    def __init__(self, on_host: bool, used: Mapping[int, int | None] | None) -> None:
        self._on_host, self._used = on_host, used

    def bytes_beside(self, pid: int, lent: int, inodes: Collection[int]) -> int | None:
        """Of process `pid`, which was lent `lent` bytes; None where nobody can tell."""
        if self._on_host:
            return host_bytes_beside(pid, inodes)
        used = None if self._used is None else self._used.get(pid, 0)
        return None if used is None else max(0, used - lent)


class DeviceProcesses:
    """Bytes by process on the device of a driver.

    What was lent is taken off what NVML says of a process, whether the driver counts imported memory there or not: so
    what is told may be too little by what was lent, and is never too much.
    """

    def __init__(self, driver: Driver) -> None:
        self._uuid = None if driver.device == "cpu" else driver.identity()
        self._open = ExitStack()

    def look(self) -> Look:
        """What they have now."""
        if self._uuid is None:
            return Look(True, None)
        return Look(False, None if self._nvml is None else bytes_by_process(self._nvml, self._uuid))

    @cached_property
    def _nvml(self) -> Any:
        # Opened once: that takes milliseconds, in which a broker answers nobody.
        return self._open.enter_context(nvml())

    def close(self) -> None:
        """Close NVML. Idempotent."""
        self._open.close()
