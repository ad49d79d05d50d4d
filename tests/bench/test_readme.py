from __future__ import annotations

from pathlib import Path

import pytest

from trtllm_vattn.bench.readme import policies, render, serve
from trtllm_vattn.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "results" / "h200"


def test_the_readmes_tables_are_those_of_the_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- table:") == 22
    assert render(text, RESULTS) == text


def test_tables_are_made_anew_and_the_rest_is_left_alone() -> None:
    text = "before\n<!-- table:graph-steady -->\nstale\n<!-- /table -->\nafter\n"
    made = render(text, RESULTS)
    assert "stale" not in made
    assert made.startswith("before\n<!-- table:graph-steady -->\n| mode")
    assert made.endswith("|\n<!-- /table -->\nafter\n")
    assert "| captured |       128 |" in made
    assert render(made, RESULTS) == made


def test_unknown_tables_and_missing_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no table 'nothing'; there are graph-steady"):
        render("<!-- table:nothing -->\n<!-- /table -->", RESULTS)
    with pytest.raises(ConfigError, match="cannot read the result"):
        render("<!-- table:graph-steady -->\n<!-- /table -->", tmp_path)


def test_serving_is_shown_with_its_spread_and_ours_round_by_round() -> None:
    rest = {"total_token_throughput": 100.0, "mean_sequences": 3.0}
    rates = {"paged": [20.0, 10.0], "vattn": [30.0, 10.0]}
    times = [{"p50": 10.0, "p99": 200.0}, {"p50": 30.0, "p99": 100.0}]
    runs = [
        {"cache": c, "round": n, "output_throughput": r, "ttft_ms": times[n], "itl_ms": times[n], **rest}
        for c, each in rates.items()
        for n, r in enumerate(each)
    ]
    lines = serve({"results": {"runs": runs}}).splitlines()
    assert [cell.strip() for cell in lines[3].split("|")][1:3] == ["vattn", "20 (10 to 30)"]
    # Latencies: medians over rounds.
    assert [cell.strip() for cell in lines[3].split("|")][4:6] == ["20 / 150", "20 / 150"]
    assert lines[2].rstrip(" |").endswith("1.25 (1.00 to 1.50)")
    once = serve({"results": {"runs": [row for row in runs if row["round"] == 0]}})
    assert " to " not in once


def test_policies_are_shown_in_milliseconds() -> None:
    runs = [
        {"policy": "no mapping", "step_ms": {"p50": 4.0, "p99": 5.0}, "mappings": 0},
        {"policy": "quiesce", "step_ms": {"p50": 5.0, "p99": 6.0}, "mappings": 7},
    ]
    last = policies({"results": {"runs": runs}}).splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")][1:-1] == ["quiesce", "5.000", "6.000", "1.250", "1.200", "7"]
