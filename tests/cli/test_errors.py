"""What can be foreseen ends in one line on stderr, with code 2; an interrupt with 130; a closed pipe in silence."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forking
import pytest

from trtllm_vattn.bench.cases import faults
from trtllm_vattn.bench.harness import report
from trtllm_vattn.cli.main import main
from trtllm_vattn.errors import ConfigError, InvariantViolation

FAULTS = ["bench", "faults", "--operations", "20"]


def raising(error: BaseException) -> Callable[..., int]:
    def run(*_: object, **__: object) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("it cannot be\nso"), 2, "trtllm-vattn: it cannot be so\n"),
        (InvariantViolation("3 of 4 are held"), 2, "trtllm-vattn: 3 of 4 are held\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/there"),
            2,
            "trtllm-vattn: /there: No space left on device\n",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/there"), 2, "trtllm-vattn: /there: Permission denied\n"),
        (OSError("nothing is like it ought to be"), 2, "trtllm-vattn: nothing is like it ought to be\n"),
        (MemoryError(), 2, "trtllm-vattn: out of memory: give smaller sizes\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 2, "out of memory: DefaultCPUAllocator"),
        (
            RuntimeError("CUDA error: device-side assert triggered\nFor debugging consider"),
            2,
            "trtllm-vattn: the device is lost: CUDA error: device-side assert triggered; start the command anew\n",
        ),
        (KeyboardInterrupt(), 130, "trtllm-vattn: interrupted\n"),
        (
            ModuleNotFoundError("no", name="rich.console"),
            2,
            "rich is not installed: pip install 'trtllm-vattn[observe]'",
        ),
        (ModuleNotFoundError("no", name="cudnn.api"), 2, "cudnn is not installed: pip install 'trtllm-vattn[cuda]'\n"),
    ],
    ids=repr,
)
def test_an_error_that_can_be_foreseen_is_one_line(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(faults, "run", raising(error))
    assert main(FAULTS) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("x"), ModuleNotFoundError("no", name="ours")])
def test_a_fault_of_ours_is_not_hidden(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "run", raising(error))
    with pytest.raises(type(error)):
        main(FAULTS)


def test_a_full_disk_loses_no_summary_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text = Path.write_text

    def full(self: Path, text: str) -> int:
        write_text(self, text[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report.Path, "write_text", full)
    assert main([*FAULTS, "--output-json", str(tmp_path / "out" / "faults.json")]) == 2
    captured = capsys.readouterr()
    assert "operations: 20" in captured.out
    assert (
        captured.err
        == f"trtllm-vattn: cannot write the results to {tmp_path}/out/faults.json: No space left on device\n"
    )
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["bench", "graph", "--device", "cpu", "--trace", "/nowhere.csv"],
            "cannot read the trace /nowhere.csv: No such",
        ),
        (["bench", "graph", "--device", "cpu", "--model", "gpt-5"], "no model 'gpt-5': it is no directory here"),
        (["bench", "graph", "--device", "cpu", "--batch-sizes", "1"], "--batch-sizes times steps on a GPU"),
        (["bench", "graph", "--device", "cpu", "--requests", "0"], "there is nothing to do; give one of them"),
        (["bench", "graph", "--device", "cpu", "--engine", "/nowhere"], "/nowhere holds no engine"),
        (["bench", "graph", "--device", "cpu", "--attention", "cudnn"], "the cudnn backend needs a GPU"),
        (["bench", "graph", "--device", "cpu", "--max-seq-len", "9"], "lower --max-output, or raise --max-seq-len"),
        (["bench", "serve", "--device", "cpu", "--budget", "9"], "9 bytes hold no slot of 256 tokens; raise --budget"),
        (["bench", "fragmentation", "--budget", "1MiB"], "raise --budget, or lower --max-seq-len"),
        (["bench", "soak", "--device", "cpu", "--state", "{here}/list.json"], "it holds list, not an object"),
        (["bench", "soak", "--device", "cpu", "--state", "{here}/empty.json"], "has no seed, model, chunks"),
        (["bench", "burst", "--device", "cpu", "--prompt-tokens", "2"], "--prompt-tokens is 2"),
        (["bench", "plugin", "--device", "cpu", "--max-seq-len", "3"], "--max-seq-len is 3"),
        (["plugin", "inspect", "/nowhere"], "/nowhere"),
        (["run"], "no command to run; write: trtllm-vattn run -- trtllm-serve MODEL"),
        (["run", "--", "a-command-that-is-not-there"], "that-is-not-there: No such file or directory; is it"),
        (["demo", "--model", "gpt-5"], "no model 'gpt-5'"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "empty.json").write_text("{}")
    assert main([argument.replace("{here}", str(tmp_path)) for argument in arguments]) == 2
    *progress, line = capsys.readouterr().err.splitlines()
    assert line.startswith("trtllm-vattn: ")
    assert message in line
    # A benchmark may have said by then what it is at.
    assert all(re.match(r"\d\d:\d\d:\d\d \w+ +\d+\.\d s: ", each) for each in progress)
    assert not any(message in each for each in progress)


def test_a_missing_plotting_library_is_said_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(SystemExit):
        main(["bench", "fragmentation", "--plot", str(tmp_path / "x.png")])
    assert "plots need matplotlib: pip install 'trtllm-vattn[bench]'" in capsys.readouterr().err


def apart(source: str, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = [
        python,
        "-c",
        f"import sys, signal, os, threading\nfrom trtllm_vattn.cli.main import main\n{source}",
    ]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_a_missing_transformers_is_one_line() -> None:
    done = apart("sys.modules['transformers'] = None\nsys.exit(main(sys.argv[1:]))", "bench", "graph")
    assert done.returncode == 2
    assert done.stderr == "trtllm-vattn: transformers is not installed: pip install 'trtllm-vattn[runtime]'\n"


def test_an_interrupt_ends_in_one_line() -> None:
    # Imports are over then, and some of the work is done; the rest of it never ends.
    source = (
        # Whoever runs the tests in a shell's background has its children ignore the signal.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from trtllm_vattn.verify.fault_injection import FaultStress\n"
        "run = FaultStress.run\n"
        "def begun(self, operations):\n"
        "    run(self, 20)\n"
        f"    os.kill(os.getpid(), {int(signal.SIGINT)})\n"
        "    threading.Event().wait()\n"
        "FaultStress.run = begun\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = apart(source, "bench", "faults", "--operations", "100000000", "--life", "100000000", python=forking.python())
    assert done.returncode == 130
    assert done.stderr == "trtllm-vattn: interrupted\n"


@pytest.mark.parametrize("where", ["build_parser", "run_on_ranks"])
def test_an_interrupt_that_an_import_loses_ends_in_one_line(where: str) -> None:
    source = (
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import trtllm_vattn.cli.main as module\n"
        f"original = module.{where}\n"
        "def losing(*given):\n"
        "    try:\n"
        f"        os.kill(os.getpid(), {int(signal.SIGINT)})\n"
        "        threading.Event().wait(10)\n"
        "    except KeyboardInterrupt:\n"
        "        pass\n"
        f"    if {where == 'run_on_ranks'}:\n"
        "        raise AttributeError('half a module')\n"
        "    return original(*given)\n"
        f"module.launched = lambda: True\nmodule.{where} = losing\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = apart(source, "plugin", "list", python=forking.python())
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "trtllm-vattn: interrupted\n")


@pytest.mark.parametrize("arguments", [["--help"], ["bench"], ["plugin", "list"]], ids=" ".join)
def test_a_closed_pipe_ends_quietly(arguments: list[str]) -> None:
    """As in ``trtllm-vattn … | head``, where head has read enough."""
    command = [forking.python(), "-m", "trtllm_vattn", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        # argparse itself is silent about help that nobody reads.
        assert process.wait(60) in ((0, 141) if arguments != ["plugin", "list"] else (141,))


@pytest.mark.parametrize(
    ("unbuffered", "said"), [("", "standard output:"), ("1", "what is written to (standard output, perhaps) is full:")]
)
def test_a_full_disk_behind_standard_output_is_told(unbuffered: str, said: str) -> None:
    command = [sys.executable, "-m", "trtllm_vattn", "plugin", "list"]
    with open("/dev/full", "w") as disk:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=disk,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (2, f"trtllm-vattn: {said} No space left on device\n")


LOST = """
import atexit, os, sys
from trtllm_vattn.cli import main as cli
from trtllm_vattn.errors import ConfigError, DriverError, EngineClosed
from trtllm_vattn.lost import never_free

class Holder:
    # As a pinned tensor of a lost device, in a cycle.
    def __init__(self):
        self.own = self
    def __del__(self):
        os.abort()

def run(arguments, interrupts):
    holder = Holder()
    atexit.register(print, "at exit")
    if case == "kept":
        never_free(holder)
        return 3
    try:
        raise (ConfigError if case == "not lost" else DriverError)("CUDA_ERROR_ASSERT", "cuEventCreate", ())
    except Exception as error:
        raise EngineClosed("the engine ended") from error

case = sys.argv[1]
cli._run = run
sys.exit(cli.main())
"""


@pytest.mark.parametrize(("case", "code"), [("lost", 2), ("not lost", -signal.SIGABRT), ("kept", 3)])
def test_a_process_whose_device_is_lost_ends_with_its_own_code(case: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", LOST, case], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert ("trtllm-vattn: the engine ended\n" in done.stderr) == (case != "kept")
    assert done.stdout.count("at exit") == 1
