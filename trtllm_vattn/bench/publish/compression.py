"""Plots of `bench compression`: what evicting gives back, and what it costs a model that has to find a pair again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtllm_vattn.bench.publish.plots import pyplot, save

_NAMES = {"h2o": "H2O", "fastgen": "FastGen", "window": "recent window"}
# Okabe and Ito's palette, told apart by the colour-blind.
_COLOURS = {"h2o": "#0072B2", "fastgen": "#D55E00", "window": "#999999"}


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
        axis.set_title(f"{_NAMES[policy]}, a prompt of {mine[0]['prompt_tokens']:,} tokens", fontsize=10)
        axis.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0.02, 0.08))


def _needle(axes: Any, results: dict[str, Any]) -> None:
    """Right answers, of those asked before and of those never asked, and drift, over the share kept."""
    found = results["needle"]
    rows = found["rows"]
    whole = next(row for row in rows if row["policy"] == "whole")
    kinds = (("right_asked_before", "-", "asked before"), ("right_never_asked", "--", "never asked"))
    for policy, colour in _COLOURS.items():
        line = sorted((row for row in rows if row["policy"] == policy), key=lambda row: row["kept"])
        kept = [100 * row["kept"] for row in line]
        for name, style, what in kinds:
            axes[0].plot(
                kept,
                [100 * row[name] for row in line],
                color=colour,
                linestyle=style,
                marker="o",
                label=f"{_NAMES[policy]}, {what}",
            )
        axes[1].plot(kept, [row["mean_kl"] for row in line], color=colour, marker="o", label=_NAMES[policy])
    axes[0].axhline(100 * whole["right"], color="black", linewidth=1, label="everything kept")
    axes[0].axhline(100 * found["chance"], color="black", linewidth=1, linestyle=":", label="chance")
    axes[0].set_ylabel("right answers, %")
    axes[1].set_ylabel("mean KL divergence of the values, nats")
    for axis in axes:
        axis.set_xlabel("keys and values kept of the prompt, %")
        axis.set_title(f"pairs found again in {found['prompt_tokens']} tokens", fontsize=10)
        axis.legend(fontsize=7)
