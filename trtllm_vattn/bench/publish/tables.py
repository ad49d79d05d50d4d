"""The tables of the documents, each made from the results of one card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.table import table, tabulate

Result = dict[str, Any]
Columns = dict[str, str | Callable[[Any], str]]


def spread(sample: dict[str, float], digits: int = 2) -> str:
    """Median and 99th percentile."""
    return f"{sample['p50']:,.{digits}f} / {sample['p99']:,.{digits}f}"


def steady(result: Result) -> str:
    """Decode steps of all combinations; a row a batch size and mode."""
    runs = result["results"]["steady"]["runs"]
    step = {(row["cache"], row["mode"], row["batch"]): row["step_ms"] for row in runs}
    caches = list(dict.fromkeys(row["cache"] for row in runs))
    rows = []
    for mode in ("eager", "captured"):
        for batch in sorted({row["batch"] for row in runs}):
            each = [step[cache, mode, batch] for cache in caches]
            ours = step["vattn", mode, batch]["p50"]
            ratio = f"{ours / step['contiguous', mode, batch]['p50']:.3f}"
            rows.append([mode, str(batch), *map(spread, each), ratio])
    return table(["mode", "sequences", *(f"{cache}, ms p50 / p99" for cache in caches), "vattn / contiguous"], rows)


def batches(result: Result) -> str:
    """Eager against captured steps of one cache, with the share of an eager step that the device idles."""
    rows = result["results"]["steady"]["runs"]
    found = {(row["mode"], row["batch"]): row for row in rows}
    lines = []
    for batch in sorted({row["batch"] for row in rows}):
        eager, captured = found["eager", batch], found["captured", batch]
        steps = [eager["step_ms"], captured["step_ms"]]
        gain = f"{steps[0]['p50'] / steps[1]['p50']:.1f}"
        # A little below nothing is nothing, without a sign.
        shares = [row["idle_share"] for row in (eager, captured)]
        idle = ["-" if share is None else f"{round(share, 2) + 0:.0%}" for share in shares]
        lines.append([str(batch), *map(spread, steps), gain, *idle])
    header = ["sequences", "eager, ms p50 / p99", "captured, ms p50 / p99", "eager / captured"]
    return table([*header, "device idle, eager", "captured"], lines)


def prompts(result: Result) -> str:
    """Short prompts by a pass and by a replay."""
    columns: Columns = {
        "prompt tokens": "tokens",
        "pass, ms p50 / p99": lambda row: spread(row["pass_ms"]),
        "replay, ms p50 / p99": lambda row: spread(row["replay_ms"]),
        "pass / replay": lambda row: f"{row['pass_ms']['p50'] / row['replay_ms']['p50']:.1f}",
    }
    return tabulate(result["results"]["steady"]["prompts"], columns)


def _over_rounds(values: list[float], digits: int) -> str:
    """The mean, with the least and the most where there was more than one round."""
    middle = f"{sum(values) / len(values):,.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def serve(result: Result) -> str:
    """Throughput of every cache over all rounds, ours over it round by round, and latencies' medians over rounds."""
    rounds: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(result["results"]["runs"], key=lambda row: row["round"]):
        rounds.setdefault(row["cache"], []).append(row)
    lines = []
    for cache, rows in rounds.items():
        pairs = [
            spread({p: median(row[name][p] for row in rows) for p in ("p50", "p99")}, 0)
            for name in ("ttft_ms", "itl_ms")
        ]
        rates = [
            _over_rounds([row[name] for row in rows], 0) for name in ("output_throughput", "total_token_throughput")
        ]
        over = [
            ours["output_throughput"] / row["output_throughput"]
            for ours, row in zip(rounds["vattn"], rows, strict=True)
        ]
        lines.append([cache, *rates, *pairs, f"{rows[0]['mean_sequences']:.1f}", _over_rounds(over, 2)])
    header = ["cache", "output tok/s", "total tok/s", "TTFT, ms p50 / p99", "ITL, ms p50 / p99", "sequences"]
    return table([*header, "vattn's output over it"], lines)


