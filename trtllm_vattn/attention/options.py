"""What attention may be asked for beyond causal attention to every token of a sequence's own slot.

`LayerOptions` say how a layer attends, and `PrefixTables` where sequences' first tokens lie and which lanes share them.
Both are given to a backend once, before anything is captured: `Attention.set_options`, `Attention.set_prefixes`. Every
tensor here is on the cache's device, at an address that stays; what is not used is None and costs nothing.

A third thing needs no call: a cache whose ranges have lengths of their own (`KVCache.head_groups`, `length_deficits`
of a `KVCacheManager`) is read by these lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.vmm.tensors import upload

FP8 = torch.float8_e4m3fn
"""The dtype of rows of eight bits."""
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3")
"""What rows are stored as, by vLLM's names: the model's own dtype, and `FP8` by two names."""
PREFIXES = "+prefixes"
"""Behind the name of a kernel that honours `PrefixTables` (`Attention.variants`)."""


class Feature(Enum):
    """What a backend may be able to do (`Attention.features`)."""

    WINDOW = "a window"
    FIRST_TOKENS = "first tokens that stay visible"
    SINK_LOGITS = "sink logits"
    SOFTCAP = "a soft cap of scores"
    FP8 = "fp8 rows"
    PREFIXES = "tokens that lie in another slot"
    LENGTHS = "lengths a range group"


@dataclass(frozen=True, eq=False)
class LayerOptions:
    """How one layer attends.

    Attributes
    ----------
    window : int or None
        A query at position p sees the keys at ``p - window + 1`` to p. Nothing else is read, so the pages before may be
        unmapped.
    first_tokens : int
        With a window: the sequence's first so many keys are seen by every query too (attention sinks, StreamingLLM,
        arXiv 2309.17453).
    sink_logits : Tensor or None
        float32 ``[num_heads]``: one more logit of each query head in the softmax's denominator, without a value
        (gpt-oss).
    softcap : float or None
        Scores are ``softcap * tanh(score / softcap)`` (Gemma 2).
    k_scale, v_scale : Tensor or None
        float32 ``[1]`` or ``[num_kv_heads]``, of a cache of `FP8`: a key is the stored number times `k_scale`. Writing
        divides and rounds to the nearest, and what is beyond the largest number becomes that one. None is 1.
    """

    window: int | None = None
    first_tokens: int = 0
    sink_logits: torch.Tensor | None = None
    softcap: float | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    def features(self) -> set[Feature]:
        """What a backend needs for this layer."""
        needed = {
            Feature.WINDOW: self.window is not None,
            Feature.FIRST_TOKENS: self.first_tokens > 0,
            Feature.SINK_LOGITS: self.sink_logits is not None,
            Feature.SOFTCAP: self.softcap is not None,
            Feature.FP8: self.k_scale is not None or self.v_scale is not None,
        }
        return {feature for feature, needs in needed.items() if needs}

    def check(self, shape: CacheShape, num_heads: int, layer: int) -> None:
        """Raise ConfigError, naming the layer, for numbers or tensors that make no sense for such a cache."""
        where = f"layer {layer}"
        if self.window is not None and self.window < 1:
            raise ConfigError(f"{where} has a window of {self.window} tokens; a query sees 1 at least, itself")
        if self.first_tokens < 0 or (self.first_tokens and self.window is None):
            raise ConfigError(
                f"{where} keeps {self.first_tokens} first tokens visible with window {self.window}; give a number from "
                "0 on, beside a window: without one every token is visible"
            )
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ConfigError(f"{where} caps scores at {self.softcap}; give a positive number, or None")
        for name, sizes in (("sink_logits", (num_heads,)), ("k_scale", _scales(shape)), ("v_scale", _scales(shape))):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if name != "sink_logits" and shape.dtype != FP8:
                raise ConfigError(f"{where} has a {name}, and its cache is {shape.dtype}; scales are for {FP8}")
            if tensor.dtype != torch.float32 or tensor.ndim != 1 or len(tensor) not in sizes:
                wanted = " or ".join(map(str, sizes))
                raise ConfigError(
                    f"{name} of {where} is {tensor.dtype} {list(tensor.shape)}; give float32 [{wanted}] on the device"
                )
            if name != "sink_logits" and not bool(((tensor > 0) & tensor.isfinite()).all()):
                raise ConfigError(f"{name} of {where} is {tensor.tolist()}; scales are positive numbers")


PLAIN = LayerOptions()
"""Causal attention to every token."""


def _scales(shape: CacheShape) -> tuple[int, ...]:
    return (1, shape.num_kv_heads)


@dataclass(frozen=True, eq=False)
class PrefixTables:
    """Where first tokens lie, and which lanes read the same ones. The host writes both between steps.

    The first two are by slot: of the sequence in slot s, tokens ``[0, borders[s])`` are read at the same positions of
    slot ``base_slots[s]``, and the others in its own. Decode and prompts honour them.

    The others are by lane of the decode step, and decode of one or more queries a lane honours them (mixed passes do
    not). A group is some lanes whose first tokens are the same, bit for bit: they are read once, in one slot, for all
    of the group's lanes (cascade inference; Hydragen, arXiv 2402.05099). A lane is in one group at most. A lane that
    became idle meanwhile may stay in its group.

    Attributes
    ----------
    base_slots, borders : Tensor
        int32 ``[num_slots + 1]``; a border of 0 is no such prefix.
    groups : Tensor
        int32 ``[most_groups, 4]``: the slot in which a group's tokens are read, how many there are, and where in
        `members` its lanes begin and how many there are. 0 tokens or 0 lanes: no group.
    members : Tensor
        int32 ``[most_lanes]``: lanes, those of a group one after another.
    shared : Tensor
        int32 ``[most_lanes]``: how many of a lane's first tokens its group reads, 0 for a lane of none. Fewer than its
        length by its queries at least, so that each query sees all of them.
    """

    base_slots: torch.Tensor
    borders: torch.Tensor
    groups: torch.Tensor
    members: torch.Tensor
    shared: torch.Tensor

    @classmethod
    def empty(cls, num_slots: int, lanes: int, device: torch.device) -> PrefixTables:
        """Tables for a cache of so many slots and up to so many lanes, of which no two share anything."""

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        return cls(zeros(num_slots + 1), zeros(num_slots + 1), zeros(max(1, lanes // 2), 4), zeros(lanes), zeros(lanes))

    def storages(self) -> list[torch.Tensor]:
        """All tensors."""
        return [self.base_slots, self.borders, self.groups, self.members, self.shared]

    def set_prefixes(self, prefixes: Sequence[tuple[int, int, int]]) -> None:
        """Have slots read their first tokens elsewhere: (slot, base slot, border) of each that does; no other does."""
        rows = np.zeros((2, len(self.borders)), np.int32)
        for slot, base, border in prefixes:
            rows[:, slot] = base, border
        base_slots, borders = upload(rows, self.borders.device)
        self.base_slots.copy_(base_slots)
        self.borders.copy_(borders)

    def set_groups(self, groups: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """Have lanes share reading: (slot, tokens, lanes) of each group; no other lanes do.

        Raises ConfigError for more groups or lanes than there is room for, and a lane in two groups.
        """
        lanes = [lane for _, _, members in groups for lane in members]
        if len(groups) > len(self.groups) or len(set(lanes)) != len(lanes) or len(lanes) > len(self.members):
            raise ConfigError(
                f"{len(groups)} groups of lanes {lanes}: there may be {len(self.groups)} groups of {len(self.members)} "
                "lanes in all, each lane in one of them"
            )
        size, of_groups = len(self.members), self.groups.numel()
        rows = np.zeros(of_groups + 2 * size, np.int32)
        table, members, shared = np.split(rows, [of_groups, of_groups + size])
        first = 0
        for number, (slot, tokens, those) in enumerate(groups):
            table[4 * number : 4 * number + 4] = slot, tokens, first, len(those)
            members[first : first + len(those)] = those
            shared[list(those)] = tokens
            first += len(those)
        sent = upload(rows, self.groups.device)
        self.groups.copy_(sent[:of_groups].view_as(self.groups))
        self.members.copy_(sent[of_groups : of_groups + size])
        self.shared.copy_(sent[of_groups + size :])
