"""What each benchmark does first and last: loading the model, reporting results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from trtllm_vattn.bench.harness.flags import dtype_of
from trtllm_vattn.bench.harness.report import Result, write
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model


def model_of(args: argparse.Namespace) -> PreTrainedModel:
    """The model that ``--model``, ``--device`` and ``--seed`` name: bfloat16 on a GPU, float32 on the host."""
    return load_model(args.model, args.device, dtype_of(args.device), args.seed)


def vocab_of(model: PreTrainedModel) -> int:
    """How many token ids there are."""
    return int(model.config.get_text_config().vocab_size)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Parameters of `Engine` out of the flags of `add_pass_limits`."""
    return {"max_step_tokens": args.max_step_tokens, "target_itl_ms": args.target_itl_ms}


def captured_graphs(engine: Engine) -> list[Any]:
    """The graphs of greedy steps, and of prompts or whole passes, whichever of them the engine captured."""
    passes = engine.passes.graphs
    runners = [engine.decode.runner, engine.prefill.runner if passes is None else passes.runner]
    return [runner.graph(bucket) for runner in runners for bucket in sorted(runner.captured)]


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
    result = Result.of(benchmark, args, results, summary, program)
    if shown:
        print(shown)
    for name, value in summary.items():
        print(f"{name}: {value:,.4g}" if isinstance(value, float) else f"{name}: {value}")
    if args.output_json:
        write(result, args.output_json)
    if plot is not None and args.plot:
        plot(result.as_dict(), args.plot)
    for text in wrong:
        print(text, file=sys.stderr)
    return int(bool(wrong))
