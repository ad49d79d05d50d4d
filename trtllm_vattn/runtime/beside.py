"""Mapping ahead at the moment that the machine's policy allows: beside running work, or before it is launched."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.errors import DriverError
from trtllm_vattn.memory.mapping_policy import MappingPolicy


class MappingBeside:
    """Calls a cache's `map_ahead` once a step.

    Parameters
    ----------
    policy : MappingPolicy
        ``concurrent`` has a thread of the cache do the mapping, or the calling one where the device has to be told.
    publish : callable or None
        Tells a loop on the device how far memory reaches now; called after each mapping, while the loop runs.
    """

    def __init__(self, cache: KVCache, policy: MappingPolicy, publish: Callable[[], None] | None) -> None:
        self._cache, self._policy, self._publish = cache, policy, publish
        self._failed: DriverError | None = None
        if policy is MappingPolicy.CONCURRENT and publish is None:
            cache.start_thread()

    def before_step(self) -> None:
        """Map what the step will need now, if not beside it. Raises what failed beside the last one: that one had work
        under way, whose tokens were not to be lost."""
        if self._failed is not None:
            error, self._failed = self._failed, None
            raise error
        if self._policy is not MappingPolicy.CONCURRENT:
            self._cache.map_ahead()

    def beside_step(self) -> float:
        """Map while the device is busy, where that is allowed; returns the seconds it took."""
        started = perf_counter()
        if self._policy is MappingPolicy.CONCURRENT:
            try:
                while self._cache.map_ahead() and self._publish is not None:
                    self._publish()
            except DriverError as error:
                self._failed = error
        return perf_counter() - started

    def close(self) -> None:
        """Close the cache; then raise what failed beside the last step, which no step came to raise. Idempotent."""
        failed, self._failed = self._failed, None
        self._cache.close()
        if failed is not None:
            raise failed
