"""A driver call fails, and so does one that undoes it: over all pairs, for every public call of a small cache.

The first error is the one raised, never InvariantViolation; the counts agree; closing frees everything.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from contents import admit, expect
from interrupting import THOROUGH
from shapes import SHAPE

from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import AddressSpaceExhausted, DriverError, KVCacheOutOfMemory, MemoryQuarantined
from trtllm_vattn.memory.arena import retry_discarded
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import FaultyDriver

PAGE = 4096
UNDOING = ("unmap", "release", "free", "map", "set_access")
CALLS: dict[str, Callable[[KVCacheManager], object]] = {
    "admit": lambda cache: cache.admit("new", 13),
    "adopt": lambda cache: cache.admit("new", 18),
    "extend": lambda cache: cache.extend("a", 11),
    "truncate": lambda cache: cache.truncate("shared", 3),
    "release": lambda cache: cache.release("shared"),
    "prepare_step": lambda cache: cache.prepare_step(np.where(cache.lengths > 0, cache.lengths + 12, 0)),
    "map_ahead": lambda cache: cache.map_ahead(),
    "fork": lambda cache: cache.fork("a", "new", 11),
    "move": lambda cache: cache.move("a", 3),
    "replace": lambda cache: cache.replace("a"),
    "prefix": lambda cache: cache.admit("new", 30, prefix=(cache.slot_of("a"), 18)),
    "retain": lambda cache: cache.retain("shared"),
    "adopt retained": lambda cache: cache.adopt(cache.retain("shared"), "new", 10, 30),
    "set_budget": lambda cache: cache.set_budget(cache.stats().held_bytes - PAGE),
    "preallocate": lambda cache: cache.preallocate(2, 9),
    "suspend": lambda cache: cache.suspend("a"),
    "resume": lambda cache: cache.resume("suspended"),
    "sleep": lambda cache: cache.sleep(keep=True),
    "sleep and wake": lambda cache: (cache.sleep(keep=True), cache.wake()),
    "reset": lambda cache: cache.reset(),
}


def left(host: HostDriver) -> tuple[int, int, int]:
    return host.live_handles, host.live_mappings, host.live_reservations


def busy(driver: FaultyDriver, layers_per_range: int) -> KVCacheManager:
    config = CacheConfig(host_memory="1MiB")
    cache = KVCacheManager(SHAPE, driver, 90 * PAGE, layers_per_range, lookahead=4, config=config)
    admit(cache, "suspended", 9)
    cache.suspend("suspended")
    admit(cache, "a", 20)
    cache.fork("a", "shared", 20)
    cache.admit("parked", 20)
    cache.release("parked")
    return cache


@pytest.mark.parametrize("layers_per_range", [4, 2])
@pytest.mark.parametrize("name", CALLS)
def test_any_call_and_any_that_undoes_it_may_fail(name: str, layers_per_range: int) -> None:
    host = HostDriver()
    driver = FaultyDriver(host)
    cache = busy(driver, layers_per_range)
    before = driver.seen
    CALLS[name](cache)
    calls = driver.seen - before
    cache.close()
    for first in range(calls):
        for turn, second in enumerate(UNDOING):
            # Which of its calls fails too, is all in turn over the pairs of calls that fail.
            for skip in range(3) if THOROUGH else [(first + turn) % 3]:
                cache = busy(driver, layers_per_range)
                driver.fail("*", skip=first)
                driver.fail(second, skip=skip)
                raised: Exception | None = None
                try:
                    CALLS[name](cache)
                except (DriverError, MemoryQuarantined, KVCacheOutOfMemory, AddressSpaceExhausted) as error:
                    raised = error
                driver.disarm()
                cache.check_integrity()
                if raised is not None and "a" in cache._slot_of and not cache._lost_memory(cache.slot_of("a")):
                    expect(cache, "a", range(20))
                cache.reset()
                cache.wake()
                cache.check_integrity()
                assert cache.stats().quarantined == 0
                admit(cache, "later", 50)
                expect(cache, "later", range(50))
                cache.close()
                assert left(host) == (0, 0, 0), (first, second, skip)
    host.close()


@pytest.mark.parametrize("layers_per_range", [4, 1])
def test_a_constructor_and_its_undoing_may_fail(layers_per_range: int) -> None:
    host = HostDriver()
    driver = FaultyDriver(host)
    for first in range(100):
        for second in ("unmap", "release", "free"):
            for skip in range(5):
                driver.disarm()
                driver.fail("*", skip=first)
                driver.fail(second, skip=skip)
                try:
                    cache = KVCacheManager(SHAPE, driver, 1 << 20, layers_per_range)
                except DriverError as error:
                    assert error.call not in ("unmap", "release", "free")  # noqa: PT017
                    assert left(host) == (0, 0, 0)
                else:
                    driver.disarm()
                    cache.close()
                    assert left(host) == (0, 0, 0)
                    if skip == 4 and second == "free":
                        assert first >= {4: 4, 1: 16}[layers_per_range]
                        return
    pytest.fail("it always failed")


def test_what_cannot_be_undone_at_all_is_tried_again_by_the_next_cache(caplog: pytest.LogCaptureFixture) -> None:
    host = HostDriver()
    driver = FaultyDriver(host)
    driver.fail("set_access")
    for _ in range(20):
        driver.fail("unmap")
    with pytest.raises(DriverError, match="set_access"):
        KVCacheManager(SHAPE, driver, 1 << 20, 4)
    assert host.live_mappings == 1
    assert "tried again at the next cache's construction or close" in caplog.text
    assert retry_discarded() == 1
    driver.disarm()
    KVCacheManager(SHAPE, HostDriver(), 1 << 20, 4).close()
    assert left(host) == (0, 0, 0)
    assert retry_discarded() == 0


@pytest.mark.parametrize("call", ["unmap", "release", "free", "record"])
def test_a_close_may_fail_twice_and_goes_on(call: str) -> None:
    host = HostDriver()
    driver = FaultyDriver(host)
    for second in ("unmap", "release", "free", "record"):
        for skip in range(3):
            cache = busy(driver, 2)
            driver.fail(call, skip=skip if call != "record" else 0)
            driver.fail(second, skip=skip)
            for _ in range(3):
                try:
                    cache.close()
                except (DriverError, MemoryQuarantined):
                    continue
            assert left(host) == (0, 0, 0)
            driver.disarm()
