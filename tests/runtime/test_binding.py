"""What is set for a pass over a model is taken back after it."""

from __future__ import annotations

import pytest
import torch

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
