"""Requests, what they become while they run, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trtllm_vattn.runtime.sampling import SamplingParams


@dataclass(frozen=True)
class TokenEvent:
    """One token of one request, as `Engine.step` returns it.

    `margin` is the distance between the two largest logits, where the engine was asked to record margins;
    `weights_version` counts the updates of the weights before this token (`Engine.update_weights`). `token` is None
    where a request ends without one more (`finish_reason` is ``abort``).
    """

    request: int
    token: int | None
    finish_reason: str | None = None
    margin: float | None = None
    weights_version: int = 0


@dataclass(frozen=True)
class Completion:
    """A finished request: its tokens, why it ended (``stop``, ``length`` or ``abort``), and the version of the weights
    that each token was computed with."""

    request: int
    prompt_len: int
    tokens: list[int]
    finish_reason: str
    weights_versions: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class StepRecord:
    """What one launch of `steps` decode steps cost, in seconds of host time.

    `wall_s` ends with its tokens on the host. It starts where those of the launch before were, or, where none was under
    way, with the bookkeeping; where `prefilled` prompt tokens went in just before, it includes waiting for them.
    `kv_s` went to the cache (`prepare_step`, guard) for launches started meanwhile, `ahead_s` to mapping ahead, and for
    `wait_s` the host had nothing to do but wait for the tokens.
    """

    lanes: int
    steps: int
    prefilled: int
    wall_s: float
    kv_s: float
    ahead_s: float
    wait_s: float


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
    weights_versions: list[int] = field(default_factory=list)
    """Of each chosen token."""

    @property
    def tokens(self) -> list[int]:
        """All tokens known so far; after a preemption they are prefilled again."""
        return self.prompt + self.fed

    @property
    def limit(self) -> int:
        """How long the sequence is when its last token is chosen, which is not stored any more."""
        return len(self.prompt) + self.params.max_tokens - 1

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
