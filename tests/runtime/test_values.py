"""Bad values stop at the door, by name, whatever parameter they are given for, and the engine goes on."""

from __future__ import annotations

import argparse
import array
import decimal
import fractions
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache as remember
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.cli.engine_flags import add_engine, engine_options
from trtllm_vattn.errors import ConfigError, SequenceTooLong, VattnError
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import SHAPES, load_model
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.sizes import USUAL_MAX_SEQ_LEN, parse_bytes
from trtllm_vattn.vmm.host import HostDriver

NAN, INF, HUGE = float("nan"), float("inf"), 10**5000


class Strange:
    """Has no repr, is no number, and cannot be compared."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not to be compared")

    __hash__ = None  # type: ignore[assignment]


EVERYTHING: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**64,
    2**70,
    HUGE,
    -HUGE,
    0.0,
    1.0,
    2.5,
    -1.0,
    1e308,
    NAN,
    INF,
    -INF,
    1j,
    "",
    "3",
    "auto",
    "x" * 1000,
    b"3",
    bytearray(b"3"),
    [],
    [1],
    [1, 2, 3],
    ["1"],
    [None],
    [[1]],
    [NAN],
    (1, 1),
    {},
    {"input_ids": [1]},
    set(),
    range(3),
    iter([1]),
    lambda: 1,
    object(),
    Strange(),
    [Strange()],
    np.int64(3),
    np.uint8(3),
    np.float32(0.5),
    np.float64(NAN),
    np.bool_(True),
    np.array(3),
    np.array([1, 2]),
    np.array([1.0, 2.0]),
    np.array([[1]]),
    np.array(["a"]),
    np.array([None]),
    torch.tensor(3),
    torch.tensor([1, 2]),
    torch.tensor([1.5]),
    torch.tensor([True]),
    torch.zeros(2, 2, dtype=torch.int64),
    torch.empty(2, dtype=torch.int64, device="meta"),
    torch.bfloat16,
    torch.int8,
    torch.device("cpu"),
    torch.device("cuda:99"),
    decimal.Decimal("1.5"),
    fractions.Fraction(1, 2),
    SamplingParams,
    type,
]
"""What a caller might give for anything."""


@remember
def model() -> PreTrainedModel:
    return load_model("tiny-llama", "cpu", torch.float32)


def build(slots: int = 2, **options: Any) -> Engine:
    options = {"capture": False, "compile": False, "mapping": "between-steps", **options}
    cache = make_cache("vattn", shape_of(model(), slots, 32), "cpu", 1 << 20)
    try:
        return Engine(model(), cache, **options)
    except ConfigError:
        cache.close()
        raise


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with build() as made:
        yield made


def taken_or_refused(call: Callable[[], Any]) -> Any:
    """What a call gives; None where it refused what it got by an error of ours, a line long or little more."""
    try:
        return call()
    except VattnError as error:
        refused = str(error)
    assert 10 < len(refused) < 600
    return None


@pytest.mark.parametrize("name", ["max_tokens", "temperature", "top_p", "top_k", "seed", "stop_token_ids"])
def test_sampling_parameters_take_anything_or_refuse_it_by_name(engine: Engine, name: str) -> None:
    taken = 0
    for value in EVERYTHING:
        usual = {"max_tokens": 3, "temperature": 0.9, "seed": 1}
        try:
            params = SamplingParams(**{**usual, name: value})
        except ConfigError as error:
            params, refused = None, str(error)
        if params is None:
            assert refused.startswith(name)
            continue
        taken += 1
        kept = getattr(params, name)
        assert kept is None or type(kept) in (int, float, tuple)
        if done := taken_or_refused(lambda params=params: engine.generate([[1, 2]], params)):  # type: ignore[misc]
            assert done[0].finish_reason in ("length", "stop")
        assert not engine.busy
    assert taken >= 2


@pytest.mark.parametrize("where", ["prompt", "forced", "params", "prompts", "prompts' params", "abort", "progress"])
def test_requests_are_taken_or_refused_and_never_fail_in_a_step(engine: Engine, where: str) -> None:
    for value in EVERYTHING:
        calls: dict[str, Callable[[], Any]] = {
            "prompt": lambda value=value: engine.submit(value, SamplingParams(2)),
            "forced": lambda value=value: engine.submit([1], SamplingParams(1), value),
            "params": lambda value=value: engine.submit([1], value),
            "prompts": lambda value=value: engine.generate(value, SamplingParams(2)),
            "prompts' params": lambda value=value: engine.generate([[1]], value),
            "abort": lambda value=value: engine.abort(value),
            "progress": lambda value=value: engine.generate([[1]], SamplingParams(2), value),
        }
        taken_or_refused(calls[where])
        assert {event.finish_reason for event in engine.run()} <= {None, "length"}
        assert engine.cache.stats().sequences == 0


SETTINGS = ["attention", "capture", "buckets", "steps", "loop", "packed", "compile", "mapping", "chunk"]
SETTINGS += ["record_margins", "observer"]


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_taken_or_refused_by_name(name: str) -> None:
    for value in EVERYTHING:
        if value is True and name == "compile":
            continue
        cache = make_cache("vattn", shape_of(model(), 2, 32), "cpu", 1 << 20)
        options = {"capture": False, "compile": False, "mapping": "between-steps", name: value}
        try:
            made = Engine(model(), cache, **options)
        except ConfigError as error:
            made, refused = None, str(error)
        if made is None:
            cache.close()
            assert name.rstrip("s") in refused
            continue
        with made:
            if name == "observer":
                continue
            assert [done.finish_reason for done in made.generate([[1, 2]] * 3, SamplingParams(3))] == ["length"] * 3


@pytest.mark.parametrize(
    "name", ["model", "device", "dtype", "max_seqs", "max_seq_len", "budget", "cache", "idle_after_s", "idle_floor"]
)
def test_an_engine_from_a_name_refuses_before_it_loads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("trtllm_vattn.runtime.engine.load_model", loaded)
    for value in EVERYTHING:
        options = {"device": "cpu", "mapping": "between-steps", name: value}
        with pytest.raises((ConfigError, KeyboardInterrupt)):
            Engine.from_pretrained(**{"model": "tiny-llama", **options})
    with pytest.raises(ConfigError, match="steps is 0"):
        Engine.from_pretrained("tiny-llama", device="cpu", steps=0)
    with pytest.raises(TypeError, match="stepz"):
        Engine.from_pretrained("tiny-llama", device="cpu", stepz=1)


@pytest.mark.parametrize("name", ["mps", "cuda:99", "nonsense", "", "cpu:1", "cuda:-1", torch.device("meta"), 0])
def test_devices_that_are_not_here_are_named(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"device is .*there (are|is) cpu"):
        Engine.from_pretrained("tiny-llama", device=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", torch.device("cuda:0")])
def test_a_gpu_that_is_missing_is_said_so(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"which is not here; there are cpu$"):
        Engine.from_pretrained("tiny-llama", device=name)


def test_numbers_of_numpy_and_sizes_in_words_are_taken() -> None:
    with Engine.from_pretrained(
        "tiny-llama",
        device=torch.device("cpu"),
        max_seqs=np.int64(2),  # type: ignore[arg-type]
        max_seq_len=np.int32(32),  # type: ignore[arg-type]
        budget="1MiB",
        idle_floor="4 KiB",
        mapping="between-steps",
        buckets=np.array([1, 2]),
        steps=np.int16(2),
    ) as engine:
        assert engine.cache.stats().budget_bytes == 1 << 20
        for budget in ("512KiB", np.int64(600 << 10)):
            engine.set_budget(budget)  # type: ignore[arg-type]
        assert engine.cache.stats().budget_bytes == 600 << 10
        assert engine.startup.budget_bytes == 1 << 20
        params = SamplingParams(np.int64(4), np.float32(0.5), np.float64(0.5), np.uint8(5), np.uint64(2**64 - 1))  # type: ignore[arg-type]
        assert (type(params.max_tokens), type(params.temperature), params.seed) == (int, float, 2**64 - 1)
        assert len(engine.generate([[1, 2]], params)[0].tokens) == 4


@pytest.mark.parametrize(
    "budget", [NAN, True, -1, 1e9, 4.0, "-1", "much", "1e9", "1.5", "1.5B", "nan", None, [], 2**70, "9" * 400, ""]
)
def test_a_budget_is_a_number_of_bytes(engine: Engine, budget: Any) -> None:
    before = engine.cache.stats().budget_bytes
    cache = engine.cache
    assert isinstance(cache, KVCacheManager)
    for call in (engine.set_budget, cache.set_budget, lambda given: parse_bytes(given, "the budget")):
        with pytest.raises(ConfigError, match=r"^the budget is .*, which is no number of bytes"):
            call(budget)
    assert engine.cache.stats().budget_bytes == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lookahead": 2.5}, r"lookahead is 2\.5"),
        ({"lookahead": True}, "lookahead is True"),
        ({"idle_after_s": NAN}, "idle_after_s is nan"),
        ({"idle_floor": "much"}, "idle_floor is 'much'"),
        ({"budget": 1.5}, r"the budget is 1\.5"),
    ],
)
def test_a_cache_refuses_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KVCacheManager(CacheShape(2, 1, 16, torch.float32, 1, 64), HostDriver(), **options)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("17179869184", 1 << 34),
        ("16GiB", 1 << 34),
        ("16g", 1 << 34),
        (" 0.5 GiB ", 1 << 29),
        ("512 MiB", 1 << 29),
        (np.int64(5), 5),
        ("0", 0),
    ],
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "prompt",
    [
        (1, 2, 3),
        range(1, 4),
        deque([1, 2, 3]),
        array.array("q", [1, 2, 3]),
        [np.int64(1), torch.tensor(2), 3],
        np.array([1, 2, 3], np.uint16),
        torch.tensor([1, 2, 3], dtype=torch.int32),
    ],
)
def test_prompts_are_sequences_arrays_and_tensors_of_ids(engine: Engine, prompt: Any) -> None:
    want = engine.generate([[1, 2, 3]], SamplingParams(4))[0].tokens
    assert [done.tokens for done in engine.generate([prompt, prompt], SamplingParams(4))] == [want] * 2
    engine.submit(prompt, SamplingParams(3), forced=prompt)
    assert len(list(engine.run())) == 3


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("123", "the prompt is text, and this engine has no tokenizer; give token ids"),
        (b"abc", r"the prompt is text \(bytes\)"),
        (["1"], r"holds '1' \(str\) at position 0; tokenise it first"),
        ([1.0, 2], r"holds 1\.0 \(float\) at position 0"),
        ([1, True], r"holds True \(bool\) at position 1"),
        (torch.tensor([True]), r"is of torch\.bool; token ids are integers"),
        (np.array([1.0]), "is of float64; token ids are integers, and nothing is rounded"),
        ([[1, 2]], r"holds a list \(\[1, 2\]\) at position 0.*several prompts go to generate"),
        (torch.tensor([[1]]), r"has shape \(1, 1\)"),
        (None, "the prompt is None; give a list"),
        ({"input_ids": [1]}, r"is a dict .*; give a list, an array or a tensor"),
        ([], "the prompt is empty"),
        (np.array([], np.int64), "the prompt is empty"),
        ([1, 512], "the prompt has token ids outside 0 to 511: 512"),
        ([HUGE], "has token ids outside 0 to 511: a number of 16610 bits"),
        (np.ma.array([1, 2], mask=[False, True]), "is a masked array"),
    ],
)
def test_other_prompts_are_refused_with_advice(engine: Engine, prompt: Any, message: str) -> None:
    for call in (lambda: engine.submit(prompt), lambda: engine.generate([[1], prompt])):
        with pytest.raises(ConfigError, match=message):
            call()
        assert not engine.busy


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda engine: engine.pin([1], 5), "cache_salt is 5"),
        (lambda engine: engine.unpin([1], ""), "cache_salt is ''"),
        (lambda engine: engine.wake(5), "tags are an int"),
        (lambda engine: engine.update_weights({}, manifest=5), "the manifest is an int"),
        (lambda engine: engine.update_weights(iter(()), manifest=[1]), "the manifest is a list"),
        (lambda engine: engine.update_weights({}, partial="yes"), "partial is 'yes'"),
        (lambda engine: engine.update_weights({}, restore=None), "restore is None"),
        (lambda engine: Engine(None, engine.cache), "the model is None"),
        (lambda engine: Engine("tiny-llama", engine.cache), "the model is a str"),
        (lambda engine: Engine.from_pretrained("tiny-llama", tensor_parallel=True), "tensor_parallel is True"),
    ],
)
def test_calls_refuse_values_by_name(engine: Engine, call: Callable[[Engine], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(engine)


@pytest.mark.parametrize("prompts", [[1, 2, 3], (1,), np.array([1, 2]), torch.tensor([1]), "text", None, 5, {1: [2]}])
def test_generate_says_that_it_wants_a_list_of_prompts(engine: Engine, prompts: Any) -> None:
    with pytest.raises(ConfigError, match="generate takes a list of prompts"):
        engine.generate(prompts)


def test_stop_tokens_are_of_the_vocabulary(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="stop_token_ids has token ids outside 0 to 511: 512"):
        engine.submit([1], SamplingParams(stop_token_ids=[512]))
    assert SamplingParams(stop_token_ids=np.array([3, 4])).stop_token_ids == (3, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("buckets", [[8], [4, 8], [], [0, 4], [-1, 4], [4, 4], "4", ["4"], [2.0, 4], [True, 4], 4])
def test_buckets_that_cannot_be_are_refused(buckets: Any, packed: bool) -> None:
    with pytest.raises(ConfigError, match="bucket"):
        build(4, buckets=buckets, packed=packed)


@pytest.mark.parametrize(
    ("buckets", "all_of_them", "packed"), [([2, 1], [1, 2, 4], False), ([3], [3, 4], True), ((4, 1), [1, 4], False)]
)
def test_buckets_are_completed_to_all_slots(buckets: Any, all_of_them: list[int], packed: bool) -> None:
    with build(4, buckets=buckets, packed=packed, capture=True) as engine:
        assert sorted(engine.startup.decode.seconds) == all_of_them
        done = engine.generate([[1, 2, 3]] * 6, SamplingParams(5))
        assert len({tuple(each.tokens) for each in done}) == 1


def test_a_prompt_and_its_output_but_the_last_token_fill_a_slot(engine: Engine) -> None:
    with pytest.raises(SequenceTooLong, match="30 tokens and max_tokens 4 exceed max_seq_len 32"):
        engine.submit([1] * 30, SamplingParams(4))
    with pytest.raises(SequenceTooLong, match="33 tokens and at least one more exceed max_seq_len 32"):
        engine.submit([1] * 33)
    full, default, last = engine.generate([[1] * 30, [1] * 30, [1] * 32], [SamplingParams(3), SamplingParams(), None])  # type: ignore[list-item]
    assert len(full.tokens) == len(default.tokens) == 3
    assert full.tokens == default.tokens
    assert (len(last.tokens), last.finish_reason) == (1, "length")


@pytest.mark.parametrize(("positions", "longest"), [(64, 64), (16384, USUAL_MAX_SEQ_LEN)])
def test_sequences_are_as_long_as_the_usual_or_the_models_positions_unless_it_is_said(
    positions: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one rule, whoever leaves it out: the API and the commands."""
    shape = {**SHAPES["tiny-llama"], "max_position_embeddings": positions, "num_hidden_layers": 1}
    monkeypatch.setitem(SHAPES, "tiny-llama", shape)
    parser = argparse.ArgumentParser()
    add_engine(parser, max_seqs=1)
    given = engine_options(parser.parse_args(["--model", "tiny-llama", "--device", "cpu"]))
    for options in ({"device": "cpu", "max_seqs": 1}, given):
        with Engine.from_pretrained("tiny-llama", capture=False, compile=False, **options) as engine:
            assert engine.cache.shape.max_seq_len == longest
