"""How far ahead must memory be mapped? Arithmetic over measured times; no memory, no driver."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import perf_counter

import numpy as np

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


class Pace:
    """What a step takes, and what a mapping takes: the middle of the last steps, the slow end of the last mappings.

    Parameters
    ----------
    clock : callable
        Seconds, growing.

    Attributes
    ----------
    step_s, mapping_s : float
        Seconds of a step, and of a mapping.
    launch : int
        Tokens that a sequence grows by at once.
    """

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self.clock = clock
        self.step_s, self.mapping_s, self.launch = FIRST_STEP_S, FIRST_MAPPING_S, 1
        self._steps: deque[float] = deque(maxlen=SAMPLES)
        self._mappings: deque[float] = deque(maxlen=SAMPLES)
        self._lengths = np.zeros(0, np.int64)
        self._seen_at = 0.0

    def observe_lengths(self, lengths: np.ndarray) -> None:
        """Slots have these lengths now: what one of them grew by since the last time is how many steps were taken."""
        now = self.clock()
        if lengths.shape == self._lengths.shape:
            # What was empty before, or is shorter now, had a prompt put in, and no steps.
            taken = int((lengths - self._lengths)[self._lengths > 0].max(initial=0))
            if taken > 0:
                self._steps.append((now - self._seen_at) / taken)
                self.step_s, self.launch = sorted(self._steps)[len(self._steps) // 2], taken
        self._lengths = lengths.copy()
        self._seen_at = now

    def observe_mappings(self, count: int, seconds: float) -> None:
        """So many mappings took so long."""
        if count > 0:
            self._mappings.append(seconds / count)
            self.mapping_s = sorted(self._mappings)[-1 - len(self._mappings) // 10]

    @property
    def least(self) -> int:
        """Tokens that a sequence must have left when its slot is served."""
        return max(LEAST, 2 * self.launch)

    def steps_to_map(self, mappings: int) -> float:
        """Decode steps that so many mappings may take."""
        return SAFETY * mappings * self.mapping_s / max(self.step_s, 1e-6)
