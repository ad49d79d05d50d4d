"""An engine's numbers for Prometheus, read when somebody asks for them; no step does anything for it.

`EngineCollector` is for a registry of one's own, `start_metrics_server` for an engine that has no server. The names are
in README.md.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import make_wsgi_app
from prometheus_client.registry import Collector

from trtllm_vattn.cache.base import SlotStats
from trtllm_vattn.errors import BrokerLost, ConfigError, EngineClosed, ManagerClosed
from trtllm_vattn.observe import SLOTS_PATH
from trtllm_vattn.runtime.async_engine import AsyncEngine
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.engine_stats import EngineStats
from trtllm_vattn.tenancy.borrowing import Lease

if TYPE_CHECKING:
    from trtllm_vattn.tenancy.protocol import TenantStatus

Labelled = dict[str, float]
BROKER_S = 1.0
"""Seconds that a broker has to answer in: who watches is to see one that hangs."""


@dataclass(frozen=True)
class Family:
    """One metric: a value, or one for each value of a label; None where an engine has no such thing."""

    name: str
    kind: type[CounterMetricFamily | GaugeMetricFamily]
    help: str
    value: Callable[[EngineStats], float | Labelled | None]
    label: str = ""

    def metric(self, stats: EngineStats) -> Metric | None:
        """As it is exported now."""
        value = self.value(stats)
        if value is None:
            return None
        if not isinstance(value, dict):
            return self.kind(self.name, self.help, value=value)
        made = self.kind(self.name, self.help, labels=[self.label])
        for each, number in value.items():
            made.add_metric([each], number)
        return made


def _lease(value: Callable[[Lease], float]) -> Callable[[EngineStats], float | None]:
    """Of an engine whose memory is a broker's, and None of others."""
    return lambda stats: None if stats.cache.lease is None else value(stats.cache.lease)


def _pair(names: tuple[str, str], pair: tuple[float, float] | None) -> Labelled | None:
    return None if pair is None else dict(zip(names, pair, strict=True))


