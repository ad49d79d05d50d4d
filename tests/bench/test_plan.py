"""`calibrate` on the host driver, and `bench plan` by what it measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trtllm_vattn.bench.cases import plan
from trtllm_vattn.bench.cases.calibrate import Measured, batch_factor, burst_us
from trtllm_vattn.bench.cases.plan import summary
from trtllm_vattn.cli.main import main
from trtllm_vattn.errors import DriverError
from trtllm_vattn.planner import ModelShape
from trtllm_vattn.planner.calibration import QUANTITIES, load
from trtllm_vattn.runtime.models import SHAPES
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import FaultyDriver


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "here.json"
    assert main(["calibrate", "--device", "cpu", "--output", str(path)]) == 0
    return path


def test_a_calibration_of_the_host_has_all_numbers_and_says_where_they_are_from(calibration: Path) -> None:
    found = load(calibration)
    assert found.card == "host"
    assert set(found.sources) == set(QUANTITIES)
    assert all(found.sources.values())
    # What the host driver has none of.
    assert {"tlb_reach_bytes", "tlb_walk_ns", "tlb_walk_scattered_ns"} <= found.estimated
    assert not {"create_us", "host_us", "weights_bytes_per_s"} & found.estimated
    assert found.about["model"] == "tiny-llama"
    assert found.about["versions"]["torch"]
    assert [x for x, _ in found.curves["create_us"].points] == [found.granularity * n for n in (1, 8, 32, 128)]


def test_predictions_stand_beside_what_is_measured(
    calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MEMORY_LAYERS", (16,))
    monkeypatch.setattr(plan, "CHOICE_LOOKAHEADS", (None,))
    monkeypatch.setattr(plan, "MAX_SEQS", 32)
    report = tmp_path / "plan.json"
    flags = ["--parts", "memory,step,burst,choice", "--requests", "60", "--budget", "3GiB", "--steps", "3"]
    flags += ["--calibration", str(calibration), "--output-json", str(report)]
    assert main(["bench", "plan", "--device", "cpu", *flags]) == 0
    found: dict[str, Any] = json.loads(report.read_text())
    assert set(found["summary"]) == {
        "step_p50_error",
        "waste_error_points",
        "capacity_error",
        "burst_p99_error",
        "choice_over_best",
    }
    assert found["summary"] == summary(found["results"])
    memory = found["results"]["memory"]
    assert [row["layers_per_range"] for row in memory] == [16]
    # In so little memory a part is free at times, and sequences keep what they found in their slots.
    assert memory[0]["planned_waste"] == pytest.approx(memory[0]["simulated"]["waste"], abs=0.01)
    choices = found["results"]["choice"]
    assert sum(row["planned"] for row in choices) == 1
    assert len(choices) == 6
    assert 0.97 <= found["summary"]["choice_over_best"] <= 1
    (step,), (burst,) = found["results"]["step"], found["results"]["burst"]
    assert step["sequences"] == 4
    assert burst["itl_ms"]["count"] > 0
    said = capsys.readouterr().err
    assert "waste_error_points = " in said
    assert main(["bench", "plan", "--device", "cpu", "--requests", "1,2", "--trace", str(report)]) == 2
    assert "--requests has 2 numbers for 1 traces" in capsys.readouterr().err


def test_what_was_measured_is_counted_by_its_worst() -> None:
    rows = {
        "memory": [
            {"waste": 0.01, "planned_waste": 0.03, "capacity": 50.0, "planned_capacity": 51.0},
            {"waste": 0.02, "planned_waste": 0.02, "capacity": None, "planned_capacity": 9.0},
        ],
        "step": [{"step_ms": {"p50": 10.0}, "planned_ms": 9.0}, {"step_ms": {"p50": 10.0}, "planned_ms": 10.5}],
        "choice": [
            {"trace": "a", "planned": True, "tokens_per_s": 90.0},
            {"trace": "a", "planned": False, "tokens_per_s": 100.0},
            {"trace": "b", "planned": True, "tokens_per_s": 50.0},
        ],
    }
    found = summary(rows)
    assert found == {
        "step_p50_error": pytest.approx(0.1),
        "waste_error_points": pytest.approx(2.0),
        "capacity_error": pytest.approx(0.02),
        "choice_over_best": pytest.approx(0.9),
    }


@pytest.mark.parametrize(("call", "skip"), [("create", 3), ("map", 3), ("map", 0), ("set_access", 0)])
def test_a_failing_driver_leaves_nothing_behind(call: str, skip: int) -> None:
    host = HostDriver()
    failing = FaultyDriver(host)
    failing.fail(call, skip)
    with pytest.raises(DriverError):
        burst_us(failing, host.granularity(), 8)
    assert (host.live_mappings, host.live_handles, host.live_reservations) == (0, 0, 0)
    host.close()


def test_differences_that_are_noise_stay_above_nothing() -> None:
    measured = Measured()
    measured.put("host_us", -3.0, "here")
    measured.put("layer_us", [(1, -5.0), (2, 7.0)], "here")
    assert measured.values == {"host_us": 1e-3, "layer_us": [(1.0, 1e-3), (2.0, 7.0)]}


def test_longer_sequences_say_how_fast_a_batch_is_read() -> None:
    measured = Measured()
    measured.values |= {"attention_bytes_per_s": 4e12, "attention_row_factor": [(4096.0, 1.0)]}
    shape = ModelShape.from_config("llama-3-8b", SHAPES["llama-3-8b"])
    short = {8: (4000.0, 4e3), 128: (8000.0, 65536.0)}
    # 262,144 tokens of 128 KiB more at 90 % of the rate; of 8 sequences too few to tell.
    more_us = 1e6 * 262_144 * shape.token_bytes / 3.6e12
    long = {8: (4100.0, 2e4), 128: (8000.0 + more_us, 65536.0 + 262_144)}
    batch_factor(shape, measured, short, long, (512, 2560))
    assert measured.values["attention_batch_factor"] == [(128.0, pytest.approx(0.9))]
    assert not measured.estimated
    batch_factor(shape, measured, short, short, (512, 2560))
    assert measured.values["attention_batch_factor"] == [(1.0, 1.0)]
    assert measured.estimated == {"attention_batch_factor"}
