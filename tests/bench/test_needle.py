"""Pairs found again behind an eviction, by a model that is trained in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from trtllm_vattn.bench.cases.needle import ASK, KEYS, VALUES, measured, needles, trained_model
from trtllm_vattn.bench.publish.plots import plot_compression

PAIRS = 16


def test_questions_ask_for_pairs_of_the_prompt() -> None:
    asked = needles(3, 1, PAIRS, 4)
    for prompt, forced, answers, before in zip(asked.prompts, asked.forced, asked.answers, asked.before, strict=True):
        pairs = dict(zip(prompt[: 2 * PAIRS : 2], prompt[1 : 2 * PAIRS : 2], strict=True))
        assert len(pairs) == PAIRS
        assert sorted(pairs.values()) == sorted(KEYS + np.arange(PAIRS) % VALUES)
        assert prompt[2 * PAIRS :: 2] == [ASK] * 4
        keys = forced[1::2]
        assert [pairs[key] for key in keys] == answers.tolist()
        assert [key in prompt[2 * PAIRS + 1 :: 2] for key in keys] == before.tolist()


def test_what_is_evicted_is_not_found(tmp_path: Path) -> None:
    """A trained model beats chance by far with everything kept, and with what FastGen's heads need; a window of the
    last tokens loses the pairs that are not in it."""
    model = trained_model(80, 0, PAIRS)
    rows = dict(measured(model, needles(8, 1, PAIRS, 4), [40], [0.9]))
    whole, h2o, window, fastgen = (rows[name] for name in ("whole", "h2o_40", "window_40", "fastgen_40"))
    assert whole["right"] > 0.4 > 4 * (1 / VALUES)
    assert (whole["kept"], whole["mean_kl"]) == (1, 0)
    assert h2o["kept"] == window["kept"] == pytest.approx(0.4, abs=0.02)
    assert window["right"] < whole["right"] - 0.2
    assert window["mean_kl"] > h2o["mean_kl"] > 0
    assert fastgen["kept"] < 0.8
    assert fastgen["right"] == whole["right"]
    assert fastgen["mean_kl"] < 1e-3
    pytest.importorskip("matplotlib")
    table = {"chance": 1 / VALUES, "prompt_tokens": 40, "rows": list(rows.values())}
    result = {"benchmark": "compression", "config": {}, "machine": {"gpu": None}, "results": {"needle": table}}
    plot_compression(json.loads(json.dumps(result)), tmp_path / "needle.png")
    assert (tmp_path / "needle.png").stat().st_size > 10_000
