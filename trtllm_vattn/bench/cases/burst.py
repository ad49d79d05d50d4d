"""`bench burst`: many prompts arrive in one scheduling window. What does mapping their memory cost, and which requests
pay?

Some sequences decode; then all prompts are admitted at once, which maps their memory, and one prompt is prefilled
between every two decode steps; then the first sequences decode on alone. Decode steps are timed on the device, without
the prompts. The same burst runs over `KVCacheManager` with and without preallocated extents, over its layout with one
page mapped by each call, over vAttention as its paper has it, and over a contiguous cache, which maps nothing and so
shows how much of a longer step is due to the prompts. With a trace, the arrivals that are densest in time are another
burst, with the prompts' own lengths.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from time import perf_counter, sleep
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from trtllm_vattn.arguments import adder, non_negative
from trtllm_vattn.bench.cases.ledger import LedgerDriver
from trtllm_vattn.bench.cases.serve import densest
from trtllm_vattn.bench.harness.case import Part, Recording, vocab_of
from trtllm_vattn.bench.harness.contenders import fill
from trtllm_vattn.bench.harness.flags import add_attention, add_common, add_plot, add_trace
from trtllm_vattn.bench.harness.timing import Clock, Timer, summarise
from trtllm_vattn.bench.harness.traces import load_trace
from trtllm_vattn.bench.publish.plots import plot_burst
from trtllm_vattn.cache.base import CacheShape, KVCache
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.contiguous import ContiguousCache
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.vattention_paper import vattention_paper
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.graphs.guard import Guard
from trtllm_vattn.progress import Progress
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.prefill import PromptChunk
from trtllm_vattn.runtime.request import StepRecord
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.table import tabulate
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.wrappers import CountingDriver

PHASES = ("before", "during", "after")
CALLS = ("create", "map", "set_access", "unmap", "release")


def page_by_page(shape: CacheShape, driver: CountingDriver, budget: int) -> KVCacheManager:
    """`KVCacheManager` with pages of one size, each mapped by calls of its own."""
    return KVCacheManager(shape, driver, budget, config=CacheConfig(extent_classes=1, batch_access=False))


VARIANTS: dict[str, tuple[Callable[[CacheShape, CountingDriver, int], KVCache], bool]] = {
    "vattn, warm stock": (KVCacheManager, True),
    "vattn, cold": (KVCacheManager, False),
    "page by page": (page_by_page, False),
    "published": (vattention_paper, False),
    "contiguous": (lambda shape, driver, budget: ContiguousCache(shape, driver.device), False),
}
ENDINGS = {"vattn, warm stock": "", "vattn, cold": "_cold", "page by page": "_page_by_page", "published": "_published"}
"""Of figures of the summary."""
# For a trace's prompts the cache that reserves the longest for everyone would take more than a card has.
OF_TRACE = tuple(name for name in VARIANTS if name != "contiguous")


COLUMNS = (
    "variant round window_ms driver_ms.create driver_ms.map driver_ms.set_access wait_ms mappings step_ms.before.p50"
)
COLUMNS += "".join(f" step_ms.{phase}.{p}" for phase in PHASES for p in ("p99", "p99.9"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench burst`."""
    add = adder(parser, gpu := add_common(parser))
    add_attention(parser)
    add("--context", "TOKENS", "tokens of each sequence that decodes beside the burst", 2048, 64)
    add("--prompts", "PROMPTS", "prompts of the burst", 128, 6)
    add("--prompt-tokens", "TOKENS", "tokens of each prompt", 2048, 64)
    add("--steps", "STEPS", "decode steps before the burst, and after it", 128, 6)
    add_trace(parser, help="its densest arrivals, --prompts of them, are another burst (default: no other burst)")
    add("--rounds", "TURNS", "turns that each way of mapping takes; 0 is steady decode alone", 2, type=non_negative)
    add("--steady-steps", "STEPS", "decode steps with sequences ending and joining", 2000, 60)
    parser.set_defaults(running=32 if gpu else 2, steady_seqs=128 if gpu else 4)
    add_plot(parser)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    if args.plot and not args.rounds:
        raise ConfigError("--plot draws bursts and --rounds is 0: give at least 1 round, or leave --plot out")
    if args.prompt_tokens < 3:
        raise ConfigError(
            f"--prompt-tokens is {args.prompt_tokens}: steady decode draws lengths below it; give 3 or more"
        )
    kinds = {"equal": [args.prompt_tokens] * args.prompts}
    if args.trace:
        kinds["trace"], span_s = _arrivals(args)
    recording = Recording("burst", args)
    results, shown = recording.results, list[str]()
    if args.trace:
        results["trace_prompts"] = {"span_s": span_s, "tokens": kinds["trace"]}

    def bursts(kind: str) -> Part:
        rows_of, begins = ("bursts", "") if kind == "equal" else ("trace_bursts", "trace_")

        def measure(recording: Recording) -> list[dict[str, Any]]:
            for number in range(args.rounds):
                for name in VARIANTS if kind == "equal" else OF_TRACE:
                    recording.say(f"round {number + 1} of {args.rounds}, {kind}: {name}")
                    found = _burst(recording.model, args, kinds[kind], *VARIANTS[name])
                    recording.add(rows_of, {"variant": name, "round": number, **found})
            shown.append(f"burst of {kind} prompts" if kind == "equal" else f"burst of the trace, {span_s:.2f} s")
            shown.append(tabulate(results[rows_of], COLUMNS))
            return [_summary(results[rows_of], begins)]

        return measure

    parts: dict[str, Part] = {kind: bursts(kind) for kind in kinds} if args.rounds else {}
    recording.measure({**parts, "steady": _steady_figures})
    return recording.conclude("\n".join(shown), plot_burst if "bursts" in results else None)


