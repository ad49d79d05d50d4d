"""`over_read = 0`, shown on the card: nothing past a length is loaded, and nothing of a lane of length 0."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from trtllm_vattn.attention.select import available

PROBE = Path(__file__).with_name("overread_probe.py")


@pytest.mark.gpu
@pytest.mark.parametrize("layers_per_range", [1, 32])
@pytest.mark.parametrize(
    ("backend", "cache"),
    [*itertools.product(["torch", "cudnn", "xqa"], ["vattn", "blocks"]), ("xqa-fmha", "blocks")],
)
def test_no_backend_reads_past_a_length(backend: str, cache: str, layers_per_range: int) -> None:
    if available()[backend] != "yes":
        pytest.skip(available()[backend])
    command = [sys.executable, str(PROBE), backend, str(layers_per_range), cache]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "all cases passed" in done.stdout
