"""Text of requests: tokens decoded one by one, and texts that end it, held back until they can no longer match."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from tokenizers.decoders import DecodeStream

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.values import described


def check_tokenizer(tokenizer: Any) -> Any:
    """A fast tokenizer of transformers, or None. Raises ConfigError for another."""
    if tokenizer is not None and not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"tokenizer is {described(tokenizer)}; give a fast tokenizer of transformers (AutoTokenizer)")
    return tokenizer


class Piece(NamedTuple):
    """Text that came with a token; `stopped` says whether a stop text ended the output."""

    text: str
    stopped: bool = False


class Text:
    """Text of one request's output.

    Each call says which tokens there are before; where these are other than those it knows, after an interrupt, it
    begins anew, so a token may be asked for again.

    Parameters
    ----------
    tokenizer
        A fast one of transformers.
    stops : sequence of str
        The text ends before the first of these that appears; the earliest, whichever it is.
    min_tokens : int
        Text of so many tokens is not searched.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._tokenizer, self._stops, self._min_tokens = tokenizer, tuple(stops), min_tokens
        self._begin()

    def _begin(self) -> None:
        self._stream = DecodeStream(skip_special_tokens=True)
        self._known: int | None = 0
        """Tokens that the stream was given; None while it is given one."""
        self._undecoded: list[int] = []
        """Tokens that are no whole characters yet."""
        self._held = ""
        """Decoded, and the beginning of a stop text perhaps."""

    def anew(self) -> Text:
        """For another request."""
        return Text(self._tokenizer, self._stops, self._min_tokens)

    def push(self, before: Sequence[int], token: int, last: bool) -> Piece:
        """What comes with a token behind those before it; with the last one, all that is left."""
        if self._known != len(before):
            self._begin()
            for place, each in enumerate(before):
                self._push(place, each)
        return self._push(len(before), token, last)

    def rest(self) -> str:
        """What was held back, where no token comes any more; it may be asked for again."""
        left: str = self._held + self._tokenizer.decode(self._undecoded, skip_special_tokens=True)
        return left

    def _push(self, place: int, token: int, last: bool = False) -> Piece:
        self._known = None
        self._undecoded.append(token)
        text = self._stream.step(self._tokenizer.backend_tokenizer, token)
        if text is not None:
            self._undecoded.clear()
        elif last:
            text = self._tokenizer.decode(self._undecoded, skip_special_tokens=True)
        self._held += text or ""
        stopped = False
        emitted = len(self._held)
        if self._stops and place >= self._min_tokens:
            found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
            stopped = bool(found)
            emitted = min(found) if found else len(self._held) - (0 if last else self._longest_beginning())
        piece, self._held = self._held[:emitted], self._held[emitted:]
        self._known = place + 1
        return Piece(piece, stopped)

    def _longest_beginning(self) -> int:
        """How many of the last characters held are the beginning of a stop text."""
        most = min(len(self._held), max(map(len, self._stops)) - 1)
        ends = (self._held[-size:] for size in range(most, 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stops)), 0)


@cache
def _bytes_of_characters() -> dict[str, int]:
    """By character, the byte that it stands for in tokens of byte-level BPE."""
    # Whoever has a tokenizer has imported it.
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes that each token of a tokenizer stands for, which may be a part of a character: joined, those of several
    tokens are the UTF-8 of their text.

    Tokens of byte-level BPE and of byte fallback (``<0xE2>``) are undone as the tokenizer's own decoder does it, with
    nothing replaced; of others it is the UTF-8 of the token's text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        decoder = tokenizer.backend_tokenizer.decoder
        state = {} if decoder is None else json.loads(decoder.__getstate__())
        kinds = {each.get("type") for each in state.get("decoders", [state])}
        self._falls_back = "ByteFallback" in kinds
        self._byte_of = _bytes_of_characters() if "ByteLevel" in kinds else {}

    def of(self, token: int) -> bytes:
        """Those of one token; none of a number that the tokenizer has no token for."""
        written = self._tokenizer.convert_ids_to_tokens(token) or ""
        if all(character in self._byte_of for character in written):
            return bytes(self._byte_of[character] for character in written)
        if self._falls_back and (byte := _BYTE_FALLBACK.fullmatch(written)):
            return bytes.fromhex(byte[1])
        text: str = self._tokenizer.decode([token])
        return text.encode()


def text_for(tokenizer: Any, params: SamplingParams, wanted: bool) -> Text | None:
    """A request's text, where it asks for it, or it is wanted otherwise. Raises ConfigError where it needs a tokenizer
    and there is none."""
    if params.stop and params.detokenize is False:
        raise ConfigError("stop is given, and detokenize is False; stop texts are looked for in the text")
    if not (params.detokenize or params.stop or (wanted and params.detokenize is None)):
        return None
    if tokenizer is None:
        what = "stop" if params.stop else "detokenize"
        raise ConfigError(f"{what} needs a tokenizer, which this engine has not; build it with tokenizer=")
    return Text(tokenizer, params.stop, params.min_tokens)


def bad_word_ids(tokenizer: Any, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
    """Token ids of `bad_words`: of a text, as it is and with a space before it. Raises ConfigError where there are
    texts and no tokenizer."""
    words: list[tuple[int, ...]] = []
    for word in params.bad_words:
        if not isinstance(word, str):
            words.append(tuple(word))
            continue
        if tokenizer is None:
            raise ConfigError("bad_words are texts, and this engine has no tokenizer; give token ids, or tokenizer=")
        stripped = word.lstrip()
        texts = dict.fromkeys((stripped, f" {stripped}"))
        words += [tuple(tokenizer.encode(each, add_special_tokens=False)) for each in texts]
    return tuple(dict.fromkeys(word for word in words if word))
