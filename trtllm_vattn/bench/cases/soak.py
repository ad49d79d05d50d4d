"""`bench soak`: a captured graph replayed while its memory is remapped, with the same bits as over memory that never
changes, in parts that go on from a file (verify/soak.py)."""

from __future__ import annotations

import argparse
from typing import Any

from trtllm_vattn.arguments import adder, output
from trtllm_vattn.bench.harness.case import conclude
from trtllm_vattn.bench.harness.flags import add_common
from trtllm_vattn.bench.harness.report import load
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.files import write_json
from trtllm_vattn.machine import commit
from trtllm_vattn.verify.negative_controls import fenced_unmap
from trtllm_vattn.verify.soak import Soak


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench soak`."""
    add = adder(parser, add_common(parser, on_gpu="small-llama"))
    add("--replays", "REPLAYS", "replays in all", 100_000, 400)
    add("--seconds", "SECONDS", "end this part after so many; go on with --state", 420.0)
    add("--repeatable", "REPLAYS", "replays of two replicas whose memory never changes", 2000, 60)
    add("--tolerance", "DEVIATIONS", "of eager logits, in standard deviations", 0.05)
    text = "a file to go on from, and to write what was done to (default: begin anew, and keep nothing)"
    add("--state", "FILE", text, type=output)


def run(args: argparse.Namespace) -> int:
    """Run a part; 1 where bits differed, a control was missed, or the fenced unmap did not survive."""
    parts = _earlier(args)
    soak = Soak(args.model, args.device, args.seed, args.tolerance, args.seconds)
    alone = soak.left_alone(args.repeatable)
    part = soak.remapped(args.replays, len(parts), sum(each["replays"] for each in parts))
    parts.append({**part, "commit": commit()})
    controls = soak.controls()
    fenced = fenced_unmap(args.device, args.model)
    if args.state:
        write_json(args.state, "the state", {"seed": args.seed, "model": args.model, "chunks": parts})

    def total(name: str) -> Any:
        return sum(each[name] for each in parts)

    summary = {
        "replays": total("replays"),
        "remaps": sum(each["driver_calls"].get(name, 0) for each in parts for name in ("map", "unmap")),
        **{name: total(name) for name in ("mismatches", "tokens")},
        "graphs_captured": total("captures"),
        **{name: total(name) for name in ("eager_checks", "eager_mismatches")},
        "left_alone_replays": alone.replays,
        "left_alone_mismatches": alone.mismatches,
        "controls_caught": sum(not how.startswith("missed") for how in controls.values()),
        "fenced_unmap_survived": fenced == "survived",
        "seconds": total("seconds"),
    }
    results = {"chunks": parts, "left_alone": alone.as_dict(), "controls": controls, "fenced_unmap": fenced}
    said = [f"control, {name}: {how}" for name, how in controls.items()]
    conclude("soak", args, results, summary, "\n".join([*said, f"the same unmap behind its fence: {fenced}"]))
    wrong = summary["mismatches"] + summary["eager_mismatches"] + alone.mismatches
    return int(wrong > 0 or summary["controls_caught"] < len(controls) or fenced != "survived")


def _earlier(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What earlier parts did. Raises ConfigError where they were of another soak."""
    if args.state is None or not args.state.exists():
        return []
    state = load(args.state)
    if missing := [name for name in ("seed", "model", "chunks") if name not in state]:
        raise ConfigError(f"{args.state} has no {', '.join(missing)}: it is no state of a soak; give another file")
    if (state["seed"], state["model"]) != (args.seed, args.model):
        raise ConfigError(
            f"{args.state} is of a soak of {state['model']} with seed {state['seed']}; give the same, or another file"
        )
    parts: list[dict[str, Any]] = state["chunks"]
    return parts
