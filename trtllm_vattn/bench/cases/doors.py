"""`bench doors`: clients of the HTTP server beside the engine itself.

First the engine alone takes every prompt, so many at once: its tokens are what clients have to get, its throughput what
theirs is divided by. So is that of requests that all ask for penalties, log-probabilities or a grammar
(`grammars_over_engine`, …). Then a server over the same engine takes the same prompts by streaming clients in a process
of their own (`http_over_engine`). Then clients, of which some go away in the middle, ask until `--requests` are asked:
`wrong` are outputs, or beginnings of those that went away, that are not the engine's; `leaked` is what is left in the
engine when all have gone. On a GPU an output may part from the engine's where the two likeliest tokens are nearly as
likely, for batches differ: those are `ties`, and not wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trtllm_vattn.arguments import positive, probability, size, tolerance
from trtllm_vattn.bench.harness.case import conclude, model_of, vocab_of
from trtllm_vattn.bench.harness.flags import (
    BUDGET,
    MAX_SEQ_LEN,
    MAX_SEQS,
    TIE_TOLERANCE,
    add_attention,
    add_common,
    add_rounds,
)
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.async_engine import AsyncEngine
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.request import Completion
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.serve.app import Settings
from trtllm_vattn.serve.server import SWITCH_S, configuration, listen

CLIENTS = "trtllm_vattn.bench.peer.http_clients"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench doors`."""
    gpu, add = add_common(parser), parser.add_argument
    add_attention(parser)
    add(
        "--requests",
        type=positive,
        default=1000 if gpu else 60,
        metavar="REQUESTS",
        help="of clients, some of whom leave",
    )
    add("--clients", type=positive, default=256 if gpu else 16, metavar="SEQUENCES", help="that ask at once")
    add("--leaving", type=probability, default=0.3, metavar="SHARE", help="of clients that go away in the middle")
    add("--prompts", type=positive, default=128 if gpu else 12, metavar="PROMPTS", help="different ones")
    add("--context", type=positive, default=512 if gpu else 24, metavar="TOKENS", help="of the longest prompt")
    add("--max-output", type=positive, default=128 if gpu else 10, metavar="TOKENS", help="of each output")
    add("--budget", type=size, default="40GiB" if gpu else "4MiB", metavar="BYTES", help=BUDGET)
    add("--max-seqs", type=positive, default=128 if gpu else 8, metavar="SEQUENCES", help=MAX_SEQS)
    add("--max-seq-len", type=positive, default=1024 if gpu else 64, metavar="TOKENS", help=MAX_SEQ_LEN)
    add("--tie-tolerance", type=tolerance, default=0.25 if gpu else 0.0, metavar="LOGITS", help=TIE_TOLERANCE)
    add_rounds(parser, 2 if gpu else 1, "of engine and server")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    if args.context + args.max_output > args.max_seq_len:
        raise ConfigError(f"{args.context} tokens and {args.max_output} exceed --max-seq-len {args.max_seq_len}")
    model, random = model_of(args), np.random.default_rng(args.seed)
    lengths = random.integers(max(1, args.context // 4), args.context + 1, args.prompts)
    prompts = [random.integers(0, vocab_of(model), length).tolist() for length in lengths]
    cache = make_cache("vattn", shape_of(model, args.max_seqs, args.max_seq_len), args.device, args.budget)
    # Every round computes every prompt.
    engine = Engine(model, cache, attention=args.attention, prefix_cache=False, tokenizer=tokenizer_of(vocab_of(model)))
    try:
        params = SamplingParams(args.max_output, ignore_eos=True)
        wanted = engine.generate(prompts, SamplingParams(args.max_output, ignore_eos=True, logprobs=2))
        alone = [engine_seconds(engine, prompts, params)[0] for _ in range(args.rounds)]
        tokens = args.prompts * args.max_output
        beside = {name: rate(engine, prompts, more, args) for name, more in asked_for(args).items()}
    except BaseException:
        engine.close()
        raise
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        served, outcomes, left = through_http(engine, args, prompts, random)
    finally:
        sys.setswitchinterval(before)
    judged = [judge(outcome, wanted[place], args.tie_tolerance) for place, outcome in outcomes]
    summary = {
        "requests": len(outcomes),
        "leaked": left,
        "wrong": judged.count("wrong"),
        "failed": judged.count("failed"),
        "ties": judged.count("tie"),
        "gone_away": sum(bool(outcome.get("left")) for _, outcome in outcomes),
        "engine_tokens_per_s": tokens / min(alone),
        "http_tokens_per_s": tokens / min(served),
        "http_over_engine": min(alone) / min(served),
        **{f"{name}_over_engine": value * min(alone) / tokens for name, value in beside.items()},
    }
    errors = sorted({outcome["error"] for _, outcome in outcomes if "error" in outcome})
    wrong = [f"{name}: {summary[name]}" for name in ("leaked", "wrong", "failed") if summary[name]] + errors[:5]
    results = {"engine_s": alone, "http_s": served, "errors": errors}
    return conclude("doors", args, results, summary, wrong=wrong)


def tokenizer_of(vocab_size: int) -> PreTrainedTokenizerFast:
    """Bytes, and a word for each other token id, so that a shape without a tokenizer has text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"w{token}" for token in range(len(alphabet), vocab_size - 1)]
    tokenizer = Tokenizer(models.BPE({token: place for place, token in enumerate((*alphabet, *words))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def asked_for(args: argparse.Namespace) -> dict[str, SamplingParams]:
    """What all requests ask for at once, by a word."""
    each = SamplingParams(args.max_output, ignore_eos=True)
    schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    asked = {
        "penalties": replace(each, repetition_penalty=1.1, frequency_penalty=0.1, presence_penalty=0.1),
        "logprobs": replace(each, logprobs=5),
    }
    if importlib.util.find_spec("llguidance") is not None:
        asked["grammars"] = replace(each, json_schema=schema)
    return asked


def rate(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, args: argparse.Namespace) -> float:
    """Tokens a second when all ask for this, in the fastest round; one more before captures what it needs."""
    rounds = [engine_seconds(engine, prompts, params) for _ in range(args.rounds + 1)]
    return max(tokens / seconds for seconds, tokens in rounds[1:])


def engine_seconds(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> tuple[float, int]:
    """What all prompts take by the engine itself, all queued at once, and their tokens."""
    started, tokens = perf_counter(), 0
    for prompt in prompts:
        engine.submit(prompt, params)
    for event in engine.run():
        if event.error is not None:
            raise ConfigError(f"{event.error}; raise --budget")
        tokens += event.token is not None
    return perf_counter() - started, tokens


def through_http(
    engine: Engine, args: argparse.Namespace, prompts: Sequence[Sequence[int]], random: np.random.Generator
) -> tuple[list[float], list[tuple[int, dict[str, Any]]], int]:
    """Seconds of each round of all prompts by HTTP; what each client got, with its prompt's place, when some go away;
    and what is left in the engine then. The engine is closed."""
    around = AsyncEngine(engine, max_requests=4 * args.clients + args.prompts)
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(configuration(around, Settings("bench"), args.max_seq_len, 60))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    where = dict(zip(("host", "port"), listening.getsockname(), strict=True))

    def body(place: int) -> dict[str, Any]:
        return {"prompt": prompts[place], "max_tokens": args.max_output, "temperature": 0, "ignore_eos": True}

    try:
        every = [body(place) for place in range(len(prompts))]
        whole = {**where, "at_once": len(prompts), "requests": every}
        served = [clients(whole)["seconds"] for _ in range(args.rounds)]
        places = random.integers(0, len(prompts), args.requests).tolist()
        asked = [body(place) for place in places]
        for request in asked:
            if random.random() < args.leaving:
                request["leave_after"] = int(random.integers(0, args.max_output))
        outcomes = clients({**where, "at_once": args.clients, "requests": asked})["outcomes"]
        left = asyncio.run(_left(around))
    finally:
        server.should_exit = True
        thread.join()
        around.close()
    return served, list(zip(places, outcomes, strict=True)), left


def clients(job: dict[str, Any]) -> dict[str, Any]:
    """Have clients do a job."""
    command = [sys.executable, "-m", CLIENTS]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"the clients failed: {done.stderr.strip()[-500:]}")
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome


async def _left(around: AsyncEngine) -> int:
    """Requests and sequences that are there when all clients have gone; those that are just being dropped are waited
    for."""
    patience = perf_counter() + 30
    while around.unfinished and perf_counter() < patience:
        await asyncio.sleep(0.02)
    return around.unfinished + await around.call(_books)


def _books(engine: Engine) -> int:
    engine.scheduler.release_ended()
    engine.cache.check_integrity()
    return len(engine.scheduler.requests) + engine.cache.stats().sequences


def judge(outcome: dict[str, Any], wanted: Completion, tolerance: float) -> str:
    """``right``, ``wrong``, ``failed``, or ``tie`` where an output parts from the engine's at a tie."""
    tokens, whole = outcome["tokens"], not outcome.get("left")
    if "error" in outcome:
        return "failed"
    if whole and len(tokens) != len(wanted.tokens):
        return "wrong"
    parts = [place for place, (got, own) in enumerate(zip(tokens, wanted.tokens, strict=False)) if got != own]
    if not parts:
        return "right"
    assert wanted.logprobs is not None
    (_, first), (_, second) = wanted.logprobs[parts[0]].top
    return "tie" if first - second < tolerance else "wrong"
