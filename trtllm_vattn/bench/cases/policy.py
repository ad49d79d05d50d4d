"""`bench policy`: what does remapping memory beside running steps cost, and what does it cost to keep the two apart?

The same sequences decode in engines that map ahead beside the step, between steps, or with the whole device quiet, and
in one whose memory was all mapped before. They take turns.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from trtllm_vattn.arguments import adder
from trtllm_vattn.bench.harness.case import Recording, model_of
from trtllm_vattn.bench.harness.contenders import Contender, Contest, take_turns
from trtllm_vattn.bench.harness.flags import add_attention, add_common, add_steady
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.memory.lookahead import BackgroundThread
from trtllm_vattn.memory.mapping_policy import MappingPolicy
from trtllm_vattn.memory.remap_probe import probe_remapping
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.table import tabulate
from trtllm_vattn.vmm.open import open_driver

NONE = "no mapping"
CHURN = "concurrent, 10x churn"
TIMES = 10
"""How many times as many pages as decoding takes are mapped, and taken away again, beside each step."""

COLUMNS = "policy step_ms.p50 step_ms.p90 step_ms.p99 step_ms.max mappings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench policy`."""
    add = adder(parser, gpu := add_common(parser))
    add_attention(parser)
    add("--batch-size", "SEQUENCES", "sequences in steady decode steps", 32, 4, dest="batch")
    add_steady(parser, "policy", context=2048 if gpu else 64, rounds=5, steps=64 if gpu else 16)
    add("--soak-seconds", "SECONDS", "how long the soak that chooses a policy lasts", 3.0)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 where the soak read a wrong word."""
    recording = Recording("policy", args)

    def soak(recording: Recording) -> list[dict[str, Any]]:
        verdict = probe_remapping(open_driver(args.device), args.soak_seconds, args.seed)
        recording.results["soak"] = asdict(verdict)
        return [{f"soak_{name}": getattr(verdict, name) for name in ("remaps", "reads", "wrong_words")}]

    def steps(recording: Recording) -> list[dict[str, Any]]:
        rows = recording.results["runs"] = _timed(args)
        step = {row["policy"]: row["step_ms"] for row in rows}
        return [
            {
                f"{name}_over_none_p{p}": step[name][f"p{p}"] / step[NONE][f"p{p}"]
                for name in step
                for p in (50, 99)
                if name != NONE
            }
        ]

    recording.measure({"soak": soak, "steps": steps})
    wrong = [f"the soak read {words} wrong words"] if (words := recording.summary.get("soak_wrong_words")) else []
    return recording.conclude(tabulate(recording.results.get("runs", []), COLUMNS), wrong=wrong)


def _timed(args: argparse.Namespace) -> list[dict[str, Any]]:
    model = model_of(args)
    # The first sequence decodes while the others are prefilled.
    most = args.batch + (args.rounds + 1) * (args.steps + 8) + 64
    start = max(1, args.context - most // 2)
    # The last slot has no sequence; its memory comes and goes.
    shape = shape_of(model, args.batch + 1, start + most)
    budget = 2 * (args.batch + 1) * shape.max_seq_len * shape.token_bytes
    with Contest(args.batch, start, most, args.seed) as contest:
        for name in (NONE, CHURN, *(policy.value for policy in MappingPolicy)):
            policy = MappingPolicy.CONCURRENT if name in (NONE, CHURN) else MappingPolicy(name)
            ahead = shape.max_seq_len if name == NONE else None
            cache = KVCacheManager(shape, policy.wrap(open_driver(args.device)), budget, lookahead=ahead)
            options = {"attention": args.attention, "buckets": [args.batch], "chunk": max(2048, start)}
            engine = Engine(model, cache, prefix_cache=False, mapping=policy, **options)
            contest.add(name, engine)
            if name == NONE:
                cache.map_ahead()
                cache.wait_ahead(120)
            if name == CHURN:
                churn = Churn(cache, args.batch)
                contest.callback(churn.close)
        before = [_maps(each) for each in contest.contenders]
        take_turns(contest.contenders, args.rounds, args.steps, "policies")
        rows = [
            {
                "policy": each.name,
                "batch": args.batch,
                "context": args.context,
                "mappings": _maps(each) - maps,
                **each.times(),
            }
            for each, maps in zip(contest.contenders, before, strict=True)
        ]
        rows[1]["mappings"] += churn.mappings
        return rows


class Churn:
    """A thread that maps pages into the last slot, which has no sequence, and unmaps them again, beside running steps
    and under the same lock as the cache's own background thread.

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
        self._tokens = [
            min(layout.max_seq_len, page * layout.granularity // layout.row_bytes) for page in range(1, self.pages + 1)
        ]
        self._thread = BackgroundThread(self._work)
        map_ahead = cache.map_ahead

        def beside() -> int:
            """What the engine calls beside every step."""
            self._thread.raise_error()
            self._thread.wake()
            return map_ahead()

        cache.map_ahead = beside  # type: ignore[method-assign]

    def _work(self) -> bool:
        self.mappings += self._cache.remap_free_slot(self._slot, self._tokens)
        return False

    def close(self) -> None:
        """Stop. Idempotent."""
        self._thread.close()


def _maps(contender: Contender) -> int:
    stats = contender.engine.cache.stats()
    return stats.ahead_maps + stats.critical_path_maps
