"""`bench soak` on the host, small: it remaps beneath one graph, compares every bit, and fails where it has to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cli.main import main
from trtllm_vattn.runtime.decode import DecodeBatch
from trtllm_vattn.verify import negative_controls as controls
from trtllm_vattn.verify.differential import STEPS, Differential

HOST = ["--device", "cpu", "--model", "tiny-llama"]
SOAK = ["bench", "soak", *HOST, "--replays", "40", "--repeatable", "10"]


@pytest.mark.usefixtures("forked_python")
def test_the_soak_remaps_beneath_one_graph_and_catches_its_controls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, state = tmp_path / "soak.json", tmp_path / "state.json"
    assert main([*SOAK, "--state", str(state), "--output-json", str(report)]) == 0
    summary = json.loads(report.read_text())["summary"]
    assert summary["replays"] >= 40
    assert summary["remaps"] > 40
    assert summary["graphs_captured"] == 1
    assert (summary["mismatches"], summary["left_alone_mismatches"], summary["eager_mismatches"]) == (0, 0, 0)
    assert summary["eager_checks"] >= 1
    assert summary["controls_caught"] == 5
    assert summary["fenced_unmap_survived"] is True
    # It goes on where it stopped, and not with another's.
    monkeypatch.setattr("trtllm_vattn.verify.soak.run_controls", lambda *arguments: {"none": "caught"})
    monkeypatch.setattr("trtllm_vattn.bench.cases.soak.fenced_unmap", lambda *arguments: "survived")
    assert main([*SOAK, "--replays", "60", "--state", str(state), "--output-json", str(report)]) == 0
    results = json.loads(report.read_text())
    assert len(results["results"]["chunks"]) == 2
    assert 60 <= results["summary"]["replays"] < 100
    assert main([*SOAK, "--seed", "9", "--state", str(state)]) == 2


def test_a_soak_that_gives_other_bits_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    move = Differential.move

    def forgetting(self: Differential) -> None:
        """Another slot, and not the same bytes."""
        move(self)
        cache = self.subject.cache
        for sequence in self.limits:
            for layer in range(cache.shape.num_layers):
                cache.layer(layer).v[cache.slot_of(sequence), :1] += 1  # type: ignore[union-attr]

    monkeypatch.setattr(Differential, "move", forgetting)
    monkeypatch.setattr("trtllm_vattn.verify.soak.run_controls", lambda *arguments: {"none": "caught"})
    monkeypatch.setattr("trtllm_vattn.bench.cases.soak.fenced_unmap", lambda *arguments: "survived")
    assert main([*SOAK, "--replays", "40", "--repeatable", "1"]) == 1
    assert "mismatches: 0\n" not in capsys.readouterr().out.partition("eager_checks")[0]


@pytest.mark.parametrize("caught", ["missed: survived", "the process ended with code -11"])
@pytest.mark.parametrize("fenced", ["survived", "the process ended with code -11"])
def test_a_soak_fails_where_a_control_is_missed_or_what_is_right_does_not_survive(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caught: str, fenced: str
) -> None:
    monkeypatch.setattr("trtllm_vattn.verify.soak.run_controls", lambda *arguments: {"unfenced unmap": caught})
    monkeypatch.setattr("trtllm_vattn.bench.cases.soak.fenced_unmap", lambda *arguments: fenced)
    report = tmp_path / "soak.json"
    right = caught.startswith("the process") and fenced == "survived"
    assert main([*SOAK, "--replays", "4", "--repeatable", "1", "--output-json", str(report)]) == int(not right)
    summary = json.loads(report.read_text())["summary"]
    assert summary["controls_caught"] == int(caught.startswith("the process"))
    assert summary["fenced_unmap_survived"] is (fenced == "survived")


def test_an_unmap_that_is_not_beside_replays_or_takes_nothing_away_is_no_control(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = {"unfenced": (0, "unmapping beside replays\nsurvived", ""), "fenced": (-11, "unmapping after replays", "")}
    monkeypatch.setattr(controls, "_unmap_apart", lambda device, model, how: said[how])
    assert controls.unfenced_unmap("cpu", "tiny-llama").startswith("missed: unmapping beside")
    assert controls.fenced_unmap("cpu", "tiny-llama").startswith("the process ended with code -11")
    said["unfenced"] = (-11, "unmapping after replays", "")
    assert controls.unfenced_unmap("cpu", "tiny-llama").startswith("missed")
    said["fenced"] = (0, "unmapping beside replays\nsurvived", "")
    assert controls.fenced_unmap("cpu", "tiny-llama") != "survived"


@pytest.mark.parametrize(
    ("what", "code"), [("a middle step", 1), ("the last step", 1), ("one word", 1), ("idle lanes", 0)]
)
def test_a_soak_compares_the_bits_of_every_step_and_of_no_idle_lane(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str, code: int
) -> None:
    right = DecodeBatch._forward

    def slightly_other(self: DecodeBatch, bucket: int) -> torch.Tensor:
        """Logits of the side that is remapped are a little larger there; tokens are the same."""
        logits = right(self, bucket)
        if not isinstance(self.attention.cache, KVCacheManager):
            return logits
        taken, lengths = self._device[-2:-1], self.inputs[3, :bucket, None]
        wrong = {
            "a middle step": (taken == 1) & (lengths > 0),
            "the last step": (taken == STEPS - 1) & (lengths > 0),
            "one word": (taken == 1) & (lengths > 0) & (torch.arange(logits.shape[1]) == 17),
            "idle lanes": lengths == 0,
        }[what]
        return logits * torch.where(wrong, 1 + 2**-20, 1.0)

    monkeypatch.setattr(DecodeBatch, "_forward", slightly_other)
    monkeypatch.setattr("trtllm_vattn.verify.soak.run_controls", lambda *arguments: {"none": "caught"})
    monkeypatch.setattr("trtllm_vattn.bench.cases.soak.fenced_unmap", lambda *arguments: "survived")
    assert main([*SOAK, "--replays", "20", "--repeatable", "1", "--tolerance", "1"]) == code
    assert ("\nmismatches: 0\n" in capsys.readouterr().out) is (code == 0)
