"""The sweep over orders of pages, small: they are what they are called, and what is left out is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tlb
import torch

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.vmm.host import HostDriver

ORDERS, SINGLE_PAGES, arrange, main = tlb.ORDERS, tlb.SINGLE_PAGES, tlb.arrange, tlb.main


def run(tmp_path: Path, *flags: str) -> dict[str, Any]:
    report = tmp_path / "tlb.json"
    assert main([*flags, "--output-json", str(report)]) == 0
    loaded: dict[str, Any] = json.loads(report.read_text())
    return loaded


def test_page_order_is_chosen_and_seen(tmp_path: Path) -> None:
    report = run(tmp_path, "--device", "cpu", "--plot", str(tmp_path / "tlb.png"))
    assert (tmp_path / "tlb.png").stat().st_size > 10_000
    rows = {row["system"]: row for row in report["results"]["attention"]}
    assert rows["flat, 4 layers a row, in order"]["placement"] == 1
    assert rows["flat, 4 layers a row, single pages in order"]["placement"] == 1
    assert rows["flat, 4 layers a row, created again"]["placement"] == 1
    assert 0.2 < rows["flat, 4 layers a row, scattered"]["placement"] < 0.8
    assert rows["flat, 4 layers a row, after churn"]["placement"] < 1
    assert rows["flat, 4 layers a row, after churn"]["adjacent"] < 0.9
    reads = report["results"]["reads"]
    assert {row["read_bytes"] for row in reads} == {512, 4096, 32768}
    assert {(row["layers_per_range"], row["order"]) for row in reads} >= {(1, "in order"), (4, "after churn")}
    # Rows that no slot of a range of one layer holds.
    assert {(row["read_bytes"], row["layers_per_range"]) for row in report["results"]["skipped"]} == {(32768, 1)}


def test_what_a_sweep_leaves_out_is_said_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--device", "cpu", "--layers-per-range", "4", "--read-bytes", "512"]
    report = run(tmp_path, *small, "--contexts", "100,100000", "--most-seconds", "1e-9")
    systems = [row.get("system") for row in report["results"]["skipped"]]
    assert report["results"]["attention"] == []
    assert systems[:-1] == [*(f"flat, 4 layers a row, {order}" for order in ORDERS), "blocks of 16"]
    assert report["summary"]["skipped"] == len(systems) == 7
    said = capsys.readouterr().err
    assert "left out: system blocks of 16, context 100, sequences 9" in said
    assert "1e-09 s are over (--most-seconds)" in said
    assert "left out: working_set_gb 0.0005, context 100000: one sequence takes 0.0512 GB" in said
    assert main([*small, "--read-bytes", "96"]) == 2
    assert "rows of 96 bytes asked for; give a power of two from 64 on" in capsys.readouterr().err


@pytest.mark.parametrize("slots", [3, 8])
def test_churn_turns_all_slots_over_many_times(host_driver: HostDriver, slots: int) -> None:
    shape = CacheShape(2, 1, 64, torch.float32, slots, 200)
    with KVCacheManager(shape, host_driver, 64 << 20, config=SINGLE_PAGES) as cache:
        admitted: list[int] = []
        admit = cache.admit
        cache.admit = lambda sequence, tokens: admitted.append(tokens) or admit(sequence, tokens)  # type: ignore
        arrange(cache, "after churn", 10, 0)
        assert len(admitted) == 10 * slots
        assert cache.stats().sequences == 0
        cache.admit = admit  # type: ignore[method-assign]
        for sequence in range(slots):
            cache.admit(sequence, 200)
        placed = cache.placement()
        assert placed.adjacent < 0.9 * placed.neighbours
        arrange(cache, "created again", 10, 0)
        assert cache.arena.pool.held_bytes == cache.layout.least_bytes
