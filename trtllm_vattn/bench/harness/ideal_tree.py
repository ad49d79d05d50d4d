"""What prefix caches are compared with: the least recently used tree of blocks, without pages, slots or extents."""

from __future__ import annotations

from collections import Counter, OrderedDict

import numpy as np

from trtllm_vattn.cache.prefix.tree import as_bytes


class IdealTree:
    """Blocks of tokens under a budget, each stored once, wherever it is; the least recently used goes first, the end of
    a branch before its beginning. What runs stays.

    Parameters
    ----------
    tokens : int
        That memory holds.
    block_size : int
        Tokens a block.
    """

    def __init__(self, tokens: int, block_size: int = 16) -> None:
        self._most, self._block_size = tokens // block_size, block_size
        self._numbers: dict[tuple[int, bytes], int] = {}
        self._used: OrderedDict[int, None] = OrderedDict()
        self._running: Counter[int] = Counter()

    def admit(self, prompt: np.ndarray, output: np.ndarray) -> tuple[int, list[int]]:
        """How many of a prompt's tokens are held; and what `finish` takes. From now on its blocks are held too, its
        output's among them."""
        blocks = self._blocks(np.concatenate([prompt, output]))
        whole = len(prompt) // self._block_size
        held = next((i for i, block in enumerate(blocks[:whole]) if block not in self._used), whole)
        for block in reversed(blocks):
            self._used[block] = None
            self._used.move_to_end(block)
        self._running.update(blocks)
        while len(self._used) > self._most:
            oldest = next((block for block in self._used if not self._running[block]), None)
            if oldest is None:
                break
            del self._used[oldest]
        return min(held * self._block_size, len(prompt) - 1), blocks

    def finish(self, blocks: list[int]) -> None:
        """A sequence has ended."""
        self._running.subtract(blocks)

    def _blocks(self, tokens: np.ndarray) -> list[int]:
        """A number for each block, which covers those before it; the last one may be short."""
        data, size = as_bytes(tokens), len(as_bytes(tokens[:1])) * self._block_size
        found, parent = [], 0
        for at in range(0, len(data), size):
            parent = self._numbers.setdefault((parent, data[at : at + size]), len(self._numbers) + 1)
            found.append(parent)
        return found
