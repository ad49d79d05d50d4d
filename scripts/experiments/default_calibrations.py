"""Derives the package's default calibrations from recorded results.

``python scripts/experiments/default_calibrations.py`` writes them into the package.

The H200's numbers come from results in scripts/results/h200, each of them named; what is kept out to hold the formulas
against is listed in tests/planner/test_recorded.py. The H100's are the H200's, with rates of memory scaled by the data
sheets (3.35 against 4.8 TB/s; the processors are the same), all of them estimated.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from trtllm_vattn.planner import ModelShape
from trtllm_vattn.planner.calibration import DATA, QUANTITIES, Calibration, Curve, save
from trtllm_vattn.runtime.models import SHAPES

RESULTS = Path(__file__).parents[1] / "results" / "h200"
PAGE, EXTENT = 2 << 20, 64 << 20
MEMORY_RATIO = 3.35 / 4.8
"""Bandwidth of an H100 SXM's memory over an H200's, by NVIDIA's data sheets."""
BURSTS = ("burst_rows_8_1", "burst_rows_8_2", "burst_rows_8_3")
SOLVED_ROWS = (1, 8, 32, 128, 256)
WEIGHTS = {
    short: ModelShape.from_config(name, SHAPES[name]).weight_bytes
    for short, name in (("8b", "llama-3-8b"), ("1b", "llama-3.2-1b"))
}
"""Bytes that a step of a model reads: layers and output."""
PASS_LAYER_US = 126.0
"""A layer's other kernels at 2,048 rows, by their bytes: 168 KB a row at 4 TB/s, and 40 us of launches."""

Rows = list[dict[str, Any]]


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def bursts(variant: str) -> Rows:
    return [row for name in BURSTS for row in result(name)["results"]["bursts"] if row["variant"] == variant]


def calls(name: str, source: dict[str, Any]) -> list[list[float]]:
    """Isolated calls by size, p50."""
    rows = [r for r in source["calls"] if (r["how"], r["busy"], r["call"]) == ("one by one", False, name)]
    return [[r["size"], r["us"]["p50"]] for r in rows]


def burst_calls(call: str) -> list[list[float]]:
    """Microseconds a handle in bursts: of single pages, and of extents of 64 MiB."""
    found = []
    for size, variant in ((PAGE, "page by page"), (EXTENT, "vattn, cold")):
        rows = bursts(variant)
        found.append([size, median(1e3 * r["driver_ms"][call] / r["driver_calls"]["map"] for r in rows)])
    return found


def host_of_admission() -> tuple[float, float]:
    """Microseconds a prompt and a mapping, without driver calls: two kinds of burst, two unknowns."""

    def rest(variant: str) -> tuple[float, float]:
        rows = bursts(variant)
        return (median(1e3 * (r["window_ms"] - r["map_ms"]) for r in rows), rows[0]["mappings"])

    (few_us, few), (many_us, many) = rest("vattn, warm stock"), rest("page by page")
    mapping = (many_us - few_us) / (many - few)
    return (few_us - few * mapping) / 128, mapping


def steps(name: str) -> dict[int, float]:
    """Milliseconds of captured steps by batch, p50."""
    rows = result(name)["results"]["steady"]["runs"]
    return {r["batch"]: r["step_ms"]["p50"] for r in rows if (r["cache"], r["mode"]) == ("vattn", "captured")}


def attention(name: str) -> dict[int, tuple[float, float]]:
    """Microseconds and bytes a layer by batch."""
    rows = result(name)["results"]["steady"]["attention"]
    return {r["batch"]: (r["layer_us"]["p50"], r["layer_bytes"]) for r in rows if r["cache"] == "vattn"}


