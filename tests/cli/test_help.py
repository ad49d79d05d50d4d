"""Every command's help, and every argument's answer to values that cannot be: over the tree of parsers."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trtllm_vattn import arguments as types
from trtllm_vattn.cli.main import main
from trtllm_vattn.cli.parser import BENCHMARKS, COMMANDS, Parser, build_parser

PATHS = [
    [],
    ["bench"],
    *([name] for name in COMMANDS),
    *(["bench", name] for name in BENCHMARKS),
    *(["plugin", action] for action in ("list", "build", "inspect")),
    *(["broker", action] for action in ("status", "limits", "sleep", "wake")),
]
UNITS = {
    *("TOKENS", "SEQUENCES", "REQUESTS", "PROMPTS", "STEPS", "REPLAYS", "TURNS", "TIMES", "LAYERS", "OPERATIONS"),
    *("COUNT", "MAPPINGS", "THREADS", "CONTEXTS", "BYTES", "SECONDS", "LOGITS", "DEVIATIONS", "SHARE", "N"),
    *("FILE", "FOLDER", "MODEL", "DEVICE", "CACHES", "NAME", "CAPABILITIES", "Q,KV,SIZE", "SEQUENCESxTOKENS"),
    *("URL", "HOST", "PORT", "KEY", "TEXT", "BATCHES", "RATE", "SHAPE", "MILLISECONDS", "NAME:MILLISECONDS"),
    "NAME=TIME",
    "USER",
    "JSON",
}


def children(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.update(action.choices)
    return found


def parser_of(path: list[str]) -> argparse.ArgumentParser:
    found: argparse.ArgumentParser = build_parser(path, "0")
    for name in path:
        found = children(found)[name]
    return found


def flags_of(path: list[str]) -> Iterator[argparse.Action]:
    for action in parser_of(path)._actions:
        if action.dest not in ("help", "version") and not isinstance(action, argparse._SubParsersAction):
            yield action


def test_no_command_is_left_out() -> None:
    assert set(children(parser_of([]))) == {path[0] for path in PATHS if path}
    for parent in ("bench", "plugin", "broker"):
        assert set(children(parser_of([parent]))) == {path[1] for path in PATHS if path[:1] == [parent] and path[1:]}


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_every_commands_help_is_shown(path: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*path, "--help"])
    assert ended.value.code == 0
    captured = capsys.readouterr()
    assert not captured.err
    shown = " ".join(captured.out.split())
    assert "(default: None)" not in shown
    for action in flags_of(path):
        assert all(option in shown for option in action.option_strings), action
        if action.option_strings and action.default not in (None, False, "") and action.dest != "engine":
            default = ",".join(map(str, action.default)) if isinstance(action.default, list) else str(action.default)
            # A long list is broken where the line ends.
            said = f"(default: {default or 'a generated one'})"
            assert said.replace(" ", "") in shown.replace(" ", ""), action


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_a_flag_says_what_it_is_in_which_unit_and_what_none_means(path: list[str]) -> None:
    for action in flags_of(path):
        assert action.help, action
        if action.option_strings and action.default is None and not action.required:
            assert "(default: " in action.help, f"{action.option_strings}: what does it mean to leave it out?"
        if action.nargs != 0 and not action.choices and action.dest != "command":
            assert isinstance(action.metavar, str), action
            assert action.metavar.removesuffix(",...").removesuffix(",...") in UNITS, action


def test_one_word_has_one_unit_everywhere() -> None:
    """A flag of the same name counts the same thing in every command."""
    seen: dict[str, tuple[str, str]] = {}
    for path in PATHS:
        for action in flags_of(path):
            for option in action.option_strings:
                own = str(action.metavar).partition(",...")[0]
                if option == "--output" and own in ("FILE", "FOLDER"):
                    # Whatever the command writes: kernels by name, or one set of numbers.
                    continue
                unit, where = seen.setdefault(option, (own, " ".join(path)))
                assert unit == own, f"{option} is {own} in {path} and {unit} in {where}"


@pytest.mark.parametrize("path", [[], ["bench"], ["plugin"]], ids=str)
def test_a_command_without_what_to_do_shows_its_help(path: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(path) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("usage: trtllm-vattn")
    assert not captured.err


BAD = [
    "",
    "-1",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "٣",
    "1_0",
    "0x10",
    "1.5.5",
    "x" * 9000,
    "\0",
    "none,1",
    "1,,x",
    "40 apples",
    "--",
    "True",
]
GOOD_FOR_SOME = ["0", "1.5", "9" * 40, "9" * 5000, "40GiB", "cuda:99", "mps", "."]


@pytest.mark.parametrize("path", [path for path in PATHS if path not in ([], ["bench"], ["plugin"])], ids=" ".join)
def test_values_that_cannot_be_end_in_one_line(path: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever a flag is given, parsing gives a value or one line that names the flag; never another exception."""
    parser = parser_of(path)
    assert isinstance(parser, Parser)
    parser.set_defaults(folder=None)
    for action in flags_of(path):
        if not action.option_strings or action.nargs == 0:
            continue
        option = action.option_strings[0]
        refused = []
        for value in [*BAD, *GOOD_FOR_SOME]:
            try:
                parser.parse_args([f"{option}={value}", *required(parser, option)])
            except SystemExit as ended:
                code = ended.code
            else:
                continue
            captured = capsys.readouterr()
            assert (code, captured.out) == (2, "")
            assert captured.err.count("\n") == 1
            assert option in captured.err, (value, captured.err)
            assert len(captured.err) < 1500
            refused.append(value)
        # Texts are judged where they are used, but what a flag counts is not.
        if action.type in (
            types.positive,
            types.non_negative,
            types.amount,
            types.tolerance,
            types.size,
            types.numbers,
            types.seed,
        ):
            assert set(BAD) <= set(refused), (option, set(BAD) - set(refused))


