"""`bench tune`: the fastest trial's kernels are what is written, and a start that searches all the same is told."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from trtllm_vattn.bench.cases import tune
from trtllm_vattn.cli.main import main
from trtllm_vattn.runtime import tuned

FILE = "ab/c0ffee.best_config"


def config(block: int) -> dict[str, Any]:
    return {"XBLOCK": block, "num_warps": 4, "found_by_coordesc": True, "configs_hash": "x"}


@pytest.mark.parametrize(("tried", "code"), [(0, 0), (7, 1)])
def test_the_fastest_trial_is_kept(
    tried: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    steps, given = iter([4.9, 4.3, 4.6, 4.31]), []

    def started(args: Any, folder: str) -> tuple[dict[str, Any], tuned.Kernels]:
        given.append(sorted(os.listdir(folder)))
        block = len(given) if len(given) < 4 else json.loads((Path(folder) / "h200.json").read_text())[-1]["kernels"]
        kernels = {FILE: config(block)} if isinstance(block, int) else block
        return {"step_ms": next(steps), "tried": 40 if len(given) < 4 else tried, "seconds": 1.0}, kernels

    monkeypatch.setattr(tune, "started", started)
    result, folder = tmp_path / "tune.json", tmp_path / "tuned"
    folder.mkdir()
    other = {"model": "other", **tuned.toolchain(), "kernels": {}}
    (folder / "h200.json").write_text(json.dumps([other, {**other, "model": "llama-3-8b"}]))
    command = ["bench", "tune", "--trials", "3", "--output", str(folder), "--output-json", str(result)]
    assert main(command) == code
    # Trials search from nothing; the last start has what was found.
    assert given == [[], [], [], ["h200.json"]]
    kept = json.loads((folder / "h200.json").read_text())
    assert [(entry["model"], entry.get("step_ms")) for entry in kept] == [("other", None), ("llama-3-8b", 4.3)]
    assert kept[-1]["kernels"] == {FILE: config(2)}
    summary = json.loads(result.read_text())["summary"]
    assert (summary["best_step_ms"], summary["worst_step_ms"], summary["step_ms_with_found"]) == (4.3, 4.9, 4.31)
    assert summary["same_kernels"] is True
    assert ("a start tried 7 configurations all the same" in capsys.readouterr().err) is bool(code)


def test_nothing_is_tuned_on_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tune", "--device", "cpu"]) == 2
    assert "nothing is tuned on the CPU" in capsys.readouterr().err


@pytest.mark.usefixtures("forked_python")
def test_a_trial_times_a_step_in_its_own_process(tmp_path: Path) -> None:
    args = type("args", (), {"model": "tiny-llama", "device": "cpu", "context": 20, "steps": 4, "seed": 0})
    row, kernels = tune.started(args, str(tmp_path))  # type: ignore[arg-type]
    assert row["step_ms"] > 0
    assert (row["tried"], kernels) == (0, {})
