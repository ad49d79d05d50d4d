"""Block reuse: requests begin behind the tokens that earlier requests left in their slots.

The C++ manager counts every request's blocks as if nothing were shared, with its own reuse switched off, so the
scheduler's answers stay true. What is held, and by whom, is `PrefixCache`'s. When the C++ manager has a request's
blocks, the request is told that its first tokens are there, by the names that TensorRT-LLM itself uses for it:
``set_prepopulated_prompt_len`` since 1.3; in 1.2, ``context_current_position`` and ``context_chunk_size``, by the rule
of that method (cpp/include/tensorrt_llm/batch_manager/llmRequest.h).

A token counts as held once a later one was sampled. A request that TensorRT-LLM ends with an error
(`PyExecutor._handle_errors`) leaves nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np

from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.prefix import (
    DEFAULT_PRIORITY,
    ManagedReuse,
    PrefixCache,
    PrefixKey,
    Priorities,
    Retention,
    Way,
)
from trtllm_vattn.cache.prefix.events import KVCacheEvent

logger = logging.getLogger(__name__)

WAYS = (Way.ADOPT, Way.ALIAS, Way.COPY)
"""Ways to a hit. `Way.TABLE` would need no driver call either, as TensorRT-LLM's kernels read through block tables. But
a table holds its owner's extents whole, beyond the tokens that are read, and the blocks promised to the scheduler leave
no room for that."""
NOT_IN_TOKENS = (
    "multimodal_hashes",
    "multimodal_embedding",
    "py_multimodal_data",
    "mrope_rotary_cos_sin",
    "prompt_embedding_table",
)
"""Attributes of a request on which KV depends beside its token ids."""


@dataclass
class _Reusing:
    """A request whose tokens may be reused.

    Attributes
    ----------
    prompt, cached : int
        Tokens of its prompt, and those of them that were there when it began.
    is_shared : bool
        Others may begin with its prompt.
    """

    prompt: int
    cached: int
    is_shared: bool = False
    failed: bool = False

    def written(self, tokens: int) -> int:
        """Tokens whose KV is there for certain when a request has so many: the last one was sampled, so all before it
        are; before any was sampled, those that it began with."""
        return tokens - 1 if tokens > self.prompt else self.cached


class RequestReuse:
    """Gives requests slots with the tokens that are held of theirs, and keeps what they leave.

    Parameters
    ----------
    cache : KVCacheManager
        With more slots than requests run at once.
    block : int
        Tokens a block.
    whole_blocks : bool
        Reuse whole blocks only (``enable_partial_reuse=False``).
    events : bool
        Keep events of stored and removed blocks.
    on_stream : callable
        A context in which copies go to the stream that the model runs on.

    Attributes
    ----------
    prefixes : PrefixCache
    """

    def __init__(
        self,
        cache: KVCacheManager,
        block: int,
        whole_blocks: bool = False,
        events: bool = False,
        on_stream: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.cache, self._block, self._on_stream = cache, block, on_stream
        self._multiple = block if whole_blocks else 1
        self.prefixes = PrefixCache(ManagedReuse(cache), block, ways=WAYS, events=events)
        self._requests: dict[int, _Reusing] = {}
        self._told: set[str] = set()

    # -- the life of a request -------------------------------------------------------------------------------------

    def admit(self, request: Any, tokens: int) -> None:
        """Back `tokens` tokens of a new request, the first of them with what is held. Raises as `KVCache.admit`;
        nothing changed then but what was evicted."""
        number, key = request.py_request_id, self.key_of(request)
        if key is None:
            self.cache.admit(number, tokens)
            return
        prompt = _tokens_of(request, request.prompt_len)
        with self._on_stream():
            found = self.prefixes.lookup_and_admit(
                number,
                prompt,
                key,
                retention_of(request),
                request.max_new_tokens,
                reserve_tokens=tokens - len(prompt),
                multiple=self._multiple,
            )
            self._requests[number] = _Reusing(len(prompt), found.cached_tokens)
            if tokens > len(prompt):
                try:
                    self.cache.extend(number, tokens - len(prompt))
                except BaseException:
                    self.undo(request)
                    raise

    def undo(self, request: Any) -> None:
        """Take a request's slot again, before it ran. What it began with is kept."""
        self._finish(request, keep=True)

    def begin(self, request: Any) -> None:
        """Tell a request that the C++ manager knows by now which of its tokens are there."""
        known = self._requests.get(request.py_request_id)
        if known is None or not known.cached:
            return
        if hasattr(request, "set_prepopulated_prompt_len"):
            request.context_current_position = known.cached
            request.set_prepopulated_prompt_len(known.cached, self._block)
            return
        chunk, end = request.context_chunk_size, request.prompt_len
        if known.cached + chunk < end:
            # Chunks end with a block.
            chunk = (known.cached + chunk) // self._block * self._block - known.cached
        request.context_current_position = known.cached
        request.context_chunk_size = min(chunk, end - known.cached)

    def updated(self, prompts: Iterable[Any]) -> None:
        """A step with these requests' prompts, or chunks of them, was updated: others may begin with a prompt as soon
        as all of it is there."""
        for request in prompts:
            known = self._requests.get(request.py_request_id)
            if known is None or known.failed or known.is_shared or request.get_num_tokens(0) <= known.prompt:
                continue
            self.prefixes.computed(request.py_request_id, _tokens_of(request, known.prompt))
            known.is_shared = True

    def fail(self, number: int) -> None:
        """A request ends in an error: nothing of it is kept."""
        if (known := self._requests.get(number)) is not None:
            known.failed = True

    def end(self, request: Any) -> None:
        """Take the slot of a request that finished, was cancelled or is paused, and keep what is there of it."""
        self._finish(request, keep=not self._has_failed(request))

    def _has_failed(self, request: Any) -> bool:
        known = self._requests.get(request.py_request_id)
        return known is not None and known.failed

    def _finish(self, request: Any, keep: bool) -> None:
        number = request.py_request_id
        known = self._requests.get(number)
        if known is None:
            self.cache.release(number)
            return
        with self._on_stream():
            if keep and self.cache.slot_of(number) not in self.cache.broken_slots():
                self.prefixes.finish(number, _tokens_of(request, known.written(request.get_num_tokens(0))))
            else:
                self.prefixes.finish(number, (), ok=False)
        del self._requests[number]

    def flush(self) -> int:
        """Keep nothing of what requests left, nor of those that run now; returns the tokens forgotten."""
        return self.prefixes.flush()

    # -- looking up ------------------------------------------------------------------------------------------------

    def match(self, tokens: Iterable[int], adapter: int | None, salt: int | str | None) -> int:
        """Tokens of a prompt that are held, in whole blocks."""
        held = self.prefixes.match(np.fromiter(tokens, np.int64), _key(salt, adapter))
        return held // self._block * self._block

    def key_of(self, request: Any) -> PrefixKey | None:
        """What a request's KV depends on beside its tokens; None where that is not known, or where it wants logits of
        all of its prompt: such a request is computed whole and leaves nothing."""
        if (name := self._why_not(request)) is not None:
            if name not in self._told:
                self._told.add(name)
                logger.warning(
                    "requests with %s are computed whole and are not reused: the fixed-address KV cache's keys do not "
                    "cover it",
                    name,
                )
            return None
        salt = getattr(request, "cache_salt", None)
        return _key(getattr(request, "cache_salt_id", None) if salt is None else salt, request.lora_task_id)

    def _why_not(self, request: Any) -> str | None:
        for name in NOT_IN_TOKENS:
            if getattr(request, name, None) is not None:
                return name
        if getattr(request, "py_return_context_logits", False):
            return "py_return_context_logits"
        if request.lora_task_id is None and getattr(request, "py_lora_path", None) is not None:
            return "py_lora_path without lora_task_id"
        return None

    def take_events(self) -> list[KVCacheEvent]:
        """Events of stored and removed blocks since the last call."""
        return self.prefixes.take_events()


