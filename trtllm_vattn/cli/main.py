"""`trtllm-vattn`: runs one of the commands that parser.py lists, and says in one line what the user can mend."""

from __future__ import annotations

import errno
import importlib.metadata
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from trtllm_vattn.cli.parser import build_parser, one_line
from trtllm_vattn.cli.torchrun import launched, own_rank, run_on_ranks, spoken_once
from trtllm_vattn.errors import VattnError
from trtllm_vattn.lost import end_process, is_lost_behind

EXTRAS = {
    "transformers": "runtime",
    "matplotlib": "bench",
    "cudnn": "cuda",
    "flashinfer": "xqa",
    "tensorrt_rtx": "tensorrt-rtx",
    "onnx": "tensorrt-rtx",
    "tensorrt_llm": "tensorrt-llm",
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "llguidance": "grammar",
    "msgspec": "tenancy",
    "rich": "observe",
}
"""Which of the package's extras installs an optional package."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns 0 where it went well, 1 where a check or a benchmark found something wrong, 2 for what the user can mend,
    which is said in one line on stderr, 130 where it was interrupted, and 141 where nobody reads its output. Where the
    device is lost, the process of a command line (`arguments` is None) ends here, with 2.
    """
    is_process = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    interrupts: list[int] = []
    try:
        with _noting(interrupts):
            try:
                return _run(arguments, interrupts)
            finally:
                _flush()
    except BrokenPipeError:
        # What is still in the buffer cannot be written, and would be complained about at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except Exception as error:
        if interrupts and not is_lost_behind(error):
            # Imports that lost an interrupt leave modules that lack something.
            return _say("interrupted", 130)
        if (told := _foreseeable(error)) is None:
            raise
        code = _say(told, 2)
        if is_process and is_lost_behind(error):
            # Before the frames that the error holds are left: what is in them would be freed.
            end_process(code)
        return code


@contextmanager
def _noting(interrupts: list[int]) -> Iterator[None]:
    """Append to a list for each interrupt of the main thread, beside raising KeyboardInterrupt: what torch and numpy
    import in C drops the exception, and goes on."""

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(arguments: list[str], interrupts: list[int]) -> int:
    with spoken_once():
        parsed = build_parser(arguments, importlib.metadata.version("trtllm-vattn")).parse_args(arguments)
        if parsed.run is None:
            parsed.shown.print_help()
            return 0
    if interrupts:
        raise KeyboardInterrupt
    logging.basicConfig(level=logging.INFO if parsed.verbose else logging.WARNING, format="%(name)s: %(message)s")
    code: int = run_on_ranks(parsed) if launched() else parsed.run(parsed)
    return code


def _flush() -> None:
    """Write out what was printed. Raises OSError, which names standard output; what cannot be written is dropped."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # What is still in the buffer would be complained about at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, "standard output") from error


def _say(text: str, code: int) -> int:
    rank = f"rank {own_rank()}: " if own_rank() else ""
    print(f"trtllm-vattn: {rank}{one_line(text)}", file=sys.stderr)
    return code


def _foreseeable(error: Exception) -> str | None:
    """What the user can do about an error; None for a bug of this library."""
    if isinstance(error, VattnError):
        return str(error)
    if is_lost_behind(error):
        first, _, _ = str(error).partition("\n")
        return f"the device is lost: {first}; start the command anew"
    if isinstance(error, ModuleNotFoundError) and (package := (error.name or "").partition(".")[0]) in EXTRAS:
        return f"{package} is not installed: pip install 'trtllm-vattn[{EXTRAS[package]}]'"
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not error.filename:
            return f"what is written to (standard output, perhaps) is full: {error.strerror}"
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    # torch has a class of its own for a GPU's memory, and none for the host's.
    out_of_memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    if isinstance(error, MemoryError) or out_of_memory:
        return f"out of memory: {str(error) or 'give smaller sizes'}"
    return None


if __name__ == "__main__":
    sys.exit(main())
