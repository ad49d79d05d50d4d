"""`bench doors --measure deterministic`: what `Engine(deterministic=True)` costs, and whether it holds.

Steps of so many sequences, and all prompts at once, by an engine with and one without. Then requests of a pool of
prompts, which first ran alone, in random batches, some of them joining while others run: `different` are those whose
tokens or log-probabilities have other bits than alone; `plain_different` are those of the engine without, in a tenth of
the batches. Which part differs is told by `different_first_token`, those whose first token does, which comes from the
prompt's passes, and `first_different`, requests by the index of the first token that does. `product_rows_different` are
rows of the model's products, by one weight of each shape, of as many equal rows as there are lanes and of one, that are
not the first row of the first call.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import zip_longest
from statistics import median

import numpy as np
import torch
from torch import nn

from trtllm_vattn.bench.cases.doors_http import Trace, engine_seconds, finished
from trtllm_vattn.bench.harness.case import Recording, engine_for
from trtllm_vattn.bench.harness.contenders import observed
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.request import TokenEvent
from trtllm_vattn.runtime.sampling import SamplingParams

MOST_AT_ONCE = 20
POOL = 32
OUTPUT = 12
"""Tokens of each request whose bits are compared."""
STEPS = 24
"""Of so many sequences at once, at least, whose median is taken."""
CALLS = 20
"""Of each product."""

Bits = list[tuple[int | None, str]]


def measure_deterministic(
    recording: Recording, args: argparse.Namespace, plain: Engine, prompts: Sequence[list[int]]
) -> None:
    """An engine that is not deterministic, and one over the same model that is, one after the other."""
    model = recording.model
    step_ms: dict[bool, dict[int, float]] = {}
    seconds: dict[bool, float] = {}
    different: dict[bool, Counter[int]] = {}
    requests = 0
    for deterministic in (False, True):
        with ExitStack() as made:
            engine = plain
            if deterministic:
                sizes_of = (args.device, args.max_seqs, args.max_seq_len, args.budget)
                engine = made.enter_context(engine_for(model, *sizes_of, attention=args.attention, deterministic=True))
                recording.say("a deterministic engine is captured")
            sizes = [size for size in args.batch_sizes if size <= args.max_seqs]
            step_ms[deterministic] = {size: _step_ms(engine, prompts, size) for size in sizes}
            whole = Trace(prompts, args.max_output)
            took = [engine_seconds(engine, whole, [whole.plain] * len(prompts))[0] for _ in range(args.rounds)]
            seconds[deterministic] = min(took)
            batches = args.batches if deterministic else -(-args.batches // 10)
            recording.say(f"steps {step_ms[deterministic]}; {batches} batches follow")
            asked, different[deterministic] = _compare(engine, prompts, args, batches, recording)
            requests = asked if deterministic else 0
    costs = {f"deterministic_step_over_plain_{n}": step_ms[True][n] / took for n, took in step_ms[False].items()}
    summary = {
        "deterministic_requests": requests,
        "deterministic_batches": args.batches,
        "different": different[True].total(),
        "different_first_token": different[True][0],
        "plain_different": different[False].total(),
        "product_rows_different": _product_rows_different(model, args.max_seqs),
        **costs,
        "deterministic_over_plain": seconds[False] / seconds[True],
    }
    names = {False: "plain", True: "deterministic"}
    results = {
        names[each]: {
            "step_ms": step_ms[each],
            "seconds": seconds[each],
            "first_different": dict(sorted(different[each].items())),
        }
        for each in names
    }
    recording.wrong += [f"different: {different[True].total()}"] if different[True] else []
    recording.found("deterministic", results, **summary)


@torch.inference_mode()
def _product_rows_different(model: nn.Module, rows: int) -> int:
    """Rows of products of `rows` equal rows, and of one, by one weight of each shape, that have other bits than the
    first row of the first of `CALLS` calls."""
    weights = {each.weight.shape: each.weight for each in model.modules() if isinstance(each, nn.Linear)}
    different = 0
    for weight in weights.values():
        row = torch.randn(1, weight.shape[1], device=weight.device).to(weight.dtype)
        for count in (1, rows):
            given = row.expand(count, -1).contiguous()
            outs = [nn.functional.linear(given, weight) for _ in range(CALLS)]
            different += sum(int((out != outs[0][:1]).any(1).sum()) for out in outs)
    return different


def _step_ms(engine: Engine, prompts: Sequence[list[int]], size: int) -> float:
    """The median of a step of so many sequences.

    A deterministic engine takes a step of those that decode behind each pass of a prompt, so the first sequences have
    to be long enough that the last prompt goes in before they end.
    """
    room = engine.cache.shape.max_seq_len
    shortest = min(min(map(len, prompts)), max(1, room - size - 2 * STEPS))
    passes = size * -(-shortest // engine.scheduler.chunk)
    params = SamplingParams(min(passes + STEPS, room - shortest), ignore_eos=True)
    for number in range(size):
        engine.submit(prompts[number % len(prompts)][:shortest], params)
    with observed(engine) as records:
        finished(engine)
    took = [each.wall_s for each in records if each.lanes == size and not each.prefilled]
    if not took:
        most = max(each.lanes for each in records)
        raise ConfigError(
            f"no step had {size} sequences, but {most} at most, of {shortest} tokens and {params.max_tokens} more; "
            "raise --budget, --max-seqs or --max-seq-len, or leave out that of --batch-sizes"
        )
    return 1e3 * median(took)


def _compare(
    engine: Engine, prompts: Sequence[list[int]], args: argparse.Namespace, batches: int, recording: Recording
) -> tuple[int, Counter[int]]:
    """How many requests there were in so many random batches, and how many of them had other bits than alone, by the
    index of the first token that had."""
    random = np.random.default_rng(args.seed)
    output = min(OUTPUT, args.max_output)
    pool = [*prompts][:POOL]
    greedy = SamplingParams(output, ignore_eos=True, logprobs=1)
    params = [greedy if n % 2 else replace(greedy, temperature=0.8, seed=n) for n in range(len(pool))]
    wanted: list[Bits] = []
    for prompt, each in zip(pool, params, strict=True):
        engine.submit(prompt, each)
        wanted.append(_bits(finished(engine)))
    requests, different = 0, Counter[int]()
    for batch in range(batches):
        place: dict[int, int] = {}
        events: list[TokenEvent] = []
        for which in random.integers(0, len(pool), int(random.integers(1, MOST_AT_ONCE))).tolist():
            place[engine.submit(pool[which], params[which])] = which
            events += engine.step() if random.random() < 0.3 else []
        events += finished(engine)
        by_request: dict[int, list[TokenEvent]] = {number: [] for number in place}
        for event in events:
            by_request[event.request].append(event)
        requests += len(place)
        firsts = (_first_different(_bits(by_request[number]), wanted[which]) for number, which in place.items())
        different.update(first for first in firsts if first is not None)
        if batch % 25 == 0:
            recording.say(
                f"batch {batch + 1} of {batches}: {different.total()} of {requests} requests have other bits, "
                f"{different[0]} from their first token on"
            )
    return requests, different


def _first_different(got: Bits, wanted: Bits) -> int | None:
    """The index of the first token with other bits, None where there is none."""
    pairs = enumerate(zip_longest(got, wanted))
    return next((index for index, (one, other) in pairs if one != other), None)


def _bits(events: Sequence[TokenEvent]) -> Bits:
    return [(each.token, "" if each.logprob is None else each.logprob.logprob.hex()) for each in events]
