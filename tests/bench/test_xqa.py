"""`bench xqa` on the host, small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trtllm_vattn.bench.cases.xqa_parts import RandomBlocks
from trtllm_vattn.cli.main import main

HOST = ["--device", "cpu", "--model", "tiny-llama"]


def test_xqa_over_affine_tables(tmp_path: Path) -> None:
    report = tmp_path / "xqa.json"
    command = ["bench", "xqa", *HOST, "--attention", "xqa-fmha", "--batch-sizes", "2", "--output-json", str(report)]
    assert main(command) == 0
    results = json.loads(report.read_text())
    summary = results["summary"]
    assert summary["tokens_identical"] is True
    assert summary["tokens_compared"] > 20
    assert summary["tables_tokens_identical"] is True
    assert results["results"]["by_table"]["tokens"] == summary["tokens_compared"]
    assert summary["replays"] == 40
    assert summary["remaps"] > 0
    assert (summary["graphs_captured"], summary["wrong_replays"], summary["replays_of_other_bits"]) == (1, 0, 0)
    assert 0 < summary["table_host_us"] <= summary["table_host_us_p99"]
    assert summary["table_host_us"] < summary["table_host_changed_us"]
    assert summary["affine_over_random_step_ratio"] > 0
    assert summary["prefill_us_a_layer_xqa"] > 0
    assert summary["prefill_us_a_layer_xqa-fmha"] > 0
    assert [row["table"] for row in results["results"]["steady"]] == ["affine", "random"]


def test_xqa_says_when_tokens_hang_on_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Astray(RandomBlocks):
        """All tables name one block over and over."""

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self._free_blocks[:] = self._free_blocks[:1] * len(self._free_blocks)

    monkeypatch.setattr("trtllm_vattn.bench.cases.xqa.RandomBlocks", Astray)
    report = tmp_path / "xqa.json"
    command = ["bench", "xqa", *HOST, "--batch-sizes", "2", "--output-json", str(report)]
    assert main(command) == 1
    assert json.loads(report.read_text())["summary"]["tables_tokens_identical"] is False
    assert "tokens differ between affine and random tables" in capsys.readouterr().err
