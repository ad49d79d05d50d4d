"""Compaction: what heads keep is moved to the front of the slot, and whole pages behind it go back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trtllm_vattn.cache.base import KVCache, SequenceId


@dataclass(frozen=True)
class Compacted:
    """What a compaction did.

    Attributes
    ----------
    places : list of list of Tensor
        By layer and part of its heads (`KVCache.head_groups`), int64 ``[heads, held]``: where each token that is held
        now was before.
    evicted_bytes : int
        Keys and values that the policy gave up.
    returned_bytes : int
        Memory that is mapped for the sequence no more.
    """

    places: list[list[torch.Tensor]]
    evicted_bytes: int
    returned_bytes: int


def compact(cache: KVCache, sequence: SequenceId, kept: Sequence[Sequence[torch.Tensor]]) -> Compacted:
    """Keep these places of a sequence: ``kept[layer][head]`` is int64 ``[kept]`` on the device, ascending.

    A range has one length for all that lies in it. Heads that would keep less than the longest one hold their latest
    other tokens beside, whose memory could not be given back anyway.

    Raises
    ------
    UnknownSequence, ConfigError, KVCacheOutOfMemory, DriverError
        As `KVCache.keep_places`; nothing changed.
    """
    slot, shape = cache.slot_of(sequence), cache.shape
    parts = [len(cache.head_groups(layer)) for layer in range(shape.num_layers)]
    longest: dict[int, int] = {}
    for layer, count in enumerate(parts):
        for part in range(count):
            most = max((len(each) for each in _heads(kept[layer], part, count)), default=0)
            group = cache.group_of(layer, part)
            longest[group] = max(longest.get(group, 1), most)
    held = {group: int(cache.lengths_of(group)[slot]) for group in longest}
    places: list[list[torch.Tensor]] = []
    evicted = 0
    for layer, count in enumerate(parts):
        places.append([])
        for part in range(count):
            group = cache.group_of(layer, part)
            heads = _heads(kept[layer], part, count)
            places[-1].append(torch.stack([_filled(each, longest[group], held[group]) for each in heads]))
            evicted += sum(held[group] - len(each) for each in heads)
    returned = cache.keep_places(sequence, places)
    return Compacted(places, evicted * shape.layer_token_bytes // shape.num_kv_heads, returned)


def _heads(kept: Sequence[torch.Tensor], part: int, parts: int) -> Sequence[torch.Tensor]:
    size = len(kept) // parts
    return kept[part * size : (part + 1) * size]


def _filled(kept: torch.Tensor, count: int, held: int) -> torch.Tensor:
    """Places int64 ``[count]``: those that are kept, and the latest others."""
    if len(kept) == count:
        return kept
    others = torch.ones(held, dtype=torch.bool, device=kept.device)
    others[kept] = False
    more = others.nonzero().flatten()[len(kept) - count :]
    return torch.cat((kept, more)).sort().values
