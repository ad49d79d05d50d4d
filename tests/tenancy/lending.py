"""A broker in a thread of the test's process."""

from __future__ import annotations

from collections.abc import Iterator
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
