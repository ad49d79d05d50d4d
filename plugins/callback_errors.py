"""Errors that the plugin's callbacks raised, kept for whoever called TensorRT.

TensorRT calls the plugin from C++ and returns a null pointer or False where it raises; the exception itself is lost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from trtllm_vattn.errors import ConfigError, VattnError

P = ParamSpec("P")
R = TypeVar("R")

_errors: list[VattnError] = []


def keep_error(method: Callable[P, R]) -> Callable[P, R]:
    """Decorate a callback: a VattnError that it raises is kept for `error_of`, and raised."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except VattnError as error:
            _errors.append(error)
            raise

    return call


def clear_errors() -> None:
    """Drop the errors kept so far."""
    _errors.clear()


def error_of(what: str, otherwise: str = "see TensorRT's log") -> ConfigError:
    """An error that says what failed, with the messages of the errors kept (else `otherwise`); drops these."""
    reasons = list(dict.fromkeys(str(error) for error in _errors))
    clear_errors()
    return ConfigError(f"{what}: {'; '.join(reasons) or otherwise}")
