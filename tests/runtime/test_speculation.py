"""Speculative decoding: the tokens of every request are those without drafts, whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import cache as remember
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from interrupting import instructions_of, interrupt_at
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trtllm_vattn.attention.picked import PickedAttention
from trtllm_vattn.attention.reference import TorchAttention
from trtllm_vattn.cache.base import CacheShape, FlatKV
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError, DriverError
from trtllm_vattn.runtime import speculation_draft
from trtllm_vattn.runtime.binding import VerifyStep, shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import SHAPES
from trtllm_vattn.runtime.request import StepRecord, TokenEvent
from trtllm_vattn.runtime.sampling import SamplingParams, keys_at
from trtllm_vattn.runtime.speculation import DraftLength, Speculation
from trtllm_vattn.runtime.speculation_step import REPORTS, advance_verified, look_up
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import FaultyDriver

LENGTH = 96


def repeating(period: int, length: int) -> list[int]:
    """A prompt that repeats itself."""
    phrase: list[int] = np.random.default_rng(period).integers(0, 512, period).tolist()
    return (phrase * length)[:length]


PROMPTS = [repeating(3, 30), repeating(5, 22), repeating(7, 7), repeating(1, 9), repeating(16, 55)]
PARAMS = [
    SamplingParams(24),
    SamplingParams(20, temperature=0.7, seed=5),
    SamplingParams(12),
    SamplingParams(22, temperature=0.3, seed=6, top_k=20, top_p=0.9),
    SamplingParams(18),
]


@remember
def model_of(noise: float = 0.0, vocab: int = 512) -> PreTrainedModel:
    """One layer; with `noise`, another one much like it, for drafts."""
    small = {**SHAPES["tiny-llama"], "num_hidden_layers": 1, "head_dim": 16, "vocab_size": vocab}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**small, eos_token_id=None), dtype=torch.float32)
    with torch.no_grad():
        for each in model.parameters():
            each += noise * each.std() * torch.randn_like(each)
    return model


Build = Callable[..., Engine]
DRIVERS: dict[Engine, FaultyDriver] = {}
"""Of engines that `build` built."""


@pytest.fixture
def build() -> Iterator[Build]:
    with ExitStack() as closing:

        def make(slots: int = 3, budget: int | None = None, length: int = LENGTH, **options: Any) -> Engine:
            driver = FaultyDriver(HostDriver())
            kind, host = options.pop("kind", "vattn"), options.pop("host_memory", 0)
            cache = make_cache(
                kind, shape_of(model_of(), slots, length), "cpu", budget, driver=driver, host_memory=host
            )
            closing.callback(cache.close)
            usual = {"attention": "torch", "compile": False, "capture": False, "mapping": "between-steps"}
            engine = Engine(model_of(), cache, **{**usual, **options})
            closing.callback(engine.close)
            DRIVERS[engine] = driver
            if engine.decode.speculator is not None:
                # On the host drafts cost what they save; what is not known is not minded.
                engine.decode.speculator.length.seconds.clear()
            return engine

        yield make
    DRIVERS.clear()


@remember
def wanted() -> list[list[int]]:
    cache = make_cache("contiguous", shape_of(model_of(), 3, LENGTH), "cpu")
    with Engine(model_of(), cache, attention="torch", compile=False, capture=False) as engine:
        return [done.tokens for done in engine.generate(PROMPTS, PARAMS)]


def by_request(events: Sequence[TokenEvent]) -> dict[int, list[int | None]]:
    """Tokens by request; each comes once, in order."""
    got: dict[int, list[int | None]] = {}
    for event in events:
        tokens = got.setdefault(event.request, [])
        if event.token is not None:
            assert event.index == len(tokens)
            tokens.append(event.token)
    return got


# -- the same tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drafts", "options"),
    [
        (3, {}),
        (7, {"packed": True, "prefix_cache": False}),
        (1, {"capture": True, "buckets": [2], "attention": "shares", "slots": 2, "chunk": 32}),
        (2, {"kind": "contiguous", "chunk": 16}),
    ],
)
def test_tokens_are_those_without_drafts(build: Build, drafts: int, options: dict[str, Any]) -> None:
    engine = build(speculation=Speculation(num_speculative_tokens=drafts, prompt_lookup_min=1), **options)
    records: list[StepRecord] = []
    engine.observer = records.append
    assert [done.tokens for done in engine.generate(PROMPTS, PARAMS)] == wanted()
    stats = engine.speculation_stats()
    assert 0 < stats["accepted"] < stats["drafted"]
    assert stats["accepted"] == sum(record.accepted for record in records)
    assert stats["drafted"] == sum(record.drafted for record in records)
    assert stats["accepted_per_step"] > 0
    assert set(stats["steps"]) <= {0, drafts}
    # More than one launch's: the next one is started before the drafts of the last are known to be wrong.
    assert drafts < stats["overshoot"] <= stats["most_overshoot"] == 2 * drafts
    assert engine.cache.stats().sequences == 0
    if options.get("capture"):
        assert not engine.audit().findings
        assert any("with 1 drafts" in name for name in engine.audit().graphs)


def test_sampled_tokens_are_those_without_drafts_for_every_seed(build: Build) -> None:
    params = [SamplingParams(16, temperature=warmth, seed=seed) for seed in (1, 2) for warmth in (0.2, 0.5, 1.0)]
    prompts = PROMPTS[:3] * 2
    plain = [done.tokens for done in build().generate(prompts, params)]
    assert len({*map(tuple, plain)}) == len(plain)
    engine = build(speculation=Speculation(prompt_lookup_min=1))
    assert [done.tokens for done in engine.generate(prompts, params)] == plain
    assert engine.speculation_stats()["accepted"] > 0


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("attention", ["torch", "shares"])
@pytest.mark.parametrize("compile", [False, True])
def test_captured_steps_on_a_gpu_give_the_tokens_without_drafts(attention: str, compile: bool) -> None:
    # Float32, for tokens that do not hang on rounding. A kernel of such products takes Triton 20 s for heads of 128 and
    # 7 s for those of 64; and each further batch size is many graphs.
    small = {**SHAPES["tiny-llama"], "num_hidden_layers": 1, "head_dim": 64}
    found, accepted = [], []
    for way in (None, "ngram", "draft_model"):
        torch.manual_seed(0)
        with torch.device("cuda:0"):
            model, copy = (
                AutoModelForCausalLM.from_config(AutoConfig.for_model(**small, eos_token_id=None), dtype=torch.float32)
                for _ in range(2)
            )
        copy.load_state_dict(model.state_dict())
        drafts = copy if way == "draft_model" else None
        speculation = Speculation(way, prompt_lookup_min=1, model=drafts) if way else None
        cache = make_cache("vattn", shape_of(model, 2, LENGTH), "cuda:0")
        options: dict[str, Any] = {"attention": attention, "compile": compile, "buckets": [2], "prefix_cache": False}
        with Engine(model, cache, speculation=speculation, **options) as engine:
            if engine.decode.speculator is not None:
                engine.decode.speculator.length.seconds.clear()
            found.append([done.tokens for done in engine.generate(PROMPTS, PARAMS)])
            engine.audit().raise_if_foreign()
            accepted.append(engine.speculation_stats()["acceptance_rate"] if speculation else 0.0)
    assert found[1:] == found[:1] * 2
    assert accepted[2] > 0.95, accepted


def test_a_stop_token_among_accepted_drafts_ends_the_output(build: Build) -> None:
    engine = build(speculation=Speculation(num_speculative_tokens=7, prompt_lookup_min=1))
    tokens = wanted()[0]
    for place in range(4, 12, 2):
        stop = tokens[place]
        (done,) = engine.generate([PROMPTS[0]], SamplingParams(24, stop_token_ids=(stop,)))
        assert done.tokens == tokens[: tokens.index(stop) + 1]
        assert done.finish_reason == "stop"
    # What was kept of them is right.
    assert engine.generate([PROMPTS[0]], SamplingParams(24))[0].tokens == tokens
    engine.cache.check_integrity()


def test_logits_that_are_no_numbers_end_one_request(build: Build) -> None:
    engine = build(speculation=Speculation(prompt_lookup_min=1), prefix_cache=False)
    bad = 511
    weight = model_of().get_input_embeddings().weight
    before = weight[bad].clone()
    try:
        with torch.no_grad():
            weight[bad].fill_(torch.nan)
        good, wrong = engine.submit(PROMPTS[0], PARAMS[0]), engine.submit([3, bad, 4], SamplingParams(9))
        events = list(engine.run())
    finally:
        with torch.no_grad():
            weight[bad] = before
    assert by_request(events)[good] == wanted()[0]
    (end,) = [event for event in events if event.request == wrong]
    assert (end.finish_reason, end.token) == ("error", None)


# -- a draft model ---------------------------------------------------------------------------------------------------


def test_a_draft_model_that_is_a_copy_is_always_right(build: Build) -> None:
    """Also of sampled tokens, and behind passes in which others' prompts went in: it has the right tokens."""
    engine = build(speculation=Speculation("draft_model", model=copy_of(0.0)), slots=2, chunk=16)
    assert [done.tokens for done in engine.generate(PROMPTS, PARAMS)] == wanted()
    stats = engine.speculation_stats()
    assert stats["acceptance_rate"] == 1
    assert stats["accepted"] > 30
    assert draft_cache(engine).stats().sequences == 0


