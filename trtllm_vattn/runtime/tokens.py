"""Token ids as they come from callers: lists, arrays, tensors. Text, floats and booleans are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.values import as_whole, described, shown

TEXT = (str, bytes, bytearray, memoryview)
TokenIds = Sequence[int] | np.ndarray | torch.Tensor
"""Of one dimension."""
LARGEST_ID = (1 << 63) - 1
"""Where no vocabulary says so."""


def token_ids(name: str, given: Any, vocab_size: int | None = None) -> list[int]:
    """Token ids from a sequence, a numpy array or a torch tensor of one dimension; in the vocabulary, where its size is
    given."""
    return checked_ids(name, given, vocab_size)[0]


def checked_ids(name: str, given: Any, vocab_size: int | None = None) -> tuple[list[int], np.ndarray]:
    """`token_ids`, and the same as an int64 array: prompts are long, and looking at each token in Python is slow."""
    ids, most = _integers(name, given), LARGEST_ID if vocab_size is None else vocab_size - 1
    try:
        array = np.array(ids, np.int64)
    except OverflowError:
        array = np.array([-1])
    if len(array) and (array.min() < 0 or array.max() > most):
        wrong = next(i for i in ids if not 0 <= i <= most)
        bounds = "below 0" if wrong < 0 and vocab_size is None else f"outside 0 to {most}"
        raise ConfigError(f"{name} has token ids {bounds}: {shown(wrong)}")
    return ids, array


def _integers(name: str, given: Any) -> list[int]:
    if isinstance(given, TEXT):
        raise ConfigError(
            f"{name} is text ({type(given).__name__}); tokenise it first: tokenizer(text)['input_ids'], a list of ids"
        )
    if isinstance(given, torch.Tensor | np.ndarray):
        return _of_array(name, given)
    if not isinstance(given, Sequence):
        raise ConfigError(f"{name} is {described(given)}; give a list, an array or a tensor of token ids")
    if list(map(type, given)).count(int) == len(given):
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
    if isinstance(given, torch.Tensor) and (given.is_meta or given.layout is not torch.strided):
        raise ConfigError(f"{name} is a tensor without plain values ({given.device}, {given.layout}); make it dense")
    if np.ma.is_masked(given):
        raise ConfigError(f"{name} is a masked array, some of whose values are not there; give those that are")
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
            f"{name} holds {described(token)} at position {position}; it is one sequence of token ids, and several "
            "prompts go to generate()"
        )
    advice = "tokenise it first" if isinstance(token, TEXT) else "token ids are whole numbers"
    raise ConfigError(f"{name} holds {shown(token)} ({type(token).__name__}) at position {position}; {advice}")
