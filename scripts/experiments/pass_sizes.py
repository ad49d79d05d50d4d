"""How many tokens should a pass hold at most? The same requests, served by engines that differ in that alone.

An experiment: ``python scripts/experiments/pass_sizes.py --help``. A load is a trace, how many of its requests, and a
rate; arrivals, token ids and lengths are those of ``bench serve`` with the same seed. Beside what that reports are the
passes themselves: how long full ones take, how much of the time nothing waited for the device, and the longest ones.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from trtllm_vattn.arguments import adder, positive
from trtllm_vattn.bench.harness.case import Part, Recording, vocab_of
from trtllm_vattn.bench.harness.flags import (
    BUDGET,
    MAX_OUTPUT,
    MAX_SEQ_LEN,
    MAX_SEQS,
    add_attention,
    add_common,
    rate,
)
from trtllm_vattn.bench.harness.serving import Load, arrival_times, report, serve
from trtllm_vattn.bench.harness.timing import summarise
from trtllm_vattn.bench.harness.traces import Request, fit, generate_trace, load_trace
from trtllm_vattn.bench.harness.workload import prompts_of
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.cli.parser import run_script
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.request import StepRecord
from trtllm_vattn.table import tabulate

WARM_UP = (17, 300, 2048, 7000)
"""Tokens of prompts that are served before anything is timed."""
FULL = 0.9
"""Of the most tokens a pass: passes of more than that count as full."""
LONGEST = 8
"""Steps that are named with what they held."""
COLUMNS = (
    "max_step_tokens load total_token_throughput median_ttft_ms p99_ttft_ms median_itl_ms p99_itl_ms p99_e2el_ms "
    "full.passes full.wall_ms.p50 full.tokens_per_s host_s"
)


def load_of(text: str) -> tuple[Path | None, int, float]:
    """A load as ``TRACE:REQUESTS:RATE`` says it; ``generated`` is a trace too."""
    trace, _, rest = text.partition(":")
    count, _, wanted = rest.partition(":")
    if not wanted:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no TRACE:REQUESTS:RATE, as azure.csv:256:12.9 or azure.csv:64:inf"
        )
    return None if trace == "generated" else Path(trace), positive(count), rate(wanted)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the experiment."""
    add = adder(parser, add_common(parser))
    add_attention(parser)
    add("--sizes", "TOKENS,...", "most tokens of a pass, one engine each", "2048,4096,8192", "32,64")
    text = "a trace (or `generated`), how many of its requests, and how many of them come a second, or inf"
    loads = [*map(load_of, ["generated:8:inf", "generated:4:50"])]
    parser.add_argument("--loads", type=load_of, nargs="+", default=loads, metavar="TRACE:REQUESTS:RATE", help=text)
    add("--max-output", "TOKENS", MAX_OUTPUT, 4096, 12)
    add("--max-seq-len", "TOKENS", MAX_SEQ_LEN, 8192, 256)
    add("--max-seqs", "SEQUENCES", MAX_SEQS, 256, 6)
    add("--budget", "BYTES", BUDGET, "96GiB", "4MiB")


def run(args: argparse.Namespace) -> int:
    """Run the experiment."""
    recording = Recording("pass_sizes", args, "python scripts/experiments/pass_sizes.py")
    loads = [
        (name_of(trace, count, wanted), requests_of(args, trace, count), wanted) for trace, count, wanted in args.loads
    ]

    def of(tokens: int) -> Part:
        def measure(recording: Recording) -> None:
            with engine_of(recording.model, args, tokens) as engine:
                startup = engine.startup
                sizes = {"capture_s": startup.capture_s, "capture_bytes": startup.capture_bytes}
                rows_ms = {rows: 1e3 * seconds for rows, seconds in engine.passes.replay_s.items()}
                recording.add("starts", {"max_step_tokens": tokens, **sizes, "idle_pass_ms": rows_ms})
                vocab = vocab_of(recording.model)
                serve(
                    engine, load_like([Request(0.0, warm_up(args, n), 8) for n in WARM_UP * 2], float("inf"), vocab, 1)
                )
                for number, (name, requests, wanted) in enumerate(loads):
                    recording.say(f"{tokens} tokens a pass: {name}")
                    load = load_like(requests, wanted, vocab, args.seed, number + 2)
                    recording.add("runs", {"max_step_tokens": tokens, "load": name, **served(engine, load, tokens)})
            gc.collect()

        return measure

    recording.measure({str(tokens): of(tokens) for tokens in args.sizes})
    runs = recording.results.get("runs", [])
    recording.sum_up(**summary(runs))
    return recording.conclude(tabulate(runs, COLUMNS))


