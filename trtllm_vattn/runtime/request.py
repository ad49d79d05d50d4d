"""Requests, what they become while they run, and what comes out.

A request's record (prompt, parameters, the tokens chosen so far, why it ended) is all that is needed to go on with it:
whatever becomes of its slot and its lane, its tokens can be prefilled again.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.errors import ConfigError, SequenceTooLong
from trtllm_vattn.runtime.grammar import Grammar
from trtllm_vattn.runtime.lane_processors import LaneAsks
from trtllm_vattn.runtime.logprobs import TokenLogprob
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.sampling_fields import MOST_STOP_TOKENS
from trtllm_vattn.runtime.text import Text
from trtllm_vattn.runtime.tokens import TEXT, checked_ids, token_ids
from trtllm_vattn.values import described, shown


@dataclass(frozen=True)
class TokenEvent:
    """One token of one request, or its end without a token, as `Engine.step` returns it.

    Attributes
    ----------
    request : int
        The number that `Engine.submit` gave.
    token : int or None
        A token id; None where `finish_reason` is ``error``, ``abort`` or ``deadline``: such an end has no token.
    finish_reason : str or None
        With the last event of a request: ``stop`` after a stop token, ``length`` after the last token that was asked
        for or fits, ``error`` where the request could not go on, ``abort`` where an update of the weights ended it,
        ``deadline`` where its deadline passed first. None before.
    margin : float or None
        The distance between the two largest logits, where the engine was asked to record margins.
    error : str or None
        What went wrong, with ``error``.
    is_forbidden : bool
        With ``error``, whether what went wrong is that the request's own parameters forbid every token that could come
        next.
    index : int
        The token's place in the request's output.
    weights_version : int
        How many updates of the weights were made before this token (`Engine.update_weights`).
    cached_tokens : int
        Of the prompt, whose keys and values were there and not computed.
    branch : int
        Which of `SamplingParams.n` samples it is of; `request` less this is the number that `Engine.submit` gave.
    text : str or None
        What the token adds to the request's text, where it has one (`SamplingParams.detokenize`): nothing where it is
        no whole character yet, or may be the beginning of a stop text.
    logprob : TokenLogprob or None
        The token's, where `SamplingParams.logprobs` asks for it.
    prompt_logprobs : list of TokenLogprob or None, or None
        With the first event, where `SamplingParams.prompt_logprobs` asks for them: one for each token of the prompt,
        None for the first.
    """

    request: int
    token: int | None
    finish_reason: str | None = None
    margin: float | None = None
    error: str | None = None
    index: int = 0
    weights_version: int = 0
    cached_tokens: int = 0
    branch: int = 0
    text: str | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    is_forbidden: bool = False


@dataclass(frozen=True)
class Completion:
    """A finished request: its tokens, why it ended (``stop``, ``length``, ``abort``, ``deadline``, or ``error``, which
    `error` explains; the tokens are those before it), the version of the weights that each token was computed with, how
    many tokens of the prompt were not computed, and which of `SamplingParams.n` samples it is; and its text and
    log-probabilities, where they were asked for, as `TokenEvent` has them."""

    request: int
    prompt_len: int
    tokens: list[int]
    finish_reason: str
    error: str | None = None
    weights_versions: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    index: int = 0
    text: str | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None


@dataclass(frozen=True)
class StepRecord:
    """What one launch cost, in seconds of host time: `steps` decode steps, or a pass with `prefilled` prompt tokens.

    `lanes` sequences got tokens from it: none from a pass in which no prompt was completed and nobody decoded, whose
    `steps` are 0. `wall_s` ends with the tokens on the host. It starts where those of the launch before were, or, where
    none was under way, with the bookkeeping.
    Of `drafted` tokens in a launch with drafts, `accepted` became tokens of requests.
    `kv_s` went to the cache (`prepare_step`, guard) for launches started meanwhile, `ahead_s` to mapping ahead, and for
    `wait_s` the host had nothing to do but wait for the tokens.
    """

    lanes: int
    steps: int
    prefilled: int
    wall_s: float
    kv_s: float
    ahead_s: float
    wait_s: float
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Output:
    """What a request has chosen."""

    chosen: list[int]
    weights_versions: list[int]
    pieces: list[str]
    logprobs: list[TokenLogprob]


@dataclass(eq=False)
class RequestState:
    """A request inside the engine.

    Attributes
    ----------
    params : SamplingParams
        With a seed, where tokens are sampled.
    max_tokens : int
        Tokens to generate at most.
    forced : list of int or None
        Tokens to feed in place of the chosen ones (teacher forcing).
    chosen : list of int
        The output so far.
    finish_reason, error : str or None
        Why it ended, as in `TokenEvent`; None while it has not.
    slot : int
        Its slot in the cache; -1 without one.
    prefilled : int
        Tokens whose K and V are in the cache while a prompt goes in by chunks; reused ones too.
    cached_tokens : int or None
        Tokens of the prompt that were reused when it was first given a slot; None before.
    known : int
        How many tokens it had chosen when it was last given a slot.
    branch, group : int, int or None
        Which of several samples it is; and the request that the first of them, or the request forked, is.
    silent : bool
        Whether nobody gets events of it, but the output at its end.
    given : int
        How many tokens of its output it does not choose again where it is computed anew (`begin_again`): those that it
        was forked with, or that other weights chose.
    priority : int
        Those of higher priority go first.
    deadline, arrived : float
        When it ends, finished or not, and when it came, by the engine's clock.
    """

    id: int
    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    forced: list[int] | None = None
    silent: bool = False
    chosen: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    slot: int = -1
    prefilled: int = 0
    weights_versions: list[int] = field(default_factory=list)
    """Of each chosen token."""
    priority: int = 0
    deadline: float = math.inf
    arrived: float = 0.0
    cached_tokens: int | None = None
    known: int = 0
    branch: int = 0
    group: int | None = None
    forks: int = 0
    """How often it was forked."""
    given: int = 0
    _told: Output | None = None
    """What somebody has of it already, while it is computed anew from its beginning."""
    of_older_weights: bool = False
    """Whether keys and values that are kept of it were computed with weights before the present ones."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """As token ids."""
    grammar: Grammar | None = None
    text: Text | None = None
    pieces: list[str] = field(default_factory=list)
    """Of text, of each chosen token."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of each chosen token, where they are asked for."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    """Of the prompt's first tokens, where they are asked for."""
    _prompt_ids: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def asks(self) -> LaneAsks | None:
        """What its lane is asked for beside tokens."""
        if not self.params.changes_logits and self.params.logprobs is None:
            return None
        return LaneAsks(self.params, self.prompt, self.chosen, self.bad_words, self.grammar)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of its prompt are still to come."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt)

    @property
    def first(self) -> int:
        """The number of the first of its samples."""
        return self.id - self.branch

    @property
    def is_verified(self) -> bool:
        """Whether a token was chosen since it has its slot: what its prompt left there is finite, and all there."""
        return self.slot >= 0 and len(self.chosen) > self.known

    @property
    def decodes_next(self) -> bool:
        """Whether all its tokens but the last, which a decode step is fed, are prefilled, and were suspended so."""
        return self.prefilled == self.length - 1

    @property
    def stored(self) -> np.ndarray:
        """The tokens, int64, whose keys and values are in a verified request's slot: all but the last one chosen, which
        may have been fed."""
        return self.token_ids[:-1]

    # -- computed anew ---------------------------------------------------------------------------------------------

    def begin_again(self) -> None:
        """Forget what was chosen, to choose the same again by the same steps, of which somebody knows the tokens; but
        not what was chosen by keys and values of older weights, which no step gives again."""
        self.restore()
        if self.of_older_weights:
            self.given, self.of_older_weights = len(self.chosen), False
        if len(self.chosen) > self.given:
            self._told = Output([*self.chosen], [*self.weights_versions], [*self.pieces], [*self.logprobs])
            for each in (self.chosen, self.weights_versions, self.pieces, self.logprobs):
                del each[self.given :]

    def restore(self) -> None:
        """Have the output that somebody knows, though not all of it is computed again."""
        told, self._told = self._told, None
        if told is not None and len(told.chosen) > len(self.chosen):
            self.chosen[:], self.weights_versions[:] = told.chosen, told.weights_versions
            self.pieces[:], self.logprobs[:] = told.pieces, told.logprobs

    @property
    def is_chosen_again(self) -> bool:
        """Whether its next token is one that somebody knows."""
        return self._told is not None and len(self.chosen) < len(self._told.chosen)

    @property
    def expected(self) -> int:
        """The next token, where it is chosen again."""
        assert self._told is not None
        return self._told.chosen[len(self.chosen)]

    # -- others like it --------------------------------------------------------------------------------------------

    def branches(self, numbers: Iterator[int]) -> list[RequestState]:
        """Further requests, one for each sample beside this one's, which is the first."""
        params, count = self.params, self.params.n
        self.params, self.group = params.of_branch(0), self.id if count > 1 else None
        return [
            replace(self.anew(next(numbers), params.of_branch(branch)), branch=branch) for branch in range(1, count)
        ]

    def anew(self, number: int, params: SamplingParams) -> RequestState:
        """Another request for the same prompt, with none of this one's tokens. `params` differ from this one's in
        nothing but their seed and whether log-probabilities of the prompt are asked for."""
        return replace(
            self,
            id=number,
            params=params,
            chosen=[],
            weights_versions=[],
            given=0,
            _told=None,
            of_older_weights=False,
            slot=-1,
            prefilled=0,
            cached_tokens=None,
            known=0,
            branch=0,
            forks=0,
            grammar=self.grammar and self.grammar.anew(),
            text=self.text and self.text.anew(),
            pieces=[],
            logprobs=[],
            prompt_logprobs=[None],
        )

    def fork(self, made: RequestState) -> RequestState:
        """`made`, a new request for the same prompt, going on from the tokens that this one has so far."""
        output = self._told if self.is_chosen_again and self._told is not None else self
        return replace(
            made,
            chosen=list(output.chosen),
            weights_versions=list(output.weights_versions),
            given=len(output.chosen),
            pieces=list(output.pieces),
            logprobs=list(output.logprobs),
            silent=False,
            group=self.id if self.group is None else self.group,
            priority=self.priority,
            deadline=self.deadline,
        )

    @property
    def fed(self) -> list[int]:
        """Tokens behind the prompt: the chosen ones, or those forced in their place."""
        return self.chosen if self.forced is None else self.forced[: len(self.chosen)]

    @property
    def last(self) -> int:
        """The last token known so far."""
        if not self.chosen:
            return self.prompt[-1]
        return self.chosen[-1] if self.forced is None else self.forced[len(self.chosen) - 1]

    @property
    def tokens(self) -> list[int]:
        """All tokens known so far; after a preemption they are prefilled again."""
        return self.prompt + self.fed

    @property
    def token_ids(self) -> np.ndarray:
        """`tokens` as int64; a long prompt is made an array once."""
        if self._prompt_ids is None:
            self._prompt_ids = np.array(self.prompt, np.int64)
        fed = self.fed
        return np.concatenate((self._prompt_ids, np.array(fed, np.int64))) if fed else self._prompt_ids

    @property
    def limit(self) -> int:
        """How long the sequence is when its last token is chosen, which is not stored any more."""
        return len(self.prompt) + self.max_tokens - 1

    @property
    def length(self) -> int:
        """How many tokens are known so far."""
        return len(self.prompt) + len(self.chosen)

    @property
    def left(self) -> int:
        """Tokens still wanted."""
        return self.max_tokens - len(self.chosen)

    def end_with(self, token: int) -> str | None:
        """Why the request ends if this is the next token chosen, whatever its text, or None."""
        fed = token if self.forced is None else self.forced[len(self.chosen)]
        if fed in self.params.stop_token_ids:
            return "stop"
        return "length" if self.left == 1 else None

    def event(
        self, token: int, margin: float | None, weights_version: int, logprob: TokenLogprob | None = None
    ) -> TokenEvent:
        """The next token as an event; it is not in the output yet, and may be asked for again."""
        reason, index, text = self.end_with(token), len(self.chosen), None
        if self.grammar is not None and reason != "stop" and self.grammar.ends_with(self.chosen, token):
            reason = "stop"
        if self.text is not None:
            text, stopped = self.text.push(self.chosen, token, reason is not None)
            reason = "stop" if stopped else reason
        prompt_logprobs = self.prompt_logprobs if self.params.prompt_logprobs is not None and not index else None
        cached = self.cached_tokens or 0
        return TokenEvent(
            self.id,
            token,
            reason,
            margin,
            None,
            index,
            weights_version,
            cached,
            self.branch,
            text,
            logprob,
            prompt_logprobs,
        )

    def note(self, event: TokenEvent) -> None:
        """An event's token and text become part of the output; of the newest event it may be done again."""
        if event.logprob is not None:
            self.logprobs[event.index :] = [event.logprob]
        if event.text is not None:
            self.pieces[event.index :] = [event.text]
        if event.token is not None:
            self.weights_versions[event.index :] = [event.weights_version]
            self.chosen[event.index :] = [event.token]

    def end_event(
        self, reason: str, message: str | None, weights_version: int, is_forbidden: bool = False
    ) -> TokenEvent:
        """An end without a token as an event; the request has not ended yet."""
        error = None if message is None else f"request {self.id}: {message}"
        index, text = len(self.chosen), None if self.text is None else self.text.rest()
        return TokenEvent(
            self.id,
            None,
            reason,
            None,
            error,
            index,
            weights_version,
            self.cached_tokens or 0,
            self.branch,
            text,
            is_forbidden=is_forbidden,
        )

    def completion(self) -> Completion:
        """The output of a request that has ended."""
        assert self.finish_reason is not None
        return Completion(
            self.id,
            len(self.prompt),
            self.chosen,
            self.finish_reason,
            self.error,
            self.weights_versions,
            self.cached_tokens or 0,
            self.branch,
            None if self.text is None else "".join(self.pieces),
            None if self.params.logprobs is None else self.logprobs,
            None if self.params.prompt_logprobs is None else self.prompt_logprobs,
        )


