"""The README's tables, made from committed results: text between ``<!-- table:NAME -->`` and ``<!-- /table -->``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from trtllm_vattn.bench.report import load, table
from trtllm_vattn.errors import ConfigError

_MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def spread(sample: dict[str, float], digits: int = 2) -> str:
    """Median and 99th percentile."""
    return f"{sample['p50']:,.{digits}f} / {sample['p99']:,.{digits}f}"


def steady(result: dict[str, Any]) -> str:
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


def batches(result: dict[str, Any]) -> str:
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


def prompts(result: dict[str, Any]) -> str:
    """Short prompts by a pass and by a replay."""
    rows = []
    for row in result["results"]["steady"]["prompts"]:
        pair = row["pass_ms"], row["replay_ms"]
        rows.append([str(row["tokens"]), *map(spread, pair), f"{pair[0]['p50'] / pair[1]['p50']:.1f}"])
    return table(["prompt tokens", "pass, ms p50 / p99", "replay, ms p50 / p99", "pass / replay"], rows)


def _over_rounds(values: list[float], digits: int) -> str:
    """The mean, with the least and the most where there was more than one round."""
    middle = f"{sum(values) / len(values):,.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def serve(result: dict[str, Any]) -> str:
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


def policies(result: dict[str, Any]) -> str:
    """Steps under each policy of mapping, and over those of the cache that was mapped whole before."""
    rows = result["results"]["runs"]
    none = rows[0]["step_ms"]
    lines = []
    for row in rows:
        step = row["step_ms"]
        over = [f"{step[p] / none[p]:.3f}" for p in ("p50", "p99")]
        lines.append([row["policy"], *(f"{step[p]:.3f}" for p in ("p50", "p99")), *over, str(row["mappings"])])
    header = ["mapping", "step p50, ms", "p99, ms", "p50 over no mapping", "p99 over no mapping", "mappings"]
    return table(header, lines)


def layers(result: dict[str, Any]) -> str:
    """Attention's bandwidth alone by layers that share a row."""
    limit = result["results"]["steady"]["read_limit_bytes_per_s"]
    found = result["results"]["steady"]["layers"]
    batches = sorted({row["batch"] for row in found})
    rows = []
    for g in sorted({row["layers_per_range"] for row in found}):
        rates = {row["batch"]: row["bytes_per_s"]["p50"] for row in found if row["layers_per_range"] == g}
        rows.append([str(g), *(f"{rates[b] / 1e9:,.0f} ({100 * rates[b] / limit:.0f} %)" for b in batches)])
    return table(["layers a range", *(f"{batch} sequences, GB/s (of the read limit)" for batch in batches)], rows)


def fragmentation(result: dict[str, Any]) -> str:
    """Waste, all that is mapped counted, and sequences at once, of every system on every mix."""
    rows = result["results"]["runs"]
    mixes = list(dict.fromkeys(row["mix"] for row in rows))
    cells = {
        (row["system"], row["mix"]): f"{row['waste_with_surplus']:.1%}, {row['mean_sequences']:.1f}" for row in rows
    }
    systems = list(dict.fromkeys(row["system"] for row in rows))
    return table(["system", *mixes], [[system, *(cells[system, mix] for mix in mixes)] for system in systems])


def attention(result: dict[str, Any]) -> str:
    """Decode attention by point and system; points that could not be had are left out."""
    rows = [row for row in result["results"]["points"] if "refused" not in row]
    points, systems = (list(dict.fromkeys(row[key] for row in rows)) for key in ("point", "system"))
    cells = {
        (r["point"], r["system"]): f"{r['layer_us']['p50']:.1f} ({r['bytes_per_s']['p50'] / 1e9:,.0f})" for r in rows
    }
    header = ["sequences x tokens", *(f"{system}, us (GB/s)" for system in systems)]
    return table(header, [[point, *(cells[point, system] for system in systems)] for point in points])


def bandwidths(result: dict[str, Any]) -> str:
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
        cells[point, row["system"]] = f"{middle} ({least} to {most})"
    points, systems = (list(dict.fromkeys(key[i] for key in cells)) for i in range(2))
    return table(["system, GB/s", *points], [[s, *(cells[point, s] for point in points)] for s in systems])


def figures(result: dict[str, Any]) -> str:
    """The summary, as it stands in the JSON."""
    rows = [[name, f"{v:,.4g}" if isinstance(v, float) else str(v)] for name, v in result["summary"].items()]
    return table(["figure", "value"], rows)


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "graph-steady": ("graph.json", steady),
    "graph-summary": ("graph.json", figures),
    "graph-prompts": ("graph.json", prompts),
    "graph-batches": ("graph_batches.json", batches),
    "graph-small": ("graph_small.json", batches),
    "graph-layers": ("graph_rows_8.json", layers),
    "soak": ("soak.json", figures),
    "start": ("start.json", figures),
    "policy": ("policy.json", policies),
    "multistep": ("multistep.json", figures),
    "burst": ("burst.json", figures),
    "tlb": ("tlb.json", figures),
    "tlb-largest": ("tlb.json", bandwidths),
    "serve": ("serve.json", serve),
    "serve-burst": ("serve_burst.json", serve),
    "serve-azure": ("serve_azure.json", serve),
    "serve-sharegpt": ("serve_sharegpt.json", serve),
    "attention": ("attention.json", attention),
    "plugin": ("plugin.json", figures),
    "xqa": ("xqa.json", figures),
    "faults": ("../host/faults.json", figures),
    "fragmentation": ("../host/fragmentation.json", fragmentation),
}


def render(text: str, results: Path) -> str:
    """The README with its tables made anew. Raises ConfigError for an unknown table or a missing result."""

    def made(match: re.Match[str]) -> str:
        name = match.group(2)
        if name not in TABLES:
            raise ConfigError(f"no table {name!r}; there are {', '.join(TABLES)}")
        file, make = TABLES[name]
        return f"{match.group(1)}{make(load(results / file))}\n{match.group(3)}"

    return _MARKED.sub(made, text)


def main() -> int:
    """Write the README's tables; with ``--check``, only say whether they are up to date."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("readme", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    before = args.readme.read_text()
    after = render(before, args.results)
    if args.check:
        if before != after:
            print(f"the tables of {args.readme} are not those of {args.results}; run scripts/report", file=sys.stderr)
        return int(before != after)
    args.readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
