"""The driver seam over the operating system's own virtual memory, for machines without a GPU and for tests.

A `memfd_create` is a handle, an inaccessible private `mmap` a reservation, a shared `mmap(MAP_FIXED)` over it a
mapping, `mprotect` access. It refuses what the CUDA driver refuses, and an access to an unmapped page is a real
SIGSEGV. Unmap is one `mmap(MAP_FIXED, PROT_NONE)` over the page and never `munmap`: a hole is anybody's, and the next
MAP_FIXED would wipe its new owner.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import mmap
import os
import resource
import threading
import warnings
import weakref
from dataclasses import dataclass, field
from pathlib import Path

from trtllm_vattn.errors import ConfigError, DriverError, WrongProcess
from trtllm_vattn.vmm.base import Driver, Fence, MappingCount

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_PROT_NONE = 0
_DONTFORK = 10
_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


@dataclass
class _Handle:
    fd: int
    size: int
    mappings: int = 0
    released: bool = False


@dataclass
class _Range:
    """A reservation and what is mapped in it, by address."""

    size: int
    starts: list[int] = field(default_factory=list)
    mapped: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Address to (size, handle)."""


class HostFence(Fence):
    """Done once the driver's counter of completed work has reached it."""

    def __init__(self, driver: HostDriver, ticket: int) -> None:
        self._driver, self._ticket = driver, ticket

    def done(self) -> bool:
        return self._driver.completed >= self._ticket

    def wait(self) -> None:
        if not self.done():
            # Host work is synchronous, so only a test that holds it can get here: it would wait for itself.
            raise DriverError("CUDA_ERROR_NOT_READY", "wait", (self._ticket,), "the work is held; call complete()")


class _WrongLock:
    """Stands in for the lock of a driver that a forked child inherited, so that every call is refused."""

    def __init__(self, process: int) -> None:
        self._process = process

    def __enter__(self) -> None:
        raise WrongProcess(f"this driver was made in process {self._process}; make one in this process")

    def __exit__(self, *error: object) -> None:
        """Never entered."""


