"""`bench soak`: does a captured graph stay right while the memory beneath it is remapped, moved, shared and taken away?

One step captured once is replayed over and over on seeded random sequences; its twin, captured over memory that never
changes, must give the same bits. Twins that are both left alone show first that the kernels are repeatable, and
controls show that what would be wrong is seen.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

from trtllm_vattn.bench.controls import fenced_unmap, run_controls
from trtllm_vattn.bench.flags import add_common, amount, as_config, output, positive, tolerance
from trtllm_vattn.bench.machine import commit
from trtllm_vattn.bench.report import Result, load, write
from trtllm_vattn.bench.twins import MAX_SEQ_LEN, SLOTS, Side, Tally, Twins
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.wrappers import CountingDriver


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench soak`."""
    gpu, add = add_common(parser, on_gpu="small-llama"), parser.add_argument
    add("--replays", type=positive, default=100_000 if gpu else 400, metavar="REPLAYS", help="replays in all")
    text = "end this part after so many; go on with --state"
    add("--seconds", type=amount, default=420.0, metavar="SECONDS", help=text)
    text = "replays of two twins that are both left alone"
    add("--repeatable", type=positive, default=2000 if gpu else 60, metavar="REPLAYS", help=text)
    text = "of eager logits, in standard deviations"
    add("--tolerance", type=tolerance, default=0.05, metavar="DEVIATIONS", help=text)
    text = "a file to go on from, and to write what was done to (default: begin anew, and keep nothing)"
    add("--state", type=output, metavar="FILE", help=text)


class Soak:
    """One chunk of a soak."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = load_model(args.model, args.device, torch.float32, args.seed)
        self.shape = shape_of(self.model, SLOTS, MAX_SEQ_LEN)
        self.driver = CountingDriver(open_driver(args.device))

    def subject(self) -> Side:
        # All layers in a token's row, so that a page holds few tokens and much is remapped.
        budget = 2 * SLOTS * (MAX_SEQ_LEN * self.shape.token_bytes + 2 * self.driver.granularity())
        return Side(self.model, KVCacheManager(self.shape, self.driver, budget, self.shape.num_layers, lookahead=16))

    def twin(self) -> Side:
        return Side(self.model, make_cache("contiguous", self.shape, self.args.device))

    def twins(self, seed: int, remapped: bool = True) -> Twins:
        first = self.subject() if remapped else self.twin()
        return Twins(first, self.twin(), seed, self.args.tolerance)

    @torch.inference_mode()
    def run(self, twins: Twins, replays: int, label: str, before: int = 0) -> Tally:
        """Step until `replays` are done or the time is over."""
        started = perf_counter()
        with tqdm(total=replays, initial=before, desc=label, unit="replay", disable=None) as bar:
            while before + twins.tally.replays < replays and perf_counter() - started < self.args.seconds:
                done = twins.tally.replays
                twins.step(check_eager=done >= 100 * twins.tally.eager_checks)
                bar.update(twins.tally.replays - done)
        twins.settle()
        twins.tally.seconds = perf_counter() - started
        return twins.tally


def run(args: argparse.Namespace) -> int:
    """Run a chunk; 1 where bits differed, a control was missed, or what was done right did not survive."""
    chunks = _chunks(args)
    done = sum(chunk["replays"] for chunk in chunks)
    soak = Soak(args)
    with torch.inference_mode():
        alone = soak.twins(args.seed, remapped=False)
        repeatable = soak.run(alone, args.repeatable, "left alone")
        alone.subject.close()
        alone.twin.close()
        before = dict(soak.driver.calls)
        twins = soak.twins(args.seed + len(chunks))
        tally = soak.run(twins, args.replays, "remapped", done)
        calls = {name: count - before.get(name, 0) for name, count in soak.driver.calls.items()}
        captures = twins.subject.captures
        twins.subject.close()
        twins.twin.close()
        controls = run_controls(lambda: soak.twins(args.seed), args.device, args.model)
        fenced = fenced_unmap(args.device, args.model)
    chunks.append({**asdict(tally), "driver_calls": calls, "captures": captures, "commit": commit()})
    if args.state:
        args.state.write_text(json.dumps({"seed": args.seed, "model": args.model, "chunks": chunks}))
    result = Result.start("soak", as_config(args), args.seed)
    result.results.update(chunks=chunks, left_alone=asdict(repeatable), controls=controls, fenced_unmap=fenced)
    result.summary.update(
        replays=sum(chunk["replays"] for chunk in chunks),
        remaps=sum(chunk["driver_calls"].get(name, 0) for chunk in chunks for name in ("map", "unmap")),
        mismatches=sum(chunk["mismatches"] for chunk in chunks),
        tokens=sum(chunk["tokens"] for chunk in chunks),
        graphs_captured=sum(chunk["captures"] for chunk in chunks),
        eager_checks=sum(chunk["eager_checks"] for chunk in chunks),
        eager_mismatches=sum(chunk["eager_mismatches"] for chunk in chunks),
        left_alone_replays=repeatable.replays,
        left_alone_mismatches=repeatable.mismatches,
        controls_caught=sum(not how.startswith("missed") for how in controls.values()),
        fenced_unmap_survived=fenced == "survived",
        seconds=sum(chunk["seconds"] for chunk in chunks),
    )
    for name, value in result.summary.items():
        print(f"{name}: {value}")
    for name, how in controls.items():
        print(f"control, {name}: {how}")
    print(f"the same unmap behind its fence: {fenced}")
    if args.output_json:
        write(result, args.output_json)
    wrong = result.summary["mismatches"] + result.summary["eager_mismatches"] + repeatable.mismatches
    return int(wrong > 0 or result.summary["controls_caught"] < len(controls) or fenced != "survived")


def _chunks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What earlier chunks did. Raises ConfigError where they were of another soak."""
    if args.state is None or not args.state.exists():
        return []
    state = load(args.state)
    if missing := [name for name in ("seed", "model", "chunks") if name not in state]:
        raise ConfigError(f"{args.state} has no {', '.join(missing)}: it is no state of a soak; give another file")
    if (state["seed"], state["model"]) != (args.seed, args.model):
        raise ConfigError(
            f"{args.state} is of a soak of {state['model']} with seed {state['seed']}; give the same, or another file"
        )
    chunks: list[dict[str, Any]] = state["chunks"]
    return chunks
