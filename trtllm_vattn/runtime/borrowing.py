"""An engine whose keys and values lie in memory that a broker lends (tenancy/README.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from trtllm_vattn.cache.base import CacheShape, KVCache
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.memory.mapping_policy import MappingPolicy
from trtllm_vattn.tenancy.config import TenantConfig
from trtllm_vattn.values import described
from trtllm_vattn.vmm.base import Driver

if TYPE_CHECKING:
    from trtllm_vattn.tenancy.journal import Journal, State

BORROWING = ("vattn", "blocks")
"""Caches, by name, whose memory may be a broker's."""
NOT_KEPT = ("speculation", "compression", "loop")
"""Parameters of engines whose sequences cannot outlive their process."""


class Left(NamedTuple):
    """What another process left, and the journal that what changes is noted in."""

    state: State
    journal: Journal


class Borrowed(NamedTuple):
    """A cache whose memory is a broker's, and what another process left in it: None where nothing outlives one."""

    cache: KVCache
    left: Left | None


def check_broker(broker: Any, cache: str, tensor_parallel: Any, options: dict[str, Any]) -> TenantConfig | None:
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
    if getattr(options.get("speculation"), "model", None) is not None:
        raise ConfigError(
            "a draft model's cache has memory of its own beside the broker; use ngram drafts, or leave the broker out"
        )
    if broker.keep_s:
        if options.get("prefix_cache") is not False:
            raise ConfigError("prefixes do not outlive a process; give prefix_cache=False with keep_s, or no keep_s")
        if some := [name for name in NOT_KEPT if options.get(name)]:
            raise ConfigError(
                f"sequences of an engine with {some[0]} do not outlive its process; leave out one of both"
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
) -> Borrowed:
    """A cache whose memory is a broker's, by calls that are `traced`, and whose budget follows it; with the sequences
    that the process before this one left, where the broker keeps them.

    Raises ConfigError where the broker refuses, what is left is of another model or layout, or a journal of so many and
    so long sequences cannot be, and KVCacheOutOfMemory where others do not give back in time what the dummy slot takes;
    nothing is left behind, and what another process left is there still.
    """
    # With msgspec, which is an extra.
    from trtllm_vattn.tenancy.journal import Sizes
    from trtllm_vattn.tenancy.tenant import open_tenant

    driver = open_tenant(config, device)
    tenant = driver.tenant
    try:
        left = None
        if config.keep_s:
            welcome = tenant.welcome
            # Of a lease a granule at least; of a range group a layer, or a head of it.
            sizes = Sizes(
                shape.num_slots,
                shape.max_seq_len,
                shape.num_layers * shape.num_kv_heads,
                welcome.memory // welcome.granularity,
            )
            left = tenant.open_journal(sizes).state
            # What a lease's number is not among the broker's for is gone, and never another lease's.
            left.slots = left.kept_slots({lease for lease, _ in tenant.leases})
            wanted = set().union(*(slot.leases() for slot in left.slots.values()))
            for lease, nbytes in tenant.leases:
                if lease not in wanted:
                    tenant.release(lease, nbytes)
        with tenant.waiting(tenant.welcome.deadline_s + 1.0):
            made = make_cache(
                name, shape, device, None, driver=policy.wrap(traced(driver)), **{**settings, "sized_later": True}
            )
        try:
            # Nothing is unmapped beside running kernels where mapping waits for them.
            keeper = None if left is None else driver
            made.borrow(tenant, beside=policy is MappingPolicy.CONCURRENT, keeper=keeper)
            made.follow_budget()
            if left is not None:
                _take_over(made, left, {**made.byte_order, "slots": shape.num_slots, "max_seq_len": shape.max_seq_len})
        except BaseException:
            if left is not None:
                # The broker keeps it for the next process.
                driver.leases.clear()
            made.close()
            raise
    except BaseException:
        tenant.close()
        raise
    return Borrowed(made, None if left is None else Left(left, driver.journal))


def _take_over(cache: KVCache, left: State, settings: dict[str, Any]) -> None:
    if left.settings and left.settings != settings:
        differing = [name for name in settings if left.settings.get(name) != settings[name]]
        before = ", ".join(f"{name} {left.settings.get(name)}" for name in differing)
        raise ConfigError(f"the process before this one had {before}; start with the same, or under another name")
    left.settings = settings
    # All tokens but the last, which is fed next.
    tokens = {number: len(each.prompt) + len(each.chosen) - 1 for number, each in left.requests.items()}
    cache.take_over(left.slots, tokens)
