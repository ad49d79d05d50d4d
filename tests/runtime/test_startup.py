"""Capture first, size later: in what order an engine starts, and what is left for KV then."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.graphs.replay import GraphRunner
from trtllm_vattn.runtime import engine as engine_module
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.startup import memory_left
from trtllm_vattn.vmm.host import HostDriver

GIB = 1 << 30
CARD = torch.device("cuda", 1)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU of 100 GiB that torch and NVML tell of; `calls` are what they were asked, in order."""
    it = SimpleNamespace(free=60 * GIB, nvml_free=60 * GIB, calls=[], broken=False)

    def noting(name: str, answer: Any = None) -> Any:
        def call(*arguments: Any) -> Any:
            it.calls.append(name if not arguments else (name, *arguments))
            return answer(*arguments) if answer else None

        return call

    def memory(handle: str) -> SimpleNamespace:
        if it.broken:
            raise RuntimeError("NVML is broken for the test")
        return SimpleNamespace(free=it.nvml_free)

    nvml = SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=noting("init"),
        nvmlShutdown=noting("shutdown"),
        nvmlDeviceGetHandleByUUID=noting("handle", lambda uuid: f"handle of {uuid.decode()}"),
        nvmlDeviceGetMemoryInfo=noting("NVML", memory),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "synchronize", noting("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", noting("empty_cache"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", noting("driver", lambda device: (it.free, 100 * GIB)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2-3"))
    return it


@pytest.mark.parametrize(
    ("free", "nvml_free", "utilisation", "left"),
    [
        (60, 60, 0.9, 50),
        (60, 55, 0.9, 45),
        (55, 60, 0.9, 45),
        (100, 100, 0.9, 90),
        (60, 60, 1.0, 60),
        (60, 60, 0.5, 10),
    ],
)
def test_what_is_left_is_what_both_call_free_less_what_shall_stay_so(
    card: SimpleNamespace, free: int, nvml_free: int, utilisation: float, left: int
) -> None:
    card.free, card.nvml_free = free * GIB, nvml_free * GIB
    # A byte may be lost where the share is no binary number.
    assert abs(memory_left(CARD, utilisation) - left * GIB) <= 1
    # What torch keeps for itself, and what has not happened yet, would be counted as taken.
    assert card.calls == [
        ("synchronize", CARD),
        "empty_cache",
        ("driver", CARD),
        "init",
        ("handle", b"GPU-1-2-3"),
        ("NVML", "handle of GPU-1-2-3"),
        "shutdown",
    ]


@pytest.mark.parametrize("free", [9 * GIB, 3 * GIB])
def test_nothing_left_is_an_error(card: SimpleNamespace, free: int) -> None:
    card.free = free
    message = rf"{free:,} of {100 * GIB:,} bytes are free on cuda:1, and 10% are to stay so: nothing is left for KV"
    with pytest.raises(ConfigError, match=message):
        memory_left(CARD)


def test_nvml_is_left_whatever_it_says(card: SimpleNamespace) -> None:
    card.broken = True
    with pytest.raises(RuntimeError, match="broken for the test"):
        memory_left(CARD)
    assert card.calls[-1] == "shutdown"


@pytest.mark.parametrize("budget", [None, 5 << 20])
def test_an_engine_captures_before_its_cache_is_sized(monkeypatch: pytest.MonkeyPatch, budget: int | None) -> None:
    order: list[str] = []
    held: list[int] = []
    left = 8 << 20
    capture, set_budget = GraphRunner.capture, KVCacheManager.set_budget
    drivers: list[HostDriver] = []

    def load(name: str, device: str, dtype: torch.dtype) -> Any:
        order.append(f"load on {device}")
        return load_model(name, "cpu", dtype)

    def opened(device: str) -> HostDriver:
        order.append(f"open {device}")
        drivers.append(HostDriver())
        return drivers[-1]

    def captured(self: GraphRunner, *buckets: Any) -> Any:
        order.append("capture")
        held.append(drivers[-1].physical_bytes)
        return capture(self, *buckets)

    def sized(self: KVCacheManager, to: int) -> None:
        order.append(f"budget of {to}")
        set_budget(self, to)

    def asked(device: torch.device) -> int:
        order.append("what is left")
        return left

    choose = engine_module.start_policy_probe
    monkeypatch.setattr(engine_module, "start_policy_probe", lambda device, mapping: choose("cpu", mapping))
    monkeypatch.setattr(engine_module, "check_device", str)  # as on a machine with a GPU
    monkeypatch.setattr(engine_module, "load_model", load)
    monkeypatch.setattr(engine_module, "open_driver", opened)
    monkeypatch.setattr(engine_module, "memory_left", asked)
    monkeypatch.setattr(GraphRunner, "capture", captured)
    monkeypatch.setattr(KVCacheManager, "set_budget", sized)
    with Engine.from_pretrained(
        "tiny-llama", device="cuda:0", dtype=torch.float32, max_seqs=2, max_seq_len=64, budget=budget
    ) as engine:
        cache = engine.cache
        assert isinstance(cache, KVCacheManager)
        given = left if budget is None else budget
        # Steps and prompts are captured over the dummy slot alone; only then is anybody asked what is left.
        asking = ["what is left"] if budget is None else []
        assert order == ["load on cuda:0", "open cuda:0", "capture", "capture", *asking, f"budget of {given}"]
        assert held == [cache.layout.least_bytes] * 2
        assert engine.startup.budget_bytes == cache.stats().budget_bytes == given
        assert engine.startup.load_s > 0
        assert engine.startup.capture_s > 0
    for driver in drivers:
        driver.close()


START = """
import json
from torch._dynamo.utils import counters
from trtllm_vattn.runtime.engine import Engine

with Engine.from_pretrained("tiny-llama", device="cuda:0", max_seqs=2, max_seq_len=128):
    graphs = counters["aot_autograd"]
    tuned = counters["inductor"]["coordesc_tuning_bench"]
    print(json.dumps([tuned, graphs["autograd_cache_bypass"], graphs["autograd_cache_miss"]]))
"""


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_a_second_start_compiles_and_tunes_nothing(
    run_apart: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    starts = []
    for _ in range(2):
        done = run_apart(START, fresh=True)
        assert done.returncode == 0, done.stderr
        starts.append(json.loads(done.stdout.splitlines()[-1]))
    (tuned, bypassed, missed), again = starts
    assert tuned > 0
    assert missed > 0
    assert bypassed == 0
    assert again == [0, 0, 0]
