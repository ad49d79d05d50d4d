"""Checkpoints are loaded whole or refused by what is wrong with them; what they say ends a text ends it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.checkpoint import end_of_text
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import SHAPES, load_model
from trtllm_vattn.runtime.sampling import SamplingParams

PROMPT = [1, 2, 3]
FIELDS = {name: value for name, value in SHAPES["tiny-llama"].items() if name != "model_type"} | {"eos_token_id": None}


def model_of(**fields: Any) -> PreTrainedModel:
    torch.manual_seed(3)
    config = AutoConfig.for_model("llama", **{**FIELDS, **fields})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model_of().save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    model_of().save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    return tmp_path / "sharded"


def load(folder: Path) -> PreTrainedModel:
    return load_model(str(folder), "cpu", torch.float32)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if any(each in name for each in names)]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (without("lm_head"), r"1 tensor is missing \(lm_head\.weight\)"),
        (without("layers.1."), r"9 tensors are missing \(model\.layers\.1\..* and 5 more\)"),
        (lambda t: t.update(extra=torch.ones(1)), r"1 tensor is unknown to the model \(extra\)"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(65)}),
            r"1 tensor is of another shape \(model\.norm\.weight: \[65\], the model's \[64\]\)",
        ),
        (
            lambda t: t.update(a=t.pop("model.norm.weight")),
            r"1 tensor is missing \(model\.norm\.weight\), 1 tensor is unknown to the model \(a\); get its files again",
        ),
    ],
    ids=["missing", "layer", "unknown", "misshapen", "renamed"],
)
def test_tensors_that_are_not_the_models_are_named(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], why: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(ConfigError, match=rf"whole does not hold the LlamaForCausalLM that its config\.json .*{why}"):
        load(folder)


def test_missing_tensors_of_shards_are_named(sharded: Path) -> None:
    path = next(path for path in sharded.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 tensor is missing \(model\.norm\.weight\)"):
        load(sharded)


def test_tied_renamed_and_derived_tensors_may_be_absent_or_there(tmp_path: Path, sharded: Path) -> None:
    tied = model_of(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    loaded = load(tmp_path / "tied")
    assert torch.equal(loaded.lm_head.weight, tied.lm_head.weight)
    plain = model_of().state_dict()
    # As checkpoints of the decoder alone name them, and old ones that kept RoPE's frequencies.
    model_of().save_pretrained(tmp_path / "renamed")
    rewrite(
        tmp_path / "renamed",
        lambda t: t.update(
            {
                **{name.removeprefix("model."): t.pop(name) for name in list(t)},
                "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            }
        ),
    )
    for folder in (tmp_path / "renamed", sharded):
        assert all(torch.equal(value, plain[name]) for name, value in load(folder).state_dict().items())


@pytest.mark.parametrize("left", [0, 4, 3000, -1])
def test_a_truncated_file_is_named(folder: Path, left: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ConfigError, match=r"cannot be loaded: model\.safetensors \([\d,]+ bytes: truncated or corrupt"):
        load(folder)


def test_truncated_and_absent_shards_are_named(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    whole = second.read_bytes()
    second.write_bytes(whole[:-10])
    with pytest.raises(ConfigError, match=rf"{second.name} \([\d,]+ bytes: truncated"):
        load(sharded)
    second.write_bytes(whole)
    first.unlink()
    with pytest.raises(ConfigError, match=rf"{first.name} \(absent, model\.safetensors\.index\.json names it\)"):
        load(sharded)


def test_a_truncated_pickle_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path)
    assert torch.equal(load(folder).lm_head.weight, tensors["lm_head.weight"])
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin \(5,000 bytes: truncated or corrupt"):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_damaged_json_is_named(sharded: Path, name: str, text: str) -> None:
    (sharded / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"sharded cannot be read: {name}"):
        load(sharded)


def test_a_folder_without_weights_says_so(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"whole cannot be loaded: OSError: .*no file named model\.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "t5", "num_layers": 2}, "it has an encoder"),
        ({"model_type": "clip"}, "no causal language model for checkpoints of type 'clip'"),
        ({"model_type": "nobody-knows"}, r"config\.json cannot be read: ValueError"),
        ({**FIELDS, "model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ],
)
def test_other_kinds_of_checkpoints_are_refused_before_their_weights_are_read(
    tmp_path: Path, config: dict[str, Any], why: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=why):
        load(tmp_path)


HUB = """
import torch
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime import Engine, SamplingParams
with Engine.from_pretrained("somebody/tiny", max_seqs=1, max_seq_len=64, device="cpu") as engine:
    print(engine.generate([[1, 2, 3]], SamplingParams(max_tokens=6))[0].tokens)