def products() -> tuple[list[list[float]], list[list[float]], float]:
    """Rates of weights, and microseconds of a layer's rest, by rows; and of a short prompt's attention.

    Two models of known depth and bytes give two equations for the two unknowns: t = W / rate + L rest + L attention.
    """
    rates, rests = [], []
    step8, step1 = steps("graph_batches"), steps("graph_small")
    att8, att1 = attention("graph_batches"), attention("graph_small")
    for rows in SOLVED_ROWS:
        of8, of1 = 1e3 * step8[rows] - 32 * att8[rows][0], 1e3 * step1[rows] - 16 * att1[rows][0]
        rate = (WEIGHTS["8b"] - 2 * WEIGHTS["1b"]) / (of8 - 2 * of1)
        rates.append([rows, 1e6 * rate])
        rests.append([rows, (of1 - WEIGHTS["1b"] / rate) / 16])
    short8, short1 = (
        {r["tokens"]: 1e3 * r["replay_ms"]["p50"] for r in result(name)["results"]["steady"]["prompts"]}
        for name in ("graph_batches", "graph_small")
    )

    def both(rows: int) -> tuple[float, float]:
        rate = (WEIGHTS["8b"] - 2 * WEIGHTS["1b"]) / (short8[rows] - 2 * short1[rows])
        return rate, (short1[rows] - WEIGHTS["1b"] / rate) / 16

    prompt_us = both(256)[1] - rests[-1][1]
    rate, rest = both(512)
    rates.append([512, 1e6 * rate])
    rests.append([512, max(rests[-1][1], rest - prompt_us)])
    pass_us = median(1e3 * r["prefill_ms"]["p50"] for r in bursts("contiguous") + bursts("vattn, warm stock"))
    flops = prompt_flops()
    of_attention = prompt_us + 1e6 * (2048 * 1024) * 16384 / flops
    rates.append([2048, 1e6 * WEIGHTS["8b"] / (pass_us - 32 * (PASS_LAYER_US + of_attention))])
    rests.append([2048, PASS_LAYER_US])
    return rates, rests, prompt_us


def prompt_flops() -> float:
    """Operations a second, from chunks of 2,048 rows that end at 2,048 and at 32,768 tokens."""
    us = {r["point"]: r["prefill_us"]["p50"] for r in result("attention")["results"]["points"] if r["system"] == "flat"}
    pairs = {"128 x 2048": 2048 * 1024, "1 x 32768": 2048 * (32768 - 1024)}
    more: float = us["1 x 32768"] - us["128 x 2048"]
    return 1e6 * 16384 * (pairs["1 x 32768"] - pairs["128 x 2048"]) / more


def tlb() -> tuple[float, float, float]:
    """Reach in bytes, and nanoseconds a miss in order and scattered: reads of 512 bytes over 110 and 130 GB."""
    reads = result("tlb")["results"]["reads"]
    picked = {
        (r["order"], round(r["working_set_gb"])): r
        for r in reads
        if (r["read_bytes"], r["layers_per_range"]) == (512, 32)
    }

    def each(order: str) -> tuple[float, float]:
        (s1, t1), (s2, t2) = (
            (1e9 * r["working_set_gb"], 512 / r["gb_per_s"]) for r in (picked[order, 110], picked[order, 130])
        )
        # t = w (1 - R / s) at two working sets.
        reach = (t2 - t1) / (t2 / s1 - t1 / s2)
        return reach, t2 / (1 - reach / s2)

    reach, scattered = each("scattered")
    return reach, each("in order")[1], scattered


def row_factors() -> list[list[float]]:
    rows = [r for r in result("graph_rows_8")["results"]["steady"]["layers"] if r["batch"] == 128]
    rates = {r["layers_per_range"]: r["bytes_per_s"]["p50"] for r in rows}
    return [[4096 * g, rates[g] / rates[1]] for g in sorted(rates)]


