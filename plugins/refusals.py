"""What the plugin refused, kept for whoever called TensorRT.

TensorRT calls the plugin from C++ and answers with a null pointer or False; the exception itself is lost on the way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from trtllm_vattn.errors import ConfigError, VattnError

P = ParamSpec("P")
R = TypeVar("R")

_refused: list[VattnError] = []


def reported(method: Callable[P, R]) -> Callable[P, R]:
    """Keep a VattnError that leaves a callback of TensorRT's."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except VattnError as error:
            _refused.append(error)
            raise

    return call


def forget() -> None:
    """Drop what was refused so far."""
    _refused.clear()


def explain(what: str, otherwise: str = "see TensorRT's log") -> ConfigError:
    """An error that says what failed and, where the plugin refused something, what; forgets it."""
    reasons = list(dict.fromkeys(str(error) for error in _refused))
    forget()
    return ConfigError(f"{what}: {'; '.join(reasons) or otherwise}")
