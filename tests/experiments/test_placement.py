"""The experiment of hot pages, small: arrangements are what they are called, and every page is read where it lies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import placement
import pytest

from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.tensors import tensor_at


def test_arrangements_are_what_they_are_called() -> None:
    found = {name: placement.arrange(name, 100, 0.2, 3) for name in placement.ARRANGEMENTS}
    for each in found.values():
        assert sorted(each.extents.tolist()) == list(range(100))
        assert len(each.hot) == 20
    assert found["in order"].extents.tolist() == list(range(100))
    for name in ("hot first in memory", "hot together"):
        assert found[name].extents[found[name].hot].tolist() == list(range(20))
    for name in ("hot first in addresses", "hot together"):
        assert found[name].hot.tolist() == list(range(20))
    for name in ("scattered", "in order", "hot first in memory"):
        assert found[name].hot.tolist() != list(range(20))


def test_rows_are_in_hot_pages_as_often_as_asked(host_driver: HostDriver) -> None:
    arranged = placement.arrange("hot together", 50, 0.2, 0)
    with placement.extents(host_driver, 50 * host_driver.granularity()) as (base, handles):
        rows = placement.some_rows(host_driver, base, arranged, 64, 0.9, 0).numpy()
        pages = (rows - base) // host_driver.granularity()
        assert len(handles) == 50
    assert 0 <= pages.min() <= pages.max() < 50
    assert 0.8 < (pages < 10).mean() < 0.97


def test_pages_are_mapped_by_the_arrangement(host_driver: HostDriver) -> None:
    size = host_driver.granularity()
    arranged = placement.arrange("scattered", 12, 0.5, 1)
    with placement.extents(host_driver, 12 * size) as (base, handles):
        for extent, handle in enumerate(handles):
            host_driver.map(base, size, handle)
            host_driver.set_access(base, size)
            tensor_at(base, size, "cpu").fill_(extent)
            host_driver.unmap(base, size)
        with placement.mapped(host_driver, base, handles, arranged):
            seen = tensor_at(base, 12 * size, "cpu").view(12, size)[:, 0].numpy().astype(np.int64)
    assert seen.tolist() == arranged.extents.tolist()


def test_it_runs_small_and_refuses_what_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "placement.json"
    flags = ["--device", "cpu", "--working-sets", "256KiB", "--read-bytes", "512", "--repeats", "1"]
    assert placement.main([*flags, "--output-json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert [row["arrangement"] for row in found["results"]["runs"]] == list(placement.ARRANGEMENTS)
    assert found["summary"]["hot_together_over_scattered_most"] > 0
    capsys.readouterr()
    for wrong, said in (
        (["--working-sets", "8KiB"], "give 10 or more"),
        (["--hot-pages", "1"], "give a part above 0 and below 1"),
        (["--working-sets", "256KiB", "--read-bytes", "8192"], "give less"),
    ):
        assert placement.main([*flags[:2], *wrong]) == 2
        assert said in capsys.readouterr().err
