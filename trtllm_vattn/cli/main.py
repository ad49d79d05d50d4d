"""`trtllm-vattn`: doctor, run, TensorRT engines and benchmarks."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import logging
import sys
from collections.abc import Sequence

from trtllm_vattn.errors import VattnError

BENCHMARKS = {
    "graph": "graphs against none, over three kinds of cache, with tokens compared",
    "soak": "a captured graph replayed while its memory is remapped, bit for bit against a twin",
    "fragmentation": "mapped bytes that hold no token, and sequences at once in the same memory; on any machine",
    "alloc": "each driver call by size: alone, batched, beside a busy device, from several threads",
    "attention": "one library's attention over flat KV and over block tables",
    "burst": "many prompts at once: what mapping costs, and whom; steady decode with sequences ending and joining",
    "faults": "a random life in which driver calls fail: leaks, wrong bytes, hangs; on any machine",
    "start": "capture first, size later: a start's cost, budgets changed without a recapture",
    "policy": "steps with memory mapped beside them, between them, or with the device quiet",
    "serve": "a trace replayed over every kind of cache at equal memory: throughput, TTFT, ITL",
    "tlb": "bandwidth against context, working set and the order of pages",
    "plugin": "the TensorRT plugin called as TensorRT calls it: captured once, replayed while memory moves",
    "xqa": "TensorRT-LLM's kernels over affine tables: tokens, steps against random tables, remapped replays",
    "multistep": "many decode steps in one launch, and a loop that the device ends",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 where it went well, 1 where a benchmark found something wrong, 2 for what the user can mend."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="trtllm-vattn", description="A KV cache whose addresses never change.")
    parser.add_argument("--version", action="version", version=importlib.metadata.version("trtllm-vattn"))
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is done, on stderr")
    commands = parser.add_subparsers(dest="command", required=True)
    _add(
        commands, "doctor", "what will and will not work on this machine, and why", "trtllm_vattn.cli.doctor", arguments
    )
    _add(commands, "plugin", "TensorRT engines: list, build, inspect", "trtllm_vattn.cli.plugin", arguments)
    _add(
        commands,
        "run",
        "run a command with TensorRT-LLM's KV cache at fixed addresses",
        "trtllm_vattn.cli.run",
        arguments,
    )
    bench = commands.add_parser("bench", help="benchmarks")
    benchmarks = bench.add_subparsers(dest="benchmark", required=True)
    for name, text in BENCHMARKS.items():
        _add(benchmarks, name, text, f"trtllm_vattn.bench.{name}", arguments)
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO if parsed.verbose else logging.WARNING, format="%(name)s: %(message)s")
    try:
        code: int = parsed.run(parsed)
    except VattnError as error:
        print(f"trtllm-vattn: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return code


def _add(commands: argparse._SubParsersAction, name: str, text: str, module: str, arguments: Sequence[str]) -> None:  # type: ignore[type-arg]
    """Add a command; its module, which may take seconds to import, only where it is the one chosen."""
    command = commands.add_parser(name, help=text, description=text)
    if name in arguments:
        loaded = importlib.import_module(module)
        # Known before the other flags are added, since their defaults depend on it.
        if (device := _device_in(arguments)) is not None:
            command.set_defaults(device=device)
        loaded.add_arguments(command)
        command.set_defaults(run=loaded.run)


def _device_in(arguments: Sequence[str]) -> str | None:
    """What ``--device`` asks for, if it is there."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", nargs="?")
    device: str | None = parser.parse_known_args(list(arguments))[0].device
    return device


if __name__ == "__main__":
    sys.exit(main())