def _steady_figures(recording: Recording) -> list[dict[str, Any]]:
    """Steady decode, and the host's part of a step over a driver without memory."""
    args = recording.args
    books, steady = prepare_step_us(1_000 if args.device == "cpu" else 10_000), _steady(recording.model, args)
    recording.results.update(steady=steady, books=books)
    return [
        {
            "critical_path_maps_steady": steady["critical_path_maps"],
            "steady_steps": steady["steps"],
            "prepare_step_us_p99": books["prepare_us"]["p99"],
            "guard_us_p99": books["guard_us"]["p99"],
            "prepare_step_sequences": books["sequences"],
            "prepare_step_critical_path_maps": books["critical_path_maps"],
        }
    ]


def _arrivals(args: argparse.Namespace) -> tuple[list[int], float]:
    """Prompt lengths of the trace's densest arrivals, and the seconds between the first and the last."""
    whole = load_trace(args.trace)
    first = densest(whole, args.prompts)
    found = whole[first : first + args.prompts]
    return [request.prompt_tokens for request in found], found[-1].arrival_s - found[0].arrival_s


@torch.inference_mode()
def _burst(
    model: PreTrainedModel,
    args: argparse.Namespace,
    prompts: list[int],
    make: Callable[[CacheShape, CountingDriver, int], KVCache],
    warm: bool,
) -> dict[str, Any]:
    """A burst of prompts of so many tokens; milliseconds of decode steps by phase, and of the burst's driver calls."""
    most = 2 * args.steps + 2 * len(prompts) + args.running + 64
    start = max(1, args.context - most // 2)
    shape = shape_of(model, args.running + len(prompts), max(start + most, *prompts) + 8)
    driver = CountingDriver(open_driver(args.device))
    with ExitStack() as closing:
        # More than all slots take, so that memory is never short.
        cache = make(shape, driver, (shape.num_slots + 2) * shape.max_seq_len * shape.token_bytes * 5 // 4)
        closing.callback(cache.close)
        options = {"attention": args.attention, "buckets": [args.running], "chunk": max(2048, start)}
        engine = Engine(model, cache, prefix_cache=False, **options)
        closing.callback(engine.close)
        fill(engine, [start] * args.running, most, np.random.default_rng(args.seed))
        launches, passes, clock = Timer(cache.device), Timer(cache.device), Clock(cache.device)
        engine.decode.launch = clock.before(launches.timed(engine.decode.launch))  # type: ignore[method-assign]
        phases, clocks = {}, {}

        def end(phase: str) -> None:
            phases[phase], clocks[phase] = launches.take(), clock.take()

        for _ in range(args.steps):
            engine.step()
        end("before")
        if cache.remaps:
            _restock(cache, prompts if warm else [])

        random = np.random.default_rng(args.seed)
        prompt = random.integers(0, vocab_of(model), max(prompts)).tolist()
        seconds, calls, waited = driver.seconds.copy(), driver.calls.copy(), cache.stats().ahead_wait_s
        maps = cache.stats().admission_maps
        started = perf_counter()
        slots = [cache.admit(("burst", number), length) for number, length in enumerate(prompts)]
        window_s = perf_counter() - started
        spent = {name: 1e3 * (driver.seconds[name] - seconds[name]) for name in CALLS}
        made = {name: driver.calls[name] - calls[name] for name in CALLS}
        maps = cache.stats().admission_maps - maps

        @passes.timed
        def put_in(slot: int, length: int) -> None:
            for at in range(0, length, engine.prefill.chunk):
                engine.prefill.run([PromptChunk(slot, prompt[at : min(length, at + engine.prefill.chunk)], at)])

        for slot, length in zip(slots, prompts, strict=True):
            put_in(slot, length)
            # Launched while the device still computes the prompt, as in serving: launching is no part of its time.
            engine.step()
        end("during")
        prefill = passes.take()
        for number in range(len(prompts)):
            cache.release(("burst", number))
        for _ in range(args.steps):
            engine.step()
        end("after")
        stats = cache.stats()
    return {
        "step_ms": {phase: summarise(phases[phase]) for phase in PHASES},
        "steps": phases,
        "sm_mhz": {phase: summarise(clocks[phase]) for phase in PHASES if clocks[phase]},
        "prefill_ms": summarise(prefill),
        "window_ms": 1e3 * window_s,
        "driver_ms": spent,
        "driver_calls": made,
        "map_ms": spent["create"] + spent["map"] + spent["set_access"],
        "wait_ms": 1e3 * (stats.ahead_wait_s - waited),
        "mappings": maps,
        "critical_path_maps": stats.critical_path_maps,
    }


def _restock(cache: Any, prompts: list[int]) -> None:
    """Preallocate memory for these prompts, which are about to be admitted, and none after that."""
    cache.preallocate_for([])
    cache.wait_ahead(120)
    cache.release_free_memory()
    cache.preallocate_for(prompts)
    cache.wait_ahead(120)
    cache.preallocate_for([])
    cache.wait_ahead(120)


def _steady(model: PreTrainedModel, args: argparse.Namespace) -> dict[str, Any]:
    """Decode steps of a full batch whose sequences end and are replaced; what the cache had to do beside them."""
    random = np.random.default_rng(args.seed)
    shape = shape_of(model, args.steady_seqs, 2 * args.prompt_tokens)
    vocab = vocab_of(model)
    budget = (shape.num_slots + 1) * shape.max_seq_len * shape.token_bytes
    cache = KVCacheManager(shape, open_driver(args.device), budget)
    records: list[StepRecord] = []
    with Engine(model, cache, prefix_cache=False, attention=args.attention, buckets=[args.steady_seqs]) as engine:
        engine.observer = records.append
        ended = 0
        with Progress("steady", args.steady_steps, "step") as bar:
            while len(records) < args.steady_steps:
                while len(engine.scheduler.waiting) < 4:
                    prompt, output = random.integers(2, args.prompt_tokens, 2).tolist()
                    engine.submit(
                        random.integers(0, vocab, prompt).tolist(), SamplingParams(max_tokens=output, ignore_eos=True)
                    )
                ended += sum(event.finish_reason is not None for event in engine.step())
                bar.update(len(records) - bar.n)
        stats = cache.stats()
    return {
        "steps": len(records),
        "sequences_ended": ended,
        "lanes": summarise([record.lanes for record in records]),
        "critical_path_maps": stats.critical_path_maps,
        "ahead_maps": stats.ahead_maps,
        "admission_maps": stats.admission_maps,
        "ahead_wait_ms": 1e3 * stats.ahead_wait_s,
        "kv_host_us": summarise([1e6 * record.kv_s for record in records]),
        "step_ms": summarise([1e3 * record.wall_s for record in records if not record.prefilled]),
    }


def prepare_step_us(steps: int, sequences: int = 256) -> dict[str, Any]:
    """Microseconds of `prepare_step` and of the guard after it, for Llama-3-8B's shape, while a thread maps ahead; the
    driver maps nothing, so that any machine can run it."""
    shape = CacheShape(32, 8, 128, torch.bfloat16, sequences, 16_384)
    slots = np.arange(sequences)
    took: list[float] = []
    guarded: list[float] = []
    with KVCacheManager(shape, LedgerDriver(), 1 << 42) as cache:
        random = np.random.default_rng(0)
        for sequence in range(sequences):
            cache.admit(sequence, int(random.integers(16, 4096)))
        cache.start_thread()
        guard = Guard(cache)
        for _ in range(steps):
            before, after = cache.lengths.copy(), cache.lengths + 1
            started = perf_counter()
            cache.prepare_step(after)
            prepared = perf_counter()
            guard.check(after, slots, before)
            guarded.append(1e6 * (perf_counter() - prepared))
            took.append(1e6 * (prepared - started))
            cache.map_ahead()
            # As long as a step of a fast model: the thread has what the device gives it.
            sleep(1e-3)
        critical = cache.stats().critical_path_maps
    return {
        "sequences": sequences,
        "steps": steps,
        "prepare_us": summarise(took),
        "guard_us": summarise(guarded),
        "critical_path_maps": critical,
    }


def _summary(bursts: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    """Each way of mapping a burst by its worst step, its driver calls, and how long admitting all of it took."""
    by = {name: rows for name in VARIANTS if (rows := [row for row in bursts if row["variant"] == name])}
    ratios = {
        name: max(row["step_ms"]["during"]["p99"] / row["step_ms"]["before"]["p99"] for row in rows)
        for name, rows in by.items()
    }
    mapping, window = (
        {name: median(row[key] for row in rows) for name, rows in by.items()} for key in ("map_ms", "window_ms")
    )
    warm = "vattn, warm stock"
    found = {f"p99_ratio{end}": ratios[name] for name, end in ENDINGS.items() if name != "page by page"}
    found |= {f"burst_map_ms{end}": mapping[name] for name, end in {**ENDINGS, "published": "_published_style"}.items()}
    found |= {f"window_ms{end}": window[name] for name, end in ENDINGS.items() if name != "page by page"}
    if still := by.get("contiguous"):
        found["p99_ratio_contiguous"] = ratios["contiguous"]
        found["during_p99_over_contiguous"] = median(
            ours["step_ms"]["during"]["p99"] / theirs["step_ms"]["during"]["p99"]
            for ours, theirs in zip(by[warm], still, strict=True)
        )
    for phase in PHASES:
        if seen := [row["sm_mhz"][phase]["p50"] for row in by[warm] if row["sm_mhz"]]:
            found[f"sm_mhz_{phase}"] = median(seen)
    return {f"{prefix}{name}": value for name, value in found.items()}
