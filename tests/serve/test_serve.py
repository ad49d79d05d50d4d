"""The server by OpenAI's own client: the engine's tokens, its bodies, clients that go away, SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from unittest.mock import Mock

import httpx
import pytest
from tiny_text import VOCAB, save_checkpoint, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

import uvicorn  # noqa: E402

from trtllm_vattn.cache.select import make_cache  # noqa: E402
from trtllm_vattn.cli.engine_flags import engine_options  # noqa: E402
from trtllm_vattn.cli.generate import prompts_of, templated  # noqa: E402
from trtllm_vattn.cli.main import main  # noqa: E402
from trtllm_vattn.cli.parser import build_parser  # noqa: E402
from trtllm_vattn.errors import ConfigError, EngineClosed, VattnError  # noqa: E402
from trtllm_vattn.runtime import engine as of_engine  # noqa: E402
from trtllm_vattn.runtime.async_engine import AsyncEngine  # noqa: E402
from trtllm_vattn.runtime.binding import shape_of  # noqa: E402
from trtllm_vattn.runtime.engine import Engine  # noqa: E402
from trtllm_vattn.runtime.grammar import Grammar  # noqa: E402
from trtllm_vattn.runtime.logprobs import TokenLogprob  # noqa: E402
from trtllm_vattn.runtime.request import TokenEvent  # noqa: E402
from trtllm_vattn.runtime.sampling import SamplingParams  # noqa: E402
from trtllm_vattn.runtime.text import TokenBytes  # noqa: E402
from trtllm_vattn.serve import app, server  # noqa: E402
from trtllm_vattn.serve import metrics as of_metrics  # noqa: E402
from trtllm_vattn.serve.answers import Answer  # noqa: E402
from trtllm_vattn.serve.app import Settings  # noqa: E402
from trtllm_vattn.serve.protocol import chat  # noqa: E402
from trtllm_vattn.serve.server import ServerProcess, configuration, listen, serve  # noqa: E402
from trtllm_vattn.serve.spans import RequestSpan  # noqa: E402
from trtllm_vattn.tenancy.config import TenantConfig  # noqa: E402
from trtllm_vattn.verify.tenants import lending  # noqa: E402
from trtllm_vattn.vmm.host import HostDriver  # noqa: E402
from trtllm_vattn.vmm.wrappers import FaultyDriver  # noqa: E402

KEY, NAME, LENGTH = "a key", "tiny", 256
OWN = copy.deepcopy(tiny_model())
TEXTS = ["the quick brown fox jumps over the lazy dog", "seven eight nine"]


def engine_of(tokenizer: object = None) -> Engine:
    model = copy.deepcopy(OWN)
    cache = make_cache("vattn", shape_of(model, 4, LENGTH), "cpu")
    return Engine(model, cache, compile=False, capture=False, tokenizer=tokenizer or tiny_tokenizer())


@dataclass
class Served:
    engine: AsyncEngine
    url: str
    server: uvicorn.Server
    thread: threading.Thread

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def wait_until_idle(self) -> None:
        with self.engine._changed:
            assert self.engine._changed.wait_for(lambda: self.engine.unfinished == 0, 30)


def start(engine: Engine, **settings: object) -> Served:
    around = AsyncEngine(engine, max_requests=16)
    listening = listen("127.0.0.1", 0)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    config = configuration(around, Settings(NAME, (KEY,), **settings), LENGTH, 30)  # type: ignore[arg-type]
    own = uvicorn.Server(config)
    thread = threading.Thread(target=own.run, args=([listening],), daemon=True)
    thread.start()
    host, port = listening.getsockname()
    return Served(around, f"http://{host}:{port}", own, thread)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    made = start(engine_of(), max_body=10_000)
    yield made
    made.server.should_exit = True
    made.thread.join(30)
    assert not made.thread.is_alive()
    assert made.engine.unfinished == 0


@pytest.fixture(scope="module")
def alone() -> Iterator[Engine]:
    with engine_of() as engine:
        yield engine


def greedy(engine: Engine, prompt: object, count: int = 12) -> str:
    (done,) = engine.generate([prompt], SamplingParams(max_tokens=count, detokenize=True))  # type: ignore[list-item]
    assert done.text is not None
    return done.text


def test_completions_are_the_engines(served: Served, alone: Engine) -> None:
    client = served.client()
    wanted = [greedy(alone, text) for text in TEXTS]
    first = client.completions.create(model=NAME, prompt=TEXTS[0], max_tokens=12, temperature=0)
    assert first.object == "text_completion"
    assert first.choices[0].text == wanted[0]
    assert first.choices[0].finish_reason in ("stop", "length")
    tokens = tiny_tokenizer()(TEXTS[0])["input_ids"]
    assert first.usage.prompt_tokens == len(tokens)
    assert first.usage.total_tokens == len(tokens) + first.usage.completion_tokens
    both = client.completions.create(model=NAME, prompt=TEXTS, max_tokens=12, temperature=0, n=1)
    assert [choice.text for choice in both.choices] == wanted
    assert [choice.index for choice in both.choices] == [0, 1]
    long = " ".join(TEXTS * 6)
    usages = [client.completions.create(model=NAME, prompt=long, max_tokens=2).usage for _ in range(2)]
    # What the first request left is used again.
    assert [usage.prompt_tokens_details.cached_tokens > 0 for usage in usages] == [False, True]
    by_ids = client.completions.create(model=NAME, prompt=tokens, max_tokens=12, temperature=0)
    assert by_ids.choices[0].text == wanted[0]
    several = client.completions.create(model=NAME, prompt=TEXTS[1], max_tokens=5, n=3, seed=1, stop="zz")
    assert len(several.choices) == 3
    assert len(client.completions.create(model=NAME, prompt="one", temperature=0).choices[0].text) > 0


def test_streams_are_the_whole_in_pieces(served: Served, alone: Engine) -> None:
    client = served.client()
    options = {"model": NAME, "max_tokens": 12, "temperature": 0, "stream": True}
    options["stream_options"] = {"include_usage": True}
    chunks = list(client.completions.create(prompt=TEXTS, **options))
    texts = ["", ""]
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [greedy(alone, text) for text in TEXTS]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 2
    assert len({chunk.id for chunk in chunks}) == 1
    messages = [{"role": "user", "content": TEXTS[0]}]
    whole = client.chat.completions.create(model=NAME, messages=messages, max_tokens=12, temperature=0)
    pieces = list(client.chat.completions.create(messages=messages, **options))
    assert pieces[0].choices[0].delta.role == "assistant"
    said = "".join(each.choices[0].delta.content or "" for each in pieces if each.choices)
    assert said == whole.choices[0].message.content
    assert [each.choices[0].finish_reason for each in pieces if each.choices][-1] == whole.choices[0].finish_reason
    assert pieces[-1].usage.total_tokens == whole.usage.total_tokens


def test_chat_goes_through_the_template(served: Served, alone: Engine) -> None:
    client, tokenizer = served.client(), tiny_tokenizer()
    messages = [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
    ]
    prompt = "<system>brief\n<user>one two\n<assistant>"
    got = client.chat.completions.create(model=NAME, messages=messages, max_completion_tokens=12, temperature=0)
    assert got.choices[0].message.content == greedy(alone, tokenizer(prompt)["input_ids"])
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    more = client.chat.completions.create(
        model=NAME, messages=messages, max_tokens=2, temperature=0, tools=[tool], tool_choice="auto"
    )
    assert more.usage.prompt_tokens == len(tokenizer(f"tools: 1\n{prompt}")["input_ids"])
    none = client.chat.completions.create(
        model=NAME, messages=messages, max_tokens=2, temperature=0, tools=[tool], tool_choice="none"
    )
    assert none.usage.prompt_tokens == got.usage.prompt_tokens


def test_log_probabilities_have_openais_form(served: Served, alone: Engine) -> None:
    client, tokenizer = served.client(), tiny_tokenizer()
    (done,) = alone.generate([TEXTS[1]], SamplingParams(max_tokens=4, logprobs=2, prompt_logprobs=2))
    logprobs, of_prompt = done.logprobs or [], done.prompt_logprobs or []
    got = client.completions.create(model=NAME, prompt=TEXTS[1], max_tokens=4, temperature=0, logprobs=2, echo=True)
    said = got.choices[0].logprobs
    assert said.tokens == [tokenizer.decode([token]) for token in tokenizer(TEXTS[1])["input_ids"] + done.tokens]
    assert got.choices[0].text == TEXTS[1] + tokenizer.decode(done.tokens)
    wanted = [None if each is None else each.logprob for each in (*of_prompt, *logprobs)]
    assert said.token_logprobs[0] is None
    assert said.token_logprobs[1:] == pytest.approx(wanted[1:], abs=1e-4)
    # By text, in which tokens may be alike.
    assert 1 <= len(said.top_logprobs[-1]) <= 2
    assert said.text_offset[:2] == [0, len(said.tokens[0])]
    chat = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "x"}],
        max_tokens=3,
        logprobs=True,
        top_logprobs=2,
        temperature=0,
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == chat.usage.completion_tokens
    assert all(
        len(each.top_logprobs) == 2 and bytes(each.bytes).decode(errors="replace") == each.token for each in content
    )


def test_bytes_of_parts_of_a_character_make_it_when_joined() -> None:
    tokenizer, text = tiny_tokenizer(), "the fox… 日本 🦊<end>"
    tokens = tokenizer(text)["input_ids"]
    body = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 1}
    answer = Answer(chat(body, tokenizer), NAME, tokenizer, [[1]])
    events = [
        TokenEvent(0, token, index=place, logprob=TokenLogprob(token, -1.0, ((token, -1.0),)), text="")
        for place, token in enumerate(tokens)
    ]
    answer.choices[0].add(events)
    content = answer.whole()["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(each["bytes"]) for each in content).decode() == text
    assert any(each["token"] == "\ufffd" and len(each["bytes"]) == 1 for each in content)
    assert all(each["top_logprobs"][0]["bytes"] == each["bytes"] for each in content)


def test_bytes_of_byte_fallback_and_of_plain_tokens() -> None:
    vocab = {"<unk>": 0, "<0xE2>": 1, "<0x82>": 2, "<0xAC>": 3, "\u2581a": 4, "é": 5}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    found = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert b"".join(map(found.of, (1, 2, 3, 4, 5))).decode() == "€ aé"
    assert [found.of(1), found.of(99)] == [b"\xe2", b""]
    # Of a tokenizer without bytes, such a token is what it says.
    backend.decoder = decoders.Fuse()
    assert TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend)).of(1) == b"<0xE2>"


def test_grammars_by_response_format(served: Served) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 22]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    got = served.client().chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "a number"}],
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        extra_body={"repetition_penalty": 1.3, "top_k": 50},
    )
    if got.choices[0].finish_reason == "stop":
        assert json.loads(got.choices[0].message.content)["n"] in (1, 22)
    by_regex = served.client().completions.create(model=NAME, prompt="x", extra_body={"regex": "(yes|no)"})
    assert by_regex.choices[0].text in ("yes", "no")


@pytest.mark.parametrize(
    ("status", "said", "options"),
    [
        (404, "no model 'other'; this server has 'tiny'", {"model": "other"}),
        (400, "temperature is -1", {"temperature": -1}),
        (400, "nonsense: not served", {"extra_body": {"nonsense": 1}}),
        (400, "messages: not served here, but by /v1/chat/completions", {"extra_body": {"messages": []}}),
        (400, "prompt is 3", {"prompt": 3}),
        (400, "the prompt has token ids outside", {"prompt": [9999]}),
        (400, "the prompt is empty", {"prompt": ""}),
        (400, "exceed max_seq_len 256", {"max_tokens": 1000}),
        (400, "max_tokens is 0", {"max_tokens": 0}),
        (400, "best_of is 3", {"best_of": 3}),
        (400, "suffix is not served", {"suffix": "x"}),
        (400, "500 samples are asked for; at most 128", {"n": 500}),
        (400, "logit_bias is", {"logit_bias": {"x": 1}}),
        (400, "response_format is", {"extra_body": {"response_format": {"type": "xml"}}}),
        (400, "echo and stream are both asked for", {"echo": True, "stream": True}),
        (400, "the grammar is not possible", {"extra_body": {"regex": "(("}}),
        (413, "the body is longer than 10,000 bytes", {"prompt": "x" * 20_000}),
    ],
)
def test_errors_are_openais(served: Served, status: int, said: str, options: dict) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        served.client().completions.create(**{"model": NAME, "prompt": "one", **options})
    assert raised.value.status_code == status
    assert said in raised.value.body["message"]
    assert raised.value.body["type"] == "invalid_request_error"
    assert served.engine.unfinished == 0


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (
            "its bad_words and min_tokens and regex together forbid",
            {"regex": "ab*", "bad_words": ["b"], "min_tokens": 3},
        ),
        ("its bad_words and regex together forbid", {"regex": "abc+", "bad_words": ["c"]}),
        ("its bad_words forbid", {"bad_words": [[token] for token in range(VOCAB)]}),
        ("its bad_words and json_schema together forbid", {"json_schema": {"enum": [12]}, "bad_words": ["2"]}),
        ("its grammar: ", {"regex": "a*"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_a_request_that_comes_to_forbid_every_token_is_told_so_by_400(
    served: Served, chat: bool, stream: bool, said: str, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    if "grammar" in said:
        # As of one that its library gives up in the middle.
        monkeypatch.setattr(Grammar, "error", property(lambda self: "too much" if self._consumed else None))
    client = served.client()
    create = client.chat.completions.create if chat else client.completions.create
    asked = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    reasons: list[str | None] = []

    def ask() -> None:
        got = create(model=NAME, max_tokens=20, stream=stream, extra_body=options, **asked)
        reasons.extend(chunk.choices[0].finish_reason for chunk in got)

    with pytest.raises(openai.APIError) as raised:
        ask()
    assert not any(reasons)
    # Of one that its fields leave some tokens, these were streamed.
    assert not reasons or stream
    # In a stream the status was sent before.
    assert isinstance(raised.value, openai.BadRequestError) is not stream
    assert said in raised.value.body["message"]
    assert (raised.value.type, raised.value.code) == ("invalid_request_error", "no_token_allowed")
    served.wait_until_idle()


@pytest.mark.parametrize("by", ["update", "abort"])
@pytest.mark.parametrize("stop", [None, "zz"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_a_request_that_the_operator_ends_is_answered_by_the_text_so_far(
    served: Served, monkeypatch: pytest.MonkeyPatch, chat: bool, stream: bool, stop: str | None, by: str
) -> None:
    """Some of its prompts or samples are ended in the middle, others before they begin."""
    engine, seen = served.engine._engine, list[TokenEvent]()
    step = engine.step

    def ended_in_the_middle() -> list[TokenEvent]:
        events = step()
        seen.extend(events)
        # All have come, and four of them have tokens.
        if len(served.engine._running) == 6 and len(seen) >= 8 and not any(event.finish_reason for event in seen):
            if by == "update":
                engine.update_weights(OWN.state_dict(), running="abort")
            else:
                for number in [*served.engine._running]:
                    served.engine.abort_soon(number)
        return events

    monkeypatch.setattr(engine, "step", ended_in_the_middle)
    client = served.client()
    create = client.chat.completions.create if chat else client.completions.create
    asked = {"messages": [{"role": "user", "content": "x"}], "n": 6} if chat else {"prompt": ["x"] * 6}
    got = create(model=NAME, max_tokens=200, stream=stream, stop=stop, extra_body={"ignore_eos": True}, **asked)
    reasons, texts = [None] * 6, [""] * 6
    for choice in (choice for each in (got if stream else [got]) for choice in each.choices):
        part = (choice.delta if stream else choice.message) if chat else choice
        texts[choice.index] += (part.content if chat else part.text) or ""
        reasons[choice.index] = choice.finish_reason
    assert reasons == ["abort"] * 6
    assert any(texts)
    assert not all(texts)
    served.wait_until_idle()


def test_logits_that_are_none_are_the_servers_error(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_engine.Engine, "_forbidden", lambda *_: None)
    with pytest.raises(openai.InternalServerError, match="its logits are NaN or infinite"):
        served.client().completions.create(
            model=NAME, prompt="x", extra_body={"bad_words": [[token] for token in range(VOCAB)]}
        )


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ("messages is []", {"messages": []}),
        (
            "a message has a part of type image_url",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        ),
        ("tool_choice is 'required'", {"tool_choice": "required"}),
        ("top_logprobs is given without logprobs", {"top_logprobs": 2}),
        ("top_logprobs is 21", {"logprobs": True, "top_logprobs": 21}),
        ("stream_options is given without stream", {"stream_options": {"include_usage": True}}),
        ("stream_options has x: not served", {"stream": True, "extra_body": {"stream_options": {"x": 1}}}),
        ("stream is 1; it is true or false", {"extra_body": {"stream": 1}}),
        ("tools is 3", {"extra_body": {"tools": 3}}),
        ("a message's role is None", {"messages": [{"content": "x"}]}),
        ("a message's content is 3", {"messages": [{"role": "user", "content": 3}]}),
        (
            "chat_template_kwargs has chat_template, tokenize, which is the server's to say",
            {"extra_body": {"chat_template_kwargs": {"tokenize": True, "chat_template": "x", "more": 1}}},
        ),
        ("chat_template_kwargs is [1]", {"extra_body": {"chat_template_kwargs": [1]}}),
        ("stream_options is 3", {"extra_body": {"stream_options": 3}}),
        ("priority is 'x'", {"extra_body": {"priority": "x"}}),
    ],
)
def test_what_chat_cannot_do_is_refused_by_name(served: Served, said: str, options: dict) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        served.client().chat.completions.create(
            **{"model": NAME, "messages": [{"role": "user", "content": "x"}], **options}
        )
    assert said in raised.value.body["message"]


def test_keys_paths_and_bodies_that_are_none(served: Served) -> None:
    with pytest.raises(openai.AuthenticationError, match="no such API key"):
        served.client("another").models.list()
    head = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=served.url, headers=head) as client:
        for method, path, status, said in (
            ("GET", "/v1/nothing", 404, "nothing is served at /v1/nothing; served are /health, /metrics"),
            ("GET", "/v1/completions", 405, "GET is not served at /v1/completions; use POST"),
            ("OPTIONS", "/v1/chat/completions", 405, "use POST"),
        ):
            answer = client.request(method, path)
            assert answer.status_code == status
            assert said in answer.json()["error"]["message"]
        for body in ("{", "[]", "[" * 5000):
            answer = client.post("/v1/completions", content=body)
            assert answer.status_code == 400
            assert "the body is" in answer.json()["error"]["message"]


def test_wrong_fields_are_told_by_name_and_none_is_left_out(served: Served) -> None:
    own = {"model": NAME, "prompt": "one", "max_tokens": 2}
    with httpx.Client(base_url=served.url, headers={"Authorization": f"Bearer {KEY}"}) as client:
        for more, param in (
            ({"prompt": ""}, "prompt"),
            ({"prompt": [9999]}, "prompt"),
            ({"max_tokens": 1000}, "prompt"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"logit_bias": {"9999": 1}}, "logit_bias"),
            ({"seed": "x"}, "seed"),
        ):
            answer = client.post("/v1/completions", json={**own, **more})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        for body, said in (
            (rb'{"prompt": "\ud800"}', "half of a surrogate pair"),
            (b'{"prompt": "\xff"}', "it is not UTF-8"),
            (b'{"seed": ' + b"9" * 5000 + b"}", "more digits than are read"),
        ):
            answer = client.post("/v1/completions", content=body)
            assert answer.status_code == 400
            assert said in answer.json()["error"]["message"]
        nothing = {"model": None, "stop": None, "stream": None, "n": None, "logprobs": None}
        answer = client.post("/v1/completions", json={**own, **nothing, "prompt": "x\U0001f600"})
        assert answer.json()["usage"]["completion_tokens"] > 0
        assert client.head("/health").status_code == 200


def test_a_client_that_does_not_read_holds_up_nobody_and_loses_nothing(served: Served, alone: Engine) -> None:
    # More than the connection's buffers hold: each token with its alternatives.
    more = {"prompt": "one", "max_tokens": 200, "logprobs": 20, "ignore_eos": True, "temperature": 0}
    body = json.dumps({**more, "stream": True, "return_token_ids": True})
    request = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n"
    host, port = served.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(f"{request}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        assert served.client().completions.create(model=NAME, prompt="one", max_tokens=3).choices
        # The slow one's request ends, too, and its memory is others'.
        served.wait_until_idle()
        while not (slow := [each for each in served.server.server_state.connections if each.flow.write_paused]):
            assert httpx.get(f"{served.url}/health").status_code == 200
        assert slow[0].transport.get_write_buffer_size() < 300_000
        got = b""
        while part := connection.recv(1 << 16):
            got += part
    lines = [json.loads(line[6:]) for line in got.splitlines() if line.startswith(b"data: {")]
    tokens = [token for line in lines for token in line["choices"][0]["token_ids"]]
    (done,) = alone.generate(["one"], SamplingParams(max_tokens=200, ignore_eos=True))
    assert tokens == done.tokens
    assert b"data: [DONE]" in got


def test_models_health_and_metrics(served: Served) -> None:
    client = served.client()
    (model,) = client.models.list().data
    assert (model.id, client.models.retrieve(NAME).id) == (NAME, NAME)
    client.completions.create(model=NAME, prompt="one", max_tokens=3)
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    text = httpx.get(f"{served.url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["vattn_generated_tokens_total"]) >= 3
    assert float(values["vattn_running"]) == 0
    assert float(values["vattn_kv_budget_bytes"]) > 0
    assert float(values["vattn_time_to_first_token_seconds_count"]) >= 1


def test_each_token_counts_of_several_that_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 1.06, 1.14])
    monkeypatch.setattr(of_metrics, "perf_counter", lambda: next(times))
    metrics = of_metrics.Metrics(Mock(spec=AsyncEngine))
    timer = metrics.timer(RequestSpan("x", NAME, {}))
    timer.tokens([(0, 2), (1, 1)])
    timer.tokens([(0, 3)])
    timer.tokens([(0, 1), (1, 2)])
    found = {(each.name, each.labels.get("le")): each.value for each in metrics.between.metric().samples}
    name = "vattn_inter_token_seconds"
    # Three by 0.02 s, one by 0.08 s, two by 0.07 s.
    assert found[f"{name}_sum", None] == pytest.approx(0.28)
    assert [found[f"{name}_bucket", le] for le in ("0.01", "0.03", "0.05", "0.075", "0.1")] == [0, 3, 3, 5, 6]
    assert found[f"{name}_count", None] == 6
    assert metrics.generated == 9


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_cancels_its_request(served: Served, stream: bool) -> None:
    body = json.dumps({"model": NAME, "prompt": "one", "max_tokens": 240, "stream": stream, "ignore_eos": True})
    request = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    )
    host, port = served.url.removeprefix("http://").split(":")
    # Nothing comes that could be sent: it is the connection's end that is seen.
    asyncio.run(served.engine.pause())
    try:
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(request.encode())
            if stream:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
            while not asyncio.run(served.engine.call(lambda engine: len(engine.scheduler.requests))):
                pass
        served.wait_until_idle()
        assert not asyncio.run(served.engine.call(lambda engine: len(engine.scheduler.requests)))
    finally:
        asyncio.run(served.engine.resume())


def test_a_request_that_does_not_come_whole_in_time_is_408() -> None:
    made = start(engine_of(), read_s=0.3)
    with socket.create_connection(("127.0.0.1", int(made.url.rpartition(":")[2])), timeout=30) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 99\r\n\r\n"
        client.sendall(head.encode() + b"{")
        got = b"".join(iter(lambda: client.recv(65536), b""))
    assert got.startswith(b"HTTP/1.1 408 ")
    assert json.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
    made.server.should_exit = True
    made.thread.join(30)
    assert made.engine.unfinished == 0


def test_flags_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[object] = []
    monkeypatch.setattr(server, "serve", lambda _, settings, *rest: got.append(settings))
    flags = ["--device", "cpu", "--max-body", "1KiB", "--read-timeout-s", "7.5", "--api-key", KEY.replace(" ", "-")]
    assert main(["serve", "--model", "x", "--name", NAME, *flags]) == 0
    assert got == [Settings(NAME, ("a-key",), 1024, read_s=7.5)]


def test_more_than_the_engine_takes_is_429(served: Served) -> None:
    with pytest.raises(openai.RateLimitError, match="as many as are taken; try again later") as raised:
        served.client().completions.create(model=NAME, prompt=["one"] * 20, max_tokens=200)
    assert raised.value.response.headers["retry-after"] == "1"
    served.wait_until_idle()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> SimpleQueue[tuple[str, int]]:
    """The address of what `serve` serves, and the number of its server's process, once it does."""
    served: SimpleQueue[tuple[str, int]] = SimpleQueue()
    where: list[str] = []
    wait = ServerProcess.wait

    def listening(host: str, port: int) -> socket.socket:
        made = listen(host, port)
        where.append("http://{}:{}/v1".format(*made.getsockname()))
        return made

    def waiting(self: ServerProcess) -> int:
        served.put((where[0], self.pid))
        return wait(self)

    monkeypatch.setattr(server, "listen", listening)
    monkeypatch.setattr(ServerProcess, "wait", waiting)
    return served


