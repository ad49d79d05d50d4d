"""Memory that outlives the object a user holds: tensors over a cache keep its memory until the last of them is gone."""

from __future__ import annotations

import logging
import os
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from time import perf_counter

from trtllm_vattn.errors import DriverError
from trtllm_vattn.memory.arena import Arena, discard, retry_discarded
from trtllm_vattn.memory.host_pool import HostPool
from trtllm_vattn.memory.lookahead import BackgroundThread, Lookahead, PriorityLock
from trtllm_vattn.memory.reclaim import give_part, release_idle, trim
from trtllm_vattn.trace import Trace
from trtllm_vattn.vmm.base import Fence
from trtllm_vattn.vmm.tensors import finish
from trtllm_vattn.vmm.uninterrupted import finalize

logger = logging.getLogger(__name__)


class MemoryRef:
    """Held by a cache and by every tensor over its memory: when the last holder is gone, the memory is given back."""

    __slots__ = ("__weakref__",)

    def __init__(self, memory: CacheMemory) -> None:
        # Nothing at the end of the interpreter: the system takes everything back, and tensors may still be used.
        weakref.finalize(self, _on_last_reference, memory).atexit = False


class CacheMemory:
    """An arena, what is mapped ahead in it, and the thread that does so; and the host memory that slots are suspended
    to. Nothing here refers to a cache.

    Parameters
    ----------
    host_memory : int
        Bytes of host memory that may be pinned for suspended slots.
    idle_after_s, idle_floor
        As `CacheConfig` has them.

    Attributes
    ----------
    is_owned : bool
        Whether a user got the cache, and could close it.
    trace : Trace or None
        Notes background work.
    is_asleep : bool
        Whether the arena has no memory, not even the dummy slot's, and may take none.
    on_closed : callable or None
        Called once all memory was given back, or nothing more is tried.
    after_mapping : callable or None
        Called when nothing has to be mapped ahead for now, before other background work, under the lock.
    """

    def __init__(
        self, arena: Arena, ahead: Lookahead, idle_after_s: float | None, idle_floor: int, host_memory: int
    ) -> None:
        self.arena, self.ahead = arena, ahead
        self.host = HostPool(arena.pool.driver, host_memory)
        self.is_asleep = False
        self.on_closed: Callable[[], None] | None = None
        self.after_mapping: Callable[[], None] | None = None
        self.lock = PriorityLock()
        self.thread: BackgroundThread | None = None
        self.is_owned = self.is_closed = False
        self.process = os.getpid()
        self._idle_after_s, self._idle_floor = idle_after_s, idle_floor
        self.trace: Trace | None = None
        self._units: tuple[tuple[str, Callable[[], object]], ...] = (
            ("map ahead", ahead.map_due),
            ("note what is mapped", self._after_mapping),
            ("unmap surplus", partial(trim, arena)),
            ("preallocate", arena.pool.create_one),
            ("return idle memory", self._release_idle),
        )
        """Kinds of background work, the most urgent first; each does one unit of it, and says whether it did."""

    def start_thread(self) -> None:
        """Have a thread map ahead. Idempotent."""
        if self.thread is None:
            self.thread = BackgroundThread(self.work, self._idle_after_s)

    def work(self) -> bool:
        """Do one unit of background work: grow a slot, unmap a surplus stripe, create a free extent, or give one back.
        Returns whether there may be more."""
        with self.lock.in_background():
            if self.is_closed or self.is_asleep:
                return False
            self.arena.complete_pending_unmaps()
            for name, unit in self._units:
                started = perf_counter()
                if unit():
                    if self.trace is not None:
                        self.trace.span(name, started, perf_counter(), category="background")
                    return True
            return False

    def _after_mapping(self) -> bool:
        if self.after_mapping is not None:
            self.after_mapping()
        # Nothing that there is more of.
        return False

    def _release_idle(self) -> bool:
        after_s = self._idle_after_s
        return after_s is not None and release_idle(self.arena, after_s, self._idle_floor)

    def shrink_beside(self, budget: int, retained: bool, part: int) -> int:
        """Lower the budget towards `budget` bytes as far as parked memory allows, and `retained` memory too, by giving
        back some `part` bytes at most; returns the budget then. From any thread that holds the lock, beside running
        steps; waits for the fences of what it unmaps."""
        arena = self.arena
        if not (self.is_closed or self.is_asleep) and budget < arena.pool.budget:
            budget = max(budget, arena.layout.least_bytes)
            if (owed := arena.pool.held_bytes - budget) > 0:
                give_part(arena, min(part, owed), retained)
            arena.pool.budget = max(budget, arena.pool.held_bytes)
        return arena.pool.budget

    def close(self, fence: Fence) -> None:
        """Stop the thread and give everything back once `fence` is done. Idempotent.

        Raises DriverError or MemoryQuarantined where something still fails, to be called again, or an error of the
        thread that nobody was told of.
        """
        if self.thread is not None:
            self.thread.close()
        with self.lock:
            self.arena.close(fence)
        self.host.close()
        self._end()
        retry_discarded()
        if self.thread is not None:
            self.thread.raise_error()

    def _end(self) -> None:
        with self.lock:
            self.is_closed = True
        if self.on_closed is not None:
            self.on_closed()

    def discard(self) -> None:
        """Give everything back once the device is done, or leave it to a later attempt. Raises nothing."""
        if self.thread is not None:
            self.thread.close()
        try:
            finish(self.arena.pool.driver.device)
        except Exception as error:
            logger.warning("the device of a cache that is gone does not finish its work: %s", error)
        with self.lock:
            discard(self.arena)
        try:
            self.host.close()
        except DriverError as error:
            logger.warning("pinned host memory of a cache that is gone stays: %s", error)
        self._end()


def _on_last_reference(memory: CacheMemory) -> None:
    if memory.is_closed or memory.process != os.getpid():
        return
    held = memory.arena.pool.held_bytes
    try:
        finalize(memory.discard)
    except BaseException:
        # An interrupt in a finalizer is lost on its user; the memory is not. It may be asked for twice.
        finalize(memory.discard)
        raise
    if memory.is_owned:
        warnings.warn(
            f"a KV cache of {held:,} bytes was not closed; its memory is given back, but call close() or use `with`",
            ResourceWarning,
            stacklevel=2,
        )
