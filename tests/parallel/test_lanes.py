"""Lanes of several ranks: kernels that would not be alike are refused at the start."""

from __future__ import annotations

import pytest
import torch

from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.parallel.engine import LeadingEngine


def test_ranks_that_measured_different_kernels_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("tiny-llama", "cpu", torch.float32)
    cache = make_cache("vattn", shape_of(model, 2, 64), "cpu")
    monkeypatch.setattr("trtllm_vattn.runtime.parallel.engine.numbers_of_all", lambda number: [number, 1 - number])
    with pytest.raises(ConfigError, match="different kernels of attention"), cache:
        LeadingEngine(model, cache, compile=False, prefix_cache=False, packed=True)
