"""`bench tp`: one model on several GPUs beside one.

Steps: an engine on one GPU and one on all ranks decode the same number of sequences in turns, captured. Replays: a
small model on all ranks, in float32, while requests come and go, budgets change and memory moves; its tokens are those
of an engine on one device over memory that never changes. Large: steps of a model that one GPU does not hold.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from trtllm_vattn.arguments import adder
from trtllm_vattn.bench.harness.case import Part, Recording
from trtllm_vattn.bench.harness.contenders import Contender, fill, take_turns
from trtllm_vattn.bench.harness.flags import add_common, add_parts, add_steady, dtype_of
from trtllm_vattn.errors import KVCacheOutOfMemory
from trtllm_vattn.progress import Progress
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.parallel import Ranks, size_of_torchrun
from trtllm_vattn.runtime.parallel.group import ALL_REDUCE
from trtllm_vattn.runtime.request import StepRecord
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.table import tabulate

PARTS = ("steps", "replays", "large")
SLOTS, REPLAY_LEN = 8, 192
"""Of the replays: sequences at once, and tokens of the longest."""
LARGE, LARGE_BATCHES = {"cuda": "llama-3-70b", "cpu": "tiny-qwen3"}, [1, 32]
"""Shape of the part large, and sequences of its steps."""
TIE = 1e-3
"""Two largest logits that are closer than this, in float32, are a tie."""

COLUMNS = "model batch gpus step_ms ratio"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench tp`."""
    add = adder(parser, gpu := add_common(parser))
    add("--ranks", "COUNT", "GPUs, or processes on the host", 2)
    text = "who sums over ranks: NCCL, or torch's symmetric memory where it can"
    parser.add_argument("--all-reduce", default=ALL_REDUCE[0], choices=ALL_REDUCE, help=text)
    add_parts(parser, PARTS, "steps,replays", flag="--measure")
    context, batches = (2048, "1,32,128") if gpu else (48, "1,4")
    add_steady(parser, "engine", context, rounds=3 if gpu else 2, steps=24 if gpu else 4, batches=batches)
    add("--replays", "REPLAYS", "replays of the small model over memory that is remapped", 20_000, 120)
    add("--seconds", "SECONDS", "end the replays after so many", 60.0)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 where tokens were wrong."""
    kind = args.device.partition(":")[0]
    start = Ranks.of_torchrun if size_of_torchrun() > 1 else Ranks.start
    ranks = start(args.ranks, kind, args.all_reduce)
    recording = Recording("tp", args)
    rows: list[dict[str, Any]] = []
    replays: dict[str, Any] = {}
    recording.results.update(runs=rows, replays=replays)

    def steps(measure: Callable[[argparse.Namespace, Ranks], list[dict[str, Any]]]) -> Part:
        def part(recording: Recording) -> list[dict[str, Any]]:
            rows.extend(measure(args, ranks))
            return [_summary(args, rows, replays)]

        return part

    def remapped(recording: Recording) -> list[dict[str, Any]]:
        replays.update(_replays(args, ranks))
        return [_summary(args, rows, replays)]

    parts = {"steps": steps(_steps), "replays": remapped, "large": steps(_large)}
    try:
        recording.measure(parts, [name for name in parts if name in args.measure])
    finally:
        ranks.close()
    wrong = [f"{replays['wrong_replays']} replays gave wrong tokens"] if replays.get("wrong_replays") else []
    return recording.conclude(tabulate(rows, COLUMNS), wrong=wrong)


def _summary(args: argparse.Namespace, rows: list[dict[str, Any]], replays: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {"gpus": args.ranks if args.device != "cpu" else 0, "ranks": args.ranks}
    for row in rows:
        if row["ratio"] is not None:
            out[f"step_{row['batch']}_over_one_gpu"] = row["ratio"]
        if row["gpus"] > 1:
            large = "" if row["model"] == args.model else "large_"
            out[f"{large}step_{row['batch']}_ms"] = row["step_ms"]
    return {**out, **replays}


# -- steps -------------------------------------------------------------------------------------------------------------


def _longest(args: argparse.Namespace, batches: list[int]) -> tuple[int, int]:
    """Tokens of each prompt, and those that it may decode: half of what is decoded comes before the middle of the timed
    steps, where sequences have `context` tokens."""
    most = max(batches) + 2 * args.rounds * (args.steps + 4) + 40
    return max(1, args.context - max(batches) // 2 - args.rounds * (args.steps + 2)), most


def _options(args: argparse.Namespace, model: str, batches: list[int]) -> dict[str, Any]:
    start, most = _longest(args, batches)
    return {
        "model": model,
        "dtype": dtype_of(args.device),
        "max_seqs": max(batches),
        "max_seq_len": start + most,
        "buckets": sorted(batches),
        "prefix_cache": False,
        "packed": True,
        "compile": None if args.device != "cpu" else False,
    }


@contextmanager
def _filled(engine: Engine, args: argparse.Namespace, batch: int, batches: list[int]) -> Iterator[Contender]:
    context, most = _longest(args, batches)
    fill(engine, [context] * batch, most, np.random.default_rng(args.seed))
    try:
        yield Contender("vattn", "captured", engine)
    finally:
        for request in list(engine.scheduler.requests):
            engine.abort(request)


def _budget(args: argparse.Namespace, engine: Engine, batches: list[int]) -> int:
    """Bytes for all sequences, with what rounding and looking ahead take."""
    tokens = sum(_longest(args, batches))
    return (max(batches) + 1) * engine.cache.bytes_of(tokens)


def _steps(args: argparse.Namespace, ranks: Ranks) -> list[dict[str, Any]]:
    rows = []
    options = _options(args, args.model, args.batch_sizes)
    with ExitStack() as closing:
        # With little memory for KV, until its shape is known.
        engines = []
        for count in (1, ranks.size):
            several: dict[str, Any] = {"tensor_parallel": ranks} if count > 1 else {}
            engine = Engine.from_pretrained(device=args.device, budget="2GiB", **several, **options)
            closing.callback(engine.close)
            engine.set_budget(_budget(args, engine, args.batch_sizes))
            engines.append(engine)
        for batch in args.batch_sizes:
            with ExitStack() as filled:
                contenders = [filled.enter_context(_filled(each, args, batch, args.batch_sizes)) for each in engines]
                take_turns(contenders, args.rounds, args.steps, f"batch {batch}")
                for count, each in zip((1, ranks.size), contenders, strict=True):
                    ratio = each.over(contenders[0])[0] if count > 1 else None
                    rows.append(_row(args.model, batch, count, each, ratio))
    return rows


def _row(model: str, batch: int, ranks: int, contender: Contender, ratio: float | None) -> dict[str, Any]:
    return {
        "model": model,
        "batch": batch,
        "gpus": ranks,
        "step_ms": 1e3 * median(contender.samples("wall_s")),
        "ratio": ratio,
        "tokens": contender.tokens,
        "times": contender.times(),
        "start": {"load_s": contender.engine.startup.load_s, "compile_s": contender.engine.startup.compile_s},
    }


def _large(args: argparse.Namespace, ranks: Ranks) -> list[dict[str, Any]]:
    rows = []
    batches, model = LARGE_BATCHES, LARGE["cpu" if args.device == "cpu" else "cuda"]
    options = _options(args, model, batches)
    with Engine.from_pretrained(device=args.device, budget="2GiB", tensor_parallel=ranks, **options) as engine:
        engine.set_budget(_budget(args, engine, batches))
        for batch in batches:
            with _filled(engine, args, batch, batches) as contender:
                take_turns([contender], args.rounds, args.steps, f"{model}, batch {batch}")
                rows.append(_row(model, batch, ranks.size, contender, None))
    return rows


# -- replays -----------------------------------------------------------------------------------------------------------


def _prompts(seed: int, vocab_size: int, count: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, vocab_size, int(random.integers(4, REPLAY_LEN // 2))).tolist() for _ in range(count)]


def _replays(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Replays of a small model while memory moves, and those of them that gave a wrong token."""
    on_gpu = args.device != "cpu"
    model = "small-llama" if on_gpu else "tiny-llama"
    options: dict[str, Any] = {
        "device": args.device,
        "dtype": torch.float32,
        "max_seqs": SLOTS,
        "max_seq_len": REPLAY_LEN,
        "buckets": [SLOTS],
        "attention": "torch",
        "prefix_cache": False,
        "compile": False,
        "record_margins": True,
    }
    tokens = REPLAY_LEN // 3
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    with Engine.from_pretrained(model, cache="contiguous", **options) as still:
        prompts = _prompts(args.seed, still.model.config.get_text_config().vocab_size, 48 if on_gpu else 6)
        expected = [done.tokens for done in still.generate(prompts, params)]
    with Engine.from_pretrained(model, tensor_parallel=ranks, **options) as engine:
        return _checked(args, engine, prompts, expected)


