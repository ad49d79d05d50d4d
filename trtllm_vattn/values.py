"""Checks of single values at the door of a public call. Each returns the value as the plain Python type it is used as,
and raises ConfigError that names it: nothing is truncated, and no boolean is taken for a number."""

from __future__ import annotations

import math
import numbers
from typing import Any

from trtllm_vattn.errors import ConfigError


def as_whole(value: Any) -> int | None:
    """A Python or numpy integer as an int; None for everything else, booleans among it."""
    if type(value) is int:
        return value
    if type(value) is not bool and isinstance(value, numbers.Integral):
        return int(value)
    return None


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number from `least` to `most`."""
    number = as_whole(value)
    if number is None or number < least or (most is not None and number > most):
        bounds = f"from {least} on" if most is None else f"from {least} to {shown(most)}"
        raise ConfigError(f"{name} is {shown(value)}; it is a whole number {bounds}")
    return number


def finite(name: str, value: Any) -> float:
    """A Python or numpy number, neither NaN nor infinite, as a float."""
    if type(value) is not bool and isinstance(value, numbers.Real):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise ConfigError(f"{name} is {shown(value)}; it is a finite number")


def truth(name: str, value: Any) -> bool:
    """True or False."""
    if isinstance(value, bool):
        return value
    raise ConfigError(f"{name} is {shown(value)}; it is True or False")


def choice(name: str, value: Any, *known: str) -> str:
    """One of these words."""
    if isinstance(value, str) and value in known:
        return value
    raise ConfigError(f"{name} is {shown(value)}; choose {', '.join(known[:-1])} or {known[-1]}")


def unicode_text(name: str, value: str) -> str:
    """A text that can be written as UTF-8, as tokenizers and grammars take it: no half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{name} is {shown(value)}, which has half of a surrogate pair and is no text; leave that out"
        ) from None
    return value


def described(value: Any) -> str:
    """A value and its type, for a message."""
    return "None" if value is None else f"{typed(value)} ({shown(value)})"


def typed(value: Any) -> str:
    """A value's type with its article, for a message: ``a list``, ``an int``."""
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def counted(count: int, noun: str) -> str:
    """So many of something, as messages say it: ``1 tenant``, ``1,200 tenants``. `noun` is singular, with a regular
    plural."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def shown(value: Any) -> str:
    """A value for a message, no longer than a line. Digits beyond what Python converts are counted instead."""
    if type(value) is int and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception as error:
        text = f"<{type(value).__name__} without a repr: {type(error).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."
