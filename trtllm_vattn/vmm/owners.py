"""Three small owners: an extent is memory, a reservation is addresses, a mapping is the one placed at the other.

A mapping holds both, so that neither goes before it does; rolling an operation back is letting go of what it took.
`_open` of an owner is the process that made it, 0 once it is closed.
After cuda.core's split into allocation, reservation and mapping handles.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Sequence

from trtllm_vattn.errors import AddressSpaceExhausted, ConfigError, DriverError, InvariantViolation
from trtllm_vattn.vmm.base import Driver

Warn = Callable[[str, type[Warning], int], None]


class _Process:
    """Whose owners warn: a forked child's copies of its parent's are not the child's to close."""

    id = os.getpid()


def _enter_child() -> None:
    _Process.id = os.getpid()


os.register_at_fork(after_in_child=_enter_child)


def _warn_unclosed(process: int, what: str, ours: type[_Process] = _Process, warn: Warn = warnings.warn) -> None:
    # Defaults, for at the end of the interpreter a module's names are gone before its objects.
    if process == ours.id:
        warn(f"{what} was not closed", ResourceWarning, 3)


class RollbackFailed(DriverError):
    """A driver call failed, and so did taking back what was done before it.

    Attributes
    ----------
    left : list of Mapping
        What is still mapped; the caller owns it.
    """

    def __init__(self, cause: DriverError, left: list[Mapping]) -> None:
        detail = f"and {len(left)} mappings could not be taken back"
        super().__init__(cause.code, cause.call, cause.arguments, detail)
        self.left = left


class Extent:
    """Physical memory: one driver handle of `size` bytes. `mappings` counts where it is mapped now.

    `serial` grows with creation, as near to physical order as a user can see. With `handle` it owns that one, of so
    many bytes, in place of a new one.
    """

    __slots__ = ("_driver", "_open", "handle", "mappings", "serial", "size")
    _serials = itertools.count()

    def __init__(self, driver: Driver, size: int, handle: int | None = None) -> None:
        self._open = 0
        self.handle = driver.create(size) if handle is None else handle
        self._driver, self.size, self.mappings = driver, size, 0
        self.serial = next(self._serials)
        self._open = _Process.id

    def close(self) -> None:
        """Release the handle. Idempotent; on DriverError the extent stays open, to be closed again."""
        if not self._open:
            return
        if self.mappings:
            raise InvariantViolation(f"extent {self.serial} has {self.mappings} mappings; unmap them first")
        self._driver.release(self.handle)
        self._open = 0

    def __del__(self, warn: Callable[[int, str], None] = _warn_unclosed) -> None:
        if self._open:
            warn(self._open, f"extent {self.serial} of {self.size} bytes")


class Reservation:
    """A range of `size` bytes of addresses from `base`. `mappings` counts what is mapped in it now.

    Raises AddressSpaceExhausted where the driver gives no addresses.
    """

    __slots__ = ("_driver", "_open", "base", "mappings", "size")

    def __init__(self, driver: Driver, size: int) -> None:
        self._open = 0
        try:
            self.base = driver.reserve(size)
        except DriverError as error:
            if error.code != "CUDA_ERROR_OUT_OF_MEMORY":
                raise
            raise AddressSpaceExhausted(
                f"the driver gave no {size:,} bytes of addresses; lower the number of slots or max_seq_len"
            ) from error
        self._driver, self.size, self.mappings = driver, size, 0
        self._open = _Process.id

    def map(self, offset: int, extents: Sequence[Extent]) -> list[Mapping]:
        """Place extents one after another from `offset` on, accessible.

        All or none. Raises DriverError, or RollbackFailed where some stayed mapped.
        """
        if not self._open:
            raise ConfigError("this reservation is closed")
        made: list[Mapping] = []
        stuck: list[Mapping] = []
        at = offset
        try:
            for extent in extents:
                made.append(Mapping(self, extent, at))
                at += extent.size
            if made:
                self._driver.set_access(self.base + offset, at - offset)
        except DriverError as error:
            for mapping in reversed(made):
                try:
                    mapping.close()
                except DriverError:
                    stuck.append(mapping)
            if stuck:
                raise RollbackFailed(error, stuck) from error
            raise
        return made

    def close(self) -> None:
        """Free the addresses. Idempotent; on DriverError the reservation stays open, to be closed again."""
        if not self._open:
            return
        if self.mappings:
            raise InvariantViolation(
                f"the reservation at {self.base:#x} has {self.mappings} mappings; unmap them first"
            )
        self._driver.free(self.base, self.size)
        self._open = 0

    def __del__(self, warn: Callable[[int, str], None] = _warn_unclosed) -> None:
        if self._open:
            warn(self._open, f"the reservation of {self.size} bytes at {self.base:#x}")


class Mapping:
    """An extent at `offset` of a reservation; not accessible until the reservation's `map` has made it so."""

    __slots__ = ("_open", "extent", "offset", "reservation")

    def __init__(self, reservation: Reservation, extent: Extent, offset: int) -> None:
        self._open = 0
        self.reservation, self.extent, self.offset = reservation, extent, offset
        reservation._driver.map(self.address, extent.size, extent.handle)
        extent.mappings += 1
        reservation.mappings += 1
        reservation._driver.mappings.add(1)
        self._open = _Process.id

    @property
    def address(self) -> int:
        return self.reservation.base + self.offset

    @property
    def size(self) -> int:
        return self.extent.size

    @property
    def is_open(self) -> bool:
        """Whether it is mapped."""
        return bool(self._open)

    def close(self) -> None:
        """Unmap. Idempotent; on DriverError the mapping stays open, to be closed again."""
        if not self._open:
            return
        self.reservation._driver.unmap(self.address, self.size)
        self._open = 0
        self.extent.mappings -= 1
        self.reservation.mappings -= 1
        self.reservation._driver.mappings.add(-1)

    def __del__(self, warn: Callable[[int, str], None] = _warn_unclosed) -> None:
        if self._open:
            warn(self._open, f"the mapping of {self.size} bytes at {self.address:#x}")
