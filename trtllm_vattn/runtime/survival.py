"""Requests that outlive their engine's process: noted in a broker's journal, and taken over from it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.request import RequestState, TokenEvent
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.scheduler import Scheduler
from trtllm_vattn.values import whole

if TYPE_CHECKING:
    from trtllm_vattn.tenancy.journal import KeptRequest, State


class Survival:
    """Notes what becomes of requests, and begins with those that another process left.

    A request with a token goes on at its slot, without a prefill; one without is prefilled from its beginning, as is
    one that was preempted. A deadline is not taken over. `complete` gives a request what its parameters ask for beside
    tokens, as a new one's do.

    Attributes
    ----------
    prefilled_again : int
        Requests that had tokens and no slot when they were taken over.
    """

    def __init__(
        self, scheduler: Scheduler, cache: KVCache, left: State, complete: Callable[[RequestState], None]
    ) -> None:
        self._cache = cache
        self._left: dict[int, KeptRequest] = dict(left.requests)
        self._next_number = left.next_number
        self._noted: list[tuple[int, int, int | None, str | None]] = []
        self._known = {number for number, each in left.requests.items() if each.finish_reason is None}
        self._ended = [number for number in left.requests if number not in self._known]
        self._has_begun = False
        slots = {slot.owner: index for index, slot in left.kept_slots().items()}
        self.prefilled_again = 0
        for number in sorted(self._known):
            kept = left.requests[number]
            request = _request(number, kept)
            complete(request)
            scheduler.requests[number] = request
            if number in slots:
                request.slot, request.prefilled, request.known = slots[number], request.length - 1, len(kept.chosen)
                scheduler.decode_next(request)
            else:
                self.prefilled_again += bool(kept.chosen)
                scheduler.waiting.add(request)
        cache.begin_journal(left)

    def numbers(self) -> Iterator[int]:
        """Numbers that no request has or had, of this process or those before it."""
        return itertools.count(self._next_number)

    def check(self, request: RequestState) -> None:
        """Raise ConfigError for a request that cannot be noted."""
        params = request.params
        asked = {
            "n": params.n > 1 or request.group is not None,
            "forced tokens": request.forced is not None,
            "text": request.text is not None,
            "grammars": request.grammar is not None,
            "logprobs": params.logprobs is not None or params.prompt_logprobs is not None,
        }
        if some := [name for name, is_asked in asked.items() if is_asked]:
            raise ConfigError(f"{some[0]} cannot be taken over by another process; leave them out, or keep_s")

    def added(self, request: RequestState) -> None:
        """A request was queued."""
        self._known.add(request.id)
        fields = {"prompt": request.prompt, "max_tokens": request.max_tokens, "priority": request.priority}
        self._cache.note("add", request.id, {**fields, "params": asdict(request.params)})

    def noted(self, event: TokenEvent) -> None:
        """An event became part of a request's record; it is noted before anybody gets it."""
        if event.request in self._known:
            self._noted.append((event.request, event.index, event.token, event.finish_reason))
            if event.finish_reason:
                self._known.discard(event.request)
                self._ended.append(event.request)

    def dropped(self, numbers: Iterable[int]) -> None:
        """Nobody wants these requests any more, nor what they gave: the next process has nothing of them."""
        self.write()
        gone = [number for number in numbers if number in self._known or number in self._ended]
        for number in gone:
            self._left.pop(number, None)
        self._known.difference_update(gone)
        self._ended = [number for number in self._ended if number not in gone]
        if gone:
            self._cache.note("forget", gone)

    def write(self) -> None:
        """Write what was noted."""
        if self._noted:
            noted, self._noted = self._noted, []
            self._cache.note("tokens", noted)

    def begin_step(self, delivered: bool) -> None:
        """A step begins: what earlier ones gave has been taken, where `delivered`."""
        self._has_begun = True
        self.write()
        if delivered and self._ended:
            ended, self._ended = self._ended, []
            self._cache.note("forget", ended)

    def tokens(self) -> dict[int, list[int]]:
        """Tokens of requests that were left, ended ones too."""
        return {number: list(each.chosen) for number, each in self._left.items()}

    def events(self, received: Mapping[int, int] | None) -> list[TokenEvent]:
        """Events of tokens behind those that were received."""
        if self._has_begun:
            raise ConfigError("steps were taken, whose tokens these would be mixed with; ask before the first one")
        if received is None:
            return []
        found = []
        for number, kept in sorted(self._left.items()):
            have = whole("received", received.get(number, 0), 0, len(kept.chosen))
            reason, last = kept.finish_reason, len(kept.chosen) - 1
            by_token = reason in ("stop", "length")
            for index in range(have, last + 1):
                ends = reason if by_token and index == last else None
                found.append(TokenEvent(number, kept.chosen[index], ends, index=index))
            if reason is not None and not by_token:
                found.append(TokenEvent(number, None, reason, index=last + 1))
        return found


def _request(number: int, kept: KeptRequest) -> RequestState:
    settings: dict[str, Any] = kept.settings
    request = RequestState(number, settings["prompt"], SamplingParams(**settings["params"]), settings["max_tokens"])
    request.priority, request.chosen = settings["priority"], list(kept.chosen)
    request.weights_versions = [0] * len(request.chosen)
    return request
