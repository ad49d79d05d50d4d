"""`bench fragmentation`: how much of what a cache maps holds no token, and how many sequences run in the same memory?

Requests of a trace are admitted first come, first served; every sequence decodes a token a step, and the youngest is
preempted when memory is short. The fixed-address caches run their own code over a driver without memory; of the others
only the blocks are counted. It runs on any machine.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from trtllm_vattn.arguments import adder
from trtllm_vattn.bench.cases.ledger import LedgerCache, LedgerDriver
from trtllm_vattn.bench.harness import flags
from trtllm_vattn.bench.harness.case import Part, Recording
from trtllm_vattn.bench.harness.traces import Request, fit, generate_trace, load_trace
from trtllm_vattn.bench.publish.plots import plot_fragmentation
from trtllm_vattn.cache.base import CacheShape, KVCache
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.vattention_paper import PAPER
from trtllm_vattn.errors import ConfigError, KVCacheOutOfMemory, NoFreeSlot
from trtllm_vattn.memory.lookahead import StepTimingModel
from trtllm_vattn.progress import counting
from trtllm_vattn.table import tabulate

WEIGHT_BYTES = 15.0e9
READ_BYTES_PER_S = 4.3e12
"""Llama-3-8B's weights in bfloat16, and what an H200 reads a second: no step is shorter than reading weights and KV, so
the lookahead is none too short."""
MAPPING_S = 96e-6
"""To create, map and make accessible a page there beside a busy device, by the 99th percentile of each (`bench alloc`);
what takes memory away is reckoned as slow."""

LAYERS_PER_ROW = {"": None, ", 8 layers a row": 8, ", all layers a row": 32}
SYSTEMS: dict[str, CacheConfig | int] = {
    "contiguous": sys.maxsize,
    "paged": 16,
    "paged-64": 64,
    "token": 1,
    "published": PAPER,
    **{
        f"vattn{rows}{ahead}": CacheConfig(layers_per_range=layers, lookahead=lookahead)
        for rows, layers in LAYERS_PER_ROW.items()
        for ahead, lookahead in (("", None), (", no lookahead", 0))
    },
}
"""Tokens of a block, or how a cache at fixed addresses is configured."""

COLUMNS = "mix system waste_with_surplus waste parked_share mean_sequences most_sequences steps preemptions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench fragmentation`. By default memory, not --max-seqs, is what keeps requests waiting."""
    add = adder(parser)
    text = "a mix of requests, as for serve; may be given again (default: a generated one)"
    flags.add_trace(parser, action="append", default=[], help=text)
    add("--requests", "REQUESTS", flags.REQUESTS, 400)
    add("--max-output", "TOKENS", flags.MAX_OUTPUT, 512)
    add("--max-seq-len", "TOKENS", flags.MAX_SEQ_LEN, 16384)
    add("--max-seqs", "SEQUENCES", flags.MAX_SEQS, 256)
    add("--budget", "BYTES", flags.BUDGET, "16GiB")
    flags.add_results(parser, plots=True)


def bimodal(count: int, seed: int) -> list[Request]:
    """90 % of sequences end at 200 tokens, 10 % at 8,000; 64 of them are output."""
    long = np.random.default_rng(seed).random(count) < 0.1
    return [Request(0.0, 7936 if is_long else 136, 64) for is_long in long.tolist()]


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    # Llama-3-8B's.
    shape = CacheShape(32, 8, 128, torch.bfloat16, args.max_seqs, args.max_seq_len)
    if args.budget < (least := shape.max_seq_len * shape.token_bytes):
        raise ConfigError(
            f"the budget is {args.budget:,} bytes, and one sequence of {shape.max_seq_len:,} tokens takes {least:,}; "
            "raise --budget, or lower --max-seq-len"
        )
    mixes = {"bimodal": bimodal(args.requests, args.seed)}
    for path in args.trace:
        mixes[path.stem] = load_trace(path, args.requests)
    if not args.trace:
        mixes["generated"] = generate_trace(args.requests, args.seed, median_prompt=1469, median_output=28)
    recording = Recording("fragmentation", args)

    def of(mix: str, requests: list[Request]) -> Part:
        def measure(recording: Recording) -> list[dict[str, Any]]:
            fitted = fit(requests[: args.requests], args.max_seq_len, args.max_output)
            for name, config in counting(SYSTEMS.items(), mix, "system"):
                timing = ModelledTiming(shape.token_bytes)
                with make(config, shape, args.budget, timing) as cache:
                    recording.add("runs", {"mix": mix, "system": name, **simulate(cache, fitted, timing)})
            ours = [row for row in recording.results["runs"] if row["system"].startswith("vattn")]
            return [{f"waste, {row['system']}, {row['mix']}": row["waste_with_surplus"] for row in ours}]

        return measure

    recording.measure({mix: of(mix, requests) for mix, requests in mixes.items()})
    rows = recording.results.get("runs", [])
    free = [f"{row['system']} ({row['mix']})" for row in rows if row["kept_waiting_by_memory"] is False]
    if free:
        print(
            f"for {', '.join(free)} not memory kept requests waiting, so that sequences at once say nothing of it: "
            "lower --budget, or raise --max-seqs and --requests",
            file=sys.stderr,
        )
    return recording.conclude(tabulate(rows, COLUMNS), plot_fragmentation if rows else None)


