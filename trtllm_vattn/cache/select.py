"""Caches by name, so that a comparison changes one word."""

from __future__ import annotations

from dataclasses import replace

import torch

from trtllm_vattn.cache.base import CacheShape, KVCache
from trtllm_vattn.cache.blocks import BlockKVCache
from trtllm_vattn.cache.config import CacheConfig, Layout
from trtllm_vattn.cache.contiguous import ContiguousCache
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.paged import PagedCache
from trtllm_vattn.cache.vattention_paper import PAPER
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.sizes import parse_bytes
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.open import open_driver

CACHES = ("contiguous", "paged", "paged-64", "token", "published", "vattn", "blocks")
"""Maximum length from the start (Orca), blocks of 16 and 64 tokens (vLLM), of one (LightLLM), vAttention as published,
ours, and ours in the block layout of TensorRT-LLM's kernels."""
COMPARED = ("contiguous", "paged", "vattn")
"""Those that benchmarks compare unless told otherwise."""
BLOCKS = {"paged": 16, "paged-64": 64, "token": 1}


def make_cache(
    name: str,
    shape: CacheShape,
    device: torch.device | str,
    budget: int | str | None = None,
    *,
    layers_per_range: int | None = None,
    lookahead: int | None = None,
    tokens_per_block: int = CacheConfig.tokens_per_block,
    idle_after_s: float | None = None,
    idle_floor: int | str = 0,
    host_memory: int | str = 0,
    sized_later: bool = False,
    driver: Driver | None = None,
) -> KVCache:
    """A cache of one of the kinds in `CACHES`. Those that keep no windows (`CacheShape.windows`: all but ``contiguous``
    and ``vattn``) keep all tokens instead, and the attention backend has to mask them.

    Parameters
    ----------
    budget : int, str or None
        Bytes of KV, ``"40GiB"`` too; None is enough for every slot at maximum length. The contiguous cache takes that
        always, and refuses a smaller budget.
    layers_per_range, lookahead, idle_after_s, idle_floor, host_memory
        For ``vattn`` and ``blocks``, as `KVCacheManager` has them.
    tokens_per_block : int
        For ``blocks``.
    sized_later : bool
        Without a budget, begin with what the dummy slot takes, for `set_budget` to raise; for ``vattn`` and ``blocks``.
    driver : Driver or None
        For ``vattn``, ``blocks`` and ``published``; None opens the device's own.
    """
    budget = None if budget is None else parse_bytes(budget, "the budget")
    if name not in ("contiguous", "vattn"):
        shape = replace(shape, windows=())
    slot_bytes = shape.kept_bytes(shape.max_seq_len)
    if name == "contiguous":
        if budget is not None and budget < shape.num_slots * slot_bytes:
            raise ConfigError(
                f"a contiguous cache of {shape.num_slots} slots takes {shape.num_slots * slot_bytes:,} bytes, the "
                f"budget is {budget:,}; lower the number of slots or max_seq_len"
            )
        return ContiguousCache(shape, device)
    if name in BLOCKS:
        blocks = None if budget is None else budget // (BLOCKS[name] * shape.token_bytes)
        return PagedCache(shape, device, BLOCKS[name], blocks)
    if name in ("vattn", "blocks", "published"):
        driver = open_driver(str(device)) if driver is None else driver
        kind: type[KVCacheManager] = KVCacheManager
        config = PAPER
        if name != "published":
            kind = BlockKVCache if name == "blocks" else KVCacheManager
            config = CacheConfig(
                layout=Layout.BLOCKS if name == "blocks" else Layout.ROWS,
                layers_per_range=layers_per_range,
                tokens_per_block=tokens_per_block,
                lookahead=lookahead,
                idle_after_s=idle_after_s,
                idle_floor=idle_floor,
                host_memory=host_memory,
            )
        made = kind(shape, driver, budget, config=config)
        if budget is None and not sized_later:
            layout, whole = made.layout, made.layout.num_ranges * made.layout.range_bytes
            windows = (shape.num_slots + 1) * layout.total_bytes(shape.max_seq_len)
            made.set_budget(windows if shape.windows else whole)
        return made
    raise ConfigError(f"no cache {name!r}; there are {', '.join(CACHES)}")
