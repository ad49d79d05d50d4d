"""A broker in a thread of the test's process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trtllm_vattn.tenancy.broker import Broker
from trtllm_vattn.verify import tenants
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.host import HostDriver


@contextmanager
def lending(path: Path, memory: int, driver: Driver | None = None, **options: Any) -> Iterator[Broker]:
    """A broker that serves until the end; it must have released everything then."""
    made = HostDriver() if driver is None else driver
    try:
        with tenants.lending(made, memory, path, **options) as broker:
            yield broker
    finally:
        if isinstance(made, HostDriver):
            left = made.live_handles
            made.close()
            assert left == 0


def until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait for something that another process or thread does."""
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.005)
