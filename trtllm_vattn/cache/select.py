"""Caches by name, so that a comparison changes one word."""

from __future__ import annotations

import torch

from trtllm_vattn.cache.base import CacheShape, KVCache
from trtllm_vattn.cache.contiguous import ContiguousCache
from trtllm_vattn.cache.manager import DEFAULT_LOOKAHEAD, KVCacheManager
from trtllm_vattn.cache.paged import PagedCache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.memory.layout import default_layers_per_range
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.open import open_driver

CACHES = ("contiguous", "paged", "vattn")


def make_cache(
    name: str,
    shape: CacheShape,
    device: torch.device | str,
    budget: int | None = None,
    *,
    layers_per_range: int | None = None,
    lookahead: int = DEFAULT_LOOKAHEAD,
    block_size: int = 16,
    driver: Driver | None = None,
) -> KVCache:
    """A cache of one of the kinds in `CACHES`.

    Parameters
    ----------
    budget : int or None
        Bytes of KV; None is enough for every slot at maximum length. The contiguous cache takes that always, and
        refuses a smaller budget.
    driver : Driver or None
        For ``vattn``; None opens the device's own.
    """
    slot_bytes = shape.max_seq_len * shape.token_bytes
    if name == "contiguous":
        if budget is not None and budget < shape.num_slots * slot_bytes:
            raise ConfigError(
                f"a contiguous cache of {shape.num_slots} slots takes {shape.num_slots * slot_bytes:,} bytes, the "
                f"budget is {budget:,}; lower the number of slots or max_seq_len"
            )
        return ContiguousCache(shape, device)
    if name == "paged":
        blocks = None if budget is None else budget // (block_size * shape.token_bytes)
        return PagedCache(shape, device, block_size, blocks)
    if name == "vattn":
        driver = open_driver(str(device)) if driver is None else driver
        if budget is None:
            # In each range a slot's last page is partly used.
            g = layers_per_range or default_layers_per_range(shape.num_layers, shape.layer_token_bytes)
            budget = (shape.num_slots + 1) * (slot_bytes + shape.num_layers // g * driver.granularity())
        return KVCacheManager(shape, driver, budget, layers_per_range, lookahead)
    raise ConfigError(f"no cache {name!r}; there are {', '.join(CACHES)}")
