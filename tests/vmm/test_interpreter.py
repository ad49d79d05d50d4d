"""No driver call holds the interpreter: whoever steps goes on while a thread maps."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from time import monotonic, sleep

import pytest

from trtllm_vattn.vmm.base import Driver


@pytest.fixture
def counted() -> Iterator[list[int]]:
    """How far another thread has counted, which only gets on when somebody lets go of the interpreter."""
    count, stop = [0], threading.Event()
    interval = sys.getswitchinterval()

    def count_on() -> None:
        while not stop.is_set():
            count[0] += 1
            sleep(0)

    thread = threading.Thread(target=count_on)
    sys.setswitchinterval(1000.0)
    thread.start()
    yield count
    stop.set()
    sys.setswitchinterval(interval)
    thread.join()


@pytest.mark.parametrize("call", ["create", "map", "set_access", "unmap", "release"])
def test_another_thread_gets_on_during_every_call_that_maps_ahead(
    driver: Driver, counted: list[int], call: str
) -> None:
    size = 64 * driver.granularity()
    base = driver.reserve(size)
    gained = {name: 0 for name in ("create", "map", "set_access", "unmap", "release")}
    until = monotonic() + 20

    def watched(name: str, *arguments: int) -> int:
        before = counted[0]
        answer: int = getattr(driver, name)(*arguments)
        gained[name] += counted[0] - before
        return answer

    while not gained[call] and monotonic() < until:
        handle = watched("create", size)
        watched("map", base, size, handle)
        watched("set_access", base, size)
        watched("unmap", base, size)
        watched("release", handle)
    driver.free(base, size)
    assert gained[call]
