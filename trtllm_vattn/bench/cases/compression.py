"""`bench compression`: caches that keep less: windows of some layers, keys and values of eight bits, fewer tokens."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from trtllm_vattn.arguments import adder, positive
from trtllm_vattn.attention.options import FP8
from trtllm_vattn.bench.cases.eviction import eviction, latents, returned, scores
from trtllm_vattn.bench.cases.needle import needle
from trtllm_vattn.bench.harness.case import Part, Recording, captured_graphs, engine_for, vocab_of
from trtllm_vattn.bench.harness.contenders import device_step_ms, empty_lanes, fill_lanes
from trtllm_vattn.bench.harness.flags import add_attention, add_common, add_parts, add_plot, dtype_of
from trtllm_vattn.bench.harness.identity import compare
from trtllm_vattn.bench.harness.workload import TracedRun, run_traced
from trtllm_vattn.bench.publish.plots import plot_compression
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError, KVCacheOutOfMemory
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.kv_dtype import KVScales
from trtllm_vattn.runtime.kv_scales import calibrated_scales
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.prefill import PromptChunk
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.table import tabulate
from trtllm_vattn.vmm.open import open_driver

WINDOWED = "tiny-gemma3"
"""The shape whose window slides."""
COMPARED_TOKENS = 32
"""Of two prompts, by a cache that keeps windows and by one that keeps everything."""
TIE = 0.25
"""Logits; on a GPU, in bfloat16, the two largest closer than this are a tie."""
TOLD_EVERY_S = 5.0
"""Seconds between two figures of a window that slides."""
ROUNDS = 5
"""Turns in which steps over 16 and over 8 bits are timed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench compression`."""
    add = adder(parser, gpu := add_common(parser, on_gpu="llama-3.1-8b"))
    add_attention(parser)
    add_plot(parser)
    # What a trained model finds is a property of policies, not of the card.
    add_parts(parser, PARTS, ",".join(name for name in PARTS if name != "needle") if gpu else None)
    add("--slide", "TOKENS", "tokens that a window slides over", 100_000, 1200)
    add("--window-context", "TOKENS", "tokens of each sequence whose windows' memory is counted", 32_768, 512)
    add("--batch", "SEQUENCES", "sequences that decode over keys and values of 16 and of 8 bits", 64, 3)
    add("--context", "TOKENS", "tokens of each sequence of --batch", 8192, 64)
    add("--evicted-context", "TOKENS", "tokens of a prompt that most are evicted of", 131_072, 6000)
    text = "KV memory, in which as many sequences as fit are admitted"
    parser.add_argument(
        "--pages", type=positive, default=16_384 if gpu else 300, metavar="COUNT", help=text + ", in the driver's pages"
    )


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 where tokens of a cache with windows are others, anything was captured again, a policy keeps
    others than its paper says, or a part failed."""
    recording = Recording("compression", args)
    recording.measure(PARTS, args.parts)
    summary, wrong = recording.summary, []
    if summary.get("window_recaptures"):
        wrong.append(f"{summary['window_recaptures']} graphs were captured again while a window slid")
    if summary.get("window_tokens_equal", 1.0) < 1.0:
        wrong.append("a cache that keeps windows gives other tokens than one that keeps everything")
    if summary.get("window_memory_changes"):
        wrong.append("the windows' memory changed while they slid")
    if summary.get("kept_sets_match_paper", 1.0) < 1.0:
        wrong.append("a policy keeps other tokens than the paper's rule computed in full")
    rows = [{"part": name, "seconds": seconds} for name, seconds in recording.results["part_seconds"].items()]
    return recording.conclude(tabulate(rows, "part seconds"), plot_compression, wrong)


# -- windows ---------------------------------------------------------------------------------------------------------


def windows(recording: Recording) -> Iterator[dict[str, Any]]:
    """Memory of windows beside their own tokens', and tokens beside those of a cache that keeps everything."""
    yield window_memory(recording.args)
    yield same_tokens(recording.args)


def hybrid_shape(args: argparse.Namespace) -> CacheShape:
    """Of Gemma 3 27B, or a small one of the same pattern: every sixth layer keeps all tokens."""
    gpu = args.device != "cpu"
    layers, window, heads, dim = (62, 1024, 16, 128) if gpu else (6, 64, 2, 16)
    pattern = tuple(None if layer % 6 == 5 else window for layer in range(layers))
    sequences = 4
    return CacheShape(layers, heads, dim, torch.bfloat16, sequences, args.window_context, windows=pattern)


def window_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes mapped for windows over those of windows times layers and a page a range, and over all tokens'."""
    shape = hybrid_shape(args)
    if not shape.windows:
        raise ConfigError(f"--window-context is {args.window_context}; give more than the window")
    driver = open_driver(args.device)
    with make_cache("vattn", shape, args.device, driver=driver) as cache:
        for sequence in range(shape.num_slots):
            cache.admit(sequence, args.window_context // 2)
            cache.extend(sequence, args.window_context // 2)
        stats = cache.stats()
        # As many layers share each range.
        ranges = len(cache.storages()) * sum(each is not None for each in shape.windows) // shape.num_layers
    pages = ranges * shape.num_slots * driver.granularity()
    tokens = sum(each for each in shape.windows if each) * shape.num_slots
    ideal = tokens * shape.layer_token_bytes
    everything = shape.num_slots * args.window_context * shape.token_bytes
    return {
        "window_memory_over_ideal": stats.window_bytes / (ideal + pages),
        "window_memory_over_windows": stats.window_bytes / ideal,
        "hybrid_memory_over_all_tokens": stats.mapped_bytes / everything,
    }


def sliding(recording: Recording) -> Iterator[dict[str, Any]]:
    """Graphs captured again, and changes of the windows' memory, while one sequence decodes `--slide` tokens."""
    args = recording.args
    model = load_model(WINDOWED, args.device, dtype_of(args.device), args.seed)
    prompt = np.random.default_rng(args.seed).integers(0, vocab_of(model), 700).tolist()
    options: dict[str, Any] = {"attention": args.attention, "max_step_tokens": 256, "steps": 64, "compile": False}
    with engine_for(model, args.device, 1, args.slide + len(prompt) + 1, **options) as engine:
        # What is captured when it is first used is, by this.
        engine.generate([prompt], SamplingParams(200, ignore_eos=True))
        graphs = {id(graph) for graph in captured_graphs(engine)}
        engine.submit(prompt, SamplingParams(args.slide, ignore_eos=True))
        tokens, mapped, told = 0, set(), perf_counter()
        while engine.busy:
            tokens += len(engine.step())
            if engine.busy and tokens:
                mapped.add(engine.cache.stats().window_bytes)
            if not engine.busy or perf_counter() - told > TOLD_EVERY_S:
                told = perf_counter()
                again = {id(graph) for graph in captured_graphs(engine)} - graphs
                changes = max(0, len(mapped) - 1)
                yield {"window_recaptures": len(again), "slid_tokens": tokens, "window_memory_changes": changes}


def same_tokens(args: argparse.Namespace) -> dict[str, Any]:
    """The share of tokens that are, up to ties, those of a cache that keeps everything and masks it."""
    random = np.random.default_rng(args.seed)
    model = load_model(WINDOWED, args.device, dtype_of(args.device), args.seed)
    prompts = [random.integers(0, vocab_of(model), count).tolist() for count in (700, 40)]
    shape = shape_of(model, 2, 1024)
    runs: list[TracedRun] = []
    for each in (shape, replace(shape, windows=())):
        cache = make_cache("vattn", each, args.device)
        options: dict[str, Any] = {"attention": args.attention, "max_step_tokens": 256, "prefix_cache": False}
        with Engine(model, cache, compile=False, record_margins=True, **options) as engine:
            forced = runs[0].tokens if runs else None
            runs.append(run_traced(engine, prompts, [COMPARED_TOKENS] * len(prompts), forced, "windows"))
    found = compare(runs[0].tokens, runs[1].tokens, TIE if args.device != "cpu" else 0.0)
    return {"window_tokens_equal": 1 - found.mismatches / found.tokens, "window_ties": found.ties}


# -- eight bits ------------------------------------------------------------------------------------------------------


def eight_bits(recording: Recording) -> Iterator[dict[str, Any]]:
    """Sequences in the same memory; how far logits drift; and a captured step over `--batch` sequences of `--context`
    random tokens, of 16 and of 8 bits in turns (None on the host)."""
    args, model = recording.args, recording.model
    fitting = [_sequences(args, model, dtype) for dtype in (torch.bfloat16, FP8)]
    yield {"fp8_sequences_over_bf16": fitting[1] / fitting[0]}
    random, vocab = np.random.default_rng(args.seed), vocab_of(model)
    prompts = [random.integers(0, vocab, 64).tolist() for _ in range(4)]
    scales = calibrated_scales(model, prompts[:2])
    with ExitStack() as open_engines:
        engines = [
            open_engines.enter_context(_engine(args, model, dtype, given))
            for dtype, given in (("auto", None), ("fp8", scales))
        ]
        exact, other = (torch.cat([_logits(engine, prompt) for prompt in prompts]).float() for engine in engines)
        yield {
            "fp8_logits_drift": float((other - exact).norm() / exact.norm()),
            "fp8_same_likeliest_token": float((other.argmax(-1) == exact.argmax(-1)).float().mean()),
        }
        for engine in engines:
            fill_lanes(engine, args.context, args.seed)
            open_engines.callback(empty_lanes, engine)
        turns = [[device_step_ms(engine, 6) for engine in engines] for _ in range(ROUNDS)]
    yield _step_figures(args, turns)


def _step_figures(args: argparse.Namespace, turns: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    known = [(bf16, fp8) for bf16, fp8 in turns if bf16 is not None and fp8 is not None]
    bf16, fp8 = (median(each[part] for each in known) if known else None for part in (0, 1))
    ratios = [each[1] / each[0] for each in known]
    name = f"fp8_step_over_bf16_{args.batch}x{args.context}"
    return {
        "fp8_step_over_bf16_64x8k" if (args.batch, args.context) == (64, 8192) else name: fp8 / bf16
        if bf16 and fp8
        else None,
        "fp8_step_over_bf16_by_turn": [min(ratios), max(ratios)] if ratios else None,
        "bf16_step_ms": bf16,
        "fp8_step_ms": fp8,
    }


def _sequences(args: argparse.Namespace, model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Sequences of `--context` tokens that a cache of `--pages` pages holds at once."""
    shape = replace(shape_of(model, 512, args.context), dtype=dtype)
    driver = open_driver(args.device)
    with KVCacheManager(shape, driver, args.pages * driver.granularity(), lookahead=0) as cache:
        for sequence in range(shape.num_slots):
            try:
                cache.admit(sequence, args.context)
            except KVCacheOutOfMemory:
                break
        if not 0 < cache.stats().sequences < shape.num_slots:
            raise ConfigError(
                f"--pages is {args.pages}; give as many as hold between 1 and {shape.num_slots} sequences"
            )
        return cache.stats().sequences


def _engine(args: argparse.Namespace, model: PreTrainedModel, dtype: str, scales: KVScales | None) -> Engine:
    """One that decodes `--batch` sequences; passes of prompts are short, since few are captured then."""
    shape = shape_of(model, args.batch, max(args.context + 128, 64), dtype)
    cache = make_cache("vattn", shape, args.device)
    options: dict[str, Any] = {"attention": args.attention, "buckets": [args.batch], "prefix_cache": False}
    return Engine(model, cache, max_step_tokens=32, kv_scales=scales, **options)


@torch.inference_mode()
def _logits(engine: Engine, prompt: list[int]) -> torch.Tensor:
    slot = engine.cache.admit("drift", len(prompt))
    last = torch.empty(0)
    for start in range(0, len(prompt), 32):
        last = engine.prefill.run([PromptChunk(slot, prompt[start : start + 32], start)])
    kept = last.clone()
    engine.cache.release("drift")
    return kept


PARTS: dict[str, Part] = {
    "windows": windows,
    "sliding": sliding,
    "fp8": eight_bits,
    "returned": returned,
    "scores": scores,
    "latents": latents,
    "eviction": eviction,
    "needle": needle,
}
"""What is measured, by name."""
