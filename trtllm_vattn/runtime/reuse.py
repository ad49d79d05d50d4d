"""Slots for requests: with what earlier requests left in them, where prefixes are kept."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.cache.prefix import PrefixCache, PrefixKey, Way, prefix_cache_over
from trtllm_vattn.cache.prefix.costs import reuse_costs
from trtllm_vattn.errors import KVCacheOutOfMemory, NoFreeSlot
from trtllm_vattn.runtime.prefix_reading import PrefixReading
from trtllm_vattn.runtime.request import RequestState

WAYS = (Way.ADOPT, Way.ALIAS, Way.COPY)
"""Ways to a hit that any attention can serve; `Way.TABLE` is one for attention that takes `PrefixTables`."""
MOST_SEGMENTS = 2
"""Slots that such attention reads one sequence's tokens in: its own and one other."""


class Left(NamedTuple):
    """A request that left its slot: the tokens to keep there, or None."""

    request: int
    tokens: np.ndarray | None


class RequestSlots:
    """Gives requests slots and takes them back.

    Parameters
    ----------
    cache : KVCache
    prefixes : PrefixCache or None
        Keeps what requests leave, and finds what others begin with.
    reading : PrefixReading or None
        Is told who began with whose tokens; None where attention reads each sequence in its own slot alone.

    Attributes
    ----------
    weights_version : int
        Of the weights that prompts are computed with from now on.
    changes : int
        Counts whatever may have made memory free, or tokens known.
    """

    def __init__(self, cache: KVCache, prefixes: PrefixCache | None, reading: PrefixReading | None = None) -> None:
        self.cache, self.prefixes, self.reading = cache, prefixes, reading
        self.weights_version = 0
        self._refused: tuple[int, int, int] | None = None
        self.changes = 0

    @classmethod
    def over(
        cls, cache: KVCache, prefix_cache: bool, events: bool, reading: PrefixReading | None = None
    ) -> RequestSlots:
        """Of a cache, with or without prefix cache. Raises ConfigError where the cache can keep none."""
        if not prefix_cache:
            return cls(cache, None)
        if reading is None:
            return cls(cache, prefix_cache_over(cache, WAYS, events, costs=reuse_costs(cache.device)))
        costs = reuse_costs(cache.device, table_step_us=reading.step_us, table_is_measured=reading.is_measured)
        return cls(cache, prefix_cache_over(cache, tuple(Way), events, MOST_SEGMENTS, costs), reading)

    def key_of(self, request: RequestState) -> PrefixKey:
        """Of a request's keys and values: a key of its own where all of its prompt shall be computed."""
        if request.params.prompt_logprobs is None:
            return self.key(request.params.cache_salt)
        return self.key(request.params.cache_salt)._replace(policy=f"logprobs of request {request.id}")

    def key(self, salt: str | None) -> PrefixKey:
        """What keys and values of requests with a salt depend on beside tokens."""
        return PrefixKey(salt or "", self.weights_version)

    def admit(self, request: RequestState) -> None:
        """Give a request a slot that is backed for all its tokens, with as many of them in it as are kept.

        Raises
        ------
        NoFreeSlot, KVCacheOutOfMemory, DriverError
            As the cache does.
        """
        cached = 0
        if self.prefixes is None:
            slot = self.cache.admit(request.id, request.length)
        else:
            slot, cached = self._look_up_and_admit(self.prefixes, request)
        request.slot, request.prefilled, request.known = slot, cached, len(request.chosen)
        if request.cached_tokens is None:
            request.cached_tokens = min(cached, len(request.prompt))

    def _look_up_and_admit(self, prefixes: PrefixCache, request: RequestState) -> tuple[int, int]:
        # Nothing becomes free but by those who leave and by a larger budget: looking again would only evict more.
        now = request.id, self.changes, self.cache.budget_bytes
        if now == self._refused:
            raise KVCacheOutOfMemory(f"nobody has left since request {request.id} found no room")
        params = request.params
        try:
            # Several calls of the cache, of which each would wait for the thread that makes them.
            found = self.cache.at_once(
                partial(prefixes.lookup_and_admit, share=request.group is not None),
                request.id,
                request.token_ids,
                self.key_of(request),
                params.retention_priority,
                request.left,
            )
        except (NoFreeSlot, KVCacheOutOfMemory):
            self._refused = now
            raise
        if self.reading is not None:
            self.reading.origins.begin(found.slot, found.owner, found.cached_tokens)
        return found.slot, found.cached_tokens

    def has_all(self, request: RequestState) -> bool:
        """Whether all of a request's tokens are kept that it may begin with."""
        if self.prefixes is None:
            return False
        tokens = request.token_ids
        return self.prefixes.match(tokens, self.key_of(request)) >= len(tokens) - 1

    def suspend(self, request: RequestState, tokens: int, wait: bool = True) -> int:
        """Put a request's first tokens to host memory, and give its memory to others, at once or without `wait` when
        they are there; returns the bytes copied. Raises as `KVCache.suspend` and `truncate`; the request has its slot
        then."""
        self.cache.truncate(request.id, tokens)
        copied = self.cache.suspend(request.id, wait=wait)
        self.changes += 1
        if self.prefixes is not None:
            self.prefixes.suspended(request.id)
        request.slot, request.prefilled = -1, tokens
        return copied

    def resume(self, request: RequestState) -> None:
        """Give a suspended request memory for all its tokens again, and have its tokens come back beside what others
        do; once they are there (`KVCache.has_arrived`), `arrived` is to be called. Raises as `KVCache.resume`."""
        tokens = request.prefilled if request.decodes_next else request.length
        request.slot = self.cache.resume(request.id, tokens, wait=False)

    def arrived(self, request: RequestState) -> None:
        """A resumed request's tokens are there: others may read them, too. Waits where they are not."""
        self.cache.slot_of(request.id)
        self._begin_anew(request)
        if self.prefixes is not None:
            self.prefixes.resumed(request.id)
            if request.is_verified:
                self.computed(request)

    def computed(self, request: RequestState) -> None:
        """A verified request's tokens are in its slot: others may begin with them from now on."""
        if self.prefixes is not None:
            self.changes += 1
            self.prefixes.computed(request.id, request.stored)

    def moved(self, request: RequestState) -> None:
        """The cache has given a request another slot."""
        self._begin_anew(request)
        if self.prefixes is not None:
            self.prefixes.moved(request.id)

    def _begin_anew(self, request: RequestState) -> None:
        """A request is in a slot that had others' tokens: it shares the reading of none."""
        if self.reading is not None:
            self.reading.origins.begin(request.slot)

    def leaving(self, request: RequestState) -> Left:
        """What `release` shall do with a request that gives its slot up now. What it has is kept where it was verified,
        and neither the request nor the slot failed."""
        keep = (
            self.prefixes is not None
            and request.is_verified
            and request.finish_reason != "error"
            and request.slot not in self.cache.broken_slots()
        )
        return Left(request.id, request.stored if keep else None)

    def release(self, left: Left) -> None:
        """Take a request's slot. Raises DriverError, with nothing changed."""
        self.changes += 1
        if self.prefixes is None:
            self.cache.release(left.request)
        else:
            kept = left.tokens is not None
            self.cache.at_once(self.prefixes.finish, left.request, left.tokens if kept else (), kept)

    def flush(self) -> int:
        """Forget what is kept; returns the tokens forgotten."""
        self.changes += 1
        return 0 if self.prefixes is None else self.prefixes.flush()

    def begin_anew(self) -> None:
        """The cache was reset: nobody has a slot, and nothing is kept. Begins from any state."""
        self._refused = None
        if self.reading is not None:
            self.reading.clear()
        if self.prefixes is not None:
            self.prefixes.begin_anew()