BESIDE = {
    "total_token_throughput": "total tokens a second",
    "output_throughput": "output tokens a second",
    "median_ttft_ms": "TTFT p50, ms",
    "p99_ttft_ms": "TTFT p99, ms",
    "median_tpot_ms": "TPOT p50, ms",
    "median_itl_ms": "ITL p50, ms",
    "p99_itl_ms": "ITL p99, ms",
    "p99_e2el_ms": "E2EL p99, ms",
}


def serve_beside(result: Result) -> str:
    """Each figure of ours beside the peer's, by trace and rate: means over the rounds, and of the rounds' ratios."""
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in result["results"]["runs"]:
        group = groups.setdefault((row["trace"], row["request_rate"]), {})
        group.setdefault(row["engine"], []).append(row)
    lines, names = [], ["vattn", "peer"]
    for (trace, rate), engines in groups.items():
        if len({len(rows) for rows in engines.values()}) != 1 or len(engines) != 2:
            # A run that was cut off.
            continue
        names, (ours, theirs) = list(engines), engines.values()
        for figure, label in BESIDE.items():
            pairs = [(one[figure], other[figure]) for one, other in zip(ours, theirs, strict=True)]
            means = [f"{sum(each) / len(each):,.1f}" for each in zip(*pairs, strict=True)]
            over = "-" if not all(other for _, other in pairs) else _over_rounds([a / b for a, b in pairs], 3)
            lines.append([trace, rate, label, *means, over])
    return table(["trace", "requests a second", "figure", *names, f"{names[0]} / {names[1]}"], lines)


def steps_beside(result: Result) -> str:
    """The captured step beside the peer's: medians over the rounds, and the rounds' ratios."""
    summary = result["summary"]
    names = list(dict.fromkeys(row["engine"] for row in result["results"]["runs"]))
    ours, theirs = names
    lines = []
    for batch in dict.fromkeys(row["batch"] for row in result["results"]["runs"]):
        least, most = summary[f"step_over_{theirs}_{batch}_spread"]
        steps = [f"{summary[f'step_ms_{name}_{batch}']:.3f}" for name in names]
        lines.append([str(batch), *steps, f"{summary[f'step_over_{theirs}_{batch}']:.3f} ({least:.3f} to {most:.3f})"])
    return table(["sequences", f"{ours}, ms", f"{theirs}, ms", f"{ours} / {theirs}, least to most"], lines)


def policies(result: Result) -> str:
    """Steps under each policy of mapping, and over those of the cache that was mapped whole before."""
    rows = result["results"]["runs"]
    none = rows[0]["step_ms"]
    columns: Columns = {"mapping": "policy", "step p50, ms": "step_ms.p50:.3f", "p99, ms": "step_ms.p99:.3f"}
    for p in ("p50", "p99"):
        columns[f"{p} over no mapping"] = lambda row, p=p: f"{row['step_ms'][p] / none[p]:.3f}"  # type: ignore[misc]
    return tabulate(rows, {**columns, "mappings": "mappings"})


def layers(result: Result) -> str:
    """Attention's bandwidth alone by layers that share a row."""
    limit = result["results"]["steady"]["read_limit_bytes_per_s"]
    found = result["results"]["steady"]["layers"]
    batches = sorted({row["batch"] for row in found})
    rows = []
    for g in sorted({row["layers_per_range"] for row in found}):
        rates = {row["batch"]: row["bytes_per_s"]["p50"] for row in found if row["layers_per_range"] == g}
        rows.append([str(g), *(f"{rates[b] / 1e9:,.0f} ({100 * rates[b] / limit:.0f} %)" for b in batches)])
    return table(["layers a range", *(f"{batch} sequences, GB/s (of the read limit)" for batch in batches)], rows)


def _crossed(corner: str, cells: dict[tuple[str, str], str]) -> str:
    """Cells by row and column."""
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in range(2))
    return table([corner, *columns], [[row, *(cells[row, column] for column in columns)] for row in rows])


def fragmentation(result: Result) -> str:
    """Mapped bytes that hold no token, surplus included, and concurrent sequences, of every system on every mix."""
    rows = result["results"]["runs"]
    shown = [f"{row['waste_with_surplus']:.1%}, {row['mean_sequences']:.1f}" for row in rows]
    return _crossed("system", {(row["system"], row["mix"]): cell for row, cell in zip(rows, shown, strict=True)})


