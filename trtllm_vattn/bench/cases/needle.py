"""Part of `bench compression`: what evicting tokens costs a model that has to find one of many pairs again.

Associative recall: a prompt is pairs of a random key and a random value, ``k v k v …``, each key once and each value
equally often, and then questions, ``? k ? k …``, whose answers are never fed. Behind the prompt tokens are evicted, and
only then further questions are asked one at a time, half of them asked before. A key's value stands nowhere but in its
pair, so that a head which no longer has the pair can only guess; chance is one in `VALUES`.

The model has two layers and is trained on the host in seconds. So that the heads which look for a pair need not be
found by chance first, its first layer starts with heads that look at the token before (through the biases of queries
and keys), and its second with queries and keys that match what those wrote; it answers by chance until it is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trtllm_vattn.bench.harness.case import Recording
from trtllm_vattn.cache.compression import H2O, CompressionPolicy, FastGen
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.vmm.host import HostDriver

KEYS, VALUES = 96, 16
ASK = KEYS + VALUES
"""The token that a question begins with; keys and values are the tokens below it."""
PAIRS, ASKED = 48, 16
"""Pairs of a prompt, and questions of it."""
FEWEST_PAIRS = 8
"""Of the first prompts that the model is trained with."""
HIDDEN, HEADS, THETA = 64, 2, 10_000.0
STEPS, BATCH, LEARNING_RATE = 150, 24, 3e-3
KEPT = (20, 40, 60, 80)
"""Percent of the prompt's tokens."""
PROMPTS = 24
THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
"""Of FastGen, which keeps as many tokens as they ask for."""
TOP = 20
"""Log-probabilities of an answer, beside each other those of all values."""


@dataclass(frozen=True)
class Needles:
    """Prompts, and the questions behind them.

    Attributes
    ----------
    prompts, forced : list of list of int
        Tokens of each prompt, and those fed behind it.
    answers, before : ndarray
        ``[prompts, questions]``: the value's token, and whether the prompt had asked for it.
    """

    prompts: list[list[int]]
    forced: list[list[int]]
    answers: np.ndarray
    before: np.ndarray


def needles(count: int, seed: int, pairs: int = PAIRS, questions: int = ASKED) -> Needles:
    """Prompts of so many pairs and questions; behind each, as many questions of those, and as many others."""
    random = np.random.default_rng(seed)
    prompts, forced, answers, before = [], [], [], []
    for _ in range(count):
        keys = random.permutation(KEYS)[:pairs]
        values = KEYS + random.permutation(np.arange(pairs) % VALUES)
        order = random.permutation(pairs)
        asked = random.permutation(2 * questions)
        prompts.append([*np.stack([keys, values], 1).ravel().tolist(), *_questions(keys[order[:questions]])])
        # The last one's answer is what the engine's last step gives, which feeds nothing.
        forced.append([*_questions(keys[order[asked]]), ASK])
        answers.append(values[order[asked]])
        before.append(asked < questions)
    return Needles(prompts, forced, np.array(answers), np.array(before))


def _questions(keys: np.ndarray) -> list[int]:
    return [token for key in keys.tolist() for token in (ASK, key)]