class HostDriver(Driver):
    """Virtual memory of the host.

    A driver that is dropped open takes down what is left in it, with a ResourceWarning. In a forked child every call
    raises WrongProcess; what is mapped is not there in the child, so that it cannot write to its parent's memory.

    Parameters
    ----------
    granularity : int
        Bytes; a multiple of the page size. 2 MiB mirrors the card.
    capacity : int or None
        Bytes of physical memory that handles may take together; None is no limit.

    Attributes
    ----------
    completed : int
        Fences up to this ticket are done.
    """

    device = "cpu"
    mappings = MappingCount()

    def __init__(self, granularity: int = mmap.PAGESIZE, capacity: int | None = None) -> None:
        if granularity < mmap.PAGESIZE or granularity % mmap.PAGESIZE:
            raise ConfigError(
                f"granularity is {granularity}; it must be a multiple of the page size, {mmap.PAGESIZE} bytes"
            )
        self._granularity, self._capacity = granularity, capacity
        self._process = os.getpid()
        self._lock: threading.Lock | _WrongLock = threading.Lock()
        self._handles: dict[int, _Handle] = {}
        self._next_handle = 1
        self._bases: list[int] = []
        self._ranges: dict[int, _Range] = {}
        self._host: dict[int, int] = {}
        self._tickets = self.completed = 0
        self.max_mappings = _mappings_of_a_process()
        self._held = False
        weakref.finalize(self, _drop, self._ranges, self._handles, self._host, self._process).atexit = False
        _drivers.add(self)

    def granularity(self) -> int:
        return self._granularity

    # -- addresses -------------------------------------------------------------------------------------------------

    def reserve(self, size: int) -> int:
        with self._lock:
            self._check_aligned("reserve", size)
            # Room to align the base to the granularity; the slack is given back at once.
            whole = size + self._granularity - mmap.PAGESIZE
            start = _mmap("reserve", (size,), 0, whole, _PROT_NONE, _RESERVED, -1)
            base = -(-start // self._granularity) * self._granularity
            for address, slack in ((start, base - start), (base + size, start + whole - base - size)):
                if slack:
                    _libc.munmap(address, slack)
            bisect.insort(self._bases, base)
            self._ranges[base] = _Range(size)
            return base

    def free(self, address: int, size: int) -> None:
        with self._lock:
            found = self._ranges.get(address)
            if found is None or found.size != size:
                raise DriverError(
                    "CUDA_ERROR_INVALID_VALUE", "free", (address, size), "not a reservation, or not whole"
                )
            if found.starts:
                raise DriverError(
                    "CUDA_ERROR_INVALID_VALUE",
                    "free",
                    (address, size),
                    f"{len(found.starts)} mappings are in it",
                )
            del self._ranges[address]
            self._bases.remove(address)
            _libc.munmap(address, size)

    # -- memory ----------------------------------------------------------------------------------------------------

    def create(self, size: int) -> int:
        with self._lock:
            self._check_aligned("create", size)
            if self._capacity is not None and self.physical_bytes + size > self._capacity:
                raise DriverError(
                    "CUDA_ERROR_OUT_OF_MEMORY",
                    "create",
                    (size,),
                    f"{self.physical_bytes:,} of {self._capacity:,} bytes are taken",
                )
            try:
                fd = os.memfd_create("vattn", os.MFD_CLOEXEC)
            except OSError as error:
                if error.errno != errno.EMFILE or not _raise_descriptor_limit():
                    raise DriverError(
                        "CUDA_ERROR_OUT_OF_MEMORY",
                        "create",
                        (size,),
                        f"{error.strerror}: a handle takes a file descriptor; raise `ulimit -n`",
                    ) from error
                fd = os.memfd_create("vattn", os.MFD_CLOEXEC)
            try:
                os.ftruncate(fd, size)
            except OSError as error:
                os.close(fd)
                raise DriverError(
                    "CUDA_ERROR_OUT_OF_MEMORY",
                    "create",
                    (size,),
                    f"{error.strerror}: a handle is a file in memory; raise `ulimit -f`, or the container's memory",
                ) from error
            return self._add_handle(fd, size)

    def _add_handle(self, fd: int, size: int) -> int:
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self._handles[handle] = _Handle(fd, size)
        return handle

    def release(self, handle: int) -> None:
        with self._lock:
            found = self._find_handle("release", handle)
            found.released = True
            self._drop_if_unused(handle, found)

    def _drop_if_unused(self, handle: int, found: _Handle) -> None:
        if found.released and not found.mappings:
            os.close(found.fd)
            del self._handles[handle]

    # -- mappings --------------------------------------------------------------------------------------------------

    def map(self, address: int, size: int, handle: int) -> None:
        with self._lock:
            self._check_aligned("map", address, size)
            found = self._find_handle("map", handle)
            if size != found.size:
                raise DriverError(
                    "CUDA_ERROR_NOT_SUPPORTED",
                    "map",
                    (address, size, handle),
                    f"a handle maps whole, and this one has {found.size:#x} bytes",
                )
            home = self._find_range("map", address, size)
            at = bisect.bisect_left(home.starts, address)
            before = home.starts[at - 1] if at else None
            follows = at < len(home.starts) and home.starts[at] < address + size
            if follows or (before is not None and before + home.mapped[before][0] > address):
                raise DriverError(
                    "CUDA_ERROR_INVALID_VALUE", "map", (address, size, handle), "something is mapped there"
                )
            _mmap(
                "map",
                (address, size, handle),
                address,
                size,
                _PROT_NONE,
                mmap.MAP_SHARED | _MAP_FIXED,
                found.fd,
            )
            _libc.madvise(address, size, _DONTFORK)
            home.starts.insert(at, address)
            home.mapped[address] = (size, handle)
            found.mappings += 1

    def set_access(self, address: int, size: int) -> None:
        with self._lock:
            self._check_aligned("set_access", address, size)
            self._whole_mappings("set_access", address, size)
            if _libc.mprotect(address, size, mmap.PROT_READ | mmap.PROT_WRITE):
                raise _os_error("set_access", (address, size))

    def unmap(self, address: int, size: int) -> None:
        with self._lock:
            self._check_aligned("unmap", address, size)
            home, starts = self._whole_mappings("unmap", address, size)
            _mmap("unmap", (address, size), address, size, _PROT_NONE, _RESERVED | _MAP_FIXED, -1)
            first = bisect.bisect_left(home.starts, address)
            del home.starts[first : first + len(starts)]
            for start in starts:
                _, handle = home.mapped.pop(start)
                self._handles[handle].mappings -= 1
                self._drop_if_unused(handle, self._handles[handle])

    def _whole_mappings(self, call: str, address: int, size: int) -> tuple[_Range, list[int]]:
        """The starts of the mappings that make up exactly this stretch."""
        home = self._find_range(call, address, size)
        starts, at = [], address
        while at < address + size and at in home.mapped:
            starts.append(at)
            at += home.mapped[at][0]
        if at != address + size:
            raise DriverError(
                "CUDA_ERROR_INVALID_VALUE",
                call,
                (address, size),
                f"not made up of whole mappings, see {at:#x}",
            )
        return home, starts

    # -- fences ----------------------------------------------------------------------------------------------------

    def record(self, stream: int) -> HostFence:
        with self._lock:
            self._tickets += 1
            if not self._held:
                self.completed = self._tickets
            return HostFence(self, self._tickets)

    def hold(self) -> None:
        """From now on fences are not done until `complete()`: a test's way to have work in flight."""
        self._held = True

    def complete(self) -> None:
        """All work is done, and what comes is done at once."""
        self._held = False
        self.completed = self._tickets

    # -- host memory -----------------------------------------------------------------------------------------------

    def create_host(self, size: int) -> int:
        with self._lock:
            anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            access = mmap.PROT_READ | mmap.PROT_WRITE
            address = _mmap("create_host", (size,), 0, size, access, anonymous, -1)
            self._host[address] = size
            return address

    def release_host(self, address: int, size: int) -> None:
        with self._lock:
            if self._host.get(address) != size:
                raise DriverError(
                    "CUDA_ERROR_INVALID_VALUE", "release_host", (address, size), "no host memory, or not whole"
                )
            del self._host[address]
            _libc.munmap(address, size)

    def copy_to_host(self, host: int, address: int, size: int, stream: int) -> None:
        with self._lock:
            self._check_copy("copy_to_host", host, address, size)
            ctypes.memmove(host, address, size)

    def copy_to_device(self, address: int, host: int, size: int, stream: int) -> None:
        with self._lock:
            self._check_copy("copy_to_device", host, address, size)
            ctypes.memmove(address, host, size)

    def _check_copy(self, call: str, host: int, address: int, size: int) -> None:
        """Raise DriverError where a copy would leave host memory, or touch what is not mapped."""
        if not any(base <= host and host + size <= base + whole for base, whole in self._host.items()):
            raise DriverError("CUDA_ERROR_INVALID_VALUE", call, (host, address, size), "not inside host memory")
        home = self._find_range(call, address, size)
        at = bisect.bisect_right(home.starts, address) - 1
        end = address
        while end < address + size and 0 <= at < len(home.starts):
            start = home.starts[at]
            if not start <= end < start + home.mapped[start][0]:
                break
            end, at = start + home.mapped[start][0], at + 1
        if end < address + size:
            raise DriverError("CUDA_ERROR_INVALID_VALUE", call, (host, address, size), f"nothing is mapped at {end:#x}")

    # -- memory of other processes ---------------------------------------------------------------------------------

    def export_fd(self, address: int, size: int) -> int:
        with self._lock:
            home, starts = self._whole_mappings("export_fd", address, size)
            if len(starts) > 1:
                detail = f"{len(starts)} mappings are there; one is exported at a time"
                raise DriverError("CUDA_ERROR_INVALID_VALUE", "export_fd", (address, size), detail)
            return self._duplicate("export_fd", self._handles[home.mapped[address][1]].fd)

    def export_handle(self, handle: int) -> int:
        with self._lock:
            return self._duplicate("export_handle", self._find_handle("export_handle", handle).fd)

    def import_fd(self, fd: int, size: int) -> int:
        with self._lock:
            self._check_aligned("import_fd", size)
            try:
                there = os.fstat(fd).st_size
            except OSError as error:
                detail = str(error.strerror)
                raise DriverError("CUDA_ERROR_INVALID_VALUE", "import_fd", (fd, size), detail) from error
            if there != size:
                raise DriverError("CUDA_ERROR_INVALID_VALUE", "import_fd", (fd, size), f"it has {there:,} bytes")
            return self._add_handle(self._duplicate("import_fd", fd), size)

    def _duplicate(self, call: str, descriptor: int) -> int:
        try:
            return os.dup(descriptor)
        except OSError as error:
            if error.errno == errno.EMFILE and _raise_descriptor_limit():
                return os.dup(descriptor)
            raise DriverError(
                "CUDA_ERROR_OUT_OF_MEMORY", call, (descriptor,), f"{error.strerror}; raise `ulimit -n`"
            ) from error

    # -- what is there ---------------------------------------------------------------------------------------------

    @property
    def physical_bytes(self) -> int:
        """Bytes that handles take, the released and still mapped among them."""
        return sum(handle.size for handle in self._handles.values())

    @property
    def live_handles(self) -> int:
        return len(self._handles)

    @property
    def live_reservations(self) -> int:
        return len(self._ranges)

    @property
    def live_host_bytes(self) -> int:
        """Bytes of pinned host memory."""
        return sum(self._host.values())

    @property
    def live_mappings(self) -> int:
        return sum(len(found.starts) for found in self._ranges.values())

    def close(self) -> None:
        """Tear down whatever is left. Idempotent."""
        with self._lock:
            _tear_down(self._ranges, self._handles)
            _release_all(self._host)
            self._bases.clear()

    # -- checks ----------------------------------------------------------------------------------------------------

    def _check_aligned(self, call: str, *values: int) -> None:
        if any(value <= 0 or value % self._granularity for value in values):
            raise DriverError(
                "CUDA_ERROR_INVALID_VALUE",
                call,
                values,
                f"everything is a positive multiple of {self._granularity:#x}",
            )

    def _find_handle(self, call: str, handle: int) -> _Handle:
        found = self._handles.get(handle)
        if found is None or found.released:
            raise DriverError("CUDA_ERROR_INVALID_VALUE", call, (handle,), "no such handle")
        return found

    def _find_range(self, call: str, address: int, size: int) -> _Range:
        at = bisect.bisect_right(self._bases, address) - 1
        if at >= 0:
            base = self._bases[at]
            if address + size <= base + self._ranges[base].size:
                return self._ranges[base]
        raise DriverError("CUDA_ERROR_INVALID_VALUE", call, (address, size), "not inside a reservation")


def _tear_down(ranges: dict[int, _Range], handles: dict[int, _Handle]) -> None:
    while ranges:
        base, found = ranges.popitem()
        _libc.munmap(base, found.size)
    while handles:
        os.close(handles.popitem()[1].fd)


def _release_all(host: dict[int, int]) -> None:
    while host:
        _libc.munmap(*host.popitem())


def _drop(ranges: dict[int, _Range], handles: dict[int, _Handle], host: dict[int, int], process: int) -> None:
    """A driver is gone; what is left in it goes, in the process that made it."""
    left = (len(handles), len(ranges), len(host))
    if any(left) and process == os.getpid():
        _tear_down(ranges, handles)
        _release_all(host)
        warnings.warn(
            f"a HostDriver was dropped with {left[0]} handles and {left[1]} reservations, and with {left[2]} "
            "pieces of host memory; close what it was made for",
            ResourceWarning,
            stacklevel=2,
        )


_drivers: weakref.WeakSet[HostDriver] = weakref.WeakSet()


def _refuse_in_child() -> None:
    """A forked child has none of its parent's mappings; a lock may have been held by a thread that is not here."""
    for driver in _drivers:
        driver._lock = _WrongLock(driver._process)
    HostDriver.mappings = MappingCount()


os.register_at_fork(after_in_child=_refuse_in_child)


def _mmap(call: str, arguments: tuple[int, ...], address: int, size: int, access: int, flags: int, fd: int) -> int:
    found: int | None = _libc.mmap(address, size, access, flags, fd, 0)
    if found is None or found == ctypes.c_void_p(-1).value:
        raise _os_error(call, arguments)
    return found


def _os_error(call: str, arguments: tuple[int, ...]) -> DriverError:
    number = ctypes.get_errno()
    detail = os.strerror(number)
    if number == errno.ENOMEM:
        detail += "; a process has a limit of mappings, see vm.max_map_count"
    return DriverError("CUDA_ERROR_OUT_OF_MEMORY", call, arguments, detail)


def _raise_descriptor_limit() -> bool:
    """Raise the soft limit of file descriptors to the hard one; whether that gave more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return True


def _mappings_of_a_process() -> int:
    """How many may be alive here: each splits its reservation, and the process has mappings of its own."""
    try:
        limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    except OSError:
        limit = 65_530
    return limit // 3
