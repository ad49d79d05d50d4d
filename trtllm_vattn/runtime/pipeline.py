"""Launches, each started before the tokens of the last one are read, where nothing speaks against it.

Tokens, positions and lengths are advanced on the device, so a launch does not need the host to know them (asynchronous
scheduling, as in vLLM and TensorRT-LLM), and prompts go in and requests join and leave meanwhile. A sequence that turns
out to have ended took part once too often: its surplus is discarded, and its slot is not written by anybody else
before, because all work is on one stream.

A pass with prompts may take tens of milliseconds, and what is launched behind it is settled then: a request that comes
meanwhile would wait for both. So where a pass takes long and the next one has room for more, it is launched shortly
before the first one ends, as its measured cost predicts (`Pipeline.hold_s`); decode steps are far shorter, and never
waited with.

Where a grammar's masks are made of those tokens, the forward pass of a launch is started ahead all the same, and its
choice of tokens once the last one's are committed (`DecodeBatch.choose`, lane_processors.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from trtllm_vattn.errors import DriverError, MemoryQuarantined
from trtllm_vattn.runtime.compression import Compression
from trtllm_vattn.runtime.decode import Launch
from trtllm_vattn.runtime.passes import Passes
from trtllm_vattn.runtime.scheduler import Scheduler

MARGIN_S = 0.004
"""Before a pass ends, as predicted, in which the next one is planned and launched: a millisecond or two of the host."""
MARGIN = 0.05
"""Of a pass, more: what predictions are wrong by."""
AWAY_DECAY = 0.9


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
    margin_s : float
        Seconds before a pass ends, as predicted, at which the next one is launched at the latest.
    hold_s : float
        Seconds from the last `start` on for which nothing is launched behind what runs, so that a request that comes
        meanwhile goes in with the next launch; 0 where it was launched, or nothing has to be. With it, the caller lets
        requests come, and calls `start` again.
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
        self.margin_s = MARGIN_S
        self.kv_s = self.hold_s = self._away_s = 0.0
        self._began = 0.0
        """When the device began with `_first`, or a little later."""
        self._left_at: float | None = None

    @property
    def running(self) -> bool:
        """Whether a launch is under way that somebody still waits for."""
        return any(launch is not None and launch.wanted for launch in (self._first, self.unread))

    def start(self) -> Launch | None:
        """The launch to read next, started now if it was not before; and the one after it, where possible. None where
        there is nothing to run.

        The same one until `commit`, so that no token is skipped where reading it was interrupted.
        """
        self.kv_s = self.hold_s = 0.0
        if not self.running:
            self.forget()
        if self._first is None:
            self._first, self.unread = self.unread, None
        if self._first is None:
            self._first = self._launch(ahead=False)
            self._began = perf_counter()
        if self._first is None:
            return None
        # Mostly done by `commit`; but nothing may have been ahead.
        self._first = self._chosen(self._first)
        if self.unread is None and not self.one_by_one:
            self.hold_s = self._left_s(self._first)
            if self.hold_s:
                return self._first
            try:
                self.unread = self._launch(ahead=True)
            except (DriverError, MemoryQuarantined):
                # Nobody changes lanes that the device still works on.
                self._first.read()
                self.scheduler.preempt_broken()
                raise
        return self._first

    def _left_s(self, launch: Launch) -> float:
        """Seconds until what comes behind a launch that runs has to be launched; 0 where that is now, or where waiting
        would let nobody in."""
        cost = self.passes.cost
        if cost is None or launch.timing is None or launch.is_done or not self.scheduler.lets_in_more:
            return 0.0
        takes_s = (1 - MARGIN) * cost.milliseconds(launch.timing.load) / 1e3
        return max(0.0, self._began + takes_s - self.margin_s - self._away_s - perf_counter())

    def left(self) -> None:
        """The caller has its tokens, and is away until `returned`."""
        self._left_at = perf_counter() if self.running else None

    def returned(self) -> None:
        """The caller is back; for how long it is away is time in which nothing is launched."""
        if self._left_at is not None:
            self._away_s = max(AWAY_DECAY * self._away_s, perf_counter() - self._left_at)

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

    def commit(self, launch: Launch, rows: Sequence[Sequence[int]], read_at: float) -> None:
        """The tokens of the launch that `start` gave, a row a step, read at this time (`perf_counter`), are in the
        requests' records; `start` gives the launch behind it."""
        self.scheduler.decode.commit(launch, rows)
        self.passes.measured(launch)
        self._first, self._began = None, read_at
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
        launch = self.passes.launch(plan) if plan.chunks else self.scheduler.decode.launch(plan.steps, plan.drafts)
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
