"""A `KVCacheManager` as `PrefixCache` wants it: its calls, and what the choice between ways is made by.

What is read of slots here is read without the cache's lock, beside its background thread: it decides what is worth
while. What a call may do is checked again by the call, under the lock.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterator

import numpy as np

from trtllm_vattn.cache.base import KVCache, RetainedSlot
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.prefix.hybrid import ReuseCosts, Way
from trtllm_vattn.cache.prefix.reuse import PrefixCache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.memory.layout import BlockLayout
from trtllm_vattn.memory.slot import RangeGroup, Stripe
from trtllm_vattn.values import typed
from trtllm_vattn.vmm.owners import Extent


def prefix_cache_over(
    cache: KVCache,
    ways: Collection[Way] = tuple(Way),
    events: bool = False,
    max_segments: int = 1,
    costs: ReuseCosts | None = None,
) -> PrefixCache:
    """A `PrefixCache` over a cache at fixed addresses. Raises ConfigError for another one."""
    if not isinstance(cache, KVCacheManager):
        raise ConfigError(f"{typed(cache)} cannot keep prefixes; use the vattn cache, or prefix_cache=False")
    return PrefixCache(ManagedReuse(cache), costs=costs, ways=ways, max_segments=max_segments, events=events)


class ManagedReuse:
    """A cache's slots for `PrefixCache`.

    Parameters
    ----------
    cache : KVCacheManager
        With more slots than sequences run at once: each retained slot takes one. Addresses cost no memory.
    """

    def __init__(self, cache: KVCacheManager) -> None:
        self.cache = cache
        self.token_bytes = cache.shape.token_bytes
        layout = cache.layout
        self.table_multiple = layout.tokens_per_block if isinstance(layout, BlockLayout) else 1
        self.admit, self.extend, self.retain, self.release = cache.admit, cache.extend, cache.retain, cache.release
        self.release_retained, self.retained_tokens = cache.release_retained, cache.retained_tokens
        self.touch, self.take_evicted, self.copy_prefix = cache.touch, cache.take_evicted, cache.copy_prefix
        self.slot_of = cache.slot_of

    def adopt(self, retained: RetainedSlot, sequence: Hashable, keep_tokens: int, prompt_len: int) -> int:
        return self.cache.adopt(retained, sequence, keep_tokens, prompt_len)

    def length_of(self, slot: int) -> int:
        return int(self.cache.lengths[slot])

    def has_first(self, source: int | RetainedSlot, tokens: int) -> bool:
        return self.cache.has_windows_of(source, tokens)

    # -- bytes --------------------------------------------------------------------------------------------------------

    def available_bytes(self, enough: float = math.inf) -> int:
        """Free under the budget, parked, or behind the tokens of retained slots, of which there may be hundreds."""
        arena, bytes_for = self.cache.arena, self.cache.layout.bytes_for
        free = arena.pool.available_bytes + arena.parked_bytes
        if free >= enough:
            return free
        behind: set[Extent] = set()
        for index in np.flatnonzero(arena.retained_frontiers).tolist():
            slot = arena.slots[index]
            tokens = max(slot.tokens, arena.held_tokens(index)) if slot.holders else slot.tokens
            # Mostly nothing is: whoever ended gave that back.
            if any(group.ends_behind(bytes_for(max(0, tokens - group.deficit))) for group in slot.groups):
                behind.update(self._behind(index, tokens))
        return free + sum(extent.size for extent in behind)

    def evictable_bytes(self, but: int | None) -> int:
        arena = self.cache.arena
        found: Counter[Extent] = Counter()
        for index in np.flatnonzero(arena.retained_frontiers).tolist():
            least = arena.slots[index].tokens if index == but else arena.held_tokens(index, only_kept=True)
            found.update(self._all_behind(index, least))
        kept = sum(extent.size for extent, count in found.items() if count == extent.mappings)
        return arena.pool.available_bytes + arena.parked_bytes + kept

    def needed_bytes(self, prompt_len: int, present: int) -> int:
        return self.cache.bytes_behind(min(prompt_len, self.cache.layout.max_seq_len), present)

    def bytes_behind(self, retained: RetainedSlot, tokens: int) -> int:
        arena = self.cache.arena
        kept = arena.retained_tokens(*retained)
        if not kept:
            return 0
        slot = retained.slot
        if tokens <= arena.slots[slot].prefix:
            tokens = 0
        already = set(self._behind(slot, kept))
        return sum(extent.size for extent in self._behind(slot, tokens) if extent not in already)

    def _behind(self, index: int, tokens: int) -> Iterator[Extent]:
        """Extents that nobody shares and that lie wholly behind a slot's first tokens."""
        return (extent for extent in self._all_behind(index, tokens) if extent.mappings == 1)

    def _all_behind(self, index: int, tokens: int) -> Iterator[Extent]:
        """Extents that lie wholly behind a slot's first tokens."""
        for group in self.cache.arena.slots[index].groups:
            end, least = group.frontier, self.cache.layout.bytes_for(group.held(tokens))
            for stripe in reversed(list(group.stripes)):
                end -= stripe[0].size
                if end < least:
                    break
                yield from (mapping.extent for mapping in stripe)

    # -- who reads what -----------------------------------------------------------------------------------------------

    def held_tokens(self, slot: int) -> int:
        return self.cache.arena.held_tokens(slot)

    def own_start(self, slot: int) -> int:
        return self.cache.arena.slots[slot].prefix

    def segments_of(self, slot: int, tokens: int) -> int:
        return len(self.cache.arena.segments_below(slot, tokens))

    def adoption_bytes(self, slot: int, keep_tokens: int, prompt_len: int) -> int | None:
        arena, layout = self.cache.arena, self.cache.layout
        if arena.held_tokens(slot) > keep_tokens or arena.slots[slot].prefix > keep_tokens:
            return None
        tokens = min(prompt_len, layout.max_seq_len)
        for group, end, stripe in self._stripes(slot):
            if self.cache.config.exact_admission and end - stripe[0].size < layout.bytes_for(group.held(tokens)) < end:
                # It would hold more than was promised to it.
                return None
            written = layout.whole_bytes(group.held(keep_tokens))
            if end > written and any(mapping.extent.mappings > 1 for mapping in stripe):
                return None
        return arena.missing_bytes({slot: min(prompt_len, layout.max_seq_len)})

    def whole_extents(self, slot: int, tokens: int) -> tuple[int, int]:
        layout, whole, handles, end = self.cache.layout, self.cache.layout.whole_bytes(tokens), 0, 0
        for group, stop, stripe in self._stripes(slot):
            if stop <= whole and group.window is None:
                end, handles = max(end, stop), handles + len(stripe)
        return max(layout.tokens_in(end), self.own_start(slot)) if handles else 0, handles

    def _stripes(self, slot: int) -> Iterator[tuple[RangeGroup, int, Stripe]]:
        """Each stripe of a slot, and the byte that it ends at."""
        for group in self.cache.arena.slots[slot].groups:
            end = group.lower
            for stripe in list(group.stripes):
                end += stripe[0].size
                yield group, end, stripe

    def whole_pages(self, tokens: int) -> int:
        layout = self.cache.layout
        return layout.tokens_in(layout.whole_bytes(tokens) // layout.granularity * layout.granularity)

    def handles_for(self, tokens: int) -> int:
        pool = self.cache.arena.pool
        return sum(len(pool.split(size)) * count for size, count in self.cache.layout.needs(tokens))

    def mappings_left(self) -> int | None:
        driver = self.cache.driver
        return max(0, driver.max_mappings - driver.mappings.alive)
