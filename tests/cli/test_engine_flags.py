"""Flags of `serve` and `generate` for keys and values of eight bits, drafts and policies: what they become in an
engine, and what is refused before a model is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep_families import tiny_config, tiny_model
from tiny_text import save_checkpoint, tiny_tokenizer

from trtllm_vattn.cache.compression import H2O, FastGen
from trtllm_vattn.cli.engine_flags import engine_options
from trtllm_vattn.cli.main import main
from trtllm_vattn.cli.parser import build_parser
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime import engine as of_engine
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams

PROMPTS = [[5, 6, 7, 8, 9, 10] * 6, list(range(40, 70))]
PARAMS = SamplingParams(max_tokens=12)
DRAFTS = '{"model": "tiny-llama", "num_speculative_tokens": 2, "draft_budget": "4MiB"}'


def parsed(*flags: str, command: str = "serve") -> argparse.Namespace:
    sizes = ["--device", "cpu", "--max-seqs", "2", "--max-seq-len", "128"]
    arguments = [command, "--model", "tiny-llama", *sizes, *flags]
    given: argparse.Namespace = build_parser(arguments, "0").parse_args(arguments)
    return given


def engine_by(*flags: str) -> Engine:
    args = parsed(*flags)
    return Engine.from_pretrained(args.model, capture=False, compile=False, **engine_options(args))


@pytest.fixture(scope="module")
def usual() -> list[list[int]]:
    with engine_by() as engine:
        assert engine.cache.shape.dtype == torch.float32
        assert engine.compression is None
        assert engine.decode.speculator is None
        return [done.tokens for done in engine.generate(PROMPTS, PARAMS)]


def test_keys_and_values_of_eight_bits(usual: list[list[int]]) -> None:
    with engine_by("--kv-cache-dtype", "fp8") as engine:
        assert engine.cache.shape.dtype == torch.float8_e4m3fn
        made = [done.tokens for done in engine.generate(PROMPTS, PARAMS)]
    assert [len(each) for each in made] == [12, 12]
    assert made != usual


@pytest.mark.parametrize("config", ['{"method": "ngram", "prompt_lookup_min": 1}', DRAFTS])
def test_drafts_of_the_text_itself_and_of_a_named_model(config: str, usual: list[list[int]]) -> None:
    with engine_by("--speculative-config", config) as engine:
        speculator = engine.decode.speculator
        assert speculator is not None
        assert (speculator.draft_model is not None) == ("tiny-llama" in config)
        assert [done.tokens for done in engine.generate(PROMPTS, PARAMS)] == usual
        stats = engine.speculation_stats()
    assert stats["drafted"] > 0
    if speculator.draft_model is not None:
        # It is the model once more, by its name.
        assert speculator.draft_model.model is not engine.model
        assert speculator.draft_model.cache.budget_bytes == 4 << 20
        assert stats["accepted"] == stats["drafted"]


@pytest.mark.parametrize(
    ("config", "kind", "fields"),
    [
        ('{"policy": "h2o", "heavy": 4, "recent": [8], "every": 4}', H2O, {"heavy": (4,), "recent": (8,), "every": 4}),
        ('{"policy": "h2o", "heavy": 0, "recent": 0.25}', H2O, {"heavy": (0,), "recent": (0.25,), "every": None}),
        ('{"policy": "fastgen", "special": [5], "threshold": 0.5}', FastGen, {"special": (5,), "threshold": 0.5}),
    ],
)
def test_policies_that_evict_tokens(config: str, kind: type, fields: dict[str, Any]) -> None:
    with engine_by("--compression-config", config) as engine:
        compression = engine.compression
        assert compression is not None
        assert type(compression.policy) is kind
        assert {name: getattr(compression.policy, name) for name in fields} == fields
        assert [len(done.tokens) for done in engine.generate(PROMPTS, PARAMS)] == [12, 12]
        assert compression.runs >= 2
        assert compression.failed == 0
        assert compression.evicted_bytes > 0


def test_generate_and_serve_take_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--kv-cache-dtype", "fp8_e4m3", "--speculative-config", DRAFTS]
    assert engine_options(parsed(*flags)) == engine_options(parsed(*flags, command="generate"))
    model = str(save_checkpoint(tmp_path / "tiny"))
    own = ["--speculative-config", f'{{"model": "{model}"}}', "--kv-cache-dtype", "fp8"]
    few = ["--device", "cpu", "--max-seqs", "1", "--max-tokens", "5", "--raw"]
    assert main(["generate", "--model", model, *few, *own, "one"]) == 0
    assert "5 tokens in" in capsys.readouterr().err


NGRAM, H2O_CONFIG = ["--speculative-config", '{"method": "ngram"}'], ["--compression-config", '{"policy": "h2o"}']


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([*NGRAM, "--deterministic"], "deterministic is True, and speculation is given"),
        ([*NGRAM, *H2O_CONFIG], "compression is not served with speculation"),
        ([*H2O_CONFIG, "--deterministic"], "compression is not served with deterministic=True"),
        ([*NGRAM, "--tensor-parallel", "2"], "speculation is not served with tensor_parallel yet"),
        ([*H2O_CONFIG, "--tensor-parallel", "2"], "compression is served on one rank"),
        (["--kv-cache-dtype", "fp8", "--tensor-parallel", "2"], "with tensor_parallel it is auto"),
        (["--speculative-config", DRAFTS, "--broker", "/tmp/none"], "use ngram drafts, or leave the broker out"),
        (["--speculative-config", '{"model": "small-llama"}'], "a vocabulary of 1024 tokens, the model one of 512"),
        (["--speculative-config", '{"model": "./nowhere"}'], "no model './nowhere'"),
        (["--compression-config", '{"policy": "h2o", "recent": [1, 2, 3]}'], "recent has 3 amounts for 2 layers"),
        (
            ["--model", "llama-3.2-1b", "--max-seq-len", "9000", "--speculative-config", '{"model": "llama-3-8b"}'],
            "the draft model llama-3-8b has 8192 positions; give 8192 or fewer",
        ),
        (
            ["--speculative-config", DRAFTS, "--max-seq-len", "16385"],
            "max_seq_len is 16385, the model has 16384 positions; give 16384 or fewer",
        ),
        ([*NGRAM, "--model", "tiny-gemma3", "--max-seq-len", "600"], "layers of tiny-gemma3 keep windows"),
        (
            [*H2O_CONFIG, "--model", "tiny-gemma3", "--max-seq-len", "600"],
            "compression is not served with layers with windows",
        ),
    ],
)
def test_what_cannot_be_together_is_refused_before_a_model_is_loaded(
    flags: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(of_engine, "load_model", lambda *_: pytest.fail("a model is loaded"))
    # Shapes have no tokenizer, which these commands ask for first.
    monkeypatch.setattr("trtllm_vattn.runtime.checkpoint.require_tokenizer", lambda *_: tiny_tokenizer())
    sizes = ["--device", "cpu", "--max-seqs", "2", "--max-seq-len", "128", "--max-tokens", "8"]
    assert main(["generate", "--model", "tiny-llama", *sizes, *flags, "--raw", "one"]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "given", "says"),
    [
        ("--speculative-config", '{"method": "eagle"}', "method is 'eagle'; there are ngram, draft_model"),
        ("--speculative-config", '{"num_speculative_tokens": 9}', "it is a whole number from 1 to 7"),
        ("--speculative-config", '{"model": 5}', "model is an int (5); give the model that drafts, or its name"),
        ("--speculative-config", '{"method": "draft_model"}', "model is None; give the model that drafts"),
        ("--speculative-config", '{"method": "ngram", "model": "x"}', "leave model out"),
        ("--speculative-config", '{"draft_tensor_parallel_size": 1}', "no 'draft_tensor_parallel_size' is known"),
        ("--speculative-config", "ngram", "it is 'ngram', which is no JSON"),
        ("--speculative-config", "[" * 99_999, "which is no JSON"),
        ("--speculative-config", "3", 'give an object of JSON, as {"method": "ngram"}'),
        ("--compression-config", "{}", "policy is None; there are h2o, fastgen"),
        ("--compression-config", '{"policy": ["h2o"]}', "policy is ['h2o']; there are h2o, fastgen"),
        ("--compression-config", '{"policy": "h2o", "special": []}', "no 'special' is known; there are heavy, recent"),
        ("--compression-config", '{"policy": "h2o", "heavy": 0, "recent": 0}', "so that nothing is kept"),
        ("--compression-config", '{"policy": "h2o", "heavy": NaN}', "heavy is nan"),
        (
            *("--compression-config", '{"policy": "fastgen", "special": [9223372036854775808]}'),
            "an id of special is 9223372036854775808; it is a whole number from 0 to 2147483647",
        ),
        ("--kv-cache-dtype", "fp8_e5m2", "invalid choice: 'fp8_e5m2'"),
    ],
)
def test_a_wrong_field_is_named_by_the_parser(
    flag: str, given: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(flag, given)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"argument {flag}" in said
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "longest", "says"),
    [
        ("mistral", 16, None),
        ("mistral", 17, "layers with windows"),
        ("gemma2", 16, "soft caps of scores"),
        ("gpt_oss", 16, "sink logits"),
        ("deepseek_v3", 64, "latents in place of keys and values"),
    ],
)
def test_policies_are_refused_before_loading_where_an_engine_would_refuse_them(
    kind: str, longest: int, says: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(tiny_config(kind)).save_pretrained(tmp_path)

    def engine() -> Engine:
        sizes = {"max_seqs": 2, "max_seq_len": longest, "device": "cpu", "capture": False, "compile": False}
        return Engine.from_pretrained(str(tmp_path), compression=H2O(2, 2), **sizes)

    if says is None:
        with engine() as made:
            assert len(made.generate([[1, 2, 3, 4, 5, 6]], SamplingParams(4))[0].tokens) == 4
        return
    refused = f"compression is not served with {says}"
    with monkeypatch.context() as patched:
        patched.setattr(of_engine, "load_model", lambda *_: pytest.fail("a model is loaded"))
        with pytest.raises(ConfigError, match=refused):
            engine()
    monkeypatch.setattr(of_engine, "check_before_loading", lambda *_: None)
    with pytest.raises(ConfigError, match=refused):
        engine()