def trained_model(
    steps: int, seed: int, most_pairs: int = PAIRS, say: Callable[[str], None] = lambda text: None
) -> PreTrainedModel:
    """A model of two layers, trained for so many steps with prompts of up to so many pairs; `say` is told how far."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=ASK + 1,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        initializer_range=0.08,
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    _start(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        # Few pairs at first.
        pairs = min(most_pairs, FEWEST_PAIRS + 2 * most_pairs * step // steps)
        ids, answers = _lesson(generator, pairs)
        logits = model(input_ids=ids, use_cache=False).logits[:, 2 * pairs + 1 :: 2]
        loss = functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            say(f"{step + 1} steps of training, loss {loss.item():.3f}")
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _start(model: PreTrainedModel) -> None:
    """Heads that look at the token before, and heads whose queries and keys match what those write."""
    first, second = (layer.self_attn for layer in model.model.layers)
    turns = THETA ** -torch.arange(0, 1, 2 * HEADS / HIDDEN)
    half = torch.full_like(turns, 5.0)
    # Turned by one position more than a key's, which makes the two alike one position behind it.
    ahead = torch.cat((half * (turns.cos() + turns.sin()), half * (turns.cos() - turns.sin())))
    for projection in (first.q_proj, first.k_proj):
        projection.weight.mul_(0.1)
    first.q_proj.bias.copy_(ahead.repeat(HEADS))
    first.k_proj.bias.fill_(5.0)
    matched, written, values = (torch.linalg.qr(torch.randn(HIDDEN, HIDDEN))[0] for _ in range(3))
    first.v_proj.weight.copy_(values)
    first.o_proj.weight.copy_(written @ values.T)
    second.q_proj.weight.copy_(3 * matched)
    second.k_proj.weight.copy_(matched @ written.T)
    model.model.embed_tokens.weight.normal_()


def _lesson(generator: torch.Generator, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of prompts int64 ``[BATCH, tokens]``, and the answers ``[BATCH, ASKED]``."""
    keys = torch.rand(BATCH, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = KEYS + torch.rand(BATCH, pairs, generator=generator).argsort(1).remainder(VALUES)
    asked = torch.randint(0, pairs, (BATCH, ASKED), generator=generator)
    questions = torch.stack((torch.full_like(asked, ASK), keys.gather(1, asked)), 2)
    ids = torch.cat((torch.stack((keys, values), 2).flatten(1), questions.flatten(1)), 1)
    return ids, values.gather(1, asked)


@dataclass(frozen=True)
class Answers:
    """What a model answered: the tokens ``[prompts, questions]``; log-probabilities of all values, of one another,
    ``[prompts, questions, VALUES]``; and the share of the prompts' keys and values that was kept."""

    tokens: np.ndarray
    logprobs: np.ndarray
    kept: float


def ask(model: PreTrainedModel, policy: CompressionPolicy | None, asked: Needles) -> Answers:
    """Ask questions through an engine that evicts tokens of the prompts by a policy; None keeps all."""
    count, steps = len(asked.prompts), len(asked.forced[0])
    length = len(asked.prompts[0])
    config = CacheConfig()
    if policy is not None:
        heads = 1 if policy.by_head else None
        config = CacheConfig(own_lengths=True, heads_per_range=heads, layers_per_range=1, extent_classes=1)
    shape = shape_of(model, count, length + steps)
    cache = KVCacheManager(shape, HostDriver(), count * (1 << 19), config=config)
    options: dict[str, Any] = {"compile": False, "capture": False, "prefix_cache": False}
    with Engine(model, cache, attention="torch", compression=policy, **options) as engine:
        params = SamplingParams(max_tokens=steps, ignore_eos=True, logprobs=TOP)
        order = [engine.submit(prompt, params, fed) for prompt, fed in zip(asked.prompts, asked.forced, strict=True)]
        found: dict[int, list[Any]] = {request: [] for request in order}
        for event in engine.run():
            found[event.request].append(event)
        evicted = engine.compression.evicted_bytes if engine.compression is not None else 0
    # The first token answers the prompt's last question; behind every question's mark comes its key.
    events = [found[request][2::2] for request in order]
    tokens = np.array([[event.token for event in row] for row in events])
    logprobs = np.array([[_of_values(event.logprob.top) for event in row] for row in events])
    return Answers(tokens, logprobs, 1 - evicted / (count * length * shape.token_bytes))


def _of_values(top: Sequence[tuple[int, float]]) -> np.ndarray:
    """Log-probabilities of the values alone; one that is not among the likeliest tokens has that of the last of those,
    which is more than its own."""
    known, least = dict(top), min(logprob for _, logprob in top)
    found = np.array([known.get(KEYS + value, least) for value in range(VALUES)])
    shares: np.ndarray = found - np.logaddexp.reduce(found)
    return shares


def compared(policy: str, asked: Needles, found: Answers, whole: Answers) -> dict[str, Any]:
    """A row of the result: shares of right answers, and how far logits drift from those with everything kept, as the
    mean Kullback-Leibler divergence of the values' probabilities (nats), and as the largest difference of their
    log-probabilities."""
    right = found.tokens == asked.answers
    drift = (np.exp(whole.logprobs) * (whole.logprobs - found.logprobs)).sum(-1)
    return {
        "policy": policy,
        "kept": found.kept,
        "right": float(right.mean()),
        "right_asked_before": float(right[asked.before].mean()),
        "right_never_asked": float(right[~asked.before].mean()),
        "mean_kl": float(drift.mean()),
        "largest_logprob_difference": float(np.abs(whole.logprobs - found.logprobs).max()),
    }


def measured(
    model: PreTrainedModel, asked: Needles, kept: Sequence[int], thresholds: Sequence[float] = THRESHOLDS
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with a name each: everything kept; H2O and a window of the last tokens at so many percent; FastGen at the
    threshold, of these, by which it keeps the nearest to as many."""
    whole = ask(model, None, asked)
    yield "whole", compared("whole", asked, whole, whole)
    fastgen = [
        (threshold, ask(model, FastGen([ASK], threshold=threshold, frequent=0.1, local=0.1), asked))
        for threshold in thresholds
    ]
    for percent in kept:
        share = percent / 100
        # As many of each, so that they add up to the share; the newest token is kept in any case.
        budget = round(share * len(asked.prompts[0]))
        policies: dict[str, CompressionPolicy] = {
            "h2o": H2O(budget // 2, budget - budget // 2),
            "window": H2O(0, budget),
        }
        for name, policy in policies.items():
            yield f"{name}_{percent}", compared(name, asked, ask(model, policy, asked), whole)
        if fastgen:
            threshold, nearest = min(fastgen, key=lambda each: abs(each[1].kept - share))
            yield f"fastgen_{percent}", {**compared("fastgen", asked, nearest, whole), "threshold": threshold}


def needle(recording: Recording) -> Iterator[dict[str, Any]]:
    """Right answers and drift by policy and share kept; a model is trained for it on the host, whatever the device."""
    model = trained_model(STEPS, recording.args.seed, say=recording.say)
    rows: list[dict[str, Any]] = []
    recording.results["needle"] = {"chance": 1 / VALUES, "prompt_tokens": 2 * (PAIRS + ASKED), "rows": rows}
    yield {"needle_chance": 1 / VALUES}
    for name, row in measured(model, needles(PROMPTS, recording.args.seed + 1), KEPT):
        rows.append({"name": name, **row})
        yield {
            f"needle_kept_{name}": row["kept"],
            f"needle_right_{name}": row["right"],
            f"needle_right_asked_before_{name}": row["right_asked_before"],
            f"needle_kl_{name}": row["mean_kl"],
        }
