"""One JSON a benchmark run, and tables from it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from trtllm_vattn.bench.machine import commit, machine, versions
from trtllm_vattn.errors import ConfigError


@dataclass
class Result:
    """What a benchmark measured, with what is needed to measure it again; `summary` holds the figures quoted."""

    benchmark: str
    config: dict[str, Any]
    seed: int
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str
    command: str
    started: str
    results: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, benchmark: str, config: dict[str, Any], seed: int) -> Result:
        """A result of this machine, now, of this command."""
        return cls(
            benchmark,
            config,
            seed,
            machine(),
            versions(),
            commit(),
            shlex.join(["trtllm-vattn", *sys.argv[1:]]),
            datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def write(result: Result, path: Path) -> None:
    """Write a result; the file is there whole or not at all. Raises ConfigError where it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(result.as_dict(), indent=1) + "\n")
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise ConfigError(f"cannot write the results to {path}: {error.strerror}") from error


def finish(
    result: Result, args: argparse.Namespace, plot: Callable[[dict[str, Any], Path], None] | None = None
) -> None:
    """Print the summary, and write what ``--output-json`` and ``--plot`` ask for."""
    for name, value in result.summary.items():
        print(f"{name}: {value:,.4g}" if isinstance(value, float) else f"{name}: {value}")
    if args.output_json:
        write(result, args.output_json)
    if plot is not None and args.plot:
        plot(result.as_dict(), args.plot)


def load(path: Path) -> dict[str, Any]:
    """Read a result. Raises ConfigError where there is none."""
    try:
        found: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the result {path}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"cannot read the result {path}: it holds {type(found).__name__}, not an object")
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text that is a Markdown table too; columns of numbers are right-aligned."""
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(cells, widths, right, strict=True)
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (width - 1) + ":" if number else "-" * width for width, number in zip(widths, right, strict=True)]
    return "\n".join([line(header), "| " + " | ".join(rule) + " |", *map(line, rows)])


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").rstrip("%"))
    except ValueError:
        return False
    return True
