"""Hits that are read in their owner's slot, and lanes that read once what they share: the same tokens as without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache as remember

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from trtllm_vattn.cache.prefix import Way
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.prefix_reading import Group, Origins, find_groups
from trtllm_vattn.runtime.sampling import SamplingParams

DRAW = np.random.default_rng(31)
BASE = DRAW.integers(0, 512, 60).tolist()
TAILS = [DRAW.integers(0, 512, 3).tolist() for _ in range(3)]


@remember
def model_of() -> PreTrainedModel:
    return load_model("tiny-llama", "cpu", torch.float32)


def engine_of(closing: ExitStack, **options: object) -> Engine:
    cache = make_cache("vattn", shape_of(model_of(), 10, 128), "cpu")
    given = {"attention": "torch", "compile": False, "max_running": 4, **options}
    return closing.enter_context(Engine(model_of(), cache, **given))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def wanted() -> Iterator[dict[str, list[list[int]]]]:
    """Tokens without reuse."""
    with ExitStack() as closing:
        plain = engine_of(closing, prefix_cache=False, capture=False)
        params = SamplingParams(9, temperature=1.0, seed=5, n=4)
        yield {
            "samples": [each.tokens for each in plain.generate([BASE], params)],
            "hits": [each.tokens for each in plain.generate([[*BASE, *tail] for tail in TAILS], SamplingParams(9))],
        }


@pytest.mark.parametrize(("capture", "attention"), [(True, "torch"), (False, "shares")])
def test_tokens_are_the_same_where_lanes_read_a_prefix_once(
    wanted: dict[str, list[list[int]]], capture: bool, attention: str
) -> None:
    with ExitStack() as closing:
        engine = engine_of(closing, capture=capture, attention=attention)
        prefixes = engine.slots.prefixes
        assert prefixes is not None
        assert Way.TABLE in prefixes.ways
        engine.decode.reading.least = 16
        samples = engine.generate([BASE], SamplingParams(9, temperature=1.0, seed=5, n=4))
        assert [each.tokens for each in samples] == wanted["samples"]
        # Three steps at least with four lanes, of which three do not read the prompt's 59 tokens themselves.
        before = engine.prefix_stats()
        forked = before["tokens_read_once"]
        assert forked >= 3 * 3 * 59
        prefixes.ways, prefixes.costs = frozenset({Way.TABLE}), replace(prefixes.costs, table_step_us=0)
        numbers = [engine.submit([*BASE, *tail], SamplingParams(9)) for tail in TAILS]
        got: dict[int, list[int | None]] = {number: [] for number in numbers}
        read_elsewhere = 0
        while engine.busy:
            for event in engine.step():
                got[event.request].append(event.token)
            segments = engine.cache.segments
            read_elsewhere = max(read_elsewhere, 0 if segments is None else len(segments))
            engine.cache.check_integrity()
        assert list(got.values()) == wanted["hits"]
        stats = engine.prefix_stats()
        assert stats["ways"]["table"] - before["ways"].get("table", 0) == 3
        assert "segments are read for" in stats["reasons"]["table"]
        assert read_elsewhere >= 3, "those kept read there too"
        assert stats["tokens_read_once"] >= forked + 3 * 2 * 59
        if capture:
            engine.audit().raise_if_foreign()


def test_without_hits_the_kernel_without_prefixes_runs() -> None:
    with ExitStack() as closing:
        engine = engine_of(closing, capture=False)
        used = []
        pick = engine.attention.pick
        engine.attention.pick = lambda *given: used.append(pick(*given)) or used[-1]  # type: ignore[method-assign]
        engine.generate([DRAW.integers(0, 512, 20).tolist() for _ in range(3)], SamplingParams(4))
        assert set(used) == {"torch"}
        assert engine.prefix_stats()["tokens_read_once"] == 0


def test_a_deterministic_engine_keeps_no_prefixes_and_shares_no_reading() -> None:
    with ExitStack() as closing:
        engine = engine_of(closing, capture=False, deterministic=True)
        assert engine.attention.prefixes is None
        assert engine.slots.prefixes is None


def test_groups_save_the_most_reading() -> None:
    origins = Origins()
    origins.begin(0)
    origins.begin(1, 0, 100)
    origins.begin(2, 1, 400)  # 100 tokens of slot 0's and 300 of slot 1's
    origins.begin(3, 1, 300)
    origins.begin(4)
    origins.begin(5, 4, 50)
    lanes = {slot: 10 + slot for slot in range(6)}
    longest = dict.fromkeys(range(6), 500)
    groups = find_groups(origins, lanes, longest, None, 16)
    assert groups == [Group(1, 300, (11, 12, 13)), Group(4, 50, (14, 15))]
    assert find_groups(origins, lanes, longest, None, 100) == groups[:1], "50 tokens do not repay a group"
    # A short sequence bounds what is shared; an idle slot is in no group.
    found = find_groups(origins, {1: 0, 2: 1, 3: 2}, {1: 500, 2: 500, 3: 120}, None, 16)
    assert found == [Group(1, 400, (0, 1))]
    assert not find_groups(origins, {0: 0, 4: 1}, longest, None, 16)


def test_a_group_reads_where_all_of_it_lies_in_one_slot() -> None:
    origins = Origins()
    origins.begin(0)
    origins.begin(1, 0, 100)
    origins.begin(2, 1, 200)
    lanes, longest = {1: 0, 2: 1}, {1: 500, 2: 500}
    # Both read slot 0 up to 100, and slot 2 reads the rest in slot 1: no slot has all 200.
    segments = np.array([[1, 0, 0, 100], [2, 0, 0, 100]])
    assert find_groups(origins, lanes, longest, segments, 16) == [Group(0, 100, (0, 1))]
    assert find_groups(origins, lanes, longest, np.array([[1, 7, 0, 300]]), 16)[0].tokens == 200
