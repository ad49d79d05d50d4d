"""What requests ask for beside tokens, through the engine: transformers' tokens, log-probabilities, texts, grammars."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_text import VOCAB, tiny_model, tiny_tokenizer

from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.lane_processors import StepKind
from trtllm_vattn.runtime.logprobs import TokenLogprob
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.speculation import Speculation
from trtllm_vattn.runtime.text import Text

MODES = {
    "captured": {"buckets": [6]},
    "eager": {"capture": False, "steps": 4},
    "loop": {"steps": 4, "loop": True, "buckets": [6]},
}
OWN = copy.deepcopy(tiny_model())
PROMPTS = [tiny_tokenizer()(text)["input_ids"] for text in ("the quick brown", "seven eight nine", "one")]
LENGTH = 14


@pytest.fixture(scope="module", params=MODES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    model = copy.deepcopy(OWN)
    cache = make_cache("vattn", shape_of(model, 6, 128), "cpu")
    with Engine(model, cache, compile=False, tokenizer=tiny_tokenizer(), **MODES[request.param]) as made:
        yield made
        made.flush_prefix_cache()
        made.cache.check_integrity()
        assert made.cache.stats().sequences == 0


def own_tokens(prompt: list[int], **options: object) -> list[int]:
    """transformers' greedy tokens."""
    options = {"eos_token_id": None, **options}
    ids = torch.tensor([prompt])
    out = OWN.generate(ids, max_new_tokens=LENGTH, do_sample=False, pad_token_id=0, **options)  # type: ignore[operator]
    return out[0, len(prompt) :].tolist()


@cache
def plain(number: int) -> list[int]:
    return own_tokens(PROMPTS[number])


