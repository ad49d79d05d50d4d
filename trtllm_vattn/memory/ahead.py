"""A thread that maps ahead, and the gate between it and the thread that steps.

Driver calls release the GIL, and are made one at a time: the driver serialises them anyway, so a second thread in it
would only wait there, out of sight. The gate is where waiting is seen, and where the stepping thread goes first.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from types import TracebackType

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
        self._state = threading.Condition()
        self._pending, self._asleep, self._stopping = True, False, False
        self._errors: deque[Exception] = deque()
        self.wakes = 0
        self._thread = threading.Thread(target=self._run, name="vattn-map-ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping:
            with self._state:
                self._asleep = True
                self._state.notify_all()
                self._state.wait_for(lambda: self._pending, self._period_s)
                self._pending = self._asleep = False
            self.wakes += 1
            try:
                while not self._stopping and self._work():
                    pass
            except Exception as error:
                # Raised where somebody can act on it: by the next `raise_error`.
                logger.warning("mapping ahead failed: %s", error)
                self._errors.append(error)

    def wake(self) -> None:
        """There is something to do. Does not wait for it."""
        with self._state:
            self._pending = True
            self._state.notify_all()

    def wait_idle(self, timeout_s: float) -> bool:
        """Whether it fell asleep, with nothing left to do, within so many seconds."""
        with self._state:
            return self._state.wait_for(lambda: self._asleep and not self._pending, timeout_s)

    def raise_error(self) -> None:
        """Raise the oldest error that `work` met and nobody was told of; after `close`, only that one."""
        if self._errors:
            error = self._errors.popleft()
            if self._stopping:
                self._errors.clear()
            raise error

    def close(self) -> None:
        """Stop after the bite it is in. Idempotent."""
        self._stopping = True
        self.wake()
        self._thread.join()
