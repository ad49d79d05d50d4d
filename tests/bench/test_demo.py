"""The demo: it shows what it claims, contradicts nothing, and a wrong address, byte or token fails it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trtllm_vattn.bench.cases import demo
from trtllm_vattn.cli.main import main
from trtllm_vattn.runtime.models import load_model


@pytest.mark.timeout(300)
def test_it_shows_addresses_memory_and_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, plot = tmp_path / "demo.json", tmp_path / "demo.png"
    assert main(["demo", "--device", "cpu", "--output-json", str(report), "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = json.loads(report.read_text())
    assert found["summary"]["addresses_stayed"] is found["summary"]["tokens_identical"] is True
    assert (found["summary"]["graphs_captured_again"], found["summary"]["graphs_captured"] > 0) == (0, True)
    addresses = found["results"]["addresses"]
    assert len({at for layer in addresses["layers"] for at in layer.values()}) == 2 * len(addresses["layers"])
    # Something did happen beneath the addresses, each time.
    assert all(event["maps"] > 0 and event["stayed"] for event in addresses["events"])
    memory = found["results"]["memory"]
    assert all(step["live_bytes"] <= step["mapped_bytes"] <= memory["reserved_bytes"] for step in memory["steps"])
    assert 1 < found["summary"]["mapped_over_tokens_bytes"] < found["summary"]["reserved_over_tokens_bytes"]
    held = memory["held_bytes"]
    assert held["given back"] == held["at the start"] < held["after the last"]
    said = capsys.readouterr().out
    assert "CHANGED" not in said
    assert "NO" not in said.replace("NVIDIA", "")
    assert " same " in said
    # No times: on the host they would be those of Python.
    assert " ms" not in said


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.set_num_threads(1)
    return load_model("tiny-llama", "cpu", torch.float32)


def test_an_address_that_moves_and_a_byte_that_is_lost_are_told(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    addresses, read = demo._addresses, demo._read
    asked: list[object] = []

    def moved(cache: object) -> object:
        found = addresses(cache)
        asked.append(found)
        # The third time it is asked, layer 1 lies elsewhere.
        return found if len(asked) != 3 else [found[0], [(1, 2)] * demo.SLOTS, *found[2:]]

    def lost(cache: object, where: object) -> torch.Tensor:
        return read(cache, where) if len(asked) != 4 else read(cache, where) + 1

    monkeypatch.setattr(demo, "_addresses", moved)
    monkeypatch.setattr(demo, "_read", lost)
    monkeypatch.setattr(demo, "captured_graphs", lambda engine: [])
    monkeypatch.setattr(demo, "_own", lambda plain, prompt, count: [7] * count)
    with demo._engine(model, "cpu", capture=False) as engine:
        found = demo.show_addresses(engine, model, 0)
    assert [event["stayed"] for event in found["events"]] == [True, False, False, True]
    assert found["events"][1]["layers"] == [True, False]
    assert found["tokens_identical"] is False
    step = {"sequences": 1, "tokens": 2, "live_bytes": 3, "mapped_bytes": 4, "held_bytes": 5}
    text = demo._shown(found, {"steps": [step], "held_bytes": {}, "reserved_bytes": 9}, [])
    assert "CHANGED" in text
