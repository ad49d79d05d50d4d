"""`bench serve --peer`: the same requests through our engine and another one, in turns on one device.

First with everything at once, which is what saturates an engine, then at a share of the rate that saturates the peer:
throughput is compared in the first, latencies in the second. Both have the same bytes of KV, the same shape of model
with random weights, the same token ids, lengths and times of arrival; each turn has token ids of its own, so that
nobody's prefix cache helps. Both engines stay alive, idle in the other's turns, where two fit the device; else each is
made anew for its turn.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedModel

from trtllm_vattn.bench.harness.case import Part, Recording, engine_for, engine_options, give_back, vocab_of
from trtllm_vattn.bench.harness.peer import Peer, check_tokens, fit_together, opener, versions_of, write_config
from trtllm_vattn.bench.harness.report import load
from trtllm_vattn.bench.harness.serving import (
    Load,
    Served,
    arrival_times,
    check_goodput,
    over_time,
    report,
    serve,
)
from trtllm_vattn.bench.harness.traces import Request, trace_kind
from trtllm_vattn.bench.harness.workload import prompts_of
from trtllm_vattn.bench.publish.plots import plot_serve
from trtllm_vattn.bench.publish.tables import serve_beside
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.machine import versions
from trtllm_vattn.runtime.engine import Engine

OURS = "vattn"
BESIDE = 8 << 30
"""Bytes that an engine takes beside weights and KV: activations, graphs, its context."""
WARM_UP = (17, 300, 2048, 7000)
"""Tokens of prompts that are served before anything is timed, in which kernels are compiled."""
Traced = tuple[str, list[Request]]


class Ours:
    """Our engine over the fixed-address cache. The model stays; engine and cache are made at `start`."""

    name = OURS

    def __init__(self, model: PreTrainedModel, args: argparse.Namespace) -> None:
        self._model, self._args = model, args
        self._engine: Engine | None = None
        self.settings: dict[str, Any] = {}

    def start(self, kind: str) -> None:
        if self._engine is None:
            args, options = self._args, engine_options(self._args)
            sizes = (args.device, args.max_seqs, args.max_seq_len, args.budget)
            self._engine = engine_for(self._model, *sizes, attention=args.attention, chunk=args.chunk, **options)
            kv_bytes = self._engine.cache.stats().budget_bytes
            self.settings.update({"kv_bytes": kv_bytes, "max_seqs": args.max_seqs, **options})

    def serve(self, load: Load) -> Served:
        assert self._engine is not None
        return serve(self._engine, load, label=self.name)

    def stop(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
            give_back()


class Theirs:
    """A peer's engine, in its process, with so many bytes of KV and sequences up to so long."""

    def __init__(
        self, args: argparse.Namespace, make: Callable[[], Peer], folder: Path, kv_bytes: int, max_seq_len: int
    ) -> None:
        self.name, self._make = args.peer, make
        self._sizes = {"folder": str(folder), "kv_bytes": kv_bytes, "max_model_len": max_seq_len, "seed": args.seed}
        self._peer: Peer | None = None
        self._kind = ""
        self.settings: dict[str, Any] = {}
        self.start_s: dict[str, float] = {}

    def start(self, kind: str) -> None:
        if self._peer is not None and self._kind == kind:
            return
        self.stop()
        self._peer, self._kind = self._make(), kind
        made = self._peer.ask("start", kind=kind, **self._sizes)
        self.settings[kind], self.start_s[kind] = made["settings"], made["seconds"]

    def serve(self, load: Load) -> Served:
        return self.peer.serve(load)

    @property
    def peer(self) -> Peer:
        """Its process, which was started."""
        assert self._peer is not None
        return self._peer

    @property
    def is_there(self) -> bool:
        """Whether it was started and not stopped."""
        return self._peer is not None

    def stop(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None


class Turns:
    """Serves loads by each engine in turn, with token ids that no other turn has; keeps rows of what came of it."""

    def __init__(self, engines: Sequence[Ours | Theirs], recording: Recording, vocab: int, together: bool) -> None:
        self._engines, self._recording, self._vocab, self._together = engines, recording, vocab, together
        self._args = recording.args
        self._turn = 0
        self._warm: set[tuple[str, str]] = set()
        self.rows: list[dict[str, Any]] = []

    def _load(self, requests: Sequence[Request], rate: float) -> Load:
        self._turn += 1
        arrivals = arrival_times(len(requests), rate, self._args.burstiness, self._args.seed)
        # Without what they share with others.
        own = [replace(each, prefix_blocks=()) for each in requests]
        prompts = prompts_of(own, self._vocab, self._args.seed + self._turn)
        return Load(prompts, [request.output_tokens for request in requests], arrivals)

    @contextmanager
    def _ready(self, engine: Ours | Theirs, kind: str) -> Iterator[None]:
        """With `kind` of engine started and warm; alone on the device, where two do not fit."""
        self._recording.say(f"start {engine.name}, {kind}")
        engine.start(kind)
        try:
            if (engine.name, kind) not in self._warm:
                engine.serve(self._warm_up())
            if self._together:
                self._warm.add((engine.name, kind))
            yield
        finally:
            if not self._together:
                engine.stop()

    def _warm_up(self) -> Load:
        lengths = [min(tokens, self._args.max_seq_len - 8) for tokens in WARM_UP]
        return self._load([Request(0.0, max(1, tokens), 8) for tokens in lengths * 3], float("inf"))

    def take(self, wanted: Sequence[tuple[Traced, float]], number: int, kind: str) -> None:
        """One turn of each engine with every trace, at its rate. Engines that lie on the device together take turns
        trace by trace; else each is started once."""
        loads = [
            (name, "at once" if rate == float("inf") else f"{rate:.2f}", self._load(requests, rate))
            for (name, requests), rate in wanted
        ]
        for part in [[each] for each in loads] if self._together else [loads]:
            for engine in self._engines:
                with self._ready(engine, kind):
                    for name, rate, load in part:
                        self._serve(engine, load, {"trace": name, "kind": kind, "request_rate": rate}, number)

    def _serve(self, engine: Ours | Theirs, load: Load, row: dict[str, Any], number: int) -> None:
        self._recording.say(f"{row['trace']}, {row['request_rate']}, by {engine.name}")
        served = engine.serve(load)
        check_tokens(engine.name, load, served.times)
        found = report(load, served, check_goodput(self._args.goodput))
        row = {**row, "engine": engine.name, "round": number, **found}
        self.rows.append({**row, "over_time": over_time(load, served)})
        self._recording.sum_up(**compared(self.rows, self._args.peer))


def named(wanted: Sequence[tuple[Path | None, list[Request]]]) -> list[Traced]:
    """Traces by their kind, and a number from the second of a kind on."""
    found: list[Traced] = []
    for path, requests in wanted:
        kind = "generated" if path is None else trace_kind(path)
        count = sum(name.partition("-")[0] == kind for name, _ in found)
        found.append((f"{kind}-{count + 1}" if count else kind, requests))
    return found


def run(args: argparse.Namespace, wanted: Sequence[tuple[Path | None, list[Request]]]) -> int:
    """Run the comparison."""
    told, make = versions_of(args), opener(args)
    traces = named(wanted)
    recording = Recording("serve", args)
    recording.sum_up(peer=f"{args.peer} {told[args.peer]}")
    results = recording.results
    model = recording.model
    with tempfile.TemporaryDirectory() as folder:
        write_config(model, Path(folder))
        ours, theirs = Ours(model, args), Theirs(args, make, Path(folder), args.budget, args.max_seq_len)
        turns = Turns([ours, theirs], recording, vocab_of(model), together(model, args))
        parts = schedule(args, traces, turns)
        results.update(runs=turns.rows, versions={OURS: versions(), args.peer: told})
        results.update(settings={OURS: ours.settings, args.peer: theirs.settings}, peer_start_s=theirs.start_s)
        try:
            recording.measure(parts)
        finally:
            ours.stop()
            theirs.stop()
    return recording.conclude(serve_beside({"results": results}), plot_serve if turns.rows else None)


def together(model: PreTrainedModel, args: argparse.Namespace) -> bool:
    """Whether both engines lie on the device at once."""
    if args.device == "cpu":
        return True
    weights = sum(each.numel() * each.element_size() for each in model.parameters())
    total = torch.cuda.get_device_properties(args.device).total_memory
    return fit_together(total, weights, args.budget, BESIDE)


def schedule(args: argparse.Namespace, traces: Sequence[Traced], turns: Turns) -> dict[str, Part]:
    """The rounds at the rate that is asked for, and where everything comes at once there, one at a share of the rate
    that this found to saturate the peer."""
    rate = float("inf") if args.request_rate is None else args.request_rate
    saturating = rate == float("inf")

    def at_rate(recording: Recording) -> None:
        for number in range(args.rounds):
            turns.take([(traced, rate) for traced in traces], number, "offline" if saturating else "server")

    def below(recording: Recording) -> None:
        most = saturation(turns.rows if args.peer_saturated is None else earlier, args.peer)
        paced = [(traced, args.peer_load * most[traced[0]]) for traced in traces if traced[0] in most]
        turns.take(paced, 0, "server")

    if args.peer_saturated is not None:
        earlier = load(args.peer_saturated)["results"]["runs"]
        if missing := sorted({name for name, _ in traces} - saturation(earlier, args.peer).keys()):
            raise ConfigError(f"{args.peer_saturated} does not say what saturates {args.peer} of {', '.join(missing)}")
        return {"below_saturation": below}
    paced = {"below_saturation": below} if saturating and args.peer_load else {}
    return {"at_once" if saturating else "at_rate": at_rate, **paced}


def saturation(rows: Sequence[dict[str, Any]], peer: str) -> dict[str, float]:
    """Requests a second that the peer finished of each trace, all of which came at once."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if (row["engine"], row["request_rate"]) == (peer, "at once"):
            found.setdefault(row["trace"], []).append(row["request_throughput"])
    return {name: mean(rates) for name, rates in found.items()}


def compared(rows: Sequence[dict[str, Any]], peer: str) -> dict[str, Any]:
    """Ours over the peer's, turn by turn: throughput where everything came at once, latencies where it came at a rate;
    the mean of the rounds, and ``[least, most]`` where there were several."""
    out: dict[str, Any] = {}
    keys = ("trace", "request_rate", "round")
    beside = {tuple(row[key] for key in keys): row for row in rows if row["engine"] == peer}
    ours = [row for row in rows if row["engine"] == OURS]
    turns = [(row, beside[at]) for row in ours if (at := tuple(row[key] for key in keys)) in beside]
    for trace in dict.fromkeys(row["trace"] for row in rows):
        of = [(ours, theirs) for ours, theirs in turns if ours["trace"] == trace]
        at_once = [pair for pair in of if pair[0]["request_rate"] == "at once"]
        paced = [pair for pair in of if pair[0]["request_rate"] != "at once"]
        if at_once:
            _ratio(out, f"total_over_{peer}_{trace}", "total_token_throughput", at_once)
            _ratio(out, f"output_over_{peer}_{trace}", "output_throughput", at_once)
        if paced:
            out[f"request_rate_{trace}"] = float(paced[0][0]["request_rate"])
            for name in ("ttft", "itl"):
                _ratio(out, f"{name}_p99_over_{peer}_{trace}", f"p99_{name}_ms", paced)
    return out


def _ratio(out: dict[str, Any], name: str, figure: str, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    # A latency of nothing happens where all outputs are of one token.
    each = [ours[figure] / theirs[figure] for ours, theirs in pairs if theirs[figure]]
    if each:
        out[name] = mean(each)
    if len(each) > 1:
        out[f"{name}_spread"] = [min(each), max(each)]
