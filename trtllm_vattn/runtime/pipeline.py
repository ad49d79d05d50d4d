"""Launches of decode steps, the next one started before the tokens of the last are read where nothing speaks against.

Tokens, positions and lengths are advanced on the device, so a launch does not need the host to know them (asynchronous
scheduling, as in vLLM and TensorRT-LLM). A sequence that turns out to have ended took part once too often: its surplus
is discarded, and its slot is not written by anybody else before, because all work is on one stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from trtllm_vattn.errors import DriverError, KVCacheOutOfMemory, MemoryQuarantined
from trtllm_vattn.runtime.decode import Launch
from trtllm_vattn.runtime.scheduler import Scheduler


class Pipeline:
    """At most two launches under way.

    Parameters
    ----------
    steps : int
        Most decode steps of one launch.
    one_by_one : bool
        Never start a launch before the last one's tokens are read.

    Attributes
    ----------
    unread : Launch or None
        What runs already behind the launch that `start` gave.
    kv_s : float
        Seconds that the last `start` spent on the cache's books and the guard.
    """

    def __init__(self, scheduler: Scheduler, steps: int, one_by_one: bool) -> None:
        self.scheduler, self.steps, self.one_by_one = scheduler, steps, one_by_one
        self.unread: Launch | None = None
        self._first: Launch | None = None
        """What runs and is read next, until it is committed."""
        self.kv_s = 0.0

    @property
    def running(self) -> bool:
        """Whether a launch is under way whose tokens somebody still wants."""
        first = self._first or self.unread
        return first is not None and bool(first.lane_of)

    def start(self) -> Launch | None:
        """The launch to read next, started now if it was not before; and the one after it, where possible. None where
        nobody is left to run for lack of memory.

        The same one until `commit`, so that no token is skipped where reading it was interrupted.
        """
        self.kv_s = 0.0
        if not self.running:
            self.forget()
        if self._first is None:
            self._first, self.unread = self.unread or self._launch(), None
        if self._first is None:
            return None
        if self.unread is None:
            try:
                self.unread = self._launch_ahead(self._first)
            except (DriverError, MemoryQuarantined):
                # Nobody changes lanes that are still on their way to the device.
                self._first.read()
                self.scheduler.preempt_broken()
                raise
        return self._first

    def drain(self) -> Launch | None:
        """The launch to read next among those under way, or None, until `commit`; starts none."""
        if not self.running:
            self.forget()
        elif self._first is None:
            self._first, self.unread = self.unread, None
        return self._first

    def commit(self, launch: Launch, rows: Sequence[Sequence[int]]) -> None:
        """The tokens of the launch that `start` gave, a row a step, are in the requests' records: lanes go on with the
        last ones, and `start` gives the launch behind it."""
        self.scheduler.decode.commit(launch, rows)
        self._first = None

    def forget(self) -> None:
        """Nobody wants the tokens of what is under way."""
        self._first = self.unread = None

    def _launch(self) -> Launch | None:
        """Start the next steps of all running sequences; preempts where memory is short. None where nobody is left."""
        decode, cache = self.scheduler.decode, self.scheduler.cache
        started = perf_counter()
        while self.scheduler.decoding:
            # What the longest of the requests still needs, but few different numbers.
            steps = min(self.steps, 1 << (self._most_left() - 1).bit_length())
            try:
                cache.prepare_step(decode.lengths_after(1 if decode.loop else steps))
            except KVCacheOutOfMemory:
                self.scheduler.preempt()
            except (DriverError, MemoryQuarantined):
                self.scheduler.preempt_broken()
                raise
            else:
                self.kv_s += perf_counter() - started
                return self._counted(decode.launch(steps))
        return None

    def _launch_ahead(self, launch: Launch) -> Launch | None:
        """Start what comes after a launch whose tokens have not been read; None where that has to wait for them.

        Requests that wait could not be admitted in this step; who of them can when a sequence has ended joins a launch
        later than without, and no launch waits for them.
        """
        scheduler, decode = self.scheduler, self.scheduler.decode
        left = self._most_left() - launch.steps
        if self.one_by_one or left < 1 or not decode.unchanged or scheduler.prefilling:
            return None
        if any(request.forced is not None for request in scheduler.decoding.values()):
            return None
        steps = min(self.steps, 1 << (left - 1).bit_length())
        started = perf_counter()
        try:
            scheduler.cache.prepare_step(decode.lengths_after(launch.steps + steps))
        except KVCacheOutOfMemory:
            return None
        self.kv_s += perf_counter() - started
        return self._counted(decode.launch(steps, unread=launch.steps))

    def _counted(self, launch: Launch) -> Launch:
        self.kv_s += launch.guard_s
        return launch

    def _most_left(self) -> int:
        """Tokens that the longest of the running requests still wants."""
        return max(request.left for request in self.scheduler.decoding.values())