GAUGE, COUNTER = GaugeMetricFamily, CounterMetricFamily
FAMILIES = (
    Family("vattn_running", GAUGE, "Requests with a slot", lambda s: s.running),
    Family("vattn_waiting", GAUGE, "Requests without one", lambda s: s.waiting),
    Family("vattn_suspended", GAUGE, "Requests that were suspended until they are resumed", lambda s: s.suspended),
    Family("vattn_asleep", GAUGE, "1 while memory is given back by sleep", lambda s: float(s.is_asleep)),
    Family("vattn_weights_version", GAUGE, "Updates of the weights", lambda s: s.weights_version),
    Family("vattn_kv_used_bytes", GAUGE, "KV memory that holds tokens of requests", lambda s: s.cache.live_bytes),
    Family(
        "vattn_kv_mapped_bytes",
        GAUGE,
        "KV memory mapped for running requests, lookahead and rounding in it",
        lambda s: s.cache.mapped_bytes,
    ),
    Family(
        "vattn_kv_surplus_bytes",
        GAUGE,
        "Of the mapped, what lies beyond the lookahead and others may take",
        lambda s: s.cache.surplus_bytes,
    ),
    Family("vattn_kv_window_bytes", GAUGE, "Of the mapped, sliding windows' layers", lambda s: s.cache.window_bytes),
    Family(
        "vattn_kv_parked_bytes",
        GAUGE,
        "KV memory mapped in free slots, for the next request to adopt",
        lambda s: s.cache.parked_bytes,
    ),
    Family(
        "vattn_kv_retained_bytes",
        GAUGE,
        "KV memory that keeps tokens of ended requests",
        lambda s: s.cache.retained_bytes,
    ),
    Family("vattn_kv_free_bytes", GAUGE, "KV memory that is mapped nowhere", lambda s: s.cache.free_bytes),
    Family("vattn_kv_held_bytes", GAUGE, "KV memory held, all of the above", lambda s: s.cache.held_bytes),
    Family("vattn_kv_budget_bytes", GAUGE, "KV memory that may be held", lambda s: s.cache.budget_bytes),
    Family("vattn_free_extents", GAUGE, "Extents that are mapped nowhere", lambda s: s.cache.free_extents),
    Family("vattn_slots", GAUGE, "Slots of the cache", lambda s: s.num_slots),
    Family("vattn_parked_slots", GAUGE, "Free slots with memory in them", lambda s: s.cache.parked_slots),
    Family("vattn_retained_slots", GAUGE, "Slots that keep tokens of ended requests", lambda s: s.cache.retained_slots),
    Family("vattn_lookahead_tokens", GAUGE, "Tokens kept mapped past a request's length", lambda s: s.cache.lookahead),
    Family("vattn_segment_tokens", GAUGE, "Tokens read in other requests' slots", lambda s: s.cache.segment_tokens),
    Family("vattn_mappings", GAUGE, "Mappings of this cache", lambda s: s.cache.live_mappings),
    Family("vattn_device_mappings", GAUGE, "Mappings of the process on the device", lambda s: s.cache.device_mappings),
    Family("vattn_device_mappings_limit", GAUGE, "Most mappings the driver can hold", lambda s: s.cache.max_mappings),
    Family("vattn_quarantined", GAUGE, "Mappings and extents the driver kept", lambda s: s.cache.quarantined),
    Family(
        "vattn_suspended_sequences",
        GAUGE,
        "Requests in host memory, preempted too",
        lambda s: s.cache.suspended_sequences,
    ),
    Family("vattn_host_used_bytes", GAUGE, "Host memory that holds tokens", lambda s: s.cache.host_bytes),
    Family("vattn_host_held_bytes", GAUGE, "Host memory pinned", lambda s: s.cache.host_held_bytes),
    Family(
        "vattn_mappings_made",
        COUNTER,
        "Mappings made: at an admission, in a step that waited for them, or ahead",
        lambda s: {
            "admission": s.cache.admission_maps,
            "step": s.cache.critical_path_maps,
            "ahead": s.cache.ahead_maps,
        },
        "when",
    ),
    Family(
        "vattn_map_ahead_wait_seconds",
        COUNTER,
        "Time that the stepping thread waited for the thread that maps ahead",
        lambda s: s.cache.ahead_wait_s,
    ),
    Family(
        "vattn_host_copied_bytes",
        COUNTER,
        "KV copied to and from host memory",
        lambda s: _pair(("out", "in"), (s.transfers.out_bytes, s.transfers.in_bytes)),
        "direction",
    ),
    Family(
        "vattn_host_copy_seconds",
        COUNTER,
        "Time that these copies took",
        lambda s: _pair(("out", "in"), (s.transfers.out_s, s.transfers.in_s)),
        "direction",
    ),
    Family("vattn_steps", COUNTER, "Decode steps", lambda s: s.totals.steps),
    Family("vattn_chosen_tokens", COUNTER, "Tokens that steps chose", lambda s: s.totals.tokens),
    Family(
        "vattn_computed_prompt_tokens",
        COUNTER,
        "Tokens of prompts that steps computed, those of preempted requests again",
        lambda s: s.totals.prompt_tokens,
    ),
    Family("vattn_device_wait_seconds", COUNTER, "Time that the host waited for tokens", lambda s: s.totals.wait_s),
    Family(
        "vattn_plan_seconds", COUNTER, "Time that plans, backing of steps and the guard took", lambda s: s.totals.kv_s
    ),
    Family(
        "vattn_captures_while_running",
        COUNTER,
        "Graphs captured while requests waited for them",
        lambda s: s.captures_while_running,
    ),
    Family("vattn_preemptions", COUNTER, "Requests that gave their memory up", lambda s: s.totals.preempted),
    Family("vattn_swaps", COUNTER, "Requests whose tokens went to host memory", lambda s: s.swaps),
    Family(
        "vattn_ended",
        COUNTER,
        "Samples ended, by why; not those dropped by Engine.abort, as for clients that go away",
        lambda s: dict(s.totals.ended),
        "finish_reason",
    ),
    Family(
        "vattn_prefix_tokens",
        COUNTER,
        "Tokens of prompts looked up in the prefix cache, and found",
        lambda s: _pair(("looked_up", "found"), s.prefix),
        "what",
    ),
    Family(
        "vattn_draft_tokens",
        COUNTER,
        "Draft tokens verified, and accepted",
        lambda s: _pair(("verified", "accepted"), s.drafts),
        "what",
    ),
    Family("vattn_lease_bytes", GAUGE, "Memory that the broker has lent to this engine", _lease(lambda of: of.lent)),
    Family(
        "vattn_lease_budget_bytes", GAUGE, "Of the broker's memory, what may be held now", _lease(lambda of: of.budget)
    ),
    Family(
        "vattn_lease_wanted_bytes",
        GAUGE,
        "Of the broker's memory, what this engine asked for last",
        _lease(lambda of: of.wanted),
    ),
    Family("vattn_broker_ended", GAUGE, "1 once the broker has ended", _lease(lambda of: float(of.broker_has_ended))),
)
STEP = ("vattn_step_seconds", "From the tokens of one launch to those of the next")
SLOT_FAMILIES: tuple[tuple[str, str, Callable[[SlotStats], float]], ...] = (
    ("vattn_slot_tokens", "Tokens of a slot's sequence", lambda slot: slot.length),
    ("vattn_slot_frontier_tokens", "Tokens of a slot that are backed", lambda slot: slot.frontier),
    ("vattn_slot_mapped_bytes", "KV memory mapped in a slot", lambda slot: slot.mapped_bytes),
)
TENANT_FAMILIES: tuple[tuple[str, str, Callable[[TenantStatus], float]], ...] = (
    ("vattn_tenant_lent_bytes", "Memory that the broker has lent to a tenant", lambda tenant: tenant.lent),
    ("vattn_tenant_floor_bytes", "Memory that a tenant is promised", lambda tenant: tenant.floor),
    ("vattn_tenant_ceiling_bytes", "Memory that a tenant may hold at most", lambda tenant: tenant.ceiling),
    ("vattn_tenant_wanted_bytes", "Memory that a tenant asked for last", lambda tenant: tenant.wants),
    (
        "vattn_tenant_overdue_seconds",
        "How long a tenant owes memory beyond its deadline",
        lambda tenant: tenant.overdue_s,
    ),
)


