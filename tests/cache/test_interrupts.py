"""Ctrl-C at every instruction of every public call: the cache goes on or says that it cannot, closing frees everything
and nothing waits for ever.

By default every n-th instruction is tried; VATTN_THOROUGH=1 tries all of them.
"""

from __future__ import annotations

import gc
import random
import signal
import threading
import warnings
from collections.abc import Callable
from time import monotonic, sleep

import numpy as np
import pytest
from contents import admit, expect, fill
from interrupting import THOROUGH, instructions_of, interrupt_at, numbers, within
from shapes import SHAPE

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.select import CACHES, make_cache
from trtllm_vattn.errors import CacheInterrupted, ManagerClosed, NoFreeSlot, UnknownSequence
from trtllm_vattn.memory.lookahead import BackgroundThread
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.tensors import tensor_at
from trtllm_vattn.vmm.uninterrupted import drain, uninterrupted

PAGE = 4096
Call = Callable[[KVCacheManager], object]


def longer(cache: KVCache, by: int = 1) -> np.ndarray:
    return np.where(cache.lengths > 0, np.minimum(cache.lengths + by, SHAPE.max_seq_len), 0)


COMMON: dict[str, Callable[[KVCache], object]] = {
    "admit": lambda cache: cache.admit("new", 13),
    "extend": lambda cache: cache.extend("a", 11),
    "truncate": lambda cache: cache.truncate("a", 7),
    "release": lambda cache: cache.release("b"),
    "prepare_step": lambda cache: cache.prepare_step(longer(cache)),
    "prepare_step that maps": lambda cache: cache.prepare_step(longer(cache, 12)),
    "stats": lambda cache: cache.stats(),
    "check_integrity": lambda cache: cache.check_integrity(),
    "reset": lambda cache: cache.reset(),
    "close": lambda cache: cache.close(),
}
CALLS: dict[str, Call] = {
    **COMMON,
    "fork": lambda cache: cache.fork("a", "forked", 11),
    "truncate that copies": lambda cache: cache.truncate("shared", 3),
    "move": lambda cache: cache.move("a", 3),
    "replace": lambda cache: cache.replace("a"),
    "retain": lambda cache: cache.retain("b"),
    "adopt": lambda cache: cache.adopt(cache.retain("b"), "adopted", 9, 20),
    "admit with a prefix": lambda cache: cache.admit("new", 30, prefix=(cache.slot_of("a"), 18)),
    "admit with an alias": lambda cache: cache.admit("new", 30, alias=(cache.slot_of("a"), 18)),
    "set_budget up": lambda cache: cache.set_budget(100 * PAGE),
    "set_budget down": lambda cache: cache.set_budget(cache.stats().held_bytes - PAGE),
    "preallocate": lambda cache: cache.preallocate(2, 9),
    "preallocate_for": lambda cache: cache.preallocate_for([9, 9]),
    "map_ahead": lambda cache: cache.map_ahead(),
    "start_thread": lambda cache: cache.start_thread(),
    "placement": lambda cache: cache.placement(),
}


def started(kind: str, driver: HostDriver, threaded: bool = False) -> KVCache:
    """A cache with sequences a, b and, where memory can be shared, one that shares with a."""
    fixed = kind in ("vattn", "blocks", "published")
    cache = make_cache(kind, SHAPE, "cpu", 90 * PAGE if fixed else None, driver=driver)
    if threaded:
        cache.start_thread()
    for sequence, tokens in (("a", 20), ("b", 9)):
        admit(cache, sequence, tokens)
    if isinstance(cache, KVCacheManager):
        cache.fork("a", "shared", 20)
        cache.admit("parked", 20)
        cache.release("parked")
    return cache


