"""The model file for trtllm-build against the recorded interface of TensorRT-LLM: names, parameters, attributes.

TensorRT-LLM cannot be installed here. Its modules are stood in for by objects made from the recording, which refuse
whatever was not recorded; a real builder never sees this network.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.plugins import models, plain
from trtllm_vattn.plugins.networks.decoder import inputs_of

INTERFACE = json.loads((Path(__file__).parents[1] / "data" / "trtllm_engine_path.json").read_text())
FILE = Path(models.__path__[0]) / "vattn_models.py"
SIZES = {"max_batch_size": 8, "max_input_len": 64, "max_seq_len": 128, "max_num_tokens": 32}


def signature(parameters: list[str]) -> inspect.Signature:
    """A signature as it was recorded."""
    made, kind = [], inspect.Parameter.POSITIONAL_OR_KEYWORD
    for text in parameters:
        name, _, default = text.partition("=")
        if name == "*":
            kind = inspect.Parameter.KEYWORD_ONLY
            continue
        made.append(inspect.Parameter(name, kind, default=None if default else inspect.Parameter.empty))
    return inspect.Signature(made)


class Recorded:
    """Only what the recording names may be asked for."""

    def __init__(self, of: str, **values: Any) -> None:
        allowed = INTERFACE["classes"][of]["attributes"]
        assert set(values) <= set(allowed), f"the test gives {of} what was not recorded: {set(values) - set(allowed)}"
        self.__dict__.update(values)


class FakeTensor:
    """A tensor of a network under construction: its shape, and what it was made by."""

    def __init__(self, shape: list[int], made_by: str, dtype: Any = None) -> None:
        self.dims, self.made_by = shape, made_by
        self.outputs: list[tuple[str, Any]] = []
        self.trt_tensor = SimpleNamespace(shape=tuple(shape), dtype=dtype, wraps=self)

    def view(self, *args: Any, **kwargs: Any) -> FakeTensor:
        bound = signature(INTERFACE["classes"]["tensorrt_llm.functional.Tensor"]["view"]).bind(*args, **kwargs)
        shape = bound.arguments["shape"]
        return FakeTensor(list(shape.values) if isinstance(shape, Shape) else list(shape), "view")

    def mark_output(self, *args: Any, **kwargs: Any) -> None:
        parameters = INTERFACE["classes"]["tensorrt_llm.functional.Tensor"]["mark_output"]
        self.outputs.append(tuple(signature(parameters).bind(*args, **kwargs).args))

    def _with(self, other: FakeTensor) -> FakeTensor:
        shape = [max(a, b) if -1 not in (a, b) else -1 for a, b in zip(self.dims, other.dims, strict=True)]
        return FakeTensor(shape, "elementwise")

    __add__ = __sub__ = __mul__ = _with


class Shape:
    """What `concat` of numbers gives."""

    def __init__(self, values: list[int]) -> None:
        self.values = values


class World:
    """The stand-in for the package, and what was drawn in it."""

    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.layers: list[tuple[list[str], Any]] = []
        self.constants: list[np.ndarray] = []

    def functions(self) -> dict[str, Any]:
        def tensor(*args: Any, **kwargs: Any) -> FakeTensor:
            parameters = INTERFACE["classes"]["tensorrt_llm.functional.Tensor"]["__init__"]
            given = signature(parameters).bind(*args, **kwargs).arguments
            made = FakeTensor(given["shape"], f"input {given['name']}", given["dtype"])
            self.inputs[given["name"]] = given
            return made

        def concat(inputs: list[Any], dim: int) -> Any:
            if all(isinstance(value, int) for value in inputs):
                return Shape(inputs)
            total = sum(each.dims[dim] for each in inputs)
            return FakeTensor([*inputs[0].dims[:dim], total, *inputs[0].dims[dim + 1 :]], "concat")

        def split(tensor: FakeTensor, sections: Any, dim: int) -> list[FakeTensor]:
            whole = tensor.dims[dim]
            parts = sections if isinstance(sections, list) else [sections] * (whole // sections)
            assert sum(parts) == whole, (parts, tensor.dims)
            return [FakeTensor([*tensor.dims[:dim], part, *tensor.dims[dim + 1 :]], "split") for part in parts]

        def constant(array: np.ndarray, *rest: Any) -> FakeTensor:
            self.constants.append(array)
            return FakeTensor(list(array.shape), "constant")

        def select(tensor: FakeTensor, dim: int, index: FakeTensor) -> FakeTensor:
            return FakeTensor([*index.dims, *tensor.dims[1:]], "index_select")

        def network() -> World:
            return self

        made = {
            "_common.default_trtnet": network,
            "functional._create_tensor": lambda tensor, layer: tensor,
            "functional.cast": lambda tensor, dtype: FakeTensor(tensor.dims, f"cast to {dtype}"),
            "functional.concat": concat,
            "functional.constant": constant,
            "functional.index_select": select,
            "functional.split": split,
        }
        out: dict[str, Any] = {"functional.Tensor": tensor}
        for name, function in made.items():
            out[name] = self._checked(name, function)
        return out

    @staticmethod
    def _checked(name: str, function: Any) -> Any:
        declared = signature(INTERFACE["functions"][f"tensorrt_llm.{name}"])

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = declared.bind(*args, **kwargs)
            bound.apply_defaults()
            values = dict(bound.arguments)
            if "dim" in values and values["dim"] is None:
                values["dim"] = 0
            return function(*values.values())

        return call

    def add_plugin_v3(self, inputs: list[Any], shape_inputs: list[Any], plugin: Any) -> Any:
        assert shape_inputs == []
        self.layers.append(([tensor.wraps.made_by for tensor in inputs], plugin))
        out = FakeTensor([-1, plugin.fields.q_width], "plugin")
        return SimpleNamespace(name="", get_output=lambda index: out)


def recorded_model(kind: str, world: World, layers: int = 2, **changes: Any) -> Any:
    """A base class's state as TensorRT-LLM leaves it: 4 query heads, 2 kv heads of 16, 64 wide."""

    def linear(width: int) -> Any:
        return lambda x: FakeTensor([*x.dims[:-1], width], f"linear {width}")

    def same(x: FakeTensor) -> FakeTensor:
        return FakeTensor(x.dims, "norm")

    qk = kind == "qwen3"
    attention = {
        "qkv": linear((4 + 2 * 2) * 16),
        "dense": linear(64),
        "num_attention_heads": 4,
        "num_attention_kv_heads": 2,
        "attention_head_size": 16,
        "q_scaling": 2.0,
        "qk_layernorm": qk,
    }
    if qk:
        attention |= {"q_layernorm": same, "k_layernorm": same}
    of = "tensorrt_llm.models.llama.model."
    layer = Recorded(
        of + "LLaMADecoderLayer",
        input_layernorm=same,
        attention=Recorded("tensorrt_llm.layers.attention.Attention", **attention),
        post_layernorm=same,
        mlp=linear(64),
    )
    transformer = Recorded(of + "LLaMAModel", vocab_embedding=lambda ids: FakeTensor([-1, 64], "embedding"))
    transformer.__dict__.update(layers=[layer] * layers, ln_f=same)
    config = {
        "architecture": "LlamaForCausalLM",
        "dtype": "float16",
        "logits_dtype": "float32",
        "kv_dtype": "float16",
        "mapping": SimpleNamespace(world_size=1),
        "moe": SimpleNamespace(has_moe=lambda: False),
        "rotary_base": 10000.0,
        "rotary_scaling": None,
    }
    name = "qwen.config.QWenConfig" if kind.startswith("qwen") else "llama.config.LLaMAConfig"
    frequencies = Recorded("tensorrt_llm.parameter.Parameter", raw_value=10000.0 ** (-np.arange(8) / 8))
    return {
        "config": Recorded(f"tensorrt_llm.models.{name}", **{**config, **changes}),
        "transformer": transformer,
        "lm_head": linear(512),
        "rotary_inv_freq": frequencies,
    }


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """`tensorrt_llm` and `tensorrt`, as far as recorded, for one test."""
    made = World()

    class Base:
        def __init__(self, **state: Any) -> None:
            assert set(state) <= set(
                INTERFACE["classes"]["tensorrt_llm.models.modeling_utils.PretrainedModel"]["attributes"]
            )
            self.__dict__.update(state)

    contents: dict[str, dict[str, Any]] = {"models": {"LLaMAForCausalLM": Base, "QWenForCausalLM": Base}}
    for name, value in made.functions().items():
        module, _, attribute = name.partition(".")
        contents.setdefault(module, {})[attribute] = value
    monkeypatch.setitem(sys.modules, "tensorrt_llm", ModuleType("tensorrt_llm"))
    for name, values in contents.items():
        module_object = ModuleType(f"tensorrt_llm.{name}")
        module_object.__dict__.update(values)
        monkeypatch.setitem(sys.modules, f"tensorrt_llm.{name}", module_object)
    monkeypatch.setattr("trtllm_vattn.plugins.tensorrt.load_tensorrt", lambda name: plain)
    monkeypatch.delitem(sys.modules, INTERFACE["build"]["loads_the_file_as"], raising=False)
    yield made
    sys.modules.pop(INTERFACE["build"]["loads_the_file_as"], None)


