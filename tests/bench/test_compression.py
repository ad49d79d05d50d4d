"""`bench compression` on the host: windows that slide, and eight bits beside sixteen."""

from __future__ import annotations

import json
from pathlib import Path

from trtllm_vattn.cli.main import main


def test_what_less_memory_holds_is_measured(tmp_path: Path) -> None:
    report = tmp_path / "compression.json"
    command = [
        "bench",
        "compression",
        "--device",
        "cpu",
        "--parts",
        "windows,sliding,fp8",
        "--slide",
        "200",
        "--batch",
        "2",
        "--output-json",
        str(report),
    ]
    assert main(command) == 0
    summary = json.loads(report.read_text())["summary"]
    assert summary["window_memory_over_ideal"] <= 1.03
    assert 1 <= summary["window_memory_over_windows"] < 1.5
    assert (summary["window_recaptures"], summary["window_memory_changes"]) == (0, 0)
    assert (summary["slid_tokens"], summary["window_tokens_equal"]) == (200, 1.0)
    assert summary["fp8_sequences_over_bf16"] >= 1.9
    assert 0 < summary["fp8_logits_drift"] < 0.3
    assert summary["fp8_step_over_bf16_2x64"] is None


def test_parts_and_sizes_are_checked() -> None:
    assert main(["bench", "compression", "--device", "cpu", "--parts", "windows", "--window-context", "32"]) == 2
    assert main(["bench", "compression", "--device", "cpu", "--parts", "fp8", "--pages", "4"]) == 2


def test_evicted_bytes_go_back(tmp_path: Path) -> None:
    report = tmp_path / "compression.json"
    command = ["bench", "compression", "--device", "cpu", "--output-json", str(report)]
    command += ["--parts", "returned,scores,latents,eviction", "--evicted-context", "4000"]
    assert main([*command, "--batch", "2"]) == 0
    summary = json.loads(report.read_text())["summary"]
    assert 0.95 <= summary["h2o_returned_over_evicted"] <= 1
    assert 0.9 <= summary["fastgen_returned_over_evicted"] <= 1
    assert summary["row_of_all_heads_returned_over_evicted"] <= 0.1
    assert summary["kept_sets_match_paper"] == 1.0
    assert summary["h2o_scores_torch_ms"] > 0
    assert summary["latents_us_a_layer_4_heads"] > 0
    assert summary["evicted_step_over_whole_2x64"] is None
