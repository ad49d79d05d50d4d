"""`bench speculation` on the host, small: the text that is scripted, and what the figures are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trtllm_vattn.bench.cases import speculation
from trtllm_vattn.cli.main import main
from trtllm_vattn.runtime.models import SHAPES, load_model


def test_a_text_repeats_itself_and_a_script_is_what_a_model_writes() -> None:
    text = speculation.repeating_text(600, 512, np.random.default_rng(0))
    assert len(text) == 600
    grams = [tuple(text[i : i + 4]) for i in range(597)]
    assert 0.3 < len(set(grams)) / len(grams) < 0.8
    model = load_model("tiny-llama", "cpu", torch.float32)
    script = speculation.Script(model, 20)
    script.set(text[:20])
    ids, places = torch.zeros(1, 5, dtype=torch.int64), torch.tensor([[3, 7, 0, 8, 9]])
    with torch.inference_mode():
        every = model(input_ids=ids, position_ids=places).logits[0].argmax(dim=-1)
        kept = model(input_ids=ids, position_ids=places, logits_to_keep=torch.tensor([1, 4])).logits[0].argmax(dim=-1)
    assert every.tolist() == [text[4], text[8], text[1], text[9], text[10]]
    assert kept.tolist() == [text[8], text[10]]
    script.remove()
    assert not hasattr(model, "script")


def row(text: str, lanes: int, drafts: int, rate: float, accepted: float = 0.0) -> dict[str, Any]:
    return {"text": text, "lanes": lanes, "drafts": drafts, "tokens_per_s": rate, "accepted_per_step": accepted}


def test_speedups_are_over_the_same_lanes_without_drafts() -> None:
    rows = [row(text, lanes, 0, 100.0 * lanes) for text in ("repeating", "random") for lanes in (1, 32)]
    rows += [row("repeating", 1, 3, 250.0, 1.5), row("repeating", 32, 3, 4000.0), row("repeating", 1, 7, 260.0, 2.5)]
    rows += [row("repeating", 32, 7, 4100.0), row("random", 1, 3, 98.0), row("random", 32, 3, 3300.0)]
    rows += [row("random", 1, 7, 99.0), row("random", 32, 7, 3100.0)]
    found = speculation.summarised(rows)
    assert (found["accepted_per_step_k3"], found["accepted_per_step_k7"]) == (1.5, 2.5)
    assert (found["speedup_k3_1_lane"], found["speedup_k3_32_lanes"]) == (2.5, 1.25)
    assert found["worst_over_without"] == pytest.approx(31 / 32)


def test_it_is_measured_with_and_without_drafts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES["tiny-llama"], "num_hidden_layers", 1)
    monkeypatch.setattr(speculation, "DRAFTS", (0, 3))
    result = tmp_path / "speculation.json"
    command = ["bench", "speculation", "--device", "cpu", "--model", "tiny-llama", "--lanes", "2"]
    command += ["--context", "24", "--output-tokens", "18", "--attention", "torch"]
    assert main([*command, "--output-json", str(result)]) == 0
    found = json.loads(result.read_text())
    rows, summary = found["results"]["runs"], found["summary"]
    assert summary["tokens_identical_float32"] is True
    assert {(each["text"], each["lanes"], each["drafts"]) for each in rows} == {
        (text, lanes, drafts) for text in ("repeating", "random") for lanes in (2,) for drafts in (0, 3)
    }
    wanted = {"accepted_per_step_k3", "speedup_k3_2_lanes", "worst_over_without", "rollback_us"}
    assert wanted <= summary.keys()
    assert 0 < summary["rollback_us"] < 1000
    assert summary["text"] == "scripted"
    assert "accepted_per_step" in capsys.readouterr().out
