"""What each benchmark does first and last: loading the model, reporting results, part by part. A run that a limit of
time cuts off has said where its time went, and keeps what it had."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from trtllm_vattn import progress
from trtllm_vattn.bench.harness.flags import dtype_of
from trtllm_vattn.bench.harness.report import result_of, write
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError, VattnError
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.values import counted


def model_of(args: argparse.Namespace) -> PreTrainedModel:
    """The model that ``--model``, ``--device`` and ``--seed`` name: bfloat16 on a GPU, float32 on the host."""
    return load_model(args.model, args.device, dtype_of(args.device), args.seed)


def vocab_of(model: PreTrainedModel) -> int:
    """How many token ids there are."""
    return int(model.config.get_text_config().vocab_size)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Parameters of `Engine` out of the flags of `bench serve`."""
    return {"max_step_tokens": args.max_step_tokens, "target_itl_ms": args.target_itl_ms}


def engine_for(
    model: PreTrainedModel, device: str, num_slots: int, max_seq_len: int, budget: int | None = None, **options: Any
) -> Engine:
    """An engine over the fixed-address cache, without a prefix cache where `options` do not ask for one."""
    cache = make_cache("vattn", shape_of(model, num_slots, max_seq_len), device, budget)
    return Engine(model, cache, **{"prefix_cache": False, **options})


def captured_graphs(engine: Engine) -> list[Any]:
    """The graphs of greedy steps, and of prompts or whole passes, whichever of them the engine captured."""
    passes = engine.passes.graphs
    runners = [engine.decode.runner, engine.prefill.runner if passes is None else passes.runner]
    return [runner.graph(bucket) for runner in runners for bucket in sorted(runner.captured)]


def captured_anew(engine: Engine, before: Sequence[Any]) -> int:
    """How many of its graphs are others than before."""
    return sum(one is not other for one, other in zip(before, captured_graphs(engine), strict=True))


def give_back() -> None:
    """What torch holds of a device and does not use is there for others."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_fresh_process(script: str, *arguments: object, **environment: str) -> dict[str, Any]:
    """The JSON that a script of Python prints last, in a process of its own, with these additions to the environment.
    Raises VattnError where it fails."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise VattnError(f"a process of its own failed: {done.stderr.strip()[-1000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def conclude(
    benchmark: str,
    args: argparse.Namespace,
    results: dict[str, Any],
    summary: dict[str, Any],
    shown: str = "",
    plot: Callable[[dict[str, Any], Path], None] | None = None,
    wrong: Sequence[str] = (),
    program: str = "trtllm-vattn",
) -> int:
    """The end of every case: print its tables and figures, and on stderr what is wrong; write what ``--output-json``
    and ``--plot`` ask for. Returns the exit code, 1 where anything is wrong. Raises ConfigError where a file cannot be
    written."""
    result = result_of(benchmark, args, results, summary, program)
    if shown:
        print(shown)
    for name, value in summary.items():
        print(f"{name}: {value:,.4g}" if isinstance(value, float) else f"{name}: {value}")
    if args.output_json:
        write(result, args.output_json)
    if plot is not None and args.plot:
        plot(result, args.plot)
    for text in wrong:
        print(text, file=sys.stderr)
    return int(bool(wrong))


class Recording:
    """The results of one run, part by part. What begins is said on stderr, with the time of day and the seconds since
    the run began; what is there is written to ``--output-json`` at once. While parts of `measure` are left, or where
    one failed, the summary names them as ``incomplete``.

    Attributes
    ----------
    args : Namespace
        The flags.
    results, summary : dict
        As `harness.report.result_of` has them.
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
        self._written: dict[str, Any] | None = None
        self._left: list[str] = []

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model that ``--model`` names, loaded once."""
        self.say(f"loading {self.args.model}")
        return model_of(self.args)

    def say(self, text: str) -> None:
        """Print what begins now, or was found."""
        progress.say(f"{self._benchmark} {perf_counter() - self._started:6.1f} s: {text}")

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Another row of the results of this name."""
        rows = self.results.setdefault(name, [])
        rows.append(row)
        if progress.is_quiet():
            self.say(f"{counted(len(rows), 'row')} of {name}")
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
            give_back()
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
            self._written = result_of(self._benchmark, self.args, self.results, {}, self.program)
        self._written["summary"] = self._told
        write(self._written, self.args.output_json)

    def conclude(
        self, shown: str = "", plot: Callable[[dict[str, Any], Path], None] | None = None, wrong: Sequence[str] = ()
    ) -> int:
        """The end of a case, as `harness.case.conclude`."""
        self.say("done")
        wrong = [*self.wrong, *wrong]
        return conclude(self._benchmark, self.args, self.results, self._told, shown, plot, wrong, self.program)


Part = Callable[[Recording], "Iterable[dict[str, Any]] | None"]
"""Measures, and gives figures as they are known; a later figure takes the place of an earlier one of its name. What is
more than a figure it puts into `Recording.results`."""
