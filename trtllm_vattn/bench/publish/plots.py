"""Plots from a benchmark's JSON, with matplotlib (extra ``bench``)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.files import write_whole

# Okabe and Ito's palette, told apart by the colour-blind.
_COLOURS = {"contiguous": "#E69F00", "paged": "#56B4E9", "vattn": "#009E73"}


def plot_graph(result: dict[str, Any], path: Path) -> None:
    """Draw a `bench graph` result: memory over time and, of a GPU, step times of all combinations."""
    results = result["results"]
    steady = (results.get("steady") or {}).get("runs", [])
    runs = results["trace"]["runs"] if results["trace"] else []
    parts: list[tuple[Callable[[Any, list[dict[str, Any]]], None], list[dict[str, Any]]]] = []
    if runs and on_gpu(result):
        # On the host Python replays a graph call by call, which says nothing of graphs.
        parts.append((_steps, runs))
    if runs:
        parts.append((_memory, runs))
    if steady:
        parts.append((_batches, steady))
    figure, axes = pyplot().subplots(
        1, len(parts), figsize=(1 + 5.5 * len(parts), 4.6), layout="constrained", squeeze=False
    )
    for axis, (draw, rows) in zip(axes[0], parts, strict=True):
        draw(axis, rows)
    save(figure, result, path)


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files. Raises ConfigError without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as found
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'trtllm-vattn[bench]'") from error
    return found


def where(result: dict[str, Any]) -> str:
    """What a result was measured on, by its own record: the GPU's name, or the host."""
    return str(result["machine"]["gpu"]["name"]) if on_gpu(result) else "the host"


def on_gpu(result: dict[str, Any]) -> bool:
    """Whether a result is of a GPU, by its own record; one without a device is counted on any machine."""
    return result["machine"]["gpu"] is not None and result["config"].get("device", "cpu") != "cpu"


def _device(result: dict[str, Any]) -> str:
    return "the device" if on_gpu(result) else "the host"


def _plain_log(axis: Any, unit: str = "", base: int = 10) -> None:
    """Ticks of a logarithmic axis as people read them: 0.2, 5, 1,000 with their unit, and minor ones between."""
    from matplotlib import ticker

    minor, low_high = range(2, 10), axis.get_view_interval()
    decades = abs(math.log10(max(low_high[1], 1e-300) / max(low_high[0], 1e-300)))
    subs = (1.0,) if base == 2 or decades > 4 else (1.0, 2.0, 5.0) if decades > 1 else tuple(map(float, range(1, 10)))
    axis.set_major_locator(ticker.LogLocator(base=base, subs=subs, numticks=99))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{_plain(value)}{unit}"))
    if base == 10:
        axis.set_minor_locator(ticker.LogLocator(base=base, subs=tuple(map(float, minor)), numticks=99))
    axis.set_minor_formatter(ticker.NullFormatter())