def goes_on(cache: KVCache, may_have_ended: bool) -> None:
    """Everything that was written is there and new sequences come and go, after a reset if the cache asks for one."""
    try:
        cache.check_integrity()
    except CacheInterrupted:
        assert not isinstance(cache, KVCacheManager), "it never has to be reset"
        with pytest.raises(CacheInterrupted, match=r"interrupted inside \w+\(\); call reset\(\) or close\(\)"):
            cache.admit("late", 3)
        cache.reset()
        cache.check_integrity()
    except ManagerClosed:
        assert may_have_ended
        return
    if isinstance(cache, KVCacheManager):
        cache.set_budget(120 * PAGE)
    for sequence in ("a", "b"):
        try:
            slot = cache.slot_of(sequence)
        except UnknownSequence:
            continue
        expect(cache, sequence, range(min(int(cache.lengths[slot]), {"a": 20, "b": 9}[sequence])))
    try:
        cache.admit("late", 3)
    except NoFreeSlot:
        there = [one for slot in range(cache.shape.num_slots) if (one := cache.sequence_at(slot)) is not None]
        cache.release("shared" if "shared" in there else there[0])
        cache.admit("late", 3)
    fill(cache, "late", range(3))
    expect(cache, "late", range(3))
    cache.reset()
    cache.check_integrity()
    assert cache.stats().sequences == 0
    cache.admit("later", 20)


def interrupted(kind: str, name: str, call: Callable[..., object], threaded: bool, stride: int) -> None:
    with HostDriverThatIsEmpty() as driver:
        cache = started(kind, driver, threaded)
        count = instructions_of(lambda: call(cache))
        cache.close()
    assert count > 5
    hits = 0
    for number in numbers(count, stride):
        with HostDriverThatIsEmpty() as driver:
            cache = started(kind, driver, threaded)
            hits += interrupt_at(number, lambda cache=cache: call(cache))  # type: ignore[misc]
            # At once, and from another thread: what was interrupted may hold nothing that this one waits for.
            if number % 2:
                within(20, cache.close)
            else:
                goes_on(cache, name == "close")
            cache.close()
            cache.close()
    assert hits > min(count, 5) / 2


class HostDriverThatIsEmpty:
    """A host driver in which nothing is left."""

    def __enter__(self) -> HostDriver:
        self.driver = HostDriver()
        return self.driver

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            left = (self.driver.live_handles, self.driver.live_mappings, self.driver.live_reservations)
            assert left == (0, 0, 0)
        self.driver.close()


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_interrupted_anywhere(name: str, threaded: bool) -> None:
    interrupted("vattn", name, CALLS[name], threaded, 29)


@pytest.mark.parametrize("name", COMMON)
@pytest.mark.parametrize("kind", [kind for kind in CACHES if kind not in ("vattn", "paged-64", "token")])
def test_a_call_of_a_sibling_interrupted_anywhere(kind: str, name: str) -> None:
    interrupted(kind, name, COMMON[name], False, 71)


def test_a_constructor_interrupted_anywhere() -> None:
    def build(driver: HostDriver) -> KVCacheManager:
        return KVCacheManager(SHAPE, driver, 30 * PAGE, 1)

    with HostDriverThatIsEmpty() as driver:
        built: list[KVCacheManager] = []
        uninterrupted(gc.collect)
        count = instructions_of(lambda: built.append(build(driver)))
        built[0].close()
    for number in numbers(count, 97):
        with HostDriverThatIsEmpty() as driver, warnings.catch_warnings():
            # At its last instructions there is a cache, which is dropped.
            warnings.simplefilter("ignore", ResourceWarning)
            assert interrupt_at(number, lambda driver=driver: build(driver))  # type: ignore[misc]
            drain()
            gc.collect()


def test_a_tensor_interrupted_anywhere_keeps_nothing() -> None:
    class Owner:
        alive = 0

        def __init__(self) -> None:
            Owner.alive += 1

        def __del__(self) -> None:
            Owner.alive -= 1

    memory = np.zeros(4096, np.uint8)
    uninterrupted(gc.collect)
    count = instructions_of(lambda: tensor_at(memory.ctypes.data, 4096, "cpu", Owner()))
    for number in range(count):
        assert interrupt_at(number, lambda: tensor_at(memory.ctypes.data, 4096, "cpu", Owner()))
    gc.collect()
    assert Owner.alive == 0


