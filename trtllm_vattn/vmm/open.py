"""The driver of a device."""

from __future__ import annotations

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.cuda import CudaDriver
from trtllm_vattn.vmm.host import HostDriver


def open_driver(device: str) -> Driver:
    """The driver of ``cpu``, ``cuda`` or ``cuda:N``. Raises ConfigError for another device, or without that GPU."""
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return HostDriver()
    if kind == "cuda" and (not index or index.isdigit()):
        return CudaDriver(int(index or 0))
    raise ConfigError(f"no driver for device {device!r}; there are cpu, cuda and cuda:N")
