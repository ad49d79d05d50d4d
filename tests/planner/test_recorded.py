"""Predictions against results that were recorded on an H200 and not used for its numbers.

Used, by scripts/experiments/default_calibrations.py, are of graph_batches.json and graph_small.json the steps of 1, 8,
32, 128 and 256 sequences, of tlb.json random reads of 512 bytes over 110 and 130 GB with 32 layers a row, of attention
the chunks at 2,048 and 32,768 tokens, alloc.json, multistep.json, graph_rows_8.json's attention alone, and
burst_rows_8_*.json. All else is held out.
"""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm_vattn.planner import CostModel, Layout, ModelShape
from trtllm_vattn.planner.calibration import DATA, Calibration, load, named
from trtllm_vattn.runtime.models import SHAPES

RESULTS = Path(__file__).parents[2] / "scripts" / "results" / "h200"
PAGE = 2 << 20
LLAMA = ModelShape.from_config("llama-3-8b", SHAPES["llama-3-8b"])
SMALL = ModelShape.from_config("llama-3.2-1b", SHAPES["llama-3.2-1b"])
AT_ONCE = ("vattn", "azure", "offline")
SOLVED = {1, 8, 32, 128, 256}


@cache
def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


@pytest.fixture(scope="module")
def card() -> Calibration:
    return load(DATA / "h200.json")


def step_errors(
    card: Calibration, name: str, shape: ModelShape, layers: int, but: set[int] = frozenset()
) -> list[float]:  # type: ignore[assignment]
    """Of captured steps, by batch, as part of what was measured."""
    model, layout = CostModel(shape, card), Layout(shape, PAGE, layers)
    return [
        1e3 * model.step_s(layout, row["batch"], row["batch"] * row["mean_length"]) / row["step_ms"]["p50"] - 1
        for row in result(name)["results"]["steady"]["runs"]
        if (row["cache"], row["mode"]) == ("vattn", "captured") and row["batch"] not in but
    ]


@pytest.mark.parametrize(
    ("name", "layers", "but"),
    [
        ("graph_batches", 16, SOLVED),
        ("graph", 16, set()),
        ("graph_rows_16", 16, set()),
        ("graph_rows_8", 8, set()),
        ("graph_rows_32", 32, set()),
        # One sequence's kernels are tuned on each machine, and differ by more: 4.28, 4.62 and 4.88 ms were found.
        ("graph_steady", 16, {1}),
        ("graph_after_house", 16, {1}),
        ("graph_before_house", 16, {1}),
    ],
)
def test_steps_are_within_five_percent(card: Calibration, name: str, layers: int, but: set[int]) -> None:
    errors = step_errors(card, name, LLAMA, layers, but)
    assert errors
    assert max(map(abs, errors)) < 0.05


def test_steps_of_another_model_are_within_six_percent(card: Calibration) -> None:
    assert max(map(abs, step_errors(card, "graph_small", SMALL, 16, SOLVED))) < 0.06


def test_random_reads_are_within_six_percent(card: Calibration) -> None:
    model = CostModel(LLAMA, card)
    errors = []
    for row in result("tlb")["results"]["reads"]:
        used = row["read_bytes"] == 512 and row["working_set_gb"] > 100 and row["layers_per_range"] == 32
        # With a layer a row, neighbours in a range lie apart in memory, though they were mapped in order.
        apart = row["layers_per_range"] == 1 or row["order"] == "scattered"
        if row["order"] in ("in order", "scattered") and not used:
            predicted = model.random_read_s(1e9, row["read_bytes"], 1e9 * row["working_set_gb"], scattered=apart)
            errors.append(1 / (predicted * row["gb_per_s"]) - 1)
    assert len(errors) > 100
    assert max(map(abs, errors)) < 0.06


def test_reach_and_misses_of_another_card_are_the_same(card: Calibration) -> None:
    """Reads of 512 bytes over shuffled pages as read off in another run: 2,020 and 1,499 GB/s over 96 and 128 GB."""
    model = CostModel(LLAMA, card)
    for gb, rate in ((96, 2020), (128, 1499)):
        predicted = 1 / model.random_read_s(1e9, 512, 1e9 * gb, scattered=True)
        # Its reach came out at 56 GB instead of 68.
        assert predicted == pytest.approx(rate, rel=0.45)
    assert model.random_read_s(1e9, 4096, 128e9, scattered=True) == 1e9 / card["read_bytes_per_s"]


