"""`/metrics`: what is counted of requests, and the engine's state when somebody asks, as Prometheus' text."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from trtllm_vattn.runtime.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
CONTENT_TYPE = CONTENT_TYPE_LATEST


@dataclass(frozen=True)
class State:
    """An engine's, at one moment."""

    running: int
    waiting: int
    used_bytes: int
    held_bytes: int
    budget_bytes: int
    weights_version: int

    @classmethod
    def of(cls, engine: Engine) -> State:
        """In the engine's thread."""
        stats, scheduler = engine.cache.stats(), engine.scheduler
        return cls(
            len(scheduler.holders),
            len(scheduler.waiting),
            stats.live_bytes,
            stats.held_bytes,
            stats.budget_bytes,
            engine.weights_version,
        )


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._ended = Counter("vattn_requests", "Requests ended, by why", ["finish_reason"], registry=registry)
        self._prompt = Counter("vattn_prompt_tokens", "Tokens of prompts", registry=registry)
        self._cached = Counter("vattn_cached_tokens", "Tokens of prompts that were not computed", registry=registry)
        self._generated = Counter("vattn_generated_tokens", "Tokens generated", registry=registry)
        self._first = Histogram(
            "vattn_time_to_first_token_seconds", "From request to first token", buckets=SECONDS, registry=registry
        )
        self._between = Histogram(
            "vattn_inter_token_seconds", "Between tokens of a request", buckets=BETWEEN, registry=registry
        )
        self._whole = Histogram("vattn_request_seconds", "From request to its end", buckets=SECONDS, registry=registry)
        names = {
            "running": "Requests with a slot",
            "waiting": "Requests without one",
            "kv_used_bytes": "KV memory that holds tokens of requests",
            "kv_held_bytes": "KV memory held, free and retained parts among it",
            "kv_budget_bytes": "KV memory that may be held",
            "weights_version": "Updates of the weights",
        }
        self._gauges = [Gauge(f"vattn_{name}", text, registry=registry) for name, text in names.items()]

    def timer(self) -> Timer:
        """For a request that begins now."""
        return Timer(self)

    def text(self, state: State | None) -> bytes:
        """All of it; without a state, as gauges were."""
        if state is not None:
            values = (
                state.running,
                state.waiting,
                state.used_bytes,
                state.held_bytes,
                state.budget_bytes,
                state.weights_version,
            )
            for gauge, value in zip(self._gauges, values, strict=True):
                gauge.set(value)
        text: bytes = generate_latest(self._registry)
        return text

    def ended(self, reason: str, prompt_tokens: int = 0, cached_tokens: int = 0) -> None:
        """A request ended."""
        self._ended.labels(reason).inc()
        self._prompt.inc(prompt_tokens)
        self._cached.inc(cached_tokens)


class Timer:
    """Times one request's tokens."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._began, self._last = metrics, perf_counter(), 0.0

    def tokens(self, count: int) -> None:
        """So many came at once."""
        now = perf_counter()
        if self._last:
            self._metrics._between.observe((now - self._last) / count)
        else:
            self._metrics._first.observe(now - self._began)
        self._last = now
        self._metrics._generated.inc(count)

    def end(self) -> None:
        """The request has ended."""
        self._metrics._whole.observe(perf_counter() - self._began)
