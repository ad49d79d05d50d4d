"""`bench doors --measure updates`: a process beside the engine's sends new weights while requests stream.

What runs is prefilled again with the new weights (``running="restart"``), so each token has to be the one that the
weights of its stamp choose behind the tokens before it, up to rounding. That is looked at afterwards with the same
tokens forced, by either set of weights: a token's *distance* is by how much the largest logit exceeds its own.

* `mixed_tokens` are those whose distance by the weights of their stamp exceeds the tolerance, `mixed_ties` those with a
  smaller one that is not 0. Of each mixed token the results have its place, its versions and its distances.
* The tolerance is `--tie-tolerance`, or what rounding was seen to do, if that is more (`mixed_rounding`): the largest
  difference of a distance between two looks by the same weights in batches of other sizes, which no stamp has a part
  in.
* `mixed_swapped` is the control: of all tokens, the share that is told with the stamps of the two sets swapped.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from trtllm_vattn.bench.harness.case import Recording, captured_graphs, engine_for, vocab_of
from trtllm_vattn.bench.harness.identity import behind_likeliest
from trtllm_vattn.bench.peer.trainer import train
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.async_engine import AsyncEngine
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.sampling_fields import MOST_LOGPROBS
from trtllm_vattn.runtime.weights_ipc import receive_weights

START = "spawn"
"""How the trainer's process is started: a GPU's context is nothing to fork."""
STREAMS = 16
"""Requests that stream at once, at most; all are prefilled again with each update."""
BETWEEN = 4
"""Tokens of each, between two updates."""
LEAST_TIE = 1e-3
"""Logits: prefilling again rounds otherwise than decoding did."""
LOOKED_AT_AGAIN = 32
"""Requests that are looked at twice by the same weights, beside those that a first look tells."""
MOST_RECORDED = 50
"""Mixed tokens of the results."""

Distances = list[list[float]]
"""Of each token of each request."""


@dataclass
class Streamed:
    """A request's output, and the version of the weights that each token says it is of."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


def measure_updates(recording: Recording, args: argparse.Namespace, model: PreTrainedModel) -> None:
    """Updates of all weights, under the graphs, while requests stream."""
    spawning: Any = multiprocessing.get_context(START)
    connection, theirs = spawning.Pipe()
    process = spawning.Process(target=train, args=(theirs, args.model, args.device, args.seed), daemon=True)
    process.start()
    theirs.close()
    sizes = (args.device, args.max_seqs, args.max_seq_len, args.budget)
    around = AsyncEngine(engine := engine_for(model, *sizes, attention=args.attention))
    try:
        connection.recv()
        recording.say("an engine is captured, and the trainer has its weights")
        graphs = captured_graphs(engine)
        streamed, took = asyncio.run(_serve(around, connection, recording, args, vocab_of(model)))
        same = captured_graphs(engine) == graphs
        recording.say(f"{args.updates} updates; looking at {sum(len(each.tokens) for each in streamed)} tokens")
        tolerance = max(args.tie_tolerance, LEAST_TIE)
        looks = asyncio.run(around.call(lambda engine: _looks(engine, connection, streamed, tolerance)))
    finally:
        around.close()
    connection.send(None)
    process.join()
    stamps = {version for each in streamed for version in each.versions}
    found, mixed = judged(streamed, looks, tolerance)
    nbytes = sum(each.numel() * each.itemsize for each in model.parameters())
    summary = {
        "updates": args.updates,
        "recaptured": int(not same),
        "versions_stamped": len(stamps),
        "stamped_tokens": sum(len(each.tokens) for each in streamed),
        **found,
        "update_ms": 1e3 * median(took[False]),
        "update_restorable_ms": 1e3 * median(took[True]),
        "update_gb_per_s": 1e-9 * nbytes / median(took[False]),
    }
    recording.wrong += [f"{name}: {summary[name]}" for name in ("recaptured", "mixed_tokens") if summary[name]]
    recording.wrong += [] if summary["mixed_swapped"] else ["mixed_swapped: 0, so that mixed_tokens tells nothing"]
    results = {"seconds": took[False], "restorable_s": took[True], "bytes": nbytes, "mixed": mixed}
    recording.found("updates", results, **summary)