SERVE = (
    "127.0.0.1",
    0,
    30.0,
    10,
    # As long as the model has positions, as the command asks for where no flag does.
    {"device": "cpu", "max_seqs": 2, "max_seq_len": None, "compile": False, "capture": False},
)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's process that does not import torch again, which takes seconds."""
    monkeypatch.setattr(server, "START", "fork")


FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def test_sigterm_drains_and_ends(
    checkpoint: Path, told: SimpleQueue[tuple[str, int]], capfd: pytest.CaptureFixture[str], alone: Engine
) -> None:
    got: list[str] = []
    longest: list[int] = []

    def use() -> None:
        client = openai.OpenAI(base_url=told.get()[0], api_key="none", max_retries=0, timeout=60)
        longest.append(client.models.retrieve(NAME).max_model_len)  # type: ignore[attr-defined]
        options = {"max_tokens": 60, "temperature": 0, "extra_body": {"ignore_eos": True}}
        for place, chunk in enumerate(client.completions.create(model=NAME, prompt="one", stream=True, **options)):
            got.append(chunk.choices[0].text)
            if place == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    using = threading.Thread(target=use)
    using.start()
    handler = signal.getsignal(signal.SIGTERM)
    serve(str(checkpoint), Settings(NAME), *SERVE)
    assert signal.getsignal(signal.SIGTERM) == handler
    using.join(30)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    assert "".join(got) == alone.generate(["one"], params)[0].text
    assert longest == [json.loads((checkpoint / "config.json").read_text())["max_position_embeddings"]]
    assert "tiny at http://127.0.0.1:" in capfd.readouterr().out


