"""The part of `bench reuse` that measures the ways to a hit by the prefix's length: aliasing, copying, reading in the
owner's slot, computing anew; what each takes until the first token, and in a step; and which one the engine chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from trtllm_vattn.bench.publish.plots import pyplot, save
from trtllm_vattn.cache.prefix import Way
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.table import tabulate

MEASURED = (Way.ALIAS, Way.COPY, Way.TABLE, Way.NONE)
NAMES = {Way.ALIAS: "alias", Way.COPY: "copy", Way.TABLE: "reach", Way.NONE: "recompute"}
COLUMNS: dict[str, str | Callable[[Any], str]] = {
    "prefix tokens": "tokens",
    "way": "way",
    "first token ms": "first_ms:,.3f",
    "step ms": "step_ms:,.3f",
    "in all ms": "total_ms:,.2f",
    "chosen": lambda row: "*" if row["chosen"] else "",
}


def lengths_up_to(longest: int) -> list[int]:
    """Lengths of prefixes, powers of two."""
    return [1 << power for power in range(6, longest.bit_length()) if 1 << power < longest * 3 // 4]


def measure_ways(
    engine: Engine, vocab: int, lengths: Sequence[int], steps: int, repeats: int, seed: int
) -> list[dict[str, Any]]:
    """A row a length and way: milliseconds of a hit on a running sequence's prompt, alone beside that sequence, until
    its first token and in a step; in all, of the first token and of what `steps` steps take longer than a copy's."""
    random = np.random.default_rng(seed)
    prefixes = engine.slots.prefixes
    if prefixes is None:
        raise ConfigError("the engine keeps no prefixes, so that there are no ways to measure")
    all_ways, costs, rows = prefixes.ways, prefixes.costs, []
    for tokens in lengths:
        prompt = random.integers(0, vocab, tokens).tolist()
        # While it runs, nobody adopts its slot.
        owner = engine.submit(prompt, SamplingParams(engine.cache.shape.max_seq_len - tokens, ignore_eos=True))
        while not engine.scheduler.requests[owner].chosen:
            engine.step()
        found: dict[Way, tuple[float, float]] = {}
        # Whatever it costs, it is measured.
        prefixes.costs = replace(costs, table_step_us=0, prefill_tokens_per_s=1)
        for way in MEASURED:
            if way is Way.NONE or way in all_ways:
                prefixes.ways = frozenset({way}) - {Way.NONE}
                turns = [_hit(engine, vocab, prompt, steps, random, way) for _ in range(repeats + 1)][1:]
                if taken := [turn for turn in turns if turn is not None]:
                    first, step = np.median(np.array(taken), axis=0).tolist()
                    found[way] = first, step
        prefixes.ways, prefixes.costs = all_ways, costs
        before = dict(prefixes.stats.ways)
        _hit(engine, vocab, prompt, steps, random, None)
        chosen = next(Way(way) for way, n in prefixes.stats.ways.items() if n > before.get(way, 0))
        engine.abort(owner)
        base = found.get(Way.COPY, next(iter(found.values())))[1]
        for way, (first, step) in found.items():
            total = first + steps * max(0.0, step - base)
            rows.append(
                {"tokens": tokens, "way": NAMES[way], "first_ms": first, "step_ms": step, "total_ms": total}
                | {"chosen": way is chosen}
            )
    return rows


def _hit(
    engine: Engine, vocab: int, prompt: list[int], steps: int, random: np.random.Generator, way: Way | None
) -> tuple[float, float] | None:
    """One hit by a way: milliseconds until its first token, and of a step; None where another way was taken."""
    prefixes = engine.slots.prefixes
    assert prefixes is not None
    before = 0 if way is None else prefixes.stats.ways[way.value]
    turn = [*prompt, *random.integers(0, vocab, 2).tolist()]
    started = perf_counter()
    number = engine.submit(turn, SamplingParams(steps, ignore_eos=True))
    times = []
    while number in engine.scheduler.requests:
        if any(event.request == number for event in engine.step()):
            times.append(perf_counter())
    if way is not None and prefixes.stats.ways[way.value] == before:
        return None
    return 1e3 * (times[0] - started), 1e3 * float(np.median(np.diff(times)))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The least of lengths from which on each way is the cheapest, and how near the engine's choice comes to that."""
    out: dict[str, Any] = {}
    ratios = []
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        those = [row for row in rows if row["tokens"] == tokens]
        best = min(those, key=lambda row: row["total_ms"])
        out.setdefault(f"{best['way']}_is_cheapest_from_tokens", tokens)
        ratios += [row["total_ms"] / best["total_ms"] for row in those if row["chosen"]]
    if ratios:
        out["chosen_way_over_cheapest"] = float(np.median(ratios))
    step = {(row["tokens"], row["way"]): row["step_ms"] for row in rows}
    longer = [
        step[tokens, "reach"] - ms for (tokens, way), ms in step.items() if way == "copy" and (tokens, "reach") in step
    ]
    if longer:
        out["reach_step_longer_us"] = 1e3 * float(np.median(longer))
    return out


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    return tabulate(rows, COLUMNS)


def plot_ways(result: dict[str, Any], path: Path) -> None:
    """Draw a `bench reuse` result: what each way to a hit takes by the prefix's length, and what was chosen. Raises
    ConfigError without matplotlib."""
    figure, axis = pyplot().subplots(figsize=(8, 5), layout="constrained")
    rows = result["results"]["ways"]
    for way in dict.fromkeys(row["way"] for row in rows):
        those = [row for row in rows if row["way"] == way]
        axis.plot([row["tokens"] for row in those], [row["total_ms"] for row in those], marker=".", label=way)
    chosen = [row for row in rows if row["chosen"]]
    tokens, totals = ([row[name] for row in chosen] for name in ("tokens", "total_ms"))
    axis.scatter(tokens, totals, s=90, facecolors="none", edgecolors="black", label="chosen")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens of the prefix")
    axis.set_ylabel("ms until the first token, and more in later steps")
    axis.legend()
    save(figure, result, path)