@pytest.mark.parametrize(
    ("drafts", "options"), [(7, {}), (1, {"capture": True, "buckets": [2], "packed": True, "slots": 2, "chunk": 32})]
)
def test_a_draft_model_that_errs_changes_no_token(build: Build, drafts: int, options: dict[str, Any]) -> None:
    speculation = Speculation("draft_model", num_speculative_tokens=drafts, model=copy_of(0.05))
    engine = build(speculation=speculation, **options)
    assert [done.tokens for done in engine.generate(PROMPTS, PARAMS)] == wanted()
    assert 0.2 < engine.speculation_stats()["acceptance_rate"] < 1
    draft_cache(engine).check_integrity()
    if options:
        assert not engine.audit().findings


def test_sequences_without_memory_in_the_draft_models_cache_go_on_without_drafts(build: Build) -> None:
    speculation = Speculation("draft_model", model=copy_of(0.0), draft_budget="28KiB")
    engine = build(speculation=speculation)
    assert [done.tokens for done in engine.generate(PROMPTS, PARAMS)] == wanted()
    stats = engine.speculation_stats()
    assert 0 < stats["drafted"] < 3 * stats["verified"] * 0.8
    draft_cache(engine).check_integrity()


def test_driver_failures_of_the_draft_models_cache_end_nobody(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = FaultyDriver(HostDriver())
    monkeypatch.setattr(speculation_draft, "make_cache", partial(make_cache, driver=faulty))
    engine = build(speculation=Speculation("draft_model", model=copy_of(0.0)))
    for seed in range(3):
        faulty.fail_randomly(0.4, seed)
        assert [done.tokens for done in engine.generate(PROMPTS[:3], PARAMS[:3])] == wanted()[:3]
        faulty.disarm()
    assert [done.tokens for done in engine.generate(PROMPTS, PARAMS)] == wanted()
    assert engine.speculation_stats()["accepted"] > 0


def test_an_engine_with_a_draft_model_does_not_sleep(build: Build) -> None:
    engine = build(speculation=Speculation("draft_model", model=copy_of(0.0)))
    with pytest.raises(ConfigError, match="an engine with a draft model cannot sleep"):
        engine.sleep()
    cache = draft_cache(engine)
    engine.close()
    assert cache._closed


@remember
def copy_of(noise: float) -> PreTrainedModel:
    """Another model with the same weights, or nearly the same."""
    return model_of.__wrapped__(noise)


def draft_cache(engine: Engine) -> Any:
    assert engine.decode.speculator is not None
    assert engine.decode.speculator.draft_model is not None
    return engine.decode.speculator.draft_model.cache


# -- what happens meanwhile ------------------------------------------------------------------------------------------


def test_nobody_is_preempted_for_drafts(build: Build) -> None:
    plain = build()
    pages = plain.cache.bytes_of(1)
    engine = build(
        speculation=Speculation(num_speculative_tokens=7, prompt_lookup_min=1),
        budget=pages * 7,
        prefix_cache=False,
        kind="vattn",
    )
    assert isinstance(engine.cache, KVCacheManager)
    engine.cache.ahead.fixed = 0
    done = engine.generate(PROMPTS, PARAMS)
    assert [each.tokens for each in done] == wanted()
    assert engine.speculation_stats()["without_memory"] > 0
    engine.cache.check_integrity()


def test_forks_samples_and_prefixes_share_while_drafts_are_verified(build: Build) -> None:
    params = SamplingParams(20, temperature=0.4, seed=3, n=3)
    plain = build(slots=8)
    want = [done.tokens for done in plain.generate([PROMPTS[0]], params)]
    engine = build(slots=8, speculation=Speculation(num_speculative_tokens=3, prompt_lookup_min=1))
    assert [done.tokens for done in engine.generate([PROMPTS[0]], params)] == want
    first = engine.submit(PROMPTS[0], PARAMS[0])
    events = engine.step() + engine.step() + engine.step()
    forked = engine.fork(first)
    events += list(engine.run())
    got = by_request([event for event in events if event.request == first])
    assert got[first] == wanted()[0]
    behind = [event.token for event in events if event.request == forked]
    assert behind == wanted()[0][-len(behind) :]
    assert engine.prefix_stats()["cached_tokens"] > 0
    engine.cache.check_integrity()


@pytest.mark.parametrize("options", [{}, {"capture": True, "packed": True}])
def test_prompts_that_come_in_the_middle_change_no_token(build: Build, options: dict[str, Any]) -> None:
    # Prompts go in by so few tokens that sequences decode beside them for several passes, each without drafts.
    engine = build(chunk=8, speculation=Speculation(num_speculative_tokens=3, prompt_lookup_min=1), **options)
    mixed: list[StepRecord] = []
    engine.observer = mixed.append
    events, numbers = [], []
    for prompt, params in zip(PROMPTS, PARAMS, strict=True):
        numbers.append(engine.submit(prompt, params))
        before = engine.speculation_stats()["drafted"]
        for _ in range(14):
            events += engine.step()
            if engine.speculation_stats()["drafted"] > before + 3:
                break
    events += engine.run()
    got = by_request(events)
    assert [got[number] for number in numbers] == wanted()
    assert sum(record.prefilled > 0 and record.lanes > 0 for record in mixed) > 6
    stats = engine.speculation_stats()
    assert stats["accepted"] > 0
    assert stats["steps"][0] > 6


def test_suspended_cancelled_and_late_requests_leave_the_others_right(build: Build) -> None:
    engine = build(speculation=Speculation(num_speculative_tokens=7, prompt_lookup_min=1), host_memory="16MiB")
    numbers = [engine.submit(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    events = []
    for step in range(60):
        events += engine.step()
        if step == 3:
            assert engine.suspend(numbers[0]) > 0
        if step == 5:
            engine.abort(numbers[2])
        if step == 9:
            engine.resume(numbers[0])
        if step == 12:
            engine.sleep()
            engine.wake()
        if not engine.busy:
            break
    got = by_request([event for event in events if event.request != numbers[2]])
    assert [got[number] for number in numbers if number != numbers[2]] == [*wanted()[:2], *wanted()[3:]]
    engine.cache.check_integrity()


def test_driver_failures_leave_every_token_right(build: Build) -> None:
    engine = build(speculation=Speculation(num_speculative_tokens=7, prompt_lookup_min=1), prefix_cache=False)
    assert isinstance(engine.cache, KVCacheManager)
    driver = DRIVERS[engine]
    engine.cache.ahead.fixed = 0
    raised = 0
    for name in ("create", "map", "set_access"):
        numbers = [engine.submit(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
        events = engine.step() + engine.step()
        driver.fail(name)
        while engine.busy:
            try:
                events += engine.step()
            except DriverError:
                raised += 1
        driver.disarm()
        got = by_request(events)
        assert [got[number] for number in numbers] == wanted()
        engine.cache.check_integrity()
        engine.cache.release_free_memory()
    assert raised >= 2


def test_an_interrupted_step_is_gone_on_from(build: Build) -> None:
    engine = build(speculation=Speculation(prompt_lookup_min=1), prefix_cache=False)

    def steps() -> tuple[int, list[TokenEvent]]:
        number = engine.submit(PROMPTS[0], PARAMS[0])
        return number, engine.step() + engine.step() + engine.step()

    number, events = steps()
    count = instructions_of(lambda: events.extend(engine.step()))
    assert by_request([*events, *engine.run()])[number] == wanted()[0]
    for part in range(1, 8, 2):
        number, events = steps()
        interrupt_at(count * part // 8, lambda: events.extend(engine.step()))  # noqa: B023
        events += engine.run()
        assert by_request(events)[number] == wanted()[0]
    assert engine.speculation_stats()["accepted"] > 0


# -- on the device ---------------------------------------------------------------------------------------------------


def looked_up(tokens: list[int], most: int, shortest: int, longest: int) -> list[int]:
    """Prompt lookup in plain Python."""
    for size in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                period = len(tokens) - end
                return [tokens[end + i % period] for i in range(most)]
    return []


@settings(max_examples=40)
@given(
    sequences=st.lists(st.lists(st.integers(0, 2), max_size=14), min_size=1, max_size=4),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    most=st.integers(1, 7),
    room=st.integers(0, 9),
)
def test_drafts_are_what_followed_the_longest_match(
    sequences: list[list[int]], sizes: tuple[int, int], most: int, room: int
) -> None:
    lanes, width = len(sequences), 20
    shortest, longest = sorted(sizes)
    history = torch.randint(0, 3, (lanes + 1, width), dtype=torch.int32)
    # Lane i's tokens lie in another row; idle lanes have the last one.
    row_of = torch.tensor([lanes - 1 - i if tokens else lanes for i, tokens in enumerate(sequences)])
    for row, tokens in zip(row_of.tolist(), sequences, strict=True):
        history[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    inputs = torch.stack((*(row_of,) * 3, lengths, lengths + room, row_of))
    drafts, counts = torch.full((lanes, most), 9), torch.full((lanes,), 9)
    look_up(history, inputs, 5, drafts, counts, shortest, longest)
    for lane, tokens in enumerate(sequences):
        want = looked_up(tokens, most, shortest, longest) if tokens else []
        assert counts[lane] == min(len(want), room)
        assert drafts[lane, : counts[lane]].tolist() == want[: counts[lane]]


def test_lanes_advance_by_the_drafts_that_are_right() -> None:
    # Right up to the last; wrong at the second; idle; right, of which the limit leaves one; none behind a right one.
    chosen = torch.tensor([[5, 6, 7, 8], [5, 9, 7, 8], [0, 0, 0, 0], [5, 6, 7, 8], [5, -1, 7, 8]])
    drafts = torch.tensor([[5, 6, 7], [5, 6, 7], [0, 0, 0], [5, 6, 7], [5, 6, 7]])
    counts = torch.tensor([3, 3, 0, 1, 3])
    places = [[9, 9, 0, 9, 9], [4, 4, 0, 4, 4], [0, 1, 5, 2, 3], [10, 10, 0, 10, 10], [60, 60, 0, 11, 60]]
    inputs = torch.tensor([*places, [4, 3, 5, 1, 0]])
    out, control = torch.zeros(2 * (4 + REPORTS), 5, dtype=torch.int64), torch.tensor([1, 0])
    history = torch.zeros(6, 32, dtype=torch.int32)
    advance_verified(chosen, inputs, 5, drafts, counts, 4, control, out, history, 5)
    assert out[4 + REPORTS :][-REPORTS].tolist() == [4, 2, 0, 2, 2]
    assert out[4 + REPORTS :][-1].tolist() == [3, 1, 0, 1, 1]
    assert not out[: 4 + REPORTS].any()
    assert out[4 + REPORTS :][:4].T.tolist() == chosen.tolist()
    assert control[0] == 2
    # The fourth has reached its limit, the fifth has no token: both are idle.
    assert inputs[:2].tolist() == [[13, 11, 0, 0, 0], [8, 9, 0, 0, 0]]
    assert inputs[2:5].tolist() == [[0, 1, 5, 5, 5], [14, 12, 0, 0, 0], [60, 60, 0, 11, 60]]
    assert history[4, 9:15].tolist() == [0, 5, 6, 7, 8, 0]
    assert history[3, 9:15].tolist() == [0, 5, 9, 0, 0, 0]
    assert history[1, 9:15].tolist() == [0, 5, 6, 0, 0, 0]


@pytest.mark.parametrize("seed", [0, 7, (1 << 64) - 1])
def test_noise_depends_on_the_place_alone_on_the_device_too(seed: int) -> None:
    params = SamplingParams(temperature=1.0, seed=seed)
    index = torch.arange(50)
    keys = keys_at(torch.tensor([params.noise_base]), index)
    assert keys.tolist() == [params.key(i) for i in index.tolist()]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_rows_of_a_lane_attend_up_to_themselves(kv_heads: int) -> None:
    shape = CacheShape(1, kv_heads, 16, torch.float32, 3, 32)
    with make_cache("contiguous", shape, "cpu") as cache:
        attention = TorchAttention(cache, 4)
        kv = cache.layer(0)
        assert isinstance(kv, FlatKV)
        kv.k.normal_(), kv.v.normal_()
        q = torch.randn(6, 4, 16)
        counts, lengths = torch.tensor([3, 1], dtype=torch.int32), torch.tensor([9, 5], dtype=torch.int32)
        lanes = torch.tensor([2, 0])
        zeros = torch.zeros(6, dtype=torch.int64)
        step = VerifyStep(attention, zeros, zeros, lengths, counts, lanes)
        found = step.attend(0, q)
        for row, (lane, length) in {0: (2, 7), 1: (2, 8), 2: (2, 9), 3: (0, 5)}.items():
            alone = attention.decode(0, q[row : row + 1], torch.tensor([length]), torch.tensor([lane]))
            torch.testing.assert_close(found[row : row + 1], alone)


# -- how many --------------------------------------------------------------------------------------------------------


def test_as_many_are_drafted_as_pay() -> None:
    length = DraftLength([1, 3, 7], 200, shadow=True)
    every = {0: 1, 1: 1, 3: 1, 7: 1}
    assert length.choose([0], every) == 7, "nothing is known"
    costs = {0: {1: 4.0, 128: 8.0}, 1: {1: 4.1, 128: 14.0}, 3: {1: 4.2, 128: 30.0}, 7: {1: 6.5, 128: 60.0}}
    length.seconds = {(drafts, bucket): took for drafts, by in costs.items() for bucket, took in by.items()}
    assert length.choose([0], every) == 3
    many = {drafts: 128 for drafts in every}
    assert length.choose(range(128), many) == 0
    # Where steps of so many lanes are not captured.
    assert length.choose([0], {0: 1, 1: 1}) == 1
    assert length.choose([0], {0: 1}) == 0
    zero, one = np.array([0]), np.array([1])
    for _ in range(60):
        length.learn(zero, one, one - 1, 0)
    assert length.choose([0], every) == 0, "the first one is always wrong"
    assert length.choose([1], every) == 3, "another slot's are not"
    before, length.seconds = length.seconds, {**length.seconds, (7, 1): 3.0}
    assert length.choose([0], every) == 0, (
        "a step that was sooner over with more drafts was not disturbed, the others were"
    )
    length.seconds = before
    for _ in range(60):
        length.learn(zero, one, one, 0)
    assert length.choose([0], every) == 3, "steps without drafts say that they would pay"
    for _ in range(60):
        length.learn(zero, 7 * one, 7 * one, 7)
    assert length.choose([0], every) == 7
    length.begin(0)
    assert length._first[0] == length._usual


def test_a_draft_model_is_tried_again_where_it_did_not_pay() -> None:
    length = DraftLength([1, 3], 1, shadow=False)
    length.seconds = {(0, 1): 4.0, (1, 1): 4.2, (3, 1): 4.4}
    buckets, zero = {0: 1, 1: 1, 3: 1}, np.array([0])
    while length.choose([0], buckets):
        length.learn(zero, zero + 3, zero, 3)
    tried = []
    for _ in range(130):
        tried.append(length.choose([0], buckets))
        length.learn(zero, zero + tried[-1], zero, tried[-1])
    assert tried.count(1) == 2
    assert tried.count(0) == 128


def test_measured_costs_choose_in_a_captured_engine(build: Build) -> None:
    engine = build(slots=1, capture=True, speculation=Speculation(prompt_lookup_min=1))
    length = engine.decode.speculator.length  # type: ignore[union-attr]
    assert {drafts for drafts, _ in engine.decode._verifiers} == {1, 3}
    assert set(engine.startup.drafts.replay_s) == {2, 4}
    length.seconds = {(0, 1): 1.0, (1, 1): 9.0, (3, 1): 9.0}
    assert engine.generate([PROMPTS[0]], PARAMS[0])[0].tokens == wanted()[0]
    assert set(engine.speculation_stats()["steps"]) == {0}
    length.seconds = {(0, 1): 1.0, (1, 1): 1.1, (3, 1): 1.2}
    assert engine.generate([PROMPTS[0]], PARAMS[0])[0].tokens == wanted()[0]
    assert engine.speculation_stats()["steps"][3] > 3


# -- at the door -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "medusa"}, "method is 'medusa'; there are ngram, draft_model"),
        ({"num_speculative_tokens": 8}, "num_speculative_tokens is 8; .* 1 to 7"),
        ({"prompt_lookup_min": 5}, "prompt_lookup_min is 5, prompt_lookup_max 4"),
        ({"prompt_lookup_max": 17}, "prompt_lookup_max is 17"),
        ({"method": "draft_model"}, "method is draft_model, and model is None; give the model"),
        ({"model": object()}, "method is ngram, and model is .*; leave model out"),
        ({"draft_budget": "1GiB"}, "draft_budget is that of a draft model's cache"),
        ({"method": "draft_model", "model": object(), "draft_budget": "much"}, "draft_budget"),
    ],
)
def test_what_cannot_be_asked_for_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Speculation(**given)


def test_an_engine_refuses_by_name_what_it_cannot_speculate_with(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    some = Speculation()
    with pytest.raises(ConfigError, match=r"speculation is a str \('ngram'\); give a Speculation, or None"):
        build(speculation="ngram")
    with pytest.raises(ConfigError, match="steps is 4, make it 1"):
        build(speculation=some, steps=4)
    with pytest.raises(ConfigError, match="loop has the device end launches"):
        build(speculation=some, loop=True)
    with pytest.raises(ConfigError, match="margins are recorded of single tokens"):
        build(speculation=some, record_margins=True)
    with pytest.raises(ConfigError, match="takes 4 tokens in a step, and a sequence has 3 at most"):
        build(speculation=some, length=3, capture=True)
    build(speculation=some, length=4, capture=True)
    monkeypatch.setattr(Engine, "supports_packed_prefill", False)
    with pytest.raises(ConfigError, match="an Engine's model takes one token of each sequence in a step"):
        build(speculation=some)
    monkeypatch.undo()
    engine = build(speculation=some)
    with pytest.raises(ConfigError, match="tokens are forced one at a time"):
        engine.submit([1, 2], SamplingParams(2), forced=[3, 4])
    with pytest.raises(ConfigError, match="this engine drafts nothing"):
        build().speculation_stats()
    with pytest.raises(ConfigError, match="a vocabulary of 300 tokens, the model one of 512"):
        build(speculation=Speculation("draft_model", model=model_of(0.0, 300)))
    with pytest.raises(ConfigError, match=r"the draft model is a str \('llama'\); give a Hugging Face"):
        build(speculation=Speculation("draft_model", model="llama"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the draft model is the model itself"):
        build(speculation=Speculation("draft_model", model=model_of()))


def test_backends_with_one_query_a_lane_are_refused(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build()
    picked = PickedAttention(engine.cache, 4)
    assert picked.most_queries == 8
    q, lengths = torch.randn(2, 3, 4, 16), torch.zeros(2, dtype=torch.int32)
    assert not picked.decode_queries(0, q, None, lengths).any()
    monkeypatch.setattr(TorchAttention, "most_queries", 1)
    alone = PickedAttention(engine.cache, 4, deterministic=True)
    assert alone.most_queries == 1
    with pytest.raises(ConfigError, match="the picked backend decodes one query a lane"):
        alone.decode_queries(0, q, None, lengths)
    with pytest.raises(ConfigError, match="takes 4 queries of a lane in a step; the torch backend takes 1 here"):
        build(speculation=Speculation())


# -- what the cache does ---------------------------------------------------------------------------------------------


def test_lengths_go_back_without_a_driver_call(build: Build) -> None:
    engine = build()
    cache, driver = engine.cache, DRIVERS[engine]
    slots = [cache.admit(name, 10) for name in "ab"]
    cache.prepare_step(np.array([18, 12, 0]))
    frontiers = cache.frontiers.copy()
    driver.fail_randomly(1.0, 0)
    cache.roll_back(np.array([13, 0, 0]))
    driver.disarm()
    assert cache.lengths[slots].tolist() == [13, 12]
    assert (cache.frontiers == frontiers).all()
    cache.prepare_step(np.array([14, 13, 0]))
    with pytest.raises(ConfigError, match=r"slots \[1\] would become longer"):
        cache.roll_back(np.array([13, 14, 0]))
    with pytest.raises(ConfigError, match="one entry a slot"):
        cache.roll_back(np.array([13]))
    assert cache.lengths[slots].tolist() == [14, 13]


def test_mapping_ahead_keeps_room_for_the_most_that_a_launch_may_give(build: Build) -> None:
    engine = build(speculation=Speculation(num_speculative_tokens=7))
    timing = engine.cache.ahead.timing  # type: ignore[attr-defined]
    assert (timing.launch, timing.growth, timing.least) == (1, 8, 16)
    plain = build().cache.ahead.timing  # type: ignore[attr-defined]
    assert (plain.growth, plain.least) == (1, 4)


# -- a life of it ----------------------------------------------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """Requests come, fork, are suspended, cancelled and preempted, and driver calls fail, while drafts are verified."""

    @initialize(drafts=st.sampled_from([1, 3, 7]), packed=st.booleans(), kept=st.booleans(), model=st.booleans())
    def build(self, drafts: int, packed: bool, kept: bool, model: bool) -> None:
        self.driver = FaultyDriver(HostDriver())
        shape = shape_of(model_of(), 5, LENGTH)
        self.cache = make_cache("vattn", shape, "cpu", 30 * 4096, driver=self.driver, host_memory="1MiB")
        self.engine = Engine(
            model_of(),
            self.cache,
            attention="torch",
            compile=False,
            capture=False,
            mapping="between-steps",
            packed=packed,
            prefix_cache=kept,
            speculation=Speculation(
                "draft_model" if model else "ngram",
                drafts,
                prompt_lookup_min=1,
                model=copy_of(0.05) if model else None,
            ),
        )
        self.expected: dict[int, list[int]] = {}
        self.begun: dict[int, int] = {}
        self.got: dict[int, list[int | None]] = {}

    def take(self, events: list[TokenEvent]) -> None:
        for event in events:
            if event.request in self.expected:
                assert event.error is None
                tokens = self.got.setdefault(event.request, [])
                assert event.index == len(tokens) + self.begun.get(event.request, 0)
                tokens.append(event.token)

    @rule(which=st.integers(0, len(PROMPTS) - 1))
    def submit(self, which: int) -> None:
        self.expected[self.engine.submit(PROMPTS[which], PARAMS[which])] = wanted()[which]

    @rule(count=st.integers(1, 4), fail=st.sampled_from(["", "", "create", "map"]))
    def step(self, count: int, fail: str) -> None:
        if fail:
            self.driver.fail(fail)
        for _ in range(count):
            with suppress(DriverError):
                self.take(self.engine.step())
        self.driver.disarm()

    def alive(self, which: int) -> int | None:
        known = sorted(self.engine.scheduler.requests)
        return known[which % len(known)] if known else None

    @rule(which=st.integers(0, 9))
    def abort(self, which: int) -> None:
        if (number := self.alive(which)) is not None:
            self.engine.abort(number)
            del self.expected[number]

    @rule(which=st.integers(0, 9))
    def fork(self, which: int) -> None:
        number, scheduler = self.alive(which), self.engine.scheduler
        if number is None or number in scheduler.parked:
            return
        request = scheduler.requests[number]
        if request.params.greedy:
            made = self.engine.fork(number)
            self.expected[made], self.begun[made] = self.expected[number], len(request.chosen)

    @rule(which=st.integers(0, 9))
    def suspend_or_resume(self, which: int) -> None:
        if (number := self.alive(which)) is None:
            return
        if number in self.engine.scheduler.parked:
            self.engine.resume(number)
        else:
            self.engine.suspend(number)

    @rule(pages=st.integers(12, 40))
    def set_budget(self, pages: int) -> None:
        self.engine.set_budget(pages * 4096)

    @invariant()
    def the_books_are_right(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.set_budget(40 * 4096)
        for number in list(self.engine.scheduler.parked):
            self.engine.resume(number)
        self.take(list(self.engine.run()))
        for number, tokens in self.expected.items():
            assert self.got[number] == tokens[self.begun.get(number, 0) :]
        stats = self.engine.speculation_stats()
        assert stats["overshoot"] <= stats["most_overshoot"]
        self.engine.close()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=5, stateful_step_count=12)