def name_of(trace: Path | None, count: int, wanted: float) -> str:
    """What a load is called: the beginning of its trace's name, its requests, and its rate."""
    name = "generated" if trace is None else "azure" if "azure" in trace.name.lower() else trace.name[:8]
    return f"{name}, {count}, {'at once' if wanted == float('inf') else f'{wanted:g} a second'}"


def requests_of(args: argparse.Namespace, trace: Path | None, count: int) -> list[Request]:
    """The first requests of a trace, cut to what a slot holds; raises ConfigError where there are fewer."""
    found = load_trace(trace, count) if trace else generate_trace(count, args.seed)
    if len(found) < count:
        raise ConfigError(f"{trace} has {len(found)} requests, {count} asked for; ask for fewer")
    return fit(found[:count], args.max_seq_len, args.max_output)


def warm_up(args: argparse.Namespace, tokens: int) -> int:
    """Tokens of a prompt that fits a slot."""
    return min(tokens, int(args.max_seq_len) - 8)


def load_like(requests: Sequence[Request], wanted: float, vocab: int, seed: int, turn: int = 1) -> Load:
    """Requests that arrive at a rate, with tokens that no other turn has."""
    arrivals = arrival_times(len(requests), wanted, 1.0, seed)
    return Load(prompts_of(requests, vocab, seed + turn), [request.output_tokens for request in requests], arrivals)


def engine_of(model: PreTrainedModel, args: argparse.Namespace, tokens: int) -> Engine:
    """An engine whose passes hold so many tokens at most."""
    cache = make_cache("vattn", shape_of(model, args.max_seqs, args.max_seq_len), args.device, args.budget)
    return Engine(model, cache, prefix_cache=False, attention=args.attention, max_step_tokens=tokens)


def served(engine: Engine, load: Load, tokens: int) -> dict[str, Any]:
    """What `bench serve` reports of a load, and what its steps were."""
    records: list[tuple[float, StepRecord]] = []
    began = perf_counter()
    engine.observer = lambda record: records.append((perf_counter() - began, record))
    try:
        whole = serve(engine, load)
    finally:
        engine.observer = None
    full = [record for _, record in records if record.prefilled + record.lanes >= FULL * tokens and record.prefilled]
    partial = [record for _, record in records if record.prefilled and record not in full]
    seconds = sum(record.wall_s for record in full)
    longest = sorted(records, key=lambda each: -each[1].wall_s)[:LONGEST]
    return {
        **report(load, whole),
        "first_token_s": min(times[0] for times in whole.times if times),
        "full": {
            "passes": len(full),
            "wall_ms": summarise([1e3 * record.wall_s for record in full]),
            "tokens_per_s": sum(record.prefilled + record.lanes for record in full) / seconds if seconds else 0.0,
        },
        "partial_passes": len(partial),
        "partial_ms": summarise([1e3 * record.wall_s for record in partial]),
        "decode_steps": sum(1 for _, record in records if not record.prefilled),
        "decode_ms": summarise([1e3 * record.wall_s for _, record in records if not record.prefilled]),
        "host_s": sum(record.wall_s - record.wait_s for _, record in records),
        "kv_s": sum(record.kv_s for _, record in records),
        "not_waited": int(sum(record.wait_s < 1e-4 for _, record in records)),
        "longest": [
            {
                "at_s": at,
                "wall_ms": 1e3 * record.wall_s,
                "wait_ms": 1e3 * record.wait_s,
                "kv_ms": 1e3 * record.kv_s,
                "prompt_tokens": record.prefilled,
                "lanes": record.lanes,
            }
            for at, record in longest
        ],
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Each size over the first one, by load: throughput, and TTFT p99."""
    out: dict[str, float] = {}
    first = rows[0]["max_step_tokens"] if rows else 0
    for name in dict.fromkeys(row["load"] for row in rows):
        of = {row["max_step_tokens"]: row for row in rows if row["load"] == name}
        short = name.replace(", ", "_").replace(" ", "_")
        for tokens, row in of.items():
            if tokens != first and first in of:
                for figure in ("total_token_throughput", "p99_ttft_ms"):
                    out[f"{figure}_{tokens}_over_{first}_{short}"] = float(np.divide(row[figure], of[first][figure]))
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; 2 for what the user can mend, with one line that says what."""
    return run_script("pass_sizes.py", str(__doc__), add_arguments, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
