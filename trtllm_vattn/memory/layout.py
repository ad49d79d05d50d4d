"""Where a token's bytes lie: pure arithmetic over sizes, no memory and no driver."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trtllm_vattn.errors import ConfigError

BLOCK = 128
"""Tokens; the largest block of the attention kernels that read block tables."""


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


LONGEST_ROW = 64 << 10
"""Bytes of a token's row by default. Longer rows hold fewer tokens a page, so less is mapped ahead, by fewer calls; but
on the H200 a step over rows of 128 KiB took up to 3 % longer, over rows of 32 or 64 KiB 1 % at most (README)."""


def default_layers_per_range(num_layers: int, layer_token_bytes: int) -> int:
    """As many layers a range as make a row of at most `LONGEST_ROW` bytes; at least one."""
    fitting = [g for g in range(1, num_layers + 1) if num_layers % g == 0 and g * layer_token_bytes <= LONGEST_ROW]
    return max(fitting, default=1)


@dataclass(frozen=True)
class SlotLayout:
    """How slots of `max_seq_len` tokens divide one or more equal reservations.

    A range holds `layers_per_range` layers; a token's row in it is ``[layer][K,V][head][dim]`` and rows follow one
    another without gaps, across page edges too. There are ``num_layers / layers_per_range`` ranges, each of
    `num_slots` slots and one dummy slot.

    Parameters
    ----------
    layer_token_bytes : int
        Bytes of one token in one layer.
    granule : int
        Bytes; what sizes and addresses of the driver are multiples of.
    """

    num_layers: int
    layers_per_range: int
    layer_token_bytes: int
    max_seq_len: int
    num_slots: int
    granule: int

    def __post_init__(self) -> None:
        if self.layers_per_range < 1 or self.num_layers % self.layers_per_range:
            divisors = [n for n in range(1, self.num_layers + 1) if self.num_layers % n == 0]
            raise ConfigError(
                f"layers_per_range is {self.layers_per_range}; it must divide the {self.num_layers} layers: "
                f"one of {divisors}"
            )

    @property
    def num_ranges(self) -> int:
        return self.num_layers // self.layers_per_range

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one range."""
        return self.layers_per_range * self.layer_token_bytes

    @property
    def slot_stride(self) -> int:
        """Bytes from one slot to the next in a range: whole pages and whole blocks of `BLOCK` rows, so that a slot can
        be seen as blocks behind an affine table too. Addresses cost nothing."""
        return round_up(self.max_seq_len * self.row_bytes, math.lcm(self.granule, BLOCK * self.row_bytes))

    @property
    def range_bytes(self) -> int:
        """Bytes of addresses in one range, the dummy slot included."""
        return (self.num_slots + 1) * self.slot_stride

    @property
    def least_bytes(self) -> int:
        """Bytes of physical memory that the dummy slot takes in all ranges."""
        return self.bytes_for(1) * self.num_ranges

    def bytes_for(self, tokens: int) -> int:
        """Bytes a range must map for a slot to hold `tokens`."""
        return round_up(tokens * self.row_bytes, self.granule)

    def tokens_in(self, mapped: int) -> int:
        """Tokens of a slot that `mapped` bytes a range back."""
        return min(self.max_seq_len, mapped // self.row_bytes)

    def whole_bytes(self, tokens: int) -> int:
        """Bytes from a slot's start that hold nothing but its first `tokens` tokens."""
        return tokens * self.row_bytes

    def touched_bytes(self, tokens: int) -> int:
        """Bytes from a slot's start that its first `tokens` tokens lie in."""
        return tokens * self.row_bytes

    def place_of(self, layer: int) -> tuple[int, int]:
        """The range of a layer, and the bytes from the start of a row to it."""
        index, within = divmod(layer, self.layers_per_range)
        return index, within * self.layer_token_bytes
