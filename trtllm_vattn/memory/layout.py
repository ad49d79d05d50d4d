"""Where a token's bytes lie: arithmetic over sizes, without memory and without a driver.

`SlotLayout` is the layout of `KVCacheManager`, `BlockLayout` the one that TensorRT-LLM's kernels read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from trtllm_vattn.errors import ConfigError

BLOCK = 128
"""Tokens; the largest block of the attention kernels that read block tables."""
BLOCK_SIZES = (16, 32, 64, 128)
"""Tokens a block that TensorRT-LLM's kernels are built for."""
INT31 = 1 << 31


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


LONGEST_ROW = 64 << 10
"""Bytes of a token's row by default. Longer rows hold fewer tokens a page, so less is mapped ahead, by fewer calls; but
on the H200 a step over rows of 128 KiB took up to 3 % longer, over rows of 32 or 64 KiB 1 % at most (README)."""


def default_layers_per_range(num_layers: int, layer_token_bytes: int, windows: Sequence[int | None] = ()) -> int:
    """As many layers a range as make a row of at most `LONGEST_ROW` bytes; at least one. They divide the layers of each
    window (`SlotLayout.windows`)."""
    most = math.gcd(*(windows.count(each) for each in windows)) if windows else num_layers
    fitting = [g for g in range(1, most + 1) if most % g == 0 and g * layer_token_bytes <= LONGEST_ROW]
    return max(fitting, default=1)


class Kind(NamedTuple):
    """Layers that keep the same tokens: their ranges, and their window; None is all tokens."""

    ranges: range
    window: int | None

    def held(self, tokens: int) -> int:
        """How many of a sequence's tokens they hold."""
        return tokens if self.window is None else min(tokens, self.window)


