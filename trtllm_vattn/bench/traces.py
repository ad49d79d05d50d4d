"""Request traces: three public formats told apart by their content, and a generator for when there is none.

* Azure code (Azure/AzurePublicDataset; Splitwise, ISCA'24): CSV with TIMESTAMP, ContextTokens, GeneratedTokens.
* Mooncake (kvcache-ai/Mooncake, FAST'25): JSON lines with timestamp (ms), input_length, output_length, hash_ids, one
  for each block of 512 prompt tokens.
* ShareGPT lengths (microsoft/sarathi-serve): CSV with num_prefill_tokens, num_decode_tokens; no arrival times.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import numpy as np

from trtllm_vattn.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One request: when it arrives, how long it is, and which 512-token blocks of its prompt it shares with others."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_blocks: tuple[int, ...] = ()


Row = dict[str, str]
_Row = TypeVar("_Row")


def _azure(row: Row) -> Request:
    # Seven digits of a second; Python reads six.
    arrival = datetime.fromisoformat(row["TIMESTAMP"][:26])
    return Request(arrival.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _sharegpt(row: Row) -> Request:
    return Request(0.0, int(float(row["num_prefill_tokens"])), int(float(row["num_decode_tokens"])))


_CSV: list[tuple[set[str], Callable[[Row], Request]]] = [
    ({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}, _azure),
    ({"num_prefill_tokens", "num_decode_tokens"}, _sharegpt),
]


def _mooncake(line: str) -> Request:
    row = json.loads(line)
    blocks = tuple(row.get("hash_ids", ()))
    return Request(row["timestamp"] / 1e3, int(row["input_length"]), int(row["output_length"]), blocks)


def load_trace(path: Path) -> list[Request]:
    """Read a trace in any of the three formats; arrivals count from its first request.

    Raises ConfigError where the file is missing, empty, of another format, or has a row that cannot be read.
    """
    try:
        with path.open(newline="") as file:
            first = file.readline()
            file.seek(0)
            requests = list(_rows(path, first, iter(file)))
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the trace {path} is no text: {error}") from error
    if not requests:
        raise ConfigError(f"the trace {path} has no requests")
    start = min(request.arrival_s for request in requests)
    return [replace(request, arrival_s=request.arrival_s - start) for request in requests]


def _rows(path: Path, first: str, lines: Iterator[str]) -> Iterator[Request]:
    if first.lstrip().startswith("{"):
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _checked(path, number, _mooncake, line)
        return
    reader = csv.DictReader(lines)
    found = set(reader.fieldnames or ())
    for needed, parse in _CSV:
        if needed <= found:
            for number, row in enumerate(reader, 2):
                yield _checked(path, number, parse, row)
            return
    raise ConfigError(
        f"the trace {path} has columns {sorted(found)}; known are Azure code (TIMESTAMP, ContextTokens, "
        "GeneratedTokens), ShareGPT lengths (num_prefill_tokens, num_decode_tokens) and Mooncake's JSON lines"
    )


def _checked(path: Path, number: int, parse: Callable[[_Row], Request], row: _Row) -> Request:
    try:
        request = parse(row)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
    if request.prompt_tokens < 1 or request.output_tokens < 0:
        raise ConfigError(
            f"{path}, line {number}: {request.prompt_tokens} prompt and {request.output_tokens} output tokens"
        )
    return request


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
            f"outputs of {max_output} tokens leave no room for a prompt in {max_seq_len}; lower max_output"
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