def metrics_of(stats: EngineStats) -> Iterator[Metric]:
    """All metrics of an engine at one moment."""
    for family in FAMILIES:
        if (made := family.metric(stats)) is not None:
            yield made
    totals, seen = stats.totals, 0
    buckets = []
    for bound, count in zip((*totals.BOUNDS, None), totals.within, strict=True):
        seen += count
        buckets.append(("+Inf" if bound is None else str(bound), seen))
    yield HistogramMetricFamily(*STEP, buckets=buckets, sum_value=totals.seconds)


def slot_metrics_of(slots: Iterable[SlotStats]) -> Iterator[Metric]:
    """Metrics of slots, one by one."""
    found = list(slots)
    for name, text, value in SLOT_FAMILIES:
        made = GaugeMetricFamily(name, text, labels=["slot", "state"])
        for slot in found:
            made.add_metric([str(slot.slot), slot.state], value(slot))
        yield made


def tenant_metrics_of(lease: Lease | None) -> Iterator[Metric]:
    """Metrics of all tenants of the broker that lends to an engine, as the broker says now, which the engine's own
    connection has no part in; none without a broker, or where it does not answer."""
    if lease is None or lease.broker_has_ended:
        return
    # With msgspec, which is an extra, and which who borrows has.
    from trtllm_vattn.tenancy.tenant import Client

    try:
        with Client(lease.path, BROKER_S) as client:
            tenants = client.standing().tenants
    except (BrokerLost, ConfigError):
        return
    for name, text, value in TENANT_FAMILIES:
        made = GaugeMetricFamily(name, text, labels=["tenant", "state"])
        for tenant in tenants:
            made.add_metric([tenant.name, tenant.state], value(tenant))
        yield made


class Counted(Protocol):
    """An engine, or what stands for one of another process."""

    def stats(self) -> EngineStats:
        """As `Engine.stats`."""

    def slot_stats(self) -> list[SlotStats]:
        """As `Engine.slot_stats`."""


class EngineCollector(Collector):
    """For `CollectorRegistry.register`: an engine's numbers, of the moment somebody asks. Nothing of one that is
    closed, or that nobody else holds any more.

    Parameters
    ----------
    engine : Engine, AsyncEngine, or what has the numbers of one
    slots : bool
        Each slot's numbers in place of the engine's, and each tenant's of its broker.
    """

    def __init__(self, engine: Counted, slots: bool = False) -> None:
        self._engine, self._slots = weakref.ref(engine), slots

    def describe(self) -> Iterable[Metric]:
        """No names at registration, where the engine may be closed already."""
        return ()

    def collect(self) -> Iterable[Metric]:
        if (engine := self._engine()) is None:
            return ()
        try:
            if not self._slots:
                return list(metrics_of(engine.stats()))
            return [*slot_metrics_of(engine.slot_stats()), *tenant_metrics_of(engine.stats().cache.lease)]
        except (EngineClosed, ManagerClosed):
            return ()


class MetricsServer:
    """`/metrics` of an engine that has no server, and `/metrics/slots`, in a thread of its own. Close it."""

    def __init__(self, server: WSGIServer) -> None:
        self._server = server
        self.port: int = server.server_port
        self._thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="vattn-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Serve no more. Idempotent."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Not on stderr."""


def start_metrics_server(engine: Engine | AsyncEngine, port: int = 0, host: str = "127.0.0.1") -> MetricsServer:
    """Serve an engine's metrics over HTTP; port 0 is a free one (`MetricsServer.port`). Raises OSError where nothing
    can listen there."""
    apps = {}
    for path, slots in (("/metrics", False), (SLOTS_PATH, True)):
        registry = CollectorRegistry()
        registry.register(EngineCollector(engine, slots))
        apps[path] = make_wsgi_app(registry)

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        found = apps.get(environ["PATH_INFO"])
        if found is None:
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"there are /metrics and /metrics/slots\n"]
        return found(environ, start_response)

    return MetricsServer(make_server(host, port, app, handler_class=_Quiet))
