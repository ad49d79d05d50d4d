"""Flags that commands share: types that refuse a bad value by name, and words that mean the same everywhere.

A flag's metavar is its unit. A default is shown by the command's help; a flag whose default is None says what that
means (tests/cli/test_help.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from trtllm_vattn.attention.select import BACKENDS
from trtllm_vattn.cache.select import CACHES
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.sizes import parse_bytes

T = TypeVar("T")

MOST = 1 << 30
"""Largest count that a flag takes: of tokens, sequences, steps."""
PLOTS = (".png", ".svg", ".pdf")
BUDGET = "KV memory of each cache, as 40GiB"
HEADS = "query heads, KV heads, and their size in elements"
MAX_OUTPUT = "cap on a request's output"
MAX_SEQ_LEN = "longest sequence, prompt and output together; what is longer is cut"
MAX_SEQS = "sequences that run at once, at most"
REQUESTS = "requests taken from each trace"
TIE_TOLERANCE = "the top two logits closer than this are a tie"


def positive(text: str) -> int:
    """A whole number from 1 on."""
    return _whole(text, 1, MOST)


def non_negative(text: str) -> int:
    """A whole number from 0 on."""
    return _whole(text, 0, MOST)


def seed(text: str) -> int:
    """A whole number that both numpy and torch take as a seed."""
    return _whole(text, 0, (1 << 63) - 1)


def _whole(text: str, least: int, most: int) -> int:
    # No more digits than Python converts.
    if not (text.isascii() and text.isdecimal() and len(text) < 99) or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"it is {text!r:.60}; give a whole number from {least} to {most}")
    return int(text)


def amount(text: str) -> float:
    """A number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"it is {text!r:.60}; give a number above 0")
    return value


def tolerance(text: str) -> float:
    """A number from 0 on."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"it is {text!r:.60}; give a number from 0 on")
    return value


def probability(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"it is {text!r:.60}; give a number from 0 to 1")
    return value


def _number(text: str) -> float:
    if not text.isascii() or "_" in text:
        return math.nan
    try:
        return float(text)
    except ValueError:
        return math.nan


def size(text: str) -> int:
    """Bytes, at least 1: ``40GiB``, ``512MiB`` or a plain number."""
    try:
        value = parse_bytes(int(text) if text.isascii() and text.isdecimal() and len(text) < 99 else text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if value < 1:
        raise argparse.ArgumentTypeError(f"it is {text!r:.60}; give at least 1 byte")
    return value


def listed(text: str, each: Callable[[str], T]) -> list[T]:
    """Values between commas, at least one."""
    if not (parts := [part.strip() for part in text.split(",") if part.strip()]):
        raise argparse.ArgumentTypeError(f"it is {text!r:.60}; give one value or more, with commas between them")
    return [each(part) for part in parts]


def numbers(text: str) -> list[int]:
    """``1,8,32`` as a list."""
    return listed(text, positive)


def numbers_or_none(text: str) -> list[int]:
    """``1,8,32`` as a list, ``none`` as an empty one."""
    return [] if text == "none" else numbers(text)


def sizes(text: str) -> list[int]:
    """``4MiB,1GiB`` as a list of bytes."""
    return listed(text, size)


def heads(text: str) -> list[int]:
    """Query heads, KV heads and their size: ``32,8,128``."""
    found = numbers(text)
    if len(found) != 3 or found[0] % found[1]:
        raise argparse.ArgumentTypeError(
            f"it is {text!r:.60}; give query heads, KV heads and their size, as 32,8,128, query heads a multiple"
        )
    return found


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

    def cache(part: str) -> str:
        if part not in CACHES:
            raise argparse.ArgumentTypeError(f"no cache {part!r:.60}; there are {', '.join(CACHES)}")
        return part

    return listed(text, cache)


def device(text: str) -> str:
    """``cpu``, or a GPU that is there."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if text not in ("cpu", *gpus):
        there = f"there are {', '.join(['cpu', *gpus])}" if gpus else "there is cpu alone: torch sees no GPU"
        raise argparse.ArgumentTypeError(f"it is {text!r:.60}; {there}")
    return text


def output(text: str) -> Path:
    """A file that can be written, asked before the work is done; its folder may have to be made."""
    return _writable(text, folder=False)


def output_folder(text: str) -> Path:
    """A folder that can be made or written to."""
    return _writable(text, folder=True)


def _writable(text: str, folder: bool) -> Path:
    path = Path(text)
    try:
        if not text or (path.exists() and path.is_dir() != folder):
            kind = "a folder" if folder else "a file"
            raise argparse.ArgumentTypeError(f"it is {text!r:.60}, which is not {kind}")
        there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
        writable = os.access(there, os.W_OK) and (there.is_dir() or there == path.absolute())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(f"it is {text!r:.60}: {why}") from error
    if not writable:
        raise argparse.ArgumentTypeError(f"it is {text!r:.60}, and {there} cannot be written to")
    return path


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
    add = parser.add_argument
    add("--seed", type=seed, default=0, metavar="N", help="of everything that is random: weights, tokens, order")
    add("--output-json", type=output, metavar="FILE", help="write all results there (default: print a summary alone)")
    if plots:
        add_plot(parser)


def add_plot(parser: argparse.ArgumentParser) -> None:
    """Add ``--plot``."""
    parser.add_argument(
        "--plot",
        type=plot,
        metavar="FILE",
        help=f"draw the results, in a file that ends in {', '.join(PLOTS)} (default: no plot)",
    )


def add_attention(parser: argparse.ArgumentParser) -> None:
    """Add ``--attention``."""
    parser.add_argument(
        "--attention",
        default="auto",
        choices=BACKENDS,
        help="attention kernels; auto is cudnn where it works, else torch",
    )


def add_trace(parser: argparse.ArgumentParser, **options: Any) -> None:
    """Add ``--trace``."""
    text = (
        "requests: Azure CSV, Mooncake JSON lines or list, or ShareGPT lengths CSV, also .gz (default: generated ones)"
    )
    parser.add_argument("--trace", metavar="FILE", **{"type": Path, "help": text, **options})


def add_rounds(parser: argparse.ArgumentParser, default: int, whose: str) -> None:
    """Add ``--rounds``, turns of each of the things that are compared."""
    parser.add_argument(
        "--rounds", type=positive, default=default, metavar="TURNS", help=f"turns that each {whose} takes"
    )


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
