"""What a benchmark measured so far: a run that a limit of time cuts off has said where its time went, and keeps what
it had."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from trtllm_vattn.bench.harness.case import conclude
from trtllm_vattn.bench.harness.report import Result, write


class Recording:
    """The results of one run, part by part. What begins is said on stderr, with the time of day and the seconds since
    the run began; what is there is written to ``--output-json`` at once, with ``unfinished: true`` in its summary until
    `conclude`.

    Attributes
    ----------
    results, summary : dict
        As `harness.report.Result` has them.
    wrong : list of str
        What makes the run fail at its end.
    """

    def __init__(self, benchmark: str, args: argparse.Namespace) -> None:
        self.results: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.wrong: list[str] = []
        self._benchmark, self._args = benchmark, args
        self._started = perf_counter()
        self._written: Result | None = None

    def say(self, text: str) -> None:
        """Print what begins now, or was found."""
        since = perf_counter() - self._started
        now = datetime.now().strftime("%H:%M:%S")
        print(f"{now} {self._benchmark} {since:6.1f} s: {text}", file=sys.stderr, flush=True)

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Another row of the results of this name."""
        self.results.setdefault(name, []).append(row)
        self._write()

    def found(self, name: str, results: Any, **figures: Any) -> None:
        """All results of this name, and figures that come of them."""
        self.results[name] = results
        self.say(f"{name} is measured")
        self.sum_up(**figures)

    def sum_up(self, **figures: Any) -> None:
        """Figures that are quoted, as far as they are known."""
        changed = {name: value for name, value in figures.items() if self.summary.get(name) != value}
        self.summary.update(figures)
        for name, value in changed.items():
            self.say(f"{name} = {value:,.4g}" if isinstance(value, float) else f"{name} = {value}")
        self._write()

    def _write(self) -> None:
        if not self._args.output_json:
            return
        if self._written is None:
            # What machine it is need not be asked again.
            self._written = Result.of(self._benchmark, self._args, self.results, {})
        self._written.summary = {**self.summary, "unfinished": True}
        write(self._written, self._args.output_json)

    def conclude(
        self,
        shown: str = "",
        plot: Callable[[dict[str, Any], Path], None] | None = None,
        wrong: Sequence[str] = (),
    ) -> int:
        """The end of a case, as `harness.case.conclude`."""
        self.say("done")
        return conclude(self._benchmark, self._args, self.results, self.summary, shown, plot, [*self.wrong, *wrong])
