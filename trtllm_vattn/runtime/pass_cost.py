"""What a pass over the model costs, learnt from those that ran, so that a pass can be made to fit a time.

milliseconds = a + b tokens + c (sum over chunks of rows times length) + d (tokens of KV that decoding rows read)

The coefficients are fitted by least squares, none below 0, over the passes measured of late (Sarathi-Serve, OSDI'24,
profiles the same terms offline).
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
"""Passes measured since the last fit."""
PRIOR_WEIGHT = 0.1
"""Of what was believed before, for each coefficient, beside the measured passes."""


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
        Milliseconds: of any pass, a token, a row times a token of its length, and a token of KV read.
    """

    coefficients: Sequence[float]
    _measured: deque[tuple[PassLoad, float]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _new: int = 0

    def milliseconds(self, load: PassLoad) -> float:
        """What a pass takes."""
        return float(np.dot(self.coefficients, _terms(load)))

    def rows_within(self, milliseconds: float, start: int, paid: bool = False) -> int:
        """The most rows of a chunk of a prompt, of which `start` tokens are in already, that a pass can take in so much
        more time; where rows are `paid`, what they attend to is all that they add."""
        _, of_token, of_attention, _ = self.coefficients
        of_token = 0.0 if paid else of_token
        if milliseconds <= 0:
            return 0
        # of_attention n (start + n) + of_token n = milliseconds
        linear = of_token + of_attention * start
        if linear <= 0 and of_attention <= 0:
            return 1 << 31
        root = linear + math.sqrt(linear**2 + 4 * of_attention * milliseconds)
        return int(2 * milliseconds / root)

    def chunk(self, rows: int, start: int, paid: bool = False) -> float:
        """Milliseconds that so many rows of a prompt add to a pass, as `rows_within` counts them."""
        _, of_token, of_attention, _ = self.coefficients
        return (0.0 if paid else of_token * rows) + of_attention * rows * (start + rows)

    def measure(self, load: PassLoad, milliseconds: float) -> None:
        """Learn from a pass."""
        if not milliseconds > 0:
            return
        self._measured.append((load, milliseconds))
        self._new += 1
        if self._new >= REFIT_AFTER:
            self.fit()

    @classmethod
    def first_guess(
        cls, rows: Sequence[int], took_ms: Sequence[float], weights: int, kv_bytes: int, weight_bytes: int, of_pair: int
    ) -> PassCost:
        """By passes of so many rows that read no KV: what a row attends to takes as long, operation by operation, as
        products with weights, of which there are `weights` (twice as many operations a row; `of_pair` for each pair of
        a query and a key); and KV is read as fast as all weights are."""
        matrix = np.stack((np.ones(len(rows)), rows), axis=1)
        base, of_row = np.linalg.lstsq(matrix, np.asarray(took_ms), rcond=None)[0].tolist()
        if min(base, of_row) < 0:
            base, of_row = min(took_ms), max(0.0, (took_ms[-1] - took_ms[0]) / max(1, rows[-1] - rows[0]))
        return cls([base, of_row, of_row * of_pair / (2 * weights), min(took_ms) * kv_bytes / weight_bytes])

    def fit(self) -> None:
        """Take what was measured into account."""
        self._new = 0
        if self._measured:
            terms = np.array([_terms(load) for load, _ in self._measured])
            took = np.array([milliseconds for _, milliseconds in self._measured])
            self.coefficients = _fitted(terms, took, np.asarray(self.coefficients, float))


def _terms(load: PassLoad) -> tuple[float, float, float, float]:
    return 1.0, float(load.tokens), float(load.prompt_attention), float(load.decode_kv)


def _fitted(terms: np.ndarray, took: np.ndarray, before: np.ndarray) -> list[float]:
    """Coefficients none of which is below 0, by relative error; what the passes do not tell stays as `before`."""
    weights = 1 / took
    scale = np.maximum(np.abs(terms * weights[:, None]).max(axis=0), 1e-300)
    own = terms * weights[:, None] / scale
    # Each term's prior counts as much as so many passes.
    prior = math.sqrt(PRIOR_WEIGHT)
    matrix = np.concatenate((own, prior * np.eye(4)))
    wanted = np.concatenate((np.ones(len(took)), prior * before * scale))
    best, least = before, math.inf
    for count in range(1, 5):
        for kept in map(list, combinations(range(4), count)):
            found = np.zeros(4)
            found[kept] = np.linalg.lstsq(matrix[:, kept], wanted, rcond=None)[0]
            error = float(((matrix @ found - wanted) ** 2).sum())
            if (found >= 0).all() and error < least:
                best, least = found / scale, error
    return [float(value) for value in best]