async def _serve(
    around: AsyncEngine, connection: Connection, recording: Recording, args: argparse.Namespace, vocab: int
) -> tuple[list[Streamed], dict[bool, list[float]]]:
    """What streams while the updates are made, and the seconds of each, with `restore` or without."""
    random = np.random.default_rng(args.seed)
    streamed: list[Streamed] = []
    arrived, done = asyncio.Event(), asyncio.Event()
    count = 0

    async def ask() -> None:
        nonlocal count
        while not done.is_set():
            mine = Streamed(random.integers(0, vocab, int(random.integers(1, args.context + 1))).tolist())
            streamed.append(mine)
            params = SamplingParams(args.max_output, ignore_eos=True)
            async for event in await around.add_request(mine.prompt, params):
                assert event.token is not None
                mine.tokens.append(event.token)
                mine.versions.append(event.weights_version)
                count += 1
                arrived.set()

    streams = min(STREAMS, args.max_seqs)
    asking = [asyncio.create_task(ask()) for _ in range(streams)]
    took: dict[bool, list[float]] = {False: [], True: []}
    for number in range(args.updates):
        wanted = count + BETWEEN * streams
        while count < wanted:
            arrived.clear()
            await arrived.wait()
        restore = bool(number % 2)
        started = perf_counter()
        connection.send((number + 1) % 2)
        weights = await asyncio.to_thread(receive_weights, connection)
        await around.update_weights_from_ipc(weights, running="restart", restore=restore)
        took[restore].append(perf_counter() - started)
        if number % 20 == 0:
            recording.say(f"update {number + 1} of {args.updates}: {took[restore][-1]:.3f} s")
    done.set()
    await asyncio.gather(*asking)
    return streamed, took


@dataclass
class Look:
    """What one set of weights makes of all tokens: distances, and those of a second look at some requests, by place."""

    first: Distances
    again: dict[int, list[float]]


def _looks(engine: Engine, connection: Connection, streamed: Sequence[Streamed], tolerance: float) -> list[Look]:
    """By each set of weights, all requests at once; and again as many at once as streamed, some of them and all that
    have a token of these weights whose distance exceeds the tolerance."""
    looks = []
    for which in (0, 1):
        connection.send(which)
        engine.update_weights_from_ipc(receive_weights(connection), restore=False)
        first = _distances(engine, streamed, len(streamed))
        again = [
            place
            for place, each in enumerate(streamed)
            if place < LOOKED_AT_AGAIN
            or any(far > tolerance and at % 2 == which for far, at in zip(first[place], each.versions, strict=True))
        ]
        second = _distances(engine, [streamed[place] for place in again], STREAMS)
        looks.append(Look(first, dict(zip(again, second, strict=True))))
    return looks


def _distances(engine: Engine, streamed: Sequence[Streamed], at_once: int) -> Distances:
    """By how much the largest logit exceeds each token's, so many requests at once; of a token that is not among the
    likeliest, by how much it exceeds the last one of these."""
    found: Distances = [[] for _ in streamed]
    for start in range(0, len(streamed), at_once):
        place: dict[int, int] = {}
        for number, each in enumerate(streamed[start : start + at_once], start):
            params = SamplingParams(len(each.tokens), ignore_eos=True, logprobs=MOST_LOGPROBS)
            place[engine.submit(each.prompt, params, forced=each.tokens)] = number
        for event in engine.run():
            if event.error is not None or event.logprob is None:
                raise ConfigError(f"{event.error}; raise --budget")
            number = place[event.request]
            token = streamed[number].tokens[event.index]
            found[number].append(behind_likeliest(dict(event.logprob.top), token))
    return found


def judged(
    streamed: Sequence[Streamed], looks: Sequence[Look], tolerance: float
) -> tuple[dict[str, float], list[dict[str, object]]]:
    """The summary's figures of tokens and their stamps, and the mixed tokens."""
    differences = [
        abs(one - other)
        for which, look in enumerate(looks)
        for place, second in look.again.items()
        for one, other, version in zip(look.first[place], second, streamed[place].versions, strict=True)
        if version % 2 == which
    ]
    rounding = max(differences, default=0.0)
    limit = max(tolerance, rounding)
    mixed: list[dict[str, object]] = []
    ties = swapped = 0
    furthest = 0.0
    for place, each in enumerate(streamed):
        for at, version in enumerate(each.versions):
            own, other = looks[version % 2], looks[1 - version % 2]
            far, again = own.first[place][at], own.again[place][at] if place in own.again else None
            # Rounding in either look may have made it.
            nearest = far if again is None else min(far, again)
            furthest = max(furthest, nearest)
            swapped += other.first[place][at] > limit
            ties += 0 < nearest <= limit
            if nearest > limit:
                where = {"request": place, "prompt": len(each.prompt), "position": at, "version": version}
                before = each.versions[at - 1] if at else None
                distances = {"distance": far, "again": again, "by_other_weights": other.first[place][at]}
                mixed.append({**where, "version_before": before, **distances})
    figures = {
        "mixed_tokens": len(mixed),
        "mixed_ties": ties,
        "mixed_largest_distance": furthest,
        "mixed_rounding": rounding,
        "mixed_swapped": swapped / max(1, sum(len(each.tokens) for each in streamed)),
    }
    return figures, mixed[:MOST_RECORDED]
