"""`bench observe`: what metrics, an event trace and `top` add to a step, beside an engine that nobody watches."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import numpy as np

from trtllm_vattn.arguments import adder
from trtllm_vattn.bench.harness.case import Recording
from trtllm_vattn.bench.harness.contenders import fill
from trtllm_vattn.bench.harness.flags import add_attention, add_common, add_steady
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError, VattnError
from trtllm_vattn.observe.metrics import start_metrics_server
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.table import tabulate
from trtllm_vattn.trace import Trace, read_trace
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.wrappers import TracingDriver

UNTIMED = 2
"""Steps at the start of a turn: caches of the processor are another engine's."""
COLUMNS = "round without_ms with_ms ratio"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench observe`."""
    add = adder(parser, gpu := add_common(parser))
    add_attention(parser)
    add("--max-seqs", "SEQUENCES", "that decode all the time", 64, 4)
    add_steady(parser, "engine", 1024 if gpu else 32, 8 if gpu else 3, 300 if gpu else 40)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    if args.steps <= UNTIMED:
        raise ConfigError(f"--steps is {args.steps}, of which the first {UNTIMED} of a turn are not timed; give more")
    recording = Recording("observe", args)
    recording.measure({"rounds": measure_rounds})
    return recording.conclude(tabulate(recording.results.get("rounds", []), COLUMNS))


def measure_rounds(recording: Recording) -> Iterator[dict[str, Any]]:
    """Two engines over one model in turns, one of them watched."""
    args, model = recording.args, recording.model
    longest = args.context + (args.rounds + 1) * args.steps + 64
    shape = shape_of(model, args.max_seqs, longest)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        trace = opened.enter_context(Trace(Path(folder, "trace.json")))
        drivers = {"without": open_driver(args.device), "with": TracingDriver(open_driver(args.device), trace)}
        engines = {}
        for name, driver in drivers.items():
            recording.say(f"start the engine: {name}")
            cache = make_cache("vattn", shape, args.device, driver=driver)
            given = trace if name == "with" else None
            engines[name] = opened.enter_context(Engine(model, cache, attention=args.attention, trace=given))
            lengths = [args.context] * args.max_seqs
            fill(engines[name], lengths, longest - args.context, np.random.default_rng(args.seed))
        server = opened.enter_context(start_metrics_server(engines["with"]))
        watcher = opened.enter_context(_watching(server.port))
        for turn in range(args.rounds + 1):
            # Who goes first alternates, so that a machine that becomes slower or faster favours nobody.
            order = ("without", "with") if turn % 2 else ("with", "without")
            taken = {}
            for name in order:
                os.kill(watcher.pid, signal.SIGCONT if name == "with" else signal.SIGSTOP)
                taken[name] = _turn(engines[name], args.steps)
            if (code := watcher.poll()) is not None:
                raise VattnError(f"top ended with {code} by itself, so that nobody watched; its error is above")
            # The first turn warms up.
            if turn:
                recording.add("rounds", _row(turn - 1, taken))
                yield compared(recording.results["rounds"])
        trace.close()
        recording.wrong += [each for each in (trace.error,) if each is not None]
        yield {"events": len(read_trace(trace.path)), "events_dropped": trace.dropped}


def compared(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The figures that are quoted, of the rounds so far."""
    ratios = [row["ratio"] for row in rounds]
    return {
        "metrics_trace_top_over_without": median(ratios),
        "lowest_round": min(ratios),
        "highest_round": max(ratios),
        "p50_over_without": median(row["p50_ratio"] for row in rounds),
        "without_step_ms": median(row["without_ms"] for row in rounds),
    }


def _turn(engine: Engine, steps: int) -> list[float]:
    times = []
    for _ in range(steps):
        started = perf_counter()
        engine.step()
        times.append(1e3 * (perf_counter() - started))
    return times[UNTIMED:]


def _row(turn: int, taken: dict[str, list[float]]) -> dict[str, Any]:
    """Means: a scrape falls into few steps, and its cost shall count."""
    found = {name: mean(times) for name, times in taken.items()}
    return {
        "round": turn,
        "without_ms": found["without"],
        "with_ms": found["with"],
        "ratio": found["with"] / found["without"],
        "p50_ratio": median(taken["with"]) / median(taken["without"]),
    }


@contextmanager
def _watching(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`top` in a process of its own."""
    command = [sys.executable, "-m", "trtllm_vattn", "top", f"http://127.0.0.1:{port}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
