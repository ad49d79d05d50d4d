"""`bench tune`: what tuning finds for a single token's step, searched several times, the fastest kept as data.

Each trial starts an engine in a process of its own with empty caches, so that Inductor searches anew, and times the
captured step of one sequence. What made the fastest one is written for the card (runtime/tuned.py); a last start with
empty caches and that data has to search nothing, and its step is timed beside the trials'.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from trtllm_vattn.arguments import adder, output_folder
from trtllm_vattn.bench.harness.case import Recording, engine_for, in_fresh_process
from trtllm_vattn.bench.harness.contenders import Contest, take_turns
from trtllm_vattn.bench.harness.flags import add_common, dtype_of
from trtllm_vattn.bench.harness.timing import summarise
from trtllm_vattn.errors import ConfigError, VattnError
from trtllm_vattn.files import write_json
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.tuned import FOLDER, card_of, collect, entries, merged, toolchain
from trtllm_vattn.table import tabulate

COLUMNS = "start step_ms tried kernels seconds"
_TRIAL = """
import json, sys
from pathlib import Path
from trtllm_vattn.runtime import tuned
tuned.FOLDER = Path(sys.argv[1])
from trtllm_vattn.bench.cases.tune import trial
print(json.dumps(trial(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6]))))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench tune`."""
    add_common(parser)
    add = adder(parser)
    add("--trials", "TIMES", "searches, each in a process of its own", 5)
    add("--context", "TOKENS", "of the sequence whose step is timed", 2048)
    add("--steps", "STEPS", "decode steps that are timed", 200)
    text = "where CARD.json is written, with what it holds of other models and versions"
    add("--output", "FOLDER", text, str(FOLDER), type=output_folder)


def trial(model: str, device: str, context: int, steps: int, seed: int) -> dict[str, Any]:
    """In a process of its own: an engine's first start, how many configurations a search tried, and its step in ms."""
    from torch._dynamo.utils import counters

    loaded = load_model(model, device, dtype_of(device), seed)
    started = perf_counter()
    engine = engine_for(loaded, device, 1, context + 2 * steps + 64, buckets=[1], chunk=max(2048, context))
    seconds = perf_counter() - started
    with Contest(1, max(1, context - steps // 2), 2 * steps, seed) as contest:
        contest.add("vattn", engine)
        take_turns(contest.contenders, 1, steps, "steps")
        times = summarise([1e3 * value for value in contest.contenders[0].samples("wall_s")])
    return {"step_ms": times["p50"], "tried": counters["inductor"]["coordesc_tuning_bench"], "seconds": seconds}


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 where a start with what was found searched all the same."""
    if args.device == "cpu":
        raise ConfigError("nothing is tuned on the CPU: kernels of a single token are searched on a GPU; give --device")
    name = card_of(torch.device(args.device))
    recording = Recording("tune", args)
    recording.results.update(runs=[], kernels=[])
    rows, found = recording.results["runs"], recording.results["kernels"]

    def trials(recording: Recording) -> Iterator[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as nothing:
            for number in range(args.trials):
                row, kernels = started(args, nothing)
                found.append(kernels)
                recording.add("runs", {"start": f"trial {number + 1}", **row, "kernels": len(kernels)})
                steps = [row["step_ms"] for row in rows]
                yield {"best_step_ms": min(steps), "worst_step_ms": max(steps)}

    def kept(recording: Recording) -> list[dict[str, Any]]:
        best = min(range(args.trials), key=lambda number: float(rows[number]["step_ms"]))
        if not found[best]:
            raise VattnError("the search left no configuration: this torch keeps none, or its caches are disabled")
        entry = {"model": args.model, **toolchain(), "step_ms": rows[best]["step_ms"], "trials": args.trials}
        path = args.output / f"{name}.json"
        old = json.loads(path.read_text()) if path.is_file() else entries(name)
        write_json(path, "the kernels", merged(old, {**entry, "kernels": found[best]}))
        again, kernels = started(args, str(args.output))
        recording.add("runs", {"start": "with what was found", **again, "kernels": len(kernels)})
        same = {key: kernels.get(key) for key in found[best]} == found[best]
        if again["tried"] or not same:
            recording.wrong.append(f"with what was found, a start tried {again['tried']} configurations all the same")
        figures = {"step_ms_with_found": again["step_ms"], "tried_with_found": again["tried"]}
        return [{**figures, "same_kernels": same, "written": str(path)}]

    recording.measure({"trials": trials, "kept": kept})
    return recording.conclude(tabulate(rows, COLUMNS))


def started(args: argparse.Namespace, tuned: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """One first start, with the data of the folder `tuned`: its row, and the configurations that its caches then hold.

    Raises VattnError where it fails.
    """
    with tempfile.TemporaryDirectory() as caches:
        kept = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton"}
        row = in_fresh_process(_TRIAL, tuned, args.model, args.device, args.context, args.steps, args.seed, **kept)
        return row, collect(Path(caches) / "inductor")
