"""A span of OpenTelemetry for each request, part of its client's trace; nothing where opentelemetry-api, an extra, is
not installed. What becomes of spans is for the SDK to say, which whoever starts the process sets up
(`opentelemetry-instrument trtllm-vattn serve …`). Attributes are named as the conventions for generative AI have them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

AUTO = "opentelemetry.instrumentation.auto_instrumentation"


def is_instrumented() -> bool:
    """Whether `opentelemetry-instrument` started this process, whose children it leaves alone."""
    return AUTO in sys.modules


def instrument() -> None:
    """Set this process up as `opentelemetry-instrument` did the one that started it."""
    importlib.import_module(AUTO).initialize()


@cache
def is_traced() -> bool:
    """Whether there is an OpenTelemetry to tell; it is looked for once, which takes longer than a token."""
    return importlib.util.find_spec("opentelemetry") is not None


class RequestSpan:
    """Of one request: from its coming to its end, with the moment of its first token."""

    def __init__(self, name: str, model: str, headers: Mapping[str, str]) -> None:
        self._span: Any = None
        self._has_token = False
        if is_traced():
            from opentelemetry import propagate, trace

            context = propagate.extract(headers)
            attributes = {"gen_ai.request.model": model, "gen_ai.system": "trtllm-vattn"}
            tracer = trace.get_tracer("trtllm_vattn")
            self._span = tracer.start_span(name, context, trace.SpanKind.SERVER, attributes)

    def token(self) -> None:
        """Tokens came; the first ones are noted."""
        if self._span is not None and not self._has_token:
            self._has_token = True
            self._span.add_event("first token")

    def end(self, reason: str, usage: Mapping[str, int] | None = None) -> None:
        """The request has ended, for this reason, with these tokens."""
        if self._span is None:
            return
        self._span.set_attribute("gen_ai.response.finish_reasons", [reason])
        for name, what in (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")):
            if usage is not None:
                self._span.set_attribute(f"gen_ai.usage.{what}", usage[name])
        self._span.end()
