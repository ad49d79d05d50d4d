"""What outlives the object that a user holds: a cache's memory, the thread that maps ahead, and how both end."""

from __future__ import annotations

import logging
import os
import warnings
import weakref

from trtllm_vattn.memory.ahead import BackgroundThread, Gate
from trtllm_vattn.memory.arena import Arena
from trtllm_vattn.memory.leftovers import discard, retry
from trtllm_vattn.memory.lookahead import Lookahead
from trtllm_vattn.memory.reclaim import return_idle, trim
from trtllm_vattn.vmm.base import Fence
from trtllm_vattn.vmm.tensors import finish
from trtllm_vattn.vmm.uninterrupted import finalize

logger = logging.getLogger(__name__)


class Lease:
    """Held by a cache and by every tensor over its memory: when the last of them goes, so does the memory."""

    __slots__ = ("__weakref__",)

    def __init__(self, backing: Backing) -> None:
        # Nothing at the end of the interpreter: the system takes everything back, and tensors may still be used.
        weakref.finalize(self, _drop, backing).atexit = False


class Backing:
    """An arena, what is mapped ahead in it, and the thread that does so. Nothing here refers to a cache.

    Parameters
    ----------
    idle_after_s, idle_floor
        As `KVCacheManager` has them.

    Attributes
    ----------
    is_owned : bool
        Whether somebody got the cache, and could close it.
    """

    def __init__(self, arena: Arena, ahead: Lookahead, idle_after_s: float | None, idle_floor: int) -> None:
        self.arena, self.ahead = arena, ahead
        self.gate = Gate()
        self.thread: BackgroundThread | None = None
        self.is_owned = self.is_closed = False
        self.process = os.getpid()
        self._idle_after_s, self._idle_floor = idle_after_s, idle_floor

    def start_thread(self) -> None:
        """Have a thread map ahead. Idempotent."""
        if self.thread is None:
            self.thread = BackgroundThread(self.work, self._idle_after_s)

    def work(self) -> bool:
        """One unit of the thread's work: a slot's growth, an extent for the stock, from a slot or new, or one for the
        driver. Returns whether there may be more."""
        with self.gate.in_background():
            if self.is_closed:
                return False
            self.arena.settle()
            return (
                self.ahead.map_due() > 0
                or trim(self.arena)
                or self.arena.pool.restock()
                or (self._idle_after_s is not None and return_idle(self.arena, self._idle_after_s, self._idle_floor))
            )

    def close(self, fence: Fence) -> None:
        """Stop the thread and give everything back once `fence` is done. Idempotent.

        Raises DriverError where something still fails, to be called again, or what the thread met and nobody was told.
        """
        if self.thread is not None:
            self.thread.close()
        self.arena.close(fence)
        self.is_closed = True
        retry()
        if self.thread is not None:
            self.thread.raise_error()

    def discard(self) -> None:
        """Give everything back once the device is done, or leave it to a later attempt. Raises nothing."""
        if self.thread is not None:
            self.thread.close()
        try:
            finish(self.arena.pool.driver.device)
        except Exception as error:
            logger.warning("the device of a cache that is gone does not finish its work: %s", error)
        discard(self.arena)
        self.is_closed = True


def _drop(backing: Backing) -> None:
    """Nobody holds a cache or its tensors any more."""
    if backing.is_closed or backing.process != os.getpid():
        return
    held = backing.arena.pool.held_bytes
    try:
        finalize(backing.discard)
    except BaseException:
        # An interrupt in a finalizer is lost on its user; the memory is not. It may be asked for twice.
        finalize(backing.discard)
        raise
    if backing.is_owned:
        warnings.warn(
            f"a KV cache of {held:,} bytes was not closed; its memory is given back, but call close() or use `with`",
            ResourceWarning,
            stacklevel=2,
        )
