"""The README's picture shows what a recorded run did, and the run is one of the real cache."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trtllm_vattn.trace import read_trace

ROOT = Path(__file__).resolve().parents[2]
HOST = ROOT / "scripts" / "results" / "host"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / "experiments" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
    return module


draw_idea, record_idea = script("draw_idea"), script("record_idea")


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HOST / "idea.json").read_text())
    return found


def page_tables(run: dict[str, Any]) -> list[tuple[dict[str, Any], dict[int, tuple[int, int]]]]:
    """Every replay with what was mapped then: address to (bytes, handle), from the driver's calls alone."""
    table: dict[int, tuple[int, int]] = {}
    found = []
    for event in run["results"]["events"]:
        if event["event"] == "map":
            address, size, handle = event["arguments"]
            assert address not in table
            table[address] = (size, handle)
        elif event["event"] == "unmap":
            address, size = event["arguments"]
            assert table.pop(address)[0] == size
        elif event["event"] == "replay":
            found.append((event, dict(table)))
    return found


def check_run(run: dict[str, Any]) -> None:
    config, tables = run["config"], page_tables(run)
    assert len(tables) == run["summary"]["replays"] >= 40
    row = config["page_bytes"] // config["tokens_a_page"]
    for event, table in tables:
        assert event["wrong"] == []
        for slot, length in enumerate(event["lengths"]):
            at = config["base"] + slot * config["slot_bytes"]
            end = at + length * row
            while at < end:  # every token that the replay read is backed
                at += table[at][0]
    assert run["summary"]["wrong_replays"] == 0
    assert run["summary"]["graphs_captured"] == 1
    kinds = [event["event"] for event in run["results"]["events"]]
    assert run["summary"]["mappings_taken_away"] == kinds.count("unmap") > 10
    assert run["summary"]["mappings_made"] == kinds.count("map") > 30
    handles = [tuple(sorted(handle for _, handle in table.values())) for _, table in tables]
    assert any(len(each) > len(set(each)) for each in handles), "no memory was ever at two addresses"


def test_a_run_is_right_and_moves_memory(tmp_path: Path) -> None:
    check_run(record_idea.record(tmp_path / "trace.json"))
    names = {event["name"] for event in read_trace(tmp_path / "trace.json")}
    assert names >= {"map", "replay", "admit", "move", "begin_with"}


def test_the_committed_run_is_right_and_moves_memory(committed: dict[str, Any]) -> None:
    check_run(committed)


def test_a_wrong_sum_is_noticed(tmp_path: Path) -> None:
    run = record_idea.Recorder(tmp_path / "trace.json")
    run.operate("A arrives", lambda: run.admit("A", 4), 1)
    assert run.wrong == 0
    run._k[run.cache.slot_of("A"), 1] += 1
    run.replay()
    assert run.wrong == 1
    run.release("A")
    run.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_committed_picture_is_drawn_from_the_committed_run(committed: dict[str, Any], theme: str) -> None:
    assert (HOST / f"idea-{theme}.svg").read_text() == draw_idea.draw(committed, theme)


def test_at_every_replay_each_extent_is_drawn_where_it_was_mapped(committed: dict[str, Any]) -> None:
    film, config = draw_idea.Film(committed), committed["config"]
    tables = page_tables(committed)
    for time, (_, table) in zip(film.replays, tables, strict=True):
        drawn = sorted(
            (piece.handle, round(x), round(y))
            for piece in film.pieces
            for _, x, y, opacity in [piece.at(time)]
            if opacity == 1 and y < draw_idea.SHELF_TOP
        )
        mapped = []
        for address, (_, handle) in table.items():
            slot, offset = divmod(address - config["base"], config["slot_bytes"])
            page = offset // config["page_bytes"]
            mapped.append((handle, draw_idea.LEFT + page * draw_idea.CELL, draw_idea.TOP + slot * draw_idea.ROW))
        assert drawn == sorted(mapped), f"at {time:.2f} s"
