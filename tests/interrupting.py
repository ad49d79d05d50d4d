"""KeyboardInterrupt at a chosen instruction: what a timer hits once in a million runs, hit every time.

An instruction is counted where Python runs signal handlers: in the main thread, in frames of the package.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import trtllm_vattn

ROOT = Path(trtllm_vattn.__file__).resolve().parents[1]
PLACES = tuple(str(ROOT / part) + os.sep for part in ("trtllm_vattn", "graphs", "plugins"))
THOROUGH = bool(os.environ.get("VATTN_THOROUGH"))
"""Whether tests interrupt at every instruction, not at every so manieth (VATTN_THOROUGH=1 in the environment)."""


class _Tracer:
    """Counts instructions and raises at number `at`, once."""

    def __init__(self, at: int | None) -> None:
        self.at, self.seen = at, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PLACES):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            if self.seen == self.at:
                raise KeyboardInterrupt
            self.seen += 1
        return self


def _traced(call: Callable[[], object], at: int | None) -> int:
    tracer = _Tracer(at)
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        call()
    finally:
        sys.settrace(before)
    return tracer.seen


def instructions_of(call: Callable[[], object]) -> int:
    """How many instructions of the package a call runs in this thread."""
    return _traced(call, None)


def interrupt_at(number: int, call: Callable[[], object]) -> bool:
    """Make a call and raise KeyboardInterrupt in it before instruction `number`, from 0 on; whether it came so far.

    Whatever else the call raises is raised.
    """
    try:
        _traced(call, number)
    except KeyboardInterrupt:
        return True
    return False


def numbers(count: int, stride: int) -> Iterator[int]:
    """Instructions to interrupt at: every `stride`-th, all of them where `THOROUGH`; the first and last ones always."""
    some = {*range(0, count, 1 if THOROUGH else stride), *range(min(3, count)), *range(max(0, count - 3), count)}
    return iter(sorted(some))