def asked(**options: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": LENGTH, "ignore_eos": True, **options})  # type: ignore[arg-type]


def test_a_batch_that_asks_for_different_things_gives_transformers_tokens(engine: Engine) -> None:
    first, second, third = PROMPTS
    one, two = plain(0), plain(1)
    stop = two[1]
    cases = [
        (first, asked(), one),
        (first, asked(repetition_penalty=1.8), own_tokens(first, repetition_penalty=1.8)),
        (
            second,
            asked(bad_words=[one[:1], two[1:3]]),
            own_tokens(second, bad_words_ids=[one[:1], two[1:3]]),
        ),
        (
            second,
            SamplingParams(max_tokens=LENGTH, ignore_eos=True, min_tokens=5, stop_token_ids=[stop]),
            own_tokens(second, min_new_tokens=5, eos_token_id=stop),
        ),
        (third, asked(logit_bias={40: 30.0}), own_tokens(third, sequence_bias={(40,): 30.0})),
        (third, asked(logit_bias={40: 30.0}, frequency_penalty=2.0, logprobs=0), None),
    ]
    done = engine.generate([prompt for prompt, _, _ in cases], [params for _, params, _ in cases])
    for completion, (_, _, wanted) in zip(done, cases, strict=True):
        assert completion.error is None
        if wanted is not None:
            assert completion.tokens == wanted
    assert done[4].tokens == [40] * LENGTH != done[5].tokens


def test_log_probabilities_are_the_models(engine: Engine) -> None:
    prompts = [PROMPTS[0] * 3, PROMPTS[1], PROMPTS[0] * 3]
    for _ in range(2):  # the second time with what the first left in the prefix cache
        done = engine.generate(
            prompts, [asked(logprobs=3, prompt_logprobs=2), asked(logprobs=0), asked(repetition_penalty=1.5)]
        )
        for prompt, completion in zip(prompts[:2], done, strict=False):
            whole = torch.tensor([prompt + completion.tokens])
            wanted = OWN(whole).logits[0].log_softmax(-1)
            assert completion.logprobs is not None
            for place, given_ in enumerate(completion.logprobs):
                row = wanted[len(prompt) - 1 + place]
                assert given_.token == completion.tokens[place]
                assert given_.logprob == pytest.approx(row[given_.token].item(), abs=1e-4)
                best = row.topk(len(given_.top))
                assert [token for token, _ in given_.top] == best.indices.tolist()
                assert [value for _, value in given_.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert done[1].prompt_logprobs is None
        assert done[2].logprobs is None
        first, *others = done[0].prompt_logprobs or []
        assert first is None
        whole = OWN(torch.tensor([prompts[0]])).logits[0].log_softmax(-1)
        assert [each.token for each in others if each] == prompts[0][1:]
        for place, each in enumerate(others):
            assert each is not None
            assert len(each.top) == 2
            assert each.logprob == pytest.approx(whole[place, each.token].item(), abs=1e-4)
        assert done[0].cached_tokens == 0


def test_prompt_log_probabilities_come_by_chunks_and_with_samples() -> None:
    model = copy.deepcopy(OWN)
    prompt = (PROMPTS[0] * 9)[:90]
    cache = make_cache("vattn", shape_of(model, 4, 128), "cpu")
    with Engine(model, cache, compile=False, max_step_tokens=32) as engine:
        others = engine.submit(PROMPTS[1], asked())
        number = engine.submit(prompt, asked(prompt_logprobs=0, n=2, temperature=1.0, seed=1))
        events = [event for event in engine.run() if event.request != others]
    assert {event.request for event in events} == {number, number + 1}
    (first,) = (event for event in events if event.prompt_logprobs is not None)
    assert (first.request, first.index) == (number, 0)
    whole = OWN(torch.tensor([prompt])).logits[0].log_softmax(-1)
    given_ = [each.logprob for each in first.prompt_logprobs or () if each is not None]
    wanted = [whole[place, token].item() for place, token in enumerate(prompt[1:])]
    assert given_ == pytest.approx(wanted, abs=1e-4)


def test_a_stop_text_ends_the_output_across_tokens_and_is_held_back(engine: Engine) -> None:
    tokenizer, tokens = tiny_tokenizer(), plain(2)
    text = tokenizer.decode(tokens)
    pieces = [tokenizer.decode(tokens[: n + 1])[len(tokenizer.decode(tokens[:n])) :] for n in range(LENGTH)]
    border = len("".join(pieces[:5]))
    stop = text[border - 1 : border + 1]
    assert text.index(stop) == border - 1
    number = engine.submit(PROMPTS[2], asked(stop=["never there", stop]))
    other = engine.submit(PROMPTS[2], asked(stop=stop, min_tokens=8, detokenize=True))
    events: dict[int, list] = {number: [], other: []}
    for event in engine.run():
        events[event.request].append(event)
    assert "".join(event.text for event in events[number]) == text[: border - 1]
    assert [event.finish_reason for event in events[number]] == [None] * 5 + ["stop"]
    # The last character before the border was held back, though it is decoded.
    assert events[number][4].text == pieces[4][:-1]
    assert [event.token for event in events[number]] == tokens[:6]
    assert events[other][-1].index >= 8
    assert "".join(event.text for event in events[other]).startswith(text[: border + 1])


def test_what_was_held_back_comes_with_an_end_without_a_token() -> None:
    model, now = copy.deepcopy(OWN), [0.0]
    cache = make_cache("contiguous", shape_of(model, 1, 64), "cpu")
    text = tiny_tokenizer().decode(plain(2))
    stops = [text[n : n + 2] + "\0" for n in range(len(text) - 2)]
    with Engine(model, cache, compile=False, capture=False, tokenizer=tiny_tokenizer(), clock=lambda: now[0]) as engine:
        engine.submit(PROMPTS[2], asked(stop=stops), deadline_s=1.0)
        events = [event for _ in range(6) for event in engine.step()]
        now[0] = 2.0
        events += engine.run()
    assert (events[-1].finish_reason, events[-1].token) == ("deadline", None)
    assert len(events[-1].text or "") >= 2
    tokens = [event.token for event in events if event.token is not None]
    assert "".join(event.text or "" for event in events) == tiny_tokenizer().decode(tokens)


@given(
    words=st.lists(st.sampled_from(["a", "ab", "é", "🙂", " the", "x" * 3, "abab"]), min_size=1, max_size=12),
    stops=st.lists(st.sampled_from(["ba", "bab", "🙂 ", "é", "xxx", "th", "zz"]), max_size=3),
    again=st.integers(0, 11),
)
def test_pieces_of_text_are_the_text_before_the_first_stop(words: list[str], stops: list[str], again: int) -> None:
    tokenizer, whole = tiny_tokenizer(), "".join(words)
    tokens = tokenizer(whole)["input_ids"]
    text, pieces = Text(tokenizer, stops), []
    for place, token in enumerate(tokens):
        if place == again:
            # As after an interrupt: asked twice, or begun anew.
            text.push(tokens[:place], 65, False)
            text.push([], tokens[0], False)
        piece = text.push(tokens[:place], token, place == len(tokens) - 1)
        pieces.append(piece.text)
        if piece.stopped:
            break
    found = [at for stop in stops if (at := whole.find(stop)) >= 0]
    assert "".join(pieces) == whole[: min(found, default=len(whole))]


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


def test_grammars_bind_their_requests_and_no_others(engine: Engine) -> None:
    pytest.importorskip("llguidance")
    done = engine.generate(
        [*PROMPTS, PROMPTS[0]],
        [
            asked(regex="[a-c]{3,5}!", detokenize=True, max_tokens=30),
            asked(),
            asked(json_schema=SCHEMA, detokenize=True, max_tokens=60, temperature=0.9, seed=2),
            asked(regex="(yes|no)", detokenize=True, temperature=1.0, seed=7, n=2),
        ],
    )
    assert re.fullmatch("[a-c]{3,5}!", done[0].text or "")
    assert done[0].finish_reason == "stop"
    assert done[1].tokens == plain(1)
    if done[2].finish_reason == "stop":
        assert isinstance(json.loads(done[2].text or "")["n"], int)
    else:
        assert re.match(r'\s*\{\s*"n"\s*:\s*-?\d*', done[2].text or "")
    assert {done[3].text, done[4].text} <= {"yes", "no"}
    assert done[4].index == 1


def test_a_step_that_nobody_asks_anything_of_is_the_one_before(engine: Engine) -> None:
    model = copy.deepcopy(OWN)
    with Engine(model, make_cache("vattn", shape_of(model, 1, 64), "cpu"), compile=False) as fresh:
        fresh.generate([PROMPTS[0]], asked())
        assert fresh.decode.processors.static == []
        assert fresh.decode.kind == StepKind()
    engine.generate([PROMPTS[0]], asked(min_p=0.1, logprobs=1))
    assert engine.decode.kind == StepKind()
    assert not engine.decode.processors.has_grammars


@pytest.mark.parametrize(
    ("options", "forced", "said"),
    [
        ({"stop": "x"}, None, "stop needs a tokenizer"),
        ({"detokenize": True}, None, "detokenize needs a tokenizer"),
        ({"bad_words": ["x"]}, None, "bad_words are texts, and this engine has no tokenizer"),
        ({"regex": "x"}, None, "a grammar needs a tokenizer"),
        ({"logit_bias": {VOCAB: 1.0}}, None, "logit_bias has token ids outside 0 to 383"),
        ({"bad_words": [[VOCAB]]}, None, "bad_words has token ids outside"),
        ({"repetition_penalty": 1.1, "max_tokens": 1}, [3], "forced tokens are fed in place of chosen ones"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_at_its_door(options: dict, forced: list[int] | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        bare().submit([1, 2], SamplingParams(**options), forced)
    assert not bare().busy


def test_an_engine_that_speculates_refuses_what_changes_logits_and_serves_the_rest() -> None:
    model = copy.deepcopy(OWN)
    cache = make_cache("vattn", shape_of(model, 2, 64), "cpu")
    drafts = Speculation("ngram", num_speculative_tokens=2)
    with Engine(
        model, cache, compile=False, capture=False, tokenizer=tiny_tokenizer(), attention="torch", speculation=drafts
    ) as engine:
        for options in ({"logprobs": 1}, {"repetition_penalty": 1.2}, {"min_p": 0.1}, {"regex": "a"}):
            with pytest.raises(ConfigError, match="this engine speculates"):
                engine.submit(PROMPTS[0], SamplingParams(**options))  # type: ignore[arg-type]
        text = tiny_tokenizer().decode(plain(2))
        (done,) = engine.generate([PROMPTS[2]], asked(stop=text[6:8], prompt_logprobs=1))
        assert done.text == text[: text.index(text[6:8])]
        assert len(done.prompt_logprobs or ()) == len(PROMPTS[2])


def test_a_text_without_a_tokenizer_and_a_tokenizer_that_is_none() -> None:
    with pytest.raises(ConfigError, match="the prompt is text, and this engine has no tokenizer"):
        bare().submit("text")
    with pytest.raises(ConfigError, match="tokenizer is an int"):
        Engine(bare().model, bare().cache, tokenizer=3)


@cache
def bare() -> Engine:
    """Without a tokenizer; nothing is queued in it."""
    model = copy.deepcopy(OWN)
    return Engine(model, make_cache("contiguous", shape_of(model, 2, 32), "cpu"), compile=False, capture=False)


def test_a_grammar_that_cannot_be_is_refused(engine: Engine) -> None:
    pytest.importorskip("llguidance")
    for wrong in ({"regex": "(("}, {"json_schema": {"type": "no such type"}}):
        with pytest.raises(ConfigError, match="the grammar is not possible"):
            engine.submit(PROMPTS[0], SamplingParams(**wrong))  # type: ignore[arg-type]


def test_texts_go_in_and_come_out(engine: Engine) -> None:
    (done,) = engine.generate(["the quick brown"], asked())
    assert done.tokens == plain(0)
    assert done.text == tiny_tokenizer().decode(plain(0), skip_special_tokens=True)


def values(logprobs: Sequence[TokenLogprob | None] | None) -> list[float]:
    assert logprobs is not None
    return [each.logprob for each in logprobs if each is not None]


def test_who_is_sent_back_suspended_or_forked_goes_on_as_alone() -> None:
    """Rows of tables are written again from the record, and grammars follow it."""
    params = [
        asked(repetition_penalty=1.6, logprobs=1, max_tokens=24),
        asked(frequency_penalty=1.5, bad_words=[[n, n] for n in range(40)], max_tokens=24, detokenize=True),
        asked(regex="[a-z ]{20}", max_tokens=24, temperature=1.0, seed=3),
    ]
    model = copy.deepcopy(OWN)

    def engine_of() -> Engine:
        cache = make_cache("vattn", shape_of(model, 3, 64), "cpu")
        return Engine(model, cache, compile=False, capture=False, tokenizer=tiny_tokenizer(), prefix_cache=False)

    with engine_of() as engine:
        alone = [engine.generate([prompt], each)[0] for prompt, each in zip(PROMPTS, params, strict=True)]
    with engine_of() as engine:
        numbers = [engine.submit(prompt, each) for prompt, each in zip(PROMPTS, params, strict=True)]
        events = [event for _ in range(8) for event in engine.step()]
        # The same weights; all are sent back to the queue, and computed anew.
        name, weight = next(iter(OWN.state_dict().items()))
        engine.update_weights({name: weight}, partial=True, running="restart")
        events += engine.run()
    for number, wanted in zip(numbers, alone, strict=True):
        assert [event.token for event in events if event.request == number] == wanted.tokens
        assert wanted.text is None or "".join(e.text for e in events if e.request == number) == wanted.text
    first = [event.logprob for event in events if event.request == numbers[0]]
    assert values(first) == pytest.approx(values(alone[0].logprobs), abs=1e-4)
    with engine_of() as engine:
        numbers = [engine.submit(prompt, each) for prompt, each in zip(PROMPTS, params, strict=True)]
        events = [event for _ in range(8) for event in engine.step()]
        engine.suspend(numbers[1])
        forks = [engine.fork(number) for number in (numbers[0], numbers[2])]
        events += [event for _ in range(4) for event in engine.step()]
        engine.resume(numbers[1])
        events += engine.run()
    for number, wanted in zip(numbers, alone, strict=True):
        assert [event.token for event in events if event.request == number] == wanted.tokens
    # A fork of a greedy request repeats it from where it was; its log-probabilities too.
    forked = [event for event in events if event.request == forks[0]]
    assert [event.token for event in forked] == alone[0].tokens[forked[0].index :]
    assert values([event.logprob for event in forked]) == pytest.approx(
        values(alone[0].logprobs)[forked[0].index :], abs=1e-4
    )


def test_a_fork_asks_for_what_its_own_parameters_say() -> None:
    """Not for what the request asks for that it is a fork of, and what cannot be is refused before it is queued."""
    cache = make_cache("vattn", shape_of(model := copy.deepcopy(OWN), 5, 64), "cpu")
    with Engine(model, cache, compile=False, capture=False, tokenizer=tiny_tokenizer()) as engine:
        number = engine.submit(PROMPTS[0], asked(regex="[a-z ]{50}", max_tokens=50))
        events = [event for _ in range(5) for event in engine.step()]
        so_far = [event.token for event in events]
        with pytest.raises(ConfigError, match="are not how the grammar begins"):
            engine.fork(number, asked(regex="[0-9]{3}"))
        with pytest.raises(ConfigError, match="prompt_logprobs come with the first token"):
            engine.fork(number, asked(prompt_logprobs=1))
        assert len(engine.scheduler.requests) == 1
        forks = [
            engine.fork(number, each)
            for each in (
                asked(),
                asked(bad_words=[so_far[-1:], "e"], detokenize=True),
                asked(regex="[a-z ]{30}", logprobs=0, max_tokens=40),
            )
        ]
        again = engine.fork(forks[1])
        events += engine.run()
        plainly = engine.generate([PROMPTS[0] + so_far], asked(max_tokens=LENGTH - len(so_far)))[0].tokens
    got = {n: [event.token for event in events if event.request == n] for n in (number, *forks, again)}
    assert got[forks[0]] == plainly
    assert re.fullmatch("[a-z ]{50}", tiny_tokenizer().decode(got[number]))
    assert so_far[-1] not in got[forks[1]]
    assert got[again] == got[forks[1]]
    assert all((event.text is not None) == (event.request in (forks[1], again)) for event in events)
    assert re.fullmatch("[a-z ]{30}", tiny_tokenizer().decode(so_far + got[forks[2]]))
    assert all((event.logprob is not None) == (event.request == forks[2]) for event in events)


def test_a_grammar_beside_who_asks_for_log_probabilities_alone() -> None:
    """Who changes no logits has no row of the tables."""
    cache = make_cache("vattn", shape_of(model := copy.deepcopy(OWN), 3, 64), "cpu")
    params = [asked(logprobs=1), asked(regex="[a-z ]{9}"), asked()]
    with Engine(model, cache, compile=False, capture=False, tokenizer=tiny_tokenizer()) as engine:
        first, second, third = engine.generate(PROMPTS, params)
    assert (first.tokens, third.tokens) == (plain(0), plain(2))
    assert len(values(first.logprobs)) == LENGTH
    assert re.fullmatch("[a-z ]{9}", tiny_tokenizer().decode(second.tokens))
