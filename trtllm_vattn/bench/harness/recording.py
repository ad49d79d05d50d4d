"""What a benchmark measured so far: a run that a limit of time cuts off has said where its time went, and keeps what
it had."""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    the run began; what is there is written to ``--output-json`` at once. While parts of `measure` are left, or where
    one failed, the summary names them as ``incomplete``.

    Attributes
    ----------
    args : Namespace
        The flags.
    results, summary : dict
        As `harness.report.Result` has them.
    wrong : list of str
        What makes the run fail at its end.
    program : str
        What the recorded command begins with.
    """

    def __init__(self, benchmark: str, args: argparse.Namespace, program: str = "trtllm-vattn") -> None:
        self.results: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.wrong: list[str] = []
        self.program = program
        self._benchmark, self.args = benchmark, args
        self._started = perf_counter()
        self._written: Result | None = None
        self._left: list[str] = []

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

    def measure(self, parts: Mapping[str, Part], names: Sequence[str] | None = None) -> None:
        """Run these parts, by default all, one after the other. One that fails leaves the others to run: it is in
        ``failed`` of the results and stays ``incomplete`` in the summary, and the run is wrong. Raises the first
        ConfigError of a part, behind the last part."""
        seconds: dict[str, float] = {}
        failed: dict[str, str] = {}
        refused: ConfigError | None = None
        self.results |= {"part_seconds": seconds, "failed": failed}
        self._left = list(dict.fromkeys(parts if names is None else names))
        for name in tuple(self._left):
            started = perf_counter()
            self.say(f"{name} begins")
            try:
                for found in parts[name](self) or ():
                    self.sum_up(**found)
                self._left.remove(name)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
                self.wrong.append(f"{name} failed: {failed[name]}")
                if isinstance(error, ConfigError) and refused is None:
                    # Said behind the last part; the error's own frames would keep this part's memory until then.
                    refused = ConfigError(str(error))
                else:
                    self.say(self.wrong[-1])
                if not isinstance(error, VattnError):
                    traceback.print_exc()
            seconds[name] = round(perf_counter() - started, 2)
            self.say(f"{name} ends, {seconds[name]:.1f} s")
            self._write()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if refused is not None:
            raise refused

    @property
    def _told(self) -> dict[str, Any]:
        """The summary, and what is not measured."""
        return {**self.summary, "incomplete": list(self._left)} if self._left else self.summary

    def _write(self) -> None:
        if not self.args.output_json:
            return
        if self._written is None:
            # What machine it is need not be asked again.
            self._written = Result.of(self._benchmark, self.args, self.results, {}, self.program)
        self._written.summary = self._told
        write(self._written, self.args.output_json)

    def conclude(
        self,
        shown: str = "",
        plot: Callable[[dict[str, Any], Path], None] | None = None,
        wrong: Sequence[str] = (),
    ) -> int:
        """The end of a case, as `harness.case.conclude`."""
        self.say("done")
        wrong = [*self.wrong, *wrong]
        return conclude(self._benchmark, self.args, self.results, self._told, shown, plot, wrong, self.program)


Part = Callable[[Recording], "Iterable[dict[str, Any]] | None"]
"""Measures, and gives figures as they are known; a later figure takes the place of an earlier one of its name. What is
more than a figure it puts into `Recording.results`."""
