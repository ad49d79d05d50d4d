"""What decode attention reads elsewhere, or once for several lanes: the host's side of `PrefixTables`.

A sequence that began with another one's tokens has them bit for bit, however it got at them (aliased, copied, adopted,
or read in the other's slot). `Origins` notes who computed which of a slot's tokens. From that follows which lanes share
how many tokens; groups of them are written to the tables where lanes change, before a launch, and the kernels read on
the device what a group shares. A group has to save enough reading to repay the launch that reads for it.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.attention.options import Feature, PrefixTables
from trtllm_vattn.cache.base import KVCache

LEAST_SAVED = 8192
"""Tokens that a group must save the reading of on a GPU: with Llama-3-8B's heads 33 MB a layer, which take 8 us to read
on an H200, about as long as the launch for groups."""
LEAST_SAVED_ON_HOST = 4096
"""There torch computes over all positions of a slot, whatever is shared: nothing is gained."""
FEWEST_SAVED, MOST_SAVED = 1024, 65536
"""Whatever is measured, no group saves less, and none that saves more is left."""
LAYER_US = 4.0
"""What a layer's step takes longer where first tokens may lie elsewhere: the launch for groups. Until it is measured
(`PrefixReading.learn`)."""
LAYER_US_ON_HOST = 250.0
"""There it is not measured. By `bench attention` on two cores, 2026-11-29."""


class Stretch(NamedTuple):
    """Tokens of a sequence up to `stop` (excluded), from the end of the stretch before, were computed by `author`."""

    author: int
    stop: float


class Origins:
    """Who computed which tokens of each slot. An author is an admission that computed tokens of its own."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[Stretch, ...]] = {}
        self._authors = itertools.count()

    def begin(self, slot: int, owner: int | None = None, tokens: int = 0) -> None:
        """The sequence in a slot has `tokens` tokens of the sequence in the slot `owner`, and computes the others."""
        shared: list[Stretch] = []
        if owner is not None:
            for stretch in self.of(owner):
                shared.append(Stretch(stretch.author, min(stretch.stop, tokens)))
                if stretch.stop >= tokens:
                    break
        self._of[slot] = (*shared, Stretch(next(self._authors), math.inf))

    def of(self, slot: int) -> tuple[Stretch, ...]:
        """The stretches of a slot's sequence, in order."""
        if slot not in self._of:
            self.begin(slot)
        return self._of[slot]

    def clear(self) -> None:
        """Nobody has a slot."""
        self._of.clear()


class Group(NamedTuple):
    """Lanes whose first `tokens` tokens are the same, which are read in `slot`."""

    slot: int
    tokens: int
    lanes: tuple[int, ...]

    @property
    def saved(self) -> int:
        """Tokens that are not read, in each step."""
        return self.tokens * (len(self.lanes) - 1)


def find_groups(
    origins: Origins, lanes: Mapping[int, int], longest: Mapping[int, int], prefixes: np.ndarray | None, least: int
) -> list[Group]:
    """Groups of lanes, by slot in `lanes`, that save the most reading; each at least `least` tokens.

    `longest` has the tokens, by slot, that every query of its lane sees; `prefixes` are `KVCache.segments`.
    """
    members: dict[int, dict[int, int]] = defaultdict(dict)
    for slot in lanes:
        for stretch in origins.of(slot):
            members[stretch.author][slot] = int(min(stretch.stop, longest[slot]))
    borders: dict[int, tuple[int, int]] = {}
    if prefixes is not None:
        borders = {holder: (owner, stop) for holder, owner, _, stop in prefixes.tolist() if holder in lanes}
    shared = {author: slots for author, slots in members.items() if len(slots) > 1}
    found: list[Group] = []
    while shared:
        best = max((_best(slots) for slots in shared.values()), key=lambda each: (len(each[1]) - 1) * each[0])
        tokens, slots = best
        slot, tokens = _where(slots, tokens, borders)
        group = Group(slot, tokens, tuple(lanes[each] for each in slots))
        if group.saved < least:
            break
        found.append(group)
        gone = set(slots)
        left = {author: {s: n for s, n in each.items() if s not in gone} for author, each in shared.items()}
        shared = {author: each for author, each in left.items() if len(each) > 1}
    return found


def _best(slots: Mapping[int, int]) -> tuple[int, list[int]]:
    """Of slots with so many tokens of one author each, those to read together: their common tokens, and they."""
    order = sorted(slots, key=lambda slot: -slots[slot])
    count = max(range(2, len(order) + 1), key=lambda count: (count - 1) * slots[order[count - 1]])
    return slots[order[count - 1]], order[:count]


