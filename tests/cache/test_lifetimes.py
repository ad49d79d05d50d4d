"""Caches that are dropped, that live when the interpreter ends, and that a forked child inherits."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from subprocess import CompletedProcess
from time import process_time

import pytest
from shapes import SHAPE

from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import AddressSpaceExhausted
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.owners import Extent

Apart = Callable[..., CompletedProcess[str]]


def left(driver: HostDriver) -> tuple[int, int, int]:
    return driver.live_handles, driver.live_mappings, driver.live_reservations


@pytest.mark.parametrize("threaded", [False, True])
def test_a_cache_that_is_dropped_gives_everything_back_and_warns(threaded: bool) -> None:
    driver = HostDriver()
    before = set(threading.enumerate())
    cache = KVCacheManager(SHAPE, driver, 1 << 20)
    if threaded:
        cache.start_thread()
    cache.admit("a", 20)
    gone = weakref.ref(cache)
    with pytest.warns(ResourceWarning, match="a KV cache of .* bytes was not closed"):
        del cache
    assert gone() is None
    assert left(driver) == (0, 0, 0)
    assert not [each for each in set(threading.enumerate()) - before if each.name == "vattn-map-ahead"]


def test_a_tensor_keeps_the_memory_of_a_cache_that_is_dropped() -> None:
    driver = HostDriver()
    cache = KVCacheManager(SHAPE, driver, 1 << 20)
    cache.admit("a", 20)
    k = cache.layer(0).k
    k[0, 3] = 7
    del cache
    gc.collect()
    assert bool((k[0, 3] == 7).all())
    k[0, 3] = 8
    assert driver.live_mappings
    with pytest.warns(ResourceWarning, match="was not closed"):
        del k
    assert left(driver) == (0, 0, 0)


def test_a_closed_cache_is_dropped_in_silence(host_driver: HostDriver) -> None:
    cache = KVCacheManager(SHAPE, host_driver, 1 << 20)
    cache.close()
    del cache
    gc.collect()


def test_a_driver_that_is_dropped_with_memory_gives_it_back_and_warns() -> None:
    driver = HostDriver()
    extent = Extent(driver, 4096)
    extent._open = 0
    del extent
    with pytest.warns(ResourceWarning, match="a HostDriver was dropped with 1 handles and 0 reservations"):
        del driver


LIVE = """
import os, sys, torch
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import WrongProcess
from trtllm_vattn.vmm.host import HostDriver
shape = CacheShape(num_layers=2, num_kv_heads=2, head_dim=24, dtype=torch.float32, num_slots=4, max_seq_len=50)
driver = HostDriver()
cache = KVCacheManager(shape, driver, 1 << 20)
cache.start_thread()
cache.admit("a", 20)
k = cache.layer(0).k
k[0, 3] = 7
"""


def test_the_interpreter_ends_with_a_live_cache(run_apart: Apart) -> None:
    done = run_apart("import warnings; warnings.simplefilter('error')" + LIVE)
    assert (done.returncode, done.stderr) == (0, "")


FORK = """
child = os.fork()
if not child:
    refused = []
    calls = dict(
        admit=lambda: cache.admit("b", 3), extend=lambda: cache.extend("a", 1), release=lambda: cache.release("a"),
        step=lambda: cache.prepare_step(cache.lengths + 1), ahead=cache.map_ahead, stats=cache.stats,
        layer=lambda: cache.layer(0), reset=cache.reset, close=cache.close, driver=lambda: driver.create(4096),
    )
    for name, call in calls.items():
        try:
            call()
        except WrongProcess as error:
            assert f"made in process {os.getppid()}" in str(error), error
            refused.append(name)
    assert refused == list(calls), refused
    # Its own is none of this.
    with KVCacheManager(shape, HostDriver(), 1 << 20) as own:
        own.start_thread()
        own.admit("a", 20)
        own.check_integrity()
    del cache, k, driver
    import gc
    gc.collect()
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_child_is_refused_and_its_end_harms_nobody(run_apart: Apart) -> None:
    after = """
cache.check_integrity()
assert bool((k[0, 3] == 7).all())
cache.extend("a", 20)
del k
cache.close()
assert (driver.live_handles, driver.live_mappings, driver.live_reservations) == (0, 0, 0)
"""
    done = run_apart("import warnings; warnings.simplefilter('error')" + LIVE + FORK + after)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_a_forked_child_cannot_write_to_its_parents_memory(run_apart: Apart) -> None:
    write = """
child = os.fork()
if not child:
    k[0, 3] = 9
    os._exit(0)
status = os.waitpid(child, 0)[1]
assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == 11, status
assert bool((k[0, 3] == 7).all())
del k
cache.close()
"""
    done = run_apart(LIVE + write)
    assert done.returncode == 0, done.stderr


def test_a_hundred_thousand_slots_are_made_and_used() -> None:
    driver = HostDriver()
    with KVCacheManager(replace(SHAPE, num_slots=100_000), driver, 1 << 20) as cache:
        started = process_time()
        for number in range(20):
            cache.admit(number, 20)
        cache.prepare_step(cache.lengths + (cache.lengths > 0))
        cache.release(3)
        # Slots that were never used are not looked at.
        assert process_time() - started < 0.5
        assert cache.admit("again", 20) == 3
        cache.move("again", 99_999)
        cache.release("again")
        cache.check_integrity()
    assert left(driver) == (0, 0, 0)


def test_slots_that_addresses_do_not_suffice_for_are_refused_with_the_numbers() -> None:
    driver = HostDriver()
    shape = replace(SHAPE, num_slots=100_000, max_seq_len=1 << 32)
    with pytest.raises(AddressSpaceExhausted, match=r"100,000 slots and a dummy of [\d,]+ bytes .* lower the number"):
        KVCacheManager(shape, driver, 1 << 20)
    assert left(driver) == (0, 0, 0)
