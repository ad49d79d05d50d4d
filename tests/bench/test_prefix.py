"""`bench prefix`: its requests share what they say, its ideal tree is one, and its result can be drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from trtllm_vattn.bench.cases import prefix
from trtllm_vattn.bench.harness.ideal_tree import IdealTree
from trtllm_vattn.bench.harness.retained_pages import RetainedPages
from trtllm_vattn.bench.harness.traces import Request, agent_turns, from_trace
from trtllm_vattn.cli.main import main
from trtllm_vattn.errors import ConfigError, KVCacheOutOfMemory


def shared(one: np.ndarray, other: np.ndarray) -> int:
    size = min(len(one), len(other))
    unlike = one[:size] != other[:size]
    return int(unlike.argmax()) if unlike.any() else size


def test_a_traces_prompts_share_their_hashed_blocks_and_nothing_else() -> None:
    requests = [Request(0, 1200, 8, (1, 2, 3)), Request(1, 1200, 8, (1, 2, 4)), Request(2, 1000, 8, (1, 2))]
    first, second, third = from_trace(requests, 8)
    assert [len(each.prompt) for each in (first, second, third)] == [150, 150, 125]
    assert shared(first.prompt, second.prompt) == 128
    assert shared(first.prompt, third.prompt) == 125
    everything = np.concatenate([first.output, second.output, third.output, np.unique(first.prompt)])
    assert len(np.unique(everything)) == len(everything)


def test_tokens_that_no_hash_covers_are_a_requests_own() -> None:
    one, other = from_trace([Request(0, 800, 8, (1,)), Request(1, 800, 8, (1,))])
    assert shared(one.prompt, other.prompt) == 512
    assert len(one.prompt) == 800


def test_a_trace_without_hashes_and_odd_divisors_are_refused() -> None:
    with pytest.raises(ConfigError, match="no block hashes"):
        from_trace([Request(0, 10, 1)])
    with pytest.raises(ConfigError, match="divide_by"):
        from_trace([Request(0, 10, 1, (1,))], 3)


def test_an_agents_next_turn_begins_with_an_earlier_one_that_has_ended() -> None:
    made = agent_turns(120, 3, at_once=4, mean_turns=6, system_tokens=64)
    whole = [np.concatenate([each.prompt, each.output]) for each in made]
    best = [
        max((shared(each.prompt, earlier) for earlier in whole[: max(0, number - 3)]), default=0)
        for number, each in enumerate(made)
    ]
    grown = [size for size in best if size > 64]
    assert len(grown) > 60
    # Nobody begins with the output of a request that still runs.
    for number, each in enumerate(made):
        for running in range(max(0, number - 3), number):
            assert shared(each.prompt, whole[running]) <= len(made[running].prompt)
    again = agent_turns(120, 3, at_once=4, mean_turns=6, system_tokens=64)
    assert all(np.array_equal(a.prompt, b.prompt) for a, b in zip(made, again, strict=True))


def test_too_few_sessions_are_refused() -> None:
    with pytest.raises(ConfigError, match="sessions"):
        agent_turns(10, 0, at_once=8, sessions=8)


def test_the_ideal_tree_evicts_the_least_recently_used_end() -> None:
    tree = IdealTree(tokens=12, block_size=4)
    a, b, none = np.arange(8), np.arange(100, 104), np.arange(0)
    hits, running = tree.admit(a, none)
    assert hits == 0
    tree.finish(running)
    tree.finish(tree.admit(b, none)[1])
    # The end of `a` is the oldest.
    tree.finish(tree.admit(np.arange(200, 204), none)[1])
    hits, running = tree.admit(np.append(a, 9), none)
    assert hits == 4
    tree.finish(running)


def test_the_ideal_tree_keeps_what_runs_and_leaves_a_token_to_compute() -> None:
    tree = IdealTree(tokens=4, block_size=4)
    first = tree.admit(np.arange(4), np.arange(50, 54))
    assert tree.admit(np.arange(4), np.arange(0))[0] == 3
    assert first[0] == 0


def test_counted_pages_refuse_what_does_not_fit() -> None:
    pages = RetainedPages(8 * 1000, 1000, 1, 4, 2)
    pages.admit("a", 8)
    with pytest.raises(KVCacheOutOfMemory):
        pages.admit("b", 1)
    with pytest.raises(ConfigError, match="budget"):
        RetainedPages(100, 1000, 1, 4, 2)
    with pytest.raises(ConfigError, match="asked for"):
        pages.admit("c", 20, prefix=(0, 9))
    pages.check()


def test_the_benchmark_compares_with_the_ideal_tree(tmp_path: Path) -> None:
    report, plot = tmp_path / "prefix.json", tmp_path / "prefix.png"
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": n, "input_length": 1600, "output_length": 40, "hash_ids": [n % 3, 100 + n % 5, 200 + n, 300 + n]}
        for n in range(30)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    command = ["bench", "prefix", "--trace", str(trace), "--requests", "30", "--divide-by", "1", "--max-seqs", "4"]
    assert main([*command, "--budget", "5GiB", "--output-json", str(report), "--plot", str(plot)]) == 0
    result = json.loads(report.read_text())
    runs = result["results"]["runs"]
    assert {run["workload"] for run in runs} == {"trace", "agents"}
    assert {run["variant"] for run in runs} == {"hybrid", "no table", "copy", "adopt"}
    assert all(0 < run["hits_over_simulated"] < 1.2 for run in runs)
    assert result["summary"]["hits_over_simulated"] >= 0.9
    assert result["summary"]["hits_over_simulated"] == min(
        result["summary"][f"hits_over_simulated_{name}"] for name in ("trace", "agents")
    )
    ways = {row["mapped_way"] for curve in result["results"]["crossover"] for row in curve["points"]}
    assert ways == {"alias", "copy"}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_requests_wait_where_memory_is_short_and_one_that_never_fits_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["bench", "prefix", "--requests", "12", "--segments", "2", "--largest-extent", "4MiB"]
    assert main([*command, "--budget", "2GiB"]) == 0
    assert main([*command, "--budget", "64MiB"]) != 0
    assert "pages wanted" in capsys.readouterr().err


def test_extents_below_a_page_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "prefix", "--requests", "2", "--largest-extent", "1MiB"]) != 0
    assert "--largest-extent" in capsys.readouterr().err


def test_ascending_extents_are_no_larger_than_what_lies_before_them() -> None:
    pages = RetainedPages(64 * 1000, 1000, 1, 1, 8, ascending=True)
    pages.admit("a", 30)
    assert [pages.whole_extents(0, tokens)[0] for tokens in (1, 2, 3, 4, 7, 8, 16, 29)] == [1, 2, 2, 4, 4, 8, 16, 28]
    assert pages.whole_extents(0, 30) == (30, pages.handles_for(30))
    pages.check()


def test_requests_that_share_nothing_are_measured_with_and_without_reuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(prefix.ENGINE, "host", {**prefix.ENGINE["host"], "max_seqs": 2, "steps": 6})
    report, plot = tmp_path / "prefix.json", tmp_path / "ways.png"
    command = ["bench", "prefix", "--device", "cpu", "--parts", "alone,unlike", "--engine-requests", "8"]
    assert main([*command, "--output-json", str(report), "--plot", str(plot)]) == 0
    found = json.loads(report.read_text())
    engines = {row["engine"]: row for row in found["results"]["engines"]}
    assert engines["reuse"]["cached_tokens"] == engines["block tables"]["cached_tokens"] == 0
    assert engines["no reuse"]["hit_rate"] == 0
    ways = found["results"]["ways"]
    assert {row["way"] for row in ways} == {"alias", "copy", "reach", "recompute"}
    assert sum(row["chosen"] for row in ways) == len({row["tokens"] for row in ways})
    assert found["summary"]["driver_calls_per_steady_step"] == 0
    wanted = {"throughput_over_no_reuse_unlike", "ttft_hit_over_step", "chosen_way_over_cheapest"}
    assert wanted <= set(found["summary"])
    assert plot.stat().st_size > 1000


def test_samples_of_one_prompt_are_measured_beside_one(tmp_path: Path) -> None:
    report = tmp_path / "forks.json"
    command = ["bench", "forks", "--device", "cpu", "--model", "tiny-llama", "--samples", "4", "--prompt", "600"]
    assert main([*command, "--rounds", "1", "--output-json", str(report)]) == 0
    summary = json.loads(report.read_text())["summary"]
    # 4 tokens a page, and each sample has a page that it begins in.
    assert 1 < summary["memory_n16_over_one_with_tokens"] < 1.4
    assert summary["memory_n16_over_one"] < 1.05
    assert summary["step_n16_over_one"] > 1
    assert main([*command, "--output-tokens", "8"]) == 2


def test_one_result_has_hits_and_what_an_engine_makes_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prefix.ENGINE, "host", {**prefix.ENGINE["host"], "max_seqs": 2, "max_seq_len": 256, "steps": 4})
    report = tmp_path / "prefix.json"
    command = ["bench", "prefix", "--device", "cpu", "--parts", "engine,hits", "--requests", "40"]
    assert main([*command, "--engine-requests", "4", "--output-json", str(report)]) == 0
    found = json.loads(report.read_text())
    summary, engines = found["summary"], {row["engine"]: row for row in found["results"]["engines"]}
    assert engines["reuse"]["cached_tokens"] > 0
    assert engines["block tables"]["cached_tokens"] > 0
    wanted = {"hits_over_simulated", "driver_calls_per_steady_step", "ttft_hit_over_step"}
    parts = {"hit_mapping_ms", "hit_pass_ms", "hit_host_ms"}
    assert sum(summary[part] for part in parts) == pytest.approx(summary["ttft_hit_ms"], rel=0.5)
    assert summary["ttft_hit_less_mapping_over_step"] < summary["ttft_hit_over_step"]
    assert {"ttft_hit_8_tokens_ms", "ttft_hit_16_tokens_ms"} <= summary.keys()
    assert wanted | {"throughput_over_no_reuse", "throughput_over_block_tables"} <= summary.keys()
