"""`bench serve`: a trace replayed over every kind of cache at equal memory. Who serves more, and how fast?

Requests arrive as the trace says, or all at once; the same engine, model, kernels and budget of KV bytes for all.
Metrics are named as vLLM's serving benchmark names them.
"""

from __future__ import annotations

import argparse
import gc
from collections import defaultdict
from time import perf_counter, sleep
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel

from trtllm_vattn.arguments import positive, size
from trtllm_vattn.bench.harness.case import conclude, model_of, vocab_of
from trtllm_vattn.bench.harness.flags import (
    BUDGET,
    MAX_OUTPUT,
    MAX_SEQ_LEN,
    MAX_SEQS,
    REQUESTS,
    add_attention,
    add_common,
    add_rounds,
    add_trace,
    caches,
)
from trtllm_vattn.bench.harness.timing import summarise
from trtllm_vattn.bench.harness.traces import Request, fit, generate_trace, load_trace
from trtllm_vattn.bench.harness.workload import prompts_of
from trtllm_vattn.cache.select import CACHES, make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.table import tabulate

COLUMNS = {
    "cache": "cache",
    "round": "round",
    "output tok/s": "output_throughput:,.1f",
    "total tok/s": "total_token_throughput:,.0f",
    "TTFT p50 ms": "ttft_ms.p50:,.1f",
    "TTFT p99": "ttft_ms.p99:,.1f",
    "ITL p50 ms": "itl_ms.p50:,.1f",
    "ITL p99": "itl_ms.p99:,.1f",
    "sequences": "mean_sequences:.1f",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench serve`."""
    gpu, add = add_common(parser), parser.add_argument
    add_attention(parser)
    text = f"of {', '.join(CACHES)}"
    add("--caches", type=caches, default="contiguous,paged,paged-64,published,vattn", metavar="CACHES", help=text)
    add_trace(parser)
    add("--requests", type=positive, default=128 if gpu else 10, metavar="REQUESTS", help=REQUESTS)
    text = "take the part of the trace where so many arrive in the shortest time, for which all of it is read"
    add("--densest", action="store_true", help=text)
    add("--at-once", action="store_true", help="all arrive at once, instead of as the trace says")
    add("--max-output", type=positive, default=256 if gpu else 12, metavar="TOKENS", help=MAX_OUTPUT)
    add("--max-seq-len", type=positive, default=8192 if gpu else 256, metavar="TOKENS", help=MAX_SEQ_LEN)
    add("--max-seqs", type=positive, default=128 if gpu else 6, metavar="SEQUENCES", help=MAX_SEQS)
    add("--budget", type=size, default="16GiB" if gpu else "4MiB", metavar="BYTES", help=BUDGET)
    add("--chunk", type=positive, default=2048, metavar="TOKENS", help="prompt tokens that go in at once")
    add_rounds(parser, 2, "cache")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    requests = _requests(args)
    model = model_of(args)
    runs = [
        {"cache": name, "round": number, **replay(model, args, name, requests)}
        for number in range(args.rounds)
        for name in args.caches
    ]
    span_s = requests[-1].arrival_s - requests[0].arrival_s
    results = {"runs": runs, "requests": len(requests), "span_s": span_s}
    return conclude("serve", args, results, compared(runs), tabulate(runs, COLUMNS))


def compared(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Each cache's throughput, and ours over the others' in the same round: the mean, and ``[least, most]`` of the
    rounds."""
    rates: dict[str, list[float]] = defaultdict(list)
    for row in sorted(runs, key=lambda row: row["round"]):
        rates[row["cache"]].append(row["output_throughput"])
    found = {f"{name}_output_throughput": each for name, each in rates.items()}
    for name, each in rates.items():
        if name != "vattn" and "vattn" in rates:
            found[f"vattn_over_{name}"] = [ours / other for ours, other in zip(rates["vattn"], each, strict=True)]
    out: dict[str, Any] = {}
    for name, each in found.items():
        out[name], out[f"{name}_spread"] = float(np.mean(each)), [min(each), max(each)]
    return out


def _requests(args: argparse.Namespace) -> list[Request]:
    if args.trace:
        whole = load_trace(args.trace, None if args.densest else args.requests)
    else:
        whole = generate_trace(4 * args.requests, args.seed)
    first = densest(whole, args.requests) if args.densest else 0
    return fit(whole[first : first + args.requests], args.max_seq_len, args.max_output)


def densest(requests: list[Request], count: int) -> int:
    """Where the shortest stretch of `count` arrivals begins; requests are in order of arrival.

    Raises ConfigError where there are fewer.
    """
    if len(requests) < count:
        raise ConfigError(f"the trace has {len(requests)} requests, {count} asked for")
    times = np.array([request.arrival_s for request in requests])
    return int((times[count - 1 :] - times[: len(times) - count + 1]).argmin())


def slots_of(name: str, args: argparse.Namespace, slot_bytes: int) -> int:
    """Sequences that may run at once: with maximum reservation, as many as the memory has slots for."""
    most: int = args.max_seqs
    return min(most, args.budget // slot_bytes) if name == "contiguous" else most


def replay(model: PreTrainedModel, args: argparse.Namespace, name: str, requests: list[Request]) -> dict[str, Any]:
    """One run; throughput in requests and tokens a second, latencies in milliseconds."""
    one = shape_of(model, 1, args.max_seq_len)
    slots = slots_of(name, args, args.max_seq_len * one.token_bytes)
    if slots < 1:
        raise ConfigError(f"{args.budget:,} bytes hold no slot of {args.max_seq_len} tokens; raise --budget")
    shape = shape_of(model, slots, args.max_seq_len)
    budget = None if name == "contiguous" else args.budget
    prompts = prompts_of(requests, vocab_of(model), args.seed)
    begin = requests[0].arrival_s
    arrivals = [0.0 if args.at_once else request.arrival_s - begin for request in requests]
    came: dict[int, float] = {}
    times: dict[int, list[float]] = defaultdict(list)
    running = []
    cache = make_cache(name, shape, args.device, budget)
    with Engine(model, cache, attention=args.attention, chunk=args.chunk) as engine:
        started = perf_counter()
        submitted = 0
        with tqdm(total=len(requests), desc=name, unit="request", disable=None) as bar:
            while submitted < len(requests) or engine.busy:
                now = perf_counter() - started
                while submitted < len(requests) and arrivals[submitted] <= now:
                    wanted = SamplingParams(max_tokens=requests[submitted].output_tokens, ignore_eos=True)
                    came[engine.submit(prompts[submitted], wanted)] = started + arrivals[submitted]
                    submitted += 1
                if not engine.busy:
                    sleep(max(0.0, arrivals[submitted] - now))
                    continue
                events = engine.step()
                now = perf_counter()
                for event in events:
                    times[event.request].append(now)
                    bar.update(event.finish_reason is not None)
                running.append(len(engine.scheduler.decoding))
        seconds = perf_counter() - started
        stats = engine.cache.stats()
    del engine, cache
    gc.collect()
    tokens = sum(map(len, times.values()))
    first = {number: 1e3 * (seen[0] - came[number]) for number, seen in times.items()}
    gaps = [1e3 * gap for seen in times.values() for gap in np.diff(seen)]
    each = [1e3 * (seen[-1] - seen[0]) / (len(seen) - 1) for seen in times.values() if len(seen) > 1]
    return {
        "seconds": seconds,
        "request_throughput": len(requests) / seconds,
        "output_throughput": tokens / seconds,
        "total_token_throughput": (tokens + sum(map(len, prompts))) / seconds,
        "ttft_ms": summarise(list(first.values())),
        "itl_ms": summarise(gaps),
        "tpot_ms": summarise(each),
        "mean_sequences": float(np.mean(running)),
        "most_sequences": max(running),
        "slots": slots,
        "critical_path_maps": stats.critical_path_maps,
    }
