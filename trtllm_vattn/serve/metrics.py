"""`/metrics`: what is counted of requests, beside the engine's numbers (observe/metrics.py), as Prometheus' text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from time import perf_counter
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from trtllm_vattn.observe.metrics import EngineCollector
from trtllm_vattn.runtime.async_engine import AsyncEngine
from trtllm_vattn.serve.link import RemoteEngine
from trtllm_vattn.serve.spans import RequestSpan

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
CONTENT_TYPE = CONTENT_TYPE_LATEST
Served = AsyncEngine | RemoteEngine
"""What a server is given: an engine of its process, or of another."""


class Distribution:
    """Counts of values by bounds. The event loop alone adds to it, for every token; others read."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name, self._text, self._bounds = name, text, bounds
        self._within = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, so many times."""
        self._within[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def metric(self) -> Metric:
        """As it is now."""
        names = (*map(str, self._bounds), "+Inf")
        counts = zip(names, accumulate(self._within), strict=True)
        return HistogramMetricFamily(self._name, self._text, buckets=list(counts), sum_value=self._sum)


class Metrics(Collector):
    """Of one server, over an engine."""

    def __init__(self, engine: Served) -> None:
        self._registry = registry = CollectorRegistry()
        self._ended = Counter("vattn_requests", "Requests ended, by why", ["finish_reason"], registry=registry)
        self._prompt = Counter("vattn_prompt_tokens", "Tokens of prompts", registry=registry)
        self._cached = Counter("vattn_cached_tokens", "Tokens of prompts that were not computed", registry=registry)
        self.generated = 0
        self.first = Distribution("vattn_time_to_first_token_seconds", "From request to first token", SECONDS)
        self.between = Distribution("vattn_inter_token_seconds", "Between tokens of a choice, for each", BETWEEN)
        self.whole = Distribution("vattn_request_seconds", "From request to its end", SECONDS)
        self.tasks = Gauge("vattn_server_tasks", "Tasks of the server's event loop", registry=registry)
        registry.register(self)
        registry.register(EngineCollector(engine))
        self._slots = CollectorRegistry()
        self._slots.register(EngineCollector(engine, slots=True))

    def collect(self) -> Iterator[Metric]:
        """What is counted for every token."""
        yield CounterMetricFamily("vattn_generated_tokens", "Tokens generated", value=self.generated)
        yield from (each.metric() for each in (self.first, self.between, self.whole))

    def timer(self, span: RequestSpan) -> Timer:
        """For a request that begins now, and its span."""
        return Timer(self, span)

    def text(self, slots: bool = False) -> bytes:
        """All of it, or each slot's; from any thread."""
        text: bytes = generate_latest(self._slots if slots else self._registry)
        return text

    def ended(self, reason: str, prompt_tokens: int = 0, cached_tokens: int = 0) -> None:
        """A request ended."""
        self._ended.labels(reason).inc()
        self._prompt.inc(prompt_tokens)
        self._cached.inc(cached_tokens)


class Timer:
    """Times one request's tokens, and tells its span of them."""

    def __init__(self, metrics: Metrics, span: RequestSpan) -> None:
        self._metrics, self._began = metrics, perf_counter()
        self._last: dict[int, float] = {}
        """When the newest tokens of each choice came."""
        self.span = span

    def tokens(self, counts: Iterable[tuple[int, int]]) -> None:
        """These choices got so many tokens each, now. Of several that one step gave, each is counted with its part of
        the time since the choice's tokens before; its first ones have none before them."""
        now = perf_counter()
        if not self._last:
            self.span.token()
            self._metrics.first.observe(now - self._began)
        for choice, count in counts:
            if choice in self._last:
                self._metrics.between.observe((now - self._last[choice]) / count, count)
            self._last[choice] = now
            self._metrics.generated += count

    def end(self, reason: str, usage: Mapping[str, Any]) -> None:
        """The request has ended, for this reason."""
        self._metrics.ended(reason, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"])
        self._metrics.whole.observe(perf_counter() - self._began)
        self.span.end(reason, usage)
