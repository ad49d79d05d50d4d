"""The engine over tiny models: transformers' own tokens, whatever the cache, the mode, and who else is in the batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache as remember

import numpy as np
import pytest
import torch
from ties import agree, by_request
from transformers import PreTrainedModel

from trtllm_vattn.cache.select import CACHES, COMPARED, make_cache
from trtllm_vattn.errors import ConfigError, SequenceTooLong, UnmappedAccess
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.request import StepRecord
from trtllm_vattn.runtime.sampling import SamplingParams

FAMILIES = ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-mistral"]
PROMPTS = [np.random.default_rng(n).integers(0, 512, n).tolist() for n in (3, 40, 1, 16, 75, 33)]
COMBINATIONS = [(kind, capture) for kind in COMPARED for capture in (False, True)]


@remember
def own_tokens(name: str, count: int) -> list[list[int]]:
    """What transformers' generate gives for `PROMPTS`, greedy, each alone."""
    model = load_model(name, "cpu", torch.float32)
    tokens = []
    for prompt in PROMPTS:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        tokens.append(out[0, len(prompt) :].tolist())
    return tokens


@remember
def model_of(name: str) -> PreTrainedModel:
    return load_model(name, "cpu", torch.float32)


def engine_of(
    kind: str, capture: bool, name: str = "tiny-llama", budget: int | None = None, **options: object
) -> Engine:
    model = model_of(name)
    cache = make_cache(kind, shape_of(model, 4, 128), "cpu", budget)
    return Engine(model, cache, capture=capture, compile=False, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=COMBINATIONS, ids=lambda pair: f"{pair[0]}-{'captured' if pair[1] else 'eager'}")
def served(request: pytest.FixtureRequest) -> Iterator[Engine]:
    kind, capture = request.param
    with engine_of(kind, capture) as made:
        yield made


@pytest.fixture
def engine(served: Engine) -> Iterator[Engine]:
    """One engine for all tests of a combination; each leaves it idle, and as it was built."""
    yield served
    served.observer, served.record_margins = None, False
    for request in [*served.scheduler.requests]:
        served.abort(request)
    assert served.cache.stats().sequences == 0
    served.cache.check_integrity()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("kind", "capture"), [("vattn", True), ("contiguous", False)])
