"""One request's misfortune is its own: who has no token, or no room, ends with an error, and all others get theirs."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from functools import cache as remember
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError, EngineClosed, ManagerClosed, SequenceTooLong
from trtllm_vattn.runtime import sampling
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.request import TokenEvent
from trtllm_vattn.runtime.sampling import SamplingParams

BAD = 500
"""Its embedding is NaN or infinite: the first pass over it has no finite logits."""
PROMPTS = [np.random.default_rng(n).integers(0, 480, n).tolist() for n in (3, 40, 1, 16)]
PARAMS = [
    SamplingParams(12),
    SamplingParams(20, temperature=0.8, seed=3),
    SamplingParams(17, temperature=1.1, top_k=30, top_p=0.9, seed=4),
    SamplingParams(9),
]
DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]
WAYS: dict[str, dict[str, Any]] = {
    "single": {"capture": False},
    "captured": {"buckets": None},
    "4 steps": {"steps": 4},
    "loop": {"steps": 8, "loop": True},
    "packed": {"packed": True, "steps": 2, "buckets": None},
    "chunks": {"chunk": 16},
}


@remember
def model_of(device: str) -> PreTrainedModel:
    """No logit is NaN unless the token `BAD` is in the sequence."""
    model = load_model("tiny-llama", device, torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD].fill_(torch.nan)
        # Nobody chooses it by itself.
        model.lm_head.weight[BAD].zero_()
    return model


def build(
    device: str = "cpu", slots: int = 3, kind: str = "vattn", budget: int | None = None, **options: Any
) -> Engine:
    model = model_of(device)
    cache = make_cache(kind, shape_of(model, slots, 128), device, budget)
    options = {"attention": "torch", "compile": False, "mapping": "between-steps", "buckets": [slots], **options}
    return Engine(model, cache, **options)


@remember
def wanted(device: str = "cpu") -> list[list[int]]:
    with build(device, capture=False) as engine:
        return [done.tokens for done in engine.generate(PROMPTS, PARAMS)]


def by_request(events: Sequence[TokenEvent]) -> dict[int, list[TokenEvent]]:
    got: dict[int, list[TokenEvent]] = {}
    for event in events:
        got.setdefault(event.request, []).append(event)
    return got


def tokens_of(events: Sequence[TokenEvent]) -> list[int]:
    assert [event.index for event in events] == list(range(len(events)))
    return [event.token for event in events]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("way", "temperature"), [*((way, 0.0) for way in WAYS), ("single", 0.9), ("4 steps", 0.9)])
def test_a_prompt_without_finite_logits_ends_alone(device: str, way: str, temperature: float) -> None:
    with build(device, **WAYS[way]) as engine:
        poisoned = [5, BAD, *range(60)]
        for place in range(3):
            good = [*zip(PROMPTS, PARAMS, strict=True)]
            numbers = [engine.submit(*each) for each in good[:place]]
            bad = engine.submit(poisoned, SamplingParams(9, temperature=temperature))
            numbers += [engine.submit(*each) for each in good[place:]]
            got = by_request(list(engine.run()))
            assert [tokens_of(got[number]) for number in numbers] == wanted(device)
            (end,) = got[bad]
            assert (end.token, end.finish_reason, end.index) == (None, "error", 0)
            assert end.error is not None
            assert end.error.startswith(f"request {bad}: its logits are NaN or infinite")
            assert engine.cache.stats().sequences == 0
        engine.cache.check_integrity()
        # Nothing that it left in any slot's memory, or in the dummy's, reaches the next one.
        engine.generate([poisoned] * 3, SamplingParams(9))
        assert [done.tokens for done in engine.generate(PROMPTS, PARAMS)] == wanted(device)
        completion, other = engine.generate([poisoned, PROMPTS[0]], [SamplingParams(5), PARAMS[0]])
        assert (completion.tokens, completion.finish_reason) == ([], "error")
        assert completion.error is not None
        assert (other.tokens, other.error) == (wanted(device)[0], None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("way", "params"),
    [
        *((way, SamplingParams(40)) for way in ("single", "captured", "4 steps", "loop", "packed")),
        *((way, SamplingParams(40, temperature=0.7, seed=5)) for way in ("captured", "packed")),
    ],
)
def test_logits_that_become_nan_while_decoding_end_one_request(device: str, way: str, params: SamplingParams) -> None:
    with build(device, **WAYS[way]) as engine:
        (alone,) = engine.generate([PROMPTS[3]], params)
        # The sequence turns bad at the first token that nothing else here has.
        others = {token for tokens in (*wanted(device)[:2], *PROMPTS) for token in tokens}
        at = next(n for n, token in enumerate(alone.tokens) if n > 2 and token not in {*others, *alone.tokens[:n]})
        weights = engine.model.get_input_embeddings().weight
        kept = weights[alone.tokens[at]].clone()
        with torch.no_grad():
            weights[alone.tokens[at]] = torch.nan
        numbers = [engine.submit(prompt, each) for prompt, each in zip(PROMPTS[:2], PARAMS[:2], strict=True)]
        bad = engine.submit(PROMPTS[3], params)
        got = by_request(list(engine.run()))
        with torch.no_grad():
            weights[alone.tokens[at]] = kept
        assert [tokens_of(got[number]) for number in numbers] == wanted(device)[:2]
        assert tokens_of(got[bad]) == [*alone.tokens[: at + 1], None]
        assert got[bad][-1].finish_reason == "error"
        assert engine.cache.stats().sequences == 0
        assert [done.tokens for done in engine.generate(PROMPTS, PARAMS)] == wanted(device)


@pytest.mark.parametrize("kind", ["contiguous", "paged", "token", "published", "blocks"])
@pytest.mark.parametrize("attention", ["torch", "xqa"])
def test_nan_in_memory_stays_with_whoever_left_it(kind: str, attention: str) -> None:
    if attention == "xqa" and kind == "token":
        pytest.skip("XQA's blocks have 16 tokens at least")
    with build(kind=kind, attention=attention) as engine:
        first = [done.tokens for done in engine.generate(PROMPTS, PARAMS)]
        engine.generate([[BAD, *range(100)]] * 3, SamplingParams(9))
        assert [done.tokens for done in engine.generate(PROMPTS, PARAMS)] == first


# -- room --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vattn", "blocks", "published", "paged", "token"])
def test_what_can_never_fit_is_refused_with_both_numbers(kind: str) -> None:
    token = shape_of(model_of("cpu"), 1, 128).token_bytes
    with build(kind=kind, budget=64 * token) as engine:
        cache = engine.cache
        longest = cache.longest_alone
        assert 0 < longest < 128
        assert cache.bytes_of(longest) <= cache.bytes_for_sequences < cache.bytes_of(longest + 1)
        needed = rf"take {cache.bytes_of(longest + 1):,} bytes, and the budget has {cache.bytes_for_sequences:,} for"
        for prompt, params in (([1] * (longest + 1), None), ([1] * longest, SamplingParams(2))):
            with pytest.raises(SequenceTooLong, match=needed):
                engine.submit(prompt, params)
        assert not engine.busy
        # What just fits is served, to its last token; one without a limit gets as many as fit.
        full, open_end = engine.generate([[1] * (longest - 2), [1, 2]], [SamplingParams(3), SamplingParams()])
        assert (len(full.tokens), full.finish_reason) == (3, "length")
        assert (len(open_end.tokens), open_end.finish_reason) == (longest - 1, "length")
        cache.check_integrity()


def test_before_a_budget_is_set_nothing_fits() -> None:
    cache = KVCacheManager(shape_of(model_of("cpu"), 2, 128), make_driver())
    with Engine(model_of("cpu"), cache, compile=False, capture=False, mapping="between-steps") as engine:
        with pytest.raises(SequenceTooLong, match=r"the budget has 0 for sequences, enough for 0 tokens"):
            engine.submit([1])
        engine.set_budget("1MiB")
        assert len(engine.generate([[1]], SamplingParams(4))[0].tokens) == 4


def make_driver() -> Any:
    from trtllm_vattn.vmm.host import HostDriver

    return HostDriver()


def test_a_budget_that_fell_ends_who_does_not_fit_and_the_queue_goes_on() -> None:
    with build(slots=2) as engine:
        cache = engine.cache
        assert isinstance(cache, KVCacheManager)
        grows = engine.submit(PROMPTS[0], SamplingParams(100))
        engine.step()
        waits = engine.submit([7] * 100, SamplingParams(4))
        small = engine.submit(PROMPTS[2], PARAMS[2])
        alone = cache.layout.bytes_for(40) * cache.layout.num_ranges
        engine.set_budget(cache.layout.least_bytes + alone)
        got = by_request(list(engine.run()))
        assert tokens_of(got[small]) == wanted()[2]
        assert [event.finish_reason for event in got[waits]] == ["error"]
        message = f"request {waits}: its 100 tokens take {cache.bytes_of(100):,} bytes, and the budget has {alone:,}"
        assert str(got[waits][0].error).startswith(message)
        last = got[grows][-1]
        assert last.finish_reason == "error"
        assert "it alone outgrew the cache's memory" in str(last.error)
        assert 30 < last.index <= 45
        assert cache.stats().sequences == 0
        cache.check_integrity()


@pytest.mark.parametrize("options", [{}, {"steps": 4}, {"steps": 8, "loop": True}])
def test_two_that_fit_alone_and_not_together_are_both_served(options: dict[str, Any]) -> None:
    token = shape_of(model_of("cpu"), 1, 128).token_bytes
    with build(budget=64 * token, **options) as engine:
        params = SamplingParams(engine.cache.longest_alone - 2)
        done = engine.generate([PROMPTS[0]] * 3, params)
        assert [each.finish_reason for each in done] == ["length"] * 3
        assert len({tuple(each.tokens) for each in done}) == 1


def test_a_long_queue_costs_a_step_nothing() -> None:
    """Steps, submissions and aborts with 20,000 waiting take what they take with 50."""
    taken: dict[int, float] = {}
    with build(capture=False, slots=2) as engine:
        for waiting in (50, 20_000):
            numbers = [engine.submit([1], SamplingParams(100)) for _ in range(waiting)]
            for _ in range(5):
                engine.step()
            gc.collect()
            gc.disable()
            best = float("inf")
            for attempt in range(5):
                started = time.process_time()
                for number in numbers[10 + attempt * 5 : 15 + attempt * 5]:
                    engine.abort(number)
                    engine.submit([1], SamplingParams(1))
                    engine.step()
                best = min(best, time.process_time() - started)
            gc.enable()
            taken[waiting] = best
            for request in [*engine.scheduler.requests]:
                engine.abort(request)
            assert not engine.busy
    # One look at each of them would take ten times as long.
    assert taken[20_000] < 3 * taken[50]


# -- events ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "leave"),
    [
        *(({}, leave) for leave in ("break", "raise", "close", "next")),
        ({"steps": 4}, "break"),
        ({"steps": 4}, "raise"),
        ({"steps": 8, "loop": True}, "close"),
        ({"steps": 8, "loop": True}, "next"),
    ],
)
def test_whoever_leaves_a_stream_loses_nothing(options: dict[str, Any], leave: str) -> None:
    with build(**options) as engine:
        numbers = [engine.submit(*each) for each in zip(PROMPTS, PARAMS, strict=True)]
        seen: list[TokenEvent] = []
        while engine.busy:
            stream = engine.run()
            if leave == "next":
                seen.append(next(stream))
                continue
            try:
                for event in stream:
                    seen.append(event)
                    if leave == "raise":
                        raise KeyboardInterrupt
                    break
            except KeyboardInterrupt:
                pass
            if leave == "close":
                stream.close()  # type: ignore[attr-defined]
            if len(seen) % 5 == 0 and engine.busy:
                seen += engine.step()
        got = by_request(seen)
        assert [tokens_of(got[number]) for number in numbers] == wanted()
        assert all(events[-1].finish_reason == "length" for events in got.values())


@pytest.mark.parametrize("options", [{}, {"steps": 4}])
def test_what_a_step_that_raised_had_comes_with_the_next(options: dict[str, Any]) -> None:
    def observe(record: Any) -> None:
        raise RuntimeError("not now")

    with build(**options) as engine:
        engine.observer = observe
        numbers = [engine.submit(*each) for each in zip(PROMPTS, PARAMS, strict=True)]
        seen: list[TokenEvent] = []
        raised = 0
        while engine.busy:
            try:
                seen += engine.step()
            except RuntimeError:
                raised += 1
            if raised % 3 == 0:
                engine.observer = None if engine.observer else observe
        got = by_request(seen)
        assert raised > 3
        assert [tokens_of(got[number]) for number in numbers] == wanted()


def test_generate_leaves_events_of_others_and_drops_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with build() as engine:
        number = engine.submit(*next(zip(PROMPTS, PARAMS, strict=True)))
        first = next(engine.run())
        while engine.scheduler.requests:
            engine._step()
        # It has ended, and nobody took the rest.
        assert engine.busy
        assert engine.generate(PROMPTS[1:2], PARAMS[1])[0].tokens == wanted()[1]
        step = engine._step
        calls: list[int] = []

        def interrupted() -> None:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            step()

        monkeypatch.setattr(engine, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS, PARAMS)
        assert not engine.scheduler.requests
        assert engine.cache.stats().sequences == 0
        assert tokens_of([first, *engine.step()]) == wanted()[0]
        assert not engine.busy
        assert number == first.request
        assert [done.tokens for done in engine.generate(PROMPTS, PARAMS)] == wanted()


def test_an_aborted_request_is_not_heard_of_again() -> None:
    with build(steps=4) as engine:
        one, other = (engine.submit(*each) for each in [*zip(PROMPTS, PARAMS, strict=True)][:2])
        taken = [next(engine.run()) for _ in range(3)]
        engine.abort(one)
        rest = by_request([*engine.run()])
        assert set(rest) == {other}
        assert tokens_of([*(event for event in taken if event.request == other), *rest[other]]) == wanted()[1]
        done = engine.submit([1], SamplingParams(1))
        engine._step()
        engine.abort(done)
        assert not engine.busy
        for number in (done, 999):
            with pytest.raises(ConfigError, match=f"no request {number} is waiting or running"):
                engine.abort(number)


def test_after_closing_every_call_says_the_same() -> None:
    engine = build()
    engine.submit([1, 2], SamplingParams(9))
    stream = engine.run()
    next(stream)
    engine.close()
    engine.close()
    calls: list[Any] = [
        lambda: engine.submit([1]),
        engine.step,
        engine.run,
        lambda: next(stream),
        lambda: engine.generate([[1]]),
        lambda: engine.abort(0),
        lambda: engine.set_budget(1 << 20),
        engine.audit,
        engine.__enter__,
    ]
    for call in calls:
        with pytest.raises(EngineClosed, match=r"^this engine is closed; build another$"):
            call()
    assert issubclass(EngineClosed, ManagerClosed)
    assert not engine.busy
    assert not engine.prefilling


def test_requests_without_a_seed_differ_and_those_with_one_do_not() -> None:
    with build() as engine:
        free = engine.generate([PROMPTS[1]] * 3, SamplingParams(12, temperature=1.5))
        assert len({tuple(each.tokens) for each in free}) == 3
        same = engine.generate([PROMPTS[1]] * 3, SamplingParams(12, temperature=1.5, seed=8))
        assert len({tuple(each.tokens) for each in same}) == 1


def test_a_drawn_request_goes_on_with_its_seed_after_a_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    # A seed that is another one in each run has two tokens as likely as one another in one of some thousand runs: what
    # is computed again differs by rounding.
    monkeypatch.setattr(sampling.secrets, "randbits", lambda bits: 20261129)
    with build(slots=2) as engine:
        number = engine.submit(PROMPTS[1], SamplingParams(30, temperature=1.5))
        seed = engine.scheduler.requests[number].params.seed
        assert seed == 20261129
        events = [event for _ in range(9) for event in engine.step()]
        engine.scheduler.preempt_youngest()
        engine.pipeline.forget()
        events += engine.run()
        (again,) = engine.generate([PROMPTS[1]], SamplingParams(30, temperature=1.5, seed=seed))
        assert tokens_of(events) == again.tokens