class ModelledTiming(StepTimingModel):
    """Steps as long as reading the weights and all KV takes on the card, mappings as long as measured there."""

    def __init__(self, token_bytes: int) -> None:
        super().__init__()
        self._token_bytes, self.mapping_s = token_bytes, MAPPING_S

    def observe_lengths(self, lengths: np.ndarray) -> None:
        self.step_s = (WEIGHT_BYTES + int(lengths.sum()) * self._token_bytes) / READ_BYTES_PER_S

    def observe_mappings(self, count: int, seconds: float) -> None:
        """The driver's calls take no time here."""


def make(config: CacheConfig | int, shape: CacheShape, budget: int, timing: StepTimingModel) -> KVCache:
    """The cache of one of the `SYSTEMS`; it holds no memory."""
    if isinstance(config, CacheConfig):
        return KVCacheManager(shape, LedgerDriver(), budget, config=replace(config, step_timing=timing))
    return LedgerCache(shape, budget, min(config, shape.max_seq_len))


def _beside_step(cache: Any, timing: StepTimingModel) -> None:
    """Do the work of a cache's background thread, for as long as the step lasts."""
    if not cache.remaps:
        return
    timing.observe_lengths(cache.lengths)
    left, mappings, more = timing.step_s, cache.driver.mappings.alive, True
    while more and left > 0:
        more = cache.work_ahead()
        before, mappings = mappings, cache.driver.mappings.alive
        left -= timing.mapping_s * abs(mappings - before)


def simulate(cache: Any, requests: list[Request], timing: StepTimingModel) -> dict[str, Any]:
    """Run requests, which all arrive at once, through a cache that holds no memory.

    Returns `waste`, (mapped - live) / mapped over all steps, where mapped is what running sequences have up to their
    lookahead, `waste_with_surplus`, the same with what is still mapped beyond it, `parked_share` of what is held, that
    surplus included, `mean_sequences` and `most_sequences` that ran at once while others waited,
    `kept_waiting_by_memory`, whether those waited for memory and not for a slot in most steps (None where none waited),
    `steps`, `preemptions`, and mappings by when they were made. What is printed and drawn as waste is
    `waste_with_surplus`.
    """
    waiting = deque(enumerate(requests))
    running: dict[int, int] = {}
    mapped = live = parked = held = surplus = 0
    concurrent: list[int] = []
    for_memory: list[bool] = []
    short = True
    preemptions = steps = 0
    while waiting or running:
        while waiting:
            number, request = waiting[0]
            try:
                cache.admit(number, request.prompt_tokens)
            except (NoFreeSlot, KVCacheOutOfMemory) as error:
                if not running:
                    raise
                short = isinstance(error, KVCacheOutOfMemory)
                break
            running[number] = request.prompt_tokens + request.output_tokens
            waiting.popleft()
        while True:
            try:
                cache.prepare_step(np.where(cache.lengths > 0, cache.lengths + 1, 0))
                break
            except KVCacheOutOfMemory:
                youngest = max(running)
                del running[youngest]
                cache.release(youngest)
                waiting.appendleft((youngest, requests[youngest]))
                preemptions += 1
        _beside_step(cache, timing)
        stats = cache.stats()
        mapped, live = mapped + stats.mapped_bytes, live + stats.live_bytes
        parked, held = parked + stats.parked_bytes, held + stats.held_bytes
        surplus += stats.surplus_bytes
        if waiting:
            concurrent.append(len(running))
            for_memory.append(short)
        steps += 1
        for number in [n for n, end in running.items() if cache.lengths[cache.slot_of(n)] >= end]:
            del running[number]
            cache.release(number)
    return {
        "waste": (mapped - surplus - live) / (mapped - surplus),
        "waste_with_surplus": (mapped - live) / mapped,
        "parked_share": (parked + surplus) / held,
        "mean_sequences": float(np.mean(concurrent)) if concurrent else None,
        "most_sequences": max(concurrent, default=None),
        "kept_waiting_by_memory": 2 * sum(for_memory) > len(for_memory) if for_memory else None,
        "steps": steps,
        "preemptions": preemptions,
        "admission_maps": stats.admission_maps,
        "ahead_maps": stats.ahead_maps,
        "critical_path_maps": stats.critical_path_maps,
    }
