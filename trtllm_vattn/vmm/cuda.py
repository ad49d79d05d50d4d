"""The driver seam over CUDA's virtual memory management (`cuda.bindings.driver`; CUDA driver API, section 6.14)."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

from trtllm_vattn.errors import ConfigError, DriverError
from trtllm_vattn.vmm.base import Driver, Fence, MappingCount

_MAPPINGS: defaultdict[int, MappingCount] = defaultdict(MappingCount)
"""By GPU: there is one primary context for all of a process."""


class CudaFence(Fence):
    """A CUDA event."""

    def __init__(self, driver: CudaDriver, stream: int) -> None:
        self._driver = driver
        cuda = driver.cuda
        self._event = driver.call("cuEventCreate", cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        driver.call("cuEventRecord", self._event, stream)

    def done(self) -> bool:
        self._driver.bind()
        (result,) = self._driver.cuda.cuEventQuery(self._event)
        if result == self._driver.cuda.CUresult.CUDA_ERROR_NOT_READY:
            return False
        self._driver.check((result,), "cuEventQuery")
        return True

    def wait(self) -> None:
        self._driver.bind()
        self._driver.call("cuEventSynchronize", self._event)

    def __del__(self) -> None:
        # Nobody can act on a failure here; the context, and the event with it, may be gone already.
        if hasattr(self, "_event"):
            self._driver.cuda.cuEventDestroy(self._event)


class CudaDriver(Driver):
    """Virtual memory of one GPU, in its primary context, which torch uses too.

    Parameters
    ----------
    exportable : bool
        Whether memory can be handed to other processes and, where the GPU supports it, to network cards (RDMA).

    Raises
    ------
    ConfigError
        There is no such GPU, no driver, or no virtual memory management.
    """

    def __init__(self, ordinal: int = 0, *, exportable: bool = False) -> None:
        try:
            from cuda.bindings import driver as cuda
        except ImportError as error:
            raise ConfigError("cuda.bindings is not installed; pip install 'cuda-python>=13'") from error
        self.cuda: Any = cuda
        self.device, self.mappings = f"cuda:{ordinal}", _MAPPINGS[ordinal]
        self._threads = threading.local()
        try:
            self.call("cuInit", 0)
            self._device = self.call("cuDeviceGet", ordinal)
        except (DriverError, RuntimeError) as error:
            raise ConfigError(
                f"no GPU {ordinal} to open ({error}); check nvidia-smi, or use the host driver (device cpu)"
            ) from error
        supported = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        if not self.call("cuDeviceGetAttribute", supported, self._device):
            raise ConfigError(f"GPU {ordinal} has no virtual memory management; it needs Pascal or newer, on Linux")
        self._context = self.call("cuDevicePrimaryCtxRetain", self._device)
        self.bind()

        location = cuda.CUmemLocation()
        location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = ordinal
        self._properties = cuda.CUmemAllocationProp()
        self._properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location = location
        self._handle_type = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        if exportable:
            self._properties.requestedHandleTypes = self._handle_type
            rdma = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED
            if self.call("cuDeviceGetAttribute", rdma, self._device):
                self._properties.allocFlags.gpuDirectRDMACapable = 1
        access = cuda.CUmemAccessDesc()
        access.location = location
        access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._access = [access]
        least = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self._granularity = int(self.call("cuMemGetAllocationGranularity", self._properties, least))

    # -- calling ---------------------------------------------------------------------------------------------------

    def call(self, name: str, *arguments: Any) -> Any:
        """One driver call, checked; what it returned besides its result."""
        return self.check(getattr(self.cuda, name)(*arguments), name, *arguments)

    def check(self, answer: tuple[Any, ...], name: str, *arguments: Any) -> Any:
        """The one place where a driver's answer is looked at. Raises DriverError."""
        if answer[0] != self.cuda.CUresult.CUDA_SUCCESS:
            plain = tuple(argument for argument in arguments if type(argument) is int)
            raise DriverError(answer[0].name, name, plain)
        return answer[1] if len(answer) > 1 else None

    def bind(self) -> None:
        """Make the primary context current in this thread, once."""
        if not getattr(self._threads, "bound", False):
            self.call("cuCtxSetCurrent", self._context)
            self._threads.bound = True

    # -- the seam --------------------------------------------------------------------------------------------------

    def granularity(self) -> int:
        return self._granularity

    def reserve(self, size: int) -> int:
        self.bind()
        return int(self.call("cuMemAddressReserve", size, self._granularity, 0, 0))

    def free(self, address: int, size: int) -> None:
        self.bind()
        self.call("cuMemAddressFree", address, size)

    def create(self, size: int) -> int:
        self.bind()
        return int(self.call("cuMemCreate", size, self._properties, 0))

    def release(self, handle: int) -> None:
        self.bind()
        self.call("cuMemRelease", handle)

    def map(self, address: int, size: int, handle: int) -> None:
        self.bind()
        self.call("cuMemMap", address, size, 0, handle, 0)

    def set_access(self, address: int, size: int) -> None:
        self.bind()
        self.call("cuMemSetAccess", address, size, self._access, 1)

    def unmap(self, address: int, size: int) -> None:
        self.bind()
        self.call("cuMemUnmap", address, size)

    def identity(self) -> str:
        return bytes(self.call("cuDeviceGetUuid", self._device).bytes).hex()

    def record(self, stream: int) -> CudaFence:
        self.bind()
        return CudaFence(self, stream)

    def create_host(self, size: int) -> int:
        self.bind()
        return int(self.call("cuMemHostAlloc", size, self.cuda.CU_MEMHOSTALLOC_PORTABLE))

    def release_host(self, address: int, size: int) -> None:
        self.bind()
        self.call("cuMemFreeHost", address)

    def copy_to_host(self, host: int, address: int, size: int, stream: int) -> None:
        self.bind()
        self.call("cuMemcpyDtoHAsync", host, address, size, stream)

    def copy_to_device(self, address: int, host: int, size: int, stream: int) -> None:
        self.bind()
        self.call("cuMemcpyHtoDAsync", address, host, size, stream)

    def export_fd(self, address: int, size: int) -> int:
        self.bind()
        handle = self.call("cuMemRetainAllocationHandle", address)
        try:
            return int(self.call("cuMemExportToShareableHandle", handle, self._handle_type, 0))
        finally:
            self.call("cuMemRelease", handle)

    def export_handle(self, handle: int) -> int:
        self.bind()
        return int(self.call("cuMemExportToShareableHandle", handle, self._handle_type, 0))

    def import_fd(self, fd: int, size: int) -> int:
        self.bind()
        return int(self.call("cuMemImportFromShareableHandle", fd, self._handle_type))
