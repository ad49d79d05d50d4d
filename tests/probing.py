"""Probes of kernels in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


def probe(script: Path, *arguments: str, interpreted: bool, timeout_s: float = 300) -> None:
    """Run a probe's cases in a process of its own, which may die of a load too far."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if interpreted and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton's interpreter makes numbers of arrays, which numpy refuses from 2.4 on")
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "all cases passed" in done.stdout