def _key(salt: int | str | None, adapter: int | None) -> PrefixKey:
    # A number and a word that reads like it are two salts.
    return PrefixKey("" if salt is None else f"{type(salt).__name__}:{salt}", adapter=adapter)


def _tokens_of(request: Any, count: int) -> np.ndarray:
    return np.array(request.get_tokens(0)[:count], np.int64)


def retention_of(request: Any) -> Priorities:
    """What a request's tokens are worth, by its ``kv_cache_retention_config``: `Retention`s from the start of its
    prompt to what it generates.

    As in TensorRT-LLM, tokens are of no use without those before them, so none counts more than they do.
    """
    config = getattr(request, "kv_cache_retention_config", None)
    if config is None:
        return DEFAULT_PRIORITY
    prompt = request.prompt_len
    ranges = [
        (each.token_start, prompt if each.token_end is None else min(each.token_end, prompt), each)
        for each in config.token_range_retention_configs
    ]
    starts = {0, *(bound for start, stop, _ in ranges for bound in (start, stop) if bound < prompt)}
    steps: list[Retention] = []
    for start in sorted(starts):
        given = next((each for first, stop, each in ranges if first <= start < stop), None)
        step = Retention(start, DEFAULT_PRIORITY)
        if given is not None:
            step = Retention(start, given.priority, _seconds(given.duration_ms))
        _append(steps, step)
    _append(steps, Retention(prompt, config.decode_retention_priority, _seconds(config.decode_duration_ms)))
    return steps


def _append(steps: list[Retention], step: Retention) -> None:
    """Add a step, unless it is worth no less than the one before it."""
    if not steps or step.priority < steps[-1].priority:
        steps.append(step)


def _seconds(duration: timedelta | float | None) -> float | None:
    """A duration as the bindings give it, or milliseconds."""
    if duration is None:
        return None
    return duration.total_seconds() if isinstance(duration, timedelta) else duration / 1e3
