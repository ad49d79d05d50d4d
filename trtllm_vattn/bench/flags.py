"""Flags that benchmarks share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from trtllm_vattn.attention.select import BACKENDS


def add_common(parser: argparse.ArgumentParser, on_gpu: str = "llama-3-8b", on_host: str = "tiny-llama") -> bool:
    """Add ``--model``, ``--device``, ``--seed`` and ``--output-json``; returns whether there is a GPU, which other
    defaults depend on."""
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--model", default=on_gpu if gpu else on_host, help="checkpoint directory or named shape")
    add("--device", default="cuda:0" if gpu else "cpu", help="cpu or cuda:N")
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
