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
        return block_numbers(self._numbers, tokens, self._block_size, short=True)


def block_numbers(
    numbers: dict[tuple[int, bytes], int], tokens: np.ndarray, block_size: int, short: bool = False
) -> list[int]:
    """A number for each block of tokens, by its tokens and those before it; with `short` for a last one that is not
    whole, too. New ones are put into `numbers`."""
    found, parent = [], 0
    for at in range(0, len(tokens) if short else len(tokens) - block_size + 1, block_size):
        parent = numbers.setdefault((parent, as_bytes(tokens[at : at + block_size])), len(numbers) + 1)
        found.append(parent)
    return found
