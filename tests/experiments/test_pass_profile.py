"""The experiments of passes, small: kernels are put into their groups, and loads are read."""

from __future__ import annotations

import argparse
from pathlib import Path

import pass_profile
import pass_sizes
import pytest

from trtllm_vattn.errors import ConfigError

LAYER = ["triton_norm", "nvjet_splitk_qkv", "cublaslt::splitkreduce", "_rotate_and_write", "attend_prompts"]
LAYER += ["decode_shares", "nvjet_o", "triton_norm", "sm90_xmma_gemm", "triton_silu", "nvjet_down"]


def launched(names: list[str], launch: int, took: float) -> list[pass_profile.Kernel]:
    """Kernels of so many us one after the other, with a us between."""
    return [pass_profile.Kernel(name, at * (took + 1), took, launch) for at, name in enumerate(names)]


def test_kernels_are_grouped_by_name_and_order() -> None:
    names = ["memcpy", "triton_embed", *LAYER * 3, "triton_norm", "nvjet_logits", "argmax"]
    # Decode steps, which are launches too, are shorter; what is no graph is left out.
    kernels = (
        launched(names, 1, 10.0) + launched(names, 2, 10.0) + launched(names, 3, 1.0) + launched(LAYER[:2], 4, 99.0)
    )
    groups, whole = pass_profile.grouped(kernels, 3, 64)
    assert whole["passes"] == 2
    assert whole["ms"] == pytest.approx((11 * len(names) - 1) / 1e3)
    assert whole["gaps_ms"] == pytest.approx((len(names) - 1) / 1e3)
    counts = {name: count for name, (count, _) in groups.items()}
    assert counts == {
        # The first norm among them, which is before any product.
        "inputs": 3,
        "qkv": 2 * 2,
        "o": 2,
        "gate and up": 2,
        "down": 2,
        pass_profile.LAST: 5,
        "rope and write": 3,
        "attention of prompts": 3,
        "attention of decode": 3,
        "norms and activation": 3 * 3,
        "logits": 1,
        "tokens": 1,
    }
    assert groups["qkv"][1] == pytest.approx(0.04)
    with pytest.raises(ConfigError, match="no launch has more than 12 kernels"):
        pass_profile.grouped(launched(LAYER[:5], 4, 9.0), 3, 64)


def test_loads_are_a_trace_a_number_and_a_rate() -> None:
    assert pass_sizes.load_of("generated:8:inf") == (None, 8, float("inf"))
    assert pass_sizes.load_of("some/azure.csv:3:2.5") == (Path("some/azure.csv"), 3, 2.5)
    assert pass_sizes.name_of(Path("x/AzureCode.csv"), 3, 2.5) == "azure, 3, 2.5 a second"
    with pytest.raises(argparse.ArgumentTypeError, match="TRACE:REQUESTS:RATE"):
        pass_sizes.load_of("azure.csv:8")
    rows = [
        {"max_step_tokens": size, "load": "azure, 3, at once", "total_token_throughput": rate, "p99_ttft_ms": ms}
        for size, rate, ms in ((2048, 100.0, 10.0), (4096, 110.0, 9.0))
    ]
    found = pass_sizes.summary(rows)
    assert found["total_token_throughput_4096_over_2048_azure_3_at_once"] == pytest.approx(1.1)
    assert found["p99_ttft_ms_4096_over_2048_azure_3_at_once"] == pytest.approx(0.9)
