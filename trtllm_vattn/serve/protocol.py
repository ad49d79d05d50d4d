"""Bodies of requests as OpenAI's client sends them: what is served, what has no effect, what is refused by name.

Beside OpenAI's fields both endpoints take those of `SamplingParams` that OpenAI has not (`MORE`), by its names.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.sampling_fields import MOST_LOGPROBS
from trtllm_vattn.values import as_whole, shown

ALIKE = ("temperature", "top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty")
"""Fields that are named as in `SamplingParams`."""
MORE = (
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "bad_words",
    "regex",
    "json_schema",
    "cache_salt",
    "retention_priority",
)
"""Fields of `SamplingParams` that OpenAI has not."""
OWN = (
    "model",
    "stream",
    "stream_options",
    "logit_bias",
    "max_tokens",
    "logprobs",
    "priority",
    "response_format",
    "return_token_ids",
)
PATHS = ("/v1/completions", "/v1/chat/completions")
OF_COMPLETIONS = ("prompt", "echo", "best_of", "suffix")
OF_CHAT = ("messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "chat_template_kwargs")
WITHOUT_EFFECT = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "parallel_tool_calls",
)
"""Taken, and of no effect on tokens."""
COMPLETION_TOKENS = 16
"""`max_tokens` of a completion that names none, as OpenAI has it."""


class ApiError(Exception):
    """An error of a request, as OpenAI's bodies have it."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_s = status, message, code, param, retry_s

    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Asked:
    """A request's body, checked as far as that goes without the engine.

    Attributes
    ----------
    prompts : list
        Texts or lists of token ids; of a chat one list.
    token_ids : bool
        Whether choices have their tokens' ids, too (vLLM's ``return_token_ids``).
    """

    prompts: list[Any]
    params: SamplingParams
    is_chat: bool
    stream: bool
    include_usage: bool
    echo: bool
    priority: int
    token_ids: bool


def parse_json(body: bytes) -> dict[str, Any]:
    """A body's object. Raises ApiError."""
    try:
        parsed = json.loads(body)
        if rb"\u" in body:
            json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise ApiError(400, "the body is no JSON: it is not UTF-8") from None
    except UnicodeEncodeError:
        raise ApiError(400, r"the body is no text: it has half of a surrogate pair (\ud800 to \udfff)") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is no JSON: {error}") from None
    except ValueError:
        raise ApiError(400, "the body has a number of more digits than are read; give fewer") from None
    if not isinstance(parsed, dict):
        raise ApiError(400, f"the body is {shown(parsed)}; it is a JSON object")
    return parsed


def completion(body: Mapping[str, Any]) -> Asked:
    """What a body asks of the completions endpoint. Raises ApiError."""
    _refuse_unknown(body, OF_COMPLETIONS)
    if body.get("suffix"):
        raise ApiError(400, "suffix is not served; leave it out", param="suffix")
    if (best := body.get("best_of")) is not None and best != (body.get("n") or 1):
        raise ApiError(400, f"best_of is {shown(best)}; it is not served but as n", param="best_of")
    prompts = _prompts(body.get("prompt"))
    echo = _flag(body, "echo")
    stream, include_usage = _streaming(body)
    if echo and stream:
        raise ApiError(400, "echo and stream are both asked for; ask for one", param="echo")
    logprobs = body.get("logprobs")
    most = COMPLETION_TOKENS if body.get("max_tokens") is None else body["max_tokens"]
    more = {"max_tokens": most, "logprobs": logprobs, "prompt_logprobs": logprobs if echo else None}
    return Asked(
        prompts,
        _params(body, more),
        False,
        stream,
        include_usage,
        echo,
        _priority(body),
        _flag(body, "return_token_ids"),
    )


def chat(body: Mapping[str, Any], tokenizer: Any) -> Asked:
    """What a body asks of the chat endpoint, by a tokenizer's chat template. Raises ApiError."""
    _refuse_unknown(body, OF_CHAT)
    messages, tools = _messages(body.get("messages")), _tools(body.get("tools"))
    choice = body.get("tool_choice")
    if choice not in (None, "none", "auto"):
        raise ApiError(
            400,
            f"tool_choice is {shown(choice)}; none and auto are served, and the model's text is not parsed for calls",
            param="tool_choice",
        )
    if getattr(tokenizer, "chat_template", None) is None:
        raise ApiError(400, "this model's tokenizer has no chat template; use /v1/completions")
    more = _template_options(body.get("chat_template_kwargs"), tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=tools if tools and choice != "none" else None,
            add_generation_prompt=True,
            tokenize=False,
            **more,
        )
    except Exception as error:
        raise ApiError(400, f"the chat template does not take this: {error}", param="messages") from None
    wanted, top = _flag(body, "logprobs"), body.get("top_logprobs")
    if top is not None and as_whole(top) not in range(MOST_LOGPROBS + 1):
        message = f"top_logprobs is {shown(top)}; it is a whole number from 0 to {MOST_LOGPROBS}"
        raise ApiError(400, message, param="top_logprobs")
    if top is not None and not wanted:
        raise ApiError(400, "top_logprobs is given without logprobs; set logprobs to true", param="top_logprobs")
    most = body.get("max_completion_tokens")
    asked = {
        "max_tokens": body.get("max_tokens") if most is None else most,
        "logprobs": (top or 0) if wanted else None,
    }
    stream, include_usage = _streaming(body)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Asked(
        [ids],
        _params(body, asked),
        True,
        stream,
        include_usage,
        False,
        _priority(body),
        _flag(body, "return_token_ids"),
    )