@FORKS
@pytest.mark.usefixtures("forked")
def test_a_server_that_is_killed_ends_the_engine_and_is_told(
    checkpoint: Path, told: SimpleQueue[tuple[str, int]]
) -> None:
    killing = threading.Thread(target=lambda: os.kill(told.get()[1], signal.SIGKILL))
    killing.start()
    with pytest.raises(VattnError, match=f"the server's process ended with code {-signal.SIGKILL}"):
        serve(str(checkpoint), Settings(NAME), *SERVE)
    killing.join()


@FORKS
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_before_uvicorn_listens_to_signals_ends_the_server(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = uvicorn.Server.run

    def signalled(self: uvicorn.Server, sockets: list[socket.socket]) -> None:
        os.kill(os.getpid(), number)
        run(self, sockets)

    monkeypatch.setattr(uvicorn.Server, "run", signalled)
    process = ServerProcess(listen("127.0.0.1", 0), Settings(NAME), 5.0)
    try:
        process._connection.send((tiny_tokenizer(), LENGTH))
        process._process.join(20)
        assert process._process.exitcode == 0
    finally:
        process._process.kill()
        process.close()


@FORKS
@pytest.mark.usefixtures("forked")
def test_a_servers_process_that_ends_before_it_serves_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "run_server", lambda *_: os._exit(7))
    engine = AsyncEngine(engine_of())
    try:
        with (
            ServerProcess(listen("127.0.0.1", 0), Settings(NAME), 5.0) as process,
            pytest.raises(VattnError, match="the server's process ended with code 7 before it served"),
        ):
            process.begin(engine, LENGTH)
    finally:
        engine.close()


