"""Mapping ahead: which running slots need memory before their sequences get there, and the thread that maps it.

Driver calls release the GIL, and are made one at a time: the driver serialises them anyway, so a second thread in it
would only wait there, unmeasured. Threads wait at `PriorityLock` instead, which measures the time and lets the stepping
thread go first.
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

import numpy as np

from trtllm_vattn.errors import KVCacheOutOfMemory
from trtllm_vattn.memory.arena import Arena
from trtllm_vattn.vmm.uninterrupted import uninterrupted

logger = logging.getLogger(__name__)

FIRST_STEP_S = 5e-3
"""Seconds a decode step is taken to last before one was seen; about Llama-3-8B's of one sequence on an H200."""
FIRST_MAPPING_S = 150e-6
"""Seconds to create, map and make accessible one extent beside running kernels, before one was seen (H200)."""
SAFETY = 2
"""How many times the time that mapping takes is allowed for: kernels, and other threads, make calls slower."""
LEAST = 4
"""Tokens; a launch, the one started ahead of it, and as much again."""
SAMPLES = 15
"""How many of the last steps and mappings are remembered."""


class StepTimingModel:
    """How long a step and a mapping take: the median of the last steps, the slow end of the last mappings.

    Parameters
    ----------
    clock : callable
        Returns seconds; never goes back.

    Attributes
    ----------
    step_s, mapping_s : float
        Seconds of a step, and of a mapping.
    launch : int
        Tokens that a sequence grew by in the last launch.
    most_growth : int
        Tokens that one may grow by in a launch, where that varies.
    """

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self.clock = clock
        self.step_s, self.mapping_s, self.launch = FIRST_STEP_S, FIRST_MAPPING_S, 1
        self.most_growth = 1
        self._steps: deque[float] = deque(maxlen=SAMPLES)
        self._mappings: deque[float] = deque(maxlen=SAMPLES)
        self._lengths = np.zeros(0, np.int64)
        self._seen_at = 0.0

    def observe_lengths(self, lengths: np.ndarray) -> None:
        """Slots have these lengths now. What one grew by since the last call is the number of steps taken."""
        now = self.clock()
        if lengths.shape == self._lengths.shape:
            # A slot that was empty before, or is shorter now, got a prompt and took no steps.
            taken = int((lengths - self._lengths)[self._lengths > 0].max(initial=0))
            if taken > 0:
                self._steps.append((now - self._seen_at) / taken)
                self.step_s, self.launch = sorted(self._steps)[len(self._steps) // 2], taken
        self._lengths = lengths.copy()
        self._seen_at = now

    def observe_mappings(self, count: int, seconds: float) -> None:
        """`count` mappings took `seconds`."""
        if count > 0:
            self._mappings.append(seconds / count)
            self.mapping_s = sorted(self._mappings)[-1 - len(self._mappings) // 10]

    @property
    def least(self) -> int:
        """Tokens that a sequence must have left when its slot is served."""
        return max(LEAST, 2 * self.growth)

    @property
    def growth(self) -> int:
        """Tokens that a sequence grows by in the next launch, at most."""
        return max(self.launch, self.most_growth)

    def steps_to_map(self, mappings: int) -> float:
        """Decode steps that so many mappings may take."""
        return SAFETY * mappings * self.mapping_s / max(self.step_s, 1e-6)


class Lookahead:
    """Keeps running slots' frontiers past their lengths.

    Slots are served one after another, the one with the fewest tokens left first. With a fixed lookahead, a slot is due
    when less than half of it is left, and is filled up to the whole. Otherwise slots are served as late as possible:
    the first is due when, by the measured times of steps and mappings, one of those behind it would otherwise be served
    too late. So sequences out of step hold little ahead, and those of equal length are spread over steps.

    Parameters
    ----------
    lengths : numpy.ndarray
        int64 ``[num_slots]``; tokens of each slot, as the cache keeps them.
    fixed : int or None
        Tokens.
    timing : StepTimingModel or None
        None measures steps and mappings.

    Attributes
    ----------
    maps : int
        Mappings made so far.
    """

    def __init__(
        self, arena: Arena, lengths: np.ndarray, fixed: int | None, timing: StepTimingModel | None = None
    ) -> None:
        self.arena, self.fixed = arena, fixed
        self.timing = StepTimingModel() if timing is None else timing
        self.maps = 0
        self._lengths = lengths
        self._turns = np.arange(1, len(lengths) + 1)

    @property
    def tokens(self) -> int:
        """How far ahead a slot is mapped when it is served."""
        return 2 * self.timing.least if self.fixed is None else self.fixed

    def is_urgent(self, due: np.ndarray) -> bool:
        """Whether the first of the slots that are due has too few tokens left for the next launch."""
        if not due.size or self.fixed == 0:
            return False
        return int(self.arena.frontiers[due[0]] - self._lengths[due[0]]) < self.timing.growth

    def past(self, tokens: int) -> np.ndarray:
        """int64 ``[num_slots]``: lengths plus `tokens`, at most max_seq_len."""
        past: np.ndarray = np.minimum(self._lengths + tokens, self.arena.layout.max_seq_len)
        return past

    def due(self, at_once: int | None = None) -> np.ndarray:
        """Slots to be served, the fewest tokens left first: by the thread one by one, or `at_once` in a step."""
        frontiers, layout = self.arena.frontiers, self.arena.layout
        if self.fixed is not None:
            slots = np.flatnonzero((frontiers > 0) & (frontiers < self.past((self.fixed + 1) // 2)))
        else:
            slots = np.flatnonzero((frontiers > 0) & (frontiers < layout.max_seq_len))
        left = (frontiers - self._lengths)[slots]
        order = np.argsort(left, kind="stable")
        if self.fixed is not None:
            return slots[order]
        each = self.timing.steps_to_map(layout.num_ranges) if at_once is None else 1 / at_once
        late = np.flatnonzero(left[order] < self.timing.least + each * self._turns[: len(order)])
        return slots[order[: late[-1] + 1]] if late.size else slots[:0]

    def at_once(self) -> int:
        """How many slots to serve in a step without a thread: twice as many as become due in a step on average, so that
        sequences of equal length do not all map in one step."""
        ahead = self.arena.layout.granularity // self.arena.layout.row_bytes if self.fixed is None else self.fixed // 2
        running = int(np.count_nonzero(self._lengths))
        return max(1, -(-2 * running // max(1, ahead)))

    def map_due(self, at_once: int | None = None) -> int:
        """Map what one slot that is due lacks, or `at_once` slots; returns the mappings made.

        Waits for no fence without `at_once`. Where memory is short nothing is mapped: the step that needs it asks.
        Raises DriverError; nothing changed.
        """
        made = 0
        # Memory that was not visible to a sequence becomes so without a mapping: then the next slots have their turn.
        while not made:
            # A slot in which an unmap failed cannot grow; the step that needs it says so.
            due = [slot for slot in self.due(at_once).tolist() if not self.arena.slots[slot].broken][: at_once or 1]
            if not due:
                return 0
            # A slot that is served early, because of those behind it, gets a page more than it has.
            wanted = np.maximum(self.past(self.tokens), self.arena.frontiers + (self.fixed is None))
            longest = self.arena.layout.max_seq_len
            wants = {slot: min(int(wanted[slot]), longest) for slot in due}
            before, started = self.arena.frontiers[due].copy(), perf_counter()
            try:
                made = self.arena.grow(wants, wait=at_once is not None, ahead=True)
            except KVCacheOutOfMemory:
                return 0
            if not made and np.array_equal(before, self.arena.frontiers[due]):
                # Nothing gets on: whoever holds the lock this long holds up everybody.
                return 0
            self.timing.observe_mappings(made, perf_counter() - started)
        self.maps += made
        return made


class PriorityLock:
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
        """Held by the background thread inside this context; entered when the stepping thread neither holds it nor
        waits for it."""
        with self._free:
            self._free.wait_for(lambda: not self._wanted)
            yield


class BackgroundThread:
    """Runs `work` when woken, again and again for as long as it returns True; sleeps otherwise.

    It holds `work` and nothing else alive, and is stopped when the interpreter ends.

    Parameters
    ----------
    work : callable
        Does one unit of background work, a few driver calls at most; returns whether there may be more to do now.
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
        """Stop after the unit of work it is in, waiting so long for that. Idempotent."""
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
