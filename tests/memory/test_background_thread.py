"""The thread that works ahead, and the lock it shares with the thread that steps."""

from __future__ import annotations

import threading
from time import sleep

import pytest

from trtllm_vattn.memory.lookahead import BackgroundThread, PriorityLock


def test_it_works_until_there_is_nothing_left_and_then_sleeps() -> None:
    left = [3]

    def work() -> bool:
        left[0] -= 1
        return left[0] > 0

    thread = BackgroundThread(work)
    try:
        assert thread.wait_idle(5)
        assert left == [0]
        wakes = thread.wakes
        sleep(0.05)
        assert thread.wakes == wakes
        left[0] = 2
        thread.wake()
        assert thread.wait_idle(5)
        assert (left, thread.wakes) == ([0], wakes + 1)
    finally:
        thread.close()


def test_errors_are_kept_one_by_one_and_do_not_end_it() -> None:
    failing = ["first", "second"]

    def work() -> bool:
        if failing:
            raise ValueError(failing.pop(0))
        return False

    thread = BackgroundThread(work)
    try:
        assert thread.wait_idle(5)
        thread.wake()
        assert thread.wait_idle(5)
        with pytest.raises(ValueError, match="first"):
            thread.raise_error()
        with pytest.raises(ValueError, match="second"):
            thread.raise_error()
        thread.raise_error()
        wakes = thread.wakes
        thread.wake()
        assert thread.wait_idle(5)
        assert thread.wakes == wakes + 1
    finally:
        thread.close()


def test_closing_ends_it_in_the_middle_of_its_work() -> None:
    thread = BackgroundThread(lambda: True)
    assert not thread.wait_idle(0.02)
    thread.close()
    thread.close()
    assert not thread._thread.is_alive()


def test_it_wakes_by_itself_where_told_to() -> None:
    turns = threading.Semaphore(0)

    def work() -> bool:
        turns.release()
        return False

    thread = BackgroundThread(work, period_s=0.01)
    try:
        assert all(turns.acquire(timeout=10) for _ in range(4))
    finally:
        thread.close()


def test_the_lock_lets_one_in_and_the_stepping_thread_first(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = PriorityLock()
    inside = threading.Event()
    units, before = [0], [0]
    acquire = lock._free.acquire

    def acquired(blocking: bool = True) -> bool:
        # Where it waits, from here on: others may have had the processor until then.
        before[0] = units[0]
        return acquire(blocking)

    monkeypatch.setattr(lock._free, "acquire", acquired)

    def work() -> bool:
        with lock.in_background():
            assert not inside.is_set()
            units[0] += 1
            sleep(0.002)
        return units[0] < 10_000

    thread = BackgroundThread(work)
    try:
        for _ in range(20):
            waited_s = lock.waited_s
            with lock:
                # It waits for the unit under way, not for its turn in a queue.
                assert units[0] <= before[0] + 2 or lock.waited_s == waited_s
                with lock:
                    inside.set()
                    sleep(0.001)
                    inside.clear()
            sleep(0.001)
        assert lock.waited_s > 0
    finally:
        thread.close()
    thread.raise_error()
