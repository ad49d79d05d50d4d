"""`bench forks`: several samples of one long prompt: what they take in memory and in a step, beside one sample."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np

from trtllm_vattn.arguments import adder
from trtllm_vattn.bench.harness.case import Recording, engine_for, vocab_of
from trtllm_vattn.bench.harness.flags import add_attention, add_common
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.table import tabulate

COLUMNS = "samples round memory step_ms cached_tokens"
REJECTED = 3
"""Tokens of each sequence that a rollback takes back."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench forks`."""
    add = adder(parser, add_common(parser, on_gpu="llama-3.1-8b"))
    add_attention(parser)
    add("--samples", "COUNT", "of the prompt, beside one", 16)
    add("--prompt", "TOKENS", "of the prompt", 16_000, 2000)
    add("--output-tokens", "TOKENS", "of each sample", 200, 24)
    add("--rounds", "TURNS", "turns that each number of samples takes", 3)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    if args.output_tokens < 16:
        raise ConfigError(
            f"--output-tokens is {args.output_tokens}; steps are timed while all samples decode: 16 at least"
        )
    recording = Recording("forks", args)
    recording.measure({"samples": measure_samples})
    return recording.conclude(tabulate(recording.results.get("runs", []), COLUMNS))


def measure_samples(recording: Recording) -> None:
    """One sample and several in turns, by one engine."""
    args, model = recording.args, recording.model
    random, vocab = np.random.default_rng(args.seed), vocab_of(model)
    longest = args.prompt + args.output_tokens
    recording.say("start the engine")
    options = {"attention": args.attention, "max_running": args.samples, "prefix_cache": None}
    with engine_for(model, args.device, args.samples + 2, longest, **options) as engine:
        for turn in range(args.rounds + 1):
            for samples in (1, args.samples):
                recording.say(f"{f'turn {turn} of {args.rounds}' if turn else 'warm-up'}: {samples} samples")
                prompt = random.integers(0, vocab, args.prompt).tolist()
                found = measure(engine, prompt, samples, args.output_tokens)
                # The first turn compiles and captures.
                if turn:
                    recording.add("runs", {"samples": samples, "round": turn - 1, **found})
            if turn:
                recording.sum_up(**summarised(recording.results["runs"], engine.cache.bytes_of(args.output_tokens)))


def summarised(rows: Sequence[dict[str, Any]], own: int) -> dict[str, Any]:
    """The figures that are quoted, of the most samples over one; `own` are bytes of a sample's own tokens. The page
    that they begin in is not taken off."""
    most = max(row["samples"] for row in rows)

    def middle(samples: int, what: str) -> float:
        return float(np.median([row[what] for row in rows if row["samples"] == samples]))

    one, many = middle(1, "memory"), middle(most, "memory")
    return {
        "memory_n16_over_one": (many - most * own) / one,
        "memory_n16_over_one_with_tokens": many / one,
        "step_n16_over_one": middle(most, "step_ms") / middle(1, "step_ms"),
        "rollback_us": middle(most, "rollback_us"),
        "samples": most,
    }


def measure(engine: Engine, prompt: list[int], samples: int, output: int) -> dict[str, Any]:
    """Bytes mapped for running sequences at most, the median step while all samples decode, and a rollback."""
    cache = engine.cache
    engine.flush_prefix_cache()
    # Extents of the last prompt would be larger than what is left of this one behind its last whole page.
    cache.release_free_memory()
    before = engine.prefix_stats()["cached_tokens"]
    engine.submit(prompt, SamplingParams(output, temperature=1.0, seed=1, ignore_eos=True, n=samples))
    memory, steps, rollback = 0, [], 0.0
    while engine.busy:
        started = perf_counter()
        engine.step()
        if len(engine.scheduler.decoding) == samples:
            steps.append(1e3 * (perf_counter() - started))
            memory = max(memory, cache.stats().mapped_bytes)
            if len(steps) == 4:
                rollback = rollback_us(engine)
    if len(steps) < 8:
        raise ConfigError(f"all {samples} samples decoded together for {len(steps)} steps only; raise --output-tokens")
    cached = engine.prefix_stats()["cached_tokens"] - before
    step_ms = float(np.median(steps[4:]))
    return {"memory": memory, "step_ms": step_ms, "rollback_us": rollback, "cached_tokens": cached}


def rollback_us(engine: Engine, repeats: int = 200) -> float:
    """Microseconds in which the last tokens of all sequences are taken back, as behind a step whose drafts were
    rejected; they are there again afterwards."""
    cache, took = engine.cache, []
    lengths = cache.lengths.copy()
    shorter = np.maximum(lengths - REJECTED, 0)
    for _ in range(repeats):
        started = perf_counter()
        cache.roll_back(shorter)
        took.append(perf_counter() - started)
        cache.prepare_step(lengths)
    return 1e6 * float(np.median(took))
