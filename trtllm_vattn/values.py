"""Checks of single values at the door of a public call. Each returns the value as the plain Python type it is used as,
and raises ConfigError that names it: nothing is truncated, and no boolean is taken for a number."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trtllm_vattn.errors import ConfigError

TEXT = (str, bytes, bytearray, memoryview)


def as_whole(value: Any) -> int | None:
    """A Python or numpy integer as an int; None for everything else, booleans among it."""
    if type(value) is int:
        return value
    if isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_):
        return int(value)
    return None


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number from `least` to `most`."""
    number = as_whole(value)
    if number is None or number < least or (most is not None and number > most):
        bounds = f"from {least} on" if most is None else f"from {least} to {_shown(most)}"
        raise ConfigError(f"{name} is {_shown(value)}; it is a whole number {bounds}")
    return number


def finite(name: str, value: Any) -> float:
    """A Python or numpy number, neither NaN nor infinite, as a float."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise ConfigError(f"{name} is {_shown(value)}; it is a finite number")


def truth(name: str, value: Any) -> bool:
    """True or False, numpy's too."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise ConfigError(f"{name} is {_shown(value)}; it is True or False")


def token_ids(name: str, given: Any, vocab_size: int | None = None) -> list[int]:
    """Token ids from a sequence, a numpy array or a torch tensor of one dimension; in the vocabulary, where its size is
    given."""
    ids = _integers(name, given)
    if ids and (min(ids) < 0 or (vocab_size is not None and max(ids) >= vocab_size)):
        wrong = next(i for i in ids if i < 0 or (vocab_size is not None and i >= vocab_size))
        there = "they are 0 or more" if vocab_size is None else f"the vocabulary has ids 0 to {vocab_size - 1}"
        raise ConfigError(f"{name} holds token id {_shown(wrong)}; {there}")
    return ids


def _integers(name: str, given: Any) -> list[int]:
    if isinstance(given, TEXT):
        raise ConfigError(
            f"{name} is text ({type(given).__name__}); tokenise it first: tokenizer(text)['input_ids'], a list of ids"
        )
    if isinstance(given, torch.Tensor | np.ndarray):
        return _of_array(name, given)
    if not isinstance(given, Sequence):
        raise ConfigError(f"{name} is {_described(given)}; give a list, an array or a tensor of token ids")
    if set(map(type, given)) <= {int}:
        return list(given)
    return [_token(name, position, token) for position, token in enumerate(given)]


def _of_array(name: str, given: torch.Tensor | np.ndarray) -> list[int]:
    integers = (
        not (given.is_floating_point() or given.is_complex() or given.is_quantized or given.dtype == torch.bool)
        if isinstance(given, torch.Tensor)
        else given.dtype.kind in "iu"
    )
    if not integers:
        raise ConfigError(f"{name} is of {given.dtype}; token ids are integers, and nothing is rounded to one")
    if given.ndim != 1:
        raise ConfigError(f"{name} has shape {tuple(given.shape)}; token ids of one sequence have one dimension")
    listed: list[int] = given.tolist()
    return listed


def _token(name: str, position: int, token: Any) -> int:
    number = as_whole(token)
    if number is not None:
        return number
    if isinstance(token, torch.Tensor | np.ndarray) and token.ndim == 0:
        return _of_array(name, token.reshape(1))[0]
    if isinstance(token, Sequence | torch.Tensor | np.ndarray) and not isinstance(token, TEXT):
        raise ConfigError(
            f"{name} holds {_described(token)} at position {position}; it is one sequence of token ids, and several "
            "prompts go to generate()"
        )
    advice = "tokenise it first" if isinstance(token, TEXT) else "token ids are whole numbers"
    raise ConfigError(f"{name} holds {_shown(token)} ({type(token).__name__}) at position {position}; {advice}")


def _described(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__} ({_shown(value)})"


def _shown(value: Any) -> str:
    """A value for a message, no longer than a line. Digits beyond what Python converts are counted instead."""
    if type(value) is int and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception as error:
        text = f"<{type(value).__name__} without a repr: {type(error).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."
