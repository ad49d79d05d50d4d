"""Benchmarks are small here."""

from __future__ import annotations

import pytest

from trtllm_vattn.runtime.models import SHAPES


@pytest.fixture(autouse=True)
def one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a benchmark counts and says, one layer shows; its heads are so large that a token takes as many bytes."""
    monkeypatch.setitem(SHAPES, "tiny-llama", {**SHAPES["tiny-llama"], "num_hidden_layers": 1, "head_dim": 64})