def test_every_family_gives_transformers_tokens(name: str, kind: str, capture: bool) -> None:
    with engine_of(kind, capture, name) as engine:
        done = engine.generate(PROMPTS, SamplingParams(max_tokens=12))
    assert [completion.tokens for completion in done] == own_tokens(name, 12)
    assert {completion.finish_reason for completion in done} == {"length"}
    assert [completion.prompt_len for completion in done] == [len(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("kind", [kind for kind in CACHES if kind not in COMPARED])
def test_every_other_cache_gives_the_same(kind: str) -> None:
    with engine_of(kind, capture=True) as engine:
        done = engine.generate(PROMPTS, SamplingParams(max_tokens=12))
        engine.cache.check_integrity()
    assert [completion.tokens for completion in done] == own_tokens("tiny-llama", 12)


def test_requests_that_join_late_change_nobodys_tokens(engine: Engine) -> None:
    want = own_tokens("tiny-llama", 12)
    tokens: dict[int, list[int]] = {}
    numbers = [engine.submit(PROMPTS[0], SamplingParams(max_tokens=12))]
    for step in range(60):
        if step % 3 == 2 and len(numbers) < len(PROMPTS):
            numbers.append(engine.submit(PROMPTS[len(numbers)], SamplingParams(max_tokens=12)))
        for event in engine.step():
            tokens.setdefault(event.request, []).append(event.token)
    assert not engine.busy
    assert [tokens[number] for number in numbers] == want


@pytest.mark.parametrize(("kind", "capture"), COMBINATIONS)
def test_prompts_that_go_in_by_chunks_give_the_same(kind: str, capture: bool) -> None:
    chunks = []
    with engine_of(kind, capture, chunk=32) as engine:
        launched = engine.scheduler.launched
        engine.scheduler.launched = lambda plan: chunks.extend(chunk for _, chunk in plan.chunks) or launched(plan)  # type: ignore
        done = engine.generate(PROMPTS, SamplingParams(max_tokens=12))
    assert [completion.tokens for completion in done] == own_tokens("tiny-llama", 12)
    assert max(len(chunk.tokens) for chunk in chunks) == 32
    assert sum(len(chunk.tokens) for chunk in chunks) == sum(map(len, PROMPTS))


@pytest.mark.parametrize("kind", ["paged", "vattn"])
def test_memory_that_runs_out_preempts_and_gives_the_same(kind: str) -> None:
    token_bytes = shape_of(model_of("tiny-llama"), 1, 128).token_bytes
    seen: list[StepRecord] = []
    with engine_of(kind, True, budget=132 * token_bytes, observer=seen.append) as engine:
        done = engine.generate(PROMPTS, SamplingParams(max_tokens=12))
        assert [completion.tokens for completion in done] == own_tokens("tiny-llama", 12)
        engine.cache.check_integrity()
    # Preempted requests are prefilled again.
    assert sum(record.prefilled for record in seen) > sum(map(len, PROMPTS))


def test_stop_tokens_end_a_request_and_are_part_of_it(engine: Engine) -> None:
    want = own_tokens("tiny-llama", 12)[1]
    (done,) = engine.generate([PROMPTS[1]], SamplingParams(max_tokens=12, stop_token_ids=(want[4], 511)))
    first = want.index(want[4])
    assert done.tokens == want[: first + 1]
    assert done.finish_reason == "stop"


def test_tokens_stream_as_they_come(engine: Engine) -> None:
    number = engine.submit(PROMPTS[0], SamplingParams(max_tokens=5))
    stream = engine.run()
    first = next(stream)
    assert engine.busy
    rest = list(stream)
    assert [event.token for event in (first, *rest)] == own_tokens("tiny-llama", 12)[0][:5]
    assert {event.request for event in rest} == {number}
    assert [event.finish_reason for event in rest] == [None, None, None, "length"]


def test_an_aborted_request_leaves_the_others_alone(engine: Engine) -> None:
    numbers = [engine.submit(prompt, SamplingParams(max_tokens=12)) for prompt in PROMPTS]
    tokens: dict[int, list[int]] = {number: [] for number in numbers}
    for step in range(4):
        if step == 3:
            engine.abort(numbers[1])
            engine.abort(numbers[5])
        for event in engine.step():
            tokens[event.request].append(event.token)
    for event in engine.run():
        tokens[event.request].append(event.token)
    want = own_tokens("tiny-llama", 12)
    for index in (0, 2, 3, 4):
        assert tokens[numbers[index]] == want[index]
    assert len(tokens[numbers[1]]) < 12
    with pytest.raises(ConfigError, match="no request 999"):
        engine.abort(999)


def test_forced_tokens_are_fed_and_chosen_ones_reported(engine: Engine) -> None:
    want = own_tokens("tiny-llama", 12)[1]
    engine.record_margins = True
    forced = [*want[:5], 7, *want[6:]]
    engine.submit(PROMPTS[1], SamplingParams(max_tokens=12), forced=forced)
    events = list(engine.run())
    assert [event.token for event in events[:6]] == want[:6]
    assert [event.token for event in events] != want
    assert all(event.margin is not None and event.margin >= 0 for event in events)


@pytest.mark.parametrize(
    "params", [SamplingParams(12, 0.8, seed=3), SamplingParams(12, 1.5, top_p=0.9, top_k=50, seed=4)]
)
def test_a_seed_decides_the_tokens_whoever_else_runs(engine: Engine, params: SamplingParams) -> None:
    (alone,) = engine.generate([PROMPTS[1]], params)
    among = engine.generate(PROMPTS, [SamplingParams(12), params, *[SamplingParams(12, 2.0, seed=n) for n in range(4)]])
    assert among[1].tokens == alone.tokens
    assert among[0].tokens == own_tokens("tiny-llama", 12)[0]
    (other,) = engine.generate([PROMPTS[1]], SamplingParams(12, 1.5, seed=99))
    assert other.tokens != alone.tokens


def test_steps_are_reported(engine: Engine) -> None:
    seen: list[StepRecord] = []
    engine.observer = seen.append
    # Prompts that no other test has, so that nothing of them is in the cache.
    engine.generate([[511, 2, 3], list(range(480, 496))], SamplingParams(max_tokens=5))
    assert [record.lanes for record in seen] == [2, 2, 2, 2, 2]
    assert [record.prefilled for record in seen] == [19, 0, 0, 0, 0]
    assert all(0 < record.kv_s + record.ahead_s < record.wall_s for record in seen)


@pytest.mark.parametrize(
    ("prompt", "params", "forced", "error", "message"),
    [
        ([], SamplingParams(1), None, ConfigError, "the prompt is empty"),
        ([1, 512], SamplingParams(1), None, ConfigError, "token ids outside 0 to 511"),
        ([-1], SamplingParams(1), None, ConfigError, "token ids outside"),
        ([1] * 100, SamplingParams(30), None, SequenceTooLong, "100 tokens and max_tokens 30 exceed max_seq_len 128"),
        ([1], SamplingParams(3), [1, 2], ConfigError, "2 tokens to force, 3 needed"),
        ([1], SamplingParams(2), [1, 512], ConfigError, "forced has token ids outside 0 to 511"),
    ],
)
def test_bad_requests_are_refused_and_not_queued(
    prompt: list[int], params: SamplingParams, forced: list[int] | None, error: type[Exception], message: str
) -> None:
    with engine_of("vattn", False) as engine:
        with pytest.raises(error, match=message):
            engine.submit(prompt, params, forced)
        assert not engine.busy
        with pytest.raises(ConfigError, match="2 prompts and 1 sampling parameters"):
            engine.generate([[1], [2]], [SamplingParams()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -2}, "top_k is -2"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, r"seed is 1\.5"),
    ],
)
def test_bad_sampling_parameters_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**options)  # type: ignore[arg-type]