def planned_memory(result: Result) -> str:
    """Waste and sequences at once of the cache in virtual time, and as planned."""
    columns = {"trace": "trace", "requests": "requests", "layers a row": "layers_per_range", "waste": "waste:.2%"}
    columns |= {"planned waste": "planned_waste:.2%", "sequences at once": "capacity:.2f"}
    columns["planned sequences"] = "planned_capacity:.2f"
    return tabulate(result["results"]["memory"], columns)


def attention(result: Result) -> str:
    """Decode attention by point and system; points that failed are left out."""
    cells = {
        (row["point"], f"{row['system']}, us (GB/s)"): f"{row['layer_us']['p50']:.1f} "
        f"({row['bytes_per_s']['p50'] / 1e9:,.0f})"
        for row in result["results"]["points"]
        if "refused" not in row
    }
    return _crossed("sequences x tokens", cells)


def bandwidths(result: Result) -> str:
    """Decode attention in the largest working set of each context, with the least and the most that was seen."""
    rows = result["results"]["attention"]
    largest: dict[int, float] = {}
    for row in rows:
        largest[row["context"]] = max(row["working_set_gb"], largest.get(row["context"], 0))
    cells = {}
    for row in rows:
        if row["working_set_gb"] < largest[row["context"]]:
            continue
        middle, least, most = (f"{row['bytes_per_s'][name] / 1e9:,.0f}" for name in ("p50", "min", "max"))
        point = f"{row['sequences']} x {row['context']}, {row['working_set_gb']:.0f} GB"
        cells[row["system"], point] = f"{middle} ({least} to {most})"
    return _crossed("system, GB/s", cells)


def wakes(result: Result) -> str:
    """Sleeps without keys and values, and how long they take to be there again, with the driver calls of that."""
    columns: Columns = {
        "wakes": "wakes",
        "GB": lambda row: f"{row['bytes'] / 1e9:.1f}",
        "there again, ms": lambda row: f"{1e3 * (row['wake_s'] + row['fill_s']):.0f}",
        "extents": "created",
    }
    for heading, name in (("creating, ms", "create_s"), ("mapping", "map_s"), ("setting access", "set_access_s")):
        columns[heading] = lambda row, name=name: f"{1e3 * row[name]:.0f}"  # type: ignore[misc]
    return tabulate([row for row in result["results"]["sleeps"] if row["kv"] == "drop"], columns)


def phases(result: Result) -> str:
    """Seconds of a warm start, phase by phase."""
    rows = [row for row in result["results"]["phases"] if row["start"] == "warm"]
    return tabulate(rows, {"phase": "phase", "s": "seconds:.2f"})


def figures(result: Result) -> str:
    """The summary, as it stands in the JSON."""
    rows = [[name, f"{v:,.4g}" if isinstance(v, float) else str(v)] for name, v in result["summary"].items()]
    return table(["figure", "value"], rows)


def picked(names: str) -> Callable[[Result], str]:
    """Some figures of the summary: those that say something on the machine they come from."""
    return lambda result: figures({"summary": {name: result["summary"][name] for name in names.split()}})


