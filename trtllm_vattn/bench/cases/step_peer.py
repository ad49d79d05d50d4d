"""`bench graph --peer`: the captured decode step beside another engine's, in turns on one device.

A step is the time from one step's tokens to the next's as whoever asked for them sees it, in steps in which every
sequence decodes; sequences have `context` tokens on average over the steps. Both engines have the same bytes of KV and
the same shape of model with random weights.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from transformers import PreTrainedModel

from trtllm_vattn.bench.cases.serve_peer import OURS, give_back, together
from trtllm_vattn.bench.harness.case import vocab_of
from trtllm_vattn.bench.harness.contenders import Contest, take_turns
from trtllm_vattn.bench.harness.peer import Peer, opener, write_config
from trtllm_vattn.bench.harness.recording import Part, Recording
from trtllm_vattn.bench.harness.timing import summarise
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import VattnError
from trtllm_vattn.machine import versions
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.table import tabulate

UNTIMED = 4
"""Decode steps of ours before the timed ones; a peer leaves out as many as its last prompt has a shadow."""
COLUMNS = {
    "batch": "batch",
    "engine": "engine",
    "round": "round",
    "tokens": "mean_length:,.0f",
    "step p50 ms": "step_ms.p50:.3f",
    "p90": "step_ms.p90:.3f",
    "p99": "step_ms.p99:.3f",
}


class Steps:
    """Times steps of our engine and of the peer's. The peer is kept where both lie on the device at once."""

    def __init__(
        self, model: PreTrainedModel, args: argparse.Namespace, make: Callable[[], Peer], folder: Path
    ) -> None:
        self._model, self._args, self._make, self._folder = model, args, make, folder
        # As much as the largest batch takes at its longest: the first decode while the last go in.
        most = max(args.batch_sizes)
        longest = args.context + args.steps + most * args.context // 8192 + 64
        self.budget = most * longest * shape_of(model, 1, longest).token_bytes
        self._longest = longest
        self._together = together(model, argparse.Namespace(device=args.device, budget=self.budget))
        self._peer: Peer | None = None
        self.settings: dict[str, Any] = {}

    def ours(self, batch: int) -> tuple[list[float], float]:
        """Milliseconds of each step, and how long sequences were in the middle of them."""
        args = self._args
        context = max(1, args.context - args.steps // 2 - UNTIMED - batch // 2)
        tokens = args.steps + 2 * UNTIMED + batch + 8
        cache = make_cache(OURS, shape_of(self._model, batch, context + tokens), args.device)
        engine = Engine(
            self._model, cache, prefix_cache=False, attention=args.attention, buckets=[batch], chunk=max(2048, context)
        )
        with Contest(batch, context, tokens, args.seed) as contest:
            contest.add(OURS, engine)
            take_turns(contest.contenders, 1, args.steps, f"batch {batch}", UNTIMED)
            (contender,) = contest.contenders
            taken = [1e3 * seconds for seconds in contender.samples("wall_s")]
        give_back()
        return taken, contender.tokens[0]

    def theirs(self, batch: int) -> tuple[list[float], float]:
        """The same of the peer. Raises VattnError where the batch never decoded as a whole."""
        args = self._args
        if self._peer is None:
            self._peer = self._make()
            asked = {"folder": str(self._folder), "kv_bytes": self.budget, "max_model_len": self._longest}
            made = self._peer.ask("start", kind="offline", seed=args.seed, **asked)
            self.settings = {**made["settings"], "start_s": made["seconds"]}
            self._decode(1)
        found = self._decode(batch)
        if not found:
            raise VattnError(f"{args.peer} never decoded {batch} sequences in one step; give more --steps")
        if not self._together:
            self.close()
        return found, args.context

    def _decode(self, batch: int) -> list[float]:
        assert self._peer is not None
        args = self._args
        asked = {"batch": batch, "context": args.context, "steps": args.steps, "vocab": vocab_of(self._model)}
        found: list[float] = self._peer.ask("decode", **asked)["step_ms"]
        return found

    def close(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None


def run(args: argparse.Namespace) -> int:
    """Run the comparison."""
    make = opener(args)
    with make() as peer:  # whether it is there, before anything takes long
        told = peer.versions
    recording = Recording("graph", args)
    recording.sum_up(peer=f"{args.peer} {told[args.peer]}")
    model, results = recording.model, recording.results
    results["versions"] = {OURS: versions(), args.peer: told}
    with tempfile.TemporaryDirectory() as folder:
        write_config(model, Path(folder))
        steps = Steps(model, args, make, Path(folder))

        def of(batch: int) -> Part:
            def measure(recording: Recording) -> Iterator[dict[str, Any]]:
                for number in range(args.rounds):
                    for name, timed in ((OURS, steps.ours), (args.peer, steps.theirs)):
                        taken, length = timed(batch)
                        row = {"batch": batch, "engine": name, "round": number, "mean_length": length}
                        recording.add("runs", {**row, "step_ms": summarise(taken)})
                    results["settings"] = {args.peer: steps.settings}
                    yield compared([row for row in results["runs"] if row["batch"] == batch], args.peer)

            return measure

        try:
            recording.measure({f"batch_{batch}": of(batch) for batch in args.batch_sizes})
        finally:
            steps.close()
    return recording.conclude(tabulate(results.get("runs", []), COLUMNS))


def compared(rows: list[dict[str, Any]], peer: str) -> dict[str, Any]:
    """By batch: each engine's median step over its rounds, and ours over the peer's in the same round: the median, and
    ``[least, most]``."""
    out: dict[str, Any] = {}
    for batch in dict.fromkeys(row["batch"] for row in rows):
        steps = {
            name: [row["step_ms"]["p50"] for row in rows if (row["batch"], row["engine"]) == (batch, name)]
            for name in (OURS, peer)
        }
        ratios = [ours / theirs for ours, theirs in zip(steps[OURS], steps[peer], strict=True)]
        out[f"step_over_{peer}_{batch}"] = median(ratios)
        out[f"step_over_{peer}_{batch}_spread"] = [min(ratios), max(ratios)]
        for name, each in steps.items():
            out[f"step_ms_{name}_{batch}"] = median(each)
    return out
