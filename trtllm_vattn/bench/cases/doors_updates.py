"""`bench doors --measure updates`: a process beside the engine's sends new weights while requests stream.

What runs is prefilled again with the new weights (``running="restart"``), so each token has to be the one that the
weights of its stamp choose behind the tokens before it. That is looked at afterwards, set by set of weights, with the
same tokens forced: `mixed_tokens` are those that the weights of their stamp do not choose, but for ties.
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

from trtllm_vattn.bench.harness.case import captured_graphs, vocab_of
from trtllm_vattn.bench.harness.recording import Recording
from trtllm_vattn.bench.peer.trainer import train
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.runtime.async_engine import AsyncEngine
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.weights_ipc import receive_weights

START = "spawn"
"""How the trainer's process is started: a GPU's context is nothing to fork."""
STREAMS = 16
"""Requests that stream at once, at most; all are prefilled again with each update."""
BETWEEN = 4
"""Tokens of each, between two updates."""
LEAST_TIE = 1e-3
"""Logits: prefilling again rounds otherwise than decoding did."""


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
    cache = make_cache("vattn", shape_of(model, args.max_seqs, args.max_seq_len), args.device, args.budget)
    engine = Engine(model, cache, attention=args.attention, prefix_cache=False)
    around = AsyncEngine(engine)
    try:
        connection.recv()
        recording.say("an engine is captured, and the trainer has its weights")
        graphs = captured_graphs(engine)
        streamed, took = asyncio.run(_serve(around, connection, recording, args, vocab_of(model)))
        same = captured_graphs(engine) == graphs
        recording.say(f"{args.updates} updates; looking at {sum(len(each.tokens) for each in streamed)} tokens")
        tolerance = max(args.tie_tolerance, LEAST_TIE)
        mixed, ties = asyncio.run(around.call(lambda engine: _mixed_tokens(engine, connection, streamed, tolerance)))
    finally:
        around.close()
    connection.send(None)
    process.join()
    stamps = {version for each in streamed for version in each.versions}
    nbytes = sum(each.numel() * each.itemsize for each in model.parameters())
    summary = {
        "updates": args.updates,
        "recaptured": int(not same),
        "versions_stamped": len(stamps),
        "stamped_tokens": sum(len(each.tokens) for each in streamed),
        "mixed_tokens": mixed,
        "mixed_ties": ties,
        "update_ms": 1e3 * median(took[False]),
        "update_restorable_ms": 1e3 * median(took[True]),
        "update_gb_per_s": 1e-9 * nbytes / median(took[False]),
    }
    recording.wrong += [f"{name}: {summary[name]}" for name in ("recaptured", "mixed_tokens") if summary[name]]
    recording.found("updates", {"seconds": took[False], "restorable_s": took[True], "bytes": nbytes}, **summary)


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


def _mixed_tokens(
    engine: Engine, connection: Connection, streamed: Sequence[Streamed], tolerance: float
) -> tuple[int, int]:
    """How many tokens are not what the weights of their stamp choose, and how many of others are ties."""
    mixed = ties = 0
    for which in (0, 1):
        connection.send(which)
        engine.update_weights_from_ipc(receive_weights(connection))
        place: dict[int, Streamed] = {}
        for each in streamed:
            params = SamplingParams(len(each.tokens), ignore_eos=True, logprobs=2)
            place[engine.submit(each.prompt, params, forced=each.tokens)] = each
        for event in engine.run():
            each = place[event.request]
            if each.versions[event.index] % 2 != which or event.token == each.tokens[event.index]:
                continue
            assert event.logprob is not None
            (_, first), (_, second) = event.logprob.top
            if first - second < tolerance:
                ties += 1
            else:
                mixed += 1
    return mixed, ties
