"""Parameters that change logits: against transformers' processors on the same logits, each alone and mixed in a batch.

Presence and frequency penalties, which transformers has not, are against their formula (OpenAI's).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.lane_processors import LaneAsks, LaneProcessors, check_sizes
from trtllm_vattn.runtime.sampling import SamplingParams, add_noise, sample_on_device, settings

VOCAB = 96
STOPS = (7, 8)
ALONE = [
    SamplingParams(repetition_penalty=1.7),
    SamplingParams(repetition_penalty=0.6),
    SamplingParams(presence_penalty=1.5),
    SamplingParams(frequency_penalty=-0.7),
    SamplingParams(logit_bias={3: 4.0, 90: -100.0, 0: 0.5}),
    SamplingParams(bad_words=[[5], [1, 2], [4, 4, 6], [9, 9, 9, 9, 9, 9, 9, 3]]),
    SamplingParams(min_tokens=2, stop_token_ids=STOPS),
    SamplingParams(min_p=0.2, temperature=0.8, seed=4),
    SamplingParams(min_p=0.05, temperature=1.3, top_k=9, top_p=0.8, seed=5),
]


def mixed(rng: np.random.Generator) -> SamplingParams:
    """Some of all parameters."""
    params = SamplingParams(seed=int(rng.integers(1000)), temperature=float(rng.choice([0, 0.7, 1.4])))
    for one in ALONE:
        if rng.random() < 0.4:
            changed = {name: value for name, value in vars(one).items() if value != getattr(SamplingParams(), name)}
            params = replace(params, **{**changed, "seed": params.seed, "temperature": params.temperature})
    return params


@cache
def no_bad_words(words: tuple[tuple[int, ...], ...]) -> theirs.NoBadWordsLogitsProcessor:
    return theirs.NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=-1)


@cache
def biased(biases: tuple[tuple[int, float], ...]) -> theirs.SequenceBiasLogitsProcessor:
    return theirs.SequenceBiasLogitsProcessor({(token,): bias for token, bias in biases})


def reference(params: SamplingParams, prompt: list[int], chosen: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Logits ``[vocab]`` as transformers processes them, with the two penalties that it lacks in their place."""
    ids, scores = torch.tensor([prompt + chosen]), logits[None].clone()
    if params.logit_bias:
        scores = biased(params.logit_bias)(ids, scores)
    if params.repetition_penalty != 1:
        scores = theirs.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    for token, times in Counter(chosen).items():
        scores[0, token] -= params.frequency_penalty * times + params.presence_penalty
    if params.bad_words:
        scores = no_bad_words(params.bad_words)(ids, scores)
    if params.min_tokens:
        early = theirs.MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, list(STOPS), device="cpu")
        scores = early(ids, scores)
    return scores[0]


def drawn(params: SamplingParams, scores: torch.Tensor, index: int) -> int:
    """A token by transformers' warpers and this library's noise."""
    if params.greedy:
        return int(scores.argmax())
    ids, scores = torch.zeros(1, 1, dtype=torch.long), scores[None]
    scores = theirs.TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = theirs.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = theirs.TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p:
        scores = theirs.MinPLogitsWarper(params.min_p)(ids, scores)
    add_noise(scores, torch.tensor([params.key(index)]), torch.tensor([True]))
    return int(scores.argmax())


def check(every: list[SamplingParams], steps: int, device: str = "cpu") -> None:
    """All in one batch, some steps long: logits and tokens are the reference's."""
    rng = np.random.default_rng(len(every))
    generator = torch.Generator().manual_seed(1)
    lanes = LaneProcessors(len(every), 1, torch.device(device))
    lanes.require(VOCAB)
    # Few different tokens, so that they repeat and words match; and rows that are no lane's number. As long as the
    # longest word: transformers does not look for one in fewer tokens, though all before its last may be there.
    prompts = [rng.integers(0, 10, rng.integers(8, 12)).tolist() for _ in every]
    chosen: list[list[int]] = [[] for _ in every]
    lane_of = {100 + i: i for i in range(len(every))}
    for i, params in enumerate(every):
        words = tuple(word for word in params.bad_words if not isinstance(word, str))
        lanes.set(100 + i, LaneAsks(params, prompts[i], chosen[i], words) if params.changes_logits else None)
    for step in range(steps):
        logits = torch.randn(len(every), VOCAB, generator=generator) * 2
        logits[:, :10] += 2
        lanes.send(lane_of)
        changed = lanes.apply(logits.to(device))
        wanted = torch.stack([reference(*row) for row in zip(every, prompts, chosen, logits, strict=True)])
        torch.testing.assert_close(changed.cpu(), wanted, rtol=1e-5, atol=1e-5)
        rows = torch.tensor([settings(params) for params in every], dtype=torch.float64, device=device)
        keys = torch.tensor([params.key(step) for params in every], device=device)
        tokens = sample_on_device(changed, *rows.unbind(1), keys, min_p=lanes.min_p(len(every)))
        assert tokens.tolist() == [drawn(params, wanted[i], step) for i, params in enumerate(every)]
        if not any(params.truncates for params in every):
            min_p = lanes.min_p(len(every))
            unsorted = sample_on_device(changed, *rows.unbind(1), keys, min_p=min_p, truncated=False)
            assert unsorted.tolist() == tokens.tolist()
        lanes.note(tokens, torch.ones(len(every), dtype=torch.bool, device=device))
        for record, token in zip(chosen, tokens.tolist(), strict=True):
            record.append(token)
        if step == 1:
            # Written again from the records, as after a preemption; half of them in other lanes.
            for i, params in enumerate(every[::3]):
                asks = LaneAsks(params, prompts[3 * i], chosen[3 * i], tuple(params.bad_words))  # type: ignore[arg-type]
                lanes.clear(100 + 3 * i)
                lanes.set(100 + 3 * i, asks if params.changes_logits else None)


DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("params", ALONE, ids=range(len(ALONE)))
def test_each_parameter_alone_is_transformers(params: SamplingParams, device: str) -> None:
    # Beside a request that asks for nothing.
    check([params, SamplingParams(), params], 4, device)


@pytest.mark.parametrize("device", DEVICES)
def test_500_random_mixes_in_one_batch_are_transformers(device: str) -> None:
    rng = np.random.default_rng(0)
    check([mixed(rng) for _ in range(500)], 2, device)


def test_a_bad_word_as_long_as_what_came_before_is_found() -> None:
    lanes = LaneProcessors(2, 1, torch.device("cpu"))
    lanes.require(VOCAB)
    words = ((1, 2), (3, 1, 4), (5, 1, 6))
    for slot, prompt in enumerate(([1], [3, 1])):
        lanes.set(slot, LaneAsks(SamplingParams(bad_words=words), prompt, [], words))
    lanes.send({0: 0, 1: 1})
    changed = lanes.apply(torch.zeros(2, VOCAB))
    assert [row.isinf().nonzero().flatten().tolist() for row in changed] == [[2], [2, 4]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_p": 1.5}, "min_p is 1.5; it is from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0.0; it is above 0"),
        ({"presence_penalty": 3}, "presence_penalty is 3.0; it is from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"logit_bias": {1: float("inf")}}, "a logit_bias is inf"),
        ({"logit_bias": "text"}, "logit_bias is a str"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "logit_bias has 1025 tokens; at most 1024"),
        ({"bad_words": "word"}, "bad_words is a str"),
        ({"logit_bias": [5]}, "logit_bias is a list"),
        ({"bad_words": [[]]}, "bad_words holds an empty one"),
        ({"stop": [""]}, "stop holds ''"),
        ({"stop": 3}, "stop is an int"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5, and max_tokens 4"),
        ({"logprobs": 21}, "logprobs is 21; it is a whole number from 0 to 20"),
        ({"json_schema": "{"}, "json_schema is no JSON"),
        ({"json_schema": [1]}, "a JSON schema is an object"),
        ({"regex": ""}, "regex is a str"),
        ({"regex": "a", "json_schema": {}}, "give one of them"),
        ({"detokenize": 1}, "detokenize is 1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        SamplingParams(**options)  # type: ignore[arg-type]


def test_what_a_row_cannot_hold_is_refused() -> None:
    for words, said in (
        ([[1] * 9], "a bad word has 9 tokens; at most 8"),
        ([[1, n] for n in range(129)], "129 bad words have more than one token; at most 128"),
        ([[n] for n in range(1025)], "name 1025 token ids; at most 1024"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_sizes(SamplingParams(), words)
    with pytest.raises(ConfigError, match="there are 33 stop tokens"):
        check_sizes(SamplingParams(min_tokens=1, stop_token_ids=range(33)), ())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
def test_compiled_noise_is_the_noise(rows: int) -> None:
    """Inductor took the product of an index and a 64-bit factor for an index of 32 bits, and triton refused it."""
    keys = torch.tensor([SamplingParams(temperature=1.0, seed=seed).key(5) for seed in range(rows)])
    sampled = torch.arange(rows) != 1
    wanted = torch.zeros(rows, 5000)
    add_noise(wanted, keys, sampled)
    compiled = torch.compile(add_noise, dynamic=True)
    found = torch.zeros(rows, 5000, device="cuda")
    with torch.inference_mode():
        compiled(found, keys.cuda(), sampled.cuda())
    torch.testing.assert_close(found.cpu(), wanted)
