"""Closing holes among the lanes by moving sequences to lower slots, where a smaller bucket repays the remapping.

A lane is a slot, so one sequence in a high slot makes every step replay a large bucket. Moving it is a remapping and
no copy. A sequence that shares extents with others (a fork, an alias) takes its mappings of them along, and one that
reads its first tokens in another slot goes on reading them there. Only a slot in which others read stays where it is:
the base addresses that their lanes are told, and launches under way, are its own.

Both sides of the bargain are measured: what a bucket's size costs when it was captured, what a move costs each time one
is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter

import numpy as np

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.errors import DriverError, KVCacheOutOfMemory, MemoryQuarantined

FIRST_GUESS_S = 300e-6
"""Seconds to map, make accessible and unmap one extent under load, as measured on an H200 (README)."""
MOST_S = 0.02
"""Seconds of moves between two steps, behind which no other begins: everybody waits for their tokens meanwhile."""


class Compaction:
    """Decides about moves and makes them.

    Parameters
    ----------
    replay_s : mapping of int to float
        Seconds that a bucket's replay takes over idle lanes, by bucket.

    Attributes
    ----------
    moves : int
        Sequences moved so far.
    """

    def __init__(self, cache: KVCache, replay_s: Mapping[int, float]) -> None:
        self.cache, self.replay_s = cache, dict(sorted(replay_s.items()))
        self.seconds_per_mapping = FIRST_GUESS_S
        self.moves = 0

    def plan(self, steps_left: Mapping[int, int]) -> list[tuple[int, int]]:
        """Moves worth making, as pairs of slots: from, to; `steps_left` of each taken slot. None where it does not pay,
        or a slot that others read would have to move.

        A smaller bucket is gained for as long as the longest of the moved sequences would have held the larger one.
        """
        taken = sorted(steps_left)
        if not taken:
            return []
        current = self._bucket(taken[-1] + 1)
        best: list[tuple[int, int]] = []
        gained = 0.0
        free, read = self.cache.free_slots(), self._read_by_others()
        for bucket in self.replay_s:
            if not len(taken) <= bucket < current:
                continue
            high = [slot for slot in taken if slot >= bucket]
            holes = [slot for slot in free if slot < bucket][: len(high)]
            if len(holes) < len(high) or not read.isdisjoint(high):
                continue
            saved = (self.replay_s[current] - self.replay_s[bucket]) * max(steps_left[slot] for slot in high)
            mappings = sum(self.cache.mappings_in(slot) for slot in (*high, *holes))
            gain = saved - mappings * self.seconds_per_mapping
            if gain > gained:
                best, gained = list(zip(high, holes, strict=True)), gain
        return best

    def _read_by_others(self) -> set[int]:
        """Slots in which other slots' first tokens are read, those of retained sequences too."""
        segments = self.cache.segments
        return set() if segments is None else set(segments[:, 1].tolist())

    def _bucket(self, lanes: int) -> int:
        return next(bucket for bucket in self.replay_s if bucket >= lanes)

    def move(self, source: int, target: int) -> None:
        """Move the sequence in a slot to another slot and remember what it took.

        Raises KVCacheOutOfMemory, DriverError or MemoryQuarantined; it is where it was then, and moves count as twice
        as dear. Raises ConfigError for a slot that others read.
        """
        started = perf_counter()
        try:
            moved = self.cache.move(self.cache.sequence_at(source), target)
        except (KVCacheOutOfMemory, DriverError, MemoryQuarantined):
            self.seconds_per_mapping *= 2
            raise
        took = (perf_counter() - started) / max(1, moved)
        self.seconds_per_mapping = float(np.average([self.seconds_per_mapping, took], weights=[3, 1]))
        self.moves += 1
