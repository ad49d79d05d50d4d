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

from trtllm_vattn.bench.cases.serve_peer import OURS, Theirs, together
from trtllm_vattn.bench.harness.case import Part, Recording, engine_for, give_back, vocab_of
from trtllm_vattn.bench.harness.contenders import Contest, take_turns
from trtllm_vattn.bench.harness.peer import Peer, opener, versions_of, write_config
from trtllm_vattn.bench.harness.timing import summarise
from trtllm_vattn.errors import VattnError
from trtllm_vattn.machine import versions
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.table import tabulate

UNTIMED = 4
"""Decode steps of ours before the timed ones; a peer leaves out as many as its last prompt has a shadow."""
COLUMNS = "batch engine round mean_length step_ms.p50 step_ms.p90 step_ms.p99"


class Steps:
    """Times steps of our engine and of the peer's. The peer is kept where both lie on the device at once."""

    def __init__(
        self, model: PreTrainedModel, args: argparse.Namespace, make: Callable[[], Peer], folder: Path
    ) -> None:
        self._model, self._args = model, args
        # As much as the largest batch takes at its longest: the first decode while the last go in.
        most = max(args.batch_sizes)
        longest = args.context + args.steps + most * args.context // 8192 + 64
        budget = most * longest * shape_of(model, 1, longest).token_bytes
        self._together = together(model, argparse.Namespace(device=args.device, budget=budget))
        self._theirs = Theirs(args, make, folder, budget, longest)

    def ours(self, batch: int) -> tuple[list[float], float]:
        """Milliseconds of each step, and how long sequences were in the middle of them."""
        args = self._args
        context = max(1, args.context - args.steps // 2 - UNTIMED - batch // 2)
        tokens = args.steps + 2 * UNTIMED + batch + 8
        options = {"attention": args.attention, "buckets": [batch], "chunk": max(2048, context)}
        engine = engine_for(self._model, args.device, batch, context + tokens, **options)
        with Contest(batch, context, tokens, args.seed) as contest:
            contest.add(OURS, engine)
            take_turns(contest.contenders, 1, args.steps, f"batch {batch}", UNTIMED)
            (contender,) = contest.contenders
            taken = [1e3 * seconds for seconds in contender.samples("wall_s")]
        give_back()
        return taken, contender.tokens[0]

    def theirs(self, batch: int) -> tuple[list[float], float]:
        """The same of the peer. Raises VattnError where the batch never decoded as a whole."""
        args, theirs = self._args, self._theirs
        if not theirs.is_there:
            theirs.start("offline")
            self._decode(1)
        found = self._decode(batch)
        if not found:
            raise VattnError(f"{args.peer} never decoded {batch} sequences in one step; give more --steps")
        if not self._together:
            theirs.stop()
        return found, args.context

    @property
    def settings(self) -> dict[str, Any]:
        """What the peer made of its defaults, and the seconds of its start."""
        return {**self._theirs.settings["offline"], "start_s": self._theirs.start_s["offline"]}

    def _decode(self, batch: int) -> list[float]:
        args = self._args
        asked = {"batch": batch, "context": args.context, "steps": args.steps, "vocab": vocab_of(self._model)}
        found: list[float] = self._theirs.peer.ask("decode", **asked)["step_ms"]
        return found

    def close(self) -> None:
        self._theirs.stop()


def run(args: argparse.Namespace) -> int:
    """Run the comparison."""
    told, make = versions_of(args), opener(args)
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