def _plain(value: float) -> str:
    """A number in digits, without an exponent."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.6f}".rstrip("0").rstrip(".")


def save(figure: Any, result: dict[str, Any], path: Path) -> None:
    """Write a figure, titled by what was measured and on what."""
    figure.suptitle(
        f"{result['benchmark']}, {result['config'].get('model', '')}".rstrip(", ") + f", on {where(result)}"
    )
    save_plot(figure, path)


def save_plot(figure: Any, path: Path) -> None:
    """Write a figure and close it. Raises ConfigError where it cannot be written."""
    try:
        write_whole(path, "the plot", lambda partial: figure.savefig(partial, dpi=130))
    finally:
        pyplot().close(figure)


def plot_demo(result: dict[str, Any], path: Path) -> None:
    """Draw a `demo` result: memory beside the tokens of the sequences, over the steps."""
    figure, axis = pyplot().subplots(figsize=(11, 4.6), layout="constrained")
    memory = result["results"]["memory"]
    for name, label in (("mapped_bytes", "mapped for running sequences"), ("live_bytes", "tokens of sequences")):
        axis.step(range(1, len(memory["steps"]) + 1), [step[name] / 1024 for step in memory["steps"]], label=label)
    axis.axhline(memory["reserved_bytes"] / 1024, color="black", linestyle=":", label="every slot at its longest")
    axis.set(xlabel="decode step", ylabel="KiB of K and V", ylim=(0, None))
    axis.legend(fontsize=8)
    save(figure, result, path)


def plot_serve(result: dict[str, Any], path: Path) -> None:
    """Draw a `bench serve` result over time: output tokens a second, and requests under way; a line a cache or engine
    of the first round, a row a trace and rate."""
    rows = [row for row in result["results"]["runs"] if row["round"] == 0]
    panels = list(dict.fromkeys((row.get("trace", ""), row.get("request_rate", "")) for row in rows))
    figure, axes = pyplot().subplots(
        len(panels), 2, figsize=(13, 0.6 + 4 * len(panels)), layout="constrained", squeeze=False
    )
    for panel, pair in zip(panels, axes, strict=True):
        for row in rows:
            if (row.get("trace", ""), row.get("request_rate", "")) == panel:
                over_time, label = row["over_time"], row.get("cache") or row["engine"]
                for axis, name in zip(pair, ("output_tokens_per_s", "concurrent_requests"), strict=True):
                    axis.plot(over_time["time_s"], over_time[name], linewidth=1, label=label)
        for axis, label in zip(pair, ("output tokens a second", "requests under way"), strict=True):
            axis.set(xlabel="seconds", ylabel=label, ylim=(0, None), title=", ".join(filter(None, panel)))
            axis.legend(fontsize=8)
    save(figure, result, path)


def plot_burst(result: dict[str, Any], path: Path) -> None:
    """Draw a `bench burst` result: decode steps over time, and where the burst's mapping time went."""
    figure, (steps, spent) = pyplot().subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    first = [row for row in result["results"]["bursts"] if row["round"] == 0]
    for row in first:
        whole = [value for phase in ("before", "during", "after") for value in row["steps"][phase]]
        steps.plot(whole, linewidth=0.8, label=row["variant"])
    edge = len(first[0]["steps"]["before"])
    for at in (edge, edge + len(first[0]["steps"]["during"])):
        steps.axvline(at, color="black", linewidth=0.6, linestyle=":")
    steps.set(
        xlabel="decode step; the burst goes in between the dotted lines", ylabel=f"decode step, ms on {_device(result)}"
    )
    steps.legend(fontsize=8)
    mapped = [row for row in first if row["mappings"]]
    for number, call in enumerate(("create", "map", "set_access")):
        places = [place + 0.27 * (number - 1) for place in range(len(mapped))]
        spent.bar(places, [row["driver_ms"][call] for row in mapped], width=0.27, label=call)
    spent.set_xticks(range(len(mapped)), [row["variant"] for row in mapped])
    spent.set(ylabel="driver calls of the burst, ms", yscale="log")
    _plain_log(spent.yaxis, " ms")
    spent.tick_params(axis="x", labelsize=8)
    spent.legend(fontsize=8)
    save(figure, result, path)


def plot_alloc(result: dict[str, Any], path: Path) -> None:
    """Draw a `bench alloc` result: each call by extent size, the device idle and busy."""
    figure, axes = pyplot().subplots(1, 2, figsize=(13, 4.6), layout="constrained", sharey=True)
    granularity = result["results"]["granule"]
    rows = [row for row in result["results"]["calls"] if row["how"] == "one by one"]
    for axis, busy in zip(axes, (False, True), strict=True):
        for call in dict.fromkeys(row["call"] for row in rows):
            found = [row for row in rows if row["call"] == call and row["busy"] is busy]
            sizes = [row["size"] // granularity for row in found]
            axis.plot(sizes, [row["us"]["p50"] for row in found], marker="o", label=call)
            low, high = ([row["us"][p] for row in found] for p in ("p50", "p99"))
            axis.fill_between(sizes, low, high, alpha=0.15)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        _plain_log(axis.xaxis, base=2)
        _plain_log(axis.yaxis, " us")
        axis.set(
            xlabel=f"extent, multiples of {granularity:,} bytes",
            title=f"{_device(result)} {'busy' if busy else 'idle'}".removeprefix("the "),
        )
    axes[0].set_ylabel("us a call, p50 to p99")
    axes[0].legend(fontsize=8)
    save(figure, result, path)


def plot_attention(result: dict[str, Any], path: Path) -> None:
    """Draw a `bench attention` result: bandwidth of decode attention by point and system."""
    figure, axis = pyplot().subplots(figsize=(11, 4.6), layout="constrained")
    _grouped(axis, result["results"]["points"], "point", "system", lambda row: row["bytes_per_s"]["p50"] / 1e9)
    axis.set_ylabel("decode attention, GB/s of K and V")
    save(figure, result, path)


def plot_fragmentation(result: dict[str, Any], path: Path) -> None:
    """Draw a `bench fragmentation` result: mapped bytes that hold no token, and concurrent sequences, by mix and
    system."""
    figure, (waste, sequences) = pyplot().subplots(2, 1, figsize=(12, 8), layout="constrained")
    rows = result["results"]["runs"]
    _grouped(waste, rows, "mix", "system", lambda row: max(1e-2, 100 * row["waste_with_surplus"]))
    waste.set(yscale="log", ylabel="waste: mapped bytes without a token\n(the lowest bars are 0.01 % or less)")
    _plain_log(waste.yaxis, " %")
    _grouped(sequences, rows, "mix", "system", lambda row: row["mean_sequences"] or 0)
    sequences.set_ylabel("sequences at once while others wait")
    names = [mix[:24] for mix in dict.fromkeys(row["mix"] for row in rows)]
    for axis in (waste, sequences):
        axis.set_xticks(range(len(names)), names)
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, result, path)