def h200() -> Calibration:
    """The H200's numbers."""
    alloc = result("alloc")["results"]
    att = attention("graph_batches")
    factors = row_factors()
    # Two points, with rows of 64 KiB.
    (us1, b1), (us2, b2) = att[1], att[128]
    rate = 1e6 * (b2 - b1) / (us2 - us1)
    factor = dict((int(x), y) for x, y in factors)[64 << 10]
    rates, rests, prompt_us = products()
    reach, walk, scattered = tlb()
    admit, mapping = host_of_admission()
    host = {r["batch"]: r["host_us_a_step"]["p50"] for r in result("multistep")["results"]["runs"] if r["steps"] == 1}
    busy = {
        r["call"]: r["us"]["p99"]
        for r in alloc["calls"]
        if (r["how"], r["busy"], r["size"]) == ("one by one", True, PAGE)
    }
    in_bursts = "burst_rows_8_{1,2,3}.json: page by page, and 'vattn, cold', median of all rounds"
    solved = (
        "solved from steps of graph_batches.json (8B) and graph_small.json (1B), of up to 256 rows, and their prompts "
        "of 512; 2048: prompts of burst_rows_8_{1,2,3}.json"
    )
    values: dict[str, tuple[Any, str]] = {
        "create_us": (burst_calls("create"), in_bursts),
        "map_us": (burst_calls("map"), in_bursts),
        "set_access_us": (burst_calls("set_access"), in_bursts),
        "unmap_us": (calls("unmap", alloc), "alloc.json, one by one, idle, p50"),
        "release_us": (calls("release", alloc), "alloc.json, one by one, idle, p50"),
        "page_beside_us": (sum(busy[c] for c in ("create", "map", "set_access")), "alloc.json, busy, 2 MiB, p99"),
        "admit_us": (admit, "burst_rows_8_{1,2,3}.json: window less driver calls, two kinds of burst"),
        "mapping_us": (mapping, "burst_rows_8_{1,2,3}.json: window less driver calls, two kinds of burst"),
        "host_us": (host[1] - (host[32] - host[1]) / 31, "multistep.json, one step a launch, batches of 1 and 32"),
        "host_lane_us": ((host[32] - host[1]) / 31, "multistep.json, one step a launch, batches of 1 and 32"),
        "read_bytes_per_s": (
            result("graph_batches")["results"]["steady"]["read_limit_bytes_per_s"],
            "graph_batches.json, read limit",
        ),
        "copy_bytes_per_s": (2e12, "measured once: 2 GB on the device in a millisecond; no result file"),
        "tlb_reach_bytes": (reach, "tlb.json: reads of 512 B, scattered, 32 layers a row, over 110 and 130 GB"),
        "tlb_walk_ns": (walk, "tlb.json: the same, in order"),
        "tlb_walk_scattered_ns": (scattered, "tlb.json: the same, scattered"),
        "attention_us": (us1 - 1e6 * b1 / rate, "graph_batches.json, attention alone, batches of 1 and 128"),
        "attention_bytes_per_s": (rate / factor, "graph_batches.json, attention alone, batches of 1 and 128"),
        "attention_row_factor": (
            factors,
            "graph_rows_8.json, attention alone, batch of 128, over that of 1 layer a row",
        ),
        "attention_batch_factor": ([[128, 1.0]], "attention_bytes_per_s is that of a batch of 128"),
        "prompt_attention_us": (prompt_us, "graph_batches.json, graph_small.json: prompts of 256 beside steps of 256"),
        "prompt_attention_flops_per_s": (prompt_flops(), "attention.json, flat, chunks at 2,048 and at 32,768"),
        "weights_bytes_per_s": (rates, solved),
        "layer_us": (rests, f"{solved}, where it is by bytes moved, not measured"),
    }
    about = {
        "gpu": result("alloc")["machine"]["gpu"],
        "versions": result("graph_batches")["versions"],
        "date": result("graph_batches")["started"][:10],
        "command": "python scripts/experiments/default_calibrations.py",
    }
    return _made("h200", about, values)


def _made(card: str, about: dict[str, Any], values: dict[str, tuple[Any, str]]) -> Calibration:
    numbers = {name: float(_short(values[name][0])) for name, (is_curve, _) in QUANTITIES.items() if not is_curve}
    curves = {
        name: Curve(tuple((float(x), _short(y)) for x, y in values[name][0]))
        for name, (is_curve, _) in QUANTITIES.items()
        if is_curve
    }
    return Calibration(card, PAGE, about, numbers, curves, {name: source for name, (_, source) in values.items()})


def _short(value: float) -> float:
    """Four digits, more than any of them was measured to."""
    return float(f"{value:.4g}")


def h100(of: Calibration) -> Calibration:
    """The H100's numbers, by the H200's: rates of memory scaled, all else the same."""
    scaled = {"read_bytes_per_s", "copy_bytes_per_s", "attention_bytes_per_s"}

    def slower(rows_rate: tuple[float, float]) -> tuple[float, float]:
        rows, rate = rows_rate
        # What is bound by memory; the products of many rows are bound by the processors, which are the same.
        return rows, _short(min(rate, MEMORY_RATIO * of.curves["weights_bytes_per_s"](1)))

    numbers = {name: _short(value * (MEMORY_RATIO if name in scaled else 1)) for name, value in of.numbers.items()}
    curves = {**of.curves, "weights_bytes_per_s": Curve(tuple(map(slower, of.curves["weights_bytes_per_s"].points)))}
    ratio = "the H200's, by memory bandwidth of the data sheets (3.35 / 4.8 TB/s)"
    sources = {
        name: ratio if name in scaled or name == "weights_bytes_per_s" else "the H200's; the processor is the same"
        for name in QUANTITIES
    }
    about = {"gpu": None, "versions": {}, "date": of.about["date"], "command": of.about["command"]}
    return Calibration("h100", PAGE, about, numbers, curves, sources, frozenset(QUANTITIES))


MADE: dict[str, Callable[[], Calibration]] = {"h200": h200, "h100": lambda: h100(h200())}

if __name__ == "__main__":
    for card, make in MADE.items():
        save(make(), DATA / f"{card}.json")
