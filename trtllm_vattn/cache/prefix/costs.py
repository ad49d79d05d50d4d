"""What the ways to a prefix cost on the machine at hand."""

from __future__ import annotations

from typing import Any

import torch

from trtllm_vattn.cache.calibrated import card_of
from trtllm_vattn.cache.prefix.hybrid import ReuseCosts
from trtllm_vattn.planner.calibration import find

HANDLE_PAGES = 8
"""Pages of the handle whose calls stand for those of all sizes, which differ little."""


def reuse_costs(device: torch.device | str, **given: Any) -> ReuseCosts:
    """What the ways to a prefix cost on a device: driver calls and copies by its calibration, where there is one;
    `given` are other fields of `ReuseCosts`."""
    numbers = find(card_of(device))
    if numbers is None:
        return ReuseCosts(**given)
    size = HANDLE_PAGES * numbers.granularity
    calls = {
        name: numbers.at(name, size) for name in ("create_us", "map_us", "set_access_us", "unmap_us", "release_us")
    }
    return ReuseCosts(**{**calls, "copy_bytes_per_us": 1e-6 * numbers["copy_bytes_per_s"], **given})
