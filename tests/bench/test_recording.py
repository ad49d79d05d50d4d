"""Results of a benchmark while it runs: figures are kept as they come, a part that fails leaves the others to run."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trtllm_vattn.bench.harness.recording import Recording
from trtllm_vattn.errors import ConfigError, KVCacheOutOfMemory


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


def test_figures_are_written_as_they_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(seed=0, output_json=tmp_path / "result.json", device="cpu")
    seen: list[dict[str, Any]] = []

    def written() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(args.output_json.read_text())
        return found

    def first(recording: Recording) -> Iterator[dict[str, Any]]:
        yield {"a": 1, "b": 2.0}
        seen.append(written()["summary"])
        recording.results["rows"] = [1, 2]
        raise KVCacheOutOfMemory("no memory")

    def second(recording: Recording) -> Iterator[dict[str, Any]]:
        seen.append(written()["results"])
        yield {"a": 3}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Recording("made", args).measure({"first": first, "second": second}, ["first", "second"])
    assert seen[0] == {"a": 1, "b": 2.0, "unfinished": True}
    assert seen[1]["failed"] == {"first": "KVCacheOutOfMemory: no memory"}
    assert seen[1]["rows"] == [1, 2]
    assert written()["summary"] == {"a": 3, "b": 2.0, "unfinished": True}
    assert list(written()["results"]["part_seconds"]) == ["first"]
    told = capsys.readouterr().err
    assert "a = 1" in told
    assert "first failed: KVCacheOutOfMemory: no memory" in told


def test_wrong_flags_of_a_part_leave_the_others_to_run(tmp_path: Path) -> None:
    def wrong(recording: Recording) -> Iterator[dict[str, Any]]:
        raise ConfigError("too few")
        yield {}

    def right(recording: Recording) -> Iterator[dict[str, Any]]:
        yield {"a": 1}

    args = argparse.Namespace(seed=0, output_json=tmp_path / "result.json", device="cpu")
    with pytest.raises(ConfigError, match="too few"):
        Recording("made", args).measure({"wrong": wrong, "right": right}, ["wrong", "right"])
    assert json.loads(args.output_json.read_text())["summary"]["a"] == 1
