"""Request traces: three public formats told apart by their content, generators for when there is none, and token ids
for whatever depends on what prompts share.

* Azure (Azure/AzurePublicDataset; Splitwise, ISCA'24): CSV with TIMESTAMP, ContextTokens, GeneratedTokens. A timestamp
  has any number of digits of a second or none, and an offset from UTC or none, which is taken as UTC.
* Mooncake (kvcache-ai/Mooncake, FAST'25): JSON lines, or one JSON list, of objects with timestamp (ms), input_length,
  output_length and, where known, hash_ids, one for each block of 512 prompt tokens.
* ShareGPT lengths (microsoft/sarathi-serve): CSV with num_prefill_tokens, num_decode_tokens; no arrival times.

Files are UTF-8, with or without a byte order mark, lines end in LF or CRLF, and a name that ends in ``.gz`` is
decompressed. A file is read no further than to the last request asked for.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import logging
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, ClassVar, TextIO, TypeVar

import numpy as np

from trtllm_vattn.errors import ConfigError

logger = logging.getLogger(__name__)
T = TypeVar("T")

PREFIX_BLOCK = 512
"""Prompt tokens that one of a request's `prefix_blocks` stands for."""
LONGEST = 1 << 24
"""Tokens of a prompt or an output from which on a row is taken for a mistake."""
_LATEST_MS = 1e15
"""Milliseconds beyond which a timestamp is taken for a mistake."""
_LINE_CHARACTERS = 1 << 22
"""Longest line of CSV or JSON lines, and longest request of a JSON list."""
_CHUNK_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class Request:
    """One request: when it arrives, how long it is, and which 512-token blocks of its prompt it shares with others."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_blocks: tuple[int, ...] = ()


_Timed = tuple[int, Request]
"""An arrival in whole nanoseconds, which a float of seconds since 1970 would round, and the request."""
Row = dict[str, str]

_TIMESTAMP = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[ T](\d\d):(\d\d):(\d\d)(?:[.,](\d+))? ?(?:(Z|z|UTC)|([+-])(\d\d):?(\d\d))?", re.ASCII
)
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def _nanoseconds(text: str) -> tuple[int, bool]:
    """Since 1970, and whether the text has an offset from UTC. Raises ValueError."""
    if not (found := _TIMESTAMP.fullmatch(text.strip())):
        raise ValueError(f"TIMESTAMP is {text!r:.60}; write 2024-05-10 00:00:01.25 or 2024-05-10 00:00:01+00:00")
    *whole, fraction, utc, sign, hours, minutes = found.groups()
    year, month, day, hour, minute, second = map(int, whole)
    try:
        moment = datetime(year, month, day, hour, minute, second, tzinfo=timezone.utc)
    except ValueError as error:
        raise ValueError(f"TIMESTAMP is {text!r:.60}: {error}") from error
    seconds = (moment - _EPOCH) // timedelta(seconds=1)
    if sign:
        seconds -= int(f"{sign}1") * (3600 * int(hours) + 60 * int(minutes))
    return 10**9 * seconds + int((fraction or "0")[:9].ljust(9, "0")), bool(utc or sign)


def _tokens(name: str, value: object) -> int:
    """A whole number of tokens from a cell's text or a JSON number. Raises ValueError."""
    text = value.strip() if isinstance(value, str) else json.dumps(value)
    # Whole numbers exactly; pandas writes 12.0 and 1e3 for them too.
    if isinstance(value, bool) or not re.fullmatch(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?", text, re.ASCII):
        raise ValueError(f"{name} is {value!r:.60}; it must be a whole number of tokens")
    number = float(text)
    if abs(number) >= LONGEST:
        raise ValueError(f"{name} is {value!r:.60}; requests have fewer than {LONGEST:,} tokens")
    if not number.is_integer():
        raise ValueError(f"{name} is {value!r:.60}; it must be a whole number of tokens")
    return int(number)


class _Azure:
    kind: ClassVar[str] = "azure"
    columns: ClassVar[tuple[str, ...]] = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

    def __init__(self) -> None:
        self._with_offset: bool | None = None

    def __call__(self, row: Row) -> _Timed:
        at, prompt, output = (row[name] for name in self.columns)
        arrival, with_offset = _nanoseconds(at)
        if self._with_offset not in (None, with_offset):
            raise ValueError(f"TIMESTAMP is {at!r}; give an offset from UTC in every row, or in none")
        self._with_offset = with_offset
        return arrival, _request((self.columns[1], prompt), (self.columns[2], output))


class _ShareGPT:
    kind: ClassVar[str] = "sharegpt"
    columns: ClassVar[tuple[str, ...]] = ("num_prefill_tokens", "num_decode_tokens")

    def __call__(self, row: Row) -> _Timed:
        prompt, output = ((name, row[name]) for name in self.columns)
        return 0, _request(prompt, output)


def _request(prompt: tuple[str, object], output: tuple[str, object], blocks: tuple[int, ...] = ()) -> Request:
    """A request from the names and values of its lengths. Raises ValueError."""
    lengths = _tokens(*prompt), _tokens(*output)
    for (name, value), length, least in zip((prompt, output), lengths, (1, 0), strict=True):
        if length < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    return Request(0.0, *lengths, blocks)


def _mooncake(row: Any) -> _Timed:
    if not isinstance(row, dict):
        raise ValueError(f"it is {type(row).__name__}; a request is an object with timestamp, input_length, …")
    if missing := [name for name in ("timestamp", "input_length", "output_length") if name not in row]:
        raise ValueError(f"{', '.join(missing)} missing")
    at, blocks = row["timestamp"], row.get("hash_ids") or []
    if isinstance(at, bool) or not isinstance(at, int | float) or not abs(at) <= _LATEST_MS:
        raise ValueError(f"timestamp is {at!r:.60}; it must be a number of milliseconds")
    if not isinstance(blocks, list) or not all(type(block) is int and block >= 0 for block in blocks):
        raise ValueError("hash_ids must be a list of whole numbers from 0 on")
    prompt, output = ((name, row[name]) for name in ("input_length", "output_length"))
    arrival = 10**6 * at if isinstance(at, int) else round(1e6 * at)
    return arrival, _request(prompt, output, tuple(blocks))


def load_trace(path: Path, count: int | None = None) -> list[Request]:
    """Read a trace in any of the three formats.

    Parameters
    ----------
    path : Path
        The file.
    count : int or None
        Requests to read, from the beginning of the file; None is all of them.

    Returns
    -------
    list of Request
        In order of arrival; arrivals count from the first.

    Raises
    ------
    ConfigError
        The file is missing, empty or of another format, or a row cannot be read; it names the file and the line.
    """
    with _reading(path) as file:
        found = list(itertools.islice(_rows(path, file), count))
    if not found:
        raise ConfigError(f"the trace {path} has no requests")
    late = sum(one > other for (one, _), (other, _) in itertools.pairwise(found))
    if late:
        logger.warning("%s: %d requests arrive before the one above them; all were sorted by time", path, late)
        found.sort(key=lambda timed: timed[0])
    start = found[0][0]
    return [replace(request, arrival_s=(arrival - start) / 1e9) for arrival, request in found]


def counted(traces: Sequence[T], counts: list[int]) -> list[tuple[T, int]]:
    """Each trace with how many requests of it are asked for. Raises ConfigError where it is unclear."""
    if len(counts) not in (1, len(traces)):
        raise ConfigError(f"--requests has {len(counts)} numbers for {len(traces)} traces; give one, or one for each")
    return list(zip(traces, counts if len(counts) > 1 else counts * len(traces), strict=True))


def trace_kind(path: Path) -> str:
    """``azure``, ``mooncake`` or ``sharegpt``, by how a trace begins. Raises ConfigError as `load_trace` does."""
    with _reading(path) as file:
        for _, first in _lines(path, file):
            if first.strip():
                is_json = first.lstrip().startswith(("[", "{"))
                return "mooncake" if is_json else _parser(path, next(csv.reader([first]))).kind
    raise ConfigError(f"the trace {path} has no requests")


@contextmanager
def _reading(path: Path) -> Iterator[TextIO]:
    """A trace, decompressed. Raises ConfigError where it cannot be read."""
    opener: Callable[..., TextIO] = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"cannot read the trace {path}: {getattr(error, 'strerror', None) or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the trace {path} is no text in UTF-8: {error}") from error


