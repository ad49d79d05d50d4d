"""A live view of a running engine, drawn from its `/metrics` (rich, extra ``observe``)."""

from __future__ import annotations

import math
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.files import reason
from trtllm_vattn.observe import SLOTS_PATH

TIMEOUT_S = 5.0
Labels = tuple[tuple[str, str], ...]
STYLES = {"running": "green", "retained": "blue", "parked": "yellow", "suspended": "magenta"}
TENANT_STYLES = {"serving": "green", "asleep": "magenta", "owing": "yellow", "overdue": "red", "lost": "red"}
PARTS = (
    ("vattn_kv_used_bytes", "holds tokens"),
    ("vattn_kv_mapped_bytes", "mapped for running requests"),
    ("vattn_kv_parked_bytes", "parked"),
    ("vattn_kv_retained_bytes", "retained for prefixes"),
    ("vattn_kv_free_bytes", "free extents"),
    ("vattn_kv_held_bytes", "held"),
)


@dataclass(frozen=True)
class Reading:
    """What a process exported at one moment: values by name and labels; `at` is in seconds of `perf_counter`."""

    at: float
    values: dict[str, dict[Labels, float]] = field(default_factory=dict)

    def get(self, name: str, **labels: str) -> float:
        """One value; 0 where there is none."""
        return self.values.get(name, {}).get(tuple(sorted(labels.items())), 0.0)


def read(url: str) -> Reading:
    """An engine's metrics and its slots'. Raises ConfigError where nothing answers, or something else does."""
    base = url.rstrip("/").removesuffix(SLOTS_PATH).removesuffix("/metrics")
    if not base.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is no address; give that of a server or of its metrics, as http://127.0.0.1:8000")
    values: dict[str, dict[Labels, float]] = {}
    for path in ("/metrics", SLOTS_PATH):
        for family in text_string_to_metric_families(_get(base + path)):
            for sample in family.samples:
                values.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    if "vattn_slots" not in values:
        raise ConfigError(
            f"{base}/metrics has no numbers of an engine: it is another program's, or the engine is closed"
        )
    return Reading(perf_counter(), values)