def test_a_model_without_a_tokenizer_or_a_port_that_is_taken_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        assert main(["serve", "--model", "tiny-llama", "--port", str(port)]) == 2
        said = "nothing can listen there: Address already in use; give another --host or --port (0 is a free one)"
        assert capsys.readouterr().err == f"trtllm-vattn: 127.0.0.1:{port}: {said}\n"
    with engine_of() as engine:
        engine.tokenizer = None
        around = AsyncEngine(engine)
        with pytest.raises(ConfigError, match="tiny has no tokenizer"):
            configuration(around, Settings(NAME), LENGTH, 1)
        around.close()


def test_generate_prints_texts(
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    alone: Engine,
) -> None:
    # Sequences are as long as the model has positions, which are fewer than the usual length.
    flags = ["--device", "cpu", "--max-seqs", "2", "--max-tokens", "9"]
    assert main(["generate", "--model", str(checkpoint), *flags, "--raw", "one", "two three"]) == 0
    captured = capsys.readouterr()
    for number, prompt in enumerate(("one", "two three")):
        assert f"[{number}] {greedy(alone, prompt, 9)}\n" in captured.out
    assert "tokens/s; KV memory" in captured.err
    said = [record.getMessage() for record in caplog.records if record.name == "trtllm_vattn.runtime.startup"]
    assert said[:3] == [
        f"loading {checkpoint} on cpu",
        "capturing decode steps of 2 sizes",
        "capturing passes of prompts",
    ]
    assert re.fullmatch(r"loaded in .* captured graphs in .* s; .* MiB for keys and values", said[3])
    assert main(["generate", "--model", str(checkpoint), "--file", "x", "y"]) == 2
    assert "give one of them" in capsys.readouterr().err
    # Before anything is loaded.
    monkeypatch.setattr(of_engine, "_load", lambda *_: pytest.fail("it was loaded"))
    assert main(["generate", "--model", str(checkpoint), *flags, "--max-tokens", "2000", "--raw", "one"]) == 2
    assert "and max_tokens 2000 exceed max_seq_len 1024" in capsys.readouterr().err
    monkeypatch.undo()
    # In memory that a broker lends, and by the name that its operator knows.
    with contextlib.closing(HostDriver()) as driver, lending(driver, 64 << 20, checkpoint.parent / "socket") as broker:
        flags += ["--broker", str(broker.path), "--tenant", "chat"]
        assert main(["generate", "--model", str(checkpoint), *flags, "--raw", "one"]) == 0
    assert greedy(alone, "one", 9) in capsys.readouterr().out
    parsed = build_parser(["generate"], "0").parse_args(["generate", "--model", "x", *flags])
    assert engine_options(parsed)["broker"] == TenantConfig(str(broker.path), "chat")
    assert main(["generate", "--model", str(checkpoint), "--tenant", "chat", "one"]) == 2
    assert "give --broker its socket" in capsys.readouterr().err


