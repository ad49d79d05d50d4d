"""Are two runs' tokens the same? Free-running where arithmetic is the same, teacher-forced where kernels differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trtllm_vattn.runtime.request import TokenEvent

RequestTokens = dict[int, list[TokenEvent]]
"""Token events of one run by request number, in order."""


@dataclass(frozen=True)
class Identity:
    """How a run's tokens compare with the reference's.

    `ties` differ where the reference's two largest logits are closer than the tolerance, the widest of them by
    `widest_tie`; `mismatches` differ elsewhere, at logits up to `widest_mismatch` apart.
    """

    tokens: int
    ties: int
    mismatches: int
    widest_tie: float
    widest_mismatch: float = 0.0

    @property
    def identical(self) -> bool:
        return self.tokens > 0 and self.mismatches == 0


def compare(reference: RequestTokens, run: RequestTokens, tolerance: float, free: bool = False) -> Identity:
    """Compare token by token; requests or tokens that only one of them has are mismatches.

    The reference's events need margins where `tolerance` is above 0. In `free` runs each token follows from those
    before, so what comes after a request's first that differs is not compared.
    """
    tokens = ties = mismatches = 0
    widest = wider = 0.0
    for request in reference.keys() | run.keys():
        expected, got = reference.get(request, []), run.get(request, [])
        for theirs, ours in zip(expected, got, strict=False):
            tokens += 1
            if theirs.token != ours.token:
                if theirs.margin is not None and theirs.margin < tolerance:
                    ties += 1
                    widest = max(widest, theirs.margin)
                else:
                    mismatches += 1
                    wider = max(wider, theirs.margin or 0.0)
                if free:
                    break
        else:
            mismatches += abs(len(expected) - len(got))
    return Identity(tokens, ties, mismatches, widest, wider)


def behind_likeliest(likeliest: Mapping[int, float], token: int) -> float:
    """By how much the largest of the likeliest tokens' logits, or log-probabilities, exceeds that of a token; of one
    that is not among them, that of the last of these."""
    return max(likeliest.values()) - likeliest.get(token, min(likeliest.values()))


def compare_forced(reference: RequestTokens, delivered: Mapping[int, Sequence[int]], tolerance: float) -> Identity:
    """Compare tokens that were delivered with what a reference chose at each place where it was fed the ones before
    them.

    The reference's events need log-probabilities of several likeliest tokens (`SamplingParams.logprobs`). A token that
    is not the likeliest is a tie where it is less likely by less than `tolerance`, in logits, and a mismatch else, also
    where it is not among those: the distance is then that of the least likely of them. Tokens that only one side has
    are mismatches.
    """
    tokens = ties = mismatches = 0
    widest = wider = 0.0
    for request in reference.keys() | delivered.keys():
        chosen, got = reference.get(request, []), delivered.get(request, ())
        mismatches += abs(len(chosen) - len(got))
        for event, token in zip(chosen, got, strict=False):
            tokens += 1
            if token == event.token:
                continue
            if event.logprob is None or not event.logprob.top:
                raise ValueError("the reference was asked for no log-probabilities; make logprobs 2 or more")
            top = dict(event.logprob.top)
            apart = behind_likeliest(top, token)
            if token in top and apart < tolerance:
                ties += 1
                widest = max(widest, apart)
            else:
                mismatches += 1
                wider = max(wider, apart)
    return Identity(tokens, ties, mismatches, widest, wider)
