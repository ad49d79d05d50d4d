"""Where the blocks of TensorRT-LLM's kernels lie, and that what 31 bits do not hold is refused."""

from __future__ import annotations

import pytest

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.memory.layout import BlockLayout


def layout(**changes: int) -> BlockLayout:
    settings = dict(
        num_layers=8,
        layers_per_range=4,
        layer_token_bytes=96,
        max_seq_len=100,
        num_slots=3,
        granularity=4096,
        tokens_per_block=32,
        kv_factor=2,
    )
    return BlockLayout(**{**settings, **changes})


def test_a_block_holds_its_tokens_of_all_its_layers() -> None:
    it = layout()
    assert it.block_bytes == 32 * 4 * 96
    assert it.part_bytes == 32 * 48
    assert [it.place_of(i) for i in range(8)] == [(i // 4, i % 4 * 2 * 32 * 48) for i in range(8)]
    # A slot is whole blocks and whole pages: 4 blocks of 12,288 bytes, and both divide it.
    assert it.slot_stride == 49152
    assert it.blocks_per_slot == 4
    assert it.dummy_block == 12
    assert it.range_bytes == 4 * 49152


def test_backing_counts_whole_blocks() -> None:
    it = layout()
    assert [it.bytes_for(n) for n in (1, 32, 33)] == [12288, 12288, 24576]
    assert [it.tokens_in(n) for n in (0, 4096, 12288, 24575, 24576)] == [0, 0, 32, 32, 64]
    assert it.tokens_in(it.slot_stride) == 100
    # What may be shared, and what must be copied, of a beginning of 40 tokens.
    assert (it.whole_bytes(40), it.touched_bytes(40)) == (12288, 24576)
    assert it.least_bytes == 2 * 12288


@pytest.mark.parametrize("granularity", [4096, 2 << 20])
@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
def test_every_block_of_every_slot_has_its_own_bytes(tokens: int, granularity: int) -> None:
    it = layout(tokens_per_block=tokens, granularity=granularity, max_seq_len=300)
    starts = [(s * it.blocks_per_slot + j) * it.block_bytes for s in range(4) for j in range(it.blocks_of(300))]
    assert all(s * it.slot_stride % granularity == 0 for s in range(4))
    assert starts[:: it.blocks_of(300)] == [s * it.slot_stride for s in range(4)]
    assert len(set(starts)) == len(starts)
    assert max(starts) + it.block_bytes <= it.range_bytes


@pytest.mark.parametrize("tokens", [0, 8, 48, 256])
def test_other_block_sizes_are_refused(tokens: int) -> None:
    with pytest.raises(ConfigError, match="16, 32, 64, 128"):
        layout(tokens_per_block=tokens)


def test_offsets_beyond_31_bits_are_refused_with_what_would_do() -> None:
    huge = dict(num_layers=80, layers_per_range=80, layer_token_bytes=1024, granularity=2 << 20, tokens_per_block=16)
    fits = layout(**huge, max_seq_len=131072, num_slots=1637)
    assert (fits.num_slots + 1) * fits.blocks_per_slot * 80 * 2 <= 1 << 31
    with pytest.raises(ConfigError, match=r"2,148,270,080 offsets.*layers_per_range 40.*at most 1,637 slots") as caught:
        layout(**huge, max_seq_len=131072, num_slots=1638)
    assert "larger blocks" in str(caught.value)


def test_tables_beyond_31_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="index it with 31 bits"):
        layout(num_layers=1, layers_per_range=1, kv_factor=1, max_seq_len=1 << 24, num_slots=1100, tokens_per_block=16)
