"""What is set for a pass over a model is taken back after it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from trtllm_vattn.runtime import binding

GPU, HOST = torch.device("cuda:0"), torch.device("cpu")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Libraries asked for so far, the last one in force; choosing warns the first time, as torch does."""
    seen = ["cublas"]

    def choose(backend: str | None = None) -> str:
        if backend == "cublaslt" and "cublaslt" not in seen:
            warnings.warn("torch.backends.cuda.preferred_blas_library is an experimental feature.", stacklevel=2)
        if backend is not None:
            seen.append(backend)
        return seen[-1]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", choose)
    binding._say_nothing_of_cublas_lt.cache_clear()
    yield seen
    binding._say_nothing_of_cublas_lt.cache_clear()


def test_products_are_cublas_lts_for_a_pass_alone(asked: list[str]) -> None:
    for _ in range(2):
        with binding._products_by_cublas_lt(GPU):
            assert asked[-1] == "cublaslt"
        assert asked[-1] == "cublas"
    with pytest.raises(ZeroDivisionError), binding._products_by_cublas_lt(GPU):
        raise ZeroDivisionError
    assert asked[-1] == "cublas"


def test_only_the_first_pass_touches_what_warnings_are_told(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with binding._products_by_cublas_lt(GPU):
        pass
    monkeypatch.setattr(warnings, "catch_warnings", None)
    with binding._products_by_cublas_lt(GPU):
        assert asked[-1] == "cublaslt"


def test_on_the_host_nothing_is_chosen(asked: list[str]) -> None:
    with binding._products_by_cublas_lt(HOST):
        assert asked == ["cublas"]
