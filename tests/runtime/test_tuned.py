"""What tuning found: which entries hold here, and that they are what Inductor reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trtllm_vattn.runtime import tuned
from trtllm_vattn.runtime.compiled import compile_model
from trtllm_vattn.runtime.models import load_model

FILE, OTHER = "ab/cab1e.best_config", "q2/cdeadbeef.best_config"


def config(block: int, searched: bool = True) -> dict[str, Any]:
    return {"XBLOCK": block, "num_warps": 4, "found_by_coordesc": searched, "configs_hash": "x"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tuned")
    (tmp_path / "tuned").mkdir()
    return tmp_path / "tuned"


def test_what_a_search_left_is_collected_and_written_alike(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    tuned.write({FILE: config(8), OTHER: config(1, searched=False)}, first)
    (first / "ab" / "cab1e.py").write_text("a kernel")
    found = tuned.collect(first)
    assert found == {FILE: config(8)}
    tuned.write(found, second)
    assert tuned.collect(second) == found
    assert [path.name for path in second.rglob("*.*")] == ["cab1e.best_config"]
    for name in ("../x.best_config", "/etc/x.best_config", "ab/x.py"):
        with pytest.raises(ValueError, match="is no name of a configuration"):
            tuned.write({name: config(1)}, second)


def test_entries_hold_for_their_card_and_toolchain(folder: Path) -> None:
    own, older = tuned.toolchain(), {**tuned.toolchain(), "torch": "2.0"}
    rows = [{"model": "a", **own, "kernels": {FILE: config(2)}}, {"model": "a", **older, "kernels": {OTHER: config(4)}}]
    (folder / "h200.json").write_text(json.dumps(rows))
    assert tuned.kernels_for("h200") == {FILE: config(2)}
    assert tuned.kernels_for("h100") == {}
    new = {"model": "a", **own, "kernels": {}}
    assert tuned.merged(rows, new) == [rows[1], new]


def test_they_are_put_where_inductor_looks_before_layers_are_compiled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(tuned, "card_of", lambda device: "h200")
    (folder / "h200.json").write_text(json.dumps([{"model": "a", **tuned.toolchain(), "kernels": {FILE: config(2)}}]))
    # Over what a search on this machine left.
    tuned.write({FILE: config(64)}, tuned.inductor_cache())
    assert tuned.install(torch.device("cpu")) == 0
    assert tuned.collect(tmp_path / "inductor") == {FILE: config(64)}
    seen = []
    monkeypatch.setattr("trtllm_vattn.runtime.compiled.install", lambda device: seen.append(device.type))
    compile_model(load_model("tiny-llama", "cpu", torch.float32))
    assert seen == ["cpu"]
    assert tuned.install(torch.device("cuda:0")) == 1
    assert tuned.collect(tmp_path / "inductor") == {FILE: config(2)}


def test_what_is_shipped_is_whole() -> None:
    for path in sorted(tuned.FOLDER.glob("*.json")):
        for entry in json.loads(path.read_text()):
            assert {"model", "torch", "triton", "step_ms", "trials", "kernels"} <= entry.keys(), path
            assert entry["kernels"], path
            assert all(content["found_by_coordesc"] for content in entry["kernels"].values())


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_what_is_shipped_for_this_card_is_what_runs() -> None:
    """A first start with empty caches tries no configuration, and its caches hold what is shipped."""
    import argparse

    from trtllm_vattn.bench.cases.tune import started

    name = tuned.card_of(torch.device("cuda:0"))
    here = [e for e in tuned.entries(name) if {key: e[key] for key in ("torch", "triton")} == tuned.toolchain()]
    if not here:
        pytest.skip(f"nothing is shipped for {name} with {tuned.toolchain()}")
    for entry in here:
        args = argparse.Namespace(model=entry["model"], device="cuda:0", context=256, steps=20, seed=0)
        row, kernels = started(args, str(tuned.FOLDER))
        # The names first: they tell a kernel that nothing is shipped for from one that is searched all the same.
        assert kernels.keys() == entry["kernels"].keys()
        assert kernels == entry["kernels"]
        assert row["tried"] == 0
