"""`Lengths`: how long requests are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trtllm_vattn.errors import ConfigError

LONGEST = 1 << 24
"""Tokens of a sequence; longer ones are taken for a mistake."""
SAMPLE = 64
"""Prompts that stand for a distribution."""


@dataclass(frozen=True, eq=False)
class Lengths:
    """Tokens of the prompts and the outputs of requests; each request counts once.

    Parameters
    ----------
    prompts, outputs : sequence of int
        At least 1 each, of the same requests.

    Raises
    ------
    ConfigError
        There is none, or one is out of its range.
    """

    prompts: np.ndarray
    outputs: np.ndarray

    @classmethod
    def of(cls, prompts: Sequence[int] | np.ndarray, outputs: Sequence[int] | np.ndarray) -> Lengths:
        """Checked, as int64 arrays."""
        found = []
        for name, given in (("prompts", prompts), ("outputs", outputs)):
            array = np.asarray(given)
            if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
                raise ConfigError(f"{name} are {array.dtype} {list(array.shape)}; give whole numbers, one at least")
            if array.min() < 1 or array.max() > LONGEST:
                raise ConfigError(
                    f"{name} have from {array.min()} to {array.max()} tokens; each has from 1 to {LONGEST:,}"
                )
            found.append(array.astype(np.int64))
        if len(found[0]) != len(found[1]):
            raise ConfigError(f"{len(found[0])} prompts and {len(found[1])} outputs; give one output for each prompt")
        return cls(*found)

    @property
    def ends(self) -> np.ndarray:
        """Tokens of each sequence when it ends."""
        total: np.ndarray = self.prompts + self.outputs
        return total

    @cached_property
    def longest(self) -> int:
        return int(self.ends.max())

    @cached_property
    def mean_prompt(self) -> float:
        return float(self.prompts.mean())

    @cached_property
    def mean_output(self) -> float:
        return float(self.outputs.mean())

    @cached_property
    def mean_tokens(self) -> float:
        """Of a decoding sequence."""
        return self.over_time(np.arange(self.longest + 1.0))

    @cached_property
    def spread(self) -> float:
        """Standard deviation of a decoding sequence's tokens."""
        square = self.over_time(np.arange(self.longest + 1.0) ** 2)
        return float(max(0.0, square - self.mean_tokens**2) ** 0.5)

    @cached_property
    def sample(self) -> np.ndarray:
        """`SAMPLE` prompts, evenly over the distribution, in a fixed random order."""
        found = np.quantile(self.prompts, (np.arange(SAMPLE) + 0.5) / SAMPLE).astype(np.int64)
        return np.random.default_rng(0).permutation(found)

    def over_time(self, values: np.ndarray) -> float:
        """The mean of ``values[tokens]`` over all decode steps of all sequences, whose lengths behind the step run
        from one more than the prompt to the end."""
        sums = np.concatenate(([0.0], np.cumsum(values)))
        return float((sums[self.ends + 1] - sums[self.prompts + 1]).sum() / self.outputs.sum())
