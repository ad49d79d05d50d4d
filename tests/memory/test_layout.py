from __future__ import annotations

import pytest

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.memory.layout import SlotLayout, default_layers_per_range


def layout(**changes: int) -> SlotLayout:
    settings = dict(
        num_layers=8, layers_per_range=4, layer_token_bytes=96, max_seq_len=100, num_slots=3, granularity=4096
    )
    return SlotLayout(**{**settings, **changes})


def test_rows_straddle_pages_and_slots_start_on_them() -> None:
    it = layout()
    assert it.num_ranges == 2
    assert it.row_bytes == 384
    assert it.granularity % it.row_bytes  # 10.67 rows a page: rows straddle
    assert it.slot_stride == 49152  # 100 rows are 38,400 bytes, rounded up to whole pages and whole blocks of rows
    assert it.slot_stride % (128 * it.row_bytes) == it.slot_stride % it.granularity == 0
    assert it.range_bytes == 4 * 49152
    assert it.bytes_for(10) == 4096
    assert it.bytes_for(11) == 8192
    assert it.tokens_in(4096) == 10
    assert it.tokens_in(8192) == 21
    assert it.tokens_in(it.slot_stride) == 100  # never past max_seq_len, though 106 rows would fit


def test_layers_lie_in_ranges_in_order() -> None:
    it = layout()
    assert [it.place_of(i) for i in range(8)] == [(i // 4, i % 4 * 96) for i in range(8)]


@pytest.mark.parametrize("g", [1, 2, 4, 8])
def test_every_divisor_is_a_layout(g: int) -> None:
    assert layout(layers_per_range=g).num_ranges * g == 8


def test_the_default_row_is_at_most_64_kib() -> None:
    assert default_layers_per_range(32, 4096) == 16  # Llama-3-8B in bf16
    assert default_layers_per_range(36, 4096) == 12
    assert default_layers_per_range(4, 100) == 4
    assert default_layers_per_range(80, 1 << 20) == 1


@pytest.mark.parametrize("g", [0, 3, 16])
def test_a_layout_that_does_not_divide_is_refused(g: int) -> None:
    with pytest.raises(ConfigError, match=r"one of \[1, 2, 4, 8\]"):
        layout(layers_per_range=g)
