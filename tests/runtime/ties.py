"""Free-running tokens of two runs whose arithmetic rounds differently."""

from __future__ import annotations

from collections.abc import Sequence

from trtllm_vattn.runtime.request import TokenEvent

NEAR = 0.25


def by_request(events: Sequence[TokenEvent], numbers: Sequence[int]) -> list[list[TokenEvent]]:
    return [[event for event in events if event.request == number] for number in numbers]


def agree(one: Sequence[Sequence[TokenEvent]], other: Sequence[Sequence[TokenEvent]]) -> None:
    """Tokens are the same up to the first tie of each request: what follows a tie is another text."""
    for wanted, got in zip(one, other, strict=True):
        for first, second in zip(wanted, got, strict=True):
            if first.token != second.token:
                assert first.margin is not None
                assert first.margin < NEAR
                break
