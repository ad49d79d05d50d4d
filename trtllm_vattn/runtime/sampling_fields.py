"""Checks of the sampling parameters that change logits, end a text or ask for more than a token.

What the device keeps of each is of a fixed size, so that graphs are captured once; the limits stand here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.tokens import TEXT, token_ids
from trtllm_vattn.values import described, finite, shown, unicode_text, whole

MOST_LOGPROBS = 20
"""Alternatives of one token; as many as OpenAI's chat endpoint gives."""
MOST_BIASED = 1024
"""Token ids of `logit_bias` and single tokens of `bad_words`, together."""
MOST_BAD_WORDS = 128
"""Of more than one token."""
LONGEST_BAD_WORD = 8
"""Tokens."""
LARGEST_COUNT = (1 << 31) - 1
"""Of tokens and samples."""
LARGEST_FACTOR = 2.0**63
"""Of penalties and biases, without its sign: a float32 has the product of two."""
MOST_SAMPLES = 1024
"""Of one prompt."""
MOST_STOPS = 64
"""Texts that end an output, each of which is looked for with every token."""
MOST_STOP_TOKENS = 4096
LONGEST_BAD_TEXT = 1024
"""Characters of a bad word; it has `LONGEST_BAD_WORD` tokens at most."""
MOST_STOP_IDS = 32
"""Stop tokens of a request with `min_tokens`."""

Put = Callable[[str, object], None]


def check_fields(params: Any, put: Put) -> None:
    """Check and convert the fields of a `SamplingParams`; `put` sets one. Raises ConfigError naming a wrong one."""
    for name, least, most in (
        ("min_p", 0.0, 1.0),
        ("presence_penalty", -2.0, 2.0),
        ("frequency_penalty", -2.0, 2.0),
    ):
        value = finite(name, getattr(params, name))
        if not least <= value <= most:
            raise ConfigError(f"{name} is {value}; it is from {least:g} to {most:g}")
        put(name, value)
    put("repetition_penalty", penalty := finite("repetition_penalty", params.repetition_penalty))
    if not 1 / LARGEST_FACTOR <= penalty <= LARGEST_FACTOR:
        bounds = f"from {1 / LARGEST_FACTOR:g} to {LARGEST_FACTOR:g}"
        raise ConfigError(f"repetition_penalty is {penalty}; it is above 0, {bounds}, and 1 changes nothing")
    put("logit_bias", _biases(params.logit_bias))
    put("bad_words", _bad_words(params.bad_words))
    put("stop", _stops(params.stop))
    put("min_tokens", whole("min_tokens", params.min_tokens, 0, LARGEST_COUNT))
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise ConfigError(f"min_tokens is {params.min_tokens}, and max_tokens {params.max_tokens}; give no more")
    for name in ("logprobs", "prompt_logprobs"):
        if (given := getattr(params, name)) is not None:
            put(name, whole(name, given, 0, MOST_LOGPROBS))
    put("json_schema", _schema(params.json_schema))
    if params.regex is not None:
        if not isinstance(params.regex, str) or not params.regex:
            raise ConfigError(f"regex is {described(params.regex)}; give a regular expression, or None")
        unicode_text("regex", params.regex)
    if params.json_schema is not None and params.regex is not None:
        raise ConfigError("json_schema and regex are both given; one grammar is applied, give one of them")


def check_salt(given: Any) -> None:
    """Raise ConfigError for what is no `cache_salt`."""
    if given is not None and (not isinstance(given, str) or not given):
        raise ConfigError(f"cache_salt is {shown(given)}; give some text, or None for what all may share")


def _biases(given: Any) -> tuple[tuple[int, float], ...]:
    if given is None:
        return ()
    if isinstance(given, Mapping):
        given = tuple(given.items())
    pairs = isinstance(given, Sequence) and all(isinstance(each, Sequence) and len(each) == 2 for each in given)
    if not pairs or isinstance(given, TEXT):
        raise ConfigError(f"logit_bias is {described(given)}; give a mapping of token ids to numbers")
    if len(given) > MOST_BIASED:
        raise ConfigError(f"logit_bias has {len(given)} tokens; at most {MOST_BIASED} are possible")
    ids = token_ids("logit_bias", [token for token, _ in given])
    if len(set(ids)) < len(ids):
        raise ConfigError("logit_bias names a token id twice")
    biases = [finite("a logit_bias", bias) for _, bias in given]
    if wrong := [bias for bias in biases if abs(bias) > LARGEST_FACTOR]:
        raise ConfigError(f"a logit_bias is {wrong[0]}; it is from -{LARGEST_FACTOR:g} to {LARGEST_FACTOR:g}")
    return tuple(zip(ids, biases, strict=True))


def _bad_words(given: Any) -> tuple[str | tuple[int, ...], ...]:
    if not isinstance(given, Sequence) or isinstance(given, TEXT):
        raise ConfigError(f"bad_words is {described(given)}; give a list of texts, or of lists of token ids")
    words: list[str | tuple[int, ...]] = []
    if len(given) > MOST_BIASED + MOST_BAD_WORDS:
        raise ConfigError(f"bad_words holds {len(given)}; at most {MOST_BIASED + MOST_BAD_WORDS} are possible")
    for word in given:
        checked = unicode_text("a bad word", word) if isinstance(word, str) else tuple(token_ids("a bad word", word))
        if not checked:
            raise ConfigError("bad_words holds an empty one; each is a text, or at least one token id")
        if len(checked) > LONGEST_BAD_TEXT:
            kind = "characters" if isinstance(checked, str) else "tokens"
            raise ConfigError(f"a bad word has {len(checked)} {kind}; at most {LONGEST_BAD_WORD} tokens are possible")
        words.append(checked)
    return tuple(words)


def _stops(given: Any) -> tuple[str, ...]:
    listed = (given,) if isinstance(given, str) else () if given is None else given
    if not isinstance(listed, Sequence) or isinstance(listed, TEXT):
        raise ConfigError(f"stop is {described(given)}; give a text, or a list of them")
    if wrong := [each for each in listed if not isinstance(each, str) or not each]:
        raise ConfigError(f"stop holds {shown(wrong[0])}; each is a text of at least one character")
    if len(listed) > MOST_STOPS:
        raise ConfigError(f"stop holds {len(listed)} texts; at most {MOST_STOPS} are looked for")
    return tuple(unicode_text("stop", each) for each in listed)


def _schema(given: Any) -> str | None:
    if given is None:
        return None
    try:
        parsed = json.loads(given) if isinstance(given, str) else given
        text = json.dumps(parsed)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"json_schema is no JSON: {error}") from error
    if not isinstance(parsed, Mapping | bool):
        raise ConfigError(f"json_schema is {described(parsed)}; a JSON schema is an object, or true")
    return text