def test_models_and_caches_that_do_not_fit_are_refused() -> None:
    model = model_of("tiny-llama")
    with pytest.raises(ConfigError, match="max_seq_len is 20000, the model has 16384 positions"):
        shape_of(model, 1, 20000)
    with pytest.raises(ConfigError, match="no model 'gpt-5': it is no directory here, none of the shapes tiny-llama"):
        load_model("gpt-5", "cpu", torch.float32)
    with (
        make_cache("contiguous", shape_of(model, 1, 16), "cpu") as cache,
        pytest.raises(ConfigError, match="chunk is 0"),
    ):
        Engine(model, cache, chunk=0)
    wrong = replace(shape_of(model, 1, 16), dtype=torch.float64, head_dim=8)
    with (
        make_cache("vattn", wrong, "cpu") as cache,
        pytest.raises(
            ConfigError, match=r"head_dim is 8, the model's 32; dtype is torch.float64, the model's torch.flo"
        ),
    ):
        Engine(model, cache)
    windowed = load_model("tiny-mistral", "cpu", torch.float32)
    windowed.config.sliding_window = 64
    assert set(shape_of(windowed, 1, 128).windows) == {64}
    assert not any(shape_of(windowed, 1, 64).windows)


def test_a_local_checkpoint_is_loaded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    fresh = load_model("tiny-qwen3", "cpu", torch.float32, seed=5)
    fresh.save_pretrained(tmp_path / "model")
    with Engine.from_pretrained(str(tmp_path / "model"), device="cpu", max_seq_len=64) as engine:
        (loaded,) = engine.generate([PROMPTS[1]], SamplingParams(max_tokens=6))
    cache = make_cache("contiguous", shape_of(fresh, 1, 64), "cpu")
    with Engine(fresh, cache, capture=False) as engine:
        (direct,) = engine.generate([PROMPTS[1]], SamplingParams(max_tokens=6))
    assert loaded.tokens == direct.tokens
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"a directory without a config\.json"):
        load_model(str(tmp_path / "empty"), "cpu", torch.float32)


def test_a_bound_model_outside_its_engine_says_so() -> None:
    with engine_of("vattn", False) as engine, pytest.raises(ConfigError, match="run it through its Engine"):
        engine.model(torch.tensor([[1, 2]]))


def test_a_step_beyond_the_frontier_is_not_launched() -> None:
    with engine_of("vattn", True) as engine:
        engine.submit(PROMPTS[0], SamplingParams(max_tokens=5))
        engine.step()
        engine.cache.frontiers[0] = 3
        with pytest.raises(UnmappedAccess, match="sequence 0 in slot 0"):
            engine.decode.launch()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", COMPARED)
@pytest.mark.parametrize("attention", ["torch", "cudnn"])
def test_captured_and_eager_agree_on_the_card(kind: str, attention: str) -> None:
    from trtllm_vattn.attention.select import available

    if available()[attention] != "yes":
        pytest.skip(available()[attention])
    dtype = torch.float32 if attention == "torch" else torch.bfloat16
    model = load_model("llama-3.2-1b" if attention == "cudnn" else "tiny-llama", "cuda:0", dtype)
    vocab = model.config.vocab_size
    prompts = [np.random.default_rng(n).integers(0, vocab, n).tolist() for n in (3, 40, 1, 16, 75, 33)]
    outputs = []
    for capture in (False, True):
        cache = make_cache(kind, shape_of(model, 4, 128), "cuda:0")
        with Engine(model, cache, attention=attention, capture=capture, compile=False, record_margins=True) as engine:
            numbers = [engine.submit(prompt, SamplingParams(max_tokens=12)) for prompt in prompts]
            events = list(engine.run())
            engine.cache.check_integrity()
        outputs.append(by_request(events, numbers))
    agree(*outputs)
