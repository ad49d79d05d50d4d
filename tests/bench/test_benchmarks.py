"""The benchmarks on the host, small: that they run, that what they claim is checked, and that a wrong answer shows."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections import Counter
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from trtllm_vattn.bench.cases import startup
from trtllm_vattn.bench.cases.ledger import LedgerDriver
from trtllm_vattn.bench.cases.serve import compared, densest
from trtllm_vattn.bench.harness.timing import Clock, Timer
from trtllm_vattn.bench.harness.traces import Request
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cli.main import main
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.graphs.replay import GraphRunner
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.verify.fault_injection import FaultStress

HOST = ["--device", "cpu", "--model", "tiny-llama"]


def test_multistep_compares_tokens_and_times_launches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "multistep.json"
    command = ["bench", "multistep", *HOST, "--batch-sizes", "1,3", "--step-counts", "1,4", "--rounds", "2"]
    command += ["--context", "60"]
    assert main([*command, "--steps", "8", "--identity-tokens", "12", "--output-json", str(report)]) == 0
    results = json.loads(report.read_text())
    rows, summary = results["results"]["runs"], results["summary"]
    assert summary["tokens_identical"] is True
    assert summary["tokens_compared"] > 20
    assert (summary["identity_attention"], summary["identity_batches"]) == ("torch", "1, 3")
    assert {row["attention"] for row in results["results"]["identity"]} == {"torch"}
    assert [(row["batch"], row["steps"], row["loop"]) for row in rows] == [
        (batch, *variant) for batch in (1, 3) for variant in ((1, False), (4, False), (4, True))
    ]
    assert {"gain_4_batch1", "gain_loop_batch3"} <= summary.keys()
    # A start may take long, too.
    assert "batch 3: start the engine of a loop a launch" in (err := capsys.readouterr().err)
    assert "tokens of 3 sequences by 3 ways to launch" in err
    for name in ("1", "4", "loop"):
        assert 0 < summary[f"host_us_{name}_batch1"] < 1e6
    # Steps are timed at the length that they are said to be of; loops may end earlier, and be followed by more.
    assert all(abs(row["mean_length"] - 60) <= 2 * row["steps"] for row in rows)
    assert summary["context"] == 60
    assert 52 <= summary["mean_length_least"] <= summary["mean_length_most"] <= 68
    assert main([*command, "--steps", "60"]) == 2
    assert "--context is 60, but 72 tokens are decoded before" in capsys.readouterr().err


def test_graph_times_steps_on_a_gpu_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "graph", *HOST, "--batch-sizes", "1"]) == 2
    assert "--batch-sizes times steps on a GPU and the device is the CPU" in capsys.readouterr().err


@pytest.mark.usefixtures("forked_python")
def test_start_sizes_after_capturing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.CompletedProcess[str]] = []
    folders = []
    run = subprocess.run

    def once(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """The real start, but with Python's own bytecode, for to compile that of all libraries takes half a minute; and
        its answer again."""
        if "PYTHONPYCACHEPREFIX" not in (options.get("env") or {}):
            return run(command, **options)
        folders.append(options["env"].pop("PYTHONPYCACHEPREFIX"))
        if not started:
            started.append(run(command, **options))
        return started[0]

    monkeypatch.setattr("trtllm_vattn.bench.harness.case.subprocess.run", once)
    report = tmp_path / "start.json"
    command = ["bench", "start", *HOST, "--budgets", "4MiB,12MiB,4MiB", "--output-json", str(report)]
    assert main(command) == 0
    results = json.loads(report.read_text())
    summary = results["summary"]
    assert (summary["tokens_unchanged"], summary["recaptures"]) == (True, 0)
    assert summary["cold_first_token_s"] > summary["capture_s"] > 0
    # All of a start is in some phase, but for what closes it.
    took = {row["start"]: row["first_token_s"] for row in results["results"]["starts"]}
    phases = [row for row in results["results"]["phases"] if row["start"] == "cold"]
    assert 0.9 * took["cold"] < sum(row["seconds"] for row in phases) <= took["cold"] + 0.01
    assert {row["phase"] for row in phases} > {"import", "load the model", "compile layers", "first token"}
    captures = [row for row in results["results"]["captures"] if row["start"] == "cold"]
    assert sum(row["seconds"] for row in captures) == pytest.approx(summary["capture_s"])
    held = [row["held_bytes"] for row in results["results"]["budgets"]]
    assert held[1] > 2 * held[0] > 0
    assert held[2] <= 4 << 20
    # The second start finds what the first one left.
    assert len(folders) == 2
    assert folders[0] == folders[1]


def test_a_warm_start_finds_what_is_kept_and_one_before_it_is_not_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[str] = []

    def started(args: Any, kept: str) -> dict[str, Any]:
        folders.append(kept)
        figures = {"first_token_s": 50.0 / len(folders), "capture_s": 2.0, "capture_bytes": 1}
        return {**figures, "phases": {}, "captured": {}}

    monkeypatch.setattr(startup, "_started", started)
    report = tmp_path / "start.json"
    command = ["bench", "start", *HOST, "--parts", "warm", "--kept", str(tmp_path), "--output-json", str(report)]
    assert main(command) == 0
    found = json.loads(report.read_text())
    assert folders == [str(tmp_path)] * 2
    assert (found["summary"]["unquoted_first_token_s"], found["summary"]["warm_first_token_s"]) == (50.0, 25.0)
    assert "cold_first_token_s" not in found["summary"]


def test_policies_take_turns(tmp_path: Path) -> None:
    report = tmp_path / "policy.json"
    command = ["bench", "policy", *HOST, "--batch-size", "3", "--rounds", "1", "--soak-seconds", "0.2"]
    assert main([*command, "--steps", "40", "--output-json", str(report)]) == 0
    results = json.loads(report.read_text())
    rows = {row["policy"]: row for row in results["results"]["runs"]}
    assert list(rows) == ["no mapping", "concurrent, 10x churn", "concurrent", "between-steps", "quiesce"]
    assert rows["concurrent, 10x churn"]["mappings"] > 5 * rows["concurrent"]["mappings"]
    assert rows["no mapping"]["mappings"] == 0
    assert all(row["mappings"] > 0 for name, row in rows.items() if name != "no mapping")
    assert results["summary"]["soak_wrong_words"] == 0


def test_captured_graphs_are_audited(tmp_path: Path) -> None:
    report = tmp_path / "graph.json"
    command = ["bench", "graph", *HOST, "--requests", "3", "--max-seqs", "2", "--caches", "vattn", "--audit"]
    assert main([*command, "--output-json", str(report)]) == 0
    results = json.loads(report.read_text())
    audits = [results["results"]["trace"]["runs"][-1]["audit"], *results["results"]["audited_launches"]]
    assert all(audit["addresses"]["reservation"] > 0 for audit in audits)
    prompts = [f"prompt of {size}" for size in (16, 32, 64, 128, 256, 512)]
    assert audits[0]["graphs"] == ["decode step of 1", "decode step of 2", *prompts]
    # On the host nothing is composed: a launch of many steps is as many replays.
    for audit in audits[1:]:
        assert audit["graphs"] == ["decode step of 2", "sampling step of 2", *prompts[:5]]
    assert results["summary"]["audited_graphs"] == sum(len(audit["graphs"]) for audit in audits)
    assert results["summary"]["audit_findings"] == 0


def test_a_strangers_address_in_any_captured_graph_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    audit = GraphRunner.audit

    def without_static(self: GraphRunner, regions: Any, what: str = "step", bucket: int | None = None) -> Any:
        """As though nobody had declared what drawing tokens needs."""
        declared = self.static
        if what == "sampling step":
            self.static = []
        try:
            return audit(self, regions, what, bucket)
        finally:
            self.static = declared

    monkeypatch.setattr(GraphRunner, "audit", without_static)
    command = ["bench", "graph", *HOST, "--requests", "2", "--max-seqs", "2", "--caches", "vattn", "--audit"]
    assert main(command) == 1
    assert "captured graphs hold" in capsys.readouterr().err


def test_fragmentation_is_counted_by_the_caches_own_books(tmp_path: Path) -> None:
    report = tmp_path / "fragmentation.json"
    command = ["bench", "fragmentation", "--requests", "40", "--max-seqs", "32", "--budget", "2GiB"]
    plot = tmp_path / "fragmentation.png"
    assert main([*command, "--max-output", "64", "--output-json", str(report), "--plot", str(plot)]) == 0
    assert plot.stat().st_size > 10_000
    results = json.loads(report.read_text())["results"]["runs"]
    # What a sequence found parked is given back beside the next steps.
    bimodal = {row["system"]: row for row in results if row["mix"] == "bimodal"}
    assert bimodal["vattn"]["waste_with_surplus"] <= bimodal["vattn"]["waste"] + 0.01
    assert bimodal["vattn, 8 layers a row"]["waste_with_surplus"] > bimodal["vattn"]["waste_with_surplus"]
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


def run_small(tmp_path: Path, *command: str) -> dict[str, Any]:
    report = tmp_path / "report.json"
    assert main(["bench", *command, "--output-json", str(report)]) == 0
    loaded: dict[str, Any] = json.loads(report.read_text())
    assert loaded["command"]
    assert loaded["commit"]
    return loaded


def test_a_burst_is_mapped_by_few_calls_and_from_stock(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    times = [(0, 9), (30, 70), (30.25, 40), (30.5, 20), (90, 8)]
    rows = "".join(f"2023-11-16 18:{at // 60:02.0f}:{at % 60:09.6f}0,{tokens},5\n" for at, tokens in times)
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    command = ["burst", *HOST, "--rounds", "1", "--steps", "4", "--prompts", "3", "--steady-steps", "12"]
    report = run_small(tmp_path, *command, "--plot", str(tmp_path / "burst.png"), "--trace", str(trace))
    assert (tmp_path / "burst.png").stat().st_size > 10_000
    rows = {row["variant"]: row for row in report["results"]["bursts"]}
    assert rows["vattn, warm stock"]["driver_calls"]["create"] == 0 < rows["vattn, cold"]["driver_calls"]["create"]
    assert rows["published"]["mappings"] > 8 * rows["vattn, cold"]["mappings"]
    # The thread makes no call meanwhile.
    calls = rows["page by page"]["driver_calls"]
    assert calls["set_access"] == calls["map"] == rows["page by page"]["mappings"]
    # One maps nothing and shows what prompts alone do to steps; a trace's prompts are too uneven for it.
    still = rows["contiguous"]
    assert still["mappings"] == still["map_ms"] == 0
    assert len(still["steps"]["during"]) == len(rows["vattn, cold"]["steps"]["during"])
    during = [rows[name]["step_ms"]["during"]["p99"] for name in ("vattn, warm stock", "contiguous")]
    assert report["summary"]["during_p99_over_contiguous"] == during[0] / during[1]
    assert report["summary"]["p99_ratio_contiguous"] > 0
    assert [len(rows["vattn, cold"]["steps"][phase]) for phase in ("before", "during", "after")] >= [4, 3, 4]
    summary = report["summary"]
    assert summary["critical_path_maps_steady"] == 0
    assert report["results"]["steady"]["steps"] >= 12
    assert summary["window_ms"] == rows["vattn, warm stock"]["window_ms"] >= summary["burst_map_ms"] > 0
    assert summary["guard_us_p99"] > 0
    assert summary["prepare_step_critical_path_maps"] == report["results"]["books"]["critical_path_maps"]
    # The trace's densest three, with their own lengths.
    assert report["results"]["trace_prompts"] == {"span_s": 0.5, "tokens": [70, 40, 20]}
    theirs = {row["variant"]: row for row in report["results"]["trace_bursts"]}
    assert theirs["vattn, warm stock"]["driver_calls"]["create"] == 0 < theirs["vattn, cold"]["driver_calls"]["create"]
    assert "contiguous" not in theirs
    assert summary["trace_burst_map_ms"] > 0 < summary["trace_window_ms"]


def test_steady_decode_alone(tmp_path: Path) -> None:
    report = run_small(tmp_path, "burst", *HOST, "--rounds", "0", "--steady-steps", "12")
    assert "bursts" not in report["results"]
    assert report["summary"]["critical_path_maps_steady"] == 0
    assert report["summary"]["steady_steps"] >= 12
    assert "p99_ratio" not in report["summary"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_a_call_is_timed_without_what_was_submitted_before_it(device: str) -> None:
    timer = Timer(torch.device(device))
    x = torch.ones(*(2 * [2048 if device != "cpu" else 768]), device=device)
    work = timer.timed(lambda times: [x @ x for _ in range(times)])
    work(1)
    assert len(timer.take()) == 1
    for _ in range(20):
        x @ x
    assert len(work(2)) == 2
    work(20)
    few, many = timer.take()
    assert 0 < few < many / 3
    assert timer.take() == []


def test_on_the_host_no_clock_is_looked_at() -> None:
    clock = Clock(torch.device("cpu"))
    assert clock.before(len)([1, 2]) == 2
    assert clock.take() == []


@pytest.mark.gpu
def test_a_gpus_clock_is_looked_at_before_each_call() -> None:
    clock = Clock(torch.device("cuda:0"))
    behind = clock.before(lambda times: [torch.cuda._sleep(1000) for _ in range(times)])
    for _ in range(20):
        behind(3)
    seen = clock.take()
    assert len(seen) == 20
    # Slower than the fastest that a GPU is sold with, and faster than any that is at work, but where another process
    # had the device in between.
    assert 200 < max(seen) < 3500
    assert clock.take() == []


def test_a_plot_of_no_bursts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "burst", *HOST, "--rounds", "0", "--plot", str(tmp_path / "none.png")]) == 2
    assert "--rounds is 0" in capsys.readouterr().err


def test_driver_calls_are_timed(tmp_path: Path) -> None:
    report = run_small(tmp_path, "alloc", "--device", "cpu", "--repeats", "5", "--plot", str(tmp_path / "alloc.png"))
    calls = report["results"]["calls"]
    assert {row["call"] for row in calls} == {"create", "map", "set_access", "unmap", "release"}
    assert {(row["how"], row["busy"]) for row in calls} == {(h, b) for h in ("one by one", "batched") for b in (0, 1)}
    assert all(0 < row["us"]["p50"] <= row["us"]["p99"] for row in calls)
    threads = report["results"]["threads"]
    pages = [1, 2, 8, 32, 128]
    assert [(row["threads"], row["size"] // 4096) for row in threads] == [
        (n, size) for n in (1, 2, 4) for size in pages
    ]
    for row in threads:
        # Whole lives of extents, each call of every thread timed.
        assert {call: us["count"] for call, us in row["us"].items()} == dict.fromkeys(row["us"], 5 * row["threads"])
        assert set(row["us"]) == {"create", "map", "set_access", "unmap", "release"}
        assert 0 < row["lives_per_s"] < 1e6
    assert report["summary"]["create_us_4_threads"] > 0


def test_attention_is_timed_over_flat_kv_and_block_tables(tmp_path: Path) -> None:
    command = ["attention", "--device", "cpu", "--repeats", "2", "--points", "2x40", "--uneven", "10"]
    report = run_small(tmp_path, *command, "--blocks", "1,16", "--plot", str(tmp_path / "attention.png"))
    points = report["results"]["points"]
    assert {(row["point"], row["system"]) for row in points} == {
        (point, system) for point in ("2 x 40", "10 uneven") for system in ("flat", "blocks of 1", "blocks of 16")
    }
    assert not [row for row in points if "refused" in row]
    assert {row["layer_bytes"] for row in points if row["point"] == "2 x 40"} == {2 * 40 * 2 * 2 * 16 * 4}
    assert len(report["results"]["same_kernels"]) == 1
    step = {row["attention"]: row for row in report["results"]["step"]}
    assert {row["sequences"] for row in step.values()} == {10}
    assert min(row["tokens"] for row in step.values()) > 9 * 5 + 200
    assert report["summary"]["uneven_10_step_over_torch"] > 0


def test_attentions_parts_are_chosen_and_kept_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["attention", "--device", "cpu", "--repeats", "1", "--heads", "4,2,16", "--parts", "prompts,decode"]
    report = run_small(tmp_path, *command)
    assert list(report["results"]["part_seconds"]) == ["prompts", "decode"]
    assert "prompts is measured" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", *command[:-1], "speed"])
    assert "no part 'speed'" in capsys.readouterr().err


def test_rounds_of_serving_are_compared_pair_by_pair() -> None:
    rates = {"vattn": [30.0, 10.0], "paged": [20.0, 10.0]}
    runs = [{"cache": c, "round": n, "output_throughput": r} for c, each in rates.items() for n, r in enumerate(each)]
    assert compared(runs[::-1]) == {
        "vattn_output_throughput": 20.0,
        "vattn_output_throughput_spread": [10.0, 30.0],
        "paged_output_throughput": 15.0,
        "paged_output_throughput_spread": [10.0, 20.0],
        "vattn_over_paged": 1.25,
        "vattn_over_paged_spread": [1.0, 1.5],
    }
    assert list(compared(runs[2:])) == ["paged_output_throughput", "paged_output_throughput_spread"]


def test_a_trace_is_served_by_every_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = []
    made = Engine.__init__

    def watched(self: Engine, *arguments: Any, **options: Any) -> None:
        chunks.append(options["chunk"])
        made(self, *arguments, **options)

    monkeypatch.setattr(Engine, "__init__", watched)
    command = [
        "serve",
        *HOST,
        "--requests",
        "6",
        "--rounds",
        "1",
        "--at-once",
        "--budget",
        "1MiB",
        "--chunk",
        "32",
    ]
    report = run_small(tmp_path, *command, "--caches", "contiguous,token,vattn")
    assert chunks == [32, 32, 32]
    rows = {row["cache"]: row for row in report["results"]["runs"]}
    assert list(rows) == ["contiguous", "token", "vattn"]
    assert rows["contiguous"]["slots"] < rows["vattn"]["slots"] == 6
    for row in rows.values():
        assert row["ttft_ms"]["count"] == 6
        assert row["output_throughput"] < row["total_token_throughput"]
    assert report["summary"]["vattn_over_token"] > 0


def test_any_benchmark_runs_on_tensorrt_llms_kernels(tmp_path: Path) -> None:
    command = ["serve", *HOST, "--requests", "4", "--rounds", "1", "--at-once", "--max-seq-len", "128"]
    report = run_small(tmp_path, *command, "--caches", "paged,blocks,vattn", "--attention", "xqa")
    assert [row["cache"] for row in report["results"]["runs"]] == ["paged", "blocks", "vattn"]
    assert report["config"]["attention"] == "xqa"


def test_the_densest_arrivals_are_found() -> None:
    requests = [Request(at, 1, 1) for at in (0.0, 5.0, 6.0, 6.5, 20.0)]
    assert densest(requests, 3) == 1
    with pytest.raises(ConfigError, match="the trace has 5 requests, 6 asked for"):
        densest(requests, 6)


def test_a_life_among_failures_ends_clean_and_a_wrong_byte_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Among them lives in which taking back failed too, while memory was being replaced.
    for seed in range(16):
        FaultStress(seed, 0.02, Counter()).run(400)
    report = run_small(tmp_path, "faults", "--operations", "600", "--life", "200")
    assert report["summary"]["operations"] == 600
    assert report["summary"]["driver_calls_failed"] > 0
    assert report["summary"]["wrong_bytes_or_leaks"] == report["summary"]["hangs"] == 0
    assert report["summary"]["sequences_lost"] == report["results"]["counts"].get("lost", 0)
    written = FaultStress.write

    def forgetful(self: FaultStress, sequence: int, tokens: range) -> None:
        written(self, sequence, tokens)
        self.views[0][self.cache.slot_of(sequence), tokens.start] += 1

    monkeypatch.setattr(FaultStress, "write", forgetful)
    assert main(["bench", "faults", "--operations", "50"]) == 1
    assert "holds bytes that were not written there" in capsys.readouterr().out


def test_a_life_that_hangs_is_told_by_its_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go_on = Event()
    truncate = FaultStress.truncate

    def hanging(self: FaultStress) -> None:
        go_on.wait(60)
        truncate(self)

    hanging.__name__ = "truncate"
    monkeypatch.setattr(FaultStress, "truncate", hanging)
    report = tmp_path / "faults.json"
    command = ["bench", "faults", "--operations", "100", "--life-seconds", "1", "--output-json", str(report)]
    assert main(command) == 1
    assert re.search(
        r"life 0: operation \d+, truncate, is not over 1 s after the cache was made", capsys.readouterr().out
    )
    assert json.loads(report.read_text())["summary"]["hangs"] == 1
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "vattn-fault-stress":
            thread.join(60)