@FORKS
@pytest.mark.usefixtures("forked")
def test_a_server_drafts_and_stores_eight_bits_where_flags_ask_for_it(
    checkpoint: Path, told: SimpleQueue[tuple[str, int]]
) -> None:
    said: list[str] = []

    def use() -> None:
        url = told.get()[0]
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        done = client.completions.create(
            model=str(checkpoint), prompt="one " * 8, max_tokens=20, extra_body={"ignore_eos": True}
        )
        said.append(str(done.usage.completion_tokens))
        said.append(httpx.get(f"{url.removesuffix('/v1')}/metrics").text)
        os.kill(os.getpid(), signal.SIGTERM)

    using = threading.Thread(target=use)
    using.start()
    own = ["--speculative-config", json.dumps({"model": str(checkpoint)}), "--kv-cache-dtype", "fp8"]
    sizes = ["--device", "cpu", "--port", "0", "--max-seqs", "1", "--max-seq-len", "128"]
    assert main(["serve", "--model", str(checkpoint), *sizes, *own]) == 0
    using.join(30)
    assert said[0] == "20"
    # How many pay is a matter of what steps cost.
    assert 'vattn_draft_tokens_total{what="accepted"}' in said[1]


class Terminal(io.StringIO):
    """Standard input, where somebody types."""

    def isatty(self) -> bool:
        return True


