"""`deterministic=True`: the same bits of a request in any batch, and refusals, by name, of what cannot hold that."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from tiny_text import VOCAB, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.deterministic import check_deterministic
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.request import RequestState, TokenEvent
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.speculation import Speculation

LANES, BATCHES = 4, 50
OWN = copy.deepcopy(tiny_model())


def engine_of(dtype: torch.dtype = torch.float32, pages: int | None = None, **options: Any) -> Engine:
    model = copy.deepcopy(OWN).to(dtype)
    more: dict[str, Any] = {} if pages is None else {"lookahead": 0, "budget": (pages + 1) * 4096}
    cache = make_cache("vattn", shape_of(model, LANES, 64), "cpu", **more)
    return Engine(model, cache, **{"compile": False, "deterministic": True, "chunk": 16, **options})


def asked(
    random: np.random.Generator, lengths: tuple[int, int] = (1, 24), count: int = 2
) -> tuple[list[int], SamplingParams]:
    """A prompt and how to go on from it; some sample, some change logits, and all lanes' steps with them."""
    prompt = random.integers(0, VOCAB, int(random.integers(*lengths))).tolist()
    temperature = 0.8 if random.random() < 0.5 else 0.0
    seed = int(random.integers(1000))
    penalty = 1.3 if random.random() < 0.3 else 1.0
    params = SamplingParams(count, temperature=temperature, seed=seed, repetition_penalty=penalty, top_p=0.9)
    return prompt, replace(params, ignore_eos=True, logprobs=3 if random.random() < 0.7 else None)


def bits(events: list[TokenEvent]) -> list[object]:
    """Tokens, and log-probabilities bit by bit."""
    each = [(event.token, event.logprob) for event in events]
    return [(token, known and (known.logprob.hex(), known.top)) for token, known in each]


def alone(engine: Engine, prompt: list[int], params: SamplingParams) -> list[object]:
    engine.submit(prompt, params)
    return bits(list(engine.run()))


def sort(events: list[TokenEvent], into: dict[int, list[TokenEvent]]) -> None:
    for event in events:
        assert event.error is None
        into.setdefault(event.request, []).append(event)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_are_the_same_in_random_batches(dtype: torch.dtype) -> None:
    random = np.random.default_rng(7)
    pool = [asked(random) for _ in range(8)]
    with engine_of(dtype) as engine:
        wanted = [alone(engine, *each) for each in pool]
        assert len({str(each) for each in wanted}) == len(pool)
        for _ in range(BATCHES):
            chosen = random.choice(len(pool), int(random.integers(2, 4)), replace=False).tolist()
            place: dict[int, int] = {}
            got: dict[int, list[TokenEvent]] = {}
            for which in chosen:
                place[engine.submit(*pool[which])] = which
                # Some come while others run.
                sort(engine.step() if random.random() < 0.4 else [], got)
            sort(list(engine.run()), got)
            assert {which: bits(got[number]) for number, which in place.items()} == {w: wanted[w] for w in chosen}


def together(engine: Engine, pool: list[tuple[list[int], SamplingParams]]) -> list[list[object]]:
    got: dict[int, list[TokenEvent]] = {}
    numbers = [engine.submit(*each) for each in pool]
    sort(list(engine.run()), got)
    return [bits(got[number]) for number in numbers]


