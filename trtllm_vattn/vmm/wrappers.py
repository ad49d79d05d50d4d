"""Drivers around a driver: counting, tracing, and fault injection. There are no flags inside the seam."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from time import perf_counter
from typing import Any

from trtllm_vattn.errors import DriverError
from trtllm_vattn.trace import Trace
from trtllm_vattn.vmm.base import Driver, Fence


class WrappedDriver(Driver):
    """Passes every call on through `_call`, which a wrapper overrides."""

    def __init__(self, inner: Driver) -> None:
        self.inner = inner
        self.device, self.max_mappings, self.mappings = inner.device, inner.max_mappings, inner.mappings

    def _call(self, name: str, *arguments: int) -> Any:
        return getattr(self.inner, name)(*arguments)

    def granularity(self) -> int:
        return self.inner.granularity()

    def reserve(self, size: int) -> int:
        address: int = self._call("reserve", size)
        return address

    def free(self, address: int, size: int) -> None:
        self._call("free", address, size)

    def create(self, size: int) -> int:
        handle: int = self._call("create", size)
        return handle

    def release(self, handle: int) -> None:
        self._call("release", handle)

    def map(self, address: int, size: int, handle: int) -> None:
        self._call("map", address, size, handle)

    def set_access(self, address: int, size: int) -> None:
        self._call("set_access", address, size)

    def unmap(self, address: int, size: int) -> None:
        self._call("unmap", address, size)

    def record(self, stream: int) -> Fence:
        fence: Fence = self._call("record", stream)
        return fence

    def identity(self) -> str:
        return self.inner.identity()

    def export_handle(self, handle: int) -> int:
        descriptor: int = self._call("export_handle", handle)
        return descriptor

    def create_host(self, size: int) -> int:
        address: int = self._call("create_host", size)
        return address

    def release_host(self, address: int, size: int) -> None:
        self._call("release_host", address, size)

    def copy_to_host(self, host: int, address: int, size: int, stream: int) -> None:
        self._call("copy_to_host", host, address, size, stream)

    def copy_to_device(self, address: int, host: int, size: int, stream: int) -> None:
        self._call("copy_to_device", address, host, size, stream)

    def export_fd(self, address: int, size: int) -> int:
        fd: int = self._call("export_fd", address, size)
        return fd

    def import_fd(self, fd: int, size: int) -> int:
        handle: int = self._call("import_fd", fd, size)
        return handle


class CountingDriver(WrappedDriver):
    """Counts calls that succeeded, and the host seconds spent in them, by name."""

    def __init__(self, inner: Driver) -> None:
        super().__init__(inner)
        self.calls: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()

    def _call(self, name: str, *arguments: int) -> Any:
        started = perf_counter()
        answer = super()._call(name, *arguments)
        self.seconds[name] += perf_counter() - started  # type: ignore[assignment]
        self.calls[name] += 1
        return answer


class TracingDriver(WrappedDriver):
    """Notes a span a call in a trace: what was called, with what, and what came of it."""

    def __init__(self, inner: Driver, trace: Trace) -> None:
        super().__init__(inner)
        self._trace = trace

    def _call(self, name: str, *arguments: int) -> Any:
        noted: dict[str, Any] = {"arguments": arguments}
        started = perf_counter()
        try:
            answer = super()._call(name, *arguments)
            if isinstance(answer, int):
                noted["result"] = answer
            return answer
        except DriverError as error:
            noted["error"] = error.code
            raise
        finally:
            self._trace.span(name, started, perf_counter(), noted, "driver")


class FaultyDriver(WrappedDriver):
    """Fails calls before they reach the driver, on order.

    Attributes
    ----------
    seen : int
        Calls so far, failed ones included, but not those of `granularity`.
    """

    def __init__(self, inner: Driver) -> None:
        super().__init__(inner)
        self.seen = 0
        self.disarm()

    def fail(self, name: str, skip: int = 0, code: str = "CUDA_ERROR_UNKNOWN", sticky: bool = False) -> None:
        """Fail one call of that name (any call for ``"*"``) with a CUresult after letting `skip` of them pass; with
        `sticky` every call from that one on, as after an error that a context does not recover from. Orders add up."""
        self._orders.append([name, skip, code, sticky])

    def fail_randomly(self, probability: float, seed: int) -> None:
        """Fail each call with this probability, repeatably."""
        self._probability, self._random = probability, random.Random(seed)

    def disarm(self) -> None:
        """Fail nothing more."""
        self._orders: list[list[Any]] = []
        self._sticky: str | None = None
        self._probability, self._random = 0.0, random.Random(0)

    def _call(self, name: str, *arguments: int) -> Any:
        self.seen += 1
        if self._sticky is not None:
            raise DriverError(self._sticky, name, arguments, "injected")
        for order in [order for order in self._orders if order[0] in (name, "*")]:
            if order[1] == 0:
                self._orders.remove(order)
                self._sticky = order[2] if order[3] else None
                raise DriverError(order[2], name, arguments, "injected")
            order[1] -= 1
        if self._probability and self._random.random() < self._probability:
            raise DriverError("CUDA_ERROR_UNKNOWN", name, arguments, "injected")
        return super()._call(name, *arguments)


class QuiescingDriver(WrappedDriver):
    """Calls `quiesce`, which waits for work that must not run beside a change of mappings, before each such change."""

    def __init__(self, inner: Driver, quiesce: Callable[[], None]) -> None:
        super().__init__(inner)
        self._quiesce = quiesce

    def _call(self, name: str, *arguments: int) -> Any:
        if name in ("map", "set_access", "unmap"):
            self._quiesce()
        return super()._call(name, *arguments)
