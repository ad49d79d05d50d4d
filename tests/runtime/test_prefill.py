"""Chunks of several prompts in one pass: the same logits, K and V as one prompt after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from trtllm_vattn.attention.base import PrefillChunk
from trtllm_vattn.cache.base import FlatKV
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import UnmappedAccess
from trtllm_vattn.runtime import passes as passes_module
from trtllm_vattn.runtime import prefill as prefill_module
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.prefill import LONGEST_CAPTURED, PromptChunk, padded_length
from trtllm_vattn.runtime.sampling import SamplingParams

DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]
PROMPTS = [np.random.default_rng(n).integers(0, 512, n).tolist() for n in (90, 3, 60, 31, 130)]


@pytest.fixture(scope="module", params=DEVICES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return load_model("tiny-llama", request.param, torch.float32)


Build = Callable[..., Engine]


@pytest.fixture
def build(model: PreTrainedModel) -> Iterator[Build]:
    with ExitStack() as closing:

        def make(kind: str = "vattn", attention: str = "torch", capture: bool = False, **options: Any) -> Engine:
            cache = make_cache(kind, shape_of(model, 5, 256), model.device)
            options = {"chunk": 64, **options}
            engine = Engine(model, cache, attention=attention, compile=False, capture=capture, **options)
            closing.callback(engine.close)
            return engine

        yield make


def put_in(engine: Engine, chunks: list[tuple[int, int, int]]) -> list[PromptChunk]:
    """Chunks ``(prompt, start, end)`` of prompts that have slots."""
    return [
        PromptChunk(engine.cache.slot_of(prompt), PROMPTS[prompt][start:end], start) for prompt, start, end in chunks
    ]


STEPS = [[(0, 0, 64)], [(0, 64, 90), (1, 0, 3), (2, 0, 35)], [(2, 35, 60), (3, 0, 31), (4, 0, 8)]]


@pytest.mark.parametrize("kind", ["vattn", "paged", "blocks"])
@pytest.mark.parametrize("capture", [False, True])
@torch.inference_mode()
def test_logits_k_and_v_are_those_of_one_prompt_after_another(
    model: PreTrainedModel, build: Build, kind: str, capture: bool
) -> None:
    # The reference of TensorRT-LLM's kernels, on the host.
    attention = "xqa-fmha" if kind == "blocks" and model.device.type == "cpu" else "torch"
    together, apart = build(kind, attention, capture), build(kind, attention)
    for engine in (together, apart):
        for number, prompt in enumerate(PROMPTS):
            engine.cache.admit(number, len(prompt))
    for step in STEPS:
        got = together.prefill.run(put_in(together, step))
        want = torch.cat([apart.prefill.run([chunk]) for chunk in put_in(apart, step)])
        assert got.shape == want.shape == (len(step), 512)
        assert torch.allclose(got, want, atol=1e-4)
    for layer in range(together.cache.shape.num_layers):
        mine, theirs = together.cache.layer(layer), apart.cache.layer(layer)
        if isinstance(mine, FlatKV) and isinstance(theirs, FlatKV):
            for slot, length in ((0, 90), (1, 3), (2, 60), (3, 31), (4, 8)):
                for a, b in ((mine.k, theirs.k), (mine.v, theirs.v)):
                    assert torch.allclose(a[slot, :length], b[slot, :length], atol=1e-4)


def passes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each pass over the model from now on."""
    seen: list[int] = []
    forward = prefill_module.forward

    def counted(model: PreTrainedModel, tokens: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(len(tokens))
        return forward(model, tokens, *rest)  # type: ignore[arg-type]

    for module in (prefill_module, passes_module):
        monkeypatch.setattr(module, "forward", counted)
    return seen


def test_a_step_puts_a_whole_chunk_in_by_one_pass(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(chunk=64, prefix_cache=False)
    alone = build(chunk=64, prefix_cache=False)
    alone.prefill.supports_packed_prefill = alone.scheduler.mixed = False
    params = SamplingParams(3)
    want = [done.tokens for done in alone.generate(PROMPTS, params)]
    seen = passes(engine, monkeypatch)
    assert [done.tokens for done in engine.generate(PROMPTS, params)] == want
    # 314 tokens of prompts, 64 a step with those who decode, in the order of the requests; from the third pass on some
    # do, in rows before the prompts'. The last two are equal ones: 41 and 40, padded.
    assert seen == [64, 64, 80, 80, 80, 64]
    seen.clear()
    alone.generate(PROMPTS[1:4], params)
    assert seen == [16, 64, 16, 32]


@torch.inference_mode()
def test_short_prompts_are_replays_where_a_pass_takes_longer(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(capture=True, chunk=64)
    for prompt in (1, 3):
        engine.cache.admit(prompt, len(PROMPTS[prompt]))
    both = put_in(engine, [(1, 0, 3), (3, 0, 31)])
    prefill = engine.prefill
    seen = passes(engine, monkeypatch)
    prefill.replay_s = dict.fromkeys(prefill.runner.buckets, 1.0)
    prefill.pass_s = 2.0
    replayed = prefill.run(both)
    assert seen == []
    prefill.pass_s = 1.9
    assert torch.allclose(prefill.run(both), replayed, atol=1e-4)
    assert seen == [64]
    # One alone is a replay whatever that takes.
    prefill.run(both[:1])
    assert seen == [64]


def test_backends_get_rows_enough_and_aligned_lengths(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(chunk=64)
    seen: list[tuple[int, int, int]] = []
    prefill = engine.attention.prefill

    def noted(layer: int, q: torch.Tensor, chunk: PrefillChunk) -> torch.Tensor:
        if layer == 0:
            lengths = chunk.query_len, chunk.length
            assert all(length.shape == (1,) and length.data_ptr() % 64 == 0 for length in lengths)
            seen.append((len(q), int(chunk.query_len), int(chunk.length)))
        return prefill(layer, q, chunk)

    monkeypatch.setattr(engine.attention, "prefill", noted)
    engine.generate(PROMPTS[:3], SamplingParams(1))
    assert seen == [(64, 64, 64), (26, 26, 90), (16, 3, 3), (35, 35, 35), (32, 25, 60)]


def test_no_more_prompts_hold_memory_than_two_chunks_need(build: Build) -> None:
    engine = build(chunk=64)
    for prompt in PROMPTS:
        engine.submit(prompt, SamplingParams(1))
    engine.scheduler.admit()
    # 90 + 3 + 60 tokens; the next two chunks are 128.
    assert len(engine.scheduler.prefilling) == 3
    assert [len(chunk.tokens) for _, chunk in engine.scheduler.next_chunks()] == [64]
    engine.step()
    # The pass behind it, of 26, 3 and 35 tokens, is under way.
    assert [len(chunk.tokens) for _, chunk in engine.scheduler.next_chunks()] == [25, 31, 8]


def test_nothing_is_launched_where_one_of_them_has_no_memory(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build()
    engine.cache.admit(0, 8)
    seen = passes(engine, monkeypatch)
    with pytest.raises(UnmappedAccess):
        engine.prefill.run([PromptChunk(0, PROMPTS[0][:8], 0), PromptChunk(1, PROMPTS[1], 0)])
    assert not seen


def test_who_draws_and_who_does_not_in_one_pass(build: Build) -> None:
    mixed = [SamplingParams(4, temperature=0.9 * (i % 2), seed=i) for i in range(5)]
    alone = build()
    alone.prefill.supports_packed_prefill = alone.scheduler.mixed = False
    want = [alone.generate([prompt], params)[0].tokens for prompt, params in zip(PROMPTS, mixed, strict=True)]
    assert [done.tokens for done in build(chunk=256).generate(PROMPTS, mixed)] == want


def test_chunks_are_padded_to_what_is_captured_or_to_tiles() -> None:
    assert [padded_length(n, 2048) for n in (1, 17, 512, 513, 700, 2047)] == [16, 32, LONGEST_CAPTURED, 640, 768, 2048]
    assert padded_length(60, 64) == padded_length(700, 64) == 64
