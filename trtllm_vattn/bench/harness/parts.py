"""Benchmarks of several parts, each of which says figures as it finds them (recording.py)."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from trtllm_vattn.bench.harness.case import model_of
from trtllm_vattn.bench.harness.recording import Recording
from trtllm_vattn.errors import ConfigError, VattnError


class Bench:
    """One run of a benchmark of parts.

    Attributes
    ----------
    args : Namespace
        The flags.
    recording : Recording
        What was found so far; parts put what is more than a figure into its `results`.
    """

    def __init__(self, benchmark: str, args: argparse.Namespace) -> None:
        self.args, self.recording = args, Recording(benchmark, args)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model that ``--model`` names, loaded once."""
        self.recording.say(f"loading {self.args.model}")
        return model_of(self.args)


Part = Callable[[Bench], Iterator[dict[str, Any]]]
"""Measures, and yields figures as they are known; a later figure takes the place of an earlier one of its name."""


def measure(benchmark: str, args: argparse.Namespace, parts: Mapping[str, Part], names: Sequence[str]) -> Recording:
    """Run parts one after the other. One that fails leaves the others to run: it is in ``failed`` of the results, and
    the run is wrong. Raises the first ConfigError of a part, behind the last part."""
    bench = Bench(benchmark, args)
    recording = bench.recording
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    refused: ConfigError | None = None
    recording.results |= {"part_seconds": seconds, "failed": failed}
    for name in names:
        started = perf_counter()
        recording.say(f"{name} begins")
        try:
            for found in parts[name](bench):
                recording.sum_up(**found)
        except (RuntimeError, VattnError) as error:
            if isinstance(error, ConfigError):
                refused = refused or error
            failed[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
            recording.wrong.append(f"{name} failed: {failed[name]}")
            recording.say(recording.wrong[-1])
        seconds[name] = round(perf_counter() - started, 2)
        recording.say(f"{name} ends, {seconds[name]:.1f} s")
        recording.sum_up()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if refused is not None:
        raise refused
    return recording