def plot_prefix(result: dict[str, Any], path: Path) -> None:
    """Draw a `bench prefix` result: hits over those of the ideal tree, and the cost of each way by the length."""
    runs, curves = result["results"]["runs"], result["results"]["crossover"]
    figure, (hits, costs) = pyplot().subplots(1, 2, figsize=(14, 5), layout="constrained")

    def what(run: dict[str, Any]) -> str:
        extents = f"{'up to' if run['ascending'] else 'from'} {run['largest_extent'] >> 20} MiB"
        return f"{run['variant']}\n{run['max_segments']} slots\n{extents}"

    rows = [{**run, "what": what(run)} for run in runs]
    _grouped(hits, rows, "what", "workload", lambda row: row["hits_over_simulated"] or 0)
    hits.axhline(1, color="black", linewidth=0.8, linestyle=":")
    hits.set_ylabel("hits, of an ideal tree's in the same memory")
    hits.tick_params(axis="x", labelsize=7)
    for number, curve in enumerate(curves):
        points = curve["points"]
        tokens = [point["tokens"] for point in points]
        size = f"{curve['extent_bytes'] >> 20} MiB"
        costs.plot(
            tokens, [point["alias_us"] for point in points], color=f"C{number}", label=f"alias, extents of {size}"
        )
    for name, style in (("copy", "--"), ("table", ":"), ("compute", "-.")):
        costs.plot(tokens, [point[f"{name}_us"] for point in points], color="black", linestyle=style, label=name)
    costs.set_xscale("log", base=2)
    costs.set_yscale("log")
    _plain_log(costs.xaxis, base=2)
    _plain_log(costs.yaxis, " us")
    costs.tick_params(axis="x", labelsize=7)
    costs.set(xlabel="tokens of the prefix", ylabel="cost of a hit, worked out from measured calls")
    costs.legend(fontsize=8)
    save(figure, result, path)


def _grouped(
    axis: Any, rows: list[dict[str, Any]], group: str, series: str, value: Callable[[dict[str, Any]], float]
) -> None:
    """Bars of `value`, a colour for each of `series`; rows that were refused have none."""
    groups, names = (list(dict.fromkeys(row[key] for row in rows)) for key in (group, series))
    width, colours = 0.8 / len(names), pyplot().get_cmap("tab20" if len(names) > 10 else "tab10")
    for number, name in enumerate(names):
        found = {row[group]: value(row) for row in rows if row[series] == name and "refused" not in row}
        places = [groups.index(where) + (number - (len(names) - 1) / 2) * width for where in found]
        axis.bar(places, list(found.values()), width, label=name, color=colours(number))
    axis.set_xticks(range(len(groups)), groups)
    axis.legend(fontsize=8)


def _steps(axis: Any, runs: list[dict[str, Any]]) -> None:
    for place, run in enumerate(runs):
        p50, p99 = run["step_ms"]["p50"], run["step_ms"]["p99"]
        hatch = "//" if run["mode"] == "eager" else ""
        axis.bar(place, p50, color=_COLOURS[run["cache"]], hatch=hatch, edgecolor="white")
        axis.errorbar(place, p50, yerr=[[0], [p99 - p50]], color="black", capsize=3)
        axis.annotate(f"{p50:.1f}", (place, p50), ha="center", va="bottom", xytext=(-14, 1), textcoords="offset points")
    axis.set_xticks(range(len(runs)), [f"{run['cache']}\n{run['mode']}" for run in runs], fontsize=8)
    axis.set(ylabel="decode step, ms (bar p50, whisker p99)", title="Replaying the trace")


def _memory(axis: Any, runs: list[dict[str, Any]]) -> None:
    captured = [run for run in runs if run["mode"] == "captured"]
    for run in captured:
        memory = run["memory"]
        axis.plot(
            memory["time_s"],
            [value / 1e6 for value in memory["mapped_bytes"]],
            color=_COLOURS[run["cache"]],
            label=f"{run['cache']}, for running sequences",
        )
    memory = captured[-1]["memory"]
    axis.fill_between(
        memory["time_s"],
        [value / 1e6 for value in memory["live_bytes"]],
        color="#BBBBBB",
        label=f"live tokens ({captured[-1]['cache']})",
    )
    axis.set(xlabel="seconds", ylabel="KV memory, MB", ylim=(0, None))
    axis.legend(fontsize=8)
    axis.set_title("Memory, captured runs")


