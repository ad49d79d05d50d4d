"""Grammars: JSON schemas and regular expressions as masks of the tokens that may come next, by llguidance.

The masks are computed on the host, from the tokens chosen so far, and applied in the captured step.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.sampling import SamplingParams

MOST_KEPT = 64
"""Compiled grammars."""
SLICED_LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 30)
"""Of texts: a mask in the middle of a string is put together of the tokens that are texts of at most so many characters
(llguidance's slices), of each length for which any such text may follow, and looks at the others alone. llguidance's
own lengths are 10 and 30, so that where fewer than 10 characters are left it looks at every token of the vocabulary: a
millisecond for 128,000 tokens, instead of some 20 microseconds."""

MOST_THREADS = 4
"""That compute masks, and no more than half as many as there are processors. Masks of 128 lanes took 1.7 ms by one to
four threads, 2.6 by sixteen and 4.6 by 56 (a host of 64 processors beside an H200, 2026-11-30)."""
START_S = 1.0
"""Seconds to wait for the thread that has masks computed to begin; mostly it takes some microseconds."""


class Grammar:
    """One request's grammar, and how far its tokens have come in it.

    Parameters
    ----------
    compiled
        An llguidance matcher that nobody moves on.
    """

    def __init__(self, compiled: Any) -> None:
        self._compiled, self._matcher = compiled, compiled.deep_copy()
        self._consumed: list[int] = []
        self._stopped = False
        self._job: MaskJob | None = None
        """What computes a mask with the matcher, which nobody else may touch before it is settled."""

    def anew(self) -> Grammar:
        """The same from its beginning, for another request."""
        return Grammar(self._compiled)

    def follow(self, chosen: Sequence[int]) -> Any:
        """The matcher behind these tokens of the output, wherever it stood before.

        Outputs grow and shrink at their end alone, so the last token that was consumed says whether the others before
        it are these: looking at all of them in every step would take as long as the output is.
        """
        self._settle()
        known = len(self._consumed)
        if known > len(chosen) or (known and self._consumed[-1] != chosen[known - 1]):
            self._matcher.reset()
            self._consumed.clear()
        for token in chosen[len(self._consumed) :]:
            self._consume(token)
        return self._matcher

    def _consume(self, token: int) -> None:
        # What interrupts this leaves a matcher that the next call resets, for no token is this one.
        self._consumed.append(-1)
        self._matcher.consume_token(token)
        self._stopped = bool(self._matcher.is_stopped())
        self._consumed[-1] = token

    def _settle(self) -> None:
        if self._job is not None:
            self._job.settle()
            self._job = None

    def ends_with(self, chosen: Sequence[int], token: int) -> bool:
        """Whether nothing can come behind these tokens of the output and the next one, `token`."""
        if len(self._consumed) != len(chosen) + 1 or self._consumed[-1] != token:
            self.follow(chosen)
            self._consume(token)
        return self._stopped

    def lend(self, chosen: Sequence[int], token: int, job: MaskJob) -> Any | None:
        """The matcher behind these tokens and the next one, for `job` alone until it is settled; None where it cannot
        go on."""
        self._settle()
        if self.error is not None or self.ends_with(chosen, token) or self.error is not None:
            return None
        self._job = job
        return self._matcher

    def is_lent(self, job: MaskJob, chosen: Sequence[int]) -> bool:
        """Whether it is with that job, behind these tokens of the output."""
        known = self._consumed
        return self._job is job and len(known) == len(chosen) and known[-1] == chosen[-1]

    @property
    def error(self) -> str | None:
        """Why it cannot go on; of one that is lent, what there was before."""
        if self._job is not None and not self._job.over:
            return None
        return self._matcher.get_error() or None if self._matcher.is_error() else None


class MaskJob:
    """Masks that are computed by other threads, while the caller's goes on with the tokens before.

    Its state follows from a lock that the computing thread holds, so an interrupt anywhere leaves nothing to wait for:
    what was not begun when it is settled is never begun.

    Attributes
    ----------
    over : bool
        Whether it was settled.
    """

    def __init__(self) -> None:
        self._lock, self._begun = threading.Lock(), threading.Event()
        self.over = self._done = False

    def start(self, matchers: list[tuple[Any, int]], masks: np.ndarray) -> None:
        """Begin to write the masks of these matchers to their rows of int32 ``[rows, words]``."""
        try:
            _masking_thread(os.getpid()).submit(self._run, matchers, masks)
        except RuntimeError:
            # The main thread has ended, and others go on: executors take nothing from then on.
            return
        # Else that thread gets the GIL once this one has nothing to do, which is when it wants the masks.
        self._begun.wait(START_S)

    def _run(self, matchers: list[tuple[Any, int]], masks: np.ndarray) -> None:
        with self._lock:
            self._begun.set()
            if not self.over:
                _compute(matchers, masks)
                self._done = True

    def settle(self) -> bool:
        """Wait until nobody computes; returns whether the masks are there."""
        with self._lock:
            self.over = True
        return self._done


class GrammarCompiler:
    """Compiles grammars for one tokenizer and model, and keeps some. Any thread may call it; compiling takes from
    milliseconds to a second.

    Parameters
    ----------
    tokenizer
        A fast one of transformers.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_of_text: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size, self._end_of_text = tokenizer, vocab_size, [*end_of_text]
        self._converted: Any = None
        self._kept: OrderedDict[tuple[str | None, str | None], Any] = OrderedDict()
        self._lock, self._converting = threading.Lock(), threading.Lock()

    def grammar(self, params: SamplingParams) -> Grammar:
        """The grammar that parameters ask for. Raises ConfigError where llguidance takes it, or the tokenizer, not, and
        ModuleNotFoundError where it is not installed."""
        assert not isinstance(params.json_schema, Mapping)
        key = params.json_schema, params.regex
        with self._lock:
            known = self._kept.get(key)
        # Whoever asks for one that is there, the engine's own thread before a step, waits for nobody who compiles.
        compiled = self._compile(*key) if known is None else known
        with self._lock:
            compiled = self._kept.setdefault(key, compiled)
            self._kept.move_to_end(key)
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
            return Grammar(compiled)

    def _compile(self, schema: str | None, regex: str | None) -> Any:
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        with self._converting:
            if self._converted is None:
                try:
                    self._converted = from_tokenizer(
                        self._tokenizer,
                        n_vocab=self._vocab_size,
                        # Releases before 1.7 take no list.
                        eos_token=self._end_of_text[0] if len(self._end_of_text) == 1 else self._end_of_text or None,
                        slices=_slices(),
                    )
                except Exception as error:
                    why: object = error
                    if hasattr(self._tokenizer, "__len__") and len(self._tokenizer) > self._vocab_size:
                        # llguidance names both numbers alone.
                        why = (
                            f"it has {len(self._tokenizer):,} tokens, and the model logits for {self._vocab_size:,}; "
                            "take out tokens that were added to it"
                        )
                    raise ConfigError(f"grammars are not possible with this tokenizer: {why}") from error
        if regex is not None:
            text = LLMatcher.grammar_from_regex(regex)
        else:
            assert schema is not None
            text = LLMatcher.grammar_from_json_schema(schema)
        matcher = LLMatcher(self._converted, text, log_level=0)
        if matcher.is_error():
            raise ConfigError(f"the grammar is not possible: {matcher.get_error()}")
        return matcher


def _slices() -> list[str]:
    """Regular expressions of parts of a JSON string, the shorter ones first."""
    character = r'[^"\\\x00-\x1F\x7F]'
    return [*(f"{character}{{1,{most}}}" for most in SLICED_LENGTHS), f"{character}+"]


@cache
def _executor(process: int) -> Any:
    """Of a process: a forked child has none of its parent's threads, and would wait for them for ever."""
    from llguidance import LLExecutor

    return LLExecutor(max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // 2)))


@cache
def _masking_thread(process: int) -> ThreadPoolExecutor:
    """Of a process, as `_executor`."""
    return ThreadPoolExecutor(1, "grammar masks")


def _compute(matchers: list[tuple[Any, int]], masks: np.ndarray) -> None:
    """By several threads, without the GIL."""
    _executor(os.getpid()).unsafe_compute_mask_ptr(matchers, masks.ctypes.data, masks.strides[0], len(masks))


def fill_masks(grammars: Mapping[int, tuple[Grammar, Sequence[int]]], masks: np.ndarray) -> None:
    """Write what may come behind each grammar's tokens, a bit a token, to its row of int32 ``[rows, words]``. All bits
    are set for a grammar with an error, whose request ends with its next token."""
    matchers = {row: grammar.follow(chosen) for row, (grammar, chosen) in grammars.items()}
    there = [(matcher, row) for row, matcher in matchers.items() if not matcher.is_error()]
    if len(there) < len(matchers):
        masks[[row for row, matcher in matchers.items() if matcher.is_error()]] = -1
    if there:
        _compute(there, masks)
