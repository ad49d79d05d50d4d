"""Calls that Ctrl-C cannot cut in two.

Python runs signal handlers in the main thread, between any two of its instructions, so a KeyboardInterrupt there may
come between a driver call and the line that notes it, or between a lock's acquisition and its `with`. It runs them in
no other thread. What must be done whole is therefore done by a helper thread when the main thread asks for it, while
the main thread waits; any other thread does it itself. A hand-over takes 10 to 30 us.
"""

from __future__ import annotations

import _thread
import atexit
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from operator import length_hint
from typing import Any, TypeVar

T = TypeVar("T")
_PATIENCE_S = 5.0
"""Seconds that a finalizer, and the end of the interpreter, wait for the helper thread."""


class _Job:
    __slots__ = ("answer", "arguments", "call", "done", "error", "is_done")

    def __init__(self, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.call, self.arguments = call, arguments
        self.answer: Any = None
        self.error: BaseException | None = None
        self.is_done = False
        self.done = _thread.allocate_lock()
        self.done.acquire()

    def run(self) -> None:
        try:
            self.answer = self.call(*self.arguments)
        except BaseException as error:
            self.error = error
        # What the job held must not outlive it: whoever waits may be the last to hold it.
        del self.call, self.arguments
        self.is_done = True
        self.done.release()


class _Helper:
    """The thread, started by the first job. Everything the main thread does with it is one call into C."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self.idents: list[int] = []
        self._first = iter([self._serve])

    def _serve(self) -> None:
        while True:
            job = self.jobs.get()
            job.run()
            del job

    def submit(self, jobs: Iterator[_Job]) -> None:
        """Hand jobs over; where this is interrupted, the iterator says by what is left in it which were."""
        if not self.idents:
            try:
                # One operation for signals: the iterator is used up, the thread started and noted, or nothing is.
                self.idents.extend(map(_thread.start_new_thread, self._first, ((),)))
            except RuntimeError:
                self._first = iter([self._serve])
                raise
        deque(map(self.jobs.put, jobs), maxlen=0)


_helper = _Helper()


def uninterrupted(call: Callable[..., T], *arguments: Any) -> T:
    """``call(*arguments)``, done whole whatever signal comes; its answer, or what it raised.

    A KeyboardInterrupt, or whatever else a signal handler raises, is raised once the call is done, and its answer is
    lost; or the call was not begun, and is not any more. A second one is raised at once, and the call goes on: `drain`
    waits for it.
    """
    if _thread.get_ident() != threading.main_thread().ident:
        return call(*arguments)
    job = _Job(call, arguments)
    left = iter((job,))
    try:
        _helper.submit(left)
        job.done.acquire()
    except BaseException:
        # It may have come before the job was handed over, and after the acquisition.
        if not length_hint(left) and not job.is_done:
            job.done.acquire()
        raise
    answer: T = _outcome(job)
    return answer


def _outcome(job: _Job) -> Any:
    error, job.error = job.error, None
    if error is not None:
        try:
            raise error
        finally:
            # An error holds the frames that it went through, and this one would hold the error.
            del error
    return job.answer


def drain() -> None:
    """Wait for calls that were interrupted twice and are still under way. From any thread."""
    if _helper.idents and _thread.get_ident() not in _helper.idents:
        job = _Job(lambda: None, ())
        _helper.submit(iter((job,)))
        job.done.acquire()


def finalize(call: Callable[..., object], *arguments: Any) -> None:
    """Have a call done for a finalizer, which may run in any thread, at any moment, inside any lock: it is left to the
    helper thread. The main thread waits for it, though not for ever; others may hold what it needs."""
    job = _Job(call, arguments)
    try:
        _helper.submit(iter((job,)))
    except RuntimeError:
        # No thread can be started any more: the process ends, and the system takes everything back.
        return
    if _thread.get_ident() == threading.main_thread().ident and job.done.acquire(timeout=_PATIENCE_S):
        _outcome(job)


@atexit.register
def _leave_in_peace() -> None:
    """No call is under way when the interpreter goes: a thread that comes back to it then ends the process."""
    if _helper.idents:
        job = _Job(lambda: None, ())
        _helper.submit(iter((job,)))
        job.done.acquire(timeout=_PATIENCE_S)


def _begin_anew() -> None:
    """A forked child has no helper thread yet."""
    global _helper
    _helper = _Helper()


os.register_at_fork(after_in_child=_begin_anew)
