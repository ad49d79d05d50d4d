"""The parser of all commands: errors in one line, defaults in the help, modules loaded when they are asked for."""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
import textwrap
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from trtllm_vattn.errors import VattnError

# Name, what it does, and where, of each command; a module has add_arguments(parser) and run(args).
COMMANDS = {
    "doctor": ("what will and will not work on this machine, and why", "trtllm_vattn.cli.doctor"),
    "demo": (
        "addresses that stay, memory that follows the sequences, identical tokens",
        "trtllm_vattn.bench.cases.demo",
    ),
    "plugin": ("TensorRT engines: list, build, inspect", "trtllm_vattn.cli.plugin"),
    "warm-up": ("compile once what would take minutes at a first request", "trtllm_vattn.cli.warm_up"),
    "serve": ("OpenAI's completions and chat endpoints over a checkpoint", "trtllm_vattn.cli.serve"),
    "top": ("a live view of a running engine: requests, memory, mappings, slots", "trtllm_vattn.cli.top"),
    "map": ("draw the address space before and after a burst, from a trace", "trtllm_vattn.cli.map"),
    "drill": (
        "cause failures on purpose, and check messages, memory, other requests and exit codes",
        "trtllm_vattn.cli.drill",
    ),
    "generate": ("text from prompts: arguments, a file or standard input", "trtllm_vattn.cli.generate"),
    "calibrate": (
        "measure, in two minutes, what this machine's plans are made by",
        "trtllm_vattn.bench.cases.calibrate",
    ),
    "plan": ("choose the cache's layout and limits for a model, lengths and memory", "trtllm_vattn.cli.plan"),
    "broker": ("lend a device's memory to several processes, under limits", "trtllm_vattn.cli.broker"),
    "run": ("run a command with TensorRT-LLM's KV cache at fixed addresses", "trtllm_vattn.cli.run"),
}
BENCHMARKS = {
    "graph": "captured against eager decode, over three kinds of cache, with tokens compared",
    "soak": "a captured graph replayed while its memory is remapped, bit for bit against a replica",
    "fragmentation": "mapped bytes that hold no token, and concurrent sequences in the same memory; on any machine",
    "alloc": "each driver call by size: alone, batched, beside a busy device, from several threads",
    "attention": "attention kernels, this project's and others', over flat KV and over block tables",
    "burst": "many prompts at once: what mapping their memory costs; steady decode with sequences ending and joining",
    "faults": "random operations while driver calls fail: leaks, wrong bytes, hangs; on any machine",
    "start": "capture first, size later: a start's cost, budgets changed without a recapture",
    "policy": "steps with memory mapped beside them, between them, or with the device quiet",
    "serve": "a trace replayed over every kind of cache at equal memory: throughput, TTFT, ITL",
    "stall": "sequences that decode while a long prompt goes in: the longest gap between tokens",
    "tune": "search kernels of a single token's step several times; keep what made the fastest as data",
    "prefix": "what prompts share, found again in slots: beside an ideal tree of the same memory; on any machine",
    "tiers": "keys and values in host memory: copies beside the link, sleep and wake, twice the sequences memory holds",
    "doors": "HTTP, killed clients, sampling parameters, new weights, deterministic engines: costs, right tokens",
    "forks": "several samples of one long prompt: memory and steps beside one sample",
    "compression": "caches that keep less: windows of some layers, keys and values of eight bits, fewer tokens",
    "speculation": "drafts verified in one step: tokens a second beside none, on text that repeats itself or not",
    "plugin": "the TensorRT plugin called as TensorRT calls it: captured once, replayed while memory moves",
    "xqa": "TensorRT-LLM's kernels over affine tables: tokens, steps against random tables, remapped replays",
    "tp": "one model on several GPUs beside one: steps, and replays over remapped memory",
    "tenancy": "processes under one broker: isolation, processes that are killed, opposite bursts of several models",
    "survival": "engines that are killed at any moment, and the next ones that go on with their sequences",
    "transfer": "sequences sent from one process's cache to another's, beside the link's own rate; bytes checked",
    "observe": "metrics, an event trace and top beside none of them: what they add to a step",
    "plan": "the planner's predictions beside what was measured, and its choice beside an exhaustive search",
    "multistep": "many decode steps in one launch, and a loop that the device ends",
}
MODULES = {"graph": "decode", "alloc": "driver_calls", "start": "startup"}
"""Modules of bench/cases whose name is not the command's."""


