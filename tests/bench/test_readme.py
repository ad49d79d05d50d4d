from __future__ import annotations

from pathlib import Path

import pytest

from trtllm_vattn.bench.readme import render
from trtllm_vattn.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "results" / "h200"


def test_the_readmes_tables_are_those_of_the_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- table:") == 19
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
