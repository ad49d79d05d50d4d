"""Requests with token ids, for whatever depends on what prompts share: from a trace's block hashes, or made up."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trtllm_vattn.bench.harness.traces import Request
from trtllm_vattn.errors import ConfigError

TRACE_BLOCK = 512
"""Prompt tokens that one of a trace's block hashes stands for (Mooncake)."""
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
    if divide_by < 1 or TRACE_BLOCK % divide_by:
        raise ConfigError(f"divide_by is {divide_by}; it must divide the {TRACE_BLOCK} tokens of a block")
    if not any(request.prefix_blocks for request in requests):
        raise ConfigError("the trace has no block hashes, so nobody knows what its prompts share; use Mooncake's")
    block, made, at = TRACE_BLOCK // divide_by, [], _OUTPUTS
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
