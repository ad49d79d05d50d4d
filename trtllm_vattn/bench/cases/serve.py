"""`bench serve`: a trace replayed over every kind of cache at equal memory. Who serves more, and how fast?

Requests arrive as the trace says, at a rate, or all at once; the same engine, model, kernels and budget of KV bytes for
all. With ``--peer`` the same requests go through another serving engine in turns (serve_peer.py). Rates, burstiness and
metrics are defined and named as in vLLM's `bench serve`.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from trtllm_vattn.arguments import adder, tolerance
from trtllm_vattn.bench.cases import serve_peer
from trtllm_vattn.bench.harness import flags
from trtllm_vattn.bench.harness.case import Recording, engine_options, model_of, vocab_of
from trtllm_vattn.bench.harness.peer import add_peer
from trtllm_vattn.bench.harness.serving import Load, arrival_times, check_goodput, over_time, report, serve
from trtllm_vattn.bench.harness.traces import Request, counted, fit, generate_trace, load_trace
from trtllm_vattn.bench.harness.workload import prompts_of
from trtllm_vattn.bench.publish.plots import plot_serve
from trtllm_vattn.cache.select import CACHES, make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.table import tabulate

COLUMNS = (
    "cache round output_throughput total_token_throughput median_ttft_ms p99_ttft_ms median_tpot_ms "
    "median_itl_ms p99_itl_ms p99_e2el_ms request_goodput mean_sequences"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench serve`."""
    add = adder(parser, flags.add_common(parser))
    flags.add_attention(parser)
    text = f"of {', '.join(CACHES)}; beside a peer it is vattn alone"
    add("--caches", "CACHES", text, "contiguous,paged,paged-64,published,vattn", type=flags.caches)
    text = "Azure CSV, Mooncake JSON lines or list, or ShareGPT lengths CSV, also .gz; beside a peer there may be more"
    flags.add_trace(parser, action="append", help=f"{text} (default: generated requests)")
    text = f"{flags.REQUESTS}; beside a peer one number for all traces, or one for each"
    add("--requests", "REQUESTS,...", text, "128", "10")
    text = "take the part of the trace where so many arrive in the shortest time, for which all of it is read"
    parser.add_argument("--densest", action="store_true", help=text)
    text = "requests a second, or inf for all at once (default: as the trace says; beside a peer, inf)"
    add("--request-rate", "RATE", text, type=flags.rate)
    text = "shape of the gaps at a rate: 1 is a Poisson process, less comes in bursts, more is even"
    add("--burstiness", "SHAPE", text, 1.0)
    parser.add_argument("--at-once", action="store_true", help="the same as --request-rate inf")
    parser.add_argument(
        "--virtual-time", action="store_true", help="skip the time in which nothing runs, instead of sleeping"
    )
    text = f"objectives of {', '.join(flags.OBJECTIVES)} in ms, as ttft:500 tpot:50 (default: no goodput is reported)"
    parser.add_argument("--goodput", type=flags.objective, nargs="+", metavar="NAME:MILLISECONDS", help=text)
    add("--max-output", "TOKENS", flags.MAX_OUTPUT, 256, 12)
    add("--max-seq-len", "TOKENS", flags.MAX_SEQ_LEN, 8192, 256)
    add("--max-seqs", "SEQUENCES", flags.MAX_SEQS, 128, 6)
    add("--budget", "BYTES", flags.BUDGET, "16GiB", "4MiB")
    add("--chunk", "TOKENS", "the former name of --max-step-tokens (default: that one)")
    text = "tokens of one pass, prompts' and decoding sequences' together (default: the engine's own)"
    add("--max-step-tokens", "TOKENS", text)
    add("--target-itl-ms", "MILLISECONDS", "time between two tokens that passes are cut to (default: none)")
    add("--rounds", "TURNS", "turns that each cache takes", 2)
    add_peer(parser, "serve the same requests by it too, in turns")
    text = "then serve at this share of the rate that saturates the peer, once; 0 leaves it out"
    add("--peer-load", "SHARE", text, 0.8, type=tolerance)
    text = (
        "an earlier result that says what saturates the peer, so that nothing comes at once (default: it is measured)"
    )
    add("--peer-saturated", "FILE", text, type=Path)
    flags.add_plot(parser)