def _checked(
    args: argparse.Namespace, engine: Engine, prompts: list[list[int]], expected: list[list[int]]
) -> dict[str, Any]:
    random = np.random.default_rng(args.seed)
    records: list[StepRecord] = []
    engine.observer = records.append
    whole = engine.cache.budget_bytes
    before = engine.cache.stats()
    prompt_of: dict[int, int] = {}
    counts = {"replays": 0, "wrong_replays": 0, "ties": 0, "tokens": 0, "failed_requests": 0, "budgets": 0}
    until = perf_counter() + args.seconds
    with Progress("replays", args.replays, "replay") as bar:
        while counts["replays"] < args.replays and perf_counter() < until:
            while len(engine.scheduler.requests) < SLOTS + 2:
                which = int(random.integers(len(prompts)))
                some = SamplingParams(max_tokens=int(random.integers(1, len(expected[which]))), ignore_eos=True)
                forced = expected[which][: some.max_tokens]
                prompt_of[engine.submit(prompts[which], some, forced)] = which
            if random.random() < 0.05:
                _change_budget(engine, int(whole * random.uniform(0.25, 1.0)), counts)
            records.clear()
            wrong = False
            for event in engine.step():
                counts["tokens"] += 1
                if event.token is None:
                    counts["failed_requests"] += 1
                elif event.token != expected[prompt_of[event.request]][event.index]:
                    tie = event.margin is not None and event.margin < TIE
                    counts["ties"] += tie
                    wrong = wrong or not tie
            done = sum(record.steps for record in records)
            counts["replays"] += done
            counts["wrong_replays"] += wrong
            bar.update(done)
    engine.observer = None
    for request in list(engine.scheduler.requests):
        engine.abort(request)
    after = engine.cache.stats()
    maps = [stats.admission_maps + stats.critical_path_maps + stats.ahead_maps for stats in (before, after)]
    return {**counts, "mappings": maps[1] - maps[0]}


def _change_budget(engine: Engine, budget: int, counts: dict[str, int]) -> None:
    """Give memory back to the driver and have it again, so that pages are created and mapped anew."""
    engine.cache.release_free_memory()
    try:
        engine.set_budget(budget)
    except KVCacheOutOfMemory:
        # Less than is pending: another one comes.
        return
    counts["budgets"] += 1
