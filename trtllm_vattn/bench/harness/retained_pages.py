"""A cache without memory for `PrefixCache`: pages, extents, segments and who shares them are counted.

What `KVCacheManager` does with retained slots, worked out for a machine of any size on this one. Memory alone is short:
there are as many slots as are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

from trtllm_vattn.cache.base import RetainedSlot
from trtllm_vattn.errors import ConfigError, KVCacheOutOfMemory
from trtllm_vattn.memory.slot import Segment


@dataclass(eq=False)
class _Stripe:
    """An extent in each range, at the same offset of each; `refs` slots map it."""

    pages: int
    refs: int = 1


@dataclass
class _Slot:
    tokens: int
    first_page: int = 0
    stripes: list[_Stripe] = field(default_factory=list)
    segments: tuple[Segment, ...] = ()
    holders: dict[int, int] = field(default_factory=dict)
    serial: int = 0

    @property
    def end_page(self) -> int:
        return self.first_page + sum(stripe.pages for stripe in self.stripes)


class RetainedPages:
    """Slots whose prompts take the largest extents that fit, of power-of-two classes, and whose outputs take pages.

    Parameters
    ----------
    budget : int
        Bytes.
    token_bytes : int
        Of one token in all layers.
    num_ranges : int
        Ranges of the layout: a stripe is a handle in each.
    page_tokens : int
        Tokens in a page of every range.
    largest_extent : int
        Pages of the largest extent.
    ascending : bool
        No extent is larger than what lies before it in its slot: small ones where prompts branch off.

    Attributes
    ----------
    handles_made, handles_aliased : int
        Handles that were created and mapped, or mapped once more.
    """

    def __init__(
        self,
        budget: int,
        token_bytes: int,
        num_ranges: int,
        page_tokens: int,
        largest_extent: int,
        ascending: bool = False,
    ) -> None:
        if budget < token_bytes * page_tokens:
            raise ConfigError(f"a budget of {budget:,} bytes holds no page of {token_bytes * page_tokens:,}; raise it")
        self.token_bytes, self.num_ranges, self.page_tokens = token_bytes, num_ranges, page_tokens
        self.page_bytes = token_bytes * page_tokens
        self.largest_extent, self.ascending = largest_extent, ascending
        self.pages = budget // self.page_bytes
        self.used_pages = 0
        self.table_multiple = 1
        self.handles_made = self.handles_aliased = 0
        self._slots: dict[int, _Slot] = {}
        self._slot_of: dict[Hashable, int] = {}
        self._free: list[int] = []
        self._serial = 0

    # -- the cache's calls --------------------------------------------------------------------------------------------

    def admit(
        self,
        sequence: Hashable,
        prompt_len: int,
        *,
        prefix: tuple[int | RetainedSlot, int] | None = None,
        alias: tuple[int | RetainedSlot, int] | None = None,
    ) -> int:
        made = _Slot(prompt_len)
        if prefix is not None:
            owner, tokens = self._source(*prefix)
            made.segments = self._segments_below(owner, tokens)
            made.first_page = tokens // self.page_tokens
        elif alias is not None:
            owner, tokens = self._source(*alias)
            if tokens <= self.own_start(owner):
                return self.admit(sequence, prompt_len, prefix=alias)
            # Tokens of the source that lie in other slots lie there for the new sequence too.
            made.segments, made.first_page = self._slots[owner].segments, self._slots[owner].first_page
            made.stripes = list(self._whole(owner, tokens))
        self._take(self._pages_of(prompt_len) - made.end_page)
        for stripe in made.stripes:
            stripe.refs += 1
            self.handles_aliased += self.num_ranges
        self._grow(made, prompt_len)
        slot = self._free.pop() if self._free else len(self._slots)
        self._slots[slot], self._slot_of[sequence] = made, slot
        for segment in made.segments:
            self._slots[segment.owner].holders[slot] = segment.stop
        return slot

    def extend(self, sequence: Hashable, tokens: int) -> None:
        """Output, in pages."""
        slot = self._slots[self._slot_of[sequence]]
        missing = self._pages_of(slot.tokens + tokens) - slot.end_page
        self._take(missing)
        slot.stripes += [_Stripe(1) for _ in range(missing)]
        self.handles_made += max(0, missing) * self.num_ranges
        slot.tokens += tokens

    def adopt(self, retained: RetainedSlot, sequence: Hashable, keep_tokens: int, prompt_len: int) -> int:
        slot = self._slots[retained.slot]
        self._source(retained, keep_tokens)
        missing = self.adoption_bytes(retained.slot, keep_tokens, prompt_len)
        if missing is None:
            raise ConfigError(f"slot {retained.slot} is read behind {keep_tokens} tokens, or reads or shares there")
        self._take(missing // self.page_bytes)
        self._grow(slot, prompt_len)
        slot.tokens, slot.serial = prompt_len, 0
        self._slot_of[sequence] = retained.slot
        self._trim(slot)
        return retained.slot

    def copy_prefix(self, owner: int | RetainedSlot, sequence: Hashable, tokens: int) -> None:
        self._source(owner, tokens)

    def retain(self, sequence: Hashable) -> RetainedSlot:
        slot = self._slot_of.pop(sequence)
        self._serial += 1
        self._slots[slot].serial = self._serial
        return RetainedSlot(slot, self._serial)

    def release(self, sequence: Hashable) -> None:
        if self.held_tokens(self._slot_of[sequence]):
            raise ConfigError(f"other slots read the slot of sequence {sequence!r}; retain it")
        self._remove(self._slot_of.pop(sequence))

    def release_retained(self, retained: RetainedSlot, keep_tokens: int = 0) -> None:
        if self.retained_tokens(retained) <= keep_tokens:
            return
        slot = self._slots[retained.slot]
        if self.held_tokens(retained.slot) > keep_tokens:
            raise ConfigError(f"other slots read slot {retained.slot} behind {keep_tokens} tokens")
        if keep_tokens <= self.own_start(retained.slot):
            self._remove(retained.slot)
            return
        slot.tokens = keep_tokens
        self._trim(slot)

    def retained_tokens(self, retained: RetainedSlot) -> int:
        slot = self._slots.get(retained.slot)
        return slot.tokens if slot is not None and slot.serial == retained.serial else 0

    def touch(self, retained: RetainedSlot, priority: float = 0.0) -> None:
        """Nothing is evicted here but what is asked for."""

    def take_evicted(self) -> list[tuple[RetainedSlot, int]]:
        return []

    def slot_of(self, sequence: Hashable) -> int:
        return self._slot_of[sequence]

    def length_of(self, slot: int) -> int:
        return self._slots[slot].tokens

    # -- what reuse is decided by -------------------------------------------------------------------------------------

    def available_bytes(self, enough: float = math.inf) -> int:
        return (self.pages - self.used_pages) * self.page_bytes

    def evictable_bytes(self, but: int | None) -> int:
        kept = [
            stripe for index, slot in self._slots.items() if slot.serial and index != but for stripe in slot.stripes
        ]
        return self.available_bytes() + sum({id(stripe): stripe.pages for stripe in kept}.values()) * self.page_bytes

    def needed_bytes(self, prompt_len: int, present: int) -> int:
        return max(0, self._pages_of(prompt_len) - present // self.page_tokens) * self.page_bytes

    def bytes_behind(self, retained: RetainedSlot, tokens: int) -> int:
        slot = self._slots[retained.slot]
        if tokens <= self.own_start(retained.slot):
            tokens = 0
        return sum(stripe.pages for stripe in self._behind(slot, tokens) if stripe.refs == 1) * self.page_bytes

    def held_tokens(self, slot: int) -> int:
        return max(self._slots[slot].holders.values(), default=0) if slot in self._slots else 0

    def own_start(self, slot: int) -> int:
        segments = self._slots[slot].segments
        return segments[-1].stop if segments else 0

    def adoption_bytes(self, slot: int, keep_tokens: int, prompt_len: int) -> int | None:
        if self.held_tokens(slot) > keep_tokens or self.own_start(slot) > keep_tokens:
            return None
        found, at = self._slots[slot], self._slots[slot].first_page
        for stripe in found.stripes:
            at += stripe.pages
            if stripe.refs > 1 and at * self.page_tokens > keep_tokens:
                return None
        return max(0, self._pages_of(prompt_len) - at) * self.page_bytes

    def segments_of(self, slot: int, tokens: int) -> int:
        return len(self._segments_below(slot, tokens))

    def has_first(self, source: Any, tokens: int) -> bool:
        return True

    def whole_extents(self, slot: int, tokens: int) -> tuple[int, int]:
        stripes = list(self._whole(slot, tokens))
        end = self._slots[slot].first_page + sum(stripe.pages for stripe in stripes)
        return max(end * self.page_tokens, self.own_start(slot)) if stripes else 0, len(stripes) * self.num_ranges

    def whole_pages(self, tokens: int) -> int:
        return tokens // self.page_tokens * self.page_tokens

    def handles_for(self, tokens: int) -> int:
        return len(list(self._split(self._pages_of(tokens), 0))) * self.num_ranges

    def mappings_left(self) -> int | None:
        return None

    def check(self) -> None:
        """Raise where the counts contradict one another; for tests."""
        stripes = [stripe for slot in self._slots.values() for stripe in slot.stripes]
        pages = sum({id(stripe): stripe.pages for stripe in stripes}.values())
        if pages != self.used_pages or pages > self.pages:
            raise ConfigError(f"{pages} pages are mapped, {self.used_pages} are counted, {self.pages} there are")
        for stripe in stripes:
            if stripe.refs != sum(stripe is each for each in stripes):
                raise ConfigError(f"an extent has {stripe.refs} references counted")
        for index, slot in self._slots.items():
            if slot.end_page * self.page_tokens < slot.tokens:
                raise ConfigError(f"slot {index} has {slot.tokens} tokens and {slot.end_page} pages")

    # -- pages --------------------------------------------------------------------------------------------------------

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def _source(self, owner: int | RetainedSlot, tokens: int) -> tuple[int, int]:
        slot = owner.slot if isinstance(owner, RetainedSlot) else owner
        held = self.retained_tokens(owner) if isinstance(owner, RetainedSlot) else self._slots[slot].tokens
        if held < tokens:
            raise ConfigError(f"{tokens} tokens of {owner} asked for, which has {held}")
        return slot, tokens

    def _segments_below(self, slot: int, tokens: int) -> tuple[Segment, ...]:
        found = [
            Segment(o, start, min(stop, tokens)) for o, start, stop in self._slots[slot].segments if start < tokens
        ]
        if (own := self.own_start(slot)) < tokens:
            found.append(Segment(slot, own, tokens))
        return tuple(found)

    def _whole(self, slot: int, tokens: int) -> Iterator[_Stripe]:
        """A slot's first own stripes that hold nothing but its first tokens."""
        at = self._slots[slot].first_page
        for stripe in self._slots[slot].stripes:
            at += stripe.pages
            if at * self.page_tokens > tokens:
                return
            yield stripe

    def _take(self, pages: int) -> None:
        if self.used_pages + max(0, pages) > self.pages:
            raise KVCacheOutOfMemory(f"{pages} pages wanted, {self.pages - self.used_pages} of {self.pages} are free")
        self.used_pages += max(0, pages)

    def _split(self, pages: int, at: int) -> Iterator[int]:
        """Sizes of the extents for so many pages from page `at` on."""
        while pages > 0:
            size = min(self.largest_extent, 1 << (pages.bit_length() - 1))
            if self.ascending:
                size = min(size, 1 << (max(1, at).bit_length() - 1))
            yield size
            pages, at = pages - size, at + size

    def _grow(self, slot: _Slot, tokens: int) -> None:
        """Map the largest extents that fit; their pages were taken."""
        made = [_Stripe(size) for size in self._split(self._pages_of(tokens) - slot.end_page, slot.end_page)]
        slot.stripes += made
        self.handles_made += len(made) * self.num_ranges

    def _behind(self, slot: _Slot, tokens: int) -> Iterator[_Stripe]:
        at = slot.end_page
        for stripe in reversed(slot.stripes):
            at -= stripe.pages
            if at * self.page_tokens < tokens:
                return
            yield stripe

    def _trim(self, slot: _Slot) -> None:
        self._drop(slot, len(slot.stripes) - len(list(self._behind(slot, slot.tokens))))

    def _drop(self, slot: _Slot, keep: int) -> None:
        for stripe in slot.stripes[keep:]:
            stripe.refs -= 1
            if not stripe.refs:
                self.used_pages -= stripe.pages
        del slot.stripes[keep:]

    def _remove(self, index: int) -> None:
        slot = self._slots.pop(index)
        self._drop(slot, 0)
        for segment in slot.segments:
            self._slots[segment.owner].holders.pop(index, None)
        self._free.append(index)
