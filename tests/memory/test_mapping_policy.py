from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.memory import mapping_policy, remap_probe
from trtllm_vattn.memory.mapping_policy import MappingPolicy, start_policy_probe
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import WrappedDriver

GOOD = {"reads": 10, "remaps": 1000, "wrong_words": 0, "seconds": 1.5, "error": None}


def printing(report: object) -> list[str]:
    """A command in place of the probe."""
    return [sys.executable, "-c", f"print({json.dumps(report)!r})"]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU."""
    monkeypatch.setattr(mapping_policy, "_machine_key", lambda device: "GPU-1-580.159")


@pytest.mark.parametrize("name", ["concurrent", "between-steps", "quiesce"])
def test_a_policy_asked_for_is_taken(name: str) -> None:
    with start_policy_probe("cuda:0", name) as probe:
        assert probe.result().policy is MappingPolicy(name)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="no mapping policy 'never'; there are concurrent, between-steps, quiesce, and auto"
    ):
        start_policy_probe("cpu", "never")


def test_on_the_host_there_is_nothing_to_ask() -> None:
    with start_policy_probe("cpu") as probe:
        choice = probe.result()
    assert choice.policy is MappingPolicy.CONCURRENT
    assert choice.report is None


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("command", "chosen", "why"),
    [
        (printing(GOOD), "concurrent", "1,000 remappings beside 10 reads in 1.5 s, no wrong word"),
        (printing({**GOOD, "wrong_words": 3}), "between-steps", "3 wrong words in 1,000 remappings"),
        (printing({**GOOD, "reads": 0}), "between-steps", "0 wrong words"),
        ([sys.executable, "-c", "import os; os.abort()"], "between-steps", "the probe ended with code -6"),
        ([sys.executable, "-c", "raise SystemExit('no such GPU')"], "between-steps", "code 1: no such GPU"),
        (printing("nonsense"), "between-steps", "the probe ended with code 0"),
    ],
    ids=["right", "wrong words", "no reads", "a fault", "an error", "no report"],
)
def test_the_probe_decides_and_its_report_is_stored(command: list[str], chosen: str, why: str, tmp_path: Path) -> None:
    with start_policy_probe("cuda:0", cache_dir=tmp_path / "cache", command=command) as probe:
        choice = probe.result()
    assert choice.policy.value == chosen
    assert why in choice.why
    with start_policy_probe("cuda:0", cache_dir=tmp_path / "cache", command=["/nowhere/to/be/found"]) as again:
        assert again.result() == choice
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["mapping-GPU-1-580.159.json"]


@pytest.mark.usefixtures("card")
def test_a_probe_that_hangs_is_ended(tmp_path: Path) -> None:
    hanging = [sys.executable, "-c", "import time; time.sleep(60)"]
    with start_policy_probe("cuda:0", cache_dir=tmp_path, command=hanging) as probe:
        choice = probe.result(timeout_s=0.2)
    assert choice.policy is MappingPolicy.BETWEEN_STEPS
    assert "did not end" in choice.why


@pytest.mark.usefixtures("card")
def test_a_probe_that_nobody_waits_for_leaves_no_process(tmp_path: Path) -> None:
    hanging = [sys.executable, "-c", "import time; time.sleep(60)"]
    with start_policy_probe("cuda:0", cache_dir=tmp_path, command=hanging) as probe:
        process = probe._process
    assert process is not None
    assert process.returncode == -9


@pytest.mark.usefixtures("card")
def test_a_broken_report_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "mapping-GPU-1-580.159.json").write_text('{"reads": ')
    with start_policy_probe("cuda:0", cache_dir=tmp_path, command=printing(GOOD)) as probe:
        assert probe.result().policy is MappingPolicy.CONCURRENT
    assert json.loads((tmp_path / "mapping-GPU-1-580.159.json").read_text()) == GOOD


@pytest.mark.usefixtures("card")
def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with start_policy_probe("cuda:0", cache_dir=tmp_path / "file", command=printing(GOOD)) as probe:
        assert probe.result().policy is MappingPolicy.CONCURRENT


def test_reads_stay_right_while_pages_come_and_go(driver: Driver) -> None:
    report = remap_probe.probe_remapping(driver, seconds=0.3)
    assert report.reads > 0
    assert report.remaps > 100
    assert report.wrong_words == 0


class Swapping(WrappedDriver):
    """Once in a while puts zeros where a reader looks, as memory of another's would."""

    def __init__(self, inner: HostDriver) -> None:
        super().__init__(inner)
        self.calls = 0
        self.addresses: list[int] = []

    def _call(self, name: str, *arguments: int) -> object:
        self.calls += 1
        if name == "map" and len(self.addresses) < remap_probe.READ_PAGES:
            self.addresses.append(arguments[0])
        if name == "unmap" and self.calls == 300:
            size = self.inner.granularity()
            page = remap_probe.tensor_at(self.addresses[3], size, self.device)
            page.zero_()
        return super()._call(name, *arguments)


def test_the_probe_sees_a_page_that_was_swapped(host_driver: HostDriver) -> None:
    assert remap_probe.probe_remapping(Swapping(host_driver), seconds=0.3).wrong_words > 0


@pytest.mark.gpu
def test_this_card_gets_a_policy_by_its_own_probe(tmp_path: Path) -> None:
    with start_policy_probe("cuda:0", cache_dir=tmp_path) as probe:
        choice = probe.result()
    assert choice.report is not None
    assert choice.report.error is None
    assert choice.report.remaps > 100


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["between-steps", "quiesce"])
def test_mappings_wait_for_the_work_that_the_policy_names(name: str) -> None:
    from trtllm_vattn.vmm.cuda import CudaDriver
    from trtllm_vattn.vmm.owners import Extent, Reservation

    driver = MappingPolicy(name).wrap(CudaDriver())
    granularity = driver.granularity()
    busy = torch.randn(4096, 4096, device="cuda:0")
    reservation, extent = Reservation(driver, granularity), Extent(driver, granularity)
    for _ in range(50):
        busy @ busy
    done = torch.cuda.Event()
    done.record()
    (mapping,) = reservation.map(0, [extent])
    assert done.query()
    for owner in (mapping, extent, reservation):
        owner.close()
