from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from trtllm_vattn.bench.publish.readme import caption, main, render
from trtllm_vattn.bench.publish.tables import TABLES, policies, serve
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.machine import card

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "results"
DOCUMENTS = [ROOT / "README.md", RESULTS / "README.md"]


def marked(document: Path) -> list[tuple[str, str]]:
    """The tables of a document: card and name."""
    return re.findall(r"<!-- table:([\w-]+)/([\w-]+) -->", document.read_text())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_documents_tables_are_those_of_the_results(document: Path) -> None:
    text = document.read_text()
    assert text.count("<!-- table:") == text.count("<!-- /table -->") == len(marked(document)) > 0
    assert render(text, RESULTS, document.parent) == text


def test_every_table_is_in_a_document() -> None:
    shown = [name for document in DOCUMENTS for _, name in marked(document)]
    assert set(TABLES) <= set(shown)
    assert marked(DOCUMENTS[0]) == [("h200", "headline")]


def test_every_result_lies_in_the_folder_of_its_card() -> None:
    results = sorted(RESULTS.rglob("*.json"))
    assert len(results) > 25
    for path in results:
        found = json.loads(path.read_text())
        # A calibration names its GPU itself.
        assert card(found.get("machine", found)) == path.parent.name, path


def test_tables_are_made_anew_and_the_rest_is_left_alone() -> None:
    text = "before\n<!-- table:h200/graph-steady -->\nstale\n<!-- /table -->\nafter\n"
    made = render(text, RESULTS, ROOT)
    assert "stale" not in made
    assert made.startswith("before\n<!-- table:h200/graph-steady -->\n| mode")
    assert made.endswith("</sub>\n<!-- /table -->\nafter\n")
    assert "| captured |       128 |" in made
    assert render(made, RESULTS, ROOT) == made


def test_a_table_names_its_card_date_commit_command_and_file() -> None:
    made = render("<!-- table:h200/soak -->\n<!-- /table -->\n", RESULTS, RESULTS)
    found = json.loads((RESULTS / "h200" / "soak.json").read_text())
    last = made.splitlines()[-2]
    assert last.startswith("<sub>NVIDIA H200, driver 580.159.04; ")
    for part in (found["started"][:10], found["commit"], "`trtllm-vattn bench soak`", "[soak.json](h200/soak.json)"):
        assert part in last
    assert "--output-json" not in last


def test_a_caption_of_several_results_lists_them_and_cuts_long_commands() -> None:
    gpu = {"name": "NVIDIA H100 PCIe", "driver": "1"}
    one = {"machine": {"gpu": gpu, "cpus": 1}, "started": "2026-01-02T03", "commit": "abc", "command": "x " + "y" * 400}
    text = caption([one, {**one, "command": "z --plot p.png --rounds 3"}], ["h/a.json", "h/b.json"])
    assert text.startswith("<details><summary><sub>NVIDIA H100 PCIe, driver 1: ")
    assert "\n* 2026-01-02, commit abc, `x yyy" in text
    assert "yyy ...`, [a.json](h/a.json)" in text
    assert "`z --rounds 3`, [b.json](h/b.json)" in text


def test_a_table_of_two_cards_is_refused(tmp_path: Path) -> None:
    shutil.copytree(RESULTS / "h200", tmp_path / "h200", ignore=shutil.ignore_patterns("*.png", "tlb*"))
    text = "<!-- table:h200/headline -->\n<!-- /table -->\n"
    render(text, tmp_path, tmp_path)
    burst = json.loads((tmp_path / "h200" / "burst.json").read_text())

    def put(name: str) -> None:
        burst["machine"]["gpu"]["name"] = name
        (tmp_path / "h200" / "burst.json").write_text(json.dumps(burst))

    put("NVIDIA H100 80GB HBM3")
    with pytest.raises(ConfigError, match=r"burst.json was measured on NVIDIA H100 80GB HBM3, .* folder 'h100'"):
        render(text, tmp_path, tmp_path)
    put("NVIDIA H200 141GB HBM3e")  # the same folder, another card
    with pytest.raises(ConfigError, match="are of several cards: NVIDIA H200, NVIDIA H200 141GB HBM3e"):
        render(text, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
        (None, "host"),
    ],
)
def test_a_card_names_its_folder(name: str | None, folder: str) -> None:
    assert card({"gpu": None if name is None else {"name": name}}) == folder


def test_unknown_tables_and_missing_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no table 'nothing', nor .*nothing.json; there are headline"):
        render("<!-- table:h200/nothing -->\n<!-- /table -->", RESULTS, ROOT)
    with pytest.raises(ConfigError, match="cannot read the result"):
        render("<!-- table:h200/graph-steady -->\n<!-- /table -->", tmp_path, ROOT)


def test_checking_says_what_is_stale_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh, stale = tmp_path / "fresh.md", tmp_path / "stale.md"
    fresh.write_text("none\n")
    stale.write_text("<!-- table:h200/soak -->\n<!-- /table -->\n")
    arguments = ["readme", str(fresh), str(stale), "--results", str(RESULTS)]
    monkeypatch.setattr("sys.argv", [*arguments, "--check"])
    assert main() == 1
    assert "stale.md are not those of" in capsys.readouterr().err
    assert "fresh.md" not in capsys.readouterr().err
    assert stale.read_text().count("\n") == 2
    monkeypatch.setattr("sys.argv", arguments)
    assert main() == 0
    assert "| replays " in stale.read_text()
    monkeypatch.setattr("sys.argv", [*arguments, "--check"])
    assert main() == 0


def headline_cells() -> list[list[str]]:
    lines = render("<!-- table:h200/headline -->\n<!-- /table -->\n", RESULTS, ROOT).splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[3:7]]


def test_the_headline_is_the_results_figures() -> None:
    def result(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((RESULTS / "h200" / f"{name}.json").read_text())
        return found

    step, burst, soak, start = headline_cells()
    runs = {
        (row["cache"], row["batch"]): f"{row['step_ms']['p50']:.2f}"
        for row in result("graph")["results"]["steady"]["runs"]
        if row["mode"] == "captured"
    }
    for cell, cache in ((step[1], "vattn"), (step[2], "contiguous"), (step[2], "paged")):
        assert " / ".join(runs[cache, batch] for batch in (1, 32, 128)) in cell
    assert f"**{result('burst')['summary']['burst_map_ms']:.1f} ms**" in burst[1]
    summary = result("soak")["summary"]
    assert f"{summary['replays']:,} times, {summary['remaps']:,} mappings" in soak[0]
    assert soak[1] == f"**{summary['mismatches']} replays with other bits**"
    assert soak[2].startswith(f"{summary['controls_caught']} of {len(result('soak')['results']['controls'])} ")
    assert f"**{result('start')['summary']['warm_first_token_s']:.1f} s**" in start[1]
    for row, name in zip((step, burst, soak, start), ("graph", "burst", "soak", "start"), strict=True):
        assert row[3] == f"NVIDIA H200, {result(name)['started'][:10]}"


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
