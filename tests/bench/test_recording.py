"""Results of a benchmark while it runs."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest

from trtllm_vattn.bench.harness.recording import Recording


def test_what_was_measured_is_kept_though_the_run_does_not_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    recording = Recording("forks", argparse.Namespace(seed=3, output_json=path, plot=None))
    recording.say("first part")
    assert not path.exists()
    recording.add("runs", {"samples": 1})
    recording.sum_up(ratio=1.5)
    recording.add("runs", {"samples": 16})
    cut_off = json.loads(path.read_text())
    assert cut_off["results"] == {"runs": [{"samples": 1}, {"samples": 16}]}
    assert cut_off["summary"] == {"ratio": 1.5, "unfinished": True}
    assert (cut_off["benchmark"], cut_off["seed"]) == ("forks", 3)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in said] == ["first part", "ratio = 1.5"]
    assert all(re.match(r"\d\d:\d\d:\d\d forks +\d+\.\d s: ", line) for line in said)
    assert recording.conclude() == 0
    whole = json.loads(path.read_text())
    assert (whole["results"], whole["summary"]) == (cut_off["results"], {"ratio": 1.5})


def test_without_a_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recording = Recording("forks", argparse.Namespace(seed=3, output_json=None, plot=None))
    recording.add("runs", {"samples": 1})
    assert recording.conclude(wrong=["broken"]) == 1
    assert not [*tmp_path.iterdir()]
