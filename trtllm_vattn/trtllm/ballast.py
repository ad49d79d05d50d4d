"""Blocks that stand for memory we do not have.

TensorRT-LLM's capacity scheduler is C++ and asks the C++ manager how many blocks are free. That manager keeps the books
of the whole address space, more blocks than there is memory for; so some are held by sequences that nobody runs, as
many as the memory falls short. Raising and lowering the budget takes them and gives them back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FIRST_ID = 1 << 62
"""Request ids of ballast; those of users count from 0, and TensorRT-LLM's dummies from the top of 64 bits down."""


@dataclass
class _Weight:
    request: Any
    blocks: int


class Ballast:
    """Holds blocks of a C++ manager.

    Parameters
    ----------
    take : callable
        ``take(request_id, blocks)`` has a sequence hold so many blocks (or a few more) and returns its request, None
        where it cannot.
    drop : callable
        ``drop(request)`` ends it.
    free : callable
        Blocks that are free in the C++ manager.
    largest : int
        Blocks of one sequence at most.
    """

    def __init__(
        self,
        take: Callable[[int, int], Any],
        drop: Callable[[Any], None],
        free: Callable[[], int],
        largest: int,
    ) -> None:
        self._take, self._drop, self._free, self._largest = take, drop, free, largest
        self._weights: list[_Weight] = []
        self._ids = FIRST_ID
        self.blocks = 0
        """Blocks held now."""

    def hold(self, blocks: int) -> int:
        """Hold `blocks`, or as many as are there to be taken; returns how many are held then."""
        while self.blocks > max(0, blocks):
            last = self._weights.pop()
            self._drop(last.request)
            self.blocks -= last.blocks
        while self.blocks < blocks:
            before = self._free()
            piece = min(blocks - self.blocks, self._largest, before)
            if piece < 1:
                break
            self._ids += 1
            request = self._take(self._ids, piece)
            if request is None:
                break
            taken = before - self._free()
            self._weights.append(_Weight(request, taken))
            self.blocks += taken
        return self.blocks
