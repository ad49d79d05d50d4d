"""Requests, what they become while they run, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trtllm_vattn.runtime.sampling import SamplingParams


@dataclass(frozen=True)
class TokenEvent:
    """One token of one request, as `Engine.step` returns it.

    `margin` is the distance between the two largest logits, where the engine was asked to record margins.
    """

    request: int
    token: int
    finish_reason: str | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Completion:
    """A finished request: its tokens and why it ended (``stop`` or ``length``)."""

    request: int
    prompt_len: int
    tokens: list[int]
    finish_reason: str


@dataclass
class Running:
    """A request inside the engine.

    `forced` are tokens to feed in place of the chosen ones (teacher forcing); `prefilled` counts the tokens whose K
    and V are in the cache while a prompt goes in by chunks.
    """

    id: int
    prompt: list[int]
    params: SamplingParams
    forced: Sequence[int] | None = None
    chosen: list[int] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)
    slot: int = -1
    prefilled: int = 0

    @property
    def tokens(self) -> list[int]:
        """All tokens known so far; after a preemption they are prefilled again."""
        return self.prompt + self.fed

    @property
    def length(self) -> int:
        """How many tokens are known so far."""
        return len(self.prompt) + len(self.fed)

    def accept(self, token: int) -> str | None:
        """Take a chosen token; returns why the request ends with it, or None."""
        self.chosen.append(token)
        self.fed.append(token if self.forced is None else self.forced[len(self.fed)])
        if self.fed[-1] in self.params.stop_token_ids:
            return "stop"
        return "length" if len(self.fed) == self.params.max_tokens else None
