"""What an engine has counted since it was built, and what it holds now, for whoever watches it from another thread."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import ClassVar

from trtllm_vattn.cache.base import CacheStats, Transfers
from trtllm_vattn.runtime.request import StepRecord


@dataclass
class StepTotals:
    """Counts of steps; the stepping thread adds to them, a few sums a step.

    Attributes
    ----------
    launches, steps : int
        Launches whose tokens were read, and decode steps in them.
    tokens, prompt_tokens : int
        Tokens chosen, and tokens of prompts computed, those of preempted requests again.
    seconds, wait_s, ahead_s, kv_s : float
        From the tokens of one launch to those of the next; of these, waited for the device, mapping ahead in the
        stepping thread, and planning with the guard.
    within : list of int
        Launches by the first of `BOUNDS` that their seconds do not exceed; the last number is of all longer ones.
    ended : Counter of str
        Requests by why they ended.
    preempted : int
        Requests that gave their memory up and went back to the queue.
    """

    BOUNDS: ClassVar[tuple[float, ...]] = (
        *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0),
    )

    launches: int = 0
    steps: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    wait_s: float = 0.0
    ahead_s: float = 0.0
    kv_s: float = 0.0
    within: list[int] = field(default_factory=lambda: [0] * (len(StepTotals.BOUNDS) + 1))
    ended: Counter[str] = field(default_factory=Counter)
    preempted: int = 0

    def copy(self, preempted: int) -> StepTotals:
        """As it is now, for another thread."""
        return replace(self, within=list(self.within), ended=self.ended.copy(), preempted=preempted)

    def add(self, record: StepRecord, tokens: int) -> None:
        """A launch's tokens were read, and so many of them kept."""
        self.launches += 1
        self.steps += record.steps
        self.tokens += tokens
        self.prompt_tokens += record.prefilled
        self.seconds += record.wall_s
        self.wait_s += record.wait_s
        self.ahead_s += record.ahead_s
        self.kv_s += record.kv_s
        self.within[bisect_left(self.BOUNDS, record.wall_s)] += 1


@dataclass(frozen=True)
class EngineStats:
    """An engine at one moment; each number is right, and all of them are of about the same moment.

    Attributes
    ----------
    running, waiting, suspended : int
        Requests with a slot, without one, and out until they are resumed.
    is_asleep : bool
        Whether memory was given back by `sleep`.
    weights_version : int
        Updates of the weights.
    swaps : int
        How often a request's tokens went to host memory.
    num_slots : int
        Slots of the cache.
    totals : StepTotals
        A copy.
    cache : CacheStats
    transfers : Transfers
        Copies between the device and host memory.
    prefix : (int, int) or None
        Tokens of prompts that were looked up in the prefix cache, and found; None without one.
    drafts : (int, int) or None
        Draft tokens that were verified, and accepted; None without speculation.
    captures_while_running : int
        `Engine.captures_while_running`.
    """

    running: int
    waiting: int
    suspended: int
    is_asleep: bool
    weights_version: int
    swaps: int
    num_slots: int
    totals: StepTotals
    cache: CacheStats
    transfers: Transfers
    prefix: tuple[int, int] | None
    drafts: tuple[int, int] | None
    captures_while_running: int
