"""Hiding from the C++ capacity scheduler the blocks that the budget does not back.

The scheduler asks the C++ manager how many blocks are free, and that manager counts the blocks of the whole address
space. Sequences that never run hold as many of them as memory falls short; a change of the budget changes how many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FIRST_ID = 1 << 62
"""Request ids of holdback sequences start here. Users' ids count up from 0, TensorRT-LLM's dummies down from 2^64."""


class BlockHoldback:
    """Holds blocks of a C++ manager.

    Parameters
    ----------
    take : callable
        ``take(request_id, blocks)`` begins a sequence of so many blocks (or a few more) and returns its request, or
        None where it cannot.
    drop : callable
        ``drop(request)`` ends it.
    free : callable
        Returns the blocks that are free in the C++ manager.
    largest : int
        The most blocks of one sequence.

    Attributes
    ----------
    blocks : int
        Blocks held now.
    """

    def __init__(
        self, take: Callable[[int, int], Any], drop: Callable[[Any], None], free: Callable[[], int], largest: int
    ) -> None:
        self._take, self._drop, self._free, self._largest = take, drop, free, largest
        self._held: list[tuple[Any, int]] = []
        self._last_id = FIRST_ID
        self.blocks = 0

    def hold(self, blocks: int) -> None:
        """Hold `blocks`, or as many of them as are free."""
        while self.blocks > max(0, blocks):
            request, count = self._held.pop()
            self._drop(request)
            self.blocks -= count
        while self.blocks < blocks:
            before = self._free()
            wanted = min(blocks - self.blocks, self._largest, before)
            if wanted < 1:
                break
            self._last_id += 1
            request = self._take(self._last_id, wanted)
            if request is None:
                break
            count = before - self._free()
            self._held.append((request, count))
            self.blocks += count


class StatsWithoutHoldback:
    """`KvCacheStats` in which blocks held back neither exist nor are used; all else is the C++ manager's, until it is
    set."""

    reused_blocks: int
    missed_blocks: int

    def __init__(self, stock: Any, held: int) -> None:
        self._stock = stock
        self.free_num_blocks: int = stock.free_num_blocks
        self.max_num_blocks: int = stock.max_num_blocks - held
        self.used_num_blocks: int = stock.used_num_blocks - held

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)