def test_a_thread_whose_start_or_end_is_interrupted_stops() -> None:
    count = instructions_of(lambda: BackgroundThread(lambda: False).close())
    for number in numbers(count, 7):
        made: list[BackgroundThread] = []

        def life(made: list[BackgroundThread] = made) -> None:
            made.append(BackgroundThread(lambda: False))
            made[0].wake()
            made[0].wait_idle(5)
            made[0].close()

        assert interrupt_at(number, life)
        for thread in made:
            within(10, thread.close)


@pytest.mark.parametrize("lives", [200 if THOROUGH else 15])
def test_random_interrupts_of_a_busy_cache(lives: int) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for seed in range(lives):
            with HostDriverThatIsEmpty() as driver:
                _busy_until_interrupted(random.Random(seed), driver)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _busy_until_interrupted(choice: random.Random, driver: HostDriver) -> None:
    cache = started("vattn", driver, threaded=True)
    assert isinstance(cache, KVCacheManager)
    calls = [CALLS[name] for name in CALLS if name not in ("close", "reset")]
    try:
        signal.setitimer(signal.ITIMER_REAL, choice.uniform(1e-4, 1e-2))
        until = monotonic() + 20
        while monotonic() < until:
            try:
                choice.choice(calls)(cache)
            except Exception:
                # In this order: the first reads the last.
                there = [each for each in ("new", "adopted", "forked", "a") if each in cache.sequences]
                cache.release(there[0]) if there else cache.reset()
        pytest.fail("no interrupt came")
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
    goes_on(cache, False)
    within(20, cache.close)


def test_a_call_interrupted_anywhere_is_done_before_the_interrupt_is_raised_or_never() -> None:
    done: list[bool] = []

    def slow() -> None:
        sleep(0.002)
        done.append(True)

    uninterrupted(slow)  # which starts the thread, for the first time
    was_done = []
    for number in range(instructions_of(lambda: uninterrupted(slow))):
        done.clear()
        assert interrupt_at(number, lambda: uninterrupted(slow))
        was_done.append(bool(done))
        drain()
        assert bool(done) is was_done[-1], f"instruction {number}: done after the interrupt was raised"
    # From the hand-over on it is done, whoever comes first.
    assert was_done == sorted(was_done)
    assert {*was_done} == {False, True}


def test_a_second_interrupt_ends_the_wait_and_the_call_is_done_all_the_same() -> None:
    begun, goes = threading.Event(), threading.Event()
    done, came = [], []

    def slow() -> None:
        begun.set()
        goes.wait(20)
        done.append(True)

    def interrupt(*_: object) -> None:
        if len(came) < 2:
            came.append(True)
            raise KeyboardInterrupt

    def twice() -> None:
        begun.wait(20)
        while len(came) < 2:
            # Signals that nobody looked at yet are one.
            threading.Event().wait(0.3)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, interrupt)
    helper = threading.Thread(target=twice)
    try:
        helper.start()
        with pytest.raises(KeyboardInterrupt):
            uninterrupted(slow)
    finally:
        helper.join()
        signal.signal(signal.SIGALRM, before)
    assert not done
    goes.set()
    drain()
    assert done


def test_an_interrupted_cache_that_is_reset_keeps_its_addresses(host_driver: HostDriver) -> None:
    with KVCacheManager(SHAPE, host_driver, 90 * PAGE) as cache:
        cache.admit("a", 20)
        view, address = cache.layer(0), cache.layer(0).k.data_ptr()
        reservations = host_driver.live_reservations
        cache.reset()
        cache.reset()
        assert cache.layer(0) is view
        assert cache.layer(0).k.data_ptr() == address
        assert host_driver.live_reservations == reservations
        assert cache.lengths.tolist() == cache.frontiers.tolist() == [0] * SHAPE.num_slots
        stats = cache.stats()
        assert (stats.sequences, stats.mapped_bytes, stats.parked_bytes) == (0, 0, 0)
        assert stats.budget_bytes == 90 * PAGE
        admit(cache, "a", 50)
        expect(cache, "a", range(50))
        # What pads a batch is there.
        cache.layer(0).k[cache.dummy_slot, 0] = 1
