"""KeyboardInterrupt at a chosen instruction: what a timer hits once in a million runs, hit every time.

An instruction is counted where Python runs signal handlers: in the main thread, in frames of the package.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import trtllm_vattn

ROOT = Path(trtllm_vattn.__file__).resolve().parents[1]
PLACES = tuple(str(ROOT / part) + os.sep for part in ("trtllm_vattn", "graphs", "plugins"))
THOROUGH = bool(os.environ.get("VATTN_THOROUGH"))
"""Whether tests interrupt at every instruction, not at every n-th one (VATTN_THOROUGH=1 in the environment)."""


def nowhere(frame: FrameType) -> bool:
    return False


class _Tracer:
    """Counts instructions and raises at number `at`, once; but not where `spared` says so of a frame."""

    def __init__(self, at: int | None, spared: Callable[[FrameType], bool]) -> None:
        self.at, self.seen, self.spared = at, 0, spared

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PLACES):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and not self.spared(frame):
            if self.seen == self.at:
                raise KeyboardInterrupt
            self.seen += 1
        return self


def _traced(call: Callable[[], object], at: int | None, spared: Callable[[FrameType], bool]) -> int:
    tracer = _Tracer(at, spared)
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        call()
    finally:
        sys.settrace(before)
    return tracer.seen


def instructions_of(call: Callable[[], object], spared: Callable[[FrameType], bool] = nowhere) -> int:
    """How many instructions of the package a call runs in this thread."""
    return _traced(call, None, spared)


def interrupt_at(number: int, call: Callable[[], object], spared: Callable[[FrameType], bool] = nowhere) -> bool:
    """Make a call and raise KeyboardInterrupt in it before instruction `number`, from 0 on; whether it came so far.

    Whatever else the call raises is raised.

    Parameters
    ----------
    spared : callable
        Of frames whose present instruction is not counted, where Python runs no signal handler.
    """
    try:
        _traced(call, number, spared)
    except KeyboardInterrupt:
        return True
    return False


def numbers(count: int, stride: int) -> Iterator[int]:
    """Instructions to interrupt at: every `stride`-th, all of them where `THOROUGH`; the first and last ones always."""
    some = {*range(0, count, 1 if THOROUGH else stride), *range(min(3, count)), *range(max(0, count - 3), count)}
    return iter(sorted(some))


def within(seconds: float, call: Callable[[], object]) -> None:
    """Make a call in another thread, as a watchdog does; it ends in time, and raises nothing."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    assert not raised, raised
