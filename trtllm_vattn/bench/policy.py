"""`bench policy`: what does remapping beside running steps cost, and what does keeping it apart?

The same sequences decode in engines that map ahead beside the step, between steps, or with the whole device quiet, and
in one whose memory was all mapped before. They take turns.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from trtllm_vattn.bench.flags import add_attention, add_common, add_rounds, amount, as_config, dtype_of, positive
from trtllm_vattn.bench.machine import summarise
from trtllm_vattn.bench.report import Result, finish, table
from trtllm_vattn.bench.steady import Lane, fill, take_turns
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.memory.lookahead import BackgroundThread
from trtllm_vattn.memory.mapping_policy import MappingPolicy
from trtllm_vattn.memory.remap_probe import probe_remapping
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.vmm.open import open_driver

NONE = "no mapping"
CHURN = "concurrent, 10x churn"
TIMES = 10
"""How many times as many pages as decoding takes are mapped, and taken away again, beside each step."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench policy`."""
    gpu, add = add_common(parser), parser.add_argument
    add_attention(parser)
    text = "sequences in steady decode steps"
    add("--batch-size", type=positive, default=32 if gpu else 4, metavar="SEQUENCES", help=text, dest="batch")
    add("--context", type=positive, default=2048 if gpu else 64, metavar="TOKENS", help="tokens of each sequence")
    add_rounds(parser, 5, "policy")
    add("--steps", type=positive, default=64 if gpu else 16, metavar="STEPS", help="decode steps of a turn")
    text = "how long the soak that chooses a policy lasts"
    add("--soak-seconds", type=amount, default=3.0, metavar="SECONDS", help=text)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 where the soak read a wrong word."""
    verdict = probe_remapping(open_driver(args.device), args.soak_seconds, args.seed)
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
    finish(result, args)
    return int(verdict.wrong_words > 0)


def _timed(args: argparse.Namespace) -> list[dict[str, Any]]:
    model = load_model(args.model, args.device, dtype_of(args.device), args.seed)
    # The first sequence decodes while the others are prefilled.
    most = args.batch + (args.rounds + 1) * (args.steps + 8) + 64
    start = max(1, args.context - most // 2)
    # The last slot has no sequence; its memory comes and goes.
    shape = shape_of(model, args.batch + 1, start + most)
    budget = 2 * (args.batch + 1) * shape.max_seq_len * shape.token_bytes
    lanes = []
    with ExitStack() as closing:
        for name in (NONE, CHURN, *(policy.value for policy in MappingPolicy)):
            policy = MappingPolicy.CONCURRENT if name in (NONE, CHURN) else MappingPolicy(name)
            cache = KVCacheManager(shape, policy.wrap(open_driver(args.device)), budget)
            engine = Engine(
                model, cache, attention=args.attention, buckets=[args.batch], mapping=policy, chunk=max(2048, start)
            )
            closing.callback(engine.close)
            fill(engine, args.batch, start, most, args.seed)
            if name == NONE:
                cache.arena.grow(dict.fromkeys(range(args.batch), shape.max_seq_len))
            if name == CHURN:
                churn = Churn(cache, args.batch)
                closing.callback(churn.close)
            lanes.append(Lane(name, "captured", engine))
        before = [_maps(lane) for lane in lanes]
        take_turns(lanes, args.rounds, args.steps, "policies")
        rows = [_row(lane, _maps(lane) - maps, args) for lane, maps in zip(lanes, before, strict=True)]
        rows[1]["mappings"] += churn.mappings
        return rows


class Churn:
    """A thread that maps pages into a slot without a sequence and takes them away again, beside running steps.

    Attributes
    ----------
    mappings : int
        Made so far.
    """

    def __init__(self, cache: KVCacheManager, sequences: int) -> None:
        layout = cache.layout
        tokens_a_page = layout.granularity / layout.row_bytes
        # Each sequence takes a page in each range once in so many steps.
        self.pages = max(1, round(TIMES * sequences / tokens_a_page))
        self.mappings = 0
        self._cache, self._slot = cache, layout.num_slots - 1
        self._thread = BackgroundThread(self._work)
        map_ahead = cache.map_ahead

        def beside() -> int:
            """What the engine calls beside every step."""
            self._thread.raise_error()
            self._thread.wake()
            return map_ahead()

        cache.map_ahead = beside  # type: ignore[method-assign]

    def _work(self) -> bool:
        layout = self._cache.layout
        for page in range(1, self.pages + 1):
            with self._cache._lock.in_background():
                tokens = min(layout.max_seq_len, page * layout.granularity // layout.row_bytes)
                self.mappings += self._cache.arena.grow({self._slot: tokens}, wait=False)
        with self._cache._lock.in_background():
            self._cache.arena.unmap_parked(self._slot)
        return False

    def close(self) -> None:
        """Stop. Idempotent."""
        self._thread.close()


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
        "critical_path_maps": lane.critical_path_maps,
    }


def _show(rows: list[dict[str, Any]]) -> str:
    return table(
        ["mapping", "step p50 ms", "p90", "p99", "max", "mappings"],
        [
            [row["policy"], *(f"{row['step_ms'][p]:.3f}" for p in ("p50", "p90", "p99", "max")), str(row["mappings"])]
            for row in rows
        ],
    )
