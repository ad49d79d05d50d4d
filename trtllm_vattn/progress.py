"""How far a long run is: a bar at a terminal; elsewhere a line on stderr whenever nothing was said for a while."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from datetime import datetime
from time import perf_counter
from typing import TypeVar

from tqdm import tqdm

from trtllm_vattn.values import counted

T = TypeVar("T")
QUIET_S = 20.0
"""Seconds without a line, after which the next thing that is done says one."""


class _Said:
    """When the last line was said, by the monotonic clock."""

    at = perf_counter()


def say(text: str) -> None:
    """Print a line on stderr, with the time of day."""
    _Said.at = perf_counter()
    tqdm.write(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr)
    sys.stderr.flush()


def is_quiet() -> bool:
    """Whether nothing was said for `QUIET_S` seconds."""
    return perf_counter() - _Said.at >= QUIET_S


class Progress:
    """Counts what is done of something; to be used as a context.

    Parameters
    ----------
    label : str
        What is done.
    total : int
        Of how much.
    unit : str
        Of one; singular, with a regular plural.
    n : int
        How much was done before.
    """

    def __init__(self, label: str, total: int, unit: str, n: int = 0) -> None:
        self.label, self.total, self.unit, self.n = label, total, unit, n
        self._began = perf_counter()
        self._bar = tqdm(total=total, initial=n, desc=label, unit=unit, disable=None)

    def update(self, n: int = 1) -> None:
        """So much more is done."""
        self.n += n
        self._bar.update(n)
        if self._bar.disable and is_quiet():
            took = perf_counter() - self._began
            say(f"{self.label}: {self.n:,} of {counted(self.total, self.unit)}, {took:.0f} s")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.close()


def counting(items: Collection[T], label: str, unit: str) -> Iterator[T]:
    """The items, of which it is said how many are done."""
    with Progress(label, len(items), unit) as progress:
        for item in items:
            yield item
            progress.update()
