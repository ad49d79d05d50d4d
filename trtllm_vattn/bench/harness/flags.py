"""Flags that commands share: types that refuse a bad value by name, and shared help texts.

A flag's metavar is its unit. A default is shown by the command's help; a flag whose default is None says what that
means (tests/cli/test_help.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from trtllm_vattn.arguments import adder, amount, chosen, device, listed, output, positive, seed
from trtllm_vattn.attention.select import BACKENDS
from trtllm_vattn.cache.select import CACHES

# Whether there is a GPU is asked of NVML: where torch has asked the driver, forked children cannot use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

PLOTS = (".png", ".svg", ".pdf")
BUDGET = "KV memory of each cache, as 40GiB"
MAX_OUTPUT = "cap on a request's output"
MAX_SEQ_LEN = "longest sequence, prompt and output together; what is longer is cut"
MAX_SEQS = "sequences that run at once, at most"
OBJECTIVES = ("ttft", "tpot", "e2el")
"""Latencies that goodput can be asked of: those that a request has one of."""
REQUESTS = "requests taken from each trace"
TIE_TOLERANCE = "the top two logits closer than this are a tie"


def points(text: str) -> list[tuple[int, int]]:
    """``8x8192,1x256`` as pairs of sequences and tokens."""

    def point(part: str) -> tuple[int, int]:
        sequences, cross, tokens = part.partition("x")
        if not cross:
            raise argparse.ArgumentTypeError(f"it holds {part!r:.60}; write sequences x tokens, as 8x8192")
        return positive(sequences), positive(tokens)

    return listed(text, point)


def caches(text: str) -> list[str]:
    """Names of caches; unknown ones are refused."""
    return chosen(text, "cache", CACHES)


def rate(text: str) -> float:
    """Requests a second: a number above 0, or ``inf``."""
    return math.inf if text == "inf" else amount(text)


def objective(text: str) -> tuple[str, float]:
    """``ttft:500`` as a latency and milliseconds."""
    name, _, most = text.partition(":")
    if name not in OBJECTIVES:
        raise argparse.ArgumentTypeError(f"it is {text!r:.60}; give {', '.join(OBJECTIVES)} and ms, as ttft:500")
    return name, amount(most)


def plot(text: str) -> Path:
    """A picture that can be written, and something to draw it with."""
    path = output(text)
    if path.suffix.lower() not in PLOTS:
        raise argparse.ArgumentTypeError(f"it is {text!r:.60}; give a name that ends in {', '.join(PLOTS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("plots need matplotlib: pip install 'trtllm-vattn[bench]', or leave it out")
    return path


def add_device(parser: argparse.ArgumentParser) -> bool:
    """Add ``--device``; returns whether it is a GPU, which other defaults depend on."""
    # The command line's own, if it has one (cli/main.py).
    wanted = parser.get_default("device") or ("cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--device", type=device, default=wanted, metavar="DEVICE", help="cpu or cuda:N; other defaults depend on which"
    )
    return bool(wanted != "cpu")


def add_common(parser: argparse.ArgumentParser, on_gpu: str = "llama-3-8b", on_host: str = "tiny-llama") -> bool:
    """Add ``--model``, ``--device``, ``--seed`` and ``--output-json``; returns whether the device is a GPU."""
    gpu = add_device(parser)
    add_model(parser, default=on_gpu if gpu else on_host)
    add_results(parser)
    return gpu


def add_model(parser: argparse.ArgumentParser, **options: Any) -> None:
    """Add ``--model``."""
    # With transformers, which takes seconds.
    from trtllm_vattn.runtime.models import SHAPES

    names = f"checkpoint folder, or a shape with random weights: {', '.join(SHAPES)}"
    parser.add_argument("--model", metavar="MODEL", help=names, **options)


def add_results(parser: argparse.ArgumentParser, plots: bool = False) -> None:
    """Add ``--seed``, ``--output-json`` and, where there is something to draw, ``--plot``."""
    add = adder(parser)
    add("--seed", "N", "of everything that is random: weights, tokens, order", 0, type=seed)
    add("--output-json", "FILE", "write all results there (default: print a summary alone)", type=output)
    if plots:
        add_plot(parser)


def add_plot(parser: argparse.ArgumentParser) -> None:
    """Add ``--plot``."""
    text = f"draw the results, in a file that ends in {', '.join(PLOTS)} (default: no plot)"
    adder(parser)("--plot", "FILE", text, type=plot)


def add_attention(parser: argparse.ArgumentParser) -> None:
    """Add ``--attention``."""
    text = "attention kernels; auto is cudnn where it works, else torch"
    parser.add_argument("--attention", default="auto", choices=BACKENDS, help=text)


def add_trace(parser: argparse.ArgumentParser, **options: Any) -> None:
    """Add ``--trace``."""
    text = (
        "requests: Azure CSV, Mooncake JSON lines or list, or ShareGPT lengths CSV, also .gz (default: generated ones)"
    )
    parser.add_argument("--trace", metavar="FILE", **{"type": Path, "help": text, **options})


def add_parts(
    parser: argparse.ArgumentParser, parts: Iterable[str], default: str | None = None, flag: str = "--parts"
) -> None:
    """Add ``--parts``, which of a benchmark's parts are measured, in this order (`Recording.measure`)."""
    names = tuple(parts)
    text = f"what is measured, of {', '.join(names)}"
    usual = ",".join(names) if default is None else default
    parser.add_argument(
        flag, type=lambda text: chosen(text, "part", names), default=usual, metavar="NAME,...", help=text
    )


def add_steady(
    parser: argparse.ArgumentParser, whose: str, context: int, rounds: int, steps: int, batches: str | None = None
) -> None:
    """Add ``--context``, ``--rounds``, ``--steps`` and, with `batches` as its default, ``--batch-sizes``: of decode
    steps that contenders take in turns."""
    add = adder(parser)
    if batches is not None:
        add("--batch-sizes", "SEQUENCES,...", "sequences in steady decode steps", batches)
    add("--context", "TOKENS", "tokens of each sequence in steady decode", context)
    add("--rounds", "TURNS", f"turns that each {whose} takes", rounds)
    add("--steps", "STEPS", "decode steps of a turn", steps)


def as_config(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as they were, for JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(each) for each in value]
        # JSON has no infinity.
        return value if isinstance(value, int | float) and math.isfinite(value) else str(value)

    # The parser's own: the command's function, and the parser whose help may be printed.
    flags = {name: value for name, value in vars(args).items() if name not in ("run", "shown")}
    return {name: plain(value) for name, value in flags.items()}


def dtype_of(device: str) -> torch.dtype:
    """What models are loaded as: bfloat16 on a GPU, float32 on the host."""
    return torch.float32 if device == "cpu" else torch.bfloat16
