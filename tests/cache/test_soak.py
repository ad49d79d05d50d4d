"""A long random life in which two of a hundred driver calls fail: no leak, no wrong byte, books that agree."""

from __future__ import annotations

import random

import numpy as np
import pytest
from contents import expect, fill
from shapes import SHAPE

from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import ConfigError, DriverError, KVCacheOutOfMemory, NoFreeSlot, SequenceTooLong
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import FaultyDriver


def one_step(cache: KVCacheManager, lengths: dict[int, int], choose: random.Random, number: int) -> None:
    action = choose.choice(("admit", "admit", "step", "step", "step", "release", "truncate"))
    if action == "admit":
        tokens = choose.randint(1, SHAPE.max_seq_len)
        cache.admit(number, tokens)
        fill(cache, number, range(tokens))
        lengths[number] = tokens
    elif action == "step":
        wanted = np.where(cache.lengths > 0, cache.lengths + 1, 0)
        cache.prepare_step(wanted)
        for sequence, length in lengths.items():
            fill(cache, sequence, range(length, length + 1))
            lengths[sequence] = length + 1
        cache.map_ahead()
    elif lengths:
        sequence = choose.choice(sorted(lengths))
        if action == "release":
            cache.release(sequence)
            del lengths[sequence]
        else:
            lengths[sequence] = choose.randint(1, lengths[sequence])
            cache.truncate(sequence, lengths[sequence])


@pytest.mark.parametrize("layers_per_range", [1, 4])
def test_random_failures_lose_nothing(layers_per_range: int) -> None:
    host = HostDriver()
    driver = FaultyDriver(host)
    choose = random.Random(layers_per_range)
    failures = rebuilt = 0
    for life in range(12):
        driver.disarm()
        cache = KVCacheManager(SHAPE, driver, 60 * 4096, layers_per_range, lookahead=8)
        driver.fail_randomly(0.02, seed=life)
        lengths: dict[int, int] = {}
        for number in range(150):
            try:
                one_step(cache, lengths, choose, number)
            except DriverError:
                failures += 1
            except (KVCacheOutOfMemory, NoFreeSlot, SequenceTooLong):
                for sequence in list(lengths)[:1]:
                    del lengths[sequence]
                    driver.disarm()
                    cache.release(sequence)
                    driver.fail_randomly(0.02, seed=number)
            cache.check_integrity()
            for sequence, length in lengths.items():
                expect(cache, sequence, range(length))
        for _ in range(50):
            try:
                cache.close()
                break
            except DriverError:
                rebuilt += 1
        assert (host.live_mappings, host.live_handles, host.live_reservations) == (0, 0, 0)
    assert failures > 20
    assert rebuilt > 0


def test_the_soak_counts_real_failures() -> None:
    driver = FaultyDriver(HostDriver())
    driver.fail_randomly(1.0, seed=0)
    with pytest.raises(DriverError):
        KVCacheManager(SHAPE, driver, 1 << 20)
    with pytest.raises(ConfigError):
        KVCacheManager(SHAPE, driver, 1 << 20, lookahead=-1)
