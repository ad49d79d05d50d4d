"""Requests that outlive their engine's process: noted in a broker's journal, and taken over from it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.request import RequestState, TokenEvent
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.scheduler import Scheduler
from trtllm_vattn.values import whole

if TYPE_CHECKING:
    from trtllm_vattn.tenancy.journal import Journal, KeptRequest, State

UNSAID = "it failed in the process before this one, whose log says why"
"""Of a request whose error nobody got: the journal has that it failed, and not what went wrong."""


class Survival:
    """Notes what becomes of requests, and begins with those that another process left.

    A request with a token goes on at its slot, without a prefill; one without is prefilled from its beginning, as is
    one that was preempted. A deadline is not taken over. `complete` gives a request what its parameters ask for beside
    tokens, as a new one's do. What a step gives is written by one call, and nothing of it needs the cache's lock.

    Attributes
    ----------
    noted : callable
        Takes the `TokenEvent` of a token behind which its request goes on (`ended` takes the others): it became part of
        the request's record, and is written before anybody gets it. A list's own method, which a step calls for each of
        its tokens.
    prefilled_again : int
        Requests that had tokens and no slot when they were taken over.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        cache: KVCache,
        left: State,
        journal: Journal,
        complete: Callable[[RequestState], None],
    ) -> None:
        self._cache, self._journal = cache, journal
        self.noted = journal.pending.append
        # As they were left: the journal's own go on.
        self._left = {number: replace(kept, chosen=kept.chosen[:]) for number, kept in left.requests.items()}
        self._next_number = left.next_number
        self._ended = [number for number, each in left.requests.items() if each.finish_reason is not None]
        self._has_begun = False
        slots = {slot.owner: index for index, slot in left.slots.items()}
        self.prefilled_again = 0
        for number, kept in sorted(self._left.items()):
            if kept.finish_reason is not None:
                continue
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
        """Raise ConfigError for a request that cannot be noted, and EngineOverloaded for one that there is no room for
        in the journal now."""
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
        self._journal.check_room(_kept(request))

    def added(self, request: RequestState) -> None:
        """A request was queued."""
        self._cache.at_once(self._journal.add, request.id, _kept(request))

    def ended(self, event: TokenEvent, reason: str) -> None:
        """As `noted`, of a request's last event."""
        self._journal.ends.append((event.request, event.index, event.token, reason))
        self._ended.append(event.request)

    def dropped(self, numbers: Iterable[int]) -> None:
        """Nobody wants these requests any more, nor what they gave: the next process has nothing of them."""
        gone = set(numbers)
        for number in gone:
            self._left.pop(number, None)
        self._ended = [number for number in self._ended if number not in gone]
        self._cache.at_once(self._journal.forget, gone)

    def write(self) -> None:
        """Write what was noted."""
        self._journal.flush()

    def end(self) -> None:
        """Nothing outlives this process any more."""
        self._cache.end_journal()

    def begin_step(self, delivered: bool) -> None:
        """A step begins: what earlier ones gave has been taken, where `delivered`."""
        self._has_begun = True
        self.write()
        if delivered and self._ended:
            ended, self._ended = self._ended, []
            self._cache.at_once(self._journal.forget, ended)

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
                why = UNSAID if reason == "error" else None
                found.append(TokenEvent(number, None, reason, error=why, index=last + 1))
        return found


def _kept(request: RequestState) -> KeptRequest:
    # With msgspec, which is an extra.
    from trtllm_vattn.tenancy.journal import KeptRequest

    settings = {"priority": request.priority, "params": asdict(request.params)}
    try:
        return KeptRequest.of(request.prompt, request.max_tokens, settings)
    except UnicodeEncodeError as error:
        raise ConfigError(f"a parameter holds what is no text ({error}), and cannot be noted; change it") from error


def _request(number: int, kept: KeptRequest) -> RequestState:
    settings = kept.decoded()
    try:
        params = SamplingParams(**settings["params"])
    except (TypeError, ConfigError) as error:
        raise ConfigError(
            f"request {number} of the process before this one has parameters that this version does not take ({error});"
            " start that version, or begin anew without keep_s"
        ) from error
    request = RequestState(number, kept.prompt.tolist(), params, kept.max_tokens)
    request.priority, request.chosen = settings["priority"], list(kept.chosen)
    request.weights_versions = [0] * len(request.chosen)
    return request