def settle(args: argparse.Namespace) -> list[tuple[Path | None, int]]:
    """Fill in and check what depends on other flags; returns traces, None for a generated one, and how many requests of
    each. Raises ConfigError."""
    if args.at_once and args.request_rate not in (None, math.inf):
        raise ConfigError(f"--at-once is --request-rate inf, and that is {args.request_rate}; give one of them")
    if args.at_once:
        args.request_rate = math.inf
    if args.peer is not None and args.virtual_time:
        raise ConfigError("--virtual-time skips time, which a peer cannot; leave out one of it and --peer")
    check_goodput(args.goodput)
    traces, counts = args.trace or [None], args.requests
    if args.peer is None and (len(traces) > 1 or len(counts) > 1):
        raise ConfigError(
            f"{len(traces)} traces and {len(counts)} numbers of requests; without --peer give one of each"
        )
    return counted(traces, counts)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    wanted = settle(args)
    if args.peer is not None:
        return serve_peer.run(args, [(path, requests_of(args, path, count)) for path, count in wanted])
    requests = requests_of(args, *wanted[0])
    arrivals = arrivals_of(args, requests)
    model = model_of(args)
    load = Load(
        prompts_of(requests, vocab_of(model), args.seed), [request.output_tokens for request in requests], arrivals
    )
    recording = Recording("serve", args)
    if args.device == "cpu":
        recording.say("without a GPU Python replays graphs, call by call: compare tokens and memory, not times")
    recording.results.update(runs=[], requests=len(requests), span_s=arrivals[-1] - arrivals[0])
    runs = recording.results["runs"]

    def rounds(recording: Recording) -> Iterator[dict[str, Any]]:
        for number in range(args.rounds):
            for name in args.caches:
                recording.say(f"round {number + 1} of {args.rounds}: {name}")
                recording.add("runs", {"cache": name, "round": number, **replay(model, args, name, load)})
            yield compared(runs)

    recording.measure({"rounds": rounds})
    return recording.conclude(tabulate(runs, COLUMNS), plot_serve if runs else None)


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


def requests_of(args: argparse.Namespace, path: Path | None, count: int) -> list[Request]:
    """`count` requests of a trace, or generated ones, cut to what a slot holds."""
    whole = load_trace(path, None if args.densest else count) if path else generate_trace(4 * count, args.seed)
    first = densest(whole, count) if args.densest else 0
    return fit(whole[first : first + count], args.max_seq_len, args.max_output)


def arrivals_of(args: argparse.Namespace, requests: list[Request]) -> list[float]:
    """When they arrive, in seconds from the start: as the trace says, or at the rate that is asked for."""
    if args.request_rate is None:
        return [request.arrival_s - requests[0].arrival_s for request in requests]
    return arrival_times(len(requests), args.request_rate, args.burstiness, args.seed)


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


def replay(model: PreTrainedModel, args: argparse.Namespace, name: str, load: Load) -> dict[str, Any]:
    """One run; throughput in requests and tokens a second, latencies in milliseconds."""
    one = shape_of(model, 1, args.max_seq_len)
    slots = slots_of(name, args, args.max_seq_len * one.token_bytes)
    if slots < 1:
        raise ConfigError(f"{args.budget:,} bytes hold no slot of {args.max_seq_len} tokens; raise --budget")
    budget = None if name == "contiguous" else args.budget
    cache = make_cache(name, shape_of(model, slots, args.max_seq_len), args.device, budget)
    with Engine(
        model, cache, prefix_cache=False, attention=args.attention, chunk=args.chunk, **engine_options(args)
    ) as engine:
        served = serve(engine, load, args.virtual_time, name)
        stats = engine.cache.stats()
    del engine, cache
    gc.collect()
    return {
        "seconds": served.seconds,
        **report(load, served, check_goodput(args.goodput)),
        "mean_sequences": float(np.mean(served.running)),
        "most_sequences": max(served.running),
        "slots": slots,
        "critical_path_maps": stats.critical_path_maps,
        "over_time": over_time(load, served),
    }
