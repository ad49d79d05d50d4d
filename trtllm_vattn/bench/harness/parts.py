"""Benchmarks of several parts: each figure is written to the result file once it is there, so that a run that is cut
off keeps what it measured; and what is under way is told on stderr, with the time."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from trtllm_vattn.bench.harness.case import model_of
from trtllm_vattn.bench.harness.report import Result, write
from trtllm_vattn.errors import ConfigError, VattnError


@dataclass
class Bench:
    """One run of a benchmark of parts.

    Attributes
    ----------
    args : Namespace
        The flags.
    tables : dict
        What is more than a figure, for the result file and plots.
    summary : dict
        Figures so far.
    seconds, failed : dict
        By name, how long each part took that is done, and why another one failed.
    """

    args: argparse.Namespace
    tables: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model that ``--model`` names, loaded once."""
        say(f"loading {self.args.model}")
        return model_of(self.args)

    def results(self) -> dict[str, Any]:
        """The body of the result file."""
        figures = [{"figure": name, "value": value} for name, value in self.summary.items()]
        return {"figures": figures, **self.tables, "part_seconds": self.seconds, "failed": self.failed}


Part = Callable[[Bench], Iterator[dict[str, Any]]]
"""Measures, and yields figures as they are known; a later figure takes the place of an earlier one of its name."""


def say(text: str) -> None:
    """A line on stderr, with the time of day."""
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def measure(benchmark: str, args: argparse.Namespace, parts: Mapping[str, Part], names: Sequence[str]) -> Bench:
    """Run parts one after the other. One that fails on the device, or has no memory, leaves the others to run; it is
    in `Bench.failed`. Raises ConfigError as parts do."""
    bench, began = Bench(args), perf_counter()
    result = Result.of(benchmark, args, bench.results(), bench.summary)
    for name in names:
        started = perf_counter()
        say(f"{name}: begins, {started - began:.1f} s after the start")
        try:
            for found in parts[name](bench):
                bench.summary.update(found)
                say(f"{name}: {', '.join(f'{key}={_shown(value)}' for key, value in found.items())}")
                _keep(result, bench)
        except ConfigError:
            raise
        except (RuntimeError, VattnError) as error:
            bench.failed[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
            say(f"{name}: failed, {bench.failed[name]}")
        bench.seconds[name] = round(perf_counter() - started, 2)
        say(f"{name}: ends, {bench.seconds[name]:.1f} s")
        _keep(result, bench)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return bench


def _keep(result: Result, bench: Bench) -> None:
    result.results, result.summary = bench.results(), bench.summary
    if bench.args.output_json:
        write(result, bench.args.output_json)


def _shown(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
