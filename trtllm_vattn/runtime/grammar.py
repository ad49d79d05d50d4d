"""Grammars: JSON schemas and regular expressions as masks of the tokens that may come next, by llguidance.

The masks are computed on the host, from the tokens chosen so far, and applied in the captured step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.sampling import SamplingParams


class Grammar:
    """One request's grammar, and how far its tokens have come in it.

    Raises ConfigError where llguidance does not take the grammar; it says why.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        import llguidance

        self._tokenizer, self._text = tokenizer, text
        self._matcher = llguidance.LLMatcher(tokenizer, text, log_level=0)
        self._consumed: list[int] = []
        if self._matcher.is_error():
            raise ConfigError(f"the grammar is not possible: {self._matcher.get_error()}")

    def anew(self) -> Grammar:
        """The same from its beginning, for another request."""
        return Grammar(self._tokenizer, self._text)

    def follow(self, chosen: Sequence[int]) -> Any:
        """The matcher behind these tokens of the output, whatever it stood behind before."""
        if self._consumed != chosen[: len(self._consumed)]:
            self._matcher.reset()
            self._consumed = []
        for token in chosen[len(self._consumed) :]:
            # What interrupts this leaves a matcher that the next call resets, for no token is this one.
            self._consumed.append(-1)
            self._matcher.consume_token(token)
            self._consumed[-1] = token
        return self._matcher

    def ends_with(self, chosen: Sequence[int]) -> bool:
        """Whether nothing can come behind these tokens."""
        return bool(self.follow(chosen).is_stopped())

    @property
    def error(self) -> str | None:
        """Why it cannot go on."""
        return self._matcher.get_error() or None if self._matcher.is_error() else None


def grammar_tokenizer(tokenizer: Any, vocab_size: int, end_of_text: Sequence[int]) -> Any:
    """llguidance's form of a fast tokenizer of transformers, for a model of so many tokens; takes about a second.

    Raises ConfigError where llguidance does not take it, ModuleNotFoundError where it is not installed.
    """
    from llguidance.hf import from_tokenizer

    try:
        return from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=[*end_of_text] or None)
    except Exception as error:
        raise ConfigError(f"grammars are not possible with this tokenizer: {error}") from error


def make_grammar(params: SamplingParams, tokenizer: Any) -> Grammar | None:
    """The grammar that a request asks for, if any, by `grammar_tokenizer`'s tokenizer. Raises ConfigError."""
    from llguidance import LLMatcher

    if params.regex is not None:
        return Grammar(tokenizer, LLMatcher.grammar_from_regex(params.regex))
    if params.json_schema is not None:
        assert isinstance(params.json_schema, str)
        return Grammar(tokenizer, LLMatcher.grammar_from_json_schema(params.json_schema))
    return None


@lru_cache(maxsize=1)
def _executor() -> Any:
    from llguidance import LLExecutor

    return LLExecutor()


def fill_masks(grammars: Sequence[tuple[Grammar, Sequence[int]]], words: int) -> np.ndarray:
    """What may come behind each grammar's tokens, a bit a token: int32 ``[grammars, words]``. All bits are set for a
    grammar with an error, whose request ends with its next token."""
    masks = np.full((len(grammars), words), -1, np.int32)
    matchers = [grammar.follow(chosen) for grammar, chosen in grammars]
    there = [(matcher, place) for place, matcher in enumerate(matchers) if not matcher.is_error()]
    if there:
        _executor().unsafe_compute_mask_ptr(there, masks.ctypes.data, words * 4, len(masks))
    return masks