def _batches(axis: Any, runs: list[dict[str, Any]]) -> None:
    batches = sorted({run["batch"] for run in runs})
    for run_cache, colour in _COLOURS.items():
        for mode, style in (("eager", "--"), ("captured", "-")):
            rows = {r["batch"]: r["step_ms"]["p50"] for r in runs if r["cache"] == run_cache and r["mode"] == mode}
            if rows:
                values = [rows[batch] for batch in batches]
                axis.plot(range(len(batches)), values, style, marker="o", color=colour, label=f"{run_cache}, {mode}")
    axis.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axis.set(xlabel="sequences", ylabel="decode step, ms (p50)", ylim=(0, None))
    axis.legend(fontsize=8)
    axis.set_title(f"Steady decode at {runs[0]['context']:,} tokens")


# -- compression: what evicting gives back, and what it costs a model that has to find a pair again --------------------

_POLICIES = {"h2o": "H2O", "fastgen": "FastGen", "window": "recent window"}
# Okabe and Ito's palette, told apart by the colour-blind.
_POLICY_COLOURS = {"h2o": "#0072B2", "fastgen": "#D55E00", "window": "#999999"}


def plot_compression(result: dict[str, Any], path: Path) -> None:
    """Draw the parts of a `bench compression` result that have a drawing, ``returned`` and ``needle``. Raises
    ConfigError without matplotlib."""
    results = result["results"]
    drawn = [draw for name, draw in (("returned", _returned), ("needle", _needle)) if results.get(name)]
    figure, axes = pyplot().subplots(
        1, max(1, 2 * len(drawn)), figsize=(0.6 + 5 * max(1, 2 * len(drawn)), 4.6), layout="constrained", squeeze=False
    )
    for number, draw in enumerate(drawn):
        draw(axes[0][2 * number : 2 * number + 2], results)
    save(figure, result, path)


def _returned(axes: Any, results: dict[str, Any]) -> None:
    """A panel a policy: bytes returned for each byte evicted over the size of extents, a line a number of heads that
    share a range; extents of several sizes as hollow marks."""
    rows = results["returned"]
    for axis, policy in zip(axes, ("h2o", "fastgen"), strict=True):
        mine = [row for row in rows if row["policy"] == policy]
        heads = sorted({row["heads_per_range"] for row in mine})
        for number, count in enumerate(heads):
            line = [row for row in mine if row["heads_per_range"] == count and row["extent_sizes"] == 1]
            colour = f"C{number}"
            label = f"{count} head{'s' if count > 1 else ''} a range"
            x, y = ([row[name] for row in line] for name in ("extent_bytes", "returned_over_evicted"))
            axis.plot([each / 1024 for each in x], y, marker="o", color=colour, label=label)
            for row in mine:
                if row["heads_per_range"] == count and row["extent_sizes"] > 1:
                    at = (row["extent_bytes"] / 1024, row["returned_over_evicted"])
                    label = f"{label}, {row['extent_sizes']} sizes from there"
                    axis.plot(*at, marker="s", markerfacecolor="none", color=colour, linestyle="", label=label)
        axis.set_xscale("log", base=2)
        sizes = sorted({row["extent_bytes"] // 1024 for row in mine})
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.set(xlabel="KiB of an extent", ylabel="bytes returned / bytes evicted")
        axis.set_ylim(-0.03, 1.06)
        axis.set_title(f"{_POLICIES[policy]}, a prompt of {mine[0]['prompt_tokens']:,} tokens", fontsize=10)
        axis.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0.02, 0.08))


def _needle(axes: Any, results: dict[str, Any]) -> None:
    """Right answers, of those asked before and of those never asked, and drift, over the share kept."""
    found = results["needle"]
    rows = found["rows"]
    whole = next(row for row in rows if row["policy"] == "whole")
    kinds = (("right_asked_before", "-", "asked before"), ("right_never_asked", "--", "never asked"))
    for policy, colour in _POLICY_COLOURS.items():
        line = sorted((row for row in rows if row["policy"] == policy), key=lambda row: row["kept"])
        kept = [100 * row["kept"] for row in line]
        for name, style, what in kinds:
            axes[0].plot(
                kept,
                [100 * row[name] for row in line],
                color=colour,
                linestyle=style,
                marker="o",
                label=f"{_POLICIES[policy]}, {what}",
            )
        axes[1].plot(kept, [row["mean_kl"] for row in line], color=colour, marker="o", label=_POLICIES[policy])
    axes[0].axhline(100 * whole["right"], color="black", linewidth=1, label="everything kept")
    axes[0].axhline(100 * found["chance"], color="black", linewidth=1, linestyle=":", label="chance")
    axes[0].set_ylabel("right answers, %")
    axes[1].set_ylabel("mean KL divergence of the values, nats")
    for axis in axes:
        axis.set_xlabel("keys and values kept of the prompt, %")
        axis.set_title(f"pairs found again in {found['prompt_tokens']} tokens", fontsize=10)
        axis.legend(fontsize=7)
