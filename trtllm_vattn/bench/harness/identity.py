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
    tokens = missing = 0
    differing: list[tuple[float, bool]] = []
    for request in reference.keys() | run.keys():
        expected, got = reference.get(request, []), run.get(request, [])
        for theirs, ours in zip(expected, got, strict=False):
            tokens += 1
            if theirs.token != ours.token:
                differing.append((theirs.margin or 0.0, theirs.margin is not None))
                if free:
                    break
        else:
            missing += abs(len(expected) - len(got))
    return _judged(tokens, missing, differing, tolerance)


def _judged(tokens: int, missing: int, differing: Sequence[tuple[float, bool]], tolerance: float) -> Identity:
    """Of tokens that differ: their distances in logits, and whether they may be ties."""
    ties = [apart for apart, may_be in differing if may_be and apart < tolerance]
    others = [apart for apart, may_be in differing if not (may_be and apart < tolerance)]
    widest, wider = max(ties, default=0.0), max(others, default=0.0)
    return Identity(tokens, len(ties), missing + len(others), widest, wider)


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
    tokens = missing = 0
    differing: list[tuple[float, bool]] = []
    for request in reference.keys() | delivered.keys():
        chosen, got = reference.get(request, []), delivered.get(request, ())
        missing += abs(len(chosen) - len(got))
        for event, token in zip(chosen, got, strict=False):
            tokens += 1
            if token != event.token:
                if event.logprob is None or not event.logprob.top:
                    raise ValueError("the reference was asked for no log-probabilities; make logprobs 2 or more")
                top = dict(event.logprob.top)
                differing.append((behind_likeliest(top, token), token in top))
    return _judged(tokens, missing, differing, tolerance)
