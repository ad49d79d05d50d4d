"""What is to be created ahead: for bursts that were announced, and for prompts that wait already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.memory.layout import SlotLayout
from trtllm_vattn.memory.pool import ExtentPool
from trtllm_vattn.memory.reclaim import HEADROOM


class Stock:
    """Tells a pool how many extents of each class to keep. Makes no driver call.

    Of a class as many are kept as the larger of two needs asks for: those who wait may be the burst that was announced.

    Attributes
    ----------
    expected : tuple of int
        Tokens of the prompts that wait, as far as they fit.
    """

    def __init__(self, pool: ExtentPool, layout: SlotLayout) -> None:
        self._pool, self._layout = pool, layout
        self._announced: Counter[int] = Counter()
        self.expected: tuple[int, ...] = ()

    def announce(self, sequences: int, tokens: int) -> None:
        """So many prompts of so many tokens may come at once. Raises ConfigError where they cannot."""
        longest = self._layout.max_seq_len
        if sequences < 0 or not 1 <= tokens <= longest:
            raise ConfigError(
                f"a stock for {sequences} prompts of {tokens} tokens asked for; give 0 or more, of 1 to {longest} "
                "tokens"
            )
        each = self._extents([tokens])
        self._announced = Counter({size: count * sequences for size, count in each.items()})
        self._keep()

    def fitting(self, prompts: Sequence[int]) -> tuple[int, ...]:
        """The first of these prompts, in tokens, that the budget's rest holds together, but for what keeps memory from
        being short."""
        left, fitting = self._pool.available_bytes - self._pool.budget // HEADROOM, 0
        for tokens in prompts:
            left -= self._layout.bytes_for(tokens) * self._layout.num_ranges
            if left < 0:
                break
            fitting += 1
        return tuple(prompts[:fitting])

    def expect(self, prompts: tuple[int, ...]) -> None:
        """Prompts of these tokens wait and will come in this order."""
        self.expected = prompts
        self._keep()

    def _extents(self, prompts: Iterable[int]) -> Counter[int]:
        found: Counter[int] = Counter()
        for tokens in prompts:
            found.update(self._pool.split(self._layout.bytes_for(tokens)) * self._layout.num_ranges)
        return found

    def _keep(self) -> None:
        self._pool.keep_in_stock(self._announced | self._extents(self.expected))
