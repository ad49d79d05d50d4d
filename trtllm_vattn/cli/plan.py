"""`trtllm-vattn plan`: the cache's layout and an engine's limits for a model, its requests' lengths, and memory."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from trtllm_vattn.arguments import positive, size
from trtllm_vattn.bench.harness.flags import MAX_SEQS, add_model, plot
from trtllm_vattn.bench.harness.traces import load_trace
from trtllm_vattn.bench.publish.plots import pyplot, save_plot
from trtllm_vattn.cache.calibrated import calibration_of
from trtllm_vattn.planner import CostModel, Lengths, Objective, Plan, Prediction, plan
from trtllm_vattn.planner.calibration import packaged
from trtllm_vattn.runtime.models import planned_shape
from trtllm_vattn.table import table
from trtllm_vattn.values import counted

SLOS = ("itl_p99",)
"""Objectives that may be asked for."""
_SLO = re.compile(r"([a-z0-9_]+)=([0-9]+(?:\.[0-9]+)?)(us|ms|s)")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def slo(text: str) -> tuple[str, float]:
    """``itl_p99=40ms`` as a name and seconds."""
    found = _SLO.fullmatch(text)
    if found is None or found[1] not in SLOS or float(found[2]) <= 0:
        raise argparse.ArgumentTypeError(f"it is {text!r:.60}; give {' or '.join(SLOS)} and a time, as itl_p99=40ms")
    return found[1], float(found[2]) * _SECONDS[found[3]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `plan`."""
    add = parser.add_argument
    add_model(parser, required=True)
    text = "a trace whose requests' lengths are planned for: Azure CSV, Mooncake JSON lines, ShareGPT lengths CSV"
    add("--lengths", type=Path, required=True, metavar="FILE", help=text)
    add("--memory", type=size, required=True, metavar="BYTES", help="for keys and values, as 100GiB")
    add("--slo", type=slo, metavar="NAME=TIME", help="what latency to stay within, as itl_p99=40ms (default: none)")
    add("--max-seqs", type=positive, default=256, metavar="SEQUENCES", help=MAX_SEQS)
    text = f"a file of `trtllm-vattn calibrate`, or a card: {', '.join(packaged())} (default: this machine's)"
    add("--calibration", metavar="FILE", help=text)
    add("--plot", type=plot, metavar="FILE", help="draw throughput against latency of all choices (default: no plot)")


def run(args: argparse.Namespace) -> int:
    """Print the choice, the runners-up, and what binds."""
    calibration = calibration_of(args.calibration)
    requests = load_trace(args.lengths)
    lengths = Lengths.of([max(1, r.prompt_tokens) for r in requests], [max(1, r.output_tokens) for r in requests])
    # On a GPU models are of bfloat16, wherever they are planned for.
    shape = planned_shape(args.model, torch.bfloat16)
    objective = Objective(args.memory, args.slo[1] if args.slo else None, args.max_seqs)
    model = CostModel(shape, calibration)
    found = plan(model, lengths, objective)
    print(report(found, model, lengths, objective))
    if args.plot:
        draw(found, objective, f"{args.model}, {args.lengths.name}", args.plot)
        print(f"drawn in {args.plot}")
    return 0


def report(found: Plan, model: CostModel, lengths: Lengths, objective: Objective) -> str:
    """The choice, the runners-up, and what binds, as text."""
    best, card_of = found.best, model.card
    rows = [_row("choice", best), *(_row("", each) for each in found.runners_up())]
    header = ["", "layers a row", "lookahead", "extents to", "tokens a pass", "sequences", "memory for", "waste"]
    header += ["step ms", "ITL p99 ms", "admission ms", "output tok/s", "binds"]
    parts = best.parts
    step = {
        "weights": parts.weights,
        "other kernels": parts.layers,
        "attention": parts.attention,
        "host beside it": parts.host,
        "mapping beside it": parts.beside,
        "mapping within it": parts.mapping,
        "of attention, TLB misses": parts.tlb,
    }
    tokens = f"{counted(len(lengths.prompts), 'request')}, prompts of {lengths.mean_prompt:,.0f} and outputs of "
    lookahead = best.layout.lookahead
    estimated = f", of which {len(card_of.estimated)} of its numbers are estimated" if card_of.estimated else ""
    return "\n".join(
        [
            f"{model.shape.name} on {card_of.card} ({card_of.about.get('date', 'no date')}{estimated}): {tokens}"
            f"{lengths.mean_output:,.0f} tokens on average, {objective.budget / 2**30:.1f} GiB",
            "",
            table(header, rows),
            "",
            f"what binds: {best.binds}; memory holds {best.capacity:.1f} sequences on average, "
            f"{best.sequences:.1f} run at once",
            f"a step of {1e3 * best.step_s:.2f} ms: " + ", ".join(f"{k} {1e3 * v:.3f}" for k, v in step.items()),
            "",
            f"CacheConfig(layers_per_range={best.layout.layers_per_range}, lookahead={lookahead}, "
            f"extent_classes={best.layout.extent_classes})",
            f"Engine(max_step_tokens={best.chunk}), max_seqs={best.max_seqs}",
        ]
    )


def _row(name: str, each: Prediction) -> list[str]:
    layout = each.layout
    return [
        name,
        str(layout.layers_per_range),
        "auto" if layout.lookahead is None else str(layout.lookahead),
        f"{(layout.granularity << (layout.extent_classes - 1)) >> 20} MiB",
        str(each.chunk),
        f"{each.sequences:.1f}",
        f"{each.capacity:.1f}",
        f"{each.waste:.2%}",
        f"{1e3 * each.step_s:.2f}",
        f"{1e3 * each.itl_p99_s:.1f}",
        f"{1e3 * each.window_s:.1f}",
        f"{each.output_tokens_per_s:,.0f}",
        each.binds,
    ]


def draw(found: Plan, objective: Objective, title: str, path: Path) -> None:
    """Throughput against ITL p99 of all choices, by layers a row; the choice is marked. Raises ConfigError without
    matplotlib, or where the file cannot be written."""
    plt: Any = pyplot()
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    kinds = sorted({each.layout.layers_per_range for each in found.ranked})
    for kind in kinds:
        of_kind = [each for each in found.ranked if each.layout.layers_per_range == kind]
        x, y = [1e3 * each.itl_p99_s for each in of_kind], [each.output_tokens_per_s for each in of_kind]
        axis.scatter(x, y, s=12, label=f"{kind} layers a row")
    best = found.best
    axis.scatter([1e3 * best.itl_p99_s], [best.output_tokens_per_s], s=120, facecolors="none", edgecolors="black")
    if objective.itl_p99_s is not None:
        axis.axvline(1e3 * objective.itl_p99_s, color="grey", linestyle="--", linewidth=0.9)
    axis.set(xlabel="ITL p99, ms", ylabel="output tokens a second", title=f"{title}: {best.binds} binds")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.legend()
    save_plot(figure, path)
