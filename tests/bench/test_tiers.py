"""`bench tiers` on the host: its summary has what it is about, and nothing is captured again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trtllm_vattn.cli.main import main


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiers.json"
    sizes = ["--tokens", "100", "--wake-bytes", "1MiB", "--keep-bytes", "1MiB", "--link-bytes", "1MiB"]
    crowd = ["--max-seqs", "2", "--prompt", "20", "--output-tokens", "12", "--rounds", "1"]
    assert main(["bench", "tiers", "--device", "cpu", *sizes, *crowd, "--output-json", str(path)]) == 0
    result = json.loads(path.read_text())
    summary = result["summary"]
    for name in (
        "resume_over_link",
        "wake_kept_over_link",
        "oversubscribed_over_admission",
        "wake_empty_s",
        "wake_at_once_s",
    ):
        assert summary[name] > 0
    # The host's memory is not 60 GB.
    assert summary["wake_empty_s_60gb"] is None
    assert (summary["recaptures"], summary["tokens_identical"]) == (0, True)
    kept = [row for row in result["results"]["sleeps"] if row["kv"] == "keep"]
    assert all(row["copied_bytes"] > 0.8 * row["bytes"] for row in kept)
    assert [row["copied_bytes"] for row in result["results"]["sleeps"] if row["kv"] == "drop"] == [0, 0]
    assert [row["wakes"] for row in result["results"]["sleeps"]] == ["kept", "at once", "later"]
    assert all(row["created"] > 0 and row["create_s"] > 0 for row in result["results"]["sleeps"] if row["kv"] == "drop")
    crowd_rows = {row["engine"]: row for row in result["results"]["crowds"]}
    assert crowd_rows["oversubscribed"]["output_tokens"] == crowd_rows["admission"]["output_tokens"] == 4 * 12
    assert "wake_kept_over_link" in capsys.readouterr().out
