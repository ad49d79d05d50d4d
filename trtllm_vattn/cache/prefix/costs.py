"""What the ways to a prefix cost on the machine at hand."""

from __future__ import annotations

import logging
from typing import Any

import torch

from trtllm_vattn.cache.calibrated import card_of
from trtllm_vattn.cache.prefix.hybrid import ReuseCosts
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.planner.calibration import find

logger = logging.getLogger(__name__)

HANDLE_PAGES = 8
"""Pages of the handle whose calls stand for those of all sizes, which differ little."""


def reuse_costs(device: torch.device | str, **given: Any) -> ReuseCosts:
    """What the ways to a prefix cost on a device: driver calls and copies by its calibration, where there is one;
    `given` are other fields of `ReuseCosts`. One that cannot be read, of another version, say, stops nobody."""
    try:
        numbers = find(card_of(device))
    except ConfigError as error:
        logger.warning("what ways to a prefix cost is not taken from the calibration: %s", error)
        numbers = None
    if numbers is None:
        return ReuseCosts(**given)
    size = HANDLE_PAGES * numbers.granularity
    calls = {
        name: numbers.at(name, size) for name in ("create_us", "map_us", "set_access_us", "unmap_us", "release_us")
    }
    return ReuseCosts(**{**calls, "copy_bytes_per_us": 1e-6 * numbers["copy_bytes_per_s"], **given})
