"""The part of `bench attention` about decode over flat KV: what is measured on the host, and what results become."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from trtllm_vattn.bench.cases import attention, decode_attention, prompt_attention
from trtllm_vattn.bench.harness.timing import Kernels


def test_even_and_uneven_batches_are_timed_with_one_query_and_with_four() -> None:
    result = decode_attention.decode_points(Kernels("cpu", [4, 2, 16], torch.float32, 1), picks=3, seed=0)
    assert {(row["point"], row["system"], row["queries"]) for row in result["points"]} == {
        (point, "shares", queries) for point in decode_attention.ON_HOST for queries in (1, 4)
    }
    assert not result["refused"]
    assert {row["layer_bytes"] for row in result["points"] if row["point"] == "4 x 40"} == {160 * 2 * 2 * 16 * 4}
    assert list(decode_attention.summary(result)) == ["queries_4_over_1"]
    shown = attention.PARTS["decode"].show(result)
    assert "| 8 uneven" in shown
    assert "vllm-fa3: FlashAttention-3 needs a GPU" in shown


def measured() -> dict[str, Any]:
    """As a GPU's results look: ours 100 us at one query and 102 at four, cuDNN's 98."""
    rows = [
        {"point": point, "system": system, "queries": queries, "layer_us": {"p50": us}, "layer_bytes": 400_000_000}
        for point in (*decode_attention.EVEN, *decode_attention.UNEVEN)
        for system, queries, us in (("shares", 1, 100.0), ("shares", 4, 102.0), ("cudnn", 1, 98.0))
    ]
    other = {"system": "shares-plain", "queries": 1, "layer_us": {"p50": 90.0}, "layer_bytes": 400_000_000}
    rows.append({"point": "256 uneven", **other})
    picks = [{"us": {"shares": 10.0, "cudnn": 8.0}, "picked_us": us} for us in (10.0, 8.0)]
    return {"points": rows, "read_limit": 5e12, "picks": picks, "refused": {}}


def test_the_summary_compares_with_the_read_limit_and_with_cudnn() -> None:
    assert decode_attention.summary(measured()) == {
        "uneven_64_of_read_limit": pytest.approx(0.8),
        "uneven_256_of_read_limit": pytest.approx(0.8 / 0.9),
        "own_even_over_cudnn": pytest.approx(100 / 98),
        "queries_4_over_1": pytest.approx(1.02),
        "picked_over_best": pytest.approx(1.125),
    }


def test_vllms_kernel_is_compared_where_it_is_there() -> None:
    found = measured()
    for point, us in (("64 uneven", 125.0), ("8 x 8192", 80.0)):
        row = {"point": point, "system": "vllm-fa3", "queries": 1, "layer_us": {"p50": us}, "layer_bytes": 1}
        found["points"].append(row)
    summary = decode_attention.summary(found)
    assert summary["own_over_vllm_fa3_64_uneven"] == pytest.approx(0.8)
    assert summary["own_over_vllm_fa3_worst"] == pytest.approx(1.25)


def test_what_was_refused_is_not_summed_up() -> None:
    result = decode_attention.decode_points(Kernels("cpu", [4, 3, 16], torch.float32, 1), picks=1, seed=0)
    assert set(result["refused"]) == set(decode_attention.ON_HOST)
    assert decode_attention.summary(result) == {}


def test_random_batches_are_of_many_kinds_and_fit() -> None:
    rng, kinds = np.random.default_rng(0), set()
    for _ in range(200):
        kind, lengths = decode_attention.random_lengths(rng, 16, 500)
        kinds.add(kind)
        assert lengths.shape == (16,)
        assert lengths.max() <= 500
        assert lengths.any()
        assert kind == "half idle" or lengths.min() >= 1
    assert len(kinds) == 7


def test_prompts_are_measured_by_whoever_is_there() -> None:
    result = prompt_attention.prompt_points(Kernels("cpu", [4, 2, 16], torch.float32, 1))
    assert [(row["rows"], row["length"], row["kernel"]) for row in result["points"]] == [
        (*point, "torch") for point in prompt_attention.ON_HOST
    ]
    assert set(result["missing"]) == {"vllm-fa3", "flashinfer-fa3"}
    assert prompt_attention.summary(result) == {}, "no chunk of 2,048 tokens on the host"
    assert "flashinfer-fa3: FlashAttention-3 needs a GPU" in attention.PARTS["prompts"].show(result)


def test_the_fastest_kernel_that_reads_fixed_addresses_is_named() -> None:
    rows = [
        {"rows": 2048, "length": 2048, "kernel": kernel, "layer_us": {"p50": us}}
        for kernel, us in (("triton", 110.0), ("gathered", 90.0), ("vllm-fa3", 80.0))
    ]
    assert prompt_attention.summary({"points": rows, "missing": {}}) == {
        "prompt_2048_us": 80.0,
        "prompt_2048_provider": "vllm-fa3",
        "prompt_2048_triton_us": 110.0,
        "prompt_2048_gathered_us": 90.0,
        "prompt_2048_vllm_fa3_us": 80.0,
    }
    only = prompt_attention.summary({"points": rows[:2], "missing": {}})
    assert only["prompt_2048_provider"] == "triton"