def as_prompts(given: Any) -> Sequence[Any]:
    """Prompts out of what `Engine.generate` was given: a sequence of them, or the rows of an array or tensor."""
    advice = "generate takes a list of prompts, each a sequence of token ids, or a text"
    if isinstance(given, TEXT):
        raise ConfigError(f"the prompts are text ({type(given).__name__}); {advice}: for one, [prompt]")
    if isinstance(given, np.ndarray | torch.Tensor):
        if given.ndim < 2:
            raise ConfigError(f"the prompts are an array of shape {tuple(given.shape)}; {advice}: for one, [prompt]")
        return list(given)
    if not isinstance(given, Sequence):
        raise ConfigError(f"the prompts are {described(given)}; {advice}")
    if any(isinstance(each, numbers.Number) for each in given):
        raise ConfigError(f"the prompts are {shown(given)}; {advice}: for a single prompt, [prompt]")
    return given


def as_params(given: Any, count: int) -> Sequence[Any]:
    """Sampling parameters for so many prompts, out of one or a sequence of them."""
    if given is None or isinstance(given, SamplingParams):
        return [given] * count
    if not isinstance(given, Sequence) or isinstance(given, TEXT):
        raise ConfigError(f"the parameters are {described(given)}; give SamplingParams, or one for each prompt")
    if len(given) != count:
        raise ConfigError(f"{count} prompts and {len(given)} sampling parameters; give one for each, or one")
    return given


