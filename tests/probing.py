"""Probes of kernels in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from trtllm_vattn.attention.select import available


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


def probe_on_card(script: Path, case: str, path: str, *, eight_bits: bool = False) -> None:
    """Run a case of the attention kernels' probes on the card, by Hopper's loads (`path` is ``hopper``) or plain ones;
    skipped where the card has not what the case is of."""
    if available()["shares"] != "yes":
        pytest.skip(available()["shares"])
    if path == "hopper" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("TMA and dependent launches are used on compute capability 9")
    if eight_bits and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 is converted on compute capability 8.9 and later")
    probe(script, "cuda:0", case, path, interpreted=False)
