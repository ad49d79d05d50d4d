"""GPUs: graphs that hold NCCL's sums, replayed while memory is remapped; sequences from one process to another, on two
GPUs and on one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trtllm_vattn.cli.main import main

pytestmark = pytest.mark.gpu
two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@two
@pytest.mark.parametrize("sums", ["nccl", "symmetric"])
def test_captured_sums_are_right_under_remapping(tmp_path: Path, sums: str) -> None:
    output = tmp_path / "tp.json"
    arguments = ["bench", "tp", "--measure", "replays", "--replays", "500", "--seconds", "30", "--all-reduce", sums]
    assert main([*arguments, "--output-json", str(output)]) == 0
    told = json.loads(output.read_text())["summary"]
    assert told["wrong_replays"] == told["failed_requests"] == 0
    assert told["replays"] >= 500
    assert told["mappings"] > 0


@two
def test_sequences_cross_from_one_gpu_to_the_other(tmp_path: Path) -> None:
    output = tmp_path / "transfer.json"
    arguments = ["bench", "transfer", "--link", "group", "--sizes", "256,2048", "--transfers", "50"]
    assert main([*arguments, "--output-json", str(output)]) == 0
    told = json.loads(output.read_text())["summary"]
    assert told["wrong_bytes"] == 0
    assert told["transfers"] == 50


@two
def test_memory_of_one_gpu_is_read_by_the_other(tmp_path: Path) -> None:
    output = tmp_path / "peer.json"
    assert main(["bench", "transfer", "--measure", "peer", "--output-json", str(output)]) == 0
    told = json.loads(output.read_text())["summary"]
    assert told["peer"] == "measured"
    assert told["wrong_bytes"] == 0
    assert told["peer_read_gb_s"] > 0


def test_two_processes_on_one_gpu_send_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    output = tmp_path / "transfer.json"
    arguments = ["bench", "transfer", "--link", "ipc", "--sizes", "256,2048", "--transfers", "50"]
    assert main([*arguments, "--output-json", str(output)]) == 0
    told = json.loads(output.read_text())["summary"]
    assert told["same_device"]
    assert told["wrong_bytes"] == 0
    assert told["transfers"] == 50
    assert told["descriptors_per_extent"] == 1