@dataclass(frozen=True)
class SlotLayout:
    """How slots of `max_seq_len` tokens divide one or more equal reservations.

    A range holds `layers_per_range` layers; a token's row in it is ``[layer][K,V][head][dim]`` and rows follow one
    another without gaps, across page edges too. There are ``num_layers / layers_per_range`` ranges for each of
    `head_groups` parts of the heads, each of `num_slots` slots and one dummy slot.

    Parameters
    ----------
    layer_token_bytes : int
        Bytes of one token in one layer, of one part of the heads.
    head_groups : int
        Parts of the heads that have ranges of their own.
    granularity : int
        Bytes; sizes and addresses given to the driver are multiples of it.
    windows : sequence of int or None
        By layer: of how many tokens a layer has rows, which the tokens take in turns; None is all. Layers of different
        windows are in different ranges, those of one window in the order of their numbers. Empty is None for all.
    """

    num_layers: int
    layers_per_range: int
    layer_token_bytes: int
    max_seq_len: int
    num_slots: int
    granularity: int
    head_groups: int = field(default=1, kw_only=True)
    windows: tuple[int | None, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        counts = [len(layers) for layers in self._layers_by_window.values()]
        most = math.gcd(*counts)
        if self.layers_per_range < 1 or most % self.layers_per_range:
            divisors = [n for n in range(1, most + 1) if most % n == 0]
            layers = f"{self.num_layers} layers"
            if len(counts) > 1:
                layers = f"{' and '.join(map(str, counts))} layers of different windows"
            raise ConfigError(
                f"layers_per_range is {self.layers_per_range}; it must divide the {layers}: one of {divisors}"
            )

    @cached_property
    def _layers_by_window(self) -> dict[int | None, list[int]]:
        found: dict[int | None, list[int]] = {}
        for layer in range(self.num_layers):
            found.setdefault(self.windows[layer] if self.windows else None, []).append(layer)
        return found

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """Layers by what they keep; the first layer's kind first."""
        kinds, first = [], 0
        for window, layers in self._layers_by_window.items():
            count = len(layers) // self.layers_per_range * self.head_groups
            kinds.append(Kind(range(first, first + count), window))
            first += count
        return tuple(kinds)

    @cached_property
    def _order(self) -> tuple[int, ...]:
        """Each layer's place in the ranges."""
        order = [layer for layers in self._layers_by_window.values() for layer in layers]
        return tuple(order.index(layer) for layer in range(self.num_layers))

    def needs(self, tokens: int) -> list[tuple[int, int]]:
        """What a sequence of so many tokens needs: bytes a range, and how many ranges need as much, by kind."""
        return [(self.bytes_for(kind.held(tokens)), len(kind.ranges)) for kind in self.kinds]

    def total_bytes(self, tokens: int) -> int:
        """Bytes that a sequence of so many tokens needs in all ranges."""
        return sum(size * count for size, count in self.needs(tokens))

    def most_bytes(self, tokens: int) -> int:
        """Bytes that a sequence of so many tokens needs in the range that needs most."""
        return max(size for size, _ in self.needs(tokens))

    @property
    def num_ranges(self) -> int:
        return self.num_layers // self.layers_per_range * self.head_groups

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one range."""
        return self.layers_per_range * self.layer_token_bytes

    @property
    def slot_stride(self) -> int:
        """Bytes from one slot to the next in a range: whole pages and whole blocks of `BLOCK` rows, so that an
        affine block table can address the slot too. Addresses cost no memory."""
        return round_up(self.max_seq_len * self.row_bytes, math.lcm(self.granularity, BLOCK * self.row_bytes))

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
        return round_up(tokens * self.row_bytes, self.granularity)

    def tokens_in(self, mapped: int) -> int:
        """Tokens of a slot that `mapped` bytes a range back."""
        return min(self.max_seq_len, mapped // self.row_bytes)

    def whole_bytes(self, tokens: int) -> int:
        """Bytes from a slot's start that hold nothing but its first `tokens` tokens."""
        return tokens * self.row_bytes

    def touched_bytes(self, tokens: int) -> int:
        """Bytes from a slot's start that its first `tokens` tokens lie in."""
        return tokens * self.row_bytes

    def first_token(self, lower: int) -> int:
        """The first token of a slot whose bytes, in each range, all lie at or behind byte `lower`."""
        return -(-lower // self.row_bytes)

    def place_of(self, layer: int, heads: int = 0) -> tuple[int, int]:
        """The range of a layer, of one part of its heads, and the bytes from the start of a row to it."""
        index, within = divmod(self._order[layer], self.layers_per_range)
        return index * self.head_groups + heads, within * self.layer_token_bytes


@dataclass(frozen=True)
class BlockLayout(SlotLayout):
    """Blocks of tokens as TensorRT-LLM's kernels read them: ``[slot][block][layer][K,V][head][token][dim]``.

    Kernels find a block at ``pool + offset × bytes`` with a signed 32-bit offset that counts one layer's K or V of one
    block, and index their tables with signed 32-bit numbers; what does not fit is refused before any address is
    reserved (limits as read in TensorRT-LLM 1.2's sources).

    Block `j` of slot `s` is block ``s × blocks_per_slot + j`` of its range; the first block of the dummy slot, which is
    always mapped, is the dummy block.

    Parameters
    ----------
    tokens_per_block : int
        16, 32, 64 or 128.
    kv_factor : int
        2 for K and V, 1 where one latent serves as both.

    Raises
    ------
    ConfigError
        Another block size, or offsets or table indices that 31 bits do not hold; the message says what would do.
    """

    tokens_per_block: int
    kv_factor: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens_per_block not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise ConfigError(f"tokens_per_block is {self.tokens_per_block}; kernels read blocks of {sizes} tokens")
        self._check_offsets()
        self._check_table()

    def _check_offsets(self) -> None:
        each = self.blocks_per_slot * self.layers_per_range * self.kv_factor
        offsets = (self.num_slots + 1) * each
        if offsets > INT31:
            most = INT31 // each - 1
            fitting = [
                g
                for g in range(1, self.layers_per_range)
                if self.num_layers % g == 0 and offsets // self.layers_per_range * g <= INT31
            ]
            instead = f"layers_per_range {max(fitting)}, " if fitting else ""
            raise ConfigError(
                f"{self.num_slots:,} slots of {self.max_seq_len:,} tokens in blocks of {self.tokens_per_block} with "
                f"{self.layers_per_range} layers a block need {offsets:,} offsets; kernels count them in 31 bits "
                f"({INT31:,}): use {instead}larger blocks, a smaller max_seq_len, or at most {max(0, most):,} slots"
            )

    def _check_table(self) -> None:
        entries = self.num_slots * self.blocks_per_slot * 2 + self.blocks_per_slot
        if entries > INT31 - 1:
            most = (INT31 - 1 - self.blocks_per_slot) // (2 * self.blocks_per_slot)
            raise ConfigError(
                f"a table of {self.num_slots + 1:,} rows of 2 × {self.blocks_per_slot:,} blocks has {entries:,} "
                f"entries; kernels index it with 31 bits ({INT31 - 1:,}): use larger blocks than "
                f"{self.tokens_per_block} tokens, a smaller max_seq_len than {self.max_seq_len:,}, or at most "
                f"{max(0, most):,} slots"
            )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in one range: all its layers, K and V."""
        return self.tokens_per_block * self.row_bytes

    @property
    def part_bytes(self) -> int:
        """Bytes of K, or of V, of one layer in one block; what the kernels' offsets count."""
        return self.tokens_per_block * self.layer_token_bytes // self.kv_factor

    @property
    def slot_stride(self) -> int:
        """Bytes from one slot to the next: whole pages and whole blocks."""
        whole = self.blocks_of(self.max_seq_len) * self.block_bytes
        return round_up(whole, math.lcm(self.granularity, self.block_bytes))

    @property
    def blocks_per_slot(self) -> int:
        """Blocks from one slot's first to the next slot's first."""
        return self.slot_stride // self.block_bytes

    @property
    def dummy_block(self) -> int:
        """A block that is always mapped."""
        return self.num_slots * self.blocks_per_slot

    def blocks_of(self, tokens: int) -> int:
        """Blocks that so many tokens lie in."""
        return -(-tokens // self.tokens_per_block)

    def bytes_for(self, tokens: int) -> int:
        return round_up(self.touched_bytes(tokens), self.granularity)

    def tokens_in(self, mapped: int) -> int:
        return min(self.max_seq_len, mapped // self.block_bytes * self.tokens_per_block)

    def whole_bytes(self, tokens: int) -> int:
        return tokens // self.tokens_per_block * self.block_bytes

    def touched_bytes(self, tokens: int) -> int:
        return self.blocks_of(tokens) * self.block_bytes

    def first_token(self, lower: int) -> int:
        return -(-lower // self.block_bytes) * self.tokens_per_block

    def place_of(self, layer: int, heads: int = 0) -> tuple[int, int]:
        """The range of a layer, and the bytes from the start of a block to its K."""
        index, within = divmod(layer, self.layers_per_range)
        return index * self.head_groups + heads, within * self.kv_factor * self.part_bytes
