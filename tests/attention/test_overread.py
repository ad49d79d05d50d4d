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
    [*itertools.product(["torch", "cudnn", "xqa"], ["vattn", "blocks"]), ("xqa-fmha", "blocks"), ("shares", "vattn")],
)
def test_no_backend_reads_past_a_length(backend: str, cache: str, layers_per_range: int) -> None:
    done = _probe(backend, str(layers_per_range), cache)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "all cases passed" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "cache"), [("cudnn", "vattn"), ("xqa", "blocks")])
def test_a_load_of_memory_that_is_not_there_is_noticed(backend: str, cache: str) -> None:
    done = _probe(backend, "8", cache, "beyond")
    assert done.returncode != 0
    assert "start decode of 4096" in done.stdout
    assert "nobody noticed" not in done.stdout
    assert "illegal memory access" in done.stderr


def _probe(backend: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    if available()[backend] != "yes":
        pytest.skip(available()[backend])
    command = [sys.executable, str(PROBE), backend, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
