"""An engine whose keys and values lie in memory that a broker lends (tenancy/README.md)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from trtllm_vattn.cache.base import CacheShape, KVCache
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError, KVCacheOutOfMemory, VattnError
from trtllm_vattn.memory.mapping_policy import MappingPolicy
from trtllm_vattn.tenancy.config import TenantConfig
from trtllm_vattn.values import described
from trtllm_vattn.vmm.base import Driver

if TYPE_CHECKING:
    from trtllm_vattn.tenancy.journal import Journal, State
    from trtllm_vattn.tenancy.tenant import Tenant

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
    # With msgspec, which is an extra. Before the model is loaded, which may take minutes.
    from trtllm_vattn.tenancy.tenant import require_broker

    require_broker(broker.path)
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
    from trtllm_vattn.tenancy.tenant import open_tenant

    driver = open_tenant(config, device)
    tenant = driver.tenant
    with ExitStack() as undo:
        undo.callback(tenant.close)
        try:
            left = _left_for(tenant, shape) if config.keep_s else None

            def make() -> KVCache:
                with tenant.waiting(tenant.deadline_s + 1.0):
                    return make_cache(
                        name,
                        shape,
                        device,
                        None,
                        driver=policy.wrap(traced(driver)),
                        **{**settings, "sized_later": True},
                    )

            made = _make_beside(tenant, left, make)
            undo.callback(made.close)
            # Nothing is unmapped beside running kernels where mapping waits for them.
            keeper = None if left is None else driver
            made.borrow(tenant, beside=policy is MappingPolicy.CONCURRENT, keeper=keeper)
            made.follow_budget()
            if left is not None:
                _take_over(made, left, {**made.byte_order, "slots": shape.num_slots, "max_seq_len": shape.max_seq_len})
        except VattnError as error:
            if not tenant.broker_has_ended:
                raise
            raise ConfigError(
                f"the broker at {config.path} ended while this engine started; start a broker and this engine anew "
                f"({error})"
            ) from error
        undo.pop_all()
    return Borrowed(made, None if left is None else Left(left, driver.journal))


def _left_for(tenant: Tenant, shape: CacheShape) -> State:
    """What another process left, where this one fits it, with the slots that it may go on with; leases of nothing among
    that are given back. Raises ConfigError."""
    from trtllm_vattn.tenancy.journal import Sizes

    welcome = tenant.welcome
    # Of a lease a granule at least; of a range group a layer, or a head of it.
    sizes = Sizes(
        shape.num_slots,
        shape.max_seq_len,
        shape.num_layers * shape.num_kv_heads,
        welcome.memory // welcome.granularity,
    )
    left = tenant.open_journal(sizes).state
    same = {"layers": shape.num_layers, "kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
    # Before anything is given back that another process could go on with.
    _check_same(left, {**same, "slots": shape.num_slots, "max_seq_len": shape.max_seq_len})
    # What a lease's number is not among the broker's for is gone, and never another lease's.
    left.slots = left.kept_slots({lease for lease, _ in tenant.leases})
    _give_back_the_rest(tenant, left)
    while left.slots and tenant.held > tenant.budget:
        _drop_youngest(tenant, left)
    return left


def _make_beside(tenant: Tenant, left: State | None, make: Callable[[], KVCache]) -> KVCache:
    """Make a cache beside what is left, of which the youngest gives way where there is no memory for the dummy slot."""
    while True:
        try:
            return make()
        except KVCacheOutOfMemory:
            if left is None or not left.slots or tenant.broker_has_ended:
                raise
            _drop_youngest(tenant, left)


def _drop_youngest(tenant: Tenant, left: State) -> None:
    """Give back the memory of the youngest of the sequences that are left, which is computed anew."""
    del left.slots[max(left.slots, key=lambda index: left.slots[index].owner)]
    _give_back_the_rest(tenant, left)


def _give_back_the_rest(tenant: Tenant, left: State) -> None:
    """Give back leases of nothing that is left."""
    wanted = set().union(*(slot.leases() for slot in left.slots.values()))
    for lease, nbytes in [each for each in tenant.leases if each[0] not in wanted]:
        tenant.release(lease, nbytes)
        tenant.leases.remove((lease, nbytes))


def _check_same(left: State, settings: dict[str, Any]) -> None:
    """Raise ConfigError where what is left is of other settings."""
    differing = [name for name in settings if left.settings.get(name) != settings[name]]
    if left.settings and differing:
        before = ", ".join(f"{name} {left.settings.get(name)}" for name in differing)
        raise ConfigError(f"the process before this one had {before}; start with the same, or under another name")


def _take_over(cache: KVCache, left: State, settings: dict[str, Any]) -> None:
    _check_same(left, settings)
    left.settings = settings
    # All tokens but the last, which is fed next.
    tokens = {number: len(each.prompt) + len(each.chosen) - 1 for number, each in left.requests.items()}
    cache.take_over(left.slots, tokens)
