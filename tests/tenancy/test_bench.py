from __future__ import annotations

import json
from pathlib import Path

import pytest

from trtllm_vattn.cli.main import main


def test_the_benchmark_runs_small_and_finds_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tenancy.json"
    sizes = ["--handovers", "60", "--kills", "1", "--messages", "200", "--seconds", "0.1", "--prompts", "1"]
    sizes += ["--visits", "16"]
    tokens = ["--prompt-tokens", "20", "--output-tokens", "2", "--memory", "256KiB"]
    assert main(["bench", "tenancy", "--device", "cpu", *sizes, *tokens, "--output-json", str(path)]) == 0
    summary = json.loads(path.read_text())["summary"]
    assert summary["handovers"] >= 60
    assert summary["killed_tenants"] == 1
    assert summary["messages"] >= 200
    for name in ("foreign_bytes_seen", "ceilings_passed", "lost_by_others", "leases_moved_by_messages"):
        assert summary[name] == 0
    assert (summary["visits"], summary["visits_descriptors"]) == (16, 0)
    assert summary["visits_resident_bytes"] < 4 << 20
    for name in ("p99_over_alone", "p99_over_static", "p99_static_over_alone"):
        assert summary[name] > 0
    # A KiB a token, and half of 256 KiB.
    assert summary["burst_over_part"] == pytest.approx(22 / 128)
    assert "nobody has to borrow" in caplog.text
    assert summary["ttft_static_over_ours"] > 0
    assert "shared" in capsys.readouterr().out