def _where(slots: list[int], tokens: int, borders: Mapping[int, tuple[int, int]]) -> tuple[int, int]:
    """A slot in which all of some slots' first tokens lie, as many as can be."""
    best = (slots[0], 0)
    for slot in slots:
        base, border = borders.get(slot, (slot, tokens))
        best = max(best, (base, min(border, tokens)), key=lambda each: each[1])
    return best


class PrefixReading:
    """Keeps the tables of an attention backend up to date.

    Attributes
    ----------
    origins : Origins
    groups : list of Group
        Those of the last launch.
    read_once : int
        Tokens whose reading groups have saved so far, counted by launches.
    step_us : float
        Microseconds that a step takes longer where any lane reads elsewhere.
    is_measured : bool
        Whether that is of this device; else it is a default.
    """

    def __init__(self, cache: KVCache, tables: PrefixTables, least: int) -> None:
        self.cache, self.tables, self.least = cache, tables, least
        self.origins = Origins()
        self.groups: list[Group] = []
        self.read_once = 0
        each = LAYER_US if cache.device.type == "cuda" else LAYER_US_ON_HOST
        self.step_us, self.is_measured = each * cache.shape.num_layers, False
        self._segments: np.ndarray | None = None
        self._shared_by: tuple[Any, ...] = ()

    @classmethod
    def over(cls, attention: Attention, lanes: int) -> PrefixReading | None:
        """For a backend that can read so, whose tables are set; None for another."""
        cache = attention.cache
        if Feature.PREFIXES not in attention.features or cache.length_deficits is not None:
            return None
        tables = PrefixTables.empty(cache.shape.num_slots, lanes, cache.device)
        attention.set_prefixes(tables)
        return cls(cache, tables, LEAST_SAVED if cache.device.type == "cuda" else LEAST_SAVED_ON_HOST)

    def learn(self, step_us: float, token_us: float | None = None) -> None:
        """What was measured of this device: how much longer a step takes that reads elsewhere, and with `token_us` what
        a layer takes to read one token, from which follows how many a group has to save."""
        # Both were measured over idle lanes, where the clock's noise may be more than the difference.
        self.step_us, self.is_measured = max(0.0, step_us), True
        if token_us:
            saved = self.step_us / self.cache.shape.num_layers / token_us
            self.least = int(min(max(saved, FEWEST_SAVED), MOST_SAVED))

    def publish(self) -> None:
        """Tell the device, behind what is launched, where first tokens lie; before each launch."""
        segments = self.cache.segments
        if segments is not self._segments:
            rows = [] if segments is None else [(holder, owner, stop) for holder, owner, _, stop in segments.tolist()]
            self.tables.set_prefixes(rows)
            self._segments = segments

    def share(self, lanes: Mapping[int, int], lengths: np.ndarray, changed: bool) -> bool:
        """Group the lanes of a launch, by slot, with `lengths` int64 by lane, where they or what they read have
        `changed`; returns whether any lane's first tokens lie elsewhere or are shared."""
        self.publish()
        if changed or self._shared_by != (self._segments is None, len(lanes)):
            longest = {slot: int(lengths[lane]) - 1 for slot, lane in lanes.items()}
            groups = find_groups(self.origins, lanes, longest, self._segments, self.least)
            if groups or self.groups:
                self.tables.set_groups(groups)
            self.groups, self._shared_by = groups, (self._segments is None, len(lanes))
        self.read_once += sum(group.saved for group in self.groups)
        if self.groups:
            return True
        return self._segments is not None and bool(np.isin(self._segments[:, 0], list(lanes)).any())

    def clear(self) -> None:
        """Nobody has a slot or a lane."""
        self.origins.clear()
        self._shared_by = ()

    def as_dict(self) -> dict[str, Any]:
        """For stats: groups of the last launch, their lanes, and tokens whose reading was saved so far; what a step
        that reads elsewhere takes longer, whether that was measured here, and the tokens that a group has to save."""
        return {
            "table_step_us": self.step_us,
            "table_step_is_measured": self.is_measured,
            "least_saved_tokens": self.least,
            "shared_groups": len(self.groups),
            "shared_lanes": sum(len(group.lanes) for group in self.groups),
            "tokens_read_once": self.read_once,
        }
