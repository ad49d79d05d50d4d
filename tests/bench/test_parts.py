"""Benchmarks of parts: figures are kept as they come, a part that fails leaves the others to run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trtllm_vattn.bench.harness.parts import Bench, measure
from trtllm_vattn.errors import ConfigError, KVCacheOutOfMemory


def test_figures_are_written_as_they_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(seed=0, output_json=tmp_path / "result.json", device="cpu")
    seen: list[dict[str, Any]] = []

    def written() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(args.output_json.read_text())
        return found

    def first(bench: Bench) -> Iterator[dict[str, Any]]:
        yield {"a": 1, "b": 2.0}
        seen.append(written()["summary"])
        bench.recording.results["rows"] = [1, 2]
        raise KVCacheOutOfMemory("no memory")

    def second(bench: Bench) -> Iterator[dict[str, Any]]:
        seen.append(written()["results"])
        yield {"a": 3}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure("made", args, {"first": first, "second": second}, ["first", "second"])
    assert seen[0] == {"a": 1, "b": 2.0, "unfinished": True}
    assert seen[1]["failed"] == {"first": "KVCacheOutOfMemory: no memory"}
    assert seen[1]["rows"] == [1, 2]
    assert written()["summary"] == {"a": 3, "b": 2.0, "unfinished": True}
    assert list(written()["results"]["part_seconds"]) == ["first"]
    told = capsys.readouterr().err
    assert "a = 1" in told
    assert "first failed: KVCacheOutOfMemory: no memory" in told


def test_wrong_flags_of_a_part_leave_the_others_to_run(tmp_path: Path) -> None:
    def wrong(bench: Bench) -> Iterator[dict[str, Any]]:
        raise ConfigError("too few")
        yield {}

    def right(bench: Bench) -> Iterator[dict[str, Any]]:
        yield {"a": 1}

    args = argparse.Namespace(seed=0, output_json=tmp_path / "result.json", device="cpu")
    with pytest.raises(ConfigError, match="too few"):
        measure("made", args, {"wrong": wrong, "right": right}, ["wrong", "right"])
    assert json.loads(args.output_json.read_text())["summary"]["a"] == 1
