"""`bench doors`: what clients, trainers and operators call, beside the engine's own narrow door.

Parts, each by a word of `--measure`; results are written after each.

* ``parameters``: decode steps of a full batch before any request asked for anything but a token, and after all was
  asked for and captured (`step_over_before`); and the throughput of all prompts when every request asks for penalties,
  log-probabilities, sampling or a grammar, by that of plain ones (`grammar_over_plain`, …), and where one of them does
  (`one_grammar_over_plain`, …); `grammar_step_over_plain` and its like are of a decode step's time, and
  `grammar_host_ms` and `plain_host_ms` are what the host works of it, not waiting for the device.
* ``http``: all prompts at once by streaming clients of a server over the same engine (`http_over_engine`), and by
  clients that do not stream (`whole_over_engine`); what the server's process takes of processors for a token
  (`server_us_per_token`), and how much longer the engine's thread works at a step beside it
  (`engine_host_over_alone`). With ``--emulate-step-ms`` the device is emulated (harness/emulated_device.py): these
  figures are of the server then, and of no GPU.
* ``clients``: clients, of which some go away in the middle, ask until `--requests` are asked: `wrong` are outputs, or
  beginnings of those that went away, that are not the engine's; `leaked` is what is there more than before when all
  have gone (requests, sequences, mappings, tasks, threads, file descriptors), `hung` who waited for five minutes. On a
  GPU an output may part from the engine's where the two likeliest tokens are nearly as likely, for batches differ:
  those are `ties`, and not wrong; `widest_parting` says how far the two lie apart, of all outputs.
* ``updates``: new weights from a process beside this one, again and again while requests stream (doors_updates.py).
* ``deterministic``: what `Engine(deterministic=True)` costs, and whether it holds (doors_deterministic.py).
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from statistics import median
from time import perf_counter, thread_time
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from trtllm_vattn.arguments import adder
from trtllm_vattn.bench.cases.doors_deterministic import measure_deterministic
from trtllm_vattn.bench.cases.doors_http import (
    Serving,
    Took,
    Trace,
    engine_seconds,
    judge,
    outcomes_of,
    parting,
    serving,
    through_server,
)
from trtllm_vattn.bench.cases.doors_updates import measure_updates
from trtllm_vattn.bench.harness import flags
from trtllm_vattn.bench.harness.case import Part, Recording, vocab_of
from trtllm_vattn.bench.harness.contenders import observed
from trtllm_vattn.bench.harness.emulated_device import EmulatedEngine
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.request import Completion
from trtllm_vattn.runtime.sampling import SamplingParams

MEASURES = ("parameters", "deterministic", "http", "clients", "updates")
"""In the order in which they are measured: an engine that a server has is nobody else's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench doors`."""
    add = adder(parser, flags.add_common(parser))
    flags.add_attention(parser)
    flags.add_parts(parser, MEASURES, "parameters,http,clients", flag="--measure")
    text = "of a launch on an emulated device, which computes nothing, in parts http and clients (default: no)"
    add("--emulate-step-ms", "MILLISECONDS", text)
    add("--requests", "REQUESTS", "of part clients", 512, 60)
    add("--clients", "SEQUENCES", "that ask at once", 256, 16)
    add("--leaving", "SHARE", "of clients that go away in the middle", 0.3)
    text = "of whom each shares the clients; all but one are killed once, in the middle"
    add("--client-processes", "COUNT", text, 2, 1)
    text = "of the clients of part clients; openai is its own package's"
    parser.add_argument("--library", choices=("plain", "openai"), default="plain", help=text)
    add("--prompts", "PROMPTS", "different ones", 128, 12)
    add("--context", "TOKENS", "of the longest prompt", 512, 24)
    add("--max-output", "TOKENS", "of each output", 96, 10)
    add("--budget", "BYTES", flags.BUDGET, "40GiB", "4MiB")
    add("--max-seqs", "SEQUENCES", flags.MAX_SEQS, 128, 8)
    add("--max-seq-len", "TOKENS", flags.MAX_SEQ_LEN, 1024, 64)
    add("--tie-tolerance", "LOGITS", flags.TIE_TOLERANCE, 0.25, 0.0)
    add("--updates", "TIMES", "of all weights, of part updates", 100, 20)
    add("--batches", "BATCHES", "random ones, of part deterministic", 100, 10)
    add("--batch-sizes", "SEQUENCES,...", "sequences of the steps of part deterministic", "1,32,128", "1,4,8")
    add("--rounds", "TURNS", "turns that each of what is compared takes", 2, 1)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    if args.context + args.max_output > args.max_seq_len:
        raise ConfigError(f"{args.context} tokens and {args.max_output} exceed --max-seq-len {args.max_seq_len}")
    if args.emulate_step_ms and (args.device != "cpu" or not {"http", "clients"} >= set(args.measure)):
        raise ConfigError("a device is emulated on the host, for the server: give --device cpu --measure http,clients")
    recording = Recording("doors", args)
    model, random = recording.model, np.random.default_rng(args.seed)
    lengths = random.integers(max(1, args.context // 4), args.context + 1, args.prompts)
    prompts = [random.integers(0, vocab_of(model), length).tolist() for length in lengths]
    trace = Trace(prompts, args.max_output)
    shared = Shared(recording, trace, random)

    def updates(recording: Recording) -> None:
        shared.close()
        measure_updates(recording, args, model)

    parts: dict[str, Part] = {
        "parameters": lambda recording: measure_parameters(recording, args, shared.engine, trace),
        "deterministic": lambda recording: measure_deterministic(recording, args, shared.engine, prompts),
        "http": lambda recording: measure_http(recording, args, shared, trace),
        "clients": lambda recording: measure_clients(recording, args, shared.server, trace, shared.wanted, random),
        "updates": updates,
    }
    try:
        recording.measure(parts, [name for name in MEASURES if name in args.measure])
    finally:
        shared.close()
    return recording.conclude()


class Shared:
    """The engine that most parts share, and a server over it: each is made when it is first asked for."""

    def __init__(self, recording: Recording, trace: Trace, random: np.random.Generator) -> None:
        self._recording, self._trace, self._random = recording, trace, random
        self._opened = ExitStack()
        self.alone: list[Took] = []
        self.wanted: list[Completion] = []

    @cached_property
    def engine(self) -> Engine:
        """Before a server has it."""
        engine = engine_for(self._recording.args, self._recording.model)
        self._opened.callback(engine.close)
        self._recording.say("an engine is captured")
        engine_seconds(engine, self._trace, [self._trace.plain] * len(self._trace.prompts))
        return engine

    @cached_property
    def server(self) -> Serving:
        """With what the engine alone gives, and takes, before."""
        args, trace = self._recording.args, self._trace
        self.wanted = self.engine.generate(trace.prompts, replace(trace.plain, logprobs=2))
        if "http" in args.measure:
            self.alone = [took_alone(self.engine, trace, self._random) for _ in range(args.rounds)]
        return self._opened.enter_context(serving(self.engine, 4 * args.clients + args.prompts, args.max_seq_len))

    def close(self) -> None:
        """Close both. Idempotent."""
        self._opened.close()


def engine_for(args: argparse.Namespace, model: PreTrainedModel) -> Engine:
    """One that computes every prompt in every round."""
    cache = make_cache("vattn", shape_of(model, args.max_seqs, args.max_seq_len), args.device, args.budget)
    options = {"attention": args.attention, "prefix_cache": False, "tokenizer": tokenizer_of(vocab_of(model))}
    if args.emulate_step_ms:
        return EmulatedEngine(model, cache, args.emulate_step_ms / 1e3, **options)
    return Engine(model, cache, **options)


# -- parameters --------------------------------------------------------------------------------------------------------


def measure_parameters(recording: Recording, args: argparse.Namespace, engine: Engine, trace: Trace) -> None:
    """What it costs to be asked for more than tokens, by all requests or by one of them, and what it costs those who
    ask for nothing."""
    plain = [trace.plain] * len(trace.prompts)
    before = [timed(engine, trace, plain).step_ms for _ in range(args.rounds)]
    recording.say(f"plain steps: {median(before):.3f} ms")
    asked = {"plain": plain}
    for name, params in asked_for(trace).items():
        asked[name], asked[f"one_{name}"] = [params] * len(plain), [params, *plain[1:]]
    seconds: dict[str, list[float]] = {name: [] for name in asked}
    steps: dict[str, list[float]] = {name: [] for name in asked}
    host: dict[str, list[float]] = {name: [] for name in asked}
    for turn in range(args.rounds + 1):
        # Graphs that the first turn went without, in those that do more.
        while engine.capture_wanted():
            pass
        for name, each in asked.items():
            took = timed(engine, trace, each)
            # The first time captures what it needs.
            if turn:
                seconds[name].append(took.seconds)
                steps[name].append(took.step_ms)
                host[name].append(took.host_ms)
            recording.say(f"round {turn} of {args.rounds}, {name}: {took}")
    after = [timed(engine, trace, plain).step_ms for _ in range(args.rounds)]
    least = {name: min(took) for name, took in seconds.items()}
    others = [name for name in asked if name != "plain"]
    summary = {
        "step_ms": median(before),
        "step_over_before": median(after) / median(before),
        **{f"{name}_over_plain": least["plain"] / least[name] for name in others},
        **{f"{name}_step_over_plain": min(steps[name]) / min(steps["plain"]) for name in others},
        **{f"{name}_host_ms": min(host[name]) for name in ("plain", "grammar") if name in host},
    }
    results = {"step_ms": {"before": before, "after": after, **steps}, "host_ms": host, "seconds": seconds}
    recording.found("parameters", results, **summary)


def asked_for(trace: Trace) -> dict[str, SamplingParams]:
    """What requests ask for, by a word."""
    each = trace.plain
    item = {"name": {"type": "string", "maxLength": 24}, "count": {"type": "integer"}}
    fields = {"type": "object", "properties": item, "required": [*item]}
    # It does not end before the output does.
    schema = {"type": "array", "items": fields, "minItems": trace.max_output}
    asked = {
        "penalties": replace(each, repetition_penalty=1.1, frequency_penalty=0.1, presence_penalty=0.1),
        "logprobs": replace(each, logprobs=5),
        "sampled": replace(each, temperature=0.8, seed=0),
        "truncated": replace(each, temperature=0.8, top_p=0.9, seed=0),
    }
    if importlib.util.find_spec("llguidance") is not None:
        asked["grammar"] = replace(each, json_schema=schema)
    return asked


def timed(engine: Engine, trace: Trace, params: Sequence[SamplingParams]) -> Took:
    """What all prompts take, each asking for what is its own; seconds as if none had ended early."""
    before = thread_time()
    with observed(engine) as launches:
        seconds, tokens = engine_seconds(engine, trace, params)
    return Took(seconds * trace.tokens / tokens, thread_time() - before, launches)


# -- HTTP --------------------------------------------------------------------------------------------------------------


def took_alone(engine: Engine, trace: Trace, random: np.random.Generator) -> Took:
    """All prompts by the engine alone, in this thread; in any order, as they come from clients, for slots that are
    taken over fit the better the more the order is that of the round before."""
    shuffled = replace(trace, prompts=[trace.prompts[i] for i in random.permutation(len(trace.prompts))])
    return timed(engine, shuffled, [trace.plain] * len(shuffled.prompts))


def measure_http(recording: Recording, args: argparse.Namespace, shared: Shared, trace: Trace) -> None:
    """All prompts at once by HTTP, streamed and whole, and by the engine alone."""
    server = shared.server
    engine, alone, wanted = shared.engine, shared.alone, shared.wanted
    asked = [body(trace, place) for place in range(len(trace.prompts))]
    took: dict[str, list[Took]] = {"alone": list(alone), "http": [], "whole": []}
    wrong, used = 0, []
    for number in range(args.rounds):
        for name, stream in (("http", True), ("whole", False)):
            before = server.cpu_s()
            one, outcomes = through_server(engine, server, {"requests": asked, "stream": stream})
            took[name].append(one)
            used += [server.cpu_s() - before] if stream else []
            judged = [judge(got, each, args.tie_tolerance) for got, each in zip(outcomes, wanted, strict=True)]
            wrong += judged.count("wrong")
            recording.say(f"round {number + 1} of {args.rounds}, {name}: {one.seconds:.2f} s")
    least = {name: min(each.seconds for each in several) for name, several in took.items()}
    host = {name: min(each.host_ms for each in several) for name, several in took.items()}
    cpu = {name: min(each.engine_cpu_s for each in several) for name, several in took.items()}
    summary = {
        "engine_tokens_per_s": trace.tokens / least["alone"],
        "http_tokens_per_s": trace.tokens / least["http"],
        "http_over_engine": least["alone"] / least["http"],
        "whole_over_engine": least["alone"] / least["whole"],
        "http_wrong": wrong,
        "server_us_per_token": 1e6 * min(used) / trace.tokens,
        "engine_us_per_token": 1e6 * cpu["alone"] / trace.tokens,
        "engine_us_per_token_beside": 1e6 * cpu["http"] / trace.tokens,
        "engine_host_ms": host["alone"],
        "engine_host_over_alone": host["http"] / host["alone"],
    }
    recording.wrong += [f"{wrong} requests got other tokens than the engine's"] if wrong else []
    names = {"alone": "engine_s", "http": "http_s", "whole": "whole_s"}
    seconds = {names[name]: [each.seconds for each in several] for name, several in took.items()}
    recording.found("http", {**seconds, "server_cpu_s": used}, **summary)


def measure_clients(
    recording: Recording,
    args: argparse.Namespace,
    server: Serving,
    trace: Trace,
    wanted: Sequence[Completion],
    random: np.random.Generator,
) -> None:
    """Clients of which some go away."""
    places = random.integers(0, len(trace.prompts), args.requests).tolist()
    asked = [leaving(body(trace, place), args, random) for place in places]
    # What the first ones make is there for good.
    first = [body(trace, place) for place in range(min(8, len(trace.prompts)))]
    outcomes_of({**server.where, "at_once": 8, "requests": first}, 1)
    before = server.counts()
    job = {**server.where, "at_once": args.clients, "requests": asked, "library": args.library}
    share = args.requests // args.client_processes
    kills = random.integers(share // 4, max(share // 4 + 1, share // 2), args.client_processes - 1).tolist()
    recording.say(f"{args.requests} requests by {args.clients} clients at once")
    started = perf_counter()
    outcomes = outcomes_of(job, args.client_processes, kills)
    seconds = perf_counter() - started
    left = server.left_since(before)
    judged = [
        judge(outcome, wanted[place], args.tie_tolerance) for outcome, place in zip(outcomes, places, strict=True)
    ]
    summary = {
        "requests": len(outcomes),
        "leaked": sum(left.values()),
        "wrong": judged.count("wrong"),
        "failed": judged.count("failed"),
        "hung": sum(bool(outcome.get("hung")) for outcome in outcomes),
        "ties": judged.count("tie"),
        "widest_parting": max(
            parting(outcome["tokens"], wanted[place]) or 0.0 for outcome, place in zip(outcomes, places, strict=True)
        ),
        "gone_away": sum(bool(outcome.get("left")) for outcome in outcomes),
        "killed": sum(bool(outcome.get("killed")) for outcome in outcomes),
        "clients_requests_per_s": len(outcomes) / seconds,
    }
    errors = sorted({outcome["error"] for outcome in outcomes if "error" in outcome})
    wrong = [f"{name}: {summary[name]}" for name in ("leaked", "wrong", "failed") if summary[name]] + errors[:5]
    recording.wrong += wrong
    recording.found("clients", {"errors": errors, "left": left, "before": before, "seconds": seconds}, **summary)


def body(trace: Trace, place: int) -> dict[str, Any]:
    """A request for one of the prompts."""
    return {"prompt": trace.prompts[place], "max_tokens": trace.max_output, "temperature": 0, "ignore_eos": True}


def leaving(request: dict[str, Any], args: argparse.Namespace, random: np.random.Generator) -> dict[str, Any]:
    """Some go away behind some tokens, some after some time, wherever they are then."""
    if random.random() < args.leaving:
        if random.random() < 0.5:
            request["leave_after"] = int(random.integers(1, max(2, args.max_output)))
        else:
            request["cancel_after"] = float(random.uniform(0.001, 0.5))
    return request


def tokenizer_of(vocab_size: int) -> PreTrainedTokenizerFast:
    """Bytes, and a word for each other token id, so that a shape without a tokenizer has text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"w{token}" for token in range(len(alphabet), vocab_size - 1)]
    tokenizer = Tokenizer(models.BPE({token: place for place, token in enumerate((*alphabet, *words))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