@pytest.mark.parametrize(("kind", "prompts"), [("bursts", None), ("trace_bursts", "tokens")])
def test_bursts_make_the_calls_and_take_the_time_that_was_recorded(
    card: Calibration, kind: str, prompts: str | None
) -> None:
    """burst.json's layout and its trace: handles exactly; driver time and window, the best of rounds, within 35 %."""
    model, found = CostModel(LLAMA, card), result("burst")["results"]
    tokens = np.array(found["trace_prompts"][prompts]) if prompts else np.full(128, 2048)
    for variant, classes, created in (
        ("vattn, warm stock", 8, False),
        ("vattn, cold", 8, True),
        ("page by page", 1, True),
    ):
        layout = Layout(LLAMA, PAGE, 16, None, classes)
        rows = [row for row in found[kind] if row["variant"] == variant]
        handles = int(layout.handles(tokens).sum())
        assert {row["mappings"] for row in rows} == {handles}
        driver_ms = 1e-3 * handles * model.handle_us(layout.handle_bytes(tokens), created)
        assert driver_ms == pytest.approx(min(row["map_ms"] for row in rows), rel=0.35)
        window_ms = 1e3 * model.window_s(layout, tokens, created)
        assert window_ms == pytest.approx(min(row["window_ms"] for row in rows), rel=0.35)


def test_prompts_of_a_served_burst_set_its_itl(card: Calibration) -> None:
    """serve_vllm.json, our side: everything at once, passes of 4,096 rows: ITL p99 within 15 %."""
    model, layout = CostModel(LLAMA, card), Layout(LLAMA, PAGE, 16)
    runs = result("serve_vllm")["results"]["runs"]
    (measured,) = (row["p99_itl_ms"] for row in runs if (row["engine"], row["trace"], row["kind"]) == AT_ONCE)
    # Azure's code trace: prompts of a lognormal, 1,469 at the median and cut at 7,437, and outputs of 28 on average, by
    # which 24 sequences decode.
    prompts = np.minimum(np.random.default_rng(0).lognormal(np.log(1469), 0.8, 512), 7437).astype(int)
    predicted = model.burst_itl_s(layout, 24, 24 * 2100, 4096, prompts)
    assert 1e3 * predicted == pytest.approx(measured, rel=0.15)


def test_a_chunk_of_a_prompt_within_eight_percent(card: Calibration) -> None:
    """attention.json's chunks of 2,048 rows at the end of 8,192 and of 131,072 tokens."""
    us = {r["point"]: r["prefill_us"]["p50"] for r in result("attention")["results"]["points"] if r["system"] == "flat"}
    for point, end in (("8 x 8192", 8192), ("3 x 131072", 131072)):
        flops = LLAMA.pair_flops * 2048 * (end - 1024)
        # A kernel over a gathered copy, whose launch is longer than that of captured prompts.
        assert 1e6 * flops / card["prompt_attention_flops_per_s"] == pytest.approx(us[point], rel=0.16)


def test_mapping_beside_steps_costs_them_nothing_as_recorded(card: Calibration) -> None:
    """policy.json: steps beside which memory is mapped took 1.0014 of those without; the formula says 1."""
    model, layout = CostModel(LLAMA, card), Layout(LLAMA, PAGE, 16)
    steps = {row["policy"]: row["step_ms"]["p50"] for row in result("policy")["results"]["runs"]}
    assert steps["concurrent"] / steps["no mapping"] == pytest.approx(1, rel=0.005)
    step_s = model.step_s(layout, 32, 32 * 2048)
    assert 1e3 * step_s == pytest.approx(steps["concurrent"], rel=0.05)
    assert model.beside_s(layout, 32) < step_s


def test_packaged_numbers_are_those_that_the_results_give() -> None:
    made = importlib.import_module("default_calibrations").MADE
    for name, make in made.items():
        assert make().as_dict() == json.loads((DATA / f"{name}.json").read_text())


def test_an_h100_is_an_estimate_of_a_slower_memory() -> None:
    h100, h200 = named("h100"), load(DATA / "h200.json")
    assert not h200.estimated
    assert h100.estimated == frozenset(h100.sources)
    layout = Layout(LLAMA, PAGE, 16)
    # Bound by memory: the step is longer by nearly the ratio of the data sheets; the many rows of a prompt are not.
    ratio = CostModel(LLAMA, h100).step_s(layout, 64, 64 * 2048) / CostModel(LLAMA, h200).step_s(layout, 64, 64 * 2048)
    assert 1.25 < ratio < 4.8 / 3.35
    assert h100.weights_s(1e9, 2048) == h200.weights_s(1e9, 2048)
