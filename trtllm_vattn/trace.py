"""A trace of events for Perfetto (ui.perfetto.dev) and chrome://tracing, streamed to a file in the Trace Event Format.

Whoever notes an event appends a tuple to a queue; a thread of the trace formats and writes, so that no step waits for
the disk. The file is a JSON array of which each line is one event, and whose end the format leaves optional: what a
killed process leaves is loaded as it is, without the last `FLUSH_S` seconds.

Times are those of `time.perf_counter`, which on Linux is CLOCK_MONOTONIC in every process, so that traces of several
processes of one machine lie on one axis; the first event says what the time of day was.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.files import reason
from trtllm_vattn.values import described, shown

logger = logging.getLogger(__name__)

FLUSH_S = 0.05
"""Seconds that an event waits at most before it is written."""
AT_ONCE = 64
"""Events that are formatted at once: between two of these the thread lets others run."""
MOST_WAITING = 1 << 18
"""Events that wait for a slow disk; what comes then is dropped, and counted."""
OTHER_THREAD = "calls that no signal interrupts"
"""Name of a thread that the threading module does not know: the helper of vmm/uninterrupted.py."""

Arguments = dict[str, Any]
_encode = json.JSONEncoder(separators=(",", ":"), default=str).encode


class _Event(NamedTuple):
    phase: str
    name: str
    category: str
    track: int | str
    at: float
    seconds: float
    number: int | None
    args: Arguments | None


class Trace:
    """Notes events, from any thread. A forked child's notes nothing.

    Where the file cannot be written any more (a full disk), what was written stays whole and loadable, the trace ends
    with a warning, and whoever notes events goes on.

    Parameters
    ----------
    path : str or Path
        Of the file, which is written anew.

    Attributes
    ----------
    error : str or None
        Why the trace ended before it was closed.
    dropped : int
        Events that were not written.
    is_owned : bool
        Whether an engine opened it, and closes it.

    Raises
    ------
    ConfigError
        The file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self.dropped, self.is_owned = Path(path), 0, False
        self.error: str | None = None
        self._waiting: deque[_Event] = deque()
        self._tracks: dict[int | str, int] = {}
        self._counters: dict[str, dict[str, float]] = {}
        self._process = os.getpid()
        self._ended = False
        self._stop = threading.Event()
        self._whole = 0
        begun = self._line("M", "process_name", args={"name": f"trtllm-vattn {self._process}"})
        at = {"unix_time_s": time.time(), "perf_counter_s": time.perf_counter()}
        begun += self._line("i", "trace begins", at=time.perf_counter(), tid=0, args=at)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                self._write(b"[\n" + begun.encode())
            except OSError:
                os.close(self._file)
                # Not a pipe or a device.
                if self.path.is_file():
                    self.path.unlink()
                raise
        except OSError as error:
            raise ConfigError(f"cannot write the trace {self.path}: {error.strerror}") from error
        self._thread = threading.Thread(target=self._run, name="vattn-trace", daemon=True)
        self._thread.start()
        _traces.add(self)

    @classmethod
    def of(cls, given: Trace | str | os.PathLike[str] | None) -> Trace | None:
        """A trace as it is, or a new one, which is owned, for a path; None for None. Raises ConfigError."""
        if given is None or isinstance(given, Trace):
            return given
        if not isinstance(given, str | os.PathLike):
            raise ConfigError(f"trace is {described(given)}; give a file's path, or a Trace")
        made = cls(given)
        made.is_owned = True
        return made

    # -- noting ----------------------------------------------------------------------------------------------------

    def span(
        self,
        name: str,
        started: float,
        ended: float,
        args: Arguments | None = None,
        category: str = "",
        track: str | None = None,
    ) -> None:
        """Something took from `started` to `ended`, in seconds of `time.perf_counter`: in this thread, or on a track of
        its own."""
        self._put("X", name, category, track, started, ended - started, None, args)

    @contextmanager
    def spanning(self, name: str, category: str = "", args: Arguments | None = None) -> Iterator[None]:
        """A span of what is done inside, whatever it raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.span(name, started, time.perf_counter(), args, category)

    def instant(self, name: str, args: Arguments | None = None, category: str = "") -> None:
        """Something happened now, in this thread."""
        self._put("i", name, category, None, time.perf_counter(), 0.0, None, args)

    def begin(self, name: str, number: int, args: Arguments | None = None) -> None:
        """Something with a number begins, on a track of its own, until `end`."""
        self._put("b", name, name, "", time.perf_counter(), 0.0, number, args)

    def mark(self, name: str, number: int, mark: str, args: Arguments | None = None) -> None:
        """Something happened to what `begin` began."""
        self._put("n", mark, name, "", time.perf_counter(), 0.0, number, args)

    def end(self, name: str, number: int, args: Arguments | None = None) -> None:
        """What `begin` began is over."""
        self._put("e", name, name, "", time.perf_counter(), 0.0, number, args)

    def counter(self, name: str, values: dict[str, float]) -> None:
        """Numbers are these from now on; nothing is noted where they were so before."""
        if self._counters.get(name) != values:
            self._counters[name] = values
            self._put("C", name, "", "", time.perf_counter(), 0.0, None, values)

    def _put(
        self,
        phase: str,
        name: str,
        category: str,
        track: str | None,
        at: float,
        seconds: float,
        number: int | None,
        args: Arguments | None,
    ) -> None:
        if self._ended or len(self._waiting) >= MOST_WAITING:
            self.dropped += 1
            return
        where: int | str = threading.get_ident() if track is None else track
        self._waiting.append(_Event(phase, name, category, where, at, seconds, number, args))

    # -- writing ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.wait(FLUSH_S):
            self._flush()

    def _flush(self) -> None:
        try:
            while self._waiting and self.error is None:
                count = min(AT_ONCE, len(self._waiting))
                lines = [self._formatted(self._waiting.popleft()) for _ in range(count)]
                self._write("".join(lines).encode())
        except OSError as error:
            self._ended = True
            self.error = f"cannot write the trace {self.path} any more: {error.strerror}; it ends here, and loads"
            self.dropped += count + len(self._waiting)
            self._waiting.clear()
            # Back to the last whole event.
            with suppress(OSError):
                os.ftruncate(self._file, self._whole)
            logger.warning("%s", self.error)

    def _write(self, text: bytes) -> None:
        left = memoryview(text)
        while left:
            left = left[os.write(self._file, left) :]
        self._whole += len(text)

    def _formatted(self, event: _Event) -> str:
        named = ""
        tid = 0
        if event.track != "":
            known = self._tracks.get(event.track)
            if known is None:
                known = self._tracks[event.track] = len(self._tracks) + 1
                named = self._line("M", "thread_name", tid=known, args={"name": _name_of(event.track)})
            tid = known
        return named + self._line(
            event.phase, event.name, event.category, tid, event.at, event.seconds, event.number, event.args
        )

    def _line(
        self,
        phase: str,
        name: str,
        category: str = "",
        tid: int = 0,
        at: float = 0.0,
        seconds: float = 0.0,
        number: int | None = None,
        args: Arguments | None = None,
    ) -> str:
        more = f',"cat":"{category}"' if category else ""
        if phase == "X":
            more += f',"dur":{1e6 * seconds:.3f}'
        elif number is not None:
            more += f',"id":{number}'
        elif phase == "i":
            more += ',"s":"t"'
        if args is not None:
            more += f',"args":{_encode(args)}'
        return f'{{"name":"{name}","ph":"{phase}","ts":{1e6 * at:.3f},"pid":{self._process},"tid":{tid}{more}}},\n'

    def close(self) -> None:
        """Write what waits, and end the file. Idempotent."""
        if self._ended and self._stop.is_set():
            return
        self._stop.set()
        if self._process == os.getpid():
            self._thread.join()
            self._flush()
            self._ended = True
            with suppress(OSError):
                if self.error is None:
                    line = self._line("i", "trace ends", at=time.perf_counter(), args={"dropped": self.dropped})
                    self._write(f"{line[:-2]}\n]\n".encode())
            os.close(self._file)
        _traces.discard(self)

    def enter_child(self) -> None:
        """In a forked child: it is the parent's file."""
        self._ended = True
        self._waiting.clear()
        if not self._stop.is_set():
            self._stop.set()
            os.close(self._file)

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_traces: weakref.WeakSet[Trace] = weakref.WeakSet()


def _name_of(track: int | str) -> str:
    if isinstance(track, str):
        return track
    return next((each.name for each in threading.enumerate() if each.ident == track), OTHER_THREAD)


@atexit.register
def _close_all() -> None:
    for trace in list(_traces):
        trace.close()


def _enter_child() -> None:
    for trace in list(_traces):
        trace.enter_child()
    _traces.clear()


os.register_at_fork(after_in_child=_enter_child)


def read_trace(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events of a trace, of one that a killed process left, too. Raises ConfigError where it is none."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {reason(error)}") from error
    if not text.startswith("["):
        raise ConfigError(f"{path} is no trace: it does not begin with '['")
    events = []
    lines = text.splitlines()[1:]
    for number, line in enumerate(lines, 2):
        if line in ("]", ""):
            break
        try:
            event = json.loads(line.removesuffix(","))
        except (ValueError, RecursionError) as error:
            if number == len(lines) + 1:
                break  # it was being written when the process was killed
            raise ConfigError(f"{path}, line {number}: {error}") from error
        if not isinstance(event, dict) or not {"name", "ph"} <= event.keys():
            raise ConfigError(f"{path}, line {number}: {shown(event)} is no event, which has a name and a ph")
        events.append(event)
    return events
