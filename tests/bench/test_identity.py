from __future__ import annotations

import pytest

from trtllm_vattn.bench.harness.identity import RequestTokens, compare, compare_forced
from trtllm_vattn.runtime.logprobs import TokenLogprob
from trtllm_vattn.runtime.request import TokenEvent


def run(*tokens: int, margin: float | None = 1.0) -> dict[int, list[TokenEvent]]:
    return {0: [TokenEvent(0, token, None, margin) for token in tokens]}


def test_equal_tokens_are_identical() -> None:
    found = compare(run(1, 2, 3), run(1, 2, 3), 0.0)
    assert (found.tokens, found.ties, found.mismatches, found.identical) == (3, 0, 0, True)


def test_a_difference_within_the_tolerance_is_a_tie() -> None:
    found = compare(run(1, 2, 3, margin=0.05), run(1, 9, 3), 0.1)
    assert (found.ties, found.mismatches, found.widest_tie, found.identical) == (1, 0, 0.05, True)


def test_a_difference_beyond_it_is_a_mismatch() -> None:
    for reference in (run(1, 2, 3, margin=0.1), run(1, 2, 3, margin=None)):
        found = compare(reference, run(1, 9, 3), 0.1)
        assert (found.ties, found.mismatches, found.identical) == (0, 1, False)
    margins = [TokenEvent(0, 1, None, margin) for margin in (0.4, 0.6, 0.05, 0.9)]
    found = compare({0: margins}, run(2, 2, 2, 1), 0.1)
    assert (found.ties, found.mismatches, found.widest_tie, found.widest_mismatch) == (1, 2, 0.05, 0.6)


def test_missing_tokens_and_requests_are_mismatches() -> None:
    assert compare(run(1, 2, 3), run(1), 0.1).mismatches == 2
    assert compare(run(1, 2), {}, 0.1).mismatches == 2
    assert compare({}, run(1, 2), 0.1).mismatches == 2
    assert not compare({}, {}, 0.1).identical


def test_free_runs_are_compared_up_to_what_differs_first() -> None:
    def ends(reference: RequestTokens, other: RequestTokens, tolerance: float) -> tuple[int, int, int]:
        found = compare(reference, other, tolerance, free=True)
        return found.tokens, found.ties, found.mismatches

    assert ends(run(1, 2, 3, margin=0.1), run(1, 2, 3), 0.0) == (3, 0, 0)
    assert ends(run(1, 2, 3, margin=0.1), run(1, 5, 9), 0.25) == (2, 1, 0)
    assert ends(run(1, 2, 3, margin=0.1), run(1, 5, 9), 0.1) == (2, 0, 1)
    assert ends(run(1, 2, 3, margin=0.5), run(1, 5, 9), 0.25) == (2, 0, 1)
    # Who parted at a tie may end sooner.
    assert ends(run(1, 2, 3, margin=0.1), run(1, 5), 0.25) == (2, 1, 0)
    assert ends(run(1, 2), run(1), 0.25) == (1, 0, 1)
    assert ends(run(1, 2), {}, 0.25) == ends({}, run(1, 2), 0.25) == (0, 0, 2)


def test_a_delivered_token_is_a_tie_by_its_own_distance_from_the_likeliest() -> None:
    top = ((7, -1.0), (8, -1.1), (9, -3.0))
    reference = {0: [TokenEvent(0, 7, logprob=TokenLogprob(7, -1.0, top)) for _ in range(4)]}
    found = compare_forced(reference, {0: [7, 8, 9, 5]}, 0.25)
    assert (found.tokens, found.ties, found.mismatches) == (4, 1, 2)
    assert found.widest_tie == pytest.approx(0.1)
    assert found.widest_mismatch == pytest.approx(2.0)
    # Among the likeliest tokens all are close: one that is not there is none of them.
    assert compare_forced(reference, {0: [7, 7, 7, 5]}, 10.0).mismatches == 1
    assert compare_forced(reference, {0: [7, 8]}, 0.0).mismatches == 3
    assert compare_forced(reference, {}, 1.0).mismatches == 4
    with pytest.raises(ValueError, match="no log-probabilities"):
        compare_forced(run(1, 2), {0: [1, 3]}, 0.1)
