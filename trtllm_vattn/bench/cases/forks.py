"""`bench forks`: several samples of one long prompt: what they take in memory and in a step, beside one sample."""

from __future__ import annotations

import argparse
from time import perf_counter
from typing import Any

import numpy as np

from trtllm_vattn.arguments import positive
from trtllm_vattn.bench.harness.case import conclude, model_of, vocab_of
from trtllm_vattn.bench.harness.flags import add_attention, add_common, add_rounds
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.table import tabulate

COLUMNS = {
    "samples": "samples",
    "round": "round",
    "memory MiB": lambda row: f"{row['memory'] / 2**20:,.1f}",
    "step ms": "step_ms:,.3f",
    "cached tokens": "cached_tokens:,",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench forks`."""
    gpu, add = add_common(parser), parser.add_argument
    add_attention(parser)
    add("--samples", type=positive, default=16, metavar="COUNT", help="of the prompt, beside one")
    add("--prompt", type=positive, default=16_000 if gpu else 2000, metavar="TOKENS", help="of the prompt")
    add("--output-tokens", type=positive, default=200 if gpu else 24, metavar="TOKENS", help="of each sample")
    add_rounds(parser, 3, "number of samples")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    if args.output_tokens < 16:
        raise ConfigError(
            f"--output-tokens is {args.output_tokens}; steps are timed while all samples decode: 16 at least"
        )
    model = model_of(args)
    random, vocab = np.random.default_rng(args.seed), vocab_of(model)
    longest = args.prompt + args.output_tokens
    cache = make_cache("vattn", shape_of(model, args.samples + 2, longest), args.device)
    rows: list[dict[str, Any]] = []
    with Engine(model, cache, attention=args.attention, max_running=args.samples) as engine:
        for turn in range(args.rounds + 1):
            for samples in (1, args.samples):
                prompt = random.integers(0, vocab, args.prompt).tolist()
                found = measure(engine, prompt, samples, args.output_tokens)
                # The first turn compiles and captures.
                if turn:
                    rows.append({"samples": samples, "round": turn - 1, **found})

    def middle(samples: int, what: str) -> float:
        return float(np.median([row[what] for row in rows if row["samples"] == samples]))

    # The tokens that each sample has for itself; the page that it begins in is not taken off.
    own = args.samples * cache.bytes_of(args.output_tokens)
    one, many = middle(1, "memory"), middle(args.samples, "memory")
    summary = {
        "memory_n16_over_one": (many - own) / one,
        "memory_n16_over_one_with_tokens": many / one,
        "step_n16_over_one": middle(args.samples, "step_ms") / middle(1, "step_ms"),
        "samples": args.samples,
    }
    return conclude("forks", args, {"runs": rows}, summary, tabulate(rows, COLUMNS))


def measure(engine: Engine, prompt: list[int], samples: int, output: int) -> dict[str, Any]:
    """Bytes mapped for running sequences at most, and the median step while all samples decode."""
    cache = engine.cache
    engine.flush_prefix_cache()
    # Extents of the last prompt would be larger than what is left of this one behind its last whole page.
    cache.release_free_memory()
    before = engine.prefix_stats()["cached_tokens"]
    engine.submit(prompt, SamplingParams(output, temperature=1.0, seed=1, ignore_eos=True, n=samples))
    memory, steps = 0, []
    while engine.busy:
        started = perf_counter()
        engine.step()
        if len(engine.scheduler.decoding) == samples:
            steps.append(1e3 * (perf_counter() - started))
            memory = max(memory, cache.stats().mapped_bytes)
    if len(steps) < 8:
        raise ConfigError(f"all {samples} samples decoded together for {len(steps)} steps only; raise --output")
    cached = engine.prefix_stats()["cached_tokens"] - before
    return {"memory": memory, "step_ms": float(np.median(steps[4:])), "cached_tokens": cached}
