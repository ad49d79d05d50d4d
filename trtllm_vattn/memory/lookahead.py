"""Which running slots need memory before their sequences get there, and mapping it."""

from __future__ import annotations

from time import perf_counter

import numpy as np

from trtllm_vattn.errors import OutOfPages
from trtllm_vattn.memory.arena import Arena
from trtllm_vattn.memory.pace import Pace


class Lookahead:
    """Keeps running slots' frontiers past their lengths.

    Slots are served one after another, the fewest tokens left first. With a fixed number of tokens, a slot is due when
    less than half of that is left, and is filled up to the whole. Otherwise as late as can be: the slots that run out
    soonest are due when, by the measured times of steps and mappings, one of those behind them would be served too
    late if they were not served now. So sequences out of step hold little ahead, and those of equal length are spread.

    Parameters
    ----------
    lengths : numpy.ndarray
        int64 ``[num_slots]``; tokens of each slot, as the cache keeps them.
    fixed : int or None
        Tokens.

    Attributes
    ----------
    maps : int
        Mappings made so far.
    """

    def __init__(self, arena: Arena, lengths: np.ndarray, fixed: int | None) -> None:
        self.arena, self.fixed = arena, fixed
        self.pace = Pace()
        self.maps = 0
        self._lengths = lengths
        self._turns = np.arange(1, len(lengths) + 1)

    @property
    def tokens(self) -> int:
        """How far ahead a slot is mapped when it is served."""
        return 2 * self.pace.least if self.fixed is None else self.fixed

    def past(self, tokens: int) -> np.ndarray:
        """Lengths and so many tokens more, no longer than a slot."""
        past: np.ndarray = np.minimum(self._lengths + tokens, self.arena.layout.max_seq_len)
        return past

    def due(self, at_once: int | None = None) -> np.ndarray:
        """Slots to be served, the fewest tokens left first; served as fast as can be, or `at_once` in each step."""
        frontiers, layout = self.arena.frontiers, self.arena.layout
        if self.fixed is not None:
            slots = np.flatnonzero((frontiers > 0) & (frontiers < self.past((self.fixed + 1) // 2)))
        else:
            slots = np.flatnonzero((frontiers > 0) & (frontiers < layout.max_seq_len))
        left = (frontiers - self._lengths)[slots]
        order = np.argsort(left, kind="stable")
        if self.fixed is not None:
            return slots[order]
        each = self.pace.steps_to_map(layout.num_ranges) if at_once is None else 1 / at_once
        late = np.flatnonzero(left[order] < self.pace.least + each * self._turns[: len(order)])
        return slots[order[: late[-1] + 1]] if late.size else slots[:0]

    def at_once(self) -> int:
        """How many slots to serve in a step where that holds the step up: twice as many as become due in one on
        average, so that sequences of equal length do not all map in one step."""
        ahead = self.arena.layout.granule // self.arena.layout.row_bytes if self.fixed is None else self.fixed // 2
        running = int(np.count_nonzero(self._lengths))
        return max(1, -(-2 * running // max(1, ahead)))

    def map_due(self, at_once: int | None = None) -> int:
        """Map what slots that are due lack, `at_once` of them, or one, waiting for no fence; returns the mappings made.

        None where memory is short: the step that needs it asks. Raises DriverError; nothing changed.
        """
        made = 0
        # What was withheld in a slot is there without a mapping: then the next ones have their turn.
        while not made:
            # A slot in which an unmap failed cannot grow; the step that needs it says so.
            due = [slot for slot in self.due(at_once).tolist() if not self.arena.slots[slot].broken][: at_once or 1]
            if not due:
                return 0
            # Who is served before the time, for the sake of those behind, gets a page more than there is.
            wanted = np.maximum(self.past(self.tokens), self.arena.frontiers + (self.fixed is None))
            longest = self.arena.layout.max_seq_len
            wants = {slot: min(int(wanted[slot]), longest) for slot in due}
            started = perf_counter()
            try:
                made = self.arena.grow(wants, wait=at_once is not None)
            except OutOfPages:
                return 0
            self.pace.observe_mappings(made, perf_counter() - started)
        self.maps += made
        return made
