"""`drill`: cause failures on purpose, and check what comes of them."""

from __future__ import annotations

import argparse

from trtllm_vattn.arguments import output
from trtllm_vattn.bench.harness.flags import add_device
from trtllm_vattn.files import write_json
from trtllm_vattn.machine import commit, machine, versions
from trtllm_vattn.verify.drills import DRILLS, Drills


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `drill`."""
    add_device(parser)
    add = parser.add_argument
    text = f"all, or some of: {', '.join(DRILLS)}"
    add("name", nargs="*", default=["all"], metavar="NAME", help=text)
    add("--output-json", type=output, metavar="FILE", help="write a report there (default: print it alone)")


def run(args: argparse.Namespace) -> int:
    """Run drills; 1 where one found something wrong."""
    names = list(DRILLS) if "all" in args.name else args.name
    outcomes = []
    with Drills(args.device) as drills:
        for name in names:
            outcome = drills.run(name)
            print(f"{outcome.name:>16}  {'ok' if outcome.passed else 'NO'}: {outcome.detail}", flush=True)
            outcomes.append(outcome)
    if args.output_json:
        report = {
            "benchmark": "drills",
            "device": args.device,
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
            "drills": [outcome.as_dict() for outcome in outcomes],
        }
        write_json(args.output_json, "the report", report)
    return 0 if all(outcome.passed for outcome in outcomes) else 1
