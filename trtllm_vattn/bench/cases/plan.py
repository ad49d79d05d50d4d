"""`bench plan`: how far are the planner's predictions from what is measured, on traces it was not fitted to, and how
good is its choice?

*memory*: waste and capacity, by the cache's own code over a driver without memory, in virtual time; on any machine, for
Llama-3-8B. *step*: decode steps of an engine whose sequences have the trace's lengths. *burst*: time between two tokens
of running sequences, p99, while the trace's densest arrivals come at once. *choice*: what is planned beside every other
layout and lookahead, each by its capacity in virtual time and, on a GPU, its measured attention.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from itertools import chain
from time import perf_counter
from typing import Any

import numpy as np
import torch

from trtllm_vattn.arguments import adder
from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.bench.cases.calibrate import batches, cache_shape_of, layer_us, probe_engine
from trtllm_vattn.bench.cases.fragmentation import MAPPING_S, ModelledTiming, make, simulate
from trtllm_vattn.bench.cases.serve import densest
from trtllm_vattn.bench.harness import flags
from trtllm_vattn.bench.harness.case import Part, Recording, give_back, vocab_of
from trtllm_vattn.bench.harness.contenders import cancel_all, decode_steps, fill, steps_and_tokens
from trtllm_vattn.bench.harness.timing import fill_random, summarise
from trtllm_vattn.bench.harness.traces import Request, counted, fit, generate_trace, load_trace
from trtllm_vattn.cache.calibrated import card_of
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.memory.layout import default_layers_per_range
from trtllm_vattn.planner import CostModel, Layout, Lengths, Load, Objective, plan
from trtllm_vattn.planner.calibration import find, named
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import planned_shape
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.table import tabulate

PARTS = ("step", "burst", "memory", "choice")
"""In the order in which they are measured."""
PLANNED = "llama-3-8b"
"""Whose memory is planned, on any machine."""
MEMORY_LAYERS = (8, 16, 32)
CHOICE_LOOKAHEADS = (None, 0, 64)
MAX_SEQ_LEN, MAX_SEQS = 16384, 256

Mixes = dict[str, list[Request]]

MEMORY = "trace layers_per_range waste planned_waste capacity planned_capacity"
STEPS = "trace sequences kv_tokens step_ms.p50 planned_ms"
BURSTS = "trace running prompts itl_ms.p99 planned_ms"
CHOICES = "trace layers_per_range lookahead sequences step_ms tokens_per_s planned"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench plan`."""
    # Its sequences are longer than the positions of Llama 3.0.
    add = adder(parser, on_gpu := flags.add_common(parser, on_gpu="llama-3.1-8b"))
    flags.add_attention(parser)
    flags.add_trace(
        parser,
        action="append",
        default=[],
        help="requests, as for serve; may be given again (default: a generated one)",
    )
    flags.add_parts(parser, PARTS, "step,burst,choice" if on_gpu else "memory,choice")
    text = "a file of `trtllm-vattn calibrate`, or a card's name (default: this machine's, else the H200's)"
    parser.add_argument("--calibration", metavar="FILE", help=text)
    add("--requests", "REQUESTS,...", f"{flags.REQUESTS}; one number for all traces, or one for each", "300", "4000")
    add("--max-output", "TOKENS", flags.MAX_OUTPUT, 512)
    add("--budget", "BYTES", f"{flags.BUDGET}, of memory and choice", "16GiB")
    parser.set_defaults(running=32 if on_gpu else 2)
    add("--prompts", "PROMPTS", "prompts of the burst", 48, 3)
    add("--steps", "STEPS", "decode steps that are timed", 32, 6)


