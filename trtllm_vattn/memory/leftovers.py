"""Arenas that nobody holds any more: a constructor failed, or a cache was dropped without `close()`.

What the driver does not take back at once is kept here, and tried again whenever a cache is built or closed.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING

from trtllm_vattn.errors import DriverError

if TYPE_CHECKING:
    from trtllm_vattn.memory.arena import Arena

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often what undoes a failure is tried before it counts as failed itself."""
_arenas: list[Arena] = []
_lock = threading.Lock()


def discard(arena: Arena) -> None:
    """Give all that an arena holds back to the driver, or keep the arena until that succeeds. Raises nothing.

    Nothing submitted to the device may still use its memory.
    """
    for _ in range(ATTEMPTS):
        if (error := _close(arena)) is None:
            return
    logger.warning("memory of a cache that is gone is tried again at the next cache's construction or close: %s", error)
    with _lock:
        _arenas.append(arena)


def retry() -> int:
    """Try again what is left; returns how many arenas still are."""
    with _lock:
        _arenas[:] = [arena for arena in _arenas if _close(arena) is not None]
        return len(_arenas)


def _close(arena: Arena) -> DriverError | None:
    try:
        arena.close()
    except DriverError as error:
        return error
    return None


def _enter_child() -> None:
    """A forked child has none of its parent's memory."""
    global _lock
    _arenas.clear()
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_enter_child)
