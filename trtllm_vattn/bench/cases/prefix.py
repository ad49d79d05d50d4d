"""`bench prefix`: how much of what prompts share is found again, beside an ideal tree of the same memory?

Requests with token ids go through `PrefixCache` over counted pages, and through the least recently used tree of blocks
that stores each block once. So many run at once; each ends when its place is needed, first come, first served. Ways to
a hit are tried with and without each other; what a hit costs is worked out from measured costs, and the crossover
between the ways is drawn. That needs no device. An engine takes an agent's turns and a part of the trace, beside one
without reuse and one over block tables that share blocks (reuse.py).
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from trtllm_vattn.arguments import adder
from trtllm_vattn.bench.cases import reuse
from trtllm_vattn.bench.harness import flags
from trtllm_vattn.bench.harness.case import Part, Recording
from trtllm_vattn.bench.harness.ideal_tree import IdealTree
from trtllm_vattn.bench.harness.retained_pages import RetainedPages
from trtllm_vattn.bench.harness.traces import TokenRequest, agent_turns, from_trace, load_trace
from trtllm_vattn.bench.publish.plots import plot_prefix
from trtllm_vattn.cache.prefix import PrefixCache, ReuseCosts, Way
from trtllm_vattn.cache.prefix.hybrid import crossover
from trtllm_vattn.errors import ConfigError, KVCacheOutOfMemory
from trtllm_vattn.progress import counting
from trtllm_vattn.table import tabulate

TOKEN_BYTES = 131_072
RANGES = 2
GRANULARITY = 2 << 20
"""Llama-3-8B in bfloat16: 16 layers a range, 32 tokens in a page of each range."""
PAGE_TOKENS = RANGES * GRANULARITY // TOKEN_BYTES

VARIANTS: dict[str, tuple[Way, ...]] = {
    "hybrid": (Way.ADOPT, Way.ALIAS, Way.COPY, Way.TABLE),
    "no table": (Way.ADOPT, Way.ALIAS, Way.COPY),
    "copy": (Way.ADOPT, Way.COPY),
    "adopt": (Way.ADOPT,),
}
CROSSOVER_TOKENS = tuple(16 << power for power in range(14))
CROSSOVER_EXTENTS = (2 << 20, 32 << 20, 256 << 20)
EXPECTED_TOKENS = 256
"""Output tokens that a table is expected to be read for, in the crossover."""

COLUMNS = (
    "workload variant max_segments largest_extent ascending budget hit_rate "
    "hits_over_simulated ways handles_made handles_aliased host_us"
)


ENGINE_COLUMNS = "workload engine round seconds throughput median_ttft_ms hit_rate"
WAYS_COLUMNS = "tokens way first_ms step_ms total_ms chosen"
MOST_TURNS = 1500
"""Of agents: each looks at all that is kept."""
SAME = {"rounds": 1, "attention": "auto"}
ENGINE: dict[str, dict[str, Any]] = {
    "gpu": {"budget": 30 << 30, "max_seqs": 16, "kept_seqs": 128, "max_seq_len": 20480, "steps": 200, **SAME},
    "host": {"budget": 2 << 20, "max_seqs": 4, "kept_seqs": 24, "max_seq_len": 512, "steps": 20, **SAME},
}
"""Of the engines (reuse.py), which lie side by side on a card of 80 GB or more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench prefix`."""
    gpu = flags.add_device(parser)
    add = adder(parser, gpu)
    flags.add_parts(parser, PARTS, "engine,hits" if gpu else "hits,variants")
    flags.add_model(parser, default="llama-3.1-8b" if gpu else "tiny-llama")
    add("--engine-requests", "REQUESTS", f"{flags.REQUESTS}, and of an agent's turns, for the engines", 96, 24)
    text = "requests with block hashes: Mooncake's JSON lines or list, also .gz (default: generated ones alone)"
    flags.add_trace(parser, help=text)
    add("--requests", "REQUESTS", flags.REQUESTS, 3000)
    add("--divide-by", "TIMES", "lengths and blocks of the trace are so many times shorter", 8)
    add("--budget", "BYTES", flags.BUDGET, "100GiB")
    add("--max-seqs", "SEQUENCES", "sequences that run at once", 32)
    add("--segments", "N,...", "slots that attention can read one sequence in, each tried", "4,2")
    add("--largest-extent", "BYTES,...", "largest extents, each tried", "16MiB,256MiB", dest="extents")
    flags.add_results(parser, plots=True)


@dataclass(frozen=True)
class Setting:
    """What `PrefixCache` may do, in how much memory."""

    variant: str
    max_segments: int
    largest_extent: int
    ascending: bool
    budget: int
    max_seqs: int


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    recording = Recording("prefix", args)
    # Flags are looked at before anything takes long.
    settings(args)
    recording.results.update(
        runs=[],
        crossover=[
            {
                "extent_bytes": extent,
                "points": crossover(
                    CROSSOVER_TOKENS, TOKEN_BYTES, extent, ReuseCosts(), EXPECTED_TOKENS, RANGES, GRANULARITY
                ),
            }
            for extent in CROSSOVER_EXTENTS
        ],
    )
    recording.measure(PARTS, args.parts)
    runs, ways = recording.results["runs"], recording.results.get("ways")
    tables = {COLUMNS: runs, ENGINE_COLUMNS: recording.results.get("engines"), WAYS_COLUMNS: ways}
    shown = "\n".join(tabulate(rows, columns) for columns, rows in tables.items() if rows)
    return recording.conclude(shown, plot_prefix if runs else reuse.plot_ways if ways else None)


def workloads(args: argparse.Namespace) -> dict[str, list[TokenRequest]]:
    """Requests by name: the trace's, if there is one, and agents'."""
    found = {"agents": agent_turns(min(args.requests, MOST_TURNS), args.seed, at_once=args.max_seqs)}
    if args.trace is not None:
        found = {"trace": from_trace(load_trace(args.trace, args.requests), args.divide_by), **found}
    return found


def measure_settings(recording: Recording, which: slice) -> None:
    """Hits of some settings, beside the ideal tree's; the first is the one that is quoted."""
    args = recording.args
    tried = settings(args)[which]
    for name, requests in workloads(args).items():
        recording.say(f"{name}: the ideal tree, {len(requests)} requests")
        ideal = ideal_hits(requests, args.budget // TOKEN_BYTES, args.max_seqs)
        for each in tried:
            recording.say(f"{name}: {each.variant}, {each.max_segments} slots, {each.largest_extent:,} bytes")
            recording.add("runs", row(name, requests, each, ideal))
            recording.sum_up(**hits_of(recording.results["runs"]))


def hits_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Hits of each workload's first row; the worst is quoted without a name."""
    first = {each["workload"]: each for each in reversed(rows)}
    found = {"hits_over_simulated": min(each["hits_over_simulated"] for each in first.values())}
    for name, each in first.items():
        found |= {f"hits_over_simulated_{name}": each["hits_over_simulated"], f"hit_rate_{name}": each["hit_rate"]}
    return found


def measure_engines(recording: Recording) -> None:
    """What an engine makes of an agent's turns, and of the trace: throughput beside none of it and beside block tables,
    steady steps, the time to a hit's first token, and what each way to a hit takes by its length."""
    args, model = recording.args, recording.model
    given = _engine_flags(args)
    loads = {"engine": reuse.agents_of(given, args.engine_requests)}
    if args.trace is not None:
        loads["engine_trace"] = from_trace(load_trace(args.trace, args.engine_requests), args.divide_by)
    with reuse.contenders(model, given, reuse.CONTENDERS, recording) as engines:
        recording.say("steady steps, and hits alone")
        recording.sum_up(**reuse.steady_state(engines["reuse"], given))
        reuse.compare(engines, loads, given, recording)
        reuse.ways_by_length(engines["reuse"], given, recording)


def measure_unlike(recording: Recording) -> None:
    """Requests that share nothing, by all engines: reuse costs something there and gives nothing."""
    given = _engine_flags(recording.args)
    loads = {"unlike": reuse.unlike(reuse.agents_of(given, recording.args.engine_requests), given.seed)}
    with reuse.contenders(recording.model, given, reuse.CONTENDERS, recording) as engines:
        reuse.compare(engines, loads, given, recording)


def measure_hits_alone(recording: Recording) -> None:
    """Of `measure_engines`, what needs one engine and no workload: half a minute of a card."""
    given = _engine_flags(recording.args)
    with reuse.contenders(recording.model, given, reuse.CONTENDERS[:1], recording) as engines:
        recording.sum_up(**reuse.steady_state(engines["reuse"], given))
        reuse.ways_by_length(engines["reuse"], given, recording)


def _engine_flags(args: argparse.Namespace) -> argparse.Namespace:
    given = argparse.Namespace(**ENGINE["host" if args.device == "cpu" else "gpu"])
    given.device, given.seed = args.device, args.seed
    return given


def settings(args: argparse.Namespace) -> list[Setting]:
    """The first is the one that the summary quotes."""
    largest = args.extents[0]
    if any(each < GRANULARITY for each in args.extents):
        raise ConfigError(f"--largest-extent is {min(args.extents):,} bytes; an extent has at least {GRANULARITY:,}")
    found = [("hybrid", segments, largest, order) for segments in args.segments for order in (True, False)]
    found += [("hybrid", args.segments[0], extent, False) for extent in args.extents[1:]]
    found += [("no table", 1, largest, True)]
    found += [("no table", 1, extent, False) for extent in args.extents]
    found += [("copy", 1, largest, True), ("adopt", 1, largest, True)]
    return [Setting(*each, args.budget, args.max_seqs) for each in found]


def ideal_hits(requests: Sequence[TokenRequest], tokens: int, max_seqs: int) -> int:
    """Prompt tokens that the ideal tree finds again."""
    tree, running = IdealTree(tokens), deque[list[int]]()
    hits = 0
    for request in counting(requests, "ideal tree", "request"):
        while len(running) >= max_seqs:
            tree.finish(running.popleft())
        found, blocks = tree.admit(request.prompt, request.output)
        hits += found
        running.append(blocks)
    return hits


def row(name: str, requests: Sequence[TokenRequest], setting: Setting, ideal: int) -> dict[str, Any]:
    """What one setting finds again, and how."""
    largest = setting.largest_extent // GRANULARITY
    pages = RetainedPages(setting.budget, TOKEN_BYTES, RANGES, PAGE_TOKENS, largest, setting.ascending)
    cache = PrefixCache(pages, ways=VARIANTS[setting.variant], max_segments=setting.max_segments)
    started = perf_counter()
    replay(cache, pages, requests, setting.max_seqs, f"{name}, {setting.variant}")
    found = cache.as_dict()
    return {
        "workload": name,
        **vars(setting),
        **found,
        "ideal_tokens": ideal,
        "hits_over_simulated": found["cached_tokens"] / ideal if ideal else None,
        "handles_made": pages.handles_made,
        "handles_aliased": pages.handles_aliased,
        "host_us": 1e6 * (perf_counter() - started) / len(requests),
    }


def replay(
    cache: PrefixCache, pages: RetainedPages, requests: Sequence[TokenRequest], max_seqs: int, label: str
) -> None:
    """Admit each request, with so many running at once; the longest-running one ends where another comes, or where
    memory is too short for another. Raises KVCacheOutOfMemory where one alone does not fit."""
    running = deque[int]()

    def finish(index: int) -> None:
        request = requests[index]
        cache.finish(index, np.concatenate([request.prompt, request.output]))

    def extend(index: int, tokens: int) -> None:
        cache.make_room(pages.page_bytes * (1 + tokens // pages.page_tokens))
        pages.extend(index, tokens)

    def wait_for_memory(call: Callable[[], object]) -> None:
        while True:
            try:
                call()
                return
            except KVCacheOutOfMemory:
                if not running:
                    raise
                finish(running.popleft())

    for index, request in enumerate(counting(requests, label, "request")):
        while len(running) >= max_seqs:
            finish(running.popleft())
        output = len(request.output)
        admit = partial(cache.lookup_and_admit, index, request.prompt, expected_tokens=output, reserve_tokens=output)
        wait_for_memory(admit)
        cache.computed(index, request.prompt)
        wait_for_memory(partial(extend, index, output))
        running.append(index)
    while running:
        finish(running.popleft())


PARTS: dict[str, Part] = {
    "engine": measure_engines,
    "hits": partial(measure_settings, which=slice(1)),
    "variants": partial(measure_settings, which=slice(1, None)),
    "alone": measure_hits_alone,
    "unlike": measure_unlike,
}
"""What engines make of reuse; hits of one setting beside an ideal tree; hits of all other settings; of the first what
one engine alone tells; and what reuse costs where there is none."""
