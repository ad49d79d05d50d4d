from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from trtllm_vattn.bench.cases.tenancy import Watched, add_arguments, serve_all
from trtllm_vattn.bench.harness.case import Recording
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
    assert summary["models_alone"] == 2
    assert summary["slowest_shared_step_ms"] > 0
    said = capsys.readouterr()
    assert "shared" in said.out
    rows = json.loads(path.read_text())["results"]["serving"]
    assert [(row["run"], row["model"], row["requests"]) for row in rows] == [
        *((run, f"model-{model}", 18) for run in ("static", "shared") for model in (0, 1)),
        *(("alone", f"model-{model}", 9) for model in (0, 1)),
    ]
    for run in ("warm-up", "static", "shared", "alone"):
        assert said.err.count(f"run {run} begins") == said.err.count(f"run {run} ends") == (2 if run == "alone" else 1)


def serving(recording: Recording) -> list[dict[str, Any]]:
    return list(serve_all(recording))


def arguments(path: Path, *flags: str) -> argparse.Namespace:
    sizes = ["--prompts=2", "--prompt-tokens=20", "--output-tokens=2", "--memory=256KiB", "--seconds=0.1"]
    sizes += ["--models=1"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--device", "cpu", *sizes, *flags, "--output-json", str(path)])


def test_runs_of_one_model_alone_are_left_out_where_the_time_is_over(tmp_path: Path) -> None:
    recording = Recording("tenancy", arguments(tmp_path / "tenancy.json", "--most-seconds", "0.001"))
    recording.measure({"serving": serving})
    assert [row["run"] for row in recording.results["serving"]] == ["static", "shared"]
    assert recording.summary["p99_over_static"] > 0
    assert "p99_over_alone" not in recording.summary


def test_a_run_that_does_not_end_is_said_and_the_rows_before_it_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(self: Watched, tenants: Sequence[Any]) -> None:
        if self.run == "shared":
            self.end = 0.0
        looked(self, tenants)

    looked = Watched.look
    monkeypatch.setattr(Watched, "look", look)
    path = tmp_path / "tenancy.json"
    recording = Recording("tenancy", arguments(path))
    recording.measure({"serving": serving})
    written = json.loads(path.read_text())
    assert [row["run"] for row in written["results"]["serving"]] == ["static"]
    assert "the run shared did not end" in written["results"]["failed"]["serving"]
    assert "model-0" in written["results"]["failed"]["serving"]
    assert written["summary"]["incomplete"] == ["serving"]