def _rows(path: Path, file: TextIO) -> Iterator[_Timed]:
    for number, first in _lines(path, file):
        if not first.strip():
            continue
        if first.lstrip().startswith("["):
            return _json_list(path, number, first, file)
        rest = itertools.chain([(number, first)], _lines(path, file, number + 1))
        return _json_lines(path, rest) if first.lstrip().startswith("{") else _table(path, rest)
    return iter(())


def _lines(path: Path, file: TextIO, number: int = 1) -> Iterator[tuple[int, str]]:
    """Lines and their numbers; the first may be the beginning of a longer one."""
    while line := file.readline(_LINE_CHARACTERS):
        if len(line) == _LINE_CHARACTERS and not line.lstrip().startswith("["):
            raise _wrong(path, number, f"it has more than {_LINE_CHARACTERS:,} characters")
        yield number, line
        number += 1


def _wrong(path: Path, number: int, what: object) -> ConfigError:
    return ConfigError(f"{path}, line {number}: {what}")


def _json_lines(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[_Timed]:
    for number, line in lines:
        if line.strip():
            try:
                yield _mooncake(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise _wrong(path, number, error) from error


def _json_list(path: Path, number: int, text: str, file: TextIO) -> Iterator[_Timed]:
    """Elements of a list, of which no more is read than is asked for."""
    decoder, at, expected = json.JSONDecoder(), text.index("[") + 1, "a request or ]"
    size = _CHUNK_CHARACTERS
    while True:
        # Past white space, and the comma between two elements.
        while at < len(text) and (text[at].isspace() or (text[at] == "," and expected == ", or ]")):
            if text[at] == ",":
                expected = "a request"
            number += text[at] == "\n"
            at += 1
        element, end = None, at
        if at < len(text) and text[at] == "]" and expected != "a request":
            return
        if at < len(text):
            if expected == ", or ]":
                raise _wrong(path, number, f"{text[at : at + 20]!r} where {expected} should be")
            try:
                element, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                broken = error
        # A number may go on where the text ends.
        if end == at or end == len(text):
            if len(text) - at <= _LINE_CHARACTERS and (more := file.read(size)):
                text, at, size = text[at:] + more, 0, 2 * size
                continue
            if end == at:
                what: object = broken if at < len(text) else f"the file ends where {expected} should be"
                raise _wrong(path, number, what)
        try:
            yield _mooncake(element)
        except ValueError as error:
            raise _wrong(path, number, error) from error
        number += text.count("\n", at, end)
        at, expected, size = end, ", or ]", _CHUNK_CHARACTERS


def _parser(path: Path, header: list[str]) -> _Azure | _ShareGPT:
    """What reads rows under these columns. Raises ConfigError where no format has them."""
    names = {name.strip() for name in header}
    for make in (_Azure, _ShareGPT):
        if set(make.columns) <= names:
            return make()
    raise ConfigError(
        f"the trace {path} has columns {sorted(names)}; known are Azure (TIMESTAMP, ContextTokens, GeneratedTokens), "
        "ShareGPT lengths (num_prefill_tokens, num_decode_tokens) and Mooncake's JSON"
    )


def _table(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[_Timed]:
    number, first = next(lines)
    before, reader = number - 1, csv.reader(itertools.chain([first], (line for _, line in lines)))
    try:
        header = [name.strip() for name in next(reader)]
        parse = _parser(path, header)
        if twice := [name for name in parse.columns if header.count(name) > 1]:
            raise ConfigError(f"the trace {path} has two columns {twice[0]}")
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            row = dict(zip(header, cells, strict=False))
            try:
                if missing := [name for name in parse.columns if name not in row]:
                    raise ValueError(f"{', '.join(missing)} missing")
                if any(cell.strip() for cell in cells[len(header) :]):
                    raise ValueError(f"{len(cells)} cells under {len(header)} columns")
                yield parse(row)
            except ValueError as error:
                raise _wrong(path, before + reader.line_num, error) from error
    except csv.Error as error:
        raise _wrong(path, before + reader.line_num, error) from error


def generate_trace(count: int, seed: int, *, median_prompt: int = 120, median_output: int = 16) -> list[Request]:
    """Requests shaped like the public traces: Poisson arrivals, lognormal lengths with a long tail.

    The Azure code trace's prompts have a median of 1,469 and a mean of 2,048 tokens, a lognormal with sigma about 0.8;
    its outputs are short. Medians are settings because the models this is for differ in what they hold.
    """
    random = np.random.default_rng(seed)
    arrivals = random.exponential(0.02, count).cumsum()
    prompts = np.maximum(1, random.lognormal(np.log(median_prompt), 0.8, count)).astype(int)
    outputs = np.maximum(1, random.lognormal(np.log(median_output), 0.6, count)).astype(int)
    return [Request(float(a), int(p), int(o)) for a, p, o in zip(arrivals, prompts, outputs, strict=True)]


def fit(requests: list[Request], max_seq_len: int, max_output: int) -> list[Request]:
    """Requests cut down to what a slot holds: outputs to `max_output` (and at least 1), prompts to what is left.

    How many were cut is logged as a warning.
    """
    if max_output >= max_seq_len:
        raise ConfigError(
            f"outputs of {max_output} tokens leave no room for a prompt in {max_seq_len}; lower --max-output, or raise "
            "--max-seq-len"
        )
    fitted = []
    for request in requests:
        output = min(max(1, request.output_tokens), max_output)
        prompt = min(request.prompt_tokens, max_seq_len - output)
        fitted.append(replace(request, prompt_tokens=prompt, output_tokens=output))
    shorter = [
        sum(getattr(new, name) < getattr(old, name) for new, old in zip(fitted, requests, strict=True))
        for name in ("prompt_tokens", "output_tokens")
    ]
    if any(shorter):
        logger.warning(
            "of %d requests, %d prompts and %d outputs were cut to fit max_seq_len %d and max_output %d",
            len(requests),
            *shorter,
            max_seq_len,
            max_output,
        )
    return fitted


_OUTPUTS = 1 << 40
"""Token ids from here on stand for outputs, which no prompt of a trace repeats."""


@dataclass(frozen=True)
class TokenRequest:
    """A prompt and what is generated after it, int64 each. Token ids are numbers alone: no model has so many."""

    prompt: np.ndarray
    output: np.ndarray


def from_trace(requests: Sequence[Request], divide_by: int = 1) -> list[TokenRequest]:
    """Token ids for a trace's requests: equal block hashes give equal tokens, and nothing else is equal.

    Parameters
    ----------
    divide_by : int
        Lengths and blocks are so many times shorter; a power of two up to 512.

    Raises
    ------
    ConfigError
        Requests without block hashes, or `divide_by` does not divide a block.
    """
    if divide_by < 1 or PREFIX_BLOCK % divide_by:
        raise ConfigError(f"divide_by is {divide_by}; it must divide the {PREFIX_BLOCK} tokens of a block")
    if not any(request.prefix_blocks for request in requests):
        raise ConfigError("the trace has no block hashes, so nobody knows what its prompts share; use Mooncake's")
    block, made, at = PREFIX_BLOCK // divide_by, [], _OUTPUTS
    for request in requests:
        size, outputs = max(1, request.prompt_tokens // divide_by), max(1, request.output_tokens // divide_by)
        hashes = np.array(request.prefix_blocks, np.int64)
        prompt = (hashes[:, None] * block + np.arange(block)).ravel()[:size]
        # What no hash covers is the request's own.
        own = size - len(prompt)
        made.append(
            TokenRequest(np.concatenate([prompt, np.arange(at, at + own)]), np.arange(at + own, at + own + outputs))
        )
        at += own + outputs
    return made


def agent_turns(
    count: int,
    seed: int,
    *,
    at_once: int = 32,
    sessions: int | None = None,
    system_prompts: int = 4,
    system_tokens: int = 2048,
    mean_turns: float = 12.0,
    median_input: int = 300,
    median_output: int = 120,
    branch: float = 0.1,
    longest: int = 16384,
) -> list[TokenRequest]:
    """Requests like those of agents: each turn's prompt is the last one's, its output, and a tool's answer.

    Sessions take turns in random order; each begins with one of a few system prompts, ends after a geometric number of
    turns, and is followed by a new one. With the chance `branch` a turn goes back to an earlier one and tries again, as
    search over agents' steps does.

    Parameters
    ----------
    count : int
        Requests.
    at_once : int
        Requests that run at once: a session's next turn comes no sooner than after so many others.
    sessions : int or None
        Open at once; None is twice `at_once`.
    median_input, median_output : int
        Of a tool's answer and of an output, lognormal with sigma 0.8.
    longest : int
        Tokens of prompt and output with which a session ends.
    """
    random, at = np.random.default_rng(seed), 0
    sessions = 2 * at_once if sessions is None else sessions
    if sessions <= at_once:
        raise ConfigError(f"{sessions} sessions cannot keep {at_once} requests running; open more")

    def new(tokens: int) -> np.ndarray:
        nonlocal at
        at += tokens
        return np.arange(at - tokens, at)

    def drawn(median: int) -> np.ndarray:
        return new(max(1, int(random.lognormal(np.log(median), 0.8))))

    systems = [new(system_tokens) for _ in range(system_prompts)]
    waiting: list[list[np.ndarray]] = []
    running: deque[list[np.ndarray]] = deque()
    made: list[TokenRequest] = []
    while len(made) < count:
        # Of a session that ended nothing is left.
        if len(running) == at_once and (ended := running.popleft()):
            waiting.append(ended)
        if len(waiting) + len(running) < sessions:
            # Some system prompts are used more than others.
            history = [systems[min(int(random.geometric(0.5)) - 1, system_prompts - 1)]]
        else:
            history = waiting.pop(int(random.integers(len(waiting))))
        before = history[-1]
        if len(history) > 1 and random.random() < branch:
            before = history[int(random.integers(len(history) - 1))]
        turn = TokenRequest(np.concatenate([before, drawn(median_input)]), drawn(median_output))
        made.append(turn)
        history.append(np.concatenate([turn.prompt, turn.output]))
        ends = len(history[-1]) > longest or random.random() < 1 / mean_turns
        running.append([] if ends else history)
    return made