for name in ("somebody/else", "somebody/broken"):
    try:
        Engine.from_pretrained(name, device="cpu")
    except ConfigError as error:
        print(error)
"""


def test_names_on_the_hub_are_looked_up_in_transformers_cache(
    folder: Path, tmp_path: Path, run_apart: Callable[..., CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tiny", "broken"):
        stored = tmp_path / "hub" / f"models--somebody--{name}"
        (stored / "refs").mkdir(parents=True)
        (stored / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folder, stored / "snapshots" / ("0" * 40))
    (stored / "snapshots" / ("0" * 40) / "model.safetensors").write_bytes(b"1234")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = run_apart(HUB, fresh=True)
    assert done.returncode == 0, done.stderr
    with Engine.from_pretrained(str(folder), max_seqs=1, max_seq_len=64, device="cpu") as engine:
        tokens = engine.generate([PROMPT], SamplingParams(max_tokens=6))[0].tokens
    first, absent, broken = done.stdout.splitlines()
    assert first == str(tokens)
    assert absent.startswith("no model 'somebody/else': it is no directory here, none of the shapes tiny-llama, ")
    assert f"in its cache alone, as HF_HUB_OFFLINE is set ({tmp_path / 'hub'})" in absent
    assert broken.startswith("somebody/broken cannot be loaded: model.safetensors (4 bytes: truncated or corrupt")


# -- what ends a text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        (5, None, (5,)),
        ([5, 6, 5], 7, (5, 6)),
        (None, [7, 8], (7, 8)),
        (None, None, ()),
        ([5, 512, 100000, -1], None, (5,)),
    ],
)
def test_what_ends_a_text_is_what_generation_config_or_else_config_names(
    generation: Any, config: Any, ends: tuple[int, ...]
) -> None:
    model = model_of()
    model.generation_config.eos_token_id, model.config.eos_token_id = generation, config
    assert end_of_text(model) == ends


@pytest.mark.parametrize("value", ["</s>", [2.0], [True]])
def test_what_is_no_token_id_does_not_end_a_text(value: Any) -> None:
    model = model_of()
    model.generation_config.eos_token_id = value
    with pytest.raises(ConfigError, match=r"eos_token_id of generation_config\.json or config\.json holds"):
        end_of_text(model)


def test_what_a_checkpoint_says_of_choosing_tokens_and_nobody_heeds_is_said(caplog: pytest.LogCaptureFixture) -> None:
    def said(**fields: Any) -> str:
        caplog.clear()
        model.generation_config.update(**fields)
        Engine(model, make_cache("vattn", shape_of(model, 1, 16), "cpu"), compile=False, capture=False).close()
        return caplog.text

    model = model_of()
    assert "generation_config.json" not in said()
    text = said(do_sample=True, temperature=0.7, top_p=0.8, repetition_penalty=1.05)
    assert "generation_config.json says temperature=0.7, top_p=0.8, repetition_penalty=1.05; " in text
    # Without sampling `generate` heeds none but the last.
    text = said(do_sample=False)
    assert "generation_config.json says repetition_penalty=1.05; " in text
    assert "generation_config.json" not in said(repetition_penalty=1.0)


def test_named_shapes_have_no_end_of_text() -> None:
    assert end_of_text(load_model("tiny-llama", "cpu", torch.float32)) == ()


@pytest.mark.parametrize("options", [{}, {"steps": 8, "loop": True}, {"steps": 4, "capture": False}])
def test_sequences_end_where_transformers_ends_them(folder: Path, options: dict[str, Any]) -> None:
    def tokens(**params: Any) -> list[list[int]]:
        with Engine.from_pretrained(str(folder), max_seqs=2, max_seq_len=64, device="cpu", **options) as engine:
            done = engine.generate([PROMPT, [9, 8]], SamplingParams(max_tokens=12, **params))
            return [each.tokens for each in done]

    free = tokens()
    path = folder / "generation_config.json"
    # More of them than the device looks for in a loop; the one that comes is the last.
    path.write_text(json.dumps({"eos_token_id": [500, 501, 502, 503, free[0][4]]}))
    model = AutoModelForCausalLM.from_pretrained(folder)
    want = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    assert tokens()[0] == want == free[0][: len(want)]
    assert len(want) <= 5
    assert tokens(ignore_eos=True) == free
    assert tokens(ignore_eos=True, stop_token_ids=(free[0][2],))[0] == free[0][: free[0].index(free[0][2]) + 1]


def test_every_shape_is_a_configuration(whole_models: None) -> None:
    for name, fields in SHAPES.items():
        config = AutoConfig.for_model(**fields)
        assert config.num_hidden_layers == fields["num_hidden_layers"], name
