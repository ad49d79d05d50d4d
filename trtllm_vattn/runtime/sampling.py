"""Sampling parameters and the sampling of one token a lane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from trtllm_vattn.errors import ConfigError

COLDEST = 1e-5
"""Temperature below which the likeliest token is taken."""


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen.

    Parameters
    ----------
    max_tokens : int
        Tokens to generate at most.
    temperature : float
        0 is greedy, and so is less than `COLDEST`, by which logits cannot be divided.
    top_p : float
        Smallest set of tokens whose probabilities add up to this; 1 is all.
    top_k : int
        Only so many of the likeliest; 0 is all.
    seed : int
        The same seed gives the same tokens, whatever else is in the batch.
    stop_token_ids : tuple of int
        Generation ends after one of these, which is part of the output.
    ignore_eos : bool
        Whether the end-of-text tokens that the checkpoint names do not end generation.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}; at least 1 is needed")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}; it is 0 for greedy, or more, and finite")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it is above 0 and at most 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it is 0 for all tokens, or how many")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"seed is {self.seed!r}; it is a whole number from 0 to 2**64 - 1")

    def stopping_at(self, end_of_text: Sequence[int]) -> SamplingParams:
        """These, stopped by a checkpoint's end-of-text tokens, too, unless they are ignored."""
        more = () if self.ignore_eos else tuple(token for token in end_of_text if token not in self.stop_token_ids)
        return replace(self, stop_token_ids=(*self.stop_token_ids, *more)) if more else self

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST

    def uniform(self, index: int) -> float:
        """The number in [0, 1) that decides the token at `index` of the output; counter-based, so order is free."""
        return float(np.random.Generator(np.random.Philox(key=self.seed, counter=index)).random())


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], indices: Sequence[int]) -> torch.Tensor:
    """Draw one token a row: logits ``[rows, vocab]`` to int64 ``[rows]``.

    `indices` counts the tokens that each row's request has generated so far.
    """
    rows = [(*settings(p), p.uniform(i)) for p, i in zip(params, indices, strict=True)]
    return draw(logits, *torch.tensor(rows, dtype=torch.float64, device=logits.device).unbind(1))


def choose(logits: torch.Tensor, rows: Sequence[tuple[SamplingParams, int]]) -> list[int]:
    """One token a row, the likeliest or one drawn as by `sample`: logits ``[rows, vocab]``, and for each row how many
    tokens its request has generated so far."""
    chosen = logits.argmax(dim=-1)
    drawn = [row for row, (params, _) in enumerate(rows) if not params.greedy]
    if drawn:
        chosen[drawn] = sample(logits[drawn], *zip(*(rows[row] for row in drawn), strict=True))
    tokens: list[int] = chosen.tolist()
    return tokens


def margins(logits: torch.Tensor) -> list[float]:
    """How far the two largest of each row are apart: logits ``[rows, vocab]``."""
    best = logits.float().topk(2, dim=-1).values
    apart: list[float] = (best[:, 0] - best[:, 1]).tolist()
    return apart


def settings(params: SamplingParams) -> tuple[float, float, float]:
    """A row's temperature, top_p and top_k, as `draw` takes them."""
    return 0.0 if params.greedy else params.temperature, params.top_p, float(params.top_k)


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """One token a row: logits ``[rows, vocab]`` to int64 ``[rows]``, by float64 ``[rows]`` parameters on the device.

    Inverse transform sampling: a row's uniform number is looked up in the cumulative probabilities of its tokens,
    likeliest first. Temperature 0 is greedy, top_k 0 is all.
    """
    column = (-1, 1)
    greedy = (temperature == 0).view(column)
    warmth = torch.where(greedy, 1.0, temperature.view(column)).float()
    most = torch.where(top_k > 0, top_k, float(logits.shape[1])).view(column)
    ordered, tokens = (logits.float() / warmth).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    probabilities = ordered.masked_fill(rank >= most, -torch.inf).softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p.view(column), 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    drawn = (cumulative <= uniform.view(column) * cumulative[:, -1:]).sum(dim=-1, keepdim=True)
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    drawn = torch.where(greedy, 0, torch.minimum(drawn, last))
    return tokens.gather(1, drawn).squeeze(1)


MOST_PARTS = 128


def in_parts(logits: torch.Tensor) -> torch.Tensor:
    """Rows by parts of equal width, no more than `MOST_PARTS`: logits ``[rows, vocab]`` to ``[rows, parts, width]``.

    The likeliest token is found in two stages: a GPU gives a row to one block of threads, and a vocabulary is long.
    """
    rows, vocab = logits.shape
    parts = max(n for n in range(1, MOST_PARTS + 1) if vocab % n == 0)
    return logits.view(rows, parts, vocab // parts)


def of_parts(largest: torch.Tensor, place: torch.Tensor, width: int) -> torch.Tensor:
    """The first largest of each row, int64 ``[rows]``, by that of each part and its place there, ``[rows, parts]``."""
    part = largest.argmax(dim=-1, keepdim=True)
    return (part * width + place.gather(1, part)).squeeze(1)
