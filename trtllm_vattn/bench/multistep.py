"""`bench multistep`: what is gained by many decode steps in one launch, and by a loop that the device ends?

One model and one captured step a batch size; engines that launch it once, four times, sixteen times, or until the
device stops take turns. Tokens are compared with those of single steps.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm

from trtllm_vattn.bench.flags import add_attention, add_common, add_rounds, as_config, dtype_of, numbers, positive
from trtllm_vattn.bench.machine import summarise
from trtllm_vattn.bench.report import Result, finish, table
from trtllm_vattn.bench.steady import Lane, fill, settle_device_ms, take_turns
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.sampling import SamplingParams

IDENTITY_ATTENTION = "torch"
"""Whose arithmetic is the same from run to run; cuDNN's decode attention over several sequences is not (README)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench multistep`."""
    gpu, add = add_common(parser), parser.add_argument
    add_attention(parser)
    text = "sequences in steady decode steps"
    add("--batch-sizes", type=numbers, default="1,8,32" if gpu else "1,4", metavar="SEQUENCES,...", help=text)
    add("--step-counts", type=numbers, default="1,4,16", metavar="STEPS,...", help="decode steps of a launch")
    text = "tokens of each sequence, in the mean while steps are timed"
    add("--context", type=positive, default=2048 if gpu else 256, metavar="TOKENS", help=text)
    add_rounds(parser, 5, "number of steps in a launch")
    add("--steps", type=positive, default=32, metavar="STEPS", help="decode steps of a turn")
    text = "tokens of each sequence that are compared"
    add("--identity-tokens", type=positive, default=48, metavar="TOKENS", help=text)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 where tokens were not identical."""
    model = load_model(args.model, args.device, dtype_of(args.device), args.seed)
    variants = [(count, False) for count in args.step_counts] + [(max(args.step_counts), True)]
    rows: list[dict[str, Any]] = []
    for batch in tqdm(args.batch_sizes, desc="batch sizes", disable=None):
        rows += _timed(args, model, variants, batch)
    identity = [_identity(args, model, variants, batch) for batch in args.batch_sizes if batch <= 8]
    result = Result.start("multistep", as_config(args), args.seed)
    result.results.update(runs=rows, identity=identity)
    result.summary.update(_summary(rows, identity))
    print(_show(rows))
    finish(result, args)
    return int(not result.summary["tokens_identical"])


def _timed(args: argparse.Namespace, model: Any, variants: list[tuple[int, bool]], batch: int) -> list[dict[str, Any]]:
    most_steps = max(args.step_counts)
    untimed = 2 * most_steps
    # A turn is of whole launches. The first sequence decodes while others go in, one a step; half of what is decoded
    # comes before the middle of the timed steps, where sequences have `context` tokens.
    a_turn = sum(-(-tokens // most_steps) * most_steps for tokens in (untimed, args.steps))
    before = batch // 2 + (args.rounds * a_turn + untimed) // 2
    start = args.context - before
    if start < 1:
        raise ConfigError(
            f"--context is {args.context}, but {before} tokens are decoded before the middle of the timed steps; make "
            f"it {before + 1} or more, or lower --rounds, --steps or --step-counts"
        )
    # Launches that the device ends early are followed by others, and the device's own time takes some more steps.
    most = batch + args.rounds * (a_turn + untimed) + 64
    lanes = []
    with ExitStack() as closing:
        for count, loop in variants:
            cache = make_cache("vattn", shape_of(model, batch, start + most), args.device)
            engine = Engine(
                model, cache, attention=args.attention, buckets=[batch], steps=count, loop=loop, chunk=max(2048, start)
            )
            closing.callback(engine.close)
            # One step a launch while prompts go in, and as many untimed steps for all: sequences are of equal length.
            engine.pipeline.steps = 1
            fill(engine, batch, start, most, args.seed)
            engine.pipeline.steps = count
            lanes.append(Lane("vattn", "captured", engine))
        take_turns(lanes, args.rounds, args.steps, f"batch {batch}", untimed)
        device_ms = settle_device_ms(lanes[0].engine)
        rows = []
        for (count, loop), lane in zip(variants, lanes, strict=True):
            records = [record for turn in lane.rounds for record in turn]
            rows.append(
                {
                    "batch": batch,
                    "steps": count,
                    "loop": loop,
                    "context": args.context,
                    "mean_length": mean(lane.tokens),
                    "step_ms": summarise([1e3 * record.wall_s / record.steps for record in records]),
                    "host_us_a_step": summarise(
                        [1e6 * (record.wall_s - record.wait_s) / record.steps for record in records]
                    ),
                    "steps_a_launch": summarise([record.steps for record in records]),
                    "device_step_ms": device_ms,
                    "critical_path_maps": lane.critical_path_maps,
                }
            )
        return rows


def _identity(args: argparse.Namespace, model: Any, variants: list[tuple[int, bool]], batch: int) -> dict[str, Any]:
    """Free-running tokens by `IDENTITY_ATTENTION`."""
    generator = torch.Generator().manual_seed(args.seed)
    vocab = model.config.get_text_config().vocab_size
    prompts = [torch.randint(0, vocab, (20 + 7 * i,), generator=generator).tolist() for i in range(batch)]
    params = [
        SamplingParams(
            args.identity_tokens - i, temperature=0.8 * (i % 2), seed=i, stop_token_ids=(i,), ignore_eos=True
        )
        for i in range(batch)
    ]
    answers = []
    for count, loop in variants:
        cache = make_cache("vattn", shape_of(model, batch, 256), args.device)
        with Engine(model, cache, attention=IDENTITY_ATTENTION, buckets=[batch], steps=count, loop=loop) as engine:
            answers.append([done.tokens for done in engine.generate(prompts, params)])
    return {
        "batch": batch,
        "attention": IDENTITY_ATTENTION,
        "tokens": sum(map(len, answers[0])),
        "identical": all(answer == answers[0] for answer in answers[1:]),
    }


def _summary(rows: list[dict[str, Any]], identity: list[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {
        "tokens_identical": all(row["identical"] for row in identity),
        "tokens_compared": sum(row["tokens"] for row in identity),
        "identity_attention": IDENTITY_ATTENTION,
        "identity_batches": ", ".join(str(row["batch"]) for row in identity),
        "context": rows[0]["context"],
        "mean_length_least": min(row["mean_length"] for row in rows),
        "mean_length_most": max(row["mean_length"] for row in rows),
    }
    single = {row["batch"]: row for row in rows if row["steps"] == 1}
    for row in rows:
        if row["steps"] > 1 and row["batch"] in single:
            out[f"gain_{_name(row)}"] = single[row["batch"]]["step_ms"]["p50"] / row["step_ms"]["p50"]
    for row in rows:
        out[f"host_us_{_name(row)}"] = row["host_us_a_step"]["p50"]
    return out


def _name(row: dict[str, Any]) -> str:
    return f"{'loop' if row['loop'] else row['steps']}_batch{row['batch']}"


def _show(rows: list[dict[str, Any]]) -> str:
    header = ["batch", "steps a launch", "mean length", "step p50 ms", "p99", "host us a step", "device step ms"]
    return table(
        header,
        [
            [
                str(row["batch"]),
                f"loop, up to {row['steps']}" if row["loop"] else str(row["steps"]),
                f"{row['mean_length']:.0f}",
                *(f"{row['step_ms'][p]:.3f}" for p in ("p50", "p99")),
                f"{row['host_us_a_step']['p50']:.0f}",
                "-" if row["device_step_ms"] is None else f"{row['device_step_ms']:.3f}",
            ]
            for row in rows
        ],
    )
