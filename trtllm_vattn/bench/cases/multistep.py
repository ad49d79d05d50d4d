"""`bench multistep`: how much faster are many decode steps in one launch, and a loop that the device ends?

One model and one captured step a batch size; engines that launch it once, four times, sixteen times, or until the
device stops take turns. Tokens are compared with those of single steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from statistics import mean
from typing import Any

import torch

from trtllm_vattn.arguments import adder
from trtllm_vattn.bench.harness.case import Recording, engine_for, vocab_of
from trtllm_vattn.bench.harness.contenders import Contest, device_step_ms, take_turns
from trtllm_vattn.bench.harness.flags import add_attention, add_common, add_steady
from trtllm_vattn.bench.harness.timing import summarise
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.progress import counting
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.table import tabulate
from trtllm_vattn.values import counted

IDENTITY_ATTENTION = "torch"
"""Whose arithmetic is the same from run to run; cuDNN's decode attention over several sequences is not (README)."""

COLUMNS = "batch steps loop mean_length step_ms.p50 step_ms.p99 host_us_a_step.p50 device_step_ms"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench multistep`."""
    add = adder(parser, gpu := add_common(parser))
    add_attention(parser)
    add("--step-counts", "STEPS,...", "decode steps of a launch", "1,4,16")
    context, batches = (2048, "1,8,32") if gpu else (256, "1,4")
    add_steady(parser, "number of steps in a launch", context, rounds=5, steps=32, batches=batches)
    add("--identity-tokens", "TOKENS", "tokens of each sequence that are compared", 48)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 where tokens were not identical."""
    recording = Recording("multistep", args)
    variants = [(count, False) for count in args.step_counts] + [(max(args.step_counts), True)]
    recording.results.update(runs=[], identity=[])
    rows, identity = recording.results["runs"], recording.results["identity"]

    def tokens(recording: Recording) -> Iterator[dict[str, Any]]:
        for batch in args.batch_sizes:
            if batch <= 8:
                recording.say(f"tokens of {counted(batch, 'sequence')} by {counted(len(variants), 'way')} to launch")
                recording.add("identity", _identity(args, recording.model, variants, batch))
                yield _summary(rows, identity)

    def steps(recording: Recording) -> Iterator[dict[str, Any]]:
        for batch in counting(args.batch_sizes, "batch sizes", "batch size"):
            for row in _timed(recording, variants, batch):
                recording.add("runs", row)
            yield _summary(rows, identity)

    recording.measure({"steps": steps, "tokens": tokens})
    wrong = [] if recording.summary.get("tokens_identical", True) else ["tokens differ between launches"]
    return recording.conclude(tabulate(rows, COLUMNS), wrong=wrong)


def _timed(recording: Recording, variants: list[tuple[int, bool]], batch: int) -> list[dict[str, Any]]:
    args, model = recording.args, recording.model
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
    with Contest(batch, start, most, args.seed) as contest:
        for count, loop in variants:
            recording.say(f"batch {batch}: start the engine of {'a loop' if loop else counted(count, 'step')} a launch")
            options: dict[str, Any] = {"attention": args.attention, "buckets": [batch], "chunk": max(2048, start)}
            engine = engine_for(model, args.device, batch, start + most, steps=count, loop=loop, **options)
            # One step a launch while prompts go in, and as many untimed steps for all: sequences are of equal length.
            engine.scheduler.steps = 1
            contest.add("vattn", engine)
            engine.scheduler.steps = count
        take_turns(contest.contenders, args.rounds, args.steps, f"batch {batch}", untimed)
        device_ms = device_step_ms(contest.contenders[0].engine)
        rows = []
        for (count, loop), each in zip(variants, contest.contenders, strict=True):
            records = [record for turn in each.rounds for record in turn]
            host = [1e6 * (record.wall_s - record.wait_s) / record.steps for record in records]
            rows.append(
                {
                    "batch": batch,
                    "steps": count,
                    "loop": loop,
                    "context": args.context,
                    "mean_length": mean(each.tokens),
                    "step_ms": summarise([1e3 * record.wall_s / record.steps for record in records]),
                    "host_us_a_step": summarise(host),
                    "steps_a_launch": summarise([record.steps for record in records]),
                    "device_step_ms": device_ms,
                    "critical_path_maps": each.critical_path_maps,
                }
            )
        return rows


def _identity(args: argparse.Namespace, model: Any, variants: list[tuple[int, bool]], batch: int) -> dict[str, Any]:
    """Free-running tokens by `IDENTITY_ATTENTION`."""
    generator = torch.Generator().manual_seed(args.seed)
    prompts = [torch.randint(0, vocab_of(model), (20 + 7 * i,), generator=generator).tolist() for i in range(batch)]
    params = [
        SamplingParams(
            args.identity_tokens - i, temperature=0.8 * (i % 2), seed=i, stop_token_ids=(i,), ignore_eos=True
        )
        for i in range(batch)
    ]
    answers = []
    for count, loop in variants:
        options: dict[str, Any] = {"attention": IDENTITY_ATTENTION, "buckets": [batch]}
        with engine_for(model, args.device, batch, 256, steps=count, loop=loop, **options) as engine:
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
    }
    if rows:
        out["context"] = rows[0]["context"]
        out["mean_length_least"] = min(row["mean_length"] for row in rows)
        out["mean_length_most"] = max(row["mean_length"] for row in rows)
    single = {row["batch"]: row for row in rows if row["steps"] == 1}
    for row in rows:
        if row["steps"] > 1 and row["batch"] in single:
            out[f"gain_{_name(row)}"] = single[row["batch"]]["step_ms"]["p50"] / row["step_ms"]["p50"]
    for row in rows:
        out[f"host_us_{_name(row)}"] = row["host_us_a_step"]["p50"]
    return out


def _name(row: dict[str, Any]) -> str:
    return f"{'loop' if row['loop'] else row['steps']}_batch{row['batch']}"
