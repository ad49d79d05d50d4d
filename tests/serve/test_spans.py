"""A request's span begins with its client's trace, has its first token once, and ends with its tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from trtllm_vattn.serve.spans import RequestSpan, is_traced

Noted = list[tuple[Any, ...]]


@pytest.fixture(autouse=True)
def looked_for_anew() -> Iterator[None]:
    """What is installed is another thing in each test."""
    is_traced.cache_clear()
    yield
    is_traced.cache_clear()


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Noted:
    """What an OpenTelemetry that stands in for the real one was asked for."""
    calls: Noted = []

    def span(*arguments: Any) -> SimpleNamespace:
        calls.append(("start", *arguments))
        return SimpleNamespace(
            add_event=lambda name: calls.append(("event", name)),
            set_attribute=lambda name, value: calls.append((name, value)),
            end=lambda: calls.append(("end",)),
        )

    trace = SimpleNamespace(
        get_tracer=lambda name: SimpleNamespace(start_span=span), SpanKind=SimpleNamespace(SERVER="server")
    )
    propagate = SimpleNamespace(extract=lambda headers: f"context of {headers['traceparent']}")
    module = SimpleNamespace(trace=trace, propagate=propagate, __spec__=object())
    monkeypatch.setitem(sys.modules, "opentelemetry", module)  # type: ignore[arg-type]
    return calls


def test_a_span_has_the_clients_context_and_the_requests_numbers(noted: Noted) -> None:
    span = RequestSpan("/v1/completions", "tiny", {"traceparent": "00-1-2-01"})
    span.token()
    span.token()
    span.end("length", {"prompt_tokens": 3, "completion_tokens": 5})
    (start, *rest) = noted
    assert start[:4] == ("start", "/v1/completions", "context of 00-1-2-01", "server")
    assert start[4]["gen_ai.request.model"] == "tiny"
    assert rest == [
        ("event", "first token"),
        ("gen_ai.response.finish_reasons", ["length"]),
        ("gen_ai.usage.input_tokens", 3),
        ("gen_ai.usage.output_tokens", 5),
        ("end",),
    ]


def test_a_refused_request_has_no_tokens(noted: Noted) -> None:
    RequestSpan("/v1/completions", "tiny", {"traceparent": ""}).end("refused")
    assert noted[1:] == [("gen_ai.response.finish_reasons", ["refused"]), ("end",)]


def test_without_opentelemetry_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    span = RequestSpan("/v1/completions", "tiny", {})
    span.token()
    span.end("length", {})
