"""Launches, each started before the tokens of the last one are read, where nothing speaks against it.

Tokens, positions and lengths are advanced on the device, so a launch does not need the host to know them (asynchronous
scheduling, as in vLLM and TensorRT-LLM), and prompts go in and requests join and leave meanwhile. A sequence that turns
out to have ended took part once too often: its surplus is discarded, and its slot is not written by anybody else
before, because all work is on one stream.

Where a grammar's masks are made of those tokens, the forward pass of a launch is started ahead all the same, and its
choice of tokens once the last one's are committed (`DecodeBatch.choose`, lane_processors.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from trtllm_vattn.errors import DriverError, MemoryQuarantined
from trtllm_vattn.runtime.compression import Compression
from trtllm_vattn.runtime.decode import Launch, StepOutOfMemory
from trtllm_vattn.runtime.passes import Passes
from trtllm_vattn.runtime.scheduler import Scheduler
from trtllm_vattn.runtime.step_plan import StepPlan


class Pipeline:
    """At most two launches under way.

    Parameters
    ----------
    one_by_one : bool
        Never start a launch before the last one's tokens are read.
    compression : Compression or None
        Is told of each launch, to evict tokens behind it.

    Attributes
    ----------
    unread : Launch or None
        What runs already behind the launch that `start` gave.
    kv_s : float
        Seconds that the last `start` spent on plans and the guard.
    """

    def __init__(
        self, scheduler: Scheduler, passes: Passes, one_by_one: bool, compression: Compression | None = None
    ) -> None:
        self.scheduler, self.passes, self.one_by_one, self.compression = scheduler, passes, one_by_one, compression
        self.unread: Launch | None = None
        self._first: Launch | None = None
        """What runs and is read next, until it is committed."""
        self.kv_s = 0.0

    @property
    def running(self) -> bool:
        """Whether a launch is under way that somebody still waits for."""
        return any(launch is not None and launch.wanted for launch in (self._first, self.unread))

    def start(self) -> Launch | None:
        """The launch to read next, started now if it was not before; and the one after it, where possible. None where
        there is nothing to run.

        The same one until `commit`, so that no token is skipped where reading it was interrupted.
        """
        self.kv_s = 0.0
        if not self.running:
            self.forget()
        if self._first is None:
            self._first, self.unread = self.unread, None
        if self._first is None:
            self._first = self._launch(ahead=False)
        if self._first is None:
            return None
        # Mostly done by `commit`; but nothing may have been ahead.
        self._first = self._chosen(self._first)
        if self.unread is None and not self.one_by_one:
            try:
                self.unread = self._launch(ahead=True)
            except (DriverError, MemoryQuarantined):
                # Nobody changes lanes that the device still works on.
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
        if self._first is not None:
            self._first = self._chosen(self._first)
        return self._first

    def was_read(self, launch: Launch, rows: Sequence[Sequence[int]]) -> None:
        """The launch that `start` gave has these tokens, which are not in the requests' records yet."""
        if self.unread is not None:
            self.scheduler.decode.begin_masks(launch, rows, self.unread)

    def commit(self, launch: Launch, rows: Sequence[Sequence[int]]) -> None:
        """The tokens of the launch that `start` gave, a row a step, are in the requests' records; `start` gives the
        launch behind it."""
        self.scheduler.decode.commit(launch, rows)
        self.passes.measured(launch)
        self._first = None
        if self.unread is not None:
            self.unread = self._chosen(self.unread)

    def _chosen(self, launch: Launch) -> Launch:
        """A launch whose tokens are being chosen; all tokens before it are in the requests' records."""
        return launch if launch.choice is None else self.scheduler.decode.choose(launch)

    def forget(self) -> None:
        """Nobody wants the tokens of what is under way; whoever still runs goes on from its record."""
        half_done = any(launch is not None and launch.choice is not None for launch in (self._first, self.unread))
        if self.running or half_done:
            self.scheduler.decode_again()
        self._first = self.unread = None

    def _launch(self, ahead: bool) -> Launch | None:
        """Plan and start what comes next; with `ahead`, before the tokens of the launch before it are read."""
        started = perf_counter()
        plan = self.scheduler.plan(ahead)
        self.kv_s += perf_counter() - started
        if plan is None:
            return None
        # What the launch writes into is noted to be its sequences' before.
        self.scheduler.cache.note_placements()
        launch = self._start(plan)
        if launch is None:
            return None if ahead else self._launch(ahead)
        self.kv_s += launch.guard_s
        if self.scheduler.trace is not None:
            self.scheduler.trace.span(
                "launch prompts" if plan.chunks else "launch decode",
                started,
                perf_counter(),
                {"lanes": len(launch.lane_of), "steps": plan.steps, "prompt_tokens": launch.prompt_tokens},
                "step",
            )
        self.scheduler.launched(plan)
        if self.compression is not None:
            scheduler = self.scheduler
            self.compression.launched(plan.joins, scheduler.decoding, scheduler.requests, scheduler.fail)
        return launch

    def _start(self, plan: StepPlan) -> Launch | None:
        """Start a plan, without those who ask for a step that there is no memory for; None where another plan has to be
        made without them. One of many steps has its memory, which fewer would not fit: it is started again."""
        decode = self.scheduler.decode
        while True:
            try:
                return self.passes.launch(plan) if plan.chunks else decode.launch(plan.steps, plan.drafts)
            except StepOutOfMemory as error:
                self._fail_askers(error)
                if plan.chunks or not decode.lanes:
                    return None

    def _fail_askers(self, error: StepOutOfMemory) -> None:
        """End who asked for a step that there is no memory for; others go on. Raises the error where nobody did."""
        asked = [request for request in self.scheduler.holders if request.slot in error.slots]
        if not asked:
            raise error
        for request in asked:
            self.scheduler.fail(request, str(error))
