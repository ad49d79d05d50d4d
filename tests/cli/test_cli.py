from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trtllm_vattn.cli.main import main
from trtllm_vattn.memory.mapping_policy import MappingPolicy, PolicyChoice

SMALL = ["bench", "graph", "--device", "cpu", "--model", "tiny-llama", "--requests", "5", "--max-seqs", "3"]


def test_the_main_job_compares_all_combinations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, plot = tmp_path / "graph.json", tmp_path / "graph.png"
    assert main([*SMALL, "--max-output", "6", "--output-json", str(result), "--plot", str(plot)]) == 0
    found = json.loads(result.read_text())
    runs = found["results"]["trace"]["runs"]
    assert [(run["cache"], run["mode"]) for run in runs] == [
        (kind, mode) for kind in ("contiguous", "paged", "vattn") for mode in ("eager", "captured")
    ]
    assert all(run["tokens_identical"] and run["mismatches"] == 0 and run["tokens"] > 5 for run in runs)
    assert found["summary"]["tokens_identical"] is True
    for run in runs:
        assert run["step_ms"]["p50"] <= run["step_ms"]["p99"]
        memory = run["memory"]
        assert all(live <= mapped for live, mapped in zip(memory["live_bytes"], memory["mapped_bytes"], strict=True))
    peaks = {run["cache"]: max(run["memory"]["mapped_bytes"]) for run in runs}
    assert peaks["vattn"] < peaks["contiguous"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "tokens_identical: True" in capsys.readouterr().out


@pytest.mark.parametrize("tolerance", ["0", "1e-4"])
def test_a_wrong_cache_would_be_caught(
    tolerance: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The comparison can fail: one cache whose writes go to a wrong place is found out."""
    from trtllm_vattn.attention.gather import GatheringAttention
    from trtllm_vattn.cache.manager import KVCacheManager

    write = GatheringAttention.write

    def misplaced(self, layer, k, v, slots, positions):  # type: ignore[no-untyped-def]
        if isinstance(self.cache, KVCacheManager):
            k = k * 2
        write(self, layer, k, v, slots, positions)

    monkeypatch.setattr(GatheringAttention, "write", misplaced)
    assert main([*SMALL, "--max-output", "6", "--caches", "paged,vattn", "--tie-tolerance", tolerance]) == 1
    captured = capsys.readouterr()
    assert "tokens_identical: False" in captured.out
    assert "tokens differ between combinations" in captured.err


def test_where_kernels_differ_modes_are_compared_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trtllm_vattn.graphs.host_graph import HostGraph
    from trtllm_vattn.runtime import decode

    in_parts, under_capture = decode.in_parts, []
    capture = HostGraph.capture

    def captured(*arguments):  # type: ignore[no-untyped-def]
        under_capture.append(True)
        try:
            return capture(*arguments)
        finally:
            under_capture.pop()

    monkeypatch.setattr(HostGraph, "capture", captured)
    # Captured steps choose the unlikeliest token, in every cache alike.
    monkeypatch.setattr(decode, "in_parts", lambda logits: in_parts(-logits if under_capture else logits))
    result = tmp_path / "graph.json"
    command = [*SMALL, "--max-output", "6", "--tie-tolerance", "1e-4", "--output-json", str(result)]
    assert main(command) == 0
    summary = json.loads(result.read_text())["summary"]
    assert summary["tokens_identical"] is True
    assert summary["captured_against_eager_mismatches"] > 5
    assert summary["ties_of_reference_with_itself"] == 0


def test_a_trace_file_is_replayed(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("num_prefill_tokens,num_decode_tokens\n20,3\n30,4\n")
    result = tmp_path / "graph.json"
    assert main([*SMALL, "--trace", str(trace), "--caches", "vattn", "--output-json", str(result)]) == 0
    found = json.loads(result.read_text())["results"]["trace"]
    assert (found["requests"], found["prompt_tokens"], found["output_tokens"]) == (2, 50, 7)


@pytest.mark.parametrize(
    ("asked", "device", "model"), [([], "cuda:0", "llama-3-8b"), (["--device", "cpu"], "cpu", "tiny-llama")]
)
def test_sizes_are_for_the_device_that_is_asked_for(
    asked: list[str], device: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trtllm_vattn.bench.cases import serve

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    got: list[Namespace] = []
    monkeypatch.setattr(serve, "run", lambda args: got.append(args) or 0)
    assert main(["bench", "serve", *asked]) == 0
    assert (got[0].device, got[0].model) == (device, model)


def test_doctor_checks_the_host_driver_and_explains_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "host driver seam  ok: granularity 4,096 bytes; remap check passed" in text
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert findings["host driver seam"]["works"] is True
    works = findings["CUDA driver seam"]["works"]
    assert works is (report["machine"]["gpu"] is not None), findings["CUDA driver seam"]["detail"]
    assert all(finding["detail"] for finding in findings.values())


@pytest.mark.parametrize("policy", MappingPolicy)
def test_doctor_shows_the_mapping_policy_an_engine_would_get(
    policy: MappingPolicy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trtllm_vattn.cli import doctor

    asked: list[str] = []

    @contextmanager
    def start_policy_probe(device: str) -> Iterator[SimpleNamespace]:
        asked.append(device)
        yield SimpleNamespace(result=lambda: PolicyChoice(policy, "as this test has it"))

    monkeypatch.setattr(doctor, "start_policy_probe", start_policy_probe)
    assert main(["doctor"]) == 0
    assert f"mapping policy  ok: {policy.value}: as this test has it" in capsys.readouterr().out
    assert asked == ["cuda:0" if torch.cuda.is_available() else "cpu"]
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {"name": "mapping policy", "works": True, "detail": f"{policy.value}: as this test has it"} in findings


def test_doctor_fails_where_nothing_works(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from trtllm_vattn.cli import doctor
    from trtllm_vattn.errors import ConfigError

    def broken() -> None:
        raise ConfigError("broken for the test")

    monkeypatch.setattr(doctor, "HostDriver", broken)
    monkeypatch.setattr(doctor, "CudaDriver", broken)
    assert main(["doctor"]) == 1
    assert "host driver seam  no: broken for the test" in capsys.readouterr().out


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trtllm_vattn", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0.1.0"
    done = subprocess.run([sys.executable, "-m", "trtllm_vattn"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "doctor" in done.stdout


def test_doctor_asks_a_gpu_about_its_virtual_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attributes' names are those of cuda.bindings; their values come from a stand-in."""
    from cuda.bindings import driver as cuda

    from trtllm_vattn.cli import doctor

    class Driver:
        device = "cuda:0"

        def __init__(self) -> None:
            self.cuda = cuda

        def call(self, name: str, *arguments: object) -> object:
            if name == "cuDeviceGet":
                return "the device"
            assert (name, arguments[1]) == ("cuDeviceGetAttribute", "the device")
            fabric = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED
            return 0 if arguments[0] == fabric else 1

    monkeypatch.setattr(doctor, "CudaDriver", Driver)
    found = {finding.name: finding.works for finding in doctor._attributes()}
    assert found == {
        "memory management": True,
        "handles as descriptors": True,
        "handles over fabric": False,
        "GPUDirect RDMA": True,
    }