def required(parser: argparse.ArgumentParser, but: str) -> list[str]:
    """What a command cannot do without."""
    given: list[str] = []
    for action in parser._actions:
        if action.required and not isinstance(action, argparse._SubParsersAction):
            if not action.option_strings:
                given.append("x") if action.nargs is None else None
            elif but not in action.option_strings:
                given += [action.option_strings[0], "1GiB" if action.metavar == "BYTES" else "/tmp/somewhere"]
    return given


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "argument COMMAND: invalid choice: 'nonsense'"),
        (["bench", "nonsense"], "argument BENCHMARK: invalid choice: 'nonsense'"),
        (["bench", "graph", "--nonsense"], "unrecognized arguments: --nonsense (see trtllm-vattn bench graph --help)"),
        (["top", "--url", "http://x"], "unrecognized arguments: --url (see trtllm-vattn top --help)"),
        (["bench", "graph", "--req", "3"], "unrecognized arguments: --req 3"),
        (["bench", "graph", "nonsense"], "unrecognized arguments: nonsense"),
        (["bench", "graph", "--requests"], "argument --requests: expected one argument"),
        (["bench", "graph", "--requests", "-3"], "argument --requests: it is '-3'; give a whole number from 0 to"),
        (["bench", "serve", "--budget", "12 apples"], "'12 apples' is no number of bytes; write 17179869184 or"),
        (["bench", "serve", "--budget", "0"], "argument --budget: it is '0'; give at least 1 byte"),
        (["bench", "serve", "--caches", "orca"], "argument --caches: no cache 'orca'; there are contiguous, paged,"),
        (["bench", "serve", "--attention", "flash"], "argument --attention: invalid choice: 'flash'"),
        (["bench", "serve", "--device", "mps"], "argument --device: it is 'mps'; there"),
        (["bench", "serve", "--device", "cuda:99"], "argument --device: it is 'cuda:99'; there"),
        (["bench", "attention", "--heads", "32,8"], "give query heads, KV heads and their size, as 32,8,128"),
        (["bench", "attention", "--heads", "5,2,16"], "query heads a multiple"),
        (["bench", "attention", "--points", "8"], "write sequences x tokens, as 8x8192"),
        (["bench", "faults", "--probability", "1.01"], "give a number from 0 to 1"),
        (["bench", "xqa", "--tie-tolerance", "nan"], "give a number from 0 on"),
        (["bench", "faults", "--output-json", "/"], "argument --output-json: it is '/', which is not a file"),
        (["bench", "faults", "--output-json", "/dev/null/x"], "cannot be written to"),
        (["bench", "faults", "--output-json", "/proc/version/x/y"], "cannot be written to"),
        (["bench", "graph", "--plot", "out.gif"], "give a name that ends in .png, .svg, .pdf"),
        (
            ["plugin", "build", "tiny-llama", "--output", "/dev/null"],
            "argument --output: it is '/dev/null', which is not a folder",
        ),
        (["plugin", "build", "tiny-llama"], "the following arguments are required: --output"),
    ],
)
def test_a_wrong_argument_is_one_line_that_says_what_to_give(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("trtllm-vattn")
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_limits_without_a_limit_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["broker", "limits", "--socket", "/tmp/nobody.sock", "--tenant", "chat"]) == 2
    assert "no limit to change; give --floor, --ceiling or --priority" in capsys.readouterr().err


def test_sizes_are_bytes_as_people_write_them() -> None:
    assert types.size("40GiB") == 40 << 30
    assert types.size("1.5 MiB") == 3 << 19
    assert types.size("4096") == 4096
    assert types.sizes("4MiB,1GiB") == [4 << 20, 1 << 30]
    parsed = build_parser(["bench", "serve"], "0").parse_args(["bench", "serve", "--device", "cpu", "--budget", "3GiB"])
    assert parsed.budget == 3 << 30


def test_only_the_command_that_is_asked_for_is_imported(tmp_path: Path) -> None:
    """Help and version do not wait for torch; a command's words behind `run` are not commands of ours."""
    source = (
        "import sys\nfrom trtllm_vattn.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)), file=sys.stderr)\n"
    )
    for arguments in (["--version"], ["--help"], [], ["bench", "--help"], ["bench"], ["nonsense"]):
        done = subprocess.run([sys.executable, "-c", source, *arguments], capture_output=True, text=True, check=True)
        assert done.stderr.splitlines()[-1] == "[]", arguments
    parser = build_parser(["run", "--", "bench", "graph"], "0")
    assert not list(children(children(parser)["bench"])["graph"]._actions)[1:]
