"""A cost model of decode attention kernels by the lengths of a batch, and the choice of the fastest kernel.

A kernel that reads all tokens at full bandwidth takes time in proportion to their sum; a kernel that gives a sequence
to few multiprocessors takes as long as the longest sequence. `Cost` models both. It is fitted once for each number of
lanes to a few measured batches (`calibration_lengths`), and `CostFile` stores it by GPU and shape. The choice computes
with the lengths only, which the host knows before a launch.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.files import write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Load:
    """What a cost depends on: the tokens of all sequences, those of the longest one, and the number of sequences."""

    tokens: int
    longest: int
    sequences: int

    @classmethod
    def of(cls, lengths: np.ndarray) -> Load:
        """The load of lengths, int ``[lanes]``, 0 for an idle lane."""
        if not len(lengths):
            return cls(0, 0, 0)
        return cls(int(lengths.sum()), int(lengths.max()), int(np.count_nonzero(lengths)))


@dataclass(frozen=True)
class Cost:
    """Microseconds of a layer: ``fixed + per_token * hypot(tokens, skew * longest) + per_sequence * sequences``.

    `skew` says how much of the GPU waits for the longest sequence: 0 if none does, the number of lanes if each lane has
    its own part of the GPU.
    """

    fixed: float
    per_token: float
    per_sequence: float
    skew: float

    def of(self, load: Load) -> float:
        """Microseconds a layer for a batch."""
        return (
            self.fixed
            + self.per_token * float(np.hypot(load.tokens, self.skew * load.longest))
            + self.per_sequence * load.sequences
        )

    @classmethod
    def fitted(cls, loads: Sequence[Load], microseconds: Sequence[float], lanes: int) -> Cost:
        """The cost with the least relative error from measured batches."""
        took = np.asarray(microseconds, np.float64)
        tokens, longest, sequences = np.array([(x.tokens, x.longest, x.sequences) for x in loads], np.float64).T
        best, least = cls(0.0, 0.0, 0.0, 0.0), np.inf
        for skew in (0.0, *np.geomspace(1, max(2, lanes), 16)):
            terms = np.stack([np.ones(len(took)), np.hypot(tokens, skew * longest), sequences], axis=1) / took[:, None]
            found = np.linalg.lstsq(terms, np.ones(len(took)), rcond=None)[0]
            error = float(np.square(terms @ found - 1).sum())
            if error < least:
                least = error
                fixed, per_token, per_sequence = (float(x) for x in found)
                best = cls(fixed, per_token, per_sequence, float(skew))
        return best


def cheapest(costs: Mapping[str, Cost], lengths: np.ndarray) -> str:
    """The name with the least cost for lengths, int ``[lanes]``; the first of equal ones."""
    load = Load.of(lengths)
    return min(costs, key=lambda name: costs[name].of(load))


def calibration_lengths(backed: np.ndarray) -> list[np.ndarray]:
    """Batches to measure, int64 ``[lanes]`` each: even and uneven, short and long; no lane longer than `backed`."""
    lanes = len(backed)
    most = int(backed.max())
    first, lane = np.arange(lanes) < max(1, lanes // 10), np.arange(lanes)
    shapes = [np.full(lanes, most // part) for part in (64, 16, 4, 2, 1)]
    shapes += [np.where(lane == 0, most, most // part) for part in (64, 16)]
    shapes += [np.where(lane == 0, most // 2, most // 64), np.where(first, most, most // 32)]
    shapes += [np.where(lane < -(-lanes // 2), most // part, 0) for part in (16, 2)]
    shapes += [most // (lane + 1), np.linspace(most, 1, lanes).astype(np.int64)]
    return [np.minimum(np.maximum(shape, lane < 1), backed) for shape in shapes]


def default_path(name: str = "attention-costs.json") -> Path:
    """A file in which measurements are stored: below XDG_CACHE_HOME, or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trtllm-vattn" / name


class JsonFile:
    """A JSON file of values by key, for what is measured once on a machine.

    If the file cannot be read or written, this is logged, and values are measured again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, key: str) -> Any:
        """The value of a key; None if there is none."""
        try:
            return self._all().get(key)
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be used, what it holds is measured again: %s", self.path, error)
            return None

    def write(self, key: str, value: Any) -> None:
        """Store a value; the file's other keys stay."""
        try:
            try:
                known = self._all()
            except ValueError:
                known = {}
            known[key] = value
            write_json(self.path, "what was measured", known)
        except (OSError, ConfigError) as error:
            logger.warning("what was measured is not stored, %s cannot be written: %s", self.path, error)

    def _all(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        known = json.loads(self.path.read_text())
        if not isinstance(known, dict):
            raise ValueError("it holds no object")
        return known


class CostFile(JsonFile):
    """Costs by a key that names the GPU, versions, shape and lanes."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__(default_path() if path is None else path)

    def get(self, key: str) -> dict[str, Cost] | None:
        """Costs by kernel, or None if there are none for the key."""
        try:
            found = self.read(key)
            return None if found is None else {name: Cost(**cost) for name, cost in found.items()}
        except (TypeError, AttributeError) as error:
            logger.warning("costs in %s cannot be used and are measured again: %s", self.path, error)
            return None

    def put(self, key: str, costs: Mapping[str, Cost]) -> None:
        """Store costs; the file's other keys stay."""
        self.write(key, {name: asdict(cost) for name, cost in costs.items()})
