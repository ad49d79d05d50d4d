"""Are two runs' tokens the same? Free-running where arithmetic is the same, teacher-forced where kernels differ."""

from __future__ import annotations

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
