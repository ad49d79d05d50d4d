"""Seeded random operations on sequences: one generator for the soak, the fault stress, benchmarks and tests."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Mapping

import numpy as np

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.errors import ConfigError


class Workload:
    """Draws operations and numbers sequences; the same seed draws the same.

    Attributes
    ----------
    operations : Counter
        How often each operation was drawn or counted.
    current : str
        The operation that `run_one` drew last.
    """

    current = ""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.operations: Counter[str] = Counter()
        self._numbers = itertools.count()

    def new(self) -> int:
        """The number of a sequence that is about to begin."""
        return next(self._numbers)

    def run_one(self, weights: Mapping[str, int]) -> None:
        """Call one of these methods, chosen by weight; count it in `operations`, and name it in `current`."""
        (self.current,) = self.random.choices(list(weights), list(weights.values()))
        self.operations[self.current] += 1
        getattr(self, self.current)()

    def run_some(self, chances: Mapping[str, float]) -> None:
        """Call each of these methods with its probability, in this order."""
        for name, chance in chances.items():
            if self.random.random() < chance:
                getattr(self, name)()


class CacheWorkload(Workload):
    """Random operations on the sequences of one cache, and who wrote each of their tokens.

    An operation that needs a running sequence does nothing without one. What raises has changed nothing: neither the
    cache, by its contract, nor what is known here.

    Attributes
    ----------
    authors : dict
        The sequence that wrote each token, by running sequence: its own number, or of the one that it was forked from.
    longest_prompt : int
        Tokens; max_seq_len unless changed.
    replaced : int
        Mappings that `replace` replaced.
    """

    def __init__(self, cache: KVCache, seed: int) -> None:
        super().__init__(seed)
        self.cache = cache
        self.authors: dict[int, list[int]] = {}
        self.longest_prompt, self.replaced = cache.shape.max_seq_len, 0

    def write(self, sequence: int, tokens: range) -> None:
        """K and V of these tokens are to be written; a subclass or a test does so."""

    def _append(self, sequence: int, count: int) -> None:
        tokens = range(len(self.authors[sequence]), len(self.authors[sequence]) + count)
        self.authors[sequence] += [sequence] * count
        self.write(sequence, tokens)

    def _pick(self) -> int | None:
        return self.random.choice(list(self.authors)) if self.authors else None

    def admit(self) -> None:
        """A prompt of any length begins."""
        sequence, tokens = self.new(), self.random.randint(1, self.longest_prompt)
        self.cache.admit(sequence, tokens)
        self.authors[sequence] = []
        self._append(sequence, tokens)

    def step(self) -> None:
        """Every sequence that is not at its longest decodes a token; then memory is mapped ahead."""
        before = self.cache.lengths.copy()
        after = np.where((before > 0) & (before < self.cache.shape.max_seq_len), before + 1, 0)
        self.cache.prepare_step(after)
        for sequence in self.authors:
            if after[self.cache.slot_of(sequence)]:
                self._append(sequence, 1)
        self.cache.map_ahead()

    def release(self) -> None:
        """A sequence ends."""
        if (sequence := self._pick()) is not None:
            self.end(sequence)

    def end(self, sequence: int) -> None:
        """This sequence ends."""
        self.cache.release(sequence)
        del self.authors[sequence]

    def truncate(self) -> None:
        """A sequence is truncated to an earlier length."""
        if (sequence := self._pick()) is not None:
            length = self.random.randint(1, len(self.authors[sequence]))
            self.cache.truncate(sequence, length)
            del self.authors[sequence][length:]

    def fork(self) -> None:
        """A sequence begins with the first tokens of another."""
        if (sequence := self._pick()) is not None:
            new, tokens = self.new(), self.random.randint(1, len(self.authors[sequence]))
            self.cache.fork(sequence, new, tokens)
            self.authors[new] = self.authors[sequence][:tokens]

    def move(self) -> None:
        """A sequence moves to another slot."""
        sequence, free = self._pick(), self.cache.free_slots()
        if sequence is not None and free:
            slot = self.random.choice(free)
            try:
                self.cache.move(sequence, slot)
            except ConfigError:
                # The background thread met a failure in that slot meanwhile, and retired it.
                if slot in self.cache.free_slots():
                    raise
                self.operations["refused"] += 1

    def replace(self) -> None:
        """Other memory with the same bytes is put beneath a sequence."""
        if (sequence := self._pick()) is not None:
            self.replaced += self.cache.replace(sequence)

    def take_away(self) -> None:
        """A few pages that no sequence uses are unmapped."""
        self.cache.release_free_memory(self.random.randint(1, 4) * self.cache.bytes_of(1))
