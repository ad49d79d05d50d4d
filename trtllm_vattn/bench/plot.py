"""Plots from a benchmark's JSON, with matplotlib (extra ``bench``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtllm_vattn.errors import ConfigError

# Okabe and Ito's palette, told apart by the colour-blind.
_COLOURS = {"contiguous": "#E69F00", "paged": "#56B4E9", "vattn": "#009E73"}


def plot_graph(result: dict[str, Any], path: Path) -> None:
    """Draw a `bench graph` result: step times of all combinations, and memory over time. Raises ConfigError without
    matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'trtllm-vattn[bench]'") from error
    results = result["results"]
    steady = (results.get("steady") or {}).get("runs", [])
    figure, axes = pyplot.subplots(1, 3 if steady else 2, figsize=(17 if steady else 12, 4.6), layout="constrained")
    _steps(axes[0], results["trace"]["runs"])
    _memory(axes[1], results["trace"]["runs"])
    if steady:
        _batches(axes[2], steady)
    gpu = result["machine"]["gpu"]
    figure.suptitle(f"{result['config']['model']} on {gpu['name'] if gpu else 'the host driver'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _steps(axis: Any, runs: list[dict[str, Any]]) -> None:
    for place, run in enumerate(runs):
        p50, p99 = run["step_ms"]["p50"], run["step_ms"]["p99"]
        hatch = "//" if run["mode"] == "eager" else ""
        axis.bar(place, p50, color=_COLOURS[run["cache"]], hatch=hatch, edgecolor="white")
        axis.errorbar(place, p50, yerr=[[0], [p99 - p50]], color="black", capsize=3)
        axis.annotate(f"{p50:.1f}", (place, p50), ha="center", va="bottom", xytext=(-14, 1), textcoords="offset points")
    axis.set_xticks(range(len(runs)), [f"{run['cache']}\n{run['mode']}" for run in runs], fontsize=8)
    axis.set_ylabel("decode step, ms (bar p50, whisker p99)")
    axis.set_title("Replaying the trace")


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
    axis.set_xlabel("seconds")
    axis.set_ylabel("KV memory, MB")
    axis.set_yscale("symlog", linthresh=1)
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
    axis.set_xlabel("sequences")
    axis.set_ylabel("decode step, ms (p50)")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    axis.set_title(f"Steady decode at {runs[0]['context']:,} tokens")
