from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from trtllm_vattn.bench.cases.prefix import ENGINE
from trtllm_vattn.bench.harness.report import load, result_of, write
from trtllm_vattn.bench.harness.timing import summarise
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.machine import commit, gpu, machine, versions
from trtllm_vattn.runtime.models import SHAPES
from trtllm_vattn.table import table, tabulate


def test_a_result_carries_what_is_needed_to_repeat_it(tmp_path: Path) -> None:
    result = result_of("graph", argparse.Namespace(model="x", seed=7), {}, {"ratio": 1.5})
    write(result, tmp_path / "deep" / "result.json")
    loaded = load(tmp_path / "deep" / "result.json")
    assert loaded == json.loads(json.dumps(result))
    assert loaded["seed"] == 7
    assert loaded["versions"]["torch"] == versions()["torch"] != "not installed"
    assert loaded["machine"]["cpus"] >= 1
    assert loaded["command"].startswith("trtllm-vattn")
    assert loaded["commit"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["result.json"]


def test_a_result_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the result .*none.json"):
        load(tmp_path / "none.json")


def test_samples_are_summed_up() -> None:
    assert abs(summarise([float(n) for n in range(1001)])["p99.9"] - 999) < 1e-9
    found = summarise([float(n) for n in range(101)])
    assert (found["count"], found["mean"], found["p50"], found["p90"], found["p99"]) == (101, 50, 50, 90, 99)
    assert (found["min"], found["max"]) == (0, 100)
    assert summarise([]) == {"count": 0}


def test_a_table_is_aligned_text_and_markdown() -> None:
    text = table(["name", "ms"], [["a", "1.50"], ["longer", "12.25"]])
    assert text.splitlines() == [
        "| name   |    ms |",
        "| ------ | ----: |",
        "| a      |  1.50 |",
        "| longer | 12.25 |",
    ]


def test_a_table_of_records_takes_paths_formats_and_functions() -> None:
    rows = [{"name": "a", "us": {"p50": 1.256}, "device": None}, {"name": "b", "us": {"p50": 3.0}, "device": 2}]
    columns = {"name": "name", "us": "us.p50:.2f", "device": "device", "both": lambda row: row["name"] * 2}
    assert tabulate(rows, columns).splitlines()[2:] == [
        "| a    | 1.26 | -      | aa   |",
        "| b    | 3.00 | 2      | bb   |",
    ]
    assert tabulate(rows, "name us.p50 device us.p99").splitlines() == [
        "| name | us.p50 | device | us.p99 |",
        "| ---- | -----: | ------ | ------ |",
        "| a    |  1.256 | -      | -      |",
        "| b    |      3 | 2      | -      |",
    ]
    row = {"us": {"p99.9": 12_345.6}, "same": True, "count": 9000}
    assert tabulate([row], "us.p99.9 same count").splitlines()[2] == "|   12,346 | yes  | 9,000 |"


def test_the_commit_is_unknown_outside_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    assert commit()
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    monkeypatch.delenv("VATTN_COMMIT", raising=False)
    assert commit() == "unknown"
    monkeypatch.setenv("VATTN_COMMIT", "abc")
    assert commit() == "abc"


def test_a_machine_without_a_gpu_says_none() -> None:
    assert gpu(index=99) is None
    assert set(machine()) == {"system", "cpus", "memory_bytes", "gpu"}


@pytest.mark.parametrize(
    ("case", "tokens"),
    [
        ("compression", lambda args: args.context + 128),
        ("doors", lambda args: args.max_seq_len),
        ("prefix", lambda args: ENGINE["gpu"]["max_seq_len"]),
        ("forks", lambda args: args.prompt + args.output_tokens),
        ("serve", lambda args: args.max_seq_len),
        ("speculation", lambda args: args.context + args.output_tokens),
        ("stall", lambda args: args.prompt_tokens),
        ("tiers", lambda args: max(args.tokens, args.prompt + args.output_tokens)),
    ],
)
def test_what_a_gpu_is_given_by_default_fits_the_models_positions(case: str, tokens: Callable[[Any], int]) -> None:
    """Defaults of a GPU are not what tests run."""
    parser = argparse.ArgumentParser()
    parser.set_defaults(device="cuda:0")
    import_module(f"trtllm_vattn.bench.cases.{case}").add_arguments(parser)
    args = parser.parse_args(["--device", "cpu"])
    shape = SHAPES[args.model]
    assert 0 < tokens(args) <= shape["max_position_embeddings"]