def load(world: World) -> ModuleType:
    """The file as trtllm-build loads it."""
    module = ModuleType(INTERFACE["build"]["loads_the_file_as"])
    SourceFileLoader(module.__name__, str(FILE)).exec_module(module)
    return module


def prepare_arguments(**changes: Any) -> dict[str, Any]:
    """What `build` passes, by the recording."""
    names = INTERFACE["build"]["passes_to_prepare_inputs"]
    values: dict[str, Any] = {**dict.fromkeys(names), **SIZES, "use_cache": True, "max_beam_width": 1, **changes}
    assert set(values) == set(names)
    return values


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_network_is_drawn_from_recorded_parts_alone(
    world: World, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VATTN_CACHE", "mine")
    file = load(world)
    of = file.VattnQWenForCausalLM if kind.startswith("qwen") else file.VattnLlamaForCausalLM
    model = of(**recorded_model(kind, world))
    inputs = model.prepare_inputs(**prepare_arguments())
    logits = model.forward(**inputs)
    assert logits.dims == [-1, 512]
    assert logits.outputs == [("logits", "float32")]
    assert list(world.inputs) == list(inputs_of(model.limits)) == list(inputs)
    assert [plugin.fields.layer for _, plugin in world.layers] == [0, 1]
    for sources, plugin in world.layers:
        assert sources == ["view", "view", "split", *(f"input {name}" for name in plugin.fields.inputs[3:])]
        assert plugin.fields.cache == "mine"
        assert plugin.fields.scale == pytest.approx(1 / (2.0 * 4))
        assert (plugin.fields.num_heads, plugin.fields.num_kv_heads, plugin.fields.head_dim) == (4, 2, 16)
        assert plugin.fields.dtype == "float16"
        assert plugin.building
    cos, sin = world.constants
    assert cos.shape == sin.shape == (128, 8)
    np.testing.assert_allclose(cos**2 + sin**2, 1, rtol=1e-5)


def test_every_input_has_a_range_in_both_profiles(world: World) -> None:
    model = load(world).VattnLlamaForCausalLM(**recorded_model("llama", world))
    model.prepare_inputs(**prepare_arguments())
    ranges = {name: next(iter(given["dim_range"].items())) for name, given in world.inputs.items()}
    assert ranges["input_ids"] == ("tokens", [[1, 8, 8], [1, 32, 32]])
    assert ranges["lengths"] == ranges["last"] == ("lanes", [[1, 8, 8], [1, 1, 1]])
    assert ranges["extent"] == ("most", [[1, 1, 1], [1, 32, 128]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_beam_width": 4}, "max_beam_width is 4"),
        ({"use_cache": False}, "use_cache False"),
        ({"max_draft_len": 3}, "max_draft_len was asked for"),
        ({"lora_target_modules": ["attn_qkv"]}, "lora_target_modules was asked for"),
    ],
)
def test_what_the_plugin_does_not_do_is_refused(world: World, changes: dict[str, Any], message: str) -> None:
    model = load(world).VattnLlamaForCausalLM(**recorded_model("llama", world))
    with pytest.raises(ConfigError, match=message):
        model.prepare_inputs(**prepare_arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mapping": SimpleNamespace(world_size=2)}, "2 ranks"),
        ({"kv_dtype": "fp8"}, "KV of fp8 under float16"),
        ({"moe": SimpleNamespace(has_moe=lambda: True)}, "experts"),
        ({"rotary_scaling": {"rope_type": "yarn"}}, "RoPE scaled by yarn"),
        ({"residual_multiplier": 0.5}, "residual_multiplier 0.5"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier 12.0"),
        ({"output_multiplier_scale": 0.125}, "output_multiplier_scale 0.125"),
        ({"residual_mlp": True}, "residual_mlp True"),
        ({"fc_after_embed": True}, "fc_after_embed True"),
        ({"use_last_layernorm": False}, "use_last_layernorm False"),
        ({"position_embedding_type": "rope_gptj"}, "position_embedding_type 'rope_gptj'"),
        ({"position_embedding_type": SimpleNamespace(name="alibi")}, "position_embedding_type 'alibi'"),
        ({"head_size": 16, "rotary_embedding_dim": 8}, "rotary_embedding_dim 8"),
    ],
)
def test_checkpoints_that_are_not_drawn_are_refused(world: World, changes: dict[str, Any], message: str) -> None:
    model = load(world).VattnLlamaForCausalLM(**recorded_model("llama", world, **changes))
    with pytest.raises(ConfigError, match=message):
        model.prepare_inputs(**prepare_arguments())


def test_unknown_fields_of_a_checkpoint_are_refused_and_known_ones_are_not(world: World) -> None:
    state = recorded_model("llama", world)
    known = {
        "hidden_act": "silu",
        "mlp_bias": True,
        "norm_epsilon": 1e-6,
        "runtime_defaults": object(),
        "logit_cap": None,
    }
    # As TensorRT-LLM sets whatever a checkpoint's config.json has beside.
    state["config"].__dict__.update(known, position_embedding_type="rope_gpt_neox", tie_word_embeddings=True)
    load(world).VattnLlamaForCausalLM(**state).prepare_inputs(**prepare_arguments())
    state["config"].__dict__.update(logit_cap=30.0)
    with pytest.raises(ConfigError, match=r"logit_cap 30\.0 \(not known\)"):
        load(world).VattnLlamaForCausalLM(**state).prepare_inputs(**prepare_arguments())


def test_the_commands_in_the_document_use_recorded_flags() -> None:
    readme = (Path(__file__).parents[2] / "plugins" / "README.md").read_text()
    start = readme.index("trtllm-build --checkpoint_dir")
    command = readme[start : readme.index("```", start)]
    flags = {word for word in command.split() if word.startswith("--")}
    assert flags <= set(INTERFACE["build"]["command"])
    assert {"--checkpoint_dir", "--model_cls_file", "--model_cls_name"} <= flags


def test_prepare_inputs_takes_what_the_base_class_takes(world: World) -> None:
    recorded = INTERFACE["classes"]["tensorrt_llm.models.modeling_utils.PretrainedModel"]["prepare_inputs"]
    ours = inspect.signature(load(world).VattnDecoder.prepare_inputs)
    ours.bind(None, **{text.partition("=")[0]: None for text in recorded})
    assert list(ours.parameters)[1:7] == [text.partition("=")[0] for text in recorded[:6]]
