"""A benchmark of several parts: says on stderr how far it is, and writes its results after each, so that a run that is
ended early leaves what it had."""

from __future__ import annotations

import argparse
import sys
from time import perf_counter
from typing import Any

from trtllm_vattn.bench.harness.case import conclude
from trtllm_vattn.bench.harness.report import Result, write


class Parts:
    """Results and summary of a benchmark, growing by its parts."""

    def __init__(self, benchmark: str, args: argparse.Namespace) -> None:
        self._benchmark, self._args, self._started = benchmark, args, perf_counter()
        self.results: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.wrong: list[str] = []

    def say(self, text: str) -> None:
        """A line on stderr, with the seconds since the start."""
        print(f"{perf_counter() - self._started:7.1f} s  {text}", file=sys.stderr, flush=True)

    def add(self, name: str, results: dict[str, Any], summary: dict[str, Any], wrong: list[str] | None = None) -> None:
        """A part is done. Raises ConfigError where ``--output-json`` cannot be written."""
        self.results[name] = results
        self.summary.update(summary)
        self.wrong += wrong or []
        self.say(f"{name}: " + ", ".join(f"{key} {_shown(value)}" for key, value in summary.items()))
        if self._args.output_json:
            write(Result.of(self._benchmark, self._args, self.results, self.summary), self._args.output_json)

    def conclude(self) -> int:
        """The end; the exit code, 1 where anything is wrong."""
        return conclude(self._benchmark, self._args, self.results, self.summary, wrong=self.wrong)


def _shown(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