def make_request(
    number: int,
    prompt: Any,
    params: Any,
    forced: Any,
    cache: KVCache,
    vocab_size: int,
    end_of_text: Sequence[int] = (),
    silent: bool = False,
) -> RequestState:
    """A request out of what a caller gave, everything checked against the vocabulary, the slots and the budget.

    Raises ConfigError, or SequenceTooLong where it can never fit.
    """
    params = SamplingParams() if params is None else params
    if not isinstance(params, SamplingParams):
        raise ConfigError(f"the parameters are {described(params)}; give SamplingParams, or None for the usual ones")
    prompt, prompt_ids = checked_ids("the prompt", prompt, vocab_size)
    if not prompt:
        raise ConfigError("the prompt is empty; at least one token is needed")
    token_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    if (count := len(params.stop_token_ids)) > MOST_STOP_TOKENS:
        raise ConfigError(f"stop_token_ids holds {count} tokens; at most {MOST_STOP_TOKENS} are possible")
    token_ids("logit_bias", [*params.biases], vocab_size)
    if forced is not None:
        forced = token_ids("forced", forced, vocab_size)
        if len(forced) < (params.max_tokens or 1):
            raise ConfigError(
                f"{len(forced)} tokens to force, {params.max_tokens or 1} needed; give as many as max_tokens"
            )
    most = _most_tokens(len(prompt), params.max_tokens, cache)
    if params.max_tokens is None and forced is not None:
        most = min(most, len(forced))
    params = params.seeded().stopping_at(end_of_text)
    return RequestState(number, prompt, params, most, forced, silent, _prompt_ids=prompt_ids)


