"""Random reads of whole rows over all memory of a cache: what the hardware gives, whatever attention does.

Rows are found by plain addresses, so they may lie in any range. A program of the kernel reads many rows into registers
and stores one number; nothing else is written, and nothing is read twice on purpose.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.vmm.tensors import tensor_at

WORD = 8
"""Bytes that a thread loads at least."""
PIECE = 4096
"""Bytes; longer rows are read by pieces, one after another."""
AT_ONCE = 8192
"""Bytes that a program has under way at once: 64 a thread, in loads of 16."""
TURNS = 16
"""How often a program does so."""
LEAST = 64
"""Bytes of a row."""


def check_size(size: int) -> None:
    """Raise ConfigError for a row that the kernel cannot read."""
    if size < LEAST or size & (size - 1):
        raise ConfigError(f"rows of {size} bytes asked for; give a power of two from {LEAST} on")


def random_rows(cache: KVCacheManager, size: int, total: int) -> torch.Tensor:
    """int64 ``[rows]`` on the cache's device: where rows of `size` bytes begin, at random over all slots of all ranges,
    which must be full; `total` bytes in all, or as many as there are.

    Raises ConfigError where a slot holds no such row.
    """
    check_size(size)
    layout, slots = cache.layout, cache.shape.num_slots
    rows = layout.max_seq_len * layout.row_bytes // size
    if not rows:
        raise ConfigError(f"a slot has {layout.max_seq_len * layout.row_bytes:,} bytes in a range, no row of {size:,}")
    bases = torch.tensor([region.base for region in cache.regions()], device=cache.device)
    count = min(total // size, len(bases) * slots * rows)

    def choose(many: int) -> torch.Tensor:
        return torch.randint(0, many, (count,), device=cache.device)

    return bases[choose(len(bases))] + choose(slots) * layout.slot_stride + choose(rows) * size


def reader(rows: torch.Tensor, size: int) -> tuple[Callable[[], torch.Tensor], int]:
    """Something that reads rows of `size` bytes at these addresses once, and the bytes that it reads; what it returns,
    int64 ``[programs]``, adds up to the sum of all words."""
    if rows.device.type == "cpu":
        return lambda: _sums_on_host(rows, size), len(rows) * size
    piece = min(size, PIECE)
    pieces = (rows[:, None] + torch.arange(0, size, piece, device=rows.device)).view(-1)
    together = AT_ONCE // piece
    turns = max(1, min(TURNS, len(pieces) // together))
    programs = len(pieces) // (together * turns)
    if not programs:
        raise ConfigError(f"{len(rows)} rows of {size} bytes are too few to read; give at least {AT_ONCE // size + 1}")
    return _Launch(pieces[: programs * together * turns], piece, together, turns), programs * together * turns * piece


class _Launch:
    def __init__(self, pieces: torch.Tensor, piece: int, together: int, turns: int) -> None:
        from random_reads_kernel import sum_rows

        self._kernel, self._programs = sum_rows, len(pieces) // (together * turns)
        self._sizes = {"WORDS": piece // WORD, "ROWS": together, "TURNS": turns}
        # From an address that Triton may ask the driver about: a cache's first slot may have no memory.
        self._anchor = torch.zeros(2, dtype=torch.int64, device=pieces.device)
        self._offsets = (pieces - self._anchor.data_ptr()) // WORD
        self._sums = torch.empty(self._programs, dtype=torch.int64, device=pieces.device)

    def __call__(self) -> torch.Tensor:
        self._kernel[(self._programs,)](self._anchor, self._offsets, self._sums, **self._sizes)
        return self._sums


def _sums_on_host(rows: torch.Tensor, size: int) -> torch.Tensor:
    return torch.stack([tensor_at(address, size, "cpu").view(torch.int64).sum() for address in rows.tolist()])