class HelpFormatter(argparse.HelpFormatter):
    """Shows the default, unless the help text states it, and breaks no name and no list of names."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        told = text is None or "default:" in text or not action.option_strings
        if told or default is None or default is argparse.SUPPRESS or isinstance(default, bool):
            return text
        if isinstance(default, list):
            default = ",".join(map(str, default))
        shown = str(default).replace("%", "%%") or "none"
        return f"{text} (default: {shown})"


class Parser(argparse.ArgumentParser):
    """Reports an error in one line. Refuses abbreviated flags, because defaults depend on which flags are given."""

    def __init__(self, **options: Any) -> None:
        self._unknown: list[str] = []
        super().__init__(**{"allow_abbrev": False, "formatter_class": HelpFormatter, **options})

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        for argument in itertools.takewhile(lambda each: each != "--", args or ()):
            # Python 3.11's argparse makes an empty list of it.
            if argument.startswith("--") and argument.endswith("=--"):
                self.error(f"argument {argument[:-3]}: it is '--'; give a value")
        self._unknown = self._unknown_flags(args or ())
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)  # type: ignore[no-untyped-call]
        if unknown:
            # By the command's own parser, whose --help lists what it takes.
            parser = getattr(parsed, "shown", self)
            parser.error(f"unrecognized arguments: {parser._named(unknown)}")
        return parsed

    def _unknown_flags(self, args: Sequence[str]) -> list[str]:
        """Flags that this command does not have; of one whose arguments are another's flags, too, none."""
        if any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions):
            return []
        # What has a space in it argparse takes for a text.
        flags = [each for each in itertools.takewhile(lambda each: each != "--", args) if each.startswith("--")]
        return [each for each in flags if " " not in each and each.partition("=")[0] not in self._option_string_actions]

    def _named(self, unknown: Sequence[str]) -> str:
        """Unknown arguments, and the flags that are spelled like them."""
        flags = [each for each in self._option_string_actions if each.startswith("--")]
        alike = [get_close_matches(each.partition("=")[0], flags, 1, 0.8) for each in unknown if each.startswith("--")]
        meant = ", ".join(match for matches in alike for match in matches)
        return " ".join(unknown) + (f"; did you mean {meant}?" if meant else "")

    def error(self, message: str) -> NoReturn:
        if self._unknown and message.startswith("the following arguments are required"):
            # argparse misses what was misspelt before it says so.
            message = f"unrecognized arguments: {self._named(self._unknown)}"
        self.exit(2, f"{self.prog}: {one_line(message)} (see {self.prog} --help)\n")


def one_line(text: object) -> str:
    """A message without line breaks, and no longer than somebody reads."""
    line = " ".join(str(text).split())
    return line if len(line) <= 1000 else f"{line[:997]}..."


def build_parser(arguments: Sequence[str], version: str) -> Parser:
    """The parser for these arguments: only the command that they name has its flags, for its module may take seconds to
    import."""
    parser = Parser(prog="trtllm-vattn", description="A KV cache whose addresses never change.")
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is done, on stderr")
    parser.set_defaults(run=None, shown=parser)
    named = [argument for argument in arguments if not argument.startswith("-")][:2]
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (text, module) in COMMANDS.items():
        _add(commands, name, text, module, arguments, load=named[:1] == [name])
    bench = commands.add_parser("bench", help="benchmarks", description="benchmarks")
    bench.set_defaults(shown=bench)
    benchmarks = bench.add_subparsers(dest="benchmark", metavar="BENCHMARK")
    for name, text in BENCHMARKS.items():
        module = MODULES.get(name, name)
        _add(benchmarks, name, text, f"trtllm_vattn.bench.cases.{module}", arguments, load=named == ["bench", name])
    return parser


def _add(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    text: str,
    module: str,
    arguments: Sequence[str],
    load: bool,
) -> None:
    command = commands.add_parser(name, help=text, description=text)
    if not load:
        return
    loaded = importlib.import_module(module)
    # Known before the other flags are added, since their defaults depend on it.
    if (device := device_in(arguments)) is not None:
        command.set_defaults(device=device)
    command.set_defaults(run=loaded.run, shown=command)
    loaded.add_arguments(command)


def device_in(arguments: Sequence[str]) -> str | None:
    """What ``--device`` asks for, if it is there."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", nargs="?")
    device: str | None = parser.parse_known_args(list(arguments))[0].device
    return device


def run_script(
    program: str,
    document: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run what has flags as a benchmark has them and is no command of its own. Returns its exit code, and 2 for what
    the user can mend, with one line that says what."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = Parser(prog=program, description=document.partition("\n")[0])
    if (device := device_in(given)) is not None:
        parser.set_defaults(device=device)
    add_arguments(parser)
    try:
        return run(parser.parse_args(given))
    except VattnError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
