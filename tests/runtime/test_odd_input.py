"""Input that nobody means: refused by name where it comes in, and of no consequence for others."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from io import BytesIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_text import tiny_model, tiny_tokenizer

from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.cli.generate import prompts_of, templated
from trtllm_vattn.cli.main import main
from trtllm_vattn.errors import ConfigError, EngineAsleep
from trtllm_vattn.runtime import engine as engine_module
from trtllm_vattn.runtime import hub
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.checkpoint import load_checkpoint, load_tokenizer, require_tokenizer
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import SHAPES, planned_shape
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.settings import check_model_name

HALF = "a\ud800"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    model = copy.deepcopy(tiny_model())
    cache = make_cache("vattn", shape_of(model, 6, 64), "cpu", host_memory="4MiB")
    options: dict[str, Any] = {"compile": False, "capture": False, "max_running": 3}
    with Engine(model, cache, tokenizer=tiny_tokenizer(), **options) as made:
        yield made


@pytest.mark.parametrize(
    ("given", "said"),
    [
        # Each of these was taken; the first one then failed every step, of all requests.
        ({"min_tokens": 1 << 63}, "min_tokens is 9223372036854775808"),
        ({"n": 1 << 30}, "n is 1073741824; it is a whole number from 1 to 1024"),
        ({"repetition_penalty": 1e-320}, "repetition_penalty is 1e-320; it is above 0"),
        ({"repetition_penalty": 1e300}, r"repetition_penalty is 1e\+300; it is above 0"),
        ({"logit_bias": {1: 1e300}}, r"a logit_bias is 1e\+300; it is from"),
        ({"stop": ["x"] * 65}, "stop holds 65 texts; at most 64"),
        ({"stop": HALF}, "stop is .* half of a surrogate pair"),
        ({"regex": HALF}, "regex is .* half of a surrogate pair"),
        ({"bad_words": [HALF]}, "a bad word is .* half of a surrogate pair"),
        ({"bad_words": ["x"] * 1153}, "bad_words holds 1153; at most 1152"),
        ({"bad_words": ["x" * 1025]}, "a bad word has 1025 characters"),
    ],
)
def test_parameters_that_the_device_or_the_tokenizer_cannot_hold_are_refused(given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SamplingParams(**given)


def test_penalties_and_biases_of_any_size_that_is_taken_give_tokens(engine: Engine) -> None:
    most = 2.0**63
    for penalty in (most, 1 / most):
        for bias in (most, -most):
            params = SamplingParams(3, repetition_penalty=penalty, logit_bias={1: bias, 2: bias}, min_tokens=3)
            (done,) = engine.generate([[1, 2, 3]], params)
            assert (done.finish_reason, len(done.tokens)) == ("length", 3), done.error


def test_texts_and_stop_tokens_that_are_none_are_refused_by_the_engine(engine: Engine) -> None:
    with pytest.raises(ConfigError, match=r"the prompt is .* half of a surrogate pair"):
        engine.submit(HALF)
    with pytest.raises(ConfigError, match="stop_token_ids holds 5000 tokens; at most 4096"):
        engine.submit([1], SamplingParams(stop_token_ids=[3] * 5000))
    assert not engine.busy


def test_words_of_other_types_are_refused_by_name(engine: Engine) -> None:
    for wrong in (np.array([1, 2]), 10**5000, None, "no"):
        for call in (
            lambda: engine.sleep(kv=wrong),  # type: ignore[arg-type]  # noqa: B023
            lambda: engine.sleep(weights=wrong),  # type: ignore[arg-type]  # noqa: B023
            lambda: engine.update_weights({}, running=wrong),  # type: ignore[arg-type]  # noqa: B023
        ):
            with pytest.raises(ConfigError, match=r"^(kv|weights|running) is .*; choose "):
                call()
    with pytest.raises(ConfigError, match="named tensors are a ndarray"):
        engine.update_weights(np.array(3))
    with pytest.raises(ConfigError, match="there is no tag"):
        engine.wake([10**5000])  # type: ignore[list-item]


def test_pins_of_an_engine_that_sleeps_are_refused_as_its_steps_are(engine: Engine) -> None:
    engine.sleep()
    for call in (engine.pin, engine.unpin):
        with pytest.raises(EngineAsleep, match=r"call wake\(\)"):
            call([1, 2, 3])
    engine.wake()
    assert engine.pin([1, 2, 3]) == 0


# -- names of models ---------------------------------------------------------------------------------------------------


@pytest.fixture
def unanswered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The Hub is looked for, and does not answer; the list has what it was asked for, which is once."""
    from huggingface_hub import constants
    from huggingface_hub import utils as of_hub

    asked: list[str] = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise OSError("no route")

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"the Hub was asked for {name}")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(of_hub, "get_session", Session)
    monkeypatch.setattr(hub, "monotonic", lambda: 1e9)
    hub._hub_error.cache_clear()
    yield asked
    hub._hub_error.cache_clear()


