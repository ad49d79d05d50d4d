"""`bench policy`: what does remapping beside running steps cost, and what does keeping it apart?

The same sequences decode in engines that map ahead beside the step, between steps, or with the whole device quiet, and
in one whose memory was all mapped before. They take turns.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from trtllm_vattn.bench.flags import add_common, as_config, dtype_of
from trtllm_vattn.bench.machine import summarise
from trtllm_vattn.bench.report import Result, table, write
from trtllm_vattn.bench.steady import Lane, fill, take_turns
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.graphs.policy import MappingPolicy
from trtllm_vattn.graphs.remap_soak import soak
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.vmm.open import open_driver

NONE = "no mapping"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench policy`."""
    gpu, add = add_common(parser), parser.add_argument
    add("--attention", default="auto", help="auto, torch, cudnn or xqa")
    add("--batch", type=int, default=32 if gpu else 4, help="sequences")
    add("--context", type=int, default=2048 if gpu else 64, help="tokens a sequence")
    add("--rounds", type=int, default=5, help="turns of each engine")
    add("--steps", type=int, default=64 if gpu else 16, help="decode steps a turn")
    add("--soak-seconds", type=float, default=3.0, help="of the soak that chooses a policy")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 where the soak read a wrong word."""
    verdict = soak(open_driver(args.device), args.soak_seconds, args.seed)
    rows = _timed(args)
    result = Result.start("policy", as_config(args), args.seed)
    result.results.update(runs=rows, soak=asdict(verdict))
    step = {row["policy"]: row["step_ms"] for row in rows}
    result.summary.update(
        {
            f"{name}_over_none_p{p}": step[name][f"p{p}"] / step[NONE][f"p{p}"]
            for name in step
            for p in (50, 99)
            if name != NONE
        },
        soak_remaps=verdict.remaps,
        soak_reads=verdict.reads,
        soak_wrong_words=verdict.wrong_words,
    )
    print(_show(rows))
    for name, value in result.summary.items():
        print(f"{name}: {value}")
    if args.output_json:
        write(result, args.output_json)
    return int(verdict.wrong_words > 0)


def _timed(args: argparse.Namespace) -> list[dict[str, Any]]:
    model = load_model(args.model, args.device, dtype_of(args.device), args.seed)
    # The first sequence decodes while the others are prefilled.
    most = args.batch + (args.rounds + 1) * (args.steps + 8) + 64
    start = max(1, args.context - most // 2)
    shape = shape_of(model, args.batch, start + most)
    budget = 2 * (args.batch + 1) * shape.max_seq_len * shape.token_bytes
    lanes = []
    with ExitStack() as closing:
        for name in (NONE, *(policy.value for policy in MappingPolicy)):
            policy = MappingPolicy.CONCURRENT if name == NONE else MappingPolicy(name)
            cache = KVCacheManager(shape, policy.wrap(open_driver(args.device)), budget)
            engine = Engine(
                model, cache, attention=args.attention, buckets=[args.batch], mapping=policy, chunk=max(2048, start)
            )
            closing.callback(engine.close)
            fill(engine, args.batch, start, most, args.seed)
            if name == NONE:
                cache.arena.grow(dict.fromkeys(range(args.batch), shape.max_seq_len))
            lanes.append(Lane(name, "captured", engine))
        before = [_maps(lane) for lane in lanes]
        take_turns(lanes, args.rounds, args.steps, "policies")
        return [_row(lane, _maps(lane) - maps, args) for lane, maps in zip(lanes, before, strict=True)]


def _maps(lane: Lane) -> int:
    stats = lane.engine.cache.stats()
    return stats.ahead_maps + stats.critical_path_maps


def _row(lane: Lane, maps: int, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "policy": lane.cache,
        "batch": args.batch,
        "context": args.context,
        "step_ms": summarise([1e3 * value for value in lane.samples("wall_s")]),
        "map_ahead_us": summarise([1e6 * value for value in lane.samples("ahead_s")]),
        "mappings": maps,
        "critical_path_maps": lane.engine.cache.stats().critical_path_maps,
    }


def _show(rows: list[dict[str, Any]]) -> str:
    return table(
        ["mapping", "step p50 ms", "p90", "p99", "max", "mappings"],
        [
            [row["policy"], *(f"{row['step_ms'][p]:.3f}" for p in ("p50", "p90", "p99", "max")), str(row["mappings"])]
            for row in rows
        ],
    )
