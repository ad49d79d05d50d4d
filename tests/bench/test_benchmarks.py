"""The benchmarks on the host, small: that they run, that what they claim is checked, and that a wrong answer shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trtllm_vattn.bench.ledger import LedgerDriver
from trtllm_vattn.bench.twins import Twins
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cli.main import main

HOST = ["--device", "cpu", "--model", "tiny-llama"]
SOAK = ["bench", "soak", *HOST, "--replays", "60", "--repeatable", "10"]


def test_the_soak_remaps_beneath_one_graph_and_catches_its_controls(tmp_path: Path) -> None:
    report, state = tmp_path / "soak.json", tmp_path / "state.json"
    assert main([*SOAK, "--state", str(state), "--output-json", str(report)]) == 0
    summary = json.loads(report.read_text())["summary"]
    assert summary["replays"] >= 60
    assert summary["remaps"] > 60
    assert summary["graphs_captured"] == 1
    assert (summary["mismatches"], summary["left_alone_mismatches"], summary["eager_mismatches"]) == (0, 0, 0)
    assert summary["eager_checks"] >= 1
    assert summary["controls_caught"] == 5
    # It goes on where it stopped, and not with another's.
    assert main([*SOAK, "--replays", "90", "--state", str(state), "--output-json", str(report)]) == 0
    results = json.loads(report.read_text())
    assert len(results["results"]["chunks"]) == 2
    assert 90 <= results["summary"]["replays"] < 130
    assert main([*SOAK, "--seed", "9", "--state", str(state)]) == 2


def test_a_soak_that_gives_other_bits_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace = Twins.replace

    def forgetting(self: Twins) -> None:
        """Other memory, and not the same bytes."""
        replace(self)
        cache = self.subject.cache
        for sequence in self.limits:
            for layer in range(cache.shape.num_layers):
                cache.layer(layer).v[cache.slot_of(sequence), :1] += 1  # type: ignore[union-attr]

    monkeypatch.setattr(Twins, "replace", forgetting)
    monkeypatch.setattr("trtllm_vattn.bench.soak.run_controls", lambda *arguments: {"none": "caught"})
    assert main([*SOAK, "--replays", "300"]) == 1
    assert "mismatches: 0\n" not in capsys.readouterr().out.partition("eager_checks")[0]


def test_multistep_compares_tokens_and_times_launches(tmp_path: Path) -> None:
    report = tmp_path / "multistep.json"
    command = ["bench", "multistep", *HOST, "--batch-sizes", "1,3", "--step-counts", "1,4", "--rounds", "1"]
    assert main([*command, "--steps", "8", "--identity-tokens", "12", "--output-json", str(report)]) == 0
    results = json.loads(report.read_text())
    assert results["summary"]["tokens_identical"] is True
    assert results["summary"]["tokens_compared"] > 20
    assert [(row["batch"], row["steps"], row["loop"]) for row in results["results"]["runs"]] == [
        (batch, *variant) for batch in (1, 3) for variant in ((1, False), (4, False), (4, True))
    ]
    assert {"gain_4_batch1", "gain_loop_batch3"} <= results["summary"].keys()


def test_start_sizes_after_capturing(tmp_path: Path) -> None:
    report = tmp_path / "start.json"
    command = ["bench", "start", *HOST, "--budgets-mib", "4,12,4", "--output-json", str(report)]
    assert main(command) == 0
    results = json.loads(report.read_text())
    summary = results["summary"]
    assert (summary["tokens_unchanged"], summary["recaptures"]) == (True, 0)
    assert summary["cold_first_token_s"] > summary["capture_s"] > 0
    held = [row["held_bytes"] for row in results["results"]["budgets"]]
    assert held[1] > 2 * held[0] > 0
    assert held[2] <= 4 << 20


def test_policies_take_turns(tmp_path: Path) -> None:
    report = tmp_path / "policy.json"
    command = ["bench", "policy", *HOST, "--batch", "3", "--rounds", "1", "--soak-seconds", "0.2"]
    assert main([*command, "--steps", "40", "--output-json", str(report)]) == 0
    results = json.loads(report.read_text())
    rows = {row["policy"]: row for row in results["results"]["runs"]}
    assert list(rows) == ["no mapping", "concurrent", "between-steps", "quiesce"]
    assert rows["no mapping"]["mappings"] == 0
    assert all(row["mappings"] > 0 for name, row in rows.items() if name != "no mapping")
    assert results["summary"]["soak_wrong_words"] == 0


def test_captured_graphs_are_audited(tmp_path: Path) -> None:
    report = tmp_path / "graph.json"
    command = ["bench", "graph", *HOST, "--requests", "3", "--max-seqs", "2", "--caches", "vattn", "--audit"]
    assert main([*command, "--output-json", str(report)]) == 0
    results = json.loads(report.read_text())
    assert (results["summary"]["audited_graphs"], results["summary"]["audit_findings"]) == (1, 0)
    assert results["results"]["trace"]["runs"][-1]["audit"]["addresses"]["reservation"] > 0


def test_fragmentation_is_counted_by_the_caches_own_books(tmp_path: Path) -> None:
    report = tmp_path / "fragmentation.json"
    command = ["bench", "fragmentation", "--requests", "60", "--max-seqs", "32", "--budget-gib", "8"]
    assert main([*command, "--max-output", "64", "--output-json", str(report)]) == 0
    results = json.loads(report.read_text())["results"]["runs"]
    rows = {row["system"]: row for row in results if row["mix"] == "generated"}
    assert rows["token"]["waste"] == 0
    assert rows["paged"]["waste"] < rows["paged-64"]["waste"] < rows["contiguous"]["waste"]
    assert 0 < rows["vattn"]["waste"] < rows["published"]["waste"] < rows["contiguous"]["waste"]
    assert rows["vattn"]["mean_sequences"] > rows["published"]["mean_sequences"] > rows["contiguous"]["mean_sequences"]
    assert rows["vattn, no lookahead"]["waste"] <= rows["vattn"]["waste"]
    # Every request of every system had all its tokens.
    assert {row["steps"] for row in results} != {0}


def test_the_ledger_counts_what_is_not_given_back() -> None:
    driver = LedgerDriver()
    shape = CacheShape(2, 1, 64, torch.bfloat16, 4, 4096)
    with KVCacheManager(shape, driver, 64 << 20) as cache:
        cache.admit("a", 4000)
        assert sum(driver.handles.values()) == cache.stats().held_bytes
        cache.check_integrity()
    assert driver.handles == {}


def test_xqa_over_affine_tables(tmp_path: Path) -> None:
    report = tmp_path / "xqa.json"
    assert main(["bench", "xqa", *HOST, "--batch-sizes", "2", "--output-json", str(report)]) == 0
    results = json.loads(report.read_text())
    summary = results["summary"]
    assert summary["tokens_identical"] is True
    assert summary["tokens_compared"] > 20
    assert summary["replays"] == 40
    assert summary["remaps"] > 0
    assert (summary["graphs_captured"], summary["wrong_replays"], summary["replays_of_other_bits"]) == (1, 0, 0)
    assert 0 < summary["table_host_us"] <= summary["table_host_us_p99"]
    assert summary["table_host_us"] < summary["table_host_changed_us"]
    assert summary["affine_over_random_step_ratio"] > 0
    assert [row["table"] for row in results["results"]["steady"]] == ["affine", "random"]
