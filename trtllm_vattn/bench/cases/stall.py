"""`bench stall`: does anybody who streams tokens wait while a long prompt goes in?

Two parts, of one engine each, with and without a target for the time between two tokens (`target_itl_ms`). *Gap*: some
sequences decode while one long prompt goes in; the longest time that any of them waits for its next token counts, from
the moment at which the prompt is submitted until a few steps after its first token. *Load*: a trace submitted at once,
its ITL and its throughput. Sarathi-Serve (OSDI'24) measures both.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from statistics import mean
from time import perf_counter
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from trtllm_vattn.arguments import adder, non_negative
from trtllm_vattn.bench.harness import flags
from trtllm_vattn.bench.harness.case import Part, Recording, engine_for, vocab_of
from trtllm_vattn.bench.harness.contenders import cancel_all
from trtllm_vattn.bench.harness.serving import Load, report, serve
from trtllm_vattn.bench.harness.timing import summarise
from trtllm_vattn.bench.harness.traces import fit, generate_trace, load_trace
from trtllm_vattn.bench.harness.workload import prompts_of
from trtllm_vattn.errors import VattnError
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.table import tabulate

Measure = Callable[[Engine, PreTrainedModel, argparse.Namespace], dict[str, Any]]

BEFORE = 16
"""Steps of all sequences before the prompt is submitted."""
AFTER = 8
"""Steps behind the prompt's first token that its shadow may still fall on."""
MAX_SEQ_LEN = 8192
"""Of the load's requests, on a GPU."""
COLUMNS = "part target_itl_ms round worst_gap_ms gap_ms.p99 before_ms.p50 prompt_s"
LOAD_COLUMNS = "part target_itl_ms round output_throughput median_itl_ms p99_itl_ms p99_ttft_ms"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench stall`."""
    add = adder(parser, gpu := flags.add_common(parser, on_gpu="llama-3.1-8b"))
    flags.add_attention(parser)
    add("--target-itl-ms", "MILLISECONDS", "time between two tokens that passes are cut to", 50.0)
    parser.set_defaults(running=32 if gpu else 3)
    add("--context", "TOKENS", "tokens of each sequence that decodes when the long prompt begins", 2048, 20)
    add("--prompt-tokens", "TOKENS", "tokens of the long prompt", 100_000, 400)
    add("--room", "TOKENS", "tokens that the running sequences may decode meanwhile", 4096, 400)
    flags.add_trace(parser)
    add("--requests", "REQUESTS", f"{flags.REQUESTS}; 0 leaves the load out", 256, 8, type=non_negative)
    add("--max-output", "TOKENS", flags.MAX_OUTPUT, 4096, 12)
    add("--max-seqs", "SEQUENCES", f"{flags.MAX_SEQS}, of the load", 256, 4)
    add("--budget", "BYTES", flags.BUDGET, "64GiB", "8MiB")
    add("--chunk", "TOKENS", "prompt tokens that go in at once", 8192, 64)
    add("--rounds", "TURNS", "turns that each target takes", 1)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    recording = Recording("stall", args)
    rows: list[dict[str, Any]] = recording.results.setdefault("runs", [])

    def measured(name: str, measure: Measure, make: Callable[..., AbstractContextManager[Engine]]) -> Part:
        def part(recording: Recording) -> Iterator[dict[str, Any]]:
            with make(recording.model, args) as engine:
                for number in range(args.rounds):
                    for target in (args.target_itl_ms, None):
                        recording.say(f"{name} at a target of {target or 'none'}")
                        # The same engine, so that nothing but the target differs.
                        engine.scheduler.target_ms = target
                        found = measure(engine, recording.model, args)
                        recording.add(
                            "runs", {"part": name, "target_itl_ms": target or "none", "round": number, **found}
                        )
                        yield summary(rows, args.target_itl_ms)

        return part

    parts = {"gap": measured("gap", gap, engine_for_gap)}
    if args.requests:
        parts["load"] = measured("load", loaded, engine_for_load)
    recording.measure(parts)
    shown = [
        tabulate([row for row in rows if row["part"] == part], columns)
        for part, columns in (("gap", COLUMNS), ("load", LOAD_COLUMNS))
        if any(row["part"] == part for row in rows)
    ]
    return recording.conclude("\n\n".join(shown))


def summary(rows: Sequence[dict[str, Any]], target_ms: float) -> dict[str, Any]:
    """The figures that are quoted, as far as they are known: the worst of all rounds for gaps, the mean for rates."""

    def of(part: str, target: float | str, name: str) -> list[float]:
        return [row[name] for row in rows if (row["part"], row["target_itl_ms"]) == (part, target)]

    out: dict[str, Any] = {"target_itl_ms": target_ms}
    if worst := of("gap", target_ms, "worst_gap_ms"):
        out["worst_gap_ms"] = max(worst)
        out["worst_gap_over_target"] = max(worst) / target_ms
        out["prompt_s"] = mean(of("gap", target_ms, "prompt_s"))
    if without := of("gap", "none", "worst_gap_ms"):
        out["worst_gap_ms_without_target"] = max(without)
        out["prompt_s_without_target"] = mean(of("gap", "none", "prompt_s"))
    if itl := of("load", target_ms, "p99_itl_ms"):
        out[f"itl_p99_ms_at_target_{target_ms:g}"] = max(itl)
    if itl_without := of("load", "none", "p99_itl_ms"):
        out["itl_p99_ms_without_target"] = max(itl_without)
        pairs = zip(of("load", target_ms, "output_throughput"), of("load", "none", "output_throughput"), strict=False)
        out["throughput_over_no_target"] = mean(with_target / without for with_target, without in pairs)
    return out


def engine_of(model: PreTrainedModel, args: argparse.Namespace, max_seqs: int, max_seq_len: int) -> Engine:
    """An engine over the fixed-address cache, whose passes are cut to the target."""
    gc.collect()
    options = {"attention": args.attention, "chunk": args.chunk, "target_itl_ms": args.target_itl_ms}
    return engine_for(model, args.device, max_seqs, max_seq_len, args.budget, **options)


def engine_for_gap(model: PreTrainedModel, args: argparse.Namespace) -> Engine:
    """Room for the sequences that run, and the long prompt."""
    longest = max(args.prompt_tokens + AFTER, args.context + args.room)
    return engine_of(model, args, args.running + 1, longest)


def engine_for_load(model: PreTrainedModel, args: argparse.Namespace) -> Engine:
    """Room for the trace's requests."""
    return engine_of(model, args, args.max_seqs, longest_of_load(args))


def longest_of_load(args: argparse.Namespace) -> int:
    """Tokens of a slot of the load."""
    return MAX_SEQ_LEN if args.device != "cpu" else 256


def gap(engine: Engine, model: PreTrainedModel, args: argparse.Namespace) -> dict[str, Any]:
    """Gaps between tokens, in ms, while the long prompt goes in, and how long that took; nothing is left afterwards.

    Raises VattnError where a running sequence ended before.
    """
    random = np.random.default_rng(args.seed)
    vocab = vocab_of(model)

    def prompt(tokens: int) -> list[int]:
        return random.integers(0, vocab, tokens).tolist()  # type: ignore[no-any-return]

    wanted = SamplingParams(max_tokens=args.room, ignore_eos=True)
    running = [engine.submit(prompt(args.context), wanted) for _ in range(args.running)]
    times: dict[int, list[float]] = {number: [] for number in running}
    while min(map(len, times.values())) < BEFORE:
        _step(engine, times)
    began = perf_counter()
    long = engine.submit(prompt(args.prompt_tokens), SamplingParams(max_tokens=AFTER, ignore_eos=True))
    times[long] = []
    while len(times[long]) < AFTER:
        _step(engine, times)
    if ended := [number for number in running if len(times[number]) >= args.room]:
        raise VattnError(f"{len(ended)} sequences decoded all of their {args.room} tokens before; raise --room")
    cancel_all(engine)
    gaps = [1e3 * np.diff(times[number]) for number in running]
    from_then_on = [each[np.asarray(times[number][1:]) >= began] for each, number in zip(gaps, running, strict=True)]
    found = np.concatenate(from_then_on)
    steady = [each[: BEFORE - 1] for each in gaps]
    return {
        "worst_gap_ms": float(found.max()),
        "gap_ms": summarise(found.tolist()),
        "before_ms": summarise(np.concatenate(steady).tolist()),
        "prompt_s": times[long][0] - began,
    }


def _step(engine: Engine, times: dict[int, list[float]]) -> None:
    events = engine.step()
    now = perf_counter()
    for event in events:
        if event.error:
            raise VattnError(event.error)
        times[event.request].append(now)


def loaded(engine: Engine, model: PreTrainedModel, args: argparse.Namespace) -> dict[str, Any]:
    """Latencies and throughput of a trace submitted at once."""
    asked = load_trace(args.trace, args.requests) if args.trace else generate_trace(args.requests, args.seed)
    requests = fit(asked, longest_of_load(args), args.max_output)
    prompts = prompts_of(requests, vocab_of(model), args.seed)
    load = Load(prompts, [request.output_tokens for request in requests], [0.0] * len(requests))
    target = engine.scheduler.target_ms
    return report(load, serve(engine, load, label="no target" if target is None else f"{target:g} ms"))