def _refuse_unknown(body: Mapping[str, Any], own: Sequence[str]) -> None:
    known = {*ALIKE, *MORE, *OWN, *own, *WITHOUT_EFFECT}
    unknown = [name for name, value in body.items() if name not in known and value is not None]
    if unknown:
        elsewhere = [path for path, names in zip(PATHS, (OF_COMPLETIONS, OF_CHAT), strict=True) if unknown[0] in names]
        said = f"not served here, but by {elsewhere[0]}" if elsewhere else "not served; leave it out"
        raise ApiError(400, f"{', '.join(unknown)}: {said}", "unknown_parameter", unknown[0])


def _params(body: Mapping[str, Any], more: dict[str, Any]) -> SamplingParams:
    given = {name: body[name] for name in (*ALIKE, *MORE) if body.get(name) is not None}
    # Text is made here, beside the engine, unless that has to look for texts to stop at.
    given = {"temperature": 1.0, **given, **more, "detokenize": bool(given.get("stop"))}
    biases = body.get("logit_bias")
    if biases is not None:
        given["logit_bias"] = _biases(biases)
    wanted = _response_format(body.get("response_format"))
    if wanted is not None:
        given["json_schema"] = wanted
    try:
        return SamplingParams(**given)
    except ConfigError as error:
        raise ApiError(400, str(error), param=field_of(str(error))) from None


def field_of(message: str) -> str | None:
    """The field that a message of the engine begins with."""
    name = message.removeprefix("the ").removeprefix("a ").partition(" ")[0]
    return name if name in (*ALIKE, *MORE, *OWN, "prompt") else None


def _biases(given: Any) -> dict[int, Any]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except (AttributeError, ValueError):
        message = f"logit_bias is {shown(given)}; it is an object of token ids and numbers"
        raise ApiError(400, message, param="logit_bias") from None


def _response_format(given: Any) -> Any:
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    named = given.get("json_schema") if kind == "json_schema" else None
    if isinstance(named, Mapping) and isinstance(named.get("schema"), Mapping):
        return named["schema"]
    message = f"response_format is {shown(given)}; text, json_object, and json_schema with a schema are served"
    raise ApiError(400, message, param="response_format")


def _prompts(given: Any) -> list[Any]:
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if all(as_whole(each) is not None for each in given):
            return [given]
        if all(isinstance(each, str) for each in given) or all(isinstance(each, list) for each in given):
            return given
    message = f"prompt is {shown(given)}; it is a text, a list of texts, token ids, or a list of lists of token ids"
    raise ApiError(400, message, param="prompt")


def _messages(given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given or not all(isinstance(each, dict) for each in given):
        raise ApiError(400, f"messages is {shown(given)}; it is a list of messages, at least one", param="messages")
    for message in given:
        if not isinstance(message.get("role"), str):
            raise ApiError(400, f"a message's role is {shown(message.get('role'))}; it is a text", param="messages")
    return [{**message, "content": _content(message.get("content"))} for message in given]


def _content(given: Any) -> Any:
    """A message's content as text; parts other than text are refused."""
    if given is None or isinstance(given, str):
        return given
    if not isinstance(given, list):
        message = f"a message's content is {shown(given)}; it is a text, or a list of parts"
        raise ApiError(400, message, param="messages")
    for part in given:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else shown(part)
            raise ApiError(400, f"a message has a part of type {kind}; text alone is served", param="messages")
    return "".join(part["text"] for part in given)


def _tools(given: Any) -> list[dict[str, Any]] | None:
    if given is None:
        return None
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        raise ApiError(400, f"tools is {shown(given)}; it is a list of tools", param="tools")
    return given


def _template_options(given: Any, tokenizer: Any) -> dict[str, Any]:
    """What a chat template is given beside messages and tools: its own variables, and nothing of who fills it in."""
    if given is None:
        return {}
    name = "chat_template_kwargs"
    if not isinstance(given, dict):
        raise ApiError(400, f"{name} is {shown(given)}; it is an object", param=name)
    taken = sorted(given.keys() & inspect.signature(tokenizer.apply_chat_template).parameters.keys())
    if taken:
        raise ApiError(400, f"{name} has {', '.join(taken)}, which is the server's to say; leave it out", param=name)
    return given


def _streaming(body: Mapping[str, Any]) -> tuple[bool, bool]:
    stream, options = _flag(body, "stream"), body.get("stream_options")
    name = "stream_options"
    if options is None:
        return stream, False
    if not isinstance(options, Mapping):
        raise ApiError(400, f"{name} is {shown(options)}; it is an object", param=name)
    if not stream:
        raise ApiError(400, f"{name} is given without stream; set stream to true", param=name)
    # Padding against who measures encrypted lengths is not made.
    if unknown := [each for each in options if each not in ("include_usage", "include_obfuscation")]:
        raise ApiError(400, f"{name} has {', '.join(unknown)}: not served; leave it out", "unknown_parameter", name)
    return stream, _flag(options, "include_usage")


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name} is {shown(value)}; it is true or false", param=name)
    return bool(value)


def _priority(body: Mapping[str, Any]) -> int:
    given = body.get("priority")
    value = 0 if given is None else as_whole(given)
    if value is None:
        raise ApiError(400, f"priority is {shown(body['priority'])}; it is a whole number", param="priority")
    return value
