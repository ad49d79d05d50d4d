"""One JSON file a benchmark run."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from trtllm_vattn.bench.harness.flags import as_config
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.files import reason, write_json
from trtllm_vattn.machine import commit, machine, versions


def result_of(
    benchmark: str,
    args: argparse.Namespace,
    results: dict[str, Any],
    summary: dict[str, Any],
    program: str = "trtllm-vattn",
) -> dict[str, Any]:
    """What a benchmark measured on this machine, now, with what is needed to measure it again; ``summary`` holds the
    figures quoted."""
    return {
        "benchmark": benchmark,
        "config": as_config(args),
        "seed": args.seed,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "command": f"{program} {shlex.join(sys.argv[1:])}",
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "results": results,
        "summary": summary,
    }


def write(result: dict[str, Any], path: Path) -> None:
    """Write a result; the file is there whole or not at all. Raises ConfigError where it cannot be written."""
    write_json(path, "the results", result)


def load(path: Path) -> dict[str, Any]:
    """Read a result. Raises ConfigError where there is none."""
    try:
        found: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the result {path}: {reason(error)}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"cannot read the result {path}: it holds {type(found).__name__}, not an object")
    return found
