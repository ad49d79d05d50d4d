"""`bench stall` on the host, small: what it counts as a gap."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch

from trtllm_vattn.bench.cases import stall
from trtllm_vattn.cli.main import main
from trtllm_vattn.errors import VattnError
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model

HOST = ["bench", "stall", "--device", "cpu", "--model", "tiny-llama"]


def arguments(**changed: Any) -> argparse.Namespace:
    usual = {"seed": 0, "device": "cpu", "attention": "auto", "budget": 8 << 20, "chunk": 64, "running": 2}
    usual["target_itl_ms"] = None
    return argparse.Namespace(**{**usual, "context": 5, "prompt_tokens": 300, "room": 200, **changed})


def test_gaps_are_counted_from_the_prompts_submission_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("tiny-llama", "cpu", torch.float32)
    step = Engine._step
    seen = []

    def slow(self: Engine) -> None:
        """Slow once before the prompt, and once while it goes in."""
        busy = bool(self.scheduler.prefilling) or bool(self.scheduler.waiting)
        seen.append(busy)
        if len(seen) == 10:
            sleep(1.0)
        if busy and seen[:-1].count(True) == 3:
            sleep(0.4)
        step(self)

    monkeypatch.setattr(Engine, "_step", slow)
    with stall.engine_for_gap(model, arguments()) as engine:
        found = stall.gap(engine, model, arguments())
        assert not engine.busy
    assert found["worst_gap_ms"] > 400
    assert found["gap_ms"]["max"] == found["worst_gap_ms"]
    # Of 300 tokens by 64; what came before is not counted.
    assert found["before_ms"]["count"] == 2 * (stall.BEFORE - 1)
    assert found["before_ms"]["max"] >= 1000
    assert found["prompt_s"] > 0.4


def test_running_sequences_that_end_too_early_are_an_error() -> None:
    model = load_model("tiny-llama", "cpu", torch.float32)
    said = "2 sequences decoded all of their 20 tokens before; raise --room"
    with stall.engine_for_gap(model, arguments()) as engine, pytest.raises(VattnError, match=said):
        stall.gap(engine, model, arguments(room=20))


def test_both_parts_are_measured_with_and_without_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "stall.json"
    command = [*HOST, "--requests", "5", "--prompt-tokens", "200", "--target-itl-ms", "50"]
    assert main([*command, "--output-json", str(result)]) == 0
    found = json.loads(result.read_text())
    rows, summary = found["results"]["runs"], found["summary"]
    assert (found["config"]["target_itl_ms"], found["config"]["prompt_tokens"]) == (50, 200)
    assert not {"run", "shown"} & found["config"].keys()
    assert "Parser" not in result.read_text()
    parts = [("gap", 50.0), ("gap", "none"), ("load", 50.0), ("load", "none")]
    assert [(row["part"], row["target_itl_ms"]) for row in rows] == parts
    assert summary["worst_gap_over_target"] == rows[0]["worst_gap_ms"] / 50
    assert summary["itl_p99_ms_at_target_50"] == rows[2]["p99_itl_ms"]
    assert summary["throughput_over_no_target"] == rows[2]["output_throughput"] / rows[3]["output_throughput"]
    assert summary["worst_gap_ms_without_target"] == rows[1]["worst_gap_ms"]
    assert rows[3]["completed"] == 5
    assert "incomplete" not in summary
    # What a limit of time leaves is summed up by itself.
    kept = stall.summary(rows[:1], 50.0)
    assert kept == {
        name: summary[name] for name in ("target_itl_ms", "worst_gap_ms", "worst_gap_over_target", "prompt_s")
    }
    assert stall.summary(rows[:3], 50.0)["itl_p99_ms_at_target_50"] == summary["itl_p99_ms_at_target_50"]
    shown = capsys.readouterr().out
    assert "worst_gap_ms" in shown
    assert "output_throughput" in shown
