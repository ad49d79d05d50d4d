"""When a step maps memory ahead: while the device computes, or before the launch, as the mapping policy says."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.errors import DriverError, MemoryQuarantined
from trtllm_vattn.memory.mapping_policy import MappingPolicy


class MapAheadHook:
    """Calls a cache's `map_ahead` once a step.

    Parameters
    ----------
    policy : MappingPolicy
        With ``concurrent`` the cache's background thread maps; or the calling thread, where `publish` is given.
    publish : callable or None
        Publishes frontiers to a loop on the device; called after each mapping while the loop runs.
    """

    def __init__(self, cache: KVCache, policy: MappingPolicy, publish: Callable[[], None] | None) -> None:
        self._cache, self._policy, self._publish = cache, policy, publish
        self._failed: DriverError | MemoryQuarantined | None = None
        if policy is MappingPolicy.CONCURRENT and publish is None:
            cache.start_thread()

    def before_step(self) -> None:
        """Map what the step will need, unless that is done during it. Raises what failed during the last step."""
        self.raise_failed()
        if self._policy is not MappingPolicy.CONCURRENT:
            self._cache.map_ahead()

    def during_step(self) -> float:
        """Map while the device computes, if the policy allows it; returns the seconds it took.

        What the driver refused is kept for `raise_failed`, so that no token of the running launch is lost.
        """
        started = perf_counter()
        if self._policy is MappingPolicy.CONCURRENT:
            try:
                while self._cache.map_ahead() and self._publish is not None:
                    self._publish()
            except (DriverError, MemoryQuarantined) as error:
                self._failed = error
        return perf_counter() - started

    def raise_failed(self) -> None:
        """Raise what `during_step` kept, if any; once."""
        if self._failed is not None:
            error, self._failed = self._failed, None
            raise error
