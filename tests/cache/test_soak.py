"""A long random life in which two of a hundred driver calls fail: no leak, no wrong byte, counts that agree."""

from __future__ import annotations

import pytest
from contents import expect, fill
from interrupting import THOROUGH
from shapes import SHAPE

from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import ConfigError, DriverError, KVCacheOutOfMemory, MemoryQuarantined, NoFreeSlot
from trtllm_vattn.verify.workload import CacheWorkload
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import FaultyDriver

WEIGHTS = {"admit": 2, "step": 3, "release": 1, "truncate": 1}


class Filled(CacheWorkload):
    """Tokens hold the pattern of their sequence."""

    def write(self, sequence: int, tokens: range) -> None:
        fill(self.cache, sequence, tokens)


@pytest.mark.parametrize("layers_per_range", [1, 4])
def test_random_failures_lose_nothing(layers_per_range: int) -> None:
    host = HostDriver()
    driver = FaultyDriver(host)
    failures = rebuilt = 0
    for life in range(12 if THOROUGH else 6):
        driver.disarm()
        cache = KVCacheManager(SHAPE, driver, 60 * 4096, layers_per_range, lookahead=8)
        driver.fail_randomly(0.02, seed=life)
        workload = Filled(cache, 12 * layers_per_range + life)
        for number in range(150):
            try:
                workload.run_one(WEIGHTS)
            except (DriverError, MemoryQuarantined):
                failures += 1
            except (KVCacheOutOfMemory, NoFreeSlot):
                for sequence in list(workload.authors)[:1]:
                    driver.disarm()
                    workload.end(sequence)
                    driver.fail_randomly(0.02, seed=number)
            cache.check_integrity()
            for sequence, authors in workload.authors.items():
                expect(cache, sequence, range(len(authors)))
        for _ in range(50):
            try:
                cache.close()
                break
            except (DriverError, MemoryQuarantined):
                rebuilt += 1
        assert (host.live_mappings, host.live_handles, host.live_reservations) == (0, 0, 0)
    assert failures > 10
    assert rebuilt > 0


def test_the_soak_counts_real_failures() -> None:
    driver = FaultyDriver(HostDriver())
    driver.fail_randomly(1.0, seed=0)
    with pytest.raises(DriverError):
        KVCacheManager(SHAPE, driver, 1 << 20)
    with pytest.raises(ConfigError):
        KVCacheManager(SHAPE, driver, 1 << 20, lookahead=-1)
