"""Waste, capacity and handles of a layout: bytes in closed form (README.md derives the formulas)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.planner.lengths import Lengths
from trtllm_vattn.planner.shape import ModelShape
from trtllm_vattn.values import whole

CLASSES = 8
"""Extent sizes by default: the granularity, and doublings of it."""
LEAST_AHEAD = 4
"""Tokens that a sequence has left at least when the automatic lookahead serves its slot."""
SAFETY = 2
"""How many times the time of a mapping the automatic lookahead allows for."""


@dataclass(frozen=True)
class Layout:
    """How a token's bytes lie, and how they are mapped.

    Parameters
    ----------
    shape : ModelShape
    granularity : int
        Bytes of the driver's.
    layers_per_range : int
        Layers that share a token's row.
    heads_per_range : int or None
        KV heads that share a row; None is all.
    extent_classes : int
        Extent sizes: the granularity, and doublings of it.
    lookahead : int or None
        Tokens kept mapped past a sequence's length; None is as many as the times of steps and mappings ask for.

    Raises
    ------
    ConfigError
        A number is out of its range or does not divide what it should.
    """

    shape: ModelShape
    granularity: int
    layers_per_range: int
    heads_per_range: int | None = None
    extent_classes: int = CLASSES
    lookahead: int | None = None

    def __post_init__(self) -> None:
        whole("granularity", self.granularity, 1)
        whole("extent_classes", self.extent_classes, 1, 40)
        if self.lookahead is not None:
            whole("lookahead", self.lookahead, 0)
        for name, of, what in (
            ("layers_per_range", self.shape.num_layers, "layers"),
            ("heads_per_range", self.shape.num_kv_heads, "KV heads"),
        ):
            value = getattr(self, name)
            if value is not None and of % whole(name, value, 1):
                divisors = [n for n in range(1, of + 1) if of % n == 0]
                raise ConfigError(f"{name} is {value}; it must divide the {of} {what}: one of {divisors}")

    @property
    def head_groups(self) -> int:
        return self.shape.num_kv_heads // (self.heads_per_range or self.shape.num_kv_heads)

    @property
    def num_ranges(self) -> int:
        """R: ranges that each sequence has memory in."""
        return self.shape.num_layers // self.layers_per_range * self.head_groups

    @property
    def row_bytes(self) -> int:
        """r: bytes of a token in one range."""
        return self.layers_per_range * self.shape.layer_token_bytes // self.head_groups

    @property
    def page_tokens(self) -> float:
        """Tokens that a page of the granularity holds."""
        return self.granularity / self.row_bytes

    def needed_bytes(self, tokens: np.ndarray | float) -> np.ndarray:
        """Bytes that sequences of so many tokens need in all ranges: R ceil(n r / G) G."""
        pages: np.ndarray = np.ceil(np.asarray(tokens, np.float64) * self.row_bytes / self.granularity)
        return pages * (self.granularity * self.num_ranges)

    @property
    def dummy_bytes(self) -> int:
        """Bytes of the dummy slot."""
        return int(self.needed_bytes(1))

    def handles(self, tokens: np.ndarray) -> np.ndarray:
        """Extents that prompts of so many tokens take, in all ranges: the fewest that add up to their pages."""
        pages = np.ceil(np.asarray(tokens, np.float64) * self.row_bytes / self.granularity).astype(np.int64)
        largest = 1 << (self.extent_classes - 1)
        rest, bits = pages % largest, np.zeros_like(pages)
        for power in range(self.extent_classes - 1):
            bits += (rest >> power) & 1
        found: np.ndarray = (pages // largest + bits) * self.num_ranges
        return found

    def handle_bytes(self, tokens: np.ndarray) -> float:
        """Mean bytes of those extents."""
        return float(self.needed_bytes(tokens).sum() / self.handles(tokens).sum())

    # -- lookahead ----------------------------------------------------------------------------------------------------

    def ahead_tokens(self, step_s: float, page_s: float) -> float:
        """a: tokens past a sequence's length that are mapped before the page edge makes them be.

        Automatic: a slot is served when fewer than `LEAST_AHEAD` tokens are left, and so many more as pass while its
        pages, one a range, are mapped. Fixed: it is served when half of the lookahead is left.
        """
        if self.lookahead is None:
            return LEAST_AHEAD + SAFETY * self.num_ranges * page_s / step_s
        return float((self.lookahead + 1) // 2)

    @property
    def growth_pages(self) -> int:
        """Pages a range that a slot gets when it is served: it goes from half of the lookahead to the whole."""
        return max(1, math.ceil((self.lookahead or 0) / 2 / self.page_tokens))

    def running_bytes(self, tokens: np.ndarray, ahead: float) -> np.ndarray:
        """Mean bytes mapped for a decoding sequence at each of these lengths: R ceil((n + a) r / G) G, and half of what
        one service maps beyond one page."""
        surplus = (self.growth_pages - 1) / 2 * self.granularity * self.num_ranges
        return self.needed_bytes(tokens + ahead) + surplus

    # -- a length distribution ----------------------------------------------------------------------------------------

    def mean_bytes(self, lengths: Lengths, ahead: float) -> tuple[float, float]:
        """Bytes mapped and bytes live of a sequence, mean over all decode steps of all sequences."""
        tokens = np.arange(lengths.longest + 1, dtype=np.float64)
        live = lengths.over_time(tokens) * self.shape.token_bytes
        return lengths.over_time(self.running_bytes(tokens, ahead)), live

    def waste(self, lengths: Lengths, ahead: float) -> float:
        """Part of the mapped bytes that holds no token."""
        mapped, live = self.mean_bytes(lengths, ahead)
        return 1 - live / mapped

    def left_over_bytes(self, lengths: Lengths) -> float:
        """Bytes that stay unused while the next request waits for more: E[S²] / 2 E[S] of what prompts need, since who
        waits is met in proportion to its size, and half of that is there on average."""
        sizes = self.needed_bytes(lengths.prompts)
        return float((sizes**2).sum() / (2 * sizes.sum()))

    def capacity(self, lengths: Lengths, ahead: float, budget: float) -> float:
        """Sequences at once, on average, where memory alone keeps others waiting."""
        mapped, _ = self.mean_bytes(lengths, ahead)
        return max(0.0, (budget - self.dummy_bytes - self.left_over_bytes(lengths)) / mapped)