def headline(graph: Result, burst: Result, soak: Result, start: Result) -> str:
    """The four rows of the README: a captured step, a burst, the soak, a start."""
    rows = graph["results"]["steady"]["runs"]
    steps = {(r["cache"], r["batch"]): r["step_ms"]["p50"] for r in rows if r["mode"] == "captured"}
    sizes = [batch for batch in (1, 32, 128) if ("vattn", batch) in steps]

    def at(cache: str) -> str:
        return " / ".join(f"{steps[cache, batch]:.2f}" for batch in sizes)

    shape, context = graph["config"]["model"], graph["config"]["context"]
    calls, config = burst["summary"], burst["config"]
    changes, begin = soak["summary"], start["summary"]
    budgets = [f"{row['budget_mib'] / 1024:g}" for row in start["results"]["budgets"]]
    faults = len(soak["results"]["controls"])
    lines = [
        [
            f"Captured decode step of {shape}, {' / '.join(map(str, sizes))} sequences of {context:,} tokens",
            f"**{at('vattn')} ms**",
            f"contiguous {at('contiguous')} ms, paged {at('paged')} ms",
        ],
        [
            f"Mapping memory for a burst of {config['prompts']} prompts of {config['prompt_tokens']:,} tokens",
            f"**{calls['burst_map_ms']:.1f} ms** of driver calls; decode p99 x {calls['p99_ratio']:.3f}",
            f"page by page {calls['burst_map_ms_page_by_page']:,.0f} ms; contiguous maps nothing, decode p99 x "
            f"{calls['p99_ratio_contiguous']:.3f}",
        ],
        [
            f"Soak: {changes['graphs_captured']} graph replayed {changes['replays']:,} times, {changes['remaps']:,} "
            "mappings changed",
            f"**{changes['mismatches']} replays with other bits**",
            f"{changes['controls_caught']} of {faults} deliberate faults caught",
        ],
        [
            f"First token after process start; then budgets of {', '.join(budgets)} GiB",
            f"**{begin['warm_first_token_s']:.1f} s**; **{begin['recaptures']} graphs captured again**",
            f"{begin['cold_first_token_s']:.1f} s with cold caches of torch and Python",
        ],
    ]
    sources = zip((graph, burst, soak, start), lines, strict=True)
    named = [[*line, f"{result['machine']['gpu']['name']}, {result['started'][:10]}"] for result, line in sources]
    return table(["", "trtllm-vattn", "beside it", "card, date"], named)


PREFIX = "hits_over_simulated hits_over_simulated_trace hit_rate_trace hits_over_simulated_agents hit_rate_agents "
PREFIX += "driver_calls_per_steady_step"
RETURNED = "kept_sets_match_paper h2o_returned_over_evicted fastgen_returned_over_evicted "
RETURNED += "row_of_all_heads_returned_over_evicted h2o_returned_over_evicted_large_extents "
RETURNED += "fastgen_returned_over_evicted_large_extents"
TABLES: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "headline": (("graph.json", "burst.json", "soak.json", "start.json"), headline),
    "graph-steady": (("graph.json",), steady),
    "graph-summary": (("graph.json",), figures),
    "graph-prompts": (("graph.json",), prompts),
    "graph-batches": (("graph_batches.json",), batches),
    "graph-small": (("graph_small.json",), batches),
    "graph-layers": (("graph_rows_8.json",), layers),
    "start-phases": (("start_warm.json",), phases),
    "policy": (("policy.json",), policies),
    "tlb-largest": (("tlb.json",), bandwidths),
    "serve": (("serve.json",), serve),
    "serve-burst": (("serve_burst.json",), serve),
    "serve-vllm": (("serve_vllm.json",), serve_beside),
    "serve-vllm-paced": (("serve_vllm_paced.json",), serve_beside),
    "graph-vllm": (("graph_vllm.json",), steps_beside),
    "attention": (("attention.json",), attention),
    "tiers-wake": (("tiers_wake.json",), wakes),
    "prefix-counts": (("prefix.json",), picked(PREFIX)),
    "forks-counts": (("forks.json",), picked("memory_n16_over_one memory_n16_over_one_with_tokens samples")),
    "speculation-counts": (("speculation.json",), picked("tokens_identical_float32 accepted_per_step_k3")),
    "tiers-counts": (("tiers.json",), picked("tokens_identical recaptures swaps")),
    "compression-returned": (("compression.json",), picked(RETURNED)),
    "fragmentation": (("fragmentation.json",), fragmentation),
    "plan-memory": (("plan.json",), planned_memory),
}
"""By name: the results that a table is made of, in the folder of one card, and how."""


def table_of(name: str, folder: Path) -> tuple[tuple[str, ...], Callable[..., str]]:
    """Of `TABLES`; of another name, the figures of the result of that name in a card's folder. Raises ConfigError where
    there is neither."""
    file = f"{name.replace('-', '_')}.json"
    if name not in TABLES and not (folder / file).is_file():
        raise ConfigError(f"no table {name!r}, nor {folder / file}; there are {', '.join(TABLES)}")
    return TABLES.get(name, ((file,), figures))
