"""What is set for a pass over a model is taken back after it; how long its sequences may be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sweep_families import tiny_config, tiny_model, verdict

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime import binding

GPU, HOST = torch.device("cuda:0"), torch.device("cpu")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Libraries asked for so far, the last one in force."""
    seen = ["cublas"]

    def choose(backend: str | None = None) -> str:
        if backend is not None:
            seen.append(backend)
        return seen[-1]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", choose)
    return seen


def test_products_are_cublas_lts_for_a_pass_alone(asked: list[str]) -> None:
    for _ in range(2):
        with binding._products_by_cublas_lt(GPU):
            assert asked[-1] == "cublaslt"
        assert asked[-1] == "cublas"
    with pytest.raises(ZeroDivisionError), binding._products_by_cublas_lt(GPU):
        raise ZeroDivisionError
    assert asked[-1] == "cublas"


def test_on_the_host_nothing_is_chosen(asked: list[str]) -> None:
    with binding._products_by_cublas_lt(HOST):
        assert asked == ["cublas"]


ROPE: list[tuple[dict[str, Any], int]] = [
    ({"rope_type": "default"}, 1024),
    ({"rope_type": "linear", "factor": 4.0}, 4096),
    ({"rope_type": "linear", "factor": 2.5}, 2560),
    # Original positions that are not named are max_position_embeddings, as transformers has it.
    ({"rope_type": "yarn", "factor": 4.0}, 4096),
    ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256}, 2048),
    # A configuration that names the longer context itself.
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
    (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 128,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        1024,
    ),
]


@pytest.mark.parametrize(("rope", "positions"), ROPE)
def test_rope_lengthens_what_may_be_asked(rope: dict[str, Any], positions: int) -> None:
    model = tiny_model(tiny_config("llama", max_position_embeddings=1024, rope_parameters={"rope_theta": 1e4, **rope}))
    assert binding.positions_of(model.config) == positions
    assert binding.shape_of(model, 1, positions).max_seq_len == positions
    with pytest.raises(
        ConfigError,
        match=f"max_seq_len is {positions + 1}, the model has {positions} positions; give {positions} or fewer",
    ):
        binding.shape_of(model, 1, positions + 1)


def test_the_least_stretched_kind_of_layers_bounds() -> None:
    by_kind = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = tiny_config("gemma3_text", max_position_embeddings=1024, rope_parameters=by_kind)
    assert binding.positions_of(config) == 1024


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_lengthened_models_give_transformers_tokens_beyond_their_original_positions(kind: str) -> None:
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
    config = tiny_config("llama", max_position_embeddings=32, rope_parameters=rope)
    assert verdict(config, longest=96) == ("right", "")
