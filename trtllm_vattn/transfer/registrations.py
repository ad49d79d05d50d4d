"""Registrations of mapped memory that never outlive the mapping.

A network card, or another process, reaches memory by a registration, and a registration is of the physical pages of the
moment at which it was made. Where a cache remaps its addresses, one that stays would read and write pages that belong
to somebody else by then. So registrations are kept where all unmapping passes: `RegisteringDriver` ends those of a
range before it unmaps it, whoever asked for that and why.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

from trtllm_vattn.errors import DriverError
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.wrappers import WrappedDriver


class Registrar(Protocol):
    """Makes memory known to a library that moves it (`links.Link`)."""

    def register(self, address: int, size: int) -> Any:
        """A registration of one mapping, whole."""

    def deregister(self, registration: Any) -> None:
        """End one; nobody reaches the memory by it from then on."""


class RegisteringDriver(WrappedDriver):
    """A driver whose mappings can be registered, each by itself: one registration an extent.

    (UCX's CUDA IPC exports one handle a registered region, and reads wrong bytes behind the first extent of a longer
    one: openucx/ucx#11283.)

    Attributes
    ----------
    made, ended : int
        Registrations so far, and those of them that were ended.
    """

    def __init__(self, inner: Driver, registrar: Registrar) -> None:
        super().__init__(inner)
        self._registrar = registrar
        self._known: dict[int, tuple[int, Any]] = {}
        self._lock = threading.Lock()
        self.made = self.ended = 0

    def registered(self, address: int, size: int) -> Any:
        """The registration of the mapping at an address, which is made when it is asked for first."""
        with self._lock:
            known = self._known.get(address)
            if known is None:
                known = self._known[address] = size, self._registrar.register(address, size)
                self.made += 1
            return known[1]

    def deregister(self, address: int, size: int) -> None:
        """End the registrations in a range. Raises DriverError where one cannot be ended; it is kept, then."""
        with self._lock:
            for start in [start for start in self._known if address <= start < address + size]:
                try:
                    self._registrar.deregister(self._known[start][1])
                except Exception as error:
                    raise DriverError("CUDA_ERROR_UNKNOWN", "deregister", (address, size), str(error)) from error
                del self._known[start]
                self.ended += 1

    def _call(self, name: str, *arguments: int) -> Any:
        if name == "unmap" and self._known:
            self.deregister(*arguments)
        return super()._call(name, *arguments)