def _get(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            text: str = answer.read().decode()
            return text
    except (urllib.error.URLError, OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        raise ConfigError(
            f"{url} does not answer: {reason(why) if isinstance(why, Exception) else why}; is the server running?"
        ) from error


def frame(now: Reading, before: Reading | None = None, most_slots: int = 20) -> Group:
    """What is shown: rates are of the time since the reading `before`, without one since the engine was built."""
    panels = [_requests(now, before), _memory(now), _mapping(now, before), _slots(now, most_slots)]
    if "vattn_lease_bytes" in now.values:
        panels.append(_tenants(now))
    return Group(*panels)


def _requests(now: Reading, before: Reading | None) -> Panel:
    table = Table.grid(padding=(0, 3))
    table.add_row(
        *(f"{name} {now.get(f'vattn_{name}'):,.0f}" for name in ("running", "waiting", "suspended")),
        f"preempted {now.get('vattn_preemptions_total'):,.0f}",
        Text("asleep", "magenta") if now.get("vattn_asleep") else "",
    )
    chosen, prompts = (_change(now, before, f"vattn_{name}_tokens_total") for name in ("chosen", "computed_prompt"))
    seconds = now.at - before.at if before else _change(now, None, "vattn_step_seconds_sum")
    rates = (each / seconds if seconds else 0.0 for each in (chosen, prompts))
    p50, p99 = (_quantile(now, before, share) for share in (0.5, 0.99))
    table.add_row(
        *(f"{rate:,.1f} {what}/s" for rate, what in zip(rates, ("tokens", "prompt tokens"), strict=True)),
        f"step p50 ≤ {p50:g} ms",
        f"p99 ≤ {p99:g} ms",
    )
    return Panel(table, title="requests", title_align="left")


def _memory(now: Reading) -> Panel:
    budget = now.get("vattn_kv_budget_bytes")
    table = Table.grid(padding=(0, 2))
    for name, text in PARTS:
        value = now.get(name)
        table.add_row(text, ProgressBar(max(budget, 1.0), min(value, budget), width=40), f"{value / 2**20:,.1f} MiB")
    table.add_row("budget", "", f"{budget / 2**20:,.1f} MiB")
    if held := now.get("vattn_host_held_bytes"):
        table.add_row("host memory", "", f"{now.get('vattn_host_used_bytes') / 2**20:,.1f} of {held / 2**20:,.1f} MiB")
    return Panel(table, title="KV memory", title_align="left")


def _mapping(now: Reading, before: Reading | None) -> Panel:
    table = Table.grid(padding=(0, 3))
    made = {
        when: _change(now, before, "vattn_mappings_made_total", when=when) for when in ("admission", "ahead", "step")
    }
    table.add_row(
        f"mappings {now.get('vattn_mappings'):,.0f} of {now.get('vattn_device_mappings_limit'):,.0f}",
        f"free extents {now.get('vattn_free_extents'):,.0f}",
        f"quarantined {now.get('vattn_quarantined'):,.0f}",
    )
    table.add_row(
        f"made ahead {made['ahead']:,.0f}",
        f"at admissions {made['admission']:,.0f}",
        Text(f"steps waited for {made['step']:,.0f}", "red" if made["step"] else ""),
        f"waited for the thread {1e3 * _change(now, before, 'vattn_map_ahead_wait_seconds_total'):,.1f} ms",
    )
    return Panel(table, title="mappings", title_align="left")


def _slots(now: Reading, most: int) -> Panel:
    tokens, title = now.values.get("vattn_slot_tokens", {}), f"slots, of {now.get('vattn_slots'):,.0f}"
    table = Table(box=None, padding=(0, 2))
    for column in ("slot", "state", "tokens", "frontier", "mapped"):
        table.add_column(column, justify="left" if column == "state" else "right")
    found = sorted((int(dict(labels)["slot"]), dict(labels)["state"]) for labels in tokens)
    longest = max(now.values.get("vattn_slot_frontier_tokens", {0: 0.0}).values(), default=0.0)
    table.add_column("")
    for slot, state in found[:most]:
        named = {"slot": str(slot), "state": state}
        length, frontier = now.get("vattn_slot_tokens", **named), now.get("vattn_slot_frontier_tokens", **named)
        table.add_row(
            str(slot),
            Text(state, STYLES.get(state, "")),
            f"{length:,.0f}",
            f"{frontier:,.0f}",
            f"{now.get('vattn_slot_mapped_bytes', **named) / 2**20:,.2f} MiB",
            Text("█" * round(30 * length / max(longest, 1)), STYLES.get(state, ""))
            + Text("░" * round(30 * max(frontier - length, 0) / max(longest, 1))),
        )
    if len(found) > most:
        table.add_row("…", f"{len(found) - most} more")
    return Panel(table, title=title, title_align="left")


def _tenants(now: Reading) -> Panel:
    lent, budget, wanted = (now.get(f"vattn_lease{part}_bytes") / 2**20 for part in ("", "_budget", "_wanted"))
    table = Table(
        box=None,
        padding=(0, 2),
        caption=f"lent to this engine {lent:,.1f} of {budget:,.1f} MiB, asked for {wanted:,.1f}",
        caption_justify="left",
    )
    for column in ("tenant", "state", "lent MiB", "floor", "ceiling", "asked", "overdue s"):
        table.add_column(column, justify="left" if column in ("tenant", "state") else "right")
    sizes = [f"vattn_tenant_{part}_bytes" for part in ("lent", "floor", "ceiling", "wanted")]
    for labels in sorted(now.values.get(sizes[0], {}), key=lambda labels: dict(labels)["tenant"]):
        named = dict(labels)
        overdue = now.get("vattn_tenant_overdue_seconds", **named)
        table.add_row(
            named["tenant"],
            Text(named["state"], TENANT_STYLES.get(named["state"], "")),
            *(f"{now.get(size, **named) / 2**20:,.1f}" for size in sizes),
            f"{overdue:,.1f}" if overdue else "",
        )
    if now.get("vattn_broker_ended"):
        table.add_row(Text("the broker has ended", "red"))
    elif not table.row_count:
        table.add_row(Text("the broker does not answer", "red"))
    return Panel(table, title="tenants", title_align="left")


def _change(now: Reading, before: Reading | None, name: str, **labels: str) -> float:
    return now.get(name, **labels) - (before.get(name, **labels) if before else 0.0)


def _quantile(now: Reading, before: Reading | None, share: float) -> float:
    """The upper bound, in ms, of the bucket of the step histogram that holds so large a share of the steps."""
    name = "vattn_step_seconds_bucket"
    bounds = sorted((dict(labels)["le"] for labels in now.values.get(name, {})), key=float)
    counts = [_change(now, before, name, le=bound) for bound in bounds]
    wanted = share * counts[-1] if counts else 0.0
    return first_reached([1e3 * float(bound) for bound in bounds], counts, wanted) if wanted else 0.0


def first_reached(bounds: Sequence[float], counts: Sequence[float], wanted: float) -> float:
    """The first bound whose cumulative count is `wanted` or more; infinite where none is."""
    return next((bound for bound, count in zip(bounds, counts, strict=True) if count >= wanted), math.inf)
