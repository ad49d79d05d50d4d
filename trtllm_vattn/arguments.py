"""Types of command-line arguments: each refuses a bad value in one line that says what to give."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.sizes import parse_bytes

T = TypeVar("T")


MOST = 1 << 30
"""Largest count that a flag takes: of tokens, sequences, steps."""
HEADS = "query heads, KV heads, and their size in elements"


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


def json_object(text: str) -> dict[str, Any]:
    """An object of JSON."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"it is {text!r:.60}, which is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise argparse.ArgumentTypeError(f'it is {text!r:.60}; give an object of JSON, as {{"method": "ngram"}}')
    return given


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


def chosen(text: str, kind: str, known: Collection[str]) -> list[str]:
    """Names between commas; those that are not known are refused, as ``no KIND 'x'``."""

    def name(part: str) -> str:
        if part not in known:
            raise argparse.ArgumentTypeError(f"no {kind} {part!r:.60}; there are {', '.join(known)}")
        return part

    return listed(text, name)


def numbers(text: str) -> list[int]:
    """``1,8,32`` as a list."""
    return listed(text, positive)


def numbers_or_none(text: str) -> list[int]:
    """``1,8,32`` as a list, ``none`` as an empty one."""
    return [] if text == "none" else numbers(text)


def heads(text: str) -> list[int]:
    """Query heads, KV heads and their size: ``32,8,128``."""
    found = numbers(text)
    if len(found) != 3 or found[0] % found[1]:
        raise argparse.ArgumentTypeError(
            f"it is {text!r:.60}; give query heads, KV heads and their size, as 32,8,128, query heads a multiple"
        )
    return found


def sizes(text: str) -> list[int]:
    """``4MiB,1GiB`` as a list of bytes."""
    return listed(text, size)


def device(text: str) -> str:
    """``cpu``, or a GPU that is there."""
    # Where nobody asks for a device, it is not worth its import.
    import torch

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


_TYPES: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("SECONDS", "MILLISECONDS", "SHAPE"), amount),
    **dict.fromkeys(("LOGITS", "DEVIATIONS"), tolerance),
    **{"BYTES": size, "BYTES,...": sizes, "SHARE": probability},
}
"""By unit; whatever is not here is counted."""


def adder(parser: argparse.ArgumentParser, gpu: bool = False) -> Callable[..., None]:
    """What adds flags, each by its name, unit, which says the type too, help, and default; `on_host` is the default
    where there is no GPU, if it is another."""

    def add(name: str, unit: str, text: str, default: Any = None, on_host: Any = None, **options: Any) -> None:
        kind = _TYPES.get(unit, numbers if unit.endswith(",...") else positive)
        usual = default if gpu or on_host is None else on_host
        parser.add_argument(name, metavar=unit, help=text, default=usual, **{"type": kind, **options})

    return add
