"""What a benchmark measured so far: a run that a limit of time cuts off has said where its time went, and keeps what
it had."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from trtllm_vattn.bench.harness.case import conclude, model_of
from trtllm_vattn.bench.harness.report import Result, write
from trtllm_vattn.errors import ConfigError, VattnError


class Recording:
    """The results of one run, part by part. What begins is said on stderr, with the time of day and the seconds since
    the run began; what is there is written to ``--output-json`` at once, with ``unfinished: true`` in its summary until
    `conclude`.

    Attributes
    ----------
    args : Namespace
        The flags.
    results, summary : dict
        As `harness.report.Result` has them.
    wrong : list of str
        What makes the run fail at its end.
    """

    def __init__(self, benchmark: str, args: argparse.Namespace) -> None:
        self.results: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.wrong: list[str] = []
        self._benchmark, self.args = benchmark, args
        self._started = perf_counter()
        self._written: Result | None = None

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model that ``--model`` names, loaded once."""
        self.say(f"loading {self.args.model}")
        return model_of(self.args)

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

    def measure(self, parts: Mapping[str, Part], names: Sequence[str]) -> None:
        """Run parts one after the other. One that fails leaves the others to run: it is in ``failed`` of the results,
        and the run is wrong. Raises the first ConfigError of a part, behind the last part."""
        seconds: dict[str, float] = {}
        failed: dict[str, str] = {}
        refused: ConfigError | None = None
        self.results |= {"part_seconds": seconds, "failed": failed}
        for name in names:
            started = perf_counter()
            self.say(f"{name} begins")
            try:
                for found in parts[name](self):
                    self.sum_up(**found)
            except (RuntimeError, VattnError) as error:
                if isinstance(error, ConfigError):
                    refused = refused or error
                failed[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
                self.wrong.append(f"{name} failed: {failed[name]}")
                self.say(self.wrong[-1])
            seconds[name] = round(perf_counter() - started, 2)
            self.say(f"{name} ends, {seconds[name]:.1f} s")
            self.sum_up()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if refused is not None:
            raise refused

    def _write(self) -> None:
        if not self.args.output_json:
            return
        if self._written is None:
            # What machine it is need not be asked again.
            self._written = Result.of(self._benchmark, self.args, self.results, {})
        self._written.summary = {**self.summary, "unfinished": True}
        write(self._written, self.args.output_json)

    def conclude(
        self,
        shown: str = "",
        plot: Callable[[dict[str, Any], Path], None] | None = None,
        wrong: Sequence[str] = (),
    ) -> int:
        """The end of a case, as `harness.case.conclude`."""
        self.say("done")
        return conclude(self._benchmark, self.args, self.results, self.summary, shown, plot, [*self.wrong, *wrong])


Part = Callable[[Recording], Iterator[dict[str, Any]]]
"""Measures, and yields figures as they are known; a later figure takes the place of an earlier one of its name. What is
more than a figure it puts into `Recording.results`."""
