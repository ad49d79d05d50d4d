"""Speculative decoding: what is asked for, how many tokens to draft, and what became of them.

Several draft tokens of a lane are verified in one step (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv
2302.01318). Which token a request gets at a place of its output depends on its logits there and on noise that is hashed
from its seed and the place alone (sampling.py). So a draft is accepted where it is the very token that the model would
have chosen, and every request gets the tokens that it gets without drafts, greedy or sampled, up to rounding.

For a draft that is one given token this accepts as often as Leviathan's rejection sampling does: with the probability
that the model gives to it. A draft model chooses with the same noise, which couples the two choices (Daliri, Musco and
Suresh, arXiv 2408.07978: drafter-invariant speculative decoding). With t, the total variation distance of the two
distributions, that accepts with a probability of at least (1 - t) / (1 + t), where rejection sampling has 1 - t: it may
cost a little acceptance, and keeps tokens that depend on nobody but the seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trtllm_vattn.attention.base import MOST_QUERIES
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.step_model import StepModel
from trtllm_vattn.sizes import parse_bytes
from trtllm_vattn.values import described, shown, whole

METHODS = ("ngram", "draft_model")
MOST_DRAFTS = MOST_QUERIES - 1
LONGEST_LOOKUP = 16
MOST_ROWS = 256
"""Of a step with drafts: beyond, products with weights are bound by computing, and what is drafted costs what it
saves."""


@dataclass(frozen=True)
class Speculation:
    """How tokens are drafted; names as in vLLM's ``speculative_config``.

    Parameters
    ----------
    method : str
        ``ngram`` (prompt lookup) drafts what followed the last tokens where they stood before in the same sequence;
        ``draft_model`` has a smaller model of the same vocabulary draft.
    num_speculative_tokens : int
        Tokens of a lane to verify in one step at most, 1 to 7. Each step takes as many as pay by the measured cost of
        steps and by how many were accepted of late: fewer with many lanes, none where that is slower.
    prompt_lookup_max, prompt_lookup_min : int
        Most and fewest last tokens that have to stand before; the longest match counts, of equal ones the latest.
    model : StepModel, str or None
        The draft model, on the engine's device; or for `Engine.from_pretrained`, which loads it, its name.
    draft_budget : int, str or None
        Bytes of the draft model's own cache (``"2GiB"`` too); None is enough for all sequences that run at once. Who
        finds no memory in it goes on without drafts.

    Raises
    ------
    ConfigError
        A value cannot be; the message names it.
    """

    method: str = "ngram"
    num_speculative_tokens: int = 3
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2
    model: StepModel | str | None = field(default=None, repr=False)
    draft_budget: int | str | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if self.method not in METHODS:
            raise ConfigError(f"method is {shown(self.method)}; there are {', '.join(METHODS)}")
        put("num_speculative_tokens", whole("num_speculative_tokens", self.num_speculative_tokens, 1, MOST_DRAFTS))
        put("prompt_lookup_max", whole("prompt_lookup_max", self.prompt_lookup_max, 1, LONGEST_LOOKUP))
        put("prompt_lookup_min", whole("prompt_lookup_min", self.prompt_lookup_min, 1, LONGEST_LOOKUP))
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ConfigError(
                f"prompt_lookup_min is {self.prompt_lookup_min}, prompt_lookup_max {self.prompt_lookup_max}; the "
                "fewest tokens of a match are no more than the most"
            )
        if (self.model is not None) != (self.method == "draft_model"):
            needs = "give the model that drafts" if self.model is None else "leave model out, or make it draft_model"
            raise ConfigError(f"method is {self.method}, and model is {described(self.model)}; {needs}")
        if self.draft_budget is not None:
            if self.method != "draft_model":
                raise ConfigError("draft_budget is that of a draft model's cache; method is ngram, leave it out")
            put("draft_budget", parse_bytes(self.draft_budget, "draft_budget"))
        if not (self.model is None or isinstance(self.model, str) or callable(self.model)):
            raise ConfigError(f"model is {described(self.model)}; give the model that drafts, or its name")

    @property
    def ladder(self) -> tuple[int, ...]:
        """Numbers of drafts that steps are captured for, apart from none."""
        most = self.num_speculative_tokens
        return tuple(sorted({count for count in (1, 3) if count < most} | {most}))


def check_speculation(given: Any, checked: Mapping[str, Any]) -> Speculation | None:
    """What an engine speculates by, with its other settings as `check_settings` has them. Raises ConfigError for what
    cannot be together, by name."""
    if given is None:
        return None
    if not isinstance(given, Speculation):
        raise ConfigError(f"speculation is {described(given)}; give a Speculation, or None")
    several = "verifies several tokens of a lane in one step"
    if checked["steps"] > 1:
        raise ConfigError(f"speculation {several}; steps is {checked['steps']}, make it 1")
    if checked["loop"]:
        raise ConfigError(f"speculation {several}, and loop has the device end launches of many; leave one of them out")
    if checked["record_margins"]:
        raise ConfigError(f"margins are recorded of single tokens, and speculation {several}; leave one of them out")
    return given


@dataclass
class SpeculationStats:
    """What became of drafts since the engine was built.

    Attributes
    ----------
    drafted, accepted : int
        Draft tokens that were verified, and those of them that became tokens of requests.
    verified : int
        How often a lane took part in a step with drafts, whether or not there were any for it.
    steps : dict of int to int
        Steps by the number of drafts they had room for; 0 are those without.
    overshoot, most_overshoot : int
        Tokens of a lane that were backed with memory for drafts and rejected: the most at once so far, and the bound:
        of the two launches that are under way at most.
    without_memory : int
        Steps that had no drafts because memory for them was short.
    """

    drafted: int = 0
    accepted: int = 0
    verified: int = 0
    steps: dict[int, int] = field(default_factory=dict)
    overshoot: int = 0
    most_overshoot: int = 0
    without_memory: int = 0

    def as_dict(self) -> dict[str, Any]:
        """All of it by name, with ``acceptance_rate`` (accepted of drafted) and ``accepted_per_step`` (accepted drafts
        of a lane in a step that had any room for them)."""
        return {
            "drafted": self.drafted,
            "accepted": self.accepted,
            "verified": self.verified,
            "acceptance_rate": self.accepted / max(1, self.drafted),
            "accepted_per_step": self.accepted / max(1, self.verified),
            "steps": dict(sorted(self.steps.items())),
            "overshoot": self.overshoot,
            "most_overshoot": self.most_overshoot,
            "without_memory": self.without_memory,
        }


class DraftLength:
    """How many tokens to draft in a step: as many as give most tokens a second.

    Of a lane it is learnt how often its first draft is right, where there is one; of all together, how often each
    further one is. What a step costs was measured when it was captured, over idle lanes: reading keys and values takes
    as long with drafts as without, so that what drafts cost is rather overrated.

    Parameters
    ----------
    ladder : sequence of int
        Numbers of drafts to choose from, apart from none, in order.
    shadow : bool
        Whether steps without drafts tell whether a first one would have been right. Else every so many steps have one.

    Attributes
    ----------
    seconds : dict of (int, int) to float
        What a step takes, by drafts and bucket. Where none is known, the most are taken.
    """

    FIRST, AGAIN = 0.5, 0.7
    """Believed before anything was drafted."""
    KEEP = 0.9
    """Of what was believed of a lane, after another step."""
    GAIN = 1.03
    """Drafts are taken where they promise so many times as many tokens a second: what is promised is an estimate."""
    PROBE = 64
    """Steps between two with a draft, where steps without tell nothing."""

    def __init__(self, ladder: Sequence[int], num_slots: int, shadow: bool) -> None:
        self.ladder, self.shadow = tuple(ladder), shadow
        self.seconds: dict[tuple[int, int], float] = {}
        self._first = np.full(num_slots, self.FIRST)
        self._usual = self.FIRST
        self._again = self.AGAIN
        self._unseen = 0
        """Steps without drafts since the last one with any."""

    def begin(self, slot: int) -> None:
        """Another sequence is in a slot: like the others, as far as is known."""
        self._first[slot] = self._usual

    def choose(self, slots: Sequence[int], buckets: Mapping[int, int]) -> int:
        """Drafts of the next step of these slots' lanes, by the bucket that a step with so many drafts has (0: without
        any); numbers that are not among `buckets` are not taken."""
        possible = [drafts for drafts in self.ladder if drafts in buckets]
        if not possible:
            return 0
        times = [self.seconds.get((drafts, buckets[drafts]), 0.0) for drafts in (0, *possible)]
        if not all(times):
            return possible[-1]
        # No step is sooner over for having drafts; where one was, something disturbed the others.
        alone, *others = np.maximum.accumulate(times).tolist()
        first, best, most = float(self._first[slots].sum()), 0, self.GAIN * len(slots) / alone
        for drafts, took in zip(possible, others, strict=True):
            rate = (len(slots) + first * sum(self._again**further for further in range(drafts))) / took
            if rate > most:
                best, most = drafts, rate
        if not best and not self.shadow and self._unseen >= self.PROBE:
            return possible[0]
        return best

    def learn(self, slots: np.ndarray, seen: np.ndarray, agreed: np.ndarray, drafts: int) -> None:
        """Of a step with so many drafts, by lane: the slots, drafts that were compared, and how many were right one
        after another from the first on; all int ``[lanes]``."""
        self._unseen = 0 if drafts else self._unseen + 1
        if not len(slots) or not (self.shadow or drafts):
            return
        right = agreed > 0
        self._first[slots] = self.KEEP * self._first[slots] + (1 - self.KEEP) * right
        self._usual = self.KEEP * self._usual + (1 - self.KEEP) * float(right.mean())
        # Each was tried up to the first that was wrong.
        tried = (np.minimum(seen, agreed + 1) - 1)[right]
        if tried.sum():
            share = 0.5 ** (tried.sum() / 64)
            self._again = float(share * self._again + (1 - share) * (agreed[right] - 1).sum() / tried.sum())