def test_who_is_preempted_has_the_same_bits_and_no_token_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is looked at changes where an engine is not deterministic."""
    random = np.random.default_rng(3)
    pool = [asked(random, (24, 30), 12) for _ in range(5)]
    with engine_of() as engine:
        wanted = [alone(engine, *each) for each in pool]
    with engine_of(pages=4) as engine:
        preempted: list[int] = []
        send_back = engine.scheduler._leave_to_recompute

        def noted(request: RequestState) -> None:
            preempted.append(len(request.chosen))
            send_back(request)

        monkeypatch.setattr(engine.scheduler, "_leave_to_recompute", noted)
        assert together(engine, pool) == wanted
        assert max(preempted, default=0) > 1
        # By wish, with a deadline that passes while tokens are chosen again: all that were told are in the output.
        clock = [0.0]
        engine.clock = engine.scheduler.waiting.clock = lambda: clock[0]
        number = engine.submit(*pool[0], deadline_s=5)
        told = [event for _ in range(6) for event in engine.step()]
        engine.suspend(number)
        forked = engine.fork(number, SamplingParams(pool[0][1].max_tokens, ignore_eos=True, logprobs=3))
        engine.resume(number)
        while not engine.scheduler.requests[number].is_chosen_again:
            engine.step()
        clock[0] = 9.0
        rest: dict[int, list[TokenEvent]] = {}
        sort(list(engine.run()), rest)
        assert (rest[number][0].finish_reason, rest[number][0].index) == ("deadline", len(told))
        assert rest[forked][0].index == len(told) > 1
    with engine_of(deterministic=False, prefix_cache=False) as engine:
        assert together(engine, pool) != [alone(engine, *each) for each in pool]


@pytest.mark.parametrize("dropped", [False, True])
def test_who_went_on_over_keys_of_older_weights_is_not_chosen_again_by_new_ones(dropped: bool) -> None:
    with engine_of() as engine:
        number = engine.submit([1, 2, 3], SamplingParams(24, ignore_eos=True))
        told = [event for _ in range(4) for event in engine.step()]
        if dropped:
            engine.sleep(kv="drop")
            engine.wake()
        changed = {name: each.neg() for name, each in OWN.named_parameters() if name != "lm_head.weight"}
        engine.update_weights(changed, partial=True)
        told += [event for _ in range(6) for event in engine.step()]
        request = engine.scheduler.requests[number]
        assert request.of_older_weights is not dropped
        engine.scheduler.preempt_all()
        rest = list(engine.run())
        assert [event.index for event in (*told, *rest)] == list(range(24))
        assert rest[-1].finish_reason == "length"
        # All of it is by one version from now on.
        assert not request.of_older_weights


def test_a_token_that_is_another_when_it_is_chosen_again_ends_its_request(caplog: pytest.LogCaptureFixture) -> None:
    with engine_of() as engine:
        number = engine.submit([1, 2, 3], SamplingParams(12, ignore_eos=True))
        first = [event for _ in range(5) for event in engine.step()]
        engine.scheduler.preempt_all()
        with torch.no_grad():
            cast(LlamaForCausalLM, engine.model).lm_head.weight.neg_()
        rest = list(engine.run())
        assert [event.finish_reason for event in rest] == ["error"]
        assert "chose another token than before" in str(rest[0].error)
        assert (rest[0].request, rest[0].index) == (number, len(first))


def test_new_weights_do_not_choose_told_tokens_again() -> None:
    weights = {name: each * 1.1 for name, each in OWN.state_dict().items()}
    with engine_of() as engine:
        number = engine.submit([1, 2, 3], SamplingParams(12, ignore_eos=True))
        told = [event for _ in range(5) for event in engine.step()]
        engine.scheduler.preempt_all()
        while not engine.scheduler.requests[number].is_chosen_again:
            engine.step()
        engine.update_weights(weights)
        rest = list(engine.run())
        assert [event.index for event in told + rest] == list(range(12))
        assert {event.weights_version for event in rest} == {1}
        assert rest[-1].finish_reason == "length"


@pytest.fixture(scope="module")
def experts() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "mixtral",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=64,
        num_local_experts=2,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prefix_cache": True}, "prefix_cache is given"),
        ({"kv_events": True}, "kv_events is given"),
        ({"speculation": Speculation()}, "speculation is given"),
        ({"target_itl_ms": 5.0}, "target_itl_ms is given"),
        ({"buckets": [1, 4]}, r"buckets are \[1, 4\]"),
        ({"attention": "shares"}, "splits a sequence by the lengths of the others"),
    ],
)
def test_what_cannot_hold_it_is_refused_by_name(options: dict[str, Any], said: str) -> None:
    model = copy.deepcopy(OWN)
    with make_cache("vattn", shape_of(model, LANES, 64), "cpu") as cache, pytest.raises(ConfigError, match=said):
        Engine(model, cache, compile=False, deterministic=True, **options)


def test_a_mixture_of_experts_and_prompt_logprobs_are_refused(experts: Any) -> None:
    made = make_cache("vattn", shape_of(experts, 2, 64), "cpu")
    with made as cache, pytest.raises(ConfigError, match="MixtralForCausalLM has 2 experts"):
        Engine(experts, cache, compile=False, deterministic=True)
    with make_cache("vattn", shape_of(OWN, 2, 64), "cpu") as cache:
        attention = make_attention("torch", cache, 2)
        with pytest.raises(ConfigError, match="the model is an int"):
            check_deterministic(3, attention)
    made_engine = engine_of(buckets=[LANES], capture=False)
    with made_engine as engine, pytest.raises(ConfigError, match="deterministic, and prompt_logprobs"):
        engine.submit([1, 2], SamplingParams(prompt_logprobs=1))
