"""One driver call of an operation fails, each in turn."""

from __future__ import annotations

from collections.abc import Callable

from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import DriverError, KVCacheOutOfMemory
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import FaultyDriver


def fail_each_call(
    build: Callable[[FaultyDriver], KVCacheManager],
    call: Callable[[KVCacheManager], object],
    check: Callable[[KVCacheManager, bool], object],
) -> int:
    """Build a cache, make a call whose first, second, … driver call fails, and check it, until none failed; returns how
    often the call raised. `check` gets the cache and whether it raised. Each cache agrees with itself, and leaves
    nothing behind."""
    raised = 0
    for skip in range(200):
        host = HostDriver()
        driver = FaultyDriver(host)
        cache = build(driver)
        driver.seen = 0
        driver.fail("*", skip=skip)
        failed = False
        try:
            call(cache)
        except (DriverError, KVCacheOutOfMemory):
            failed = True
            raised += 1
        done = driver.seen <= skip
        driver.disarm()
        cache.check_integrity()
        check(cache, failed)
        cache.close()
        assert (host.live_mappings, host.live_handles, host.live_reservations) == (0, 0, 0)
        host.close()
        if done:
            return raised
    raise AssertionError("a driver call failed each time")
