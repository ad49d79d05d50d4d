"""Results of a benchmark while it runs: figures are kept as they come, a part that fails leaves the others to run."""

from __future__ import annotations

import argparse
import json
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trtllm_vattn import progress
from trtllm_vattn.bench.harness.case import Recording, engine_for
from trtllm_vattn.bench.harness.contenders import fill
from trtllm_vattn.errors import ConfigError, KVCacheOutOfMemory
from trtllm_vattn.runtime.models import load_model


def test_what_was_measured_is_kept_though_the_run_does_not_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    recording = Recording("forks", argparse.Namespace(seed=3, output_json=path, plot=None))
    recording.say("first part")
    assert not path.exists()
    cut_off: dict[str, Any] = {}

    def samples(recording: Recording) -> None:
        recording.add("runs", {"samples": 1})
        recording.sum_up(ratio=1.5)
        recording.add("runs", {"samples": 16})
        cut_off.update(json.loads(path.read_text()))

    recording.measure({"samples": samples, "more": lambda recording: [{"more": 2}]})
    assert cut_off["results"]["runs"] == [{"samples": 1}, {"samples": 16}]
    assert cut_off["summary"] == {"ratio": 1.5, "incomplete": ["samples", "more"]}
    assert (cut_off["benchmark"], cut_off["seed"]) == ("forks", 3)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in said[:3]] == ["first part", "samples begins", "ratio = 1.5"]
    assert all(re.match(r"\d\d:\d\d:\d\d forks +\d+\.\d s: ", line) for line in said)
    assert recording.conclude() == 0
    whole = json.loads(path.read_text())
    assert whole["results"]["runs"] == cut_off["results"]["runs"]
    assert whole["summary"] == {"ratio": 1.5, "more": 2}


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
    assert seen[0] == {"a": 1, "b": 2.0, "incomplete": ["first", "second"]}
    assert seen[1]["failed"] == {"first": "KVCacheOutOfMemory: no memory"}
    assert seen[1]["rows"] == [1, 2]
    # The one that failed, and the one that was cut off.
    assert written()["summary"] == {"a": 3, "b": 2.0, "incomplete": ["first", "second"]}
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
    assert json.loads(args.output_json.read_text())["summary"] == {"a": 1, "incomplete": ["wrong"]}


def test_a_part_that_fails_keeps_nothing_while_the_others_run() -> None:
    class Engine:
        pass

    made: list[weakref.ref[Engine]] = []

    def refused(recording: Recording) -> None:
        engine = Engine()
        made.append(weakref.ref(engine))
        try:
            raise KVCacheOutOfMemory("full")
        except KVCacheOutOfMemory as error:
            raise ConfigError("raise --budget") from error

    def after(recording: Recording) -> list[dict[str, Any]]:
        return [{"kept": made[0]() is not None}]

    args = argparse.Namespace(seed=0, output_json=None, device="cpu")
    recording = Recording("made", args)
    with pytest.raises(ConfigError, match="raise --budget"):
        recording.measure({"refused": refused, "after": after})
    assert recording.summary == {"kept": False}


def test_a_bug_in_a_part_leaves_the_others_to_run_and_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(recording: Recording) -> None:
        raise KeyError("a bug")

    args = argparse.Namespace(seed=0, output_json=None, plot=None, device="cpu")
    recording = Recording("made", args)
    recording.measure({"broken": broken, "right": lambda recording: [{"a": 1}]})
    assert (recording.summary, recording.conclude()) == ({"a": 1}, 1)
    told = capsys.readouterr()
    assert "Traceback" in told.err
    assert "incomplete: ['broken']" in told.out


@pytest.mark.parametrize("quiet_s", [0.0, 1e9])
def test_a_long_loop_says_how_far_it_is_where_no_bar_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet_s: float
) -> None:
    monkeypatch.setattr(progress, "QUIET_S", quiet_s)
    assert [*progress.counting([3, 4], "batch sizes", "batch size")] == [3, 4]
    with progress.Progress("kills", 5_000, "kill", 998) as kills:
        kills.update(2)
    assert kills.n == 1_000
    recording = Recording("forks", argparse.Namespace(seed=3, output_json=None, plot=None))
    for _ in range(2):
        recording.add("runs", {})
    said = [re.sub(r"\d+\.\d s|\d+ s|\d\d:\d\d:\d\d| +", " ", line) for line in capsys.readouterr().err.splitlines()]
    wanted = ["batch sizes: 1 of 2 batch sizes,", "batch sizes: 2 of 2 batch sizes,", "kills: 1,000 of 5,000 kills,"]
    wanted += ["forks : 1 row of runs", "forks : 2 rows of runs"]
    assert [" ".join(line.split()) for line in said] == (wanted if not quiet_s else [])


def test_prompts_that_go_in_for_long_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    model = load_model("tiny-llama", "cpu", torch.float32)
    with engine_for(model, "cpu", 2, 64, attention="torch", compile=False, capture=False) as engine:
        fill(engine, [20, 20], 4, np.random.default_rng(0))
    assert "prompts go in: 2 sequences, " in capsys.readouterr().err
