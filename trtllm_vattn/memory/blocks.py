"""The layout that TensorRT-LLM's kernels read: blocks of tokens, ``[slot][block][layer][K,V][head][token][dim]``.

Kernels find a block at ``pool + offset × bytes`` with a signed 32-bit offset that counts one layer's K or V of one
block, and their tables are indexed with signed 32-bit numbers too; what does not fit is refused before any address is
reserved (limits as read in TensorRT-LLM 1.2's sources).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.memory.layout import SlotLayout, round_up

BLOCK_SIZES = (16, 32, 64, 128)
"""Tokens a block that the kernels are built for."""
INT31 = 1 << 31


@dataclass(frozen=True)
class BlockLayout(SlotLayout):
    """`SlotLayout` with the tokens of a slot in blocks; within a block a layer's K, then its V, head by head.

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
        return round_up(whole, math.lcm(self.granule, self.block_bytes))

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
        return round_up(self.touched_bytes(tokens), self.granule)

    def tokens_in(self, mapped: int) -> int:
        return min(self.max_seq_len, mapped // self.block_bytes * self.tokens_per_block)

    def whole_bytes(self, tokens: int) -> int:
        return tokens // self.tokens_per_block * self.block_bytes

    def touched_bytes(self, tokens: int) -> int:
        return self.blocks_of(tokens) * self.block_bytes

    def place_of(self, layer: int) -> tuple[int, int]:
        """The range of a layer, and the bytes from the start of a block to its K."""
        index, within = divmod(layer, self.layers_per_range)
        return index, within * self.kv_factor * self.part_bytes
