"""Random reads reach all slots of all ranges, and read what is there."""

from __future__ import annotations

import pytest
import torch
from random_reads import check_size, random_rows, reader

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.tensors import tensor_at


@pytest.mark.parametrize("size", [64, 512, 4096, 32768])
@pytest.mark.parametrize("layers_per_range", [1, 4])
def test_rows_lie_in_every_slot_and_range_and_are_read_whole(driver: Driver, size: int, layers_per_range: int) -> None:
    shape = CacheShape(4, 2, 64, torch.float32, 3, 1024)
    with KVCacheManager(shape, driver, 1 << 30, layers_per_range, lookahead=0) as cache:
        for sequence in range(3):
            cache.admit(sequence, 1024)
        layout = cache.layout
        used = 1024 * layout.row_bytes
        for reservation in cache.arena.reservations:
            for slot in range(3):
                start = reservation.base + slot * layout.slot_stride
                tensor_at(start, used, driver.device).view(torch.int32).random_(-1000, 1000)
        rows = random_rows(cache, size, min(8 << 20, 4096 * size))
        found = set()
        for address in rows.tolist():
            (which,) = (i for i, r in enumerate(cache.arena.reservations) if r.base <= address < r.base + r.size)
            slot, offset = divmod(address - cache.arena.reservations[which].base, layout.slot_stride)
            assert offset % size == 0
            assert offset + size <= used
            found.add((which, slot))
        assert len(found) == 3 * layout.num_ranges
        read, nbytes = reader(rows, size)
        whole = rows[: nbytes // size]
        expected = sum(int(tensor_at(a, size, driver.device).view(torch.int64).sum()) for a in whole.tolist())
        wraps = (int(read().sum()) - expected) % (1 << 64)
        assert wraps == 0
        assert len(whole) * size == nbytes > 0.9 * len(rows) * size


def test_rows_that_cannot_be_read_are_refused(driver: Driver) -> None:
    with KVCacheManager(CacheShape(1, 1, 16, torch.float32, 2, 100), driver, 64 << 20) as cache:
        for sequence in range(2):
            cache.admit(sequence, 100)
        with pytest.raises(ConfigError, match="a slot has 12,800 bytes in a range, no row of 16,384"):
            random_rows(cache, 16384, 1 << 20)
    for size in (0, 32, 96, 1000):
        with pytest.raises(ConfigError, match=f"rows of {size} bytes asked for; give a power of two from 64 on"):
            check_size(size)
