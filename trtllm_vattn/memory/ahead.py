"""A thread that maps ahead, and the gate between it and the thread that steps.

Driver calls release the GIL, and are made one at a time: the driver serialises them anyway, so a second thread in it
would only wait there, out of sight. The gate is where waiting is seen, and where the stepping thread goes first.
"""

from __future__ import annotations

import _thread
import atexit
import logging
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from types import TracebackType

from trtllm_vattn.vmm.uninterrupted import uninterrupted

logger = logging.getLogger(__name__)


class Gate:
    """Mutual exclusion of one stepping thread, which enters it as a context and may enter it again inside, and one in
    the background, which gives way.

    Attributes
    ----------
    waited_s : float
        Seconds that the stepping thread has waited for the other one, in all.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._wanted = False
        self.waited_s = 0.0

    def __enter__(self) -> None:
        if not self._free.acquire(blocking=False):
            started = perf_counter()
            self._wanted = True
            self._free.acquire()
            self._wanted = False
            self.waited_s += perf_counter() - started

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._free.notify_all()
        self._free.release()

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Inside, when the stepping thread is not and does not want to be."""
        with self._free:
            self._free.wait_for(lambda: not self._wanted)
            yield


class BackgroundThread:
    """Runs `work` when woken, again and again for as long as it returns True; sleeps otherwise.

    It holds `work` and nothing else alive, and is stopped when the interpreter ends.

    Parameters
    ----------
    work : callable
        One bite of what there is to do, a few driver calls at most; returns whether there may be more to do now.
    period_s : float or None
        Seconds after which it wakes by itself; None is never.

    Attributes
    ----------
    wakes : int
        How often it woke.
    """

    def __init__(self, work: Callable[[], bool], period_s: float | None = None) -> None:
        self._work, self._period_s = work, period_s
        # None wakes it; a lock is released once all that was asked for before is done. Putting either is one operation
        # for signals, so that nobody who is interrupted leaves the thread waiting.
        self._asked: queue.SimpleQueue[_thread.LockType | None] = queue.SimpleQueue()
        self._asked.put(None)
        self._stopping = False
        self._errors: deque[Exception] = deque()
        self.wakes = 0
        self._thread = threading.Thread(target=self._run, name="vattn-map-ahead", daemon=True)
        uninterrupted(self._thread.start)
        _running.add(self)

    def _run(self) -> None:
        while not self._stopping:
            woken, waiting = self._next()
            if woken:
                self.wakes += 1
                try:
                    while not self._stopping and self._work():
                        pass
                except Exception as error:
                    # Raised where somebody can act on it: by the next `raise_error`.
                    logger.warning("mapping ahead failed: %s", error)
                    self._errors.append(error)
            for each in waiting:
                each.release()

    def _next(self) -> tuple[bool, list[_thread.LockType]]:
        """Sleep until something is asked; whether to work, and whom to tell afterwards."""
        waiting: list[_thread.LockType] = []
        try:
            asked = [self._asked.get(timeout=self._period_s)]
        except queue.Empty:
            return True, waiting
        while not self._asked.empty():
            asked.append(self._asked.get())
        waiting = [each for each in asked if each is not None]
        return None in asked, waiting

    def wake(self) -> None:
        """There is something to do. Does not wait for it."""
        self._asked.put(None)

    def wait_idle(self, timeout_s: float) -> bool:
        """Whether it did all that it was woken for, and sleeps, within so many seconds."""
        idle = _thread.allocate_lock()
        idle.acquire()
        self._asked.put(idle)
        return self._stopping or idle.acquire(timeout=timeout_s)

    def raise_error(self) -> None:
        """Raise the oldest error that `work` met and nobody was told of; after `close`, only that one."""
        if self._errors:
            error = self._errors.popleft()
            if self._stopping:
                self._errors.clear()
            raise error

    def close(self, timeout_s: float | None = None) -> None:
        """Stop after the bite it is in, waiting so long for that. Idempotent."""
        self._stopping = True
        self.wake()
        self._thread.join(timeout_s)


_running: weakref.WeakSet[BackgroundThread] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """A thread that comes back from a driver call to an interpreter that is gone would end the process."""
    for thread in list(_running):
        thread.close(timeout_s=5.0)


# A forked child has none of its parent's threads.
os.register_at_fork(after_in_child=_running.clear)
