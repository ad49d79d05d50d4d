"""What a pass over the model costs, learnt from those that ran, so that a pass can be made to fit a time.

milliseconds = a + b rows + c (sum over chunks of rows times length) + d (tokens of KV that decoding rows read)

The coefficients are fitted by least squares, none below 0, over the passes measured of late (Sarathi-Serve, OSDI'24,
profiles the same terms offline). Of rows, what a pass of so many took at the start counts: a pass of few rows waits for
the weights and one of many computes, so a line through small passes says far too little of a large one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from time import perf_counter
from typing import Any

import numpy as np
import torch

from trtllm_vattn.errors import ConfigError

REMEMBERED = 256
"""Passes."""
REFIT_AFTER = 16
"""Passes measured since the last fit, at most: of the first ones each doubles what is known."""
GUESS_WEIGHT = 0.05
"""Of the guess at the start, for each coefficient."""
LEAST_SHARE = 0.5
"""Of the time that was guessed: what is measured to be shorter counts by its distance from it in this unit. By its own
time a single clock that was read too early would outweigh all passes of a day."""
MOST_ROWS = 1 << 31
"""Stands for any number of rows."""
MOST_WEIGHT = 8
"""Of all measured passes together: many of one kind do not say what others cost."""


@dataclass(frozen=True)
class PassLoad:
    """What a pass has to do: rows of it, padding included; rows times length of its chunks; tokens of KV that decoding
    rows read."""

    tokens: int
    prompt_attention: int = 0
    decode_kv: int = 0

    def __post_init__(self) -> None:
        if min(self.tokens, self.prompt_attention, self.decode_kv) < 0:
            raise ConfigError(f"a pass of {self}; nothing of it is below 0")


class Timing:
    """How long a pass takes on its device; it begins when this is made, on the current stream."""

    def __init__(self, load: PassLoad, device: torch.device) -> None:
        self.load, self._on_gpu = load, device.type == "cuda"
        self._parts: list[tuple[Any, Any]] = []
        self.go_on()

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def go_on(self) -> None:
        """Another part begins; what lies between two parts is not the pass's."""
        self._began = self._now()

    def end(self) -> None:
        """A part ends with what was launched up to now."""
        self._parts.append((self._began, self._now()))

    def milliseconds(self) -> float:
        """What all parts took; of a pass whose tokens are read."""
        if self._on_gpu:
            return float(sum(began.elapsed_time(ended) for began, ended in self._parts))
        return float(sum((ended - began) * 1e3 for began, ended in self._parts))


@dataclass
class PassCost:
    """Milliseconds of a pass by its load, refitted as passes are measured.

    Attributes
    ----------
    coefficients : sequence of float
        Milliseconds of any pass, of what rows take by `of_rows`, of a row times a token of its length, and of a token
        of KV read.
    of_rows : pair of sequences
        Numbers of rows, and what each takes; straight lines between them, and on beyond the last.
    """

    coefficients: Sequence[float]
    of_rows: tuple[Sequence[float], Sequence[float]] = ((0, 1), (0.0, 1.0))
    _measured: deque[tuple[PassLoad, float]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _new: int = 0

    def __post_init__(self) -> None:
        self._guess = list(self.coefficients)

    def milliseconds(self, load: PassLoad) -> float:
        """What a pass takes."""
        return float(np.dot(self.coefficients, self._terms(load)))

    def _rows(self, rows: int) -> float:
        sizes, took = self.of_rows
        beyond = max(0, rows - sizes[-1])
        return float(np.interp(rows, sizes, took)) + beyond * (took[-1] - took[-2]) / (sizes[-1] - sizes[-2])

    @property
    def _of_row(self) -> float:
        """Of one row more, at most."""
        return self.coefficients[1] * float((np.diff(self.of_rows[1]) / np.diff(self.of_rows[0])).max())

    def _terms(self, load: PassLoad) -> tuple[float, float, float, float]:
        return 1.0, self._rows(load.tokens), float(load.prompt_attention), float(load.decode_kv)

    def rows_within(self, milliseconds: float, start: int) -> int:
        """The most rows of a chunk of a prompt, of which `start` tokens are in already, whose attention takes no more
        than so long. What rows take otherwise is the pass's, by its size."""
        of_attention = self.coefficients[2]
        if milliseconds <= 0:
            return 0
        if self.chunk(MOST_ROWS, start) <= milliseconds:
            return MOST_ROWS
        # of_attention n (start + n) = milliseconds
        linear = of_attention * start
        root = linear + math.sqrt(linear * linear + 4 * of_attention * milliseconds)
        return int(2 * milliseconds / root)

    def chunk(self, rows: int, start: int) -> float:
        """Milliseconds that the attention of so many rows of a prompt takes."""
        return self.coefficients[2] * rows * (start + rows)

    def measure(self, load: PassLoad, milliseconds: float) -> None:
        """Learn from a pass."""
        if not milliseconds > 0:
            return
        self._measured.append((load, milliseconds))
        self._new += 1
        if self._new >= min(REFIT_AFTER, (len(self._measured) + 1) // 2):
            self.fit()

    @classmethod
    def first_guess(
        cls, rows: Sequence[int], took_ms: Sequence[float], weights: int, kv_bytes: int, weight_bytes: int, of_pair: int
    ) -> PassCost:
        """By passes of so many rows, in rising order, that read no KV: what a row attends to takes as long, operation
        by operation, as products with weights, of which there are `weights` (twice as many operations a row; `of_pair`
        for each pair of a query and a key); and KV is read as fast as all weights are."""
        first = () if len(rows) > 1 else (0,)
        of_rows = (*first, *rows), (*(0.0 for _ in first), *np.maximum.accumulate(took_ms).tolist())
        guess = cls([0.0, 1.0, 0.0, min(took_ms) * kv_bytes / weight_bytes], of_rows)
        return cls([0.0, 1.0, guess._of_row * of_pair / (2 * weights), guess.coefficients[3]], of_rows)

    def fit(self) -> None:
        """Take what was measured into account."""
        self._new = 0
        if self._measured:
            terms = np.array([self._terms(load) for load, _ in self._measured])
            took = np.array([milliseconds for _, milliseconds in self._measured])
            self.coefficients = _fitted(terms, took, np.asarray(self._guess, float))


def _fitted(terms: np.ndarray, took: np.ndarray, guess: np.ndarray) -> list[float]:
    """Coefficients none of which is below 0, by relative error, and by how many times the guess each is: what the
    passes do not tell stays near that."""
    scale = np.maximum(took, LEAST_SHARE * (terms @ guess))
    parts = terms / scale[:, None]
    # Where nothing was guessed, by the greatest part of a pass.
    unit = np.where(guess > 0, guess, 1 / np.maximum(parts.max(axis=0), 1e-300))
    of_pass, of_guess = min(1.0, math.sqrt(MOST_WEIGHT / len(took))), math.sqrt(GUESS_WEIGHT)
    matrix = np.concatenate((of_pass * parts * unit, of_guess * np.eye(4)))
    wanted = np.concatenate((of_pass * took / scale, of_guess * (guess > 0)))
    best, least = guess, math.inf
    for count in range(1, 5):
        for kept in map(list, combinations(range(4), count)):
            found = np.zeros(4)
            found[kept] = np.linalg.lstsq(matrix[:, kept], wanted, rcond=None)[0]
            error = float(((matrix @ found - wanted) ** 2).sum())
            if (found >= 0).all() and error < least:
                best, least = found * unit, error
    return [float(value) for value in best]
