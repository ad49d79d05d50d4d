"""Which running slots need memory before their sequences get there, and mapping it."""

from __future__ import annotations

from time import perf_counter

import numpy as np

from trtllm_vattn.errors import OutOfPages
from trtllm_vattn.memory.arena import Arena
from trtllm_vattn.memory.pace import Pace


class Lookahead:
    """Keeps running slots' frontiers so many tokens past their lengths.

    A slot is due when less than half of that is left, and is filled up to the whole.

    Parameters
    ----------
    lengths : numpy.ndarray
        int64 ``[num_slots]``; tokens of each slot, as the cache keeps them.
    fixed : int or None
        Tokens; None is as many as the measured times of steps and mappings ask for.

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

    @property
    def tokens(self) -> int:
        """How far ahead."""
        if self.fixed is not None:
            return self.fixed
        return self.pace.lookahead(np.count_nonzero(self._lengths), self.arena.layout.num_ranges)

    def past(self, tokens: int) -> np.ndarray:
        """Lengths and so many tokens more, no longer than a slot."""
        return np.minimum(self._lengths + tokens, self.arena.layout.max_seq_len)

    def due(self) -> np.ndarray:
        """Slots with less than half of it left, the fewest steps left first."""
        frontiers = self.arena.frontiers
        due = np.flatnonzero((frontiers > 0) & (frontiers < self.past((self.tokens + 1) // 2)))
        return due[np.argsort((frontiers - self._lengths)[due], kind="stable")]

    def share(self) -> int:
        """How many slots to serve in a step for all to be served before the first runs out, so that sequences of equal
        length do not all map in one step."""
        return max(1, -(-4 * np.count_nonzero(self._lengths) // max(1, self.tokens)))

    def map_due(self, most: int, wait: bool = True) -> int:
        """Map what the first slots that are due lack; returns the mappings made. None where memory is short: the step
        that needs it asks. Without `wait`, no fence is waited for. Raises DriverError; nothing changed."""
        # A slot in which an unmap failed cannot grow; the step that needs it says so.
        due = [slot for slot in self.due().tolist() if not self.arena.slots[slot].broken][:most]
        if not due:
            return 0
        wanted = self.past(self.tokens)
        started = perf_counter()
        try:
            made = self.arena.grow({slot: int(wanted[slot]) for slot in due}, wait)
        except OutOfPages:
            return 0
        self.pace.observe_mappings(made, perf_counter() - started)
        self.maps += made
        return made
