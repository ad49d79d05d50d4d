"""Steady decode: what is said of a step's length, and of how much of it the device works."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from trtllm_vattn.bench.cases import decode as graph
from trtllm_vattn.bench.cases import steady
from trtllm_vattn.bench.cases.steady import run_steady, time_prompts
from trtllm_vattn.bench.harness import contenders
from trtllm_vattn.bench.harness.case import captured_graphs
from trtllm_vattn.bench.harness.contenders import (
    PROFILED,
    Contender,
    DeviceUtilization,
    covered,
    device_utilization,
    empty_lanes,
    fill,
    fill_lanes,
    replayed_steps,
    take_turns,
    work_of,
)
from trtllm_vattn.bench.publish import tables
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.sampling import SamplingParams


def run_small(device: str = "cpu") -> list[dict[str, Any]]:
    model = load_model("tiny-llama", device, torch.float32)
    found = run_steady(
        lambda cache, **options: Engine(model, cache, compile=False, **options),
        ["vattn"],
        lambda name, slots, longest: make_cache(name, shape_of(model, slots, longest), device),
        attention="torch",
        batch=2,
        context=80,
        rounds=2,
        steps=3,
        seed=0,
    )
    return found["runs"]


@pytest.fixture
def no_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steady, "attention_bandwidth", lambda attention, lengths: {})


@pytest.mark.usefixtures("no_bandwidth")
def test_on_the_host_nothing_is_said_of_a_device() -> None:
    rows = run_small()
    assert [row["mode"] for row in rows] == ["captured", "eager"]
    for row in rows:
        assert abs(row["mean_length"] - row["context"]) <= 2
        assert {row[name] for name in ("device_busy_ms", "device_step_ms", "idle_share")} == {None}
    for text in (graph.show(None, {"runs": rows}), tables.batches({"results": {"steady": {"runs": rows}}})):
        assert [cell.strip() for cell in text.splitlines()[-1].split("|")][-3:-1] == ["-", "-"]


def test_mappings_that_a_step_waited_for_are_counted_by_the_end_of_the_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_model("tiny-llama", "cpu", torch.float32)
    cache = make_cache("vattn", shape_of(model, 2, 512), "cpu", lookahead=0)
    # All that is mapped is waited for: a thread beside the steps might map it first.
    monkeypatch.setattr(cache, "map_ahead", lambda: 0)
    with Engine(model, cache, attention="torch", compile=False, buckets=[2]) as engine:
        fill(engine, [120] * 2, 300, np.random.default_rng(0))
        contender = Contender("vattn", "captured", engine)
        take_turns([contender], 1, 40, "turns")
        assert 0 < contender.critical_path_maps == cache.stats().critical_path_maps
        cache.prepare_step(engine.decode.lengths_after(100))
        assert contender.critical_path_maps < cache.stats().critical_path_maps


def test_steps_are_replayed_from_where_the_host_has_the_lanes() -> None:
    """Of lanes without a request, too: else each turn would begin where the last one ended, past what is mapped."""
    model = load_model("tiny-llama", "cpu", torch.float32)
    cache = make_cache("vattn", shape_of(model, 2, 256), "cpu", lookahead=0)
    with Engine(model, cache, attention="torch", compile=False, buckets=[2], prefix_cache=False) as engine:
        fill_lanes(engine, 64, seed=0)
        for turn in range(4):
            assert len([*replayed_steps(engine, 6)]) == 7
            assert engine.decode.lengths.tolist() == [66 + turn] * 2
            assert engine.decode.inputs[3].tolist() == [66 + turn + 6] * 2
        empty_lanes(engine)


@pytest.mark.usefixtures("no_bandwidth")
def test_each_mode_is_measured_by_its_own_steps_and_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, int]] = []
    engines: list[Engine] = []
    build = Engine.__init__

    def built(self: Engine, *arguments: Any, **options: Any) -> None:
        engines.append(self)
        build(self, *arguments, **options)

    def measured(decode: Callable[[], int], device: torch.device) -> DeviceUtilization:
        seen.append((engines[0].decode.captured, decode()))
        return DeviceUtilization(1e9 if engines[0].decode.captured else 1e-9, 1.0, 1.0)

    monkeypatch.setattr(Engine, "__init__", built)
    monkeypatch.setattr(contenders, "device_utilization", measured)
    captured, eager = run_small()
    assert seen == [(True, PROFILED), (False, PROFILED)]
    assert captured["idle_share"] == 1 - 1e9 / captured["step_ms"]["p50"] < 0
    assert 0.99 < eager["idle_share"] < 1
    assert eager["device_step_ms"] is None


@pytest.mark.parametrize(
    ("spans", "whole"),
    [
        ([], 0),
        ([(0, 3), (5, 6)], 4),
        ([(5, 6), (0, 3), (2, 4)], 5),
        ([(0, 10), (1, 2), (9, 12)], 12),
        ([(1, 2), (1, 2)], 1),
    ],
)
def test_work_beside_other_work_counts_once(spans: list[tuple[float, float]], whole: float) -> None:
    assert covered(spans) == whole


def test_only_the_devices_work_is_taken_from_a_trace() -> None:
    events = [
        {"cat": "kernel", "ts": 10.0, "dur": 2.0},
        {"cat": "cuda_runtime", "ts": 0.0, "dur": 100.0},
        {"cat": "gpu_memcpy", "ts": 20.0, "dur": 1.0},
        {"cat": "gpu_memset", "ts": 30.0, "dur": 1.0},
        {"cat": "gpu_user_annotation", "ts": 0.0, "dur": 100.0},
        {"name": "process_name", "ph": "M", "ts": 0.0},
    ]
    assert work_of(events) == [(10.0, 12.0), (20.0, 21.0), (30.0, 31.0)]


@pytest.mark.gpu
def test_pauses_are_told_from_work_and_graphs_are_looked_into() -> None:
    device = torch.device("cuda:0")
    x = torch.randn(4096, 4096, device=device)
    graph = torch.cuda.CUDAGraph()
    x @ x
    with torch.cuda.graph(graph):
        for _ in range(5):
            y = x @ x
    graph.replay()

    def replays() -> int:
        for _ in range(3):
            graph.replay()
        return 3

    def pauses() -> int:
        for _ in range(3):
            x @ x
            torch.cuda.synchronize()
            time.sleep(0.05)
        return 3

    whole, part = device_utilization(replays, device), device_utilization(pauses, device)
    assert whole is not None
    assert part is not None
    # A product may be of several kernels.
    assert whole.work_a_step >= 5
    assert 1 <= part.work_a_step < whole.work_a_step
    assert 0.5 < whole.device_busy_ms / whole.profiled_step_ms <= 1
    assert part.device_busy_ms / part.profiled_step_ms < 0.5
    assert 3 < whole.device_busy_ms / part.device_busy_ms < 7
    del y


@pytest.mark.gpu
def test_a_captured_step_idles_less_than_an_eager_one() -> None:
    captured, eager = run_small("cuda:0")
    assert captured["device_busy_ms"] > 0
    assert captured["device_work_a_step"] > 10
    assert captured["idle_share"] < eager["idle_share"] < 1


@pytest.mark.parametrize(("attention", "sizes"), [("torch", [16, 32, 64, 128]), ("shares", [32, 101])])
def test_short_prompts_are_timed_by_replay_and_by_pass(
    monkeypatch: pytest.MonkeyPatch, attention: str, sizes: list[int]
) -> None:
    """Where whole passes are captured, by theirs."""
    model = load_model("tiny-llama", "cpu", torch.float32)
    cache = make_cache("vattn", shape_of(model, 1, 100), "cpu")
    with Engine(model, cache, attention=attention, compile=False) as engine:
        passes = engine.passes.graphs
        assert (passes is None) is (attention == "torch")
        runner = (passes or engine.prefill).runner
        replayed: list[int] = []
        replay = runner.replay
        monkeypatch.setattr(runner, "replay", lambda size: replayed.append(size) or replay(size))
        rows = time_prompts(engine, 3, 0)
        assert [row["tokens"] for row in rows] == [min(size, 100) for size in sizes]
        # As often as it was passed, and once to begin with.
        assert replayed == [size for size in sizes for _ in range(4)]
        assert {row[way]["count"] for row in rows for way in ("replay_ms", "pass_ms")} == {3}
        assert (engine.prefill.captured, engine.passes.graphs) == (passes is None, passes)
        assert len(captured_graphs(engine)) == 1 + len(sizes)
        assert engine.generate([[1, 2]], SamplingParams(max_tokens=2))[0].tokens
    last = tables.prompts({"results": {"steady": {"prompts": rows}}}).splitlines()[-1]
    assert last.split("|")[1].strip() == "100"
