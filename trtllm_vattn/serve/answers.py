"""Answers of both endpoints, whole and streamed, out of the engine's events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from trtllm_vattn.runtime.logprobs import TokenLogprob
from trtllm_vattn.runtime.request import TokenEvent
from trtllm_vattn.runtime.text import Text, TokenBytes
from trtllm_vattn.serve.protocol import Asked

DONE = "data: [DONE]\n\n"


def line(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {_json(body)}\n\n"


_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_quoted = json.encoder.encode_basestring
"""A text as JSON."""


@dataclass
class Choice:
    """One sample of one prompt, so far.

    Attributes
    ----------
    decoder : Text or None
        What makes text of tokens, where the engine does not.
    """

    prompt: Sequence[int]
    decoder: Text | None
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    sent: int = 0
    """Characters that `text_offset` counts before the next token."""

    def add(self, events: Sequence[TokenEvent]) -> tuple[str, list[TokenLogprob]]:
        """Take events; returns the text and the log-probabilities that came with them."""
        text, known = "", len(self.logprobs)
        if not self.tokens:
            self.cached, self.prompt_logprobs = events[0].cached_tokens, events[0].prompt_logprobs
        for event in events:
            if event.token is None:
                # It was ended by others: what was held back is text after all.
                text += (event.text or "") if self.decoder is None else self.decoder.rest()
                continue
            if self.decoder is None:
                text += event.text or ""
            else:
                text += self.decoder.push(self.tokens, event.token, event.finish_reason is not None).text
            self.tokens.append(event.token)
            if event.logprob is not None:
                self.logprobs.append(event.logprob)
        self.text += text
        self.finish_reason = events[-1].finish_reason
        return text, self.logprobs[known:]


class Answer:
    """The answer to one request: of sample s of prompt p, the choice p * n + s."""

    def __init__(self, asked: Asked, model: str, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> None:
        self.asked, self._tokenizer = asked, tokenizer
        kind = "chatcmpl" if asked.is_chat else "cmpl"
        self._own = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._prompts = prompts
        self._before = f'{_json(self._head())[:-1]},"choices":['
        self._behind = '],"usage":null}' if asked.include_usage else "]}"
        by_engine = asked.params.detokenize
        decoders = (
            (prompt, None if by_engine else Text(tokenizer)) for prompt in prompts for _ in range(asked.params.n)
        )
        self.choices = [Choice(prompt, decoder) for prompt, decoder in decoders]

    def unfinished(self) -> list[tuple[int, list[TokenEvent]]]:
        """Ends of choices whose streams ended by no event, since somebody aborted their request."""
        ends = enumerate(choice.finish_reason for choice in self.choices)
        return [(place, [TokenEvent(-1, None, "abort")]) for place, reason in ends if reason is None]

    def usage(self) -> dict[str, Any]:
        """Tokens so far. Of a prompt with several samples, the first one's cached tokens."""
        prompt = sum(map(len, self._prompts))
        made = sum(len(choice.tokens) for choice in self.choices)
        cached = sum(choice.cached for choice in self.choices[:: self.asked.params.n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    # -- whole -----------------------------------------------------------------------------------------------------

    def whole(self) -> dict[str, Any]:
        """The body, when all choices have ended."""
        name = "chat.completion" if self.asked.is_chat else "text_completion"
        choices = [self._whole(place, choice) for place, choice in enumerate(self.choices)]
        return {**self._own, "object": name, "choices": choices, "usage": self.usage()}

    def _whole(self, place: int, choice: Choice) -> dict[str, Any]:
        body: dict[str, Any] = {"index": place, "finish_reason": choice.finish_reason}
        if self.asked.token_ids:
            body["token_ids"] = choice.tokens
        if self.asked.is_chat:
            body["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
            body["logprobs"] = self._of_chat(choice.logprobs)
            return body
        text, logprobs = choice.text, list(choice.logprobs)
        before = self._echoed(choice) if self.asked.echo else ""
        if self.asked.echo and choice.prompt_logprobs is not None:
            first = TokenLogprob(choice.prompt[0], float("nan"))
            logprobs = [each or first for each in choice.prompt_logprobs] + logprobs
        body["text"] = before + text
        body["logprobs"] = self._of_completion(choice, logprobs)
        return body

    def _echoed(self, choice: Choice) -> str:
        text: str = self._tokenizer.decode(choice.prompt)
        return text

    # -- streamed --------------------------------------------------------------------------------------------------

    def first(self) -> str:
        """What a stream begins with."""
        if not self.asked.is_chat:
            return ""
        delta = {"role": "assistant", "content": ""}
        return "".join(self._chunk(_json(self._delta(place, delta, None, None))) for place in range(len(self.choices)))

    def more(self, place: int, events: Sequence[TokenEvent]) -> str:
        """What a choice's events add; empty where that is nothing yet."""
        choice = self.choices[place]
        before = len(choice.tokens)
        text, logprobs = choice.add(events)
        reason = choice.finish_reason
        more: dict[str, Any] = {"token_ids": choice.tokens[before:]} if self.asked.token_ids else {}
        if not text and not logprobs and not more and reason is None:
            return ""
        if self.asked.params.logprobs is None and reason is None:
            # Most chunks: written by hand, since there is one for every token of every stream.
            body = f'"delta":{{"content":{_quoted(text)}}}' if self.asked.is_chat else f'"text":{_quoted(text)}'
            ids = f',"token_ids":[{",".join(map(str, more["token_ids"]))}]' if more else ""
            return self._chunk(f'{{"index":{place},{body},"logprobs":null,"finish_reason":null{ids}}}')
        if self.asked.is_chat:
            delta = {"content": text} if text else {}
            return self._chunk(_json({**self._delta(place, delta, self._of_chat(logprobs), reason), **more}))
        wanted = self._of_completion(choice, logprobs)
        return self._chunk(_json({"index": place, "text": text, "logprobs": wanted, "finish_reason": reason, **more}))

    def last(self) -> str:
        """What a stream ends with."""
        usage = {**self._head(), "choices": [], "usage": self.usage()}
        return (line(usage) if self.asked.include_usage else "") + DONE

    def _delta(self, place: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": place, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _chunk(self, choice: str) -> str:
        # All but the choice is always the same.
        return f"data: {self._before}{choice}{self._behind}\n\n"

    def _head(self) -> dict[str, Any]:
        return {**self._own, "object": "chat.completion.chunk" if self.asked.is_chat else "text_completion"}

    # -- log-probabilities -----------------------------------------------------------------------------------------

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self._tokenizer)

    def _token(self, token: int) -> str:
        text: str = self._tokenizer.decode([token])
        return text

    def _of_chat(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self.asked.params.logprobs is None:
            return None

        def one(token: int, value: float) -> dict[str, Any]:
            return {"token": self._token(token), "logprob": value, "bytes": [*self._token_bytes.of(token)]}

        return {
            "content": [
                {**one(each.token, each.logprob), "top_logprobs": [one(*pair) for pair in each.top]}
                for each in logprobs
            ]
        }

    def _of_completion(self, choice: Choice, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        most = self.asked.params.logprobs
        if most is None:
            return None
        tokens = [self._token(each.token) for each in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(choice.sent)
            choice.sent += len(token)
        known = [each.logprob == each.logprob for each in logprobs]
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob if there else None for each, there in zip(logprobs, known, strict=True)],
            "top_logprobs": [
                {self._token(token): value for token, value in each.top} if there else None
                for each, there in zip(logprobs, known, strict=True)
            ]
            if most
            else None,
            "text_offset": offsets,
        }
