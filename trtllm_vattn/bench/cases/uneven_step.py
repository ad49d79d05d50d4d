"""The part of `bench attention` that looks at the whole captured step of an uneven batch: by the kernels that an engine
picks, and by one library's alone, in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trtllm_vattn.bench.harness.case import vocab_of
from trtllm_vattn.bench.harness.contenders import Contender, Contest, take_turns
from trtllm_vattn.bench.harness.recording import Recording
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.table import tabulate

ROUNDS = 4
PICKED = "auto"
COLUMNS: dict[str, str | Callable[[Any], str]] = {
    "whole step by": "attention",
    "sequences": "sequences",
    "tokens": "tokens:,.0f",
    "step p50 ms": "step_ms.p50:.3f",
    "p99": "step_ms.p99:.3f",
}


def step_points(recording: Recording, lengths: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """A row of each attention: steps of sequences that begin with so many tokens each."""
    args, model = recording.args, recording.model
    others = "cudnn" if args.device != "cpu" else "torch"
    random, vocab = np.random.default_rng(args.seed), vocab_of(model)
    # The first ones decode while the last prompts go in, one pass after another.
    tokens = -(-sum(lengths) // 1024) + ROUNDS * (steps + 8) + len(lengths)
    with Contest(len(lengths), max(lengths), tokens, args.seed) as contest:
        for name in (others, PICKED):
            cache = make_cache("vattn", shape_of(model, len(lengths), max(lengths) + tokens), args.device)
            engine = Engine(model, cache, attention=name, buckets=[len(lengths)], prefix_cache=False)
            contest.callback(engine.close)
            for length in lengths:
                prompt = random.integers(0, vocab, length).tolist()
                engine.submit(prompt, SamplingParams(tokens, ignore_eos=True))
            while engine.prefilling:
                engine.step()
            contest.contenders.append(Contender(name, "captured", engine))
        take_turns(contest.contenders, ROUNDS, steps, "uneven steps")
        return [
            {
                "attention": each.name,
                "sequences": len(lengths),
                "tokens": each.tokens[-1] * len(lengths),
                "runs_by": each.engine.attention.describe(),
                **each.times(),
            }
            for each in contest.contenders
        ]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The step by what is picked, by the other alone, and the one over the other."""
    ms = {row["attention"]: row["step_ms"]["p50"] for row in rows}
    (other,) = (name for name in ms if name != PICKED)
    name = f"uneven_{rows[0]['sequences']}_step"
    return {f"{name}_ms": ms[PICKED], f"{name}_ms_{other}": ms[other], f"{name}_over_{other}": ms[PICKED] / ms[other]}


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    return tabulate(rows, COLUMNS)
