"""Each drill passes, and fails where what should come of its misfortune does not."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import forking
import pytest

from trtllm_vattn.cli.main import main
from trtllm_vattn.errors import DriverError, EngineClosed, VattnError, is_device_lost
from trtllm_vattn.tenancy.broker import Broker
from trtllm_vattn.verify import drills
from trtllm_vattn.verify.drills import CODES, DRILLS, Drills

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def on_host() -> Iterator[Drills]:
    with Drills("cpu") as made, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.executable", forking.python())
        yield made


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", DRILLS)
def test_what_should_come_of_it_comes(name: str, on_host: Drills) -> None:
    outcome = on_host.run(name)
    assert outcome.passed, outcome.detail
    assert outcome.exit_code == CODES.get(name)


@pytest.mark.gpu
def test_all_drills_pass_on_a_card() -> None:
    with Drills("cuda:0") as made:
        outcomes = [made.run(name) for name in DRILLS]
    assert [outcome.detail for outcome in outcomes if not outcome.passed] == []


def test_a_drill_that_finds_something_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = iter(range(1000))
    monkeypatch.setattr(drills, "generate", lambda engine: [[next(count)]])
    report = tmp_path / "new" / "drills.json"
    assert main(["drill", "clock-jumps", "--device", "cpu", "--output-json", str(report)]) == 1
    assert "NO: DrillFailed: other tokens" in capsys.readouterr().out
    (found,) = json.loads(report.read_text())["drills"]
    assert (found["name"], found["passed"]) == ("clock-jumps", False)
    assert main(["drill", "earthquake", "--device", "cpu"]) == 2
    assert "there are out-of-memory, " in capsys.readouterr().err


def test_a_lease_that_does_not_come_back_is_noticed(on_host: Drills, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drills, "FREED_WITHIN_S", 0.1)
    monkeypatch.setattr(Broker, "_end_process", lambda broker, tenant: None)
    assert "lends to a tenant whose process has ended" in on_host.run("killed-tenant").detail


def test_a_process_that_ends_otherwise_or_hangs_is_noticed(on_host: Drills, monkeypatch: pytest.MonkeyPatch) -> None:
    # Who runs alone has no work in flight: the part of another drill ends with another code.
    process = on_host._process
    monkeypatch.setattr(on_host, "_process", lambda name, *rest, **more: process("exit_in_flight"))
    assert "the process ended with 3" in on_host.run("fork").detail
    monkeypatch.undo()
    monkeypatch.setattr(drills, "PATIENCE_S", 0.0)
    assert "did not end within 0 s" in on_host.run("exit-in-flight").detail


def test_a_lost_device_is_told_from_errors_that_pass() -> None:
    def caused(cause: BaseException) -> VattnError:
        error = EngineClosed("closed")
        error.__cause__ = cause
        return error

    for code, lost in (("CUDA_ERROR_ILLEGAL_ADDRESS", True), ("CUDA_ERROR_OUT_OF_MEMORY", False)):
        assert is_device_lost(DriverError(code, "map", (1,))) is lost
        assert is_device_lost(caused(DriverError(code, "map", (1,)))) is lost
    for text, lost in (
        ("CUDA error: device-side assert triggered\nCUDA kernel errors might be", True),
        ("CUDA error: invalid argument", False),
        ("device-side assert", False),
    ):
        assert is_device_lost(RuntimeError(text)) is lost
    assert not is_device_lost(None)


TIME_OF_DAY = {
    ("serve/answers.py", "time.time"),  # OpenAI's field `created`
    ("trace.py", "time.time"),  # what the time of day was when the trace began
    ("bench/cases/startup.py", "time"),  # across processes, a start's cost
    ("verify/drills.py", "time.time"),  # the drill itself
}


def test_no_wait_or_deadline_goes_by_the_time_of_day() -> None:
    found = set()
    for top in ("trtllm_vattn", "graphs", "plugins"):
        for path in (ROOT / top).rglob("*.py"):
            text = path.read_text()
            if not re.search(r"\btime\.time\b|from time import .*\btime\b", text):
                continue
            tree = ast.parse(text)
            imported = {
                alias.name
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom) and node.module == "time"
                for alias in node.names
            }
            for node in ast.walk(tree):
                name = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
                if name == "time.time" or (name == "time" and "time" in imported):
                    found.add((str(path.relative_to(ROOT / top)), name))
    assert found == TIME_OF_DAY