def stored_tokens(prompt_len: int, max_tokens: int | None, max_seq_len: int) -> int:
    """Tokens of a request that have to lie in its slot: all but the last one. Raises SequenceTooLong where they are
    more than `max_seq_len`."""
    stored = prompt_len + (max_tokens or 1) - 1
    if stored > max_seq_len:
        raise SequenceTooLong(
            f"{_asked(prompt_len, max_tokens)} exceed max_seq_len {max_seq_len}, whose last token is not stored; "
            "shorten the prompt, lower max_tokens, or build the cache with a larger max_seq_len"
        )
    return stored


def _asked(prompt_len: int, wanted: int | None) -> str:
    return f"a prompt of {prompt_len} tokens and {'at least one more' if wanted is None else f'max_tokens {wanted}'}"


def _most_tokens(prompt_len: int, wanted: int | None, cache: KVCache) -> int:
    """How many tokens a request generates at most. The last one is not stored. Raises SequenceTooLong."""
    longest, alone = cache.shape.max_seq_len, cache.longest_alone
    stored = stored_tokens(prompt_len, wanted, longest)
    if stored > alone:
        raise SequenceTooLong(
            f"{_asked(prompt_len, wanted)} take {cache.bytes_of(stored):,} bytes, and the budget has "
            f"{cache.bytes_for_sequences:,} for sequences, enough for {alone} tokens; shorten the prompt, lower "
            f"max_tokens, or {cache.remedy}"
        )
    return min(longest, alone) - prompt_len + 1 if wanted is None else wanted
