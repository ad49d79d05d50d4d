"""Flags that benchmarks share."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from trtllm_vattn.attention.select import BACKENDS


def positive(text: str) -> int:
    """A whole number from 1 on."""
    return _from(1, text)


def non_negative(text: str) -> int:
    """A whole number from 0 on."""
    return _from(0, text)


def _from(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"it is {text!r}; give a whole number from {least} on")
    return int(text)


def amount(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"it is {text!r}; give a number above 0")
    return value


def numbers(text: str) -> list[int]:
    """``1,8,32`` as a list."""
    return [positive(part) for part in text.split(",") if part]


def amounts(text: str) -> list[float]:
    """``0.5,16`` as a list."""
    return [amount(part) for part in text.split(",") if part]


def device(text: str) -> str:
    """``cpu``, or a GPU that is there."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if text not in ("cpu", *gpus):
        raise argparse.ArgumentTypeError(f"it is {text!r}; there are {', '.join(['cpu', *gpus])}")
    return text


def add_device(parser: argparse.ArgumentParser) -> bool:
    """Add ``--device``; returns whether it is a GPU, which other defaults depend on."""
    # The command line's own, if it has one (cli/main.py).
    wanted = parser.get_default("device") or ("cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device", type=device, default=wanted, help="cpu or cuda:N; sizes below depend on which")
    return bool(wanted != "cpu")


def add_common(parser: argparse.ArgumentParser, on_gpu: str = "llama-3-8b", on_host: str = "tiny-llama") -> bool:
    """Add ``--model``, ``--device``, ``--seed`` and ``--output-json``; returns whether the device is a GPU."""
    gpu, add = add_device(parser), parser.add_argument
    add("--model", default=on_gpu if gpu else on_host, help="checkpoint directory or named shape")
    add("--seed", type=int, default=0)
    add("--output-json", type=Path, help="write all results there")
    return gpu


def add_attention(parser: argparse.ArgumentParser) -> None:
    """Add ``--attention``."""
    parser.add_argument("--attention", default="auto", help=f"one of {', '.join(BACKENDS)} (default: auto)")


def as_config(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as they were, for JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(each) for each in value]
        return value if isinstance(value, int | float) else str(value)

    return {name: plain(value) for name, value in vars(args).items() if not callable(value)}


def dtype_of(device: str) -> torch.dtype:
    """What models are loaded as: bfloat16 on a GPU, float32 on the host."""
    return torch.float32 if device == "cpu" else torch.bfloat16
