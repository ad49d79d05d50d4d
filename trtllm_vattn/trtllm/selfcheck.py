"""The self-check of an installation: the stock and the fixed-address KV cache side by side on a small model."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trtllm.config import ENVIRONMENT, TrtllmConfig
from trtllm_vattn.trtllm.versions import RANGE, series_of

MODEL = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
TIMEOUT = 900
SLOWER = 1.05
"""The check fails where a step takes more than this many times the stock one's time."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    passed: bool
    detail: str


def run_probe(model: str, kind: str) -> dict[str, Any]:
    """Run `probe` with one KV cache (``stock`` or ``fixed``) in a process of its own, whatever the version; returns
    what it measured. Raises ConfigError with the end of its stderr where it fails."""
    command = [sys.executable, "-m", "trtllm_vattn.trtllm.probe", model, kind]
    environment = {**os.environ, "TLLM_WORKER_USE_SINGLE_PROCESS": "1"}
    if kind == "stock":
        environment.pop(ENVIRONMENT, None)
    else:
        environment.update(replace(TrtllmConfig.from_environment(), any_version=True).as_environment())
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=environment)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"the {kind} side took more than {TIMEOUT} s; try a smaller model") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise ConfigError(f"the {kind} side ended with {done.returncode}; the end of what it said:\n{said}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def self_check(model: str = MODEL, probe: Callable[[str, str], dict[str, Any]] = run_probe) -> list[Check]:
    """Run both caches and compare them. Raises ConfigError where TensorRT-LLM is not installed or a run fails."""
    try:
        version = importlib.metadata.version("tensorrt_llm")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "tensorrt_llm is not installed, so there is nothing to check; pip install 'tensorrt-llm>=1.2,<1.5' on a "
            f"machine with a GPU (the adapter was held against {RANGE})"
        ) from None
    stock, fixed = probe(model, "stock"), probe(model, "fixed")
    same = [a == b for a, b in zip(stock["tokens"], fixed["tokens"], strict=True)]
    ratio = fixed["step_ms"] / stock["step_ms"]
    return [
        Check(
            "version", series_of(version) is not None, f"tensorrt_llm {version}; the adapter was held against {RANGE}"
        ),
        Check("tokens", all(same), f"{sum(same)} of {len(same)} prompts gave the same tokens"),
        Check(
            "step",
            ratio <= SLOWER,
            f"{fixed['step_ms']:.2f} ms at fixed addresses, {stock['step_ms']:.2f} ms stock ({ratio:.3f} times)",
        ),
        Check(
            "memory",
            fixed["busy_bytes"] <= stock["busy_bytes"],
            f"{_gib(fixed['idle_bytes'])} idle and {_gib(fixed['busy_bytes'])} after work at fixed addresses, "
            f"{_gib(stock['idle_bytes'])} and {_gib(stock['busy_bytes'])} stock",
        ),
        Check("start", True, f"{fixed['start_s']:.1f} s at fixed addresses, {stock['start_s']:.1f} s stock"),
    ]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