class Bench:
    """One invocation: traces, the calibration, and what has been measured so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.recording, self.shown = args, Recording("plan", args), list[str]()
        self._opened = ExitStack()
        own = card_of(args.device)
        found = named(args.calibration) if args.calibration else find(own)
        self.calibration = found or named("h200")
        self.recording.results["calibration"] = {"card": self.calibration.card, **self.calibration.about}
        if found is None:
            self.recording.say(f"no calibration of {own}; the H200's is taken")
        traces = counted(args.trace, args.requests) if args.trace else []
        self.mixes: Mixes = {path.stem: load_trace(path, count) for path, count in traces}
        if not args.trace:
            self.mixes["generated"] = generate_trace(args.requests[0], args.seed, median_prompt=1469, median_output=28)

    def part(self, name: str, rows: Callable[[], Iterable[dict[str, Any]]], columns: str) -> Part:
        """A part whose rows are kept as they are there, and shown in the end."""

        def measure(recording: Recording) -> list[dict[str, Any]]:
            for row in rows():
                recording.add(name, row)
            self.shown.append(tabulate(recording.results[name], columns))
            return [summary(recording.results)]

        return measure

    @cached_property
    def engine(self) -> Engine:
        """An engine for step and burst; not beside other parts, whose layouts' memory is as large as its."""
        self.recording.say("starting an engine")
        return self._opened.enter_context(probe_engine(self.recording.model, self.args))

    def close(self) -> None:
        """Close the engine, and have no model any more. Idempotent."""
        self._opened.close()
        vars(self).pop("engine", None)
        vars(self.recording).pop("model", None)
        give_back()

    @property
    def layout(self) -> Layout:
        """Of the engine's cache."""
        shape = planned_shape(self.args.model, flags.dtype_of(self.args.device))
        layers = default_layers_per_range(shape.num_layers, shape.layer_token_bytes)
        return Layout(shape, self.calibration.granularity, layers)

    def of_engine(self, name: str) -> tuple[list[Request], int]:
        """A trace's requests as they fit the engine, and tokens that the first decode while others join."""
        longest = self.engine.cache.shape.max_seq_len
        room = longest // 8
        return fit(self.mixes[name], longest - room, min(self.args.max_output, longest // 2)), room

    def fitted(self, name: str, longest: int = MAX_SEQ_LEN) -> list[Request]:
        return fit(self.mixes[name], longest, self.args.max_output)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    bench = Bench(args)
    parts = {
        "step": bench.part("step", lambda: chain.from_iterable(steps(bench, name) for name in bench.mixes), STEPS),
        "burst": bench.part("burst", lambda: (burst(bench, name) for name in bench.mixes), BURSTS),
        "memory": bench.part("memory", lambda: memory(bench), MEMORY),
        "choice": bench.part("choice", lambda: choices(bench, measured_attention(bench)), CHOICES),
    }
    try:
        bench.recording.measure(parts, [name for name in PARTS if name in args.parts])
    finally:
        bench.close()
    return bench.recording.conclude("\n\n".join(bench.shown))


def lengths_of(requests: list[Request]) -> Lengths:
    """The length distribution of requests."""
    return Lengths.of([each.prompt_tokens for each in requests], [each.output_tokens for each in requests])


# -- memory ------------------------------------------------------------------------------------------------------------


def memory(bench: Bench) -> Iterator[dict[str, Any]]:
    """Waste and capacity of the cache itself in virtual time, and as planned."""
    shape = planned_shape(PLANNED, torch.bfloat16)
    model = CostModel(shape, bench.calibration)
    for name in bench.mixes:
        requests = bench.fitted(name)
        lengths = lengths_of(requests)
        for layers in MEMORY_LAYERS:
            bench.recording.say(f"memory: {name}, {layers} layers a row")
            layout = Layout(shape, 2 << 20, layers)
            simulated = in_virtual_time(layout, requests, bench.args.budget)
            step_s = model.step_s(layout, simulated["mean_sequences"] or 1.0, lengths.mean_tokens)
            ahead = layout.ahead_tokens(step_s, MAPPING_S)
            yield {
                "trace": name,
                "requests": len(requests),
                "layers_per_range": layers,
                "waste": simulated["waste_with_surplus"],
                "planned_waste": layout.waste(lengths, ahead),
                # Nobody waited, or not for memory: that says nothing of the capacity.
                "capacity": simulated["mean_sequences"] if simulated["kept_waiting_by_memory"] else None,
                "planned_capacity": layout.capacity(lengths, ahead, bench.args.budget),
                "simulated": simulated,
            }


def in_virtual_time(layout: Layout, requests: list[Request], budget: int) -> dict[str, Any]:
    """The cache itself over requests that all come at once (`fragmentation.simulate`)."""
    cache_shape = cache_shape_of(layout.shape, torch.bfloat16, MAX_SEQS, MAX_SEQ_LEN)
    names = ("layers_per_range", "extent_classes", "lookahead")
    config = CacheConfig(**{name: getattr(layout, name) for name in names})
    timing = ModelledTiming(cache_shape.token_bytes)
    with make(config, cache_shape, budget, timing) as cache:
        return simulate(cache, requests, timing)


# -- an engine ---------------------------------------------------------------------------------------------------------


def sampled(requests: list[Request], count: int, random: np.random.Generator) -> list[int]:
    """Lengths of decoding sequences at a moment: of requests by how long they decode, somewhere in their output."""
    outputs = np.array([each.output_tokens for each in requests])
    picked = random.choice(len(requests), count, p=outputs / outputs.sum())
    return [requests[i].prompt_tokens + int(random.integers(0, outputs[i] + 1)) for i in picked]


def steps(bench: Bench, name: str) -> Iterator[dict[str, Any]]:
    """Decode steps of sequences with a trace's lengths, and as planned."""
    args, engine, layout = bench.args, bench.engine, bench.layout
    model = CostModel(layout.shape, bench.calibration)
    random = np.random.default_rng(args.seed)
    requests, room = bench.of_engine(name)
    running = 0
    for count in batches(args.device)[1:]:
        fill(engine, sampled(requests, count - running, random), room, random)
        running = count
        records, kv = steps_and_tokens(engine, args.steps)
        step_ms = summarise([1e3 * record.wall_s / max(1, record.steps) for record in records])
        yield {
            "trace": name,
            "sequences": count,
            "kv_tokens": kv,
            "step_ms": step_ms,
            "planned_ms": 1e3 * model.step_s(layout, count, kv),
        }
    cancel_all(engine)


def burst(bench: Bench, name: str) -> dict[str, Any]:
    """The time between two tokens of running sequences while prompts come at once, and as planned."""
    args, engine, layout = bench.args, bench.engine, bench.layout
    model = CostModel(layout.shape, bench.calibration)
    random = np.random.default_rng(args.seed + 1)
    requests, room = bench.of_engine(name)
    count = min(args.prompts, engine.cache.shape.num_slots - args.running, len(requests))
    first = densest(requests, count)
    prompts = [each.prompt_tokens for each in requests[first : first + count]]
    gaps: list[float] = []
    lengths = sampled(requests, args.running, random)
    for _ in range(2):
        running = set(fill(engine, lengths, room, random))
        decode_steps(engine, 8)
        gaps += _gaps(engine, running, prompts, min(128, room), random)
        cancel_all(engine)
    planned = model.burst_itl_s(
        layout, args.running, sum(lengths), engine.scheduler.chunk, np.array(prompts), join=True
    )
    return {
        "trace": name,
        "running": args.running,
        "prompts": count,
        "prompt_tokens": sum(prompts),
        "itl_ms": summarise(gaps),
        "planned_ms": 1e3 * planned,
    }


def _gaps(
    engine: Engine, running: set[int], prompts: list[int], tokens: int, random: np.random.Generator
) -> list[float]:
    """Milliseconds between tokens of running sequences, from the submission of prompts, which decode so many tokens,
    until the last is in."""
    vocab = vocab_of(engine.model)
    wanted = SamplingParams(max_tokens=tokens, ignore_eos=True)
    last: dict[int, float] = {}
    gaps: list[float] = []
    left = {engine.submit(random.integers(0, vocab, length).tolist(), wanted) for length in prompts}
    while left:
        events = engine.step()
        now = perf_counter()
        for event in events:
            left.discard(event.request)
            if event.request in running:
                if event.request in last:
                    gaps.append(1e3 * (now - last[event.request]))
                last[event.request] = now
    return gaps


# -- the choice --------------------------------------------------------------------------------------------------------


def measured_attention(bench: Bench) -> dict[tuple[str, int], float]:
    """Seconds of all layers' attention by trace and layers a row, over a budget full of the trace's sequences; nothing
    on the host."""
    shape, args = planned_shape(PLANNED, torch.bfloat16), bench.args
    found: dict[tuple[str, int], float] = {}
    if args.device == "cpu":
        return found
    bench.close()
    for name in bench.mixes:
        requests = bench.fitted(name)
        count = int(Layout(shape, 2 << 20, 16).capacity(lengths_of(requests), 4.0, args.budget))
        lengths = sampled(requests, max(1, count), np.random.default_rng(args.seed))
        cache_shape = cache_shape_of(shape, flags.dtype_of(args.device), len(lengths), MAX_SEQ_LEN)
        for layers in _divisors(shape.num_layers):
            bench.recording.say(f"attention: {name}, {layers} layers a row")
            budget = 2 * args.budget
            with make_cache("vattn", cache_shape, args.device, budget, layers_per_range=layers, lookahead=0) as cache:
                attention = make_attention(args.attention, cache, shape.num_heads)
                fill_random(attention, np.array(lengths))
                us, _ = layer_us(attention, np.array(cache.lengths))
                # A layer's microseconds for a token, all layers: sequences at once differ a little between layouts.
                found[name, layers] = 1e-6 * us * shape.num_layers / sum(lengths)
            gc.collect()
    return found


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def choices(bench: Bench, attention: dict[tuple[str, int], float]) -> Iterator[dict[str, Any]]:
    """Every layout and lookahead by its sequences in virtual time and the step's time, and which one was planned."""
    shape, args = planned_shape(PLANNED, torch.bfloat16), bench.args
    model = CostModel(shape, bench.calibration)
    for name in bench.mixes:
        requests = bench.fitted(name)
        lengths = lengths_of(requests)
        objective = Objective(args.budget, None, MAX_SEQS, (2048,))
        best = plan(model, lengths, objective).best.layout
        bench.recording.say(f"choice: {name}, planned are {best.layers_per_range} layers a row")
        for layers in _divisors(shape.num_layers):
            for lookahead in dict.fromkeys((*CHOICE_LOOKAHEADS, best.lookahead)):
                layout = Layout(shape, 2 << 20, layers, None, best.extent_classes, lookahead)
                found = in_virtual_time(layout, requests, args.budget)
                sequences = found["mean_sequences"]
                if sequences is None:
                    raise ConfigError(f"no request of {name} waits within --budget; lower it, or raise --requests")
                kv = sequences * lengths.mean_tokens
                parts = model.parts(replace(layout, lookahead=None), Load(sequences, kv))
                if (name, layers) in attention:
                    parts = replace(parts, attention=attention[name, layers] * kv)
                calls_us = model.handle_us(layout.granularity) + bench.calibration["mapping_us"]
                waits = 1e-6 * calls_us * found["critical_path_maps"] / found["steps"]
                step_s = max(parts.device, parts.host, parts.beside if lookahead != 0 else 0.0) + waits
                yield {
                    "trace": name,
                    "layers_per_range": layers,
                    "lookahead": lookahead,
                    "sequences": sequences,
                    "step_ms": 1e3 * step_s,
                    "tokens_per_s": sequences / step_s,
                    "attention": "measured" if (name, layers) in attention else "by formula",
                    "planned": (layers, lookahead) == (best.layers_per_range, best.lookahead),
                }


# -- the figures -------------------------------------------------------------------------------------------------------


def summary(results: dict[str, Any]) -> dict[str, float]:
    """The worst of each kind: part of the measured value, or points of waste; and what was planned over the best."""

    def worst(part: str, error: Callable[[Any], float | None]) -> float | None:
        found = [each for row in results.get(part, []) if (each := error(row)) is not None]
        return max(found, default=None)

    def capacity(row: Any) -> float | None:
        return None if row["capacity"] is None else abs(row["planned_capacity"] / row["capacity"] - 1)

    found = {
        "step_p50_error": worst("step", lambda row: abs(row["planned_ms"] / row["step_ms"]["p50"] - 1)),
        "waste_error_points": worst("memory", lambda row: 100 * abs(row["planned_waste"] - row["waste"])),
        "capacity_error": worst("memory", capacity),
        "burst_p99_error": worst("burst", lambda row: abs(row["planned_ms"] / row["itl_ms"]["p99"] - 1)),
    }
    over = []
    for trace in dict.fromkeys(row["trace"] for row in results.get("choice", [])):
        of_trace = [row for row in results["choice"] if row["trace"] == trace]
        planned = max(row["tokens_per_s"] for row in of_trace if row["planned"])
        over.append(planned / max(row["tokens_per_s"] for row in of_trace))
    found["choice_over_best"] = min(over, default=None)
    return {name: value for name, value in found.items() if value is not None}