PROMPTED = "the prompt is read from here; end it with Ctrl-D\n"


def test_prompts_come_from_a_file_or_standard_input_and_through_the_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts").write_text("one\n\ntwo\n")

    def prompts(*given: str, stdin: str = "") -> list[str]:
        arguments = ["generate", "--model", "x", *given]
        return prompts_of(build_parser(arguments, "0").parse_args(arguments), io.StringIO(stdin))

    assert prompts("--file", str(tmp_path / "prompts")) == ["one", "two"]
    assert prompts(stdin="one\ntwo\n") == ["one\ntwo"]
    assert not capsys.readouterr().err
    for given, said in (([], PROMPTED), (["one"], "")):
        arguments = ["generate", "--model", "x", *given]
        assert prompts_of(build_parser(arguments, "0").parse_args(arguments), Terminal("one\n")) == ["one"]
        assert capsys.readouterr().err == said
    for given in ([], [""]):
        with pytest.raises(ConfigError, match="there is no prompt, or an empty one"):
            prompts(*given)
    assert templated(tiny_tokenizer(), "one") == tiny_tokenizer()("<user>one\n<assistant>")["input_ids"]


@FORKS
@pytest.mark.usefixtures("forked")
def test_a_lost_device_ends_the_server(
    monkeypatch: pytest.MonkeyPatch, told: SimpleQueue[tuple[str, int]], checkpoint: Path
) -> None:
    model, driver = copy.deepcopy(OWN), FaultyDriver(HostDriver())
    cache = make_cache("vattn", shape_of(model, 4, LENGTH), "cpu", driver=driver)
    engine = Engine(model, cache, compile=False, capture=False, tokenizer=tiny_tokenizer())
    around: list[AsyncEngine] = []

    def loaded(model: str, **options: object) -> AsyncEngine:
        around.append(AsyncEngine(engine))
        return around[0]

    monkeypatch.setattr(AsyncEngine, "from_pretrained", loaded)
    said: list[BaseException] = []

    def client() -> None:
        url = told.get()[0]
        driver.fail("*", code="CUDA_ERROR_ILLEGAL_ADDRESS", sticky=True)
        try:
            openai.OpenAI(base_url=url, api_key=KEY, max_retries=0).completions.create(model=NAME, prompt="one")
        except openai.APIStatusError as error:
            said.append(error)

    asking = threading.Thread(target=client)
    asking.start()
    with pytest.raises(EngineClosed, match=r"with it the server: .*CUDA_ERROR_ILLEGAL_ADDRESS"):
        serve(str(checkpoint), Settings(NAME, (KEY,)), *SERVE)
    asking.join()
    assert [error.status_code for error in said if isinstance(error, openai.APIStatusError)] == [503]
    assert not around[0].is_open
    driver.disarm()
    cache.close()


