"""An engine whose keys and values lie in memory that a broker lends (tenancy/README.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trtllm_vattn.cache.base import CacheShape, KVCache
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.memory.mapping_policy import MappingPolicy
from trtllm_vattn.tenancy.config import TenantConfig
from trtllm_vattn.values import described
from trtllm_vattn.vmm.base import Driver

BORROWING = ("vattn", "blocks")
"""Caches, by name, whose memory may be a broker's."""


def check_broker(broker: Any, cache: str, tensor_parallel: Any, speculation: Any) -> TenantConfig | None:
    """How an engine becomes a broker's tenant; None without one. Raises ConfigError for what cannot be combined."""
    if broker is None:
        return None
    if isinstance(broker, str):
        broker = TenantConfig(broker)
    if not isinstance(broker, TenantConfig):
        raise ConfigError(f"broker is {described(broker)}; give the path of its socket, or a TenantConfig")
    if cache not in BORROWING:
        raise ConfigError(f"a {cache!r} cache has its memory for life; a broker lends to {' and '.join(BORROWING)}")
    if not isinstance(tensor_parallel, int) or tensor_parallel != 1:
        raise ConfigError("a broker lends memory of one device to one process; leave it out, or make tensor_parallel 1")
    if getattr(speculation, "model", None) is not None:
        raise ConfigError(
            "a draft model's cache has memory of its own beside the broker; use ngram drafts, or leave it"
        )
    return broker


def make_borrowing_cache(
    config: TenantConfig,
    name: str,
    shape: CacheShape,
    device: str,
    policy: MappingPolicy,
    settings: dict[str, Any],
    traced: Callable[[Driver], Driver],
) -> KVCache:
    """A cache whose memory is a broker's, by calls that are `traced`, and whose budget follows it.

    Raises ConfigError where the broker refuses, KVCacheOutOfMemory where others do not give back in time what the dummy
    slot takes; nothing is left behind.
    """
    # With msgspec, which is an extra.
    from trtllm_vattn.tenancy.tenant import open_tenant

    driver = open_tenant(config, device)
    tenant = driver.tenant
    try:
        with tenant.waiting(tenant.welcome.deadline_s + 1.0):
            made = make_cache(
                name, shape, device, None, driver=policy.wrap(traced(driver)), **{**settings, "sized_later": True}
            )
        try:
            # Nothing is unmapped beside running kernels where mapping waits for them.
            made.borrow(tenant, beside=policy is MappingPolicy.CONCURRENT)
        except BaseException:
            made.close()
            raise
    except BaseException:
        tenant.close()
        raise
    made.follow_budget()
    return made
