"""Token ids for traces that only have lengths."""

from __future__ import annotations

import numpy as np

from trtllm_vattn.bench.traces import Request

PREFIX_BLOCK = 512
"""Prompt tokens that one of a request's `prefix_blocks` stands for."""


def prompt_ids(request: Request, index: int, vocab_size: int, seed: int) -> np.ndarray:
    """int64 ``[prompt_tokens]``, the same for the same arguments; equal prefix blocks give equal tokens."""
    own = np.random.default_rng([seed, 1, index])
    tokens = own.integers(0, vocab_size, request.prompt_tokens)
    for position, block in enumerate(request.prefix_blocks):
        part = tokens[position * PREFIX_BLOCK : (position + 1) * PREFIX_BLOCK]
        part[:] = np.random.default_rng([seed, 2, block]).integers(0, vocab_size, PREFIX_BLOCK)[: len(part)]
    return tokens