def test_long_bodies_are_read_beside_the_event_loop_and_what_cannot_fit_is_not_sent_to_the_engine(
    served: Served, alone: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    tokenized = app.Server._tokenized

    def noted(self: app.Server, prompts: Sequence[object]) -> list[Sequence[int]]:
        threads.append(threading.current_thread().name)
        return tokenized(self, prompts)

    monkeypatch.setattr(app.Server, "_tokenized", noted)
    monkeypatch.setattr(app, "LONG_BODY", 200)
    client, ask = served.client(), {"model": NAME, "max_tokens": 5, "temperature": 0}
    for prompt in ("one", "one" + " two" * 60):
        assert client.completions.create(prompt=prompt, **ask).choices[0].text == greedy(alone, prompt, 5)  # type: ignore[call-overload]
    assert [name == served.thread.name for name in threads] == [True, False]
    monkeypatch.setattr(served.engine, "add_request", lambda *_, **__: pytest.fail("it was sent"))
    with pytest.raises(openai.BadRequestError, match=f"exceeds max_seq_len {LENGTH}") as raised:
        client.completions.create(prompt=[3] * (LENGTH + 1), **ask)  # type: ignore[call-overload]
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="129 samples are asked for"):
        client.completions.create(prompt=["x"] * 129, **ask)  # type: ignore[call-overload]
    assert len(threads) == 3
