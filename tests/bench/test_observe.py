from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trtllm_vattn.bench.cases import observe
from trtllm_vattn.cli.main import main

pytest.importorskip("prometheus_client")
pytest.importorskip("rich")
SMALL = ["bench", "observe", "--device", "cpu", "--model", "tiny-llama", "--max-seqs", "2", "--context", "8"]


def test_steps_are_timed_with_and_without_being_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "observe.json"
    assert main([*SMALL, "--rounds", "2", "--steps", "6", "--output-json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert len(found["results"]["rounds"]) == 2
    summary = found["summary"]
    assert summary["lowest_round"] <= summary["metrics_trace_top_over_without"] <= summary["highest_round"]
    # Each step is in the trace: two turns of two rounds and the warm-up, with the prompts'.
    assert summary["events"] > 3 * 6 * 3
    assert summary["events_dropped"] == 0
    assert main([*SMALL, "--steps", "2"]) == 2
    assert "not timed; give more" in capsys.readouterr().err


def test_rounds_that_nobody_watched_are_no_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def ended(port: int) -> Iterator[subprocess.Popen[bytes]]:
        with subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)"]) as process:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            yield process

    monkeypatch.setattr(observe, "_watching", ended)
    assert main([*SMALL, "--rounds", "1", "--steps", "3"]) == 1
    assert "top ended with 3 by itself" in capsys.readouterr().err


def test_top_starts_without_torch() -> None:
    source = "import sys, trtllm_vattn.observe.top, trtllm_vattn.cli.top; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