def test_a_name_that_nobody_has_is_told_at_once_where_the_hub_does_not_answer(unanswered: list[str]) -> None:
    calls = (
        lambda: load_checkpoint("tiny-lama", "cpu", None, SHAPES),  # type: ignore[arg-type]
        lambda: require_tokenizer("tiny-lama", SHAPES),
        lambda: Engine.from_pretrained("tiny-lama", device="cpu"),
    )
    for call in calls:
        with pytest.raises(ConfigError, match="does not answer: OSError: no route; do you mean tiny-llama") as raised:
            call()
        assert str(raised.value).startswith("no model 'tiny-lama': it is no directory here")
    with pytest.raises(ConfigError, match="no configuration of 'tiny-lama'"):
        planned_shape("tiny-lama", torch.float32)
    assert load_tokenizer("tiny-lama", SHAPES) is None
    assert len(unanswered) == 1


def test_what_can_be_no_name_on_the_hub_is_told_without_asking(unanswered: list[str], tmp_path: Path) -> None:
    for name in ("/nothing/here", "./x", "a/b/c", "~/x", "https://huggingface.co/a/b"):
        with pytest.raises(ConfigError, match="it is no directory here, and no name that the Hugging Face Hub could"):
            require_tokenizer(name, SHAPES)
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ConfigError, match=r"a file; give the checkpoint's directory"):
        Engine.from_pretrained(str(file), device="cpu")
    with pytest.raises(ConfigError, match="model is ''"):
        check_model_name("")
    assert not unanswered


def test_a_model_without_a_tokenizer_is_refused_before_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    for command in (["generate", "--model", "tiny-llama", "x"], ["serve", "--model", "tiny-llama", "--port", "0"]):
        assert main(command) == 2
        assert "tiny-llama has no tokenizer" in capsys.readouterr().err


def test_settings_of_other_types_are_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_load", lambda *_: pytest.fail("it was loaded"))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"clock": None}, "clock is None"),
        ({"kv_cache_dtype": np.array([1, 2])}, "kv_cache_dtype is array"),
        ({"tokenizer": np.array([1, 2])}, "tokenizer is a ndarray"),
        ({"tokenizer": "mine"}, "tokenizer is a str"),
        ({"trace": 10**5000}, "trace is an int"),
        ({"max_seq_len": 1 << 20}, "max_seq_len is 1048576, the model has 16384 positions; give 16384 or fewer"),
        ({"broker": "/no/broker"}, "no broker answers at /no/broker: No such file or directory; start one with"),
    ]
    for given, said in wrong:
        with pytest.raises(ConfigError, match=said):
            Engine.from_pretrained("tiny-llama", device="cpu", mapping="between-steps", **given)


def test_prompts_of_a_command_line_that_are_no_text_or_that_no_template_takes_are_told(tmp_path: Path) -> None:
    def given(*prompt: str, file: Path | None = None, stdin: bytes = b"") -> SimpleNamespace:
        return prompts_of(SimpleNamespace(prompt=list(prompt), file=file), TextIOWrapper(BytesIO(stdin), "utf-8"))  # type: ignore[arg-type,return-value]

    odd = tmp_path / "odd"
    odd.write_bytes(b"one\n\xff\n")
    with pytest.raises(ConfigError, match=r"odd is no text in UTF-8 \(invalid start byte at byte 4\)"):
        given(file=odd)
    with pytest.raises(ConfigError, match="standard input is no text in UTF-8"):
        given(stdin=b"\xff")
    with pytest.raises(ConfigError, match=r"a prompt is .* half of a surrogate pair"):
        given("one", os.fsdecode(b"\xff"))
    tokenizer = copy.deepcopy(tiny_tokenizer())
    for template in ("{{ raise_exception('no') }}", "{% for %}", "{{ messages[5].content }}"):
        tokenizer.chat_template = template
        with pytest.raises(ConfigError, match=r"chat template does not take this: .*; use --raw"):
            templated(tokenizer, "one")
    assert main(["serve", "--model", "x", "--name", os.fsdecode(b"\xff")]) == 2
