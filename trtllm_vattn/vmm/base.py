"""The driver seam: eight calls, fences, and copies to and from pinned host memory. Everything above it is one code path
over two drivers.

Rules of the CUDA driver that the code above relies on; `HostDriver` keeps the same, and tests/vmm/test_rules.py
holds a test named after each:

R1. Sizes and addresses are multiples of the granularity; anything else is refused (CUDA_ERROR_INVALID_VALUE).
R2. A handle maps whole and at offset 0: part of one is refused (CUDA_ERROR_NOT_SUPPORTED).
R3. A mapping over a mapping is refused; so is one outside a reservation (CUDA_ERROR_INVALID_VALUE).
R4. Mapped memory is not accessible before `set_access`; the price of `set_access` is per handle, not per byte.
R5. One handle may be mapped at several addresses: they alias.
R6. Releasing a mapped handle is legal; its memory returns when the last mapping goes.
R7. A reservation is freed once, whole, with its own base and size, and with nothing mapped in it.
R8. `unmap` covers whole mappings, and is not ordered with any stream: work that may still touch the range must
    have passed a fence.
R9. Memory from `create` reads zero.
R10. Every call is legal while a stream is being captured.

Numbered invariants of the code above the seam:

I1. An extent is in exactly one place: the pool's free extents, a slot, pending unmap, or quarantine.
I2. A mapping holds its reservation and its extent; what is held is not freed.
I3. An operation of several steps succeeds whole or leaves the state as it was.
I4. What failed to unmap, release or free is quarantined: counted, never reused, tried again at close.
I5. Nothing is unmapped before the fence recorded after its last use is done.
I6. A slot that others read keeps its place and the tokens they read.
I7. Tokens that lie in another slot or in a shared extent are written by nobody.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod

from trtllm_vattn.errors import DriverError


class Fence(ABC):
    """Proof that work already submitted has finished."""

    @abstractmethod
    def done(self) -> bool:
        """Whether everything submitted before the fence has finished. Never blocks."""

    @abstractmethod
    def wait(self) -> None:
        """Block until `done()`."""


class MappingCount:
    """How many mappings are alive under one limit of the driver's, whichever `Driver` they were made through; counted
    by their owners (vmm/owners.py)."""

    def __init__(self) -> None:
        self.alive = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """So many more, or less. From any thread."""
        with self._lock:
            self.alive += count


class Driver(ABC):
    """Virtual memory management of one device. Addresses, handles and sizes (bytes) are plain ints.

    Every call raises `DriverError` carrying the CUresult's name, the call and its arguments.
    All calls may be made from any thread.
    """

    device: str
    """Where tensors over these addresses live, as torch names it: ``cpu`` or ``cuda:0``."""
    max_mappings: int = 500_000
    """Mappings that may be alive at once. A CUDA context is reported to refuse set_access from about 520,000 on, with
    memory free; not documented. Two who ask at the same time may both pass it, by what each maps at once."""
    mappings: MappingCount
    """Those that are: on CUDA of this process on the device, on the host of this process."""

    @abstractmethod
    def granularity(self) -> int:
        """Bytes that every size and address here is a multiple of."""

    @abstractmethod
    def reserve(self, size: int) -> int:
        """Reserve `size` bytes of addresses with no memory behind them; returns the base address."""

    @abstractmethod
    def free(self, address: int, size: int) -> None:
        """Give a whole reservation back."""

    @abstractmethod
    def create(self, size: int) -> int:
        """Allocate `size` bytes of physical memory; returns its handle."""

    @abstractmethod
    def release(self, handle: int) -> None:
        """Drop a handle; the memory returns when its last mapping goes."""

    @abstractmethod
    def map(self, address: int, size: int, handle: int) -> None:
        """Place a whole handle at an address inside a reservation."""

    @abstractmethod
    def set_access(self, address: int, size: int) -> None:
        """Make mapped addresses readable and writable by the device."""

    @abstractmethod
    def unmap(self, address: int, size: int) -> None:
        """Take whole mappings away. The addresses stay reserved."""

    @abstractmethod
    def record(self, stream: int) -> Fence:
        """A fence after everything submitted to `stream` (a cudaStream_t; 0 is the default stream)."""

    # -- host memory: a driver of nothing but bookkeeping has none ---------------------------------------------------

    def create_host(self, size: int) -> int:
        """Allocate `size` bytes of pinned host memory, which copies run from and to at the link's full bandwidth;
        returns its address."""
        raise DriverError("CUDA_ERROR_NOT_SUPPORTED", "create_host", (size,))

    def release_host(self, address: int, size: int) -> None:
        """Give pinned host memory back, whole. No copy may still use it."""
        raise DriverError("CUDA_ERROR_NOT_SUPPORTED", "release_host", (address, size))

    def copy_to_host(self, host: int, address: int, size: int, stream: int) -> None:
        """Copy `size` bytes of mapped memory to pinned host memory, behind what `stream` has; does not wait."""
        raise DriverError("CUDA_ERROR_NOT_SUPPORTED", "copy_to_host", (host, address, size))

    def copy_to_device(self, address: int, host: int, size: int, stream: int) -> None:
        """Copy `size` bytes of pinned host memory to mapped memory, behind what `stream` has; does not wait."""
        raise DriverError("CUDA_ERROR_NOT_SUPPORTED", "copy_to_device", (address, host, size))

    # -- memory of other processes: where the driver can -------------------------------------------------------------

    def identity(self) -> str:
        """Names the device the same way in every process, whatever each of them numbers it."""
        return self.device

    def export_fd(self, address: int, size: int) -> int:
        """A file descriptor of the memory that one whole mapping is of, for another process; the caller closes it.

        The memory returns when the last process lets go of it.
        """
        raise DriverError("CUDA_ERROR_NOT_SUPPORTED", "export_fd", (address, size))

    def export_handle(self, handle: int) -> int:
        """As `export_fd`, of a handle, mapped or not."""
        raise DriverError("CUDA_ERROR_NOT_SUPPORTED", "export_handle", (handle,))

    def import_fd(self, fd: int, size: int) -> int:
        """A handle of memory that another process exported, of `size` bytes; `fd` may be closed then."""
        raise DriverError("CUDA_ERROR_NOT_SUPPORTED", "import_fd", (fd, size))
