"""The driver calls of every kind of cache in one short life: what each comparison in bench/ rests on.

A change here changes what the baselines cost; it is made on purpose or not at all.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from shapes import SHAPE

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.cache.select import CACHES, make_cache
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import WrappedDriver


class ListedDriver(WrappedDriver):
    """Notes the name of each call, and the pages of 4 KiB that it is about."""

    def __init__(self, inner: HostDriver) -> None:
        super().__init__(inner)
        self.calls: list[str] = []

    def _call(self, name: str, *arguments: int) -> Any:
        sizes = {"reserve": 0, "create": 0, "free": 1, "map": 1, "set_access": 1, "unmap": 1}
        self.calls.append(f"{name} {arguments[sizes[name]] // 4096}" if name in sizes else name)
        return super()._call(name, *arguments)

    def drain(self) -> str:
        """The calls since the last time: ``map 2 x3`` is three calls, of two pages each."""
        counts = Counter(self.calls)
        self.calls.clear()
        return ", ".join(call if times == 1 else f"{call} x{times}" for call, times in counts.items())


CALLS: dict[str, dict[str, str]] = {
    "contiguous": {},
    "paged": {},
    "paged-64": {},
    "token": {},
    "published": {
        "make": "reserve 30 x8, create 1 x8, map 1 x8, set_access 1 x8",
        "admit a": "create 1 x8, map 1 x8, set_access 1 x8",
        "admit b": "create 1 x16, map 1 x16, set_access 1 x16",
        "release b": "record",
        "extend": "create 1 x8, map 1 x8, set_access 1 x8",
        "fork": "create 1 x8, map 1 x8, set_access 1 x8",
        "step of a fork": "create 1 x8, map 1 x8, set_access 1 x8",
        "move": "record, map 1 x8, set_access 1 x8",
        "replace": "reserve 48, create 1 x8, map 1 x16, set_access 1 x16, record x8, unmap 1 x16",
        "release d": "record",
        "give back": "unmap 1 x24, release x24",
        "release a": "record",
        "close": "record, unmap 1 x40, free 48, free 30 x8, release x40",
    },
    "vattn": {
        "make": "reserve 240, create 1, map 1, set_access 1",
        "admit a": "create 4, map 4, set_access 4",
        "admit b": "create 8, create 4, map 8, map 4, set_access 12",
        "steps": "create 1 x3, map 1 x3, set_access 1, create 2 x4, map 2 x4, set_access 3 x2, set_access 2 x2",
        "release b": "record",
        "extend": "create 2, map 2, set_access 2",
        "fork": "create 8, map 8, set_access 8",
        "step of a fork": "create 2, create 1, map 2, map 1, set_access 3",
        "move": "record, map 4, map 1 x2, map 2 x2, set_access 10",
        "replace": "reserve 48, create 8, create 2, map 8 x2, map 2 x2, "
        "set_access 10 x2, record, unmap 2 x3, unmap 8, unmap 4, unmap 1 x2",
        "release d": "record",
        "give back": "unmap 4, unmap 1 x3, unmap 2 x3, unmap 8, release x8",
        "release a": "record",
        "close": "record, unmap 2 x4, unmap 1 x2, unmap 4, unmap 8 x2, free 48, free 240, release x9",
    },
    "blocks": {
        "make": "reserve 120, create 8, create 4, map 8, map 4, set_access 12",
        "admit a": "create 8, create 4, map 8, map 4, set_access 12",
        "admit b": "create 8, create 4, map 8, map 4, set_access 12",
        "steps": "create 8, create 4, map 8, map 4, set_access 12",
        "release b": "record",
        "fork": "create 8, create 4, map 8, map 4, set_access 12",
        "move": "record, map 8, map 4, set_access 12",
        "replace": "reserve 24, create 8, create 4, map 8 x2, "
        "map 4 x2, set_access 12 x2, record, unmap 4 x2, unmap 8 x2",
        "release d": "record",
        "give back": "unmap 8 x2, unmap 4 x2, release x4",
        "release a": "record",
        "close": "record, unmap 4 x4, unmap 8 x4, free 24, free 120, release x8",
    },
}
"""By kind and operation. A cache over torch's own allocations makes no driver call."""


def step(cache: KVCache) -> None:
    cache.prepare_step(np.where(cache.lengths > 0, cache.lengths + 1, 0))
    cache.map_ahead()


def calls_of_a_life(kind: str) -> dict[str, str]:
    """Driver calls by operation; those without any are left out."""
    host = HostDriver()
    driver = ListedDriver(host)
    cache = make_cache(kind, SHAPE, "cpu", lookahead=8, driver=driver)
    calls = {"make": driver.drain()}
    operations = [
        ("admit a", lambda: cache.admit("a", 10)),
        ("admit b", lambda: cache.admit("b", 30)),
        ("steps", lambda: [step(cache) for _ in range(8)]),
        ("release b", lambda: cache.release("b")),
        ("adopt", lambda: cache.admit("c", 35)),
        ("extend", lambda: cache.extend("c", 15)),
        ("truncate", lambda: cache.truncate("c", 20)),
    ]
    if cache.remaps:
        operations += [
            ("fork", lambda: cache.fork("c", "d", 20)),
            ("step of a fork", lambda: step(cache)),
            ("move", lambda: cache.move("a", 3)),
            ("replace", lambda: cache.replace("a")),
            ("release d", lambda: cache.release("d")),
            ("give back", lambda: cache.release_free_memory()),
        ]
    operations += [("release a", lambda: cache.release("a")), ("close", cache.close)]
    for name, operation in operations:
        operation()
        calls[name] = driver.drain()
    return {name: made for name, made in calls.items() if made}


@pytest.mark.parametrize("kind", CACHES)
def test_a_life_makes_these_driver_calls(kind: str) -> None:
    assert calls_of_a_life(kind) == CALLS[kind]
