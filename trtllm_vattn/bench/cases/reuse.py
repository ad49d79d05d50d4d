"""The part of `bench prefix` that measures engines: with and without prefix cache, and over block tables that share
blocks, over requests whose prompts share what they begin with, and over others that share nothing; and what each way to
a hit takes, by its length.

Requests are an agent's turns, or a trace with block hashes (Mooncake's). So many run at once, the next one comes when
one has ended. Their outputs are the trace's own (forced), so that the next turn's prompt is what the engine stored.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from trtllm_vattn.bench.harness.case import Recording, vocab_of
from trtllm_vattn.bench.harness.contenders import observed
from trtllm_vattn.bench.harness.serving import quiet_heap
from trtllm_vattn.bench.harness.shared_blocks import BlockSlots, SharedBlocks
from trtllm_vattn.bench.harness.timing import summarise
from trtllm_vattn.bench.harness.traces import TokenRequest, agent_turns
from trtllm_vattn.bench.publish.plots import pyplot, save
from trtllm_vattn.cache.prefix import Way
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.progress import Progress
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams

CONTENDERS = ("reuse", "no reuse", "block tables")
"""A prefix cache at fixed addresses, none, and block tables that share blocks."""
BLOCK_SIZE, WARM_UP = 16, 4
SPREAD = 0x9E3779B1
"""Odd: numbers of tokens, which no vocabulary has so many of, are spread over it by this."""
REMAINDERS = (1, 8, 16)
"""Tokens behind what is kept, of the hits whose time to the first token is measured; the first is the one quoted."""
MAPPING_CALLS = ("admit", "adopt", "copy_prefix", "extend")
"""Of the cache beneath a prefix cache."""
HIT = 0.5
"""Of a prompt, what is reused where TTFT counts as that of a hit."""


def agents_of(args: argparse.Namespace, requests: int) -> list[TokenRequest]:
    """An agent's turns that fit the engine."""
    sizes = {"system_tokens": 64, "median_input": 20, "median_output": 6} if args.device == "cpu" else {}
    return agent_turns(requests, args.seed, at_once=args.max_seqs, longest=args.max_seq_len * 3 // 4, **sizes)


@contextmanager
def contenders(
    model: PreTrainedModel, args: argparse.Namespace, names: Sequence[str], recording: Recording
) -> Iterator[dict[str, Engine]]:
    """Engines over one model by name, of `CONTENDERS`, warmed up by a few requests."""
    few = [fitted(request, args.max_seq_len) for request in agents_of(args, 2 * args.max_seqs)[:WARM_UP]]
    with ExitStack() as all_of_them:
        made = {}
        for name in names:
            recording.say(f"start the engine: {name}")
            made[name] = all_of_them.enter_context(engine_of(model, args, name))
            recording.say(f"warm up: {name}")
            replay(made[name], few, args.max_seqs)
        yield made


def compare(
    engines: dict[str, Engine],
    workloads: dict[str, list[TokenRequest]],
    args: argparse.Namespace,
    recording: Recording,
) -> None:
    """Have engines take turns at each workload, and record what they gave."""
    for name, requests in workloads.items():
        fitting = [fitted(request, args.max_seq_len) for request in requests]
        for turn in range(args.rounds):
            for contender in engines if turn % 2 == 0 else reversed(engines):
                recording.say(f"turn {turn + 1} of {args.rounds}: {name}, {len(fitting)} requests: {contender}")
                row = replay(engines[contender], fitting, args.max_seqs)
                recording.add("engines", {"workload": name, "engine": contender, "round": turn, **row})
                recording.sum_up(**compared(recording.results["engines"]))


def compared(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Throughputs with reuse over those without it and of block tables, as far as they were measured; the first
    workload's is quoted without its name."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(row["workload"] for row in rows):
        some = [row for row in rows if row["workload"] == name]
        speed = {
            engine: float(np.mean([row["throughput"] for row in some if row["engine"] == engine]))
            for engine in dict.fromkeys(row["engine"] for row in some)
        }
        hits = [row["hit_rate"] for row in some if row["engine"] == "reuse"]
        if hits:
            found[f"hit_rate_{name}"] = float(np.mean(hits))
        for other in CONTENDERS[1:]:
            if "reuse" in speed and other in speed:
                ratio, key = speed["reuse"] / speed[other], f"throughput_over_{other.replace(' ', '_')}"
                found.setdefault(key, ratio)
                found[f"{key}_{name}"] = ratio
    return found


def unlike(requests: Sequence[TokenRequest], seed: int) -> list[TokenRequest]:
    """Requests as long as these, no two of which begin alike: reuse costs something and gives nothing."""
    random = np.random.default_rng(seed)
    return [TokenRequest(random.integers(1, 1 << 40, len(each.prompt)), each.output) for each in requests]


def ways_by_length(engine: Engine, args: argparse.Namespace, recording: Recording) -> None:
    """Record what each way to a hit takes, by the prefix's length (py)."""
    lengths, steps, repeats = lengths_up_to(args.max_seq_len)[2::2], 24, 2
    if args.device == "cpu":
        lengths, steps, repeats = lengths[-1:], 5, 1
    vocab = vocab_of(engine.model)
    engine.flush_prefix_cache()
    recording.results["ways"] = []
    for tokens in lengths:
        recording.say(f"ways to a hit of {tokens:,} tokens")
        for row in measure_ways(engine, vocab, [tokens], steps, repeats, args.seed + tokens):
            recording.add("ways", row)
        recording.sum_up(**ways_summary(recording.results["ways"]))


def fitted(request: TokenRequest, longest: int) -> TokenRequest:
    """A request cut to what a slot holds."""
    output = request.output[: max(1, longest // 4)]
    return TokenRequest(request.prompt[: longest - len(output)], output)


def token_ids(numbers: np.ndarray, vocab: int) -> list[int]:
    """Numbers of tokens as ids of a vocabulary."""
    ids: list[int] = ((numbers.astype(np.uint64) * np.uint64(SPREAD) >> np.uint64(7)) % np.uint64(vocab)).tolist()
    return ids


def engine_of(model: PreTrainedModel, args: argparse.Namespace, name: str) -> Engine:
    """An engine of `CONTENDERS`."""
    options: dict[str, Any] = {"attention": args.attention, "max_running": args.max_seqs}
    reuse = name == "reuse"
    shape = shape_of(model, args.max_seqs + (args.kept_seqs if reuse else 0), args.max_seq_len)
    if name != "block tables":
        return Engine(model, make_cache("vattn", shape, args.device, args.budget), prefix_cache=reuse, **options)
    blocks = SharedBlocks(shape, args.device, BLOCK_SIZE, args.budget // (BLOCK_SIZE * shape.token_bytes))
    engine = Engine(model, blocks, **options)
    engine.slots = engine.scheduler.slots = BlockSlots(blocks)
    return engine


def cached_of(engine: Engine) -> tuple[int, int]:
    """Tokens of prompts that were there since the start, and all."""
    if isinstance(engine.slots, BlockSlots):
        return engine.slots.cached_tokens, engine.slots.prompt_tokens
    if engine.slots.prefixes is None:
        return 0, 0
    stats = engine.prefix_stats()
    return stats["cached_tokens"], stats["prompt_tokens"]


def replay(engine: Engine, requests: Sequence[TokenRequest], max_seqs: int) -> dict[str, Any]:
    """All requests, so many at once, beginning with nothing kept; tokens a second are those of prompts and outputs."""
    vocab = vocab_of(engine.model)
    asked = [(token_ids(each.prompt, vocab), token_ids(each.output, vocab)) for each in requests]
    came: dict[int, float] = {}
    ttft: list[float] = []
    failed, at = 0, 0
    engine.flush_prefix_cache()
    hits, prompts = cached_of(engine)
    critical = engine.cache.stats().critical_path_maps
    started = perf_counter()
    with Progress("requests", len(asked), "request") as bar:
        while at < len(asked) or engine.busy:
            while at < len(asked) and len(engine.scheduler.requests) < max_seqs:
                prompt, output = asked[at]
                params = SamplingParams(len(output), ignore_eos=True)
                came[engine.submit(prompt, params, forced=output)] = perf_counter()
                at += 1
            for event in engine.step():
                if event.token is not None and event.index == 0:
                    ttft.append(1e3 * (perf_counter() - came[event.request]))
                failed += event.finish_reason == "error"
                bar.update(event.finish_reason is not None)
    seconds = perf_counter() - started
    if failed:
        raise ConfigError(f"{failed} of {len(asked)} requests failed; raise --budget")
    tokens = sum(len(prompt) + len(output) for prompt, output in asked)
    hits, prompts = (now - before for now, before in zip(cached_of(engine), (hits, prompts), strict=True))
    return {
        "seconds": seconds,
        "throughput": tokens / seconds,
        "median_ttft_ms": float(np.median(ttft)),
        "ttft_ms": summarise(ttft),
        "critical_path_maps": engine.cache.stats().critical_path_maps - critical,
        "cached_tokens": hits,
        "hit_rate": hits / prompts if prompts else 0.0,
    }


def steady_state(engine: Engine, args: argparse.Namespace) -> dict[str, float]:
    """Steps of all sequences, begun by hits, beside what is kept: `driver_calls_per_steady_step` are mappings that a
    step had to make for itself. And the time to the first token of a hit, alone, by that of a step, alone."""
    vocab, random = vocab_of(engine.model), np.random.default_rng(args.seed)
    half = args.max_seq_len // 2
    before_turns = cached_of(engine)
    prompt = random.integers(0, vocab, half).tolist()
    engine.generate([prompt], SamplingParams(2, ignore_eos=True))
    wanted = SamplingParams(args.steps + 8, ignore_eos=True)
    prompts = [[*prompt, *random.integers(0, vocab, 8).tolist()] for _ in range(args.max_seqs)]
    numbers = [engine.submit(each, wanted) for each in prompts]
    while any(not engine.scheduler.requests[number].chosen for number in numbers):
        engine.step()
    before = engine.cache.stats().critical_path_maps
    for _ in range(args.steps):
        engine.step()
    calls = (engine.cache.stats().critical_path_maps - before) / args.steps
    for number in numbers:
        if number in engine.scheduler.requests:
            engine.abort(number)
    turns = 12 if args.steps >= 100 else 3
    rows = [hits_alone(engine, prompt, behind, turns, min(40, args.steps), random) for behind in REMAINDERS]
    hits, asked = (now - was for now, was in zip(cached_of(engine), before_turns, strict=True))
    if hits < HIT * asked:
        raise ConfigError(f"only {hits / asked:.0%} of these prompts' tokens were reused; raise --budget")
    one, *others = rows
    found = {
        "driver_calls_per_steady_step": calls,
        "ttft_hit_ms": one["ttft_ms"],
        "step_ms": one["step_ms"],
        "ttft_hit_over_step": one["ttft_ms"] / one["step_ms"],
        "ttft_hit_less_mapping_over_step": (one["ttft_ms"] - one["mapping_ms"]) / one["step_ms"],
        **{f"hit_{part}_ms": one[f"{part}_ms"] for part in ("mapping", "pass", "host")},
    }
    for row in others:
        found[f"ttft_hit_{row['behind']}_tokens_ms"] = row["ttft_ms"]
        found[f"hit_{row['behind']}_tokens_pass_ms"] = row["pass_ms"]
    return found


def hits_alone(
    engine: Engine, prompt: list[int], behind: int, turns: int, output: int, random: np.random.Generator
) -> dict[str, float]:
    """Hits on a prompt with so many tokens behind it, on an idle engine, medians: `ttft_ms` from the submission on;
    `mapping_ms` of it in calls that give the sequence its slot and memory, driver calls among them; `pass_ms` waiting
    for the device; `host_ms` all else. And `step_ms` of the steps behind."""
    vocab, prefixes = vocab_of(engine.model), engine.slots.prefixes
    assert prefixes is not None
    rows = []
    with quiet_heap(), observed(engine) as records:
        for _ in range(turns):
            turn = [*prompt, *random.integers(0, vocab, behind).tolist()]
            records.clear()
            with timed_calls(prefixes.cache, MAPPING_CALLS) as mapping:
                started = perf_counter()
                engine.submit(turn, SamplingParams(output, ignore_eos=True))
                times = []
                while engine.busy:
                    if engine.step():
                        times.append(perf_counter())
            ttft, waited = times[0] - started, records[0].wait_s
            parts = ttft, sum(mapping), waited, ttft - sum(mapping) - waited, float(np.median(np.diff(times)))
            rows.append(parts)
    names = ("ttft_ms", "mapping_ms", "pass_ms", "host_ms", "step_ms")
    return {"behind": behind, **dict(zip(names, (1e3 * np.median(rows, axis=0)).tolist(), strict=True))}


@contextmanager
def timed_calls(cache: Any, names: Sequence[str]) -> Iterator[list[float]]:
    """Seconds of each call of these methods of an object."""
    took: list[float] = []

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                took.append(perf_counter() - started)

        return call

    before = {name: getattr(cache, name) for name in names}
    try:
        for name, work in before.items():
            setattr(cache, name, timed(work))
        yield took
    finally:
        for name, work in before.items():
            setattr(cache, name, work)


# -- ways to a hit: aliasing, copying, reading in the owner's slot, computing anew -------------------------------------

MEASURED = (Way.ALIAS, Way.COPY, Way.TABLE, Way.NONE)
NAMES = {Way.ALIAS: "alias", Way.COPY: "copy", Way.TABLE: "reach", Way.NONE: "recompute"}


def lengths_up_to(longest: int) -> list[int]:
    """Lengths of prefixes, powers of two."""
    return [1 << power for power in range(6, longest.bit_length()) if 1 << power < longest * 3 // 4]


def measure_ways(
    engine: Engine, vocab: int, lengths: Sequence[int], steps: int, repeats: int, seed: int
) -> list[dict[str, Any]]:
    """A row a length and way: milliseconds of a hit on a running sequence's prompt, alone beside that sequence, until
    its first token and in a step; in all, of the first token and of what `steps` steps take longer than a copy's."""
    random = np.random.default_rng(seed)
    prefixes = engine.slots.prefixes
    if prefixes is None:
        raise ConfigError("the engine keeps no prefixes, so that there are no ways to measure")
    all_ways, costs, rows = prefixes.ways, prefixes.costs, []
    for tokens in lengths:
        prompt = random.integers(0, vocab, tokens).tolist()
        # While it runs, nobody adopts its slot.
        owner = engine.submit(prompt, SamplingParams(engine.cache.shape.max_seq_len - tokens, ignore_eos=True))
        while not engine.scheduler.requests[owner].chosen:
            engine.step()
        found: dict[Way, tuple[float, float]] = {}
        # Whatever it costs, it is measured.
        prefixes.costs = replace(costs, table_step_us=0, prefill_tokens_per_s=1)
        for way in MEASURED:
            if way is Way.NONE or way in all_ways:
                prefixes.ways = frozenset({way}) - {Way.NONE}
                turns = [_hit(engine, vocab, prompt, steps, random, way) for _ in range(repeats + 1)][1:]
                if taken := [turn for turn in turns if turn is not None]:
                    first, step = np.median(np.array(taken), axis=0).tolist()
                    found[way] = first, step
        prefixes.ways, prefixes.costs = all_ways, costs
        before = dict(prefixes.stats.ways)
        _hit(engine, vocab, prompt, steps, random, None)
        chosen = next(Way(way) for way, n in prefixes.stats.ways.items() if n > before.get(way, 0))
        engine.abort(owner)
        base = found.get(Way.COPY, next(iter(found.values())))[1]
        for way, (first, step) in found.items():
            total = first + steps * max(0.0, step - base)
            rows.append(
                {"tokens": tokens, "way": NAMES[way], "first_ms": first, "step_ms": step, "total_ms": total}
                | {"chosen": way is chosen}
            )
    return rows


def _hit(
    engine: Engine, vocab: int, prompt: list[int], steps: int, random: np.random.Generator, way: Way | None
) -> tuple[float, float] | None:
    """One hit by a way: milliseconds until its first token, and of a step; None where another way was taken."""
    prefixes = engine.slots.prefixes
    assert prefixes is not None
    before = 0 if way is None else prefixes.stats.ways[way.value]
    turn = [*prompt, *random.integers(0, vocab, 2).tolist()]
    started = perf_counter()
    number = engine.submit(turn, SamplingParams(steps, ignore_eos=True))
    times = []
    while number in engine.scheduler.requests:
        if any(event.request == number for event in engine.step()):
            times.append(perf_counter())
    if way is not None and prefixes.stats.ways[way.value] == before:
        return None
    return 1e3 * (times[0] - started), 1e3 * float(np.median(np.diff(times)))


def ways_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The least of lengths from which on each way is the cheapest, and how near the engine's choice comes to that."""
    out: dict[str, Any] = {}
    ratios = []
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        those = [row for row in rows if row["tokens"] == tokens]
        best = min(those, key=lambda row: row["total_ms"])
        out.setdefault(f"{best['way']}_is_cheapest_from_tokens", tokens)
        ratios += [row["total_ms"] / best["total_ms"] for row in those if row["chosen"]]
    if ratios:
        out["chosen_way_over_cheapest"] = float(np.median(ratios))
    step = {(row["tokens"], row["way"]): row["step_ms"] for row in rows}
    longer = [
        step[tokens, "reach"] - ms for (tokens, way), ms in step.items() if way == "copy" and (tokens, "reach") in step
    ]
    if longer:
        out["reach_step_longer_us"] = 1e3 * float(np.median(longer))
    return out


def plot_ways(result: dict[str, Any], path: Path) -> None:
    """Draw what each way to a hit takes by the prefix's length, and what was chosen. Raises
    ConfigError without matplotlib."""
    figure, axis = pyplot().subplots(figsize=(8, 5), layout="constrained")
    rows = result["results"]["ways"]
    for way in dict.fromkeys(row["way"] for row in rows):
        those = [row for row in rows if row["way"] == way]
        axis.plot([row["tokens"] for row in those], [row["total_ms"] for row in those], marker=".", label=way)
    chosen = [row for row in rows if row["chosen"]]
    tokens, totals = ([row[name] for row in chosen] for name in ("tokens", "total_ms"))
    axis.scatter(tokens, totals, s=90, facecolors="none", edgecolors="black", label="chosen")
    axis.set_xscale("log", base=2)
    axis.set(yscale="log", xlabel="tokens of the prefix", ylabel="ms until the first token, and more in later steps")
    axis.legend()
    save(figure, result, path)
