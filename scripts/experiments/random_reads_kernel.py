"""The kernel of `bench.random_reads`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def sum_rows(anchor, offsets, sums, WORDS: tl.constexpr, ROWS: tl.constexpr, TURNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds up int64 words of rows that begin so many words from `anchor`; one sum a program."""
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([ROWS, WORDS], tl.int64)
    for turn in range(TURNS):
        row = tl.load(offsets + (program * TURNS + turn) * ROWS + tl.arange(0, ROWS))
        # A row is aligned to its own size, at least 64 bytes; the anchor to 16.
        row = tl.multiple_of(row, 2)
        total += tl.load(anchor + row[:, None] + tl.arange(0, WORDS)[None, :])
    tl.store(sums + program, tl.sum(tl.sum(total, 1), 0))
