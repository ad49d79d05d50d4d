"""Plans by a real builder: tensorrt-rtx parses, builds and serialises networks with the plugin, for cards that are not
here. It runs none of them: that takes such a card."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import fields_of

from trtllm_vattn.cli.main import main
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.plugins.build import RTX_TARGETS, PlanBuilder, build_folder, read_folder
from trtllm_vattn.plugins.fields import AttentionFields
from trtllm_vattn.plugins.inspect import inspect_folder
from trtllm_vattn.plugins.networks.decoder import inputs_of
from trtllm_vattn.plugins.networks.spec import DecoderSpec, PlanLimits
from trtllm_vattn.plugins.networks.trt_emitter import add_attention, build_network
from trtllm_vattn.plugins.plugin import NAME
from trtllm_vattn.plugins.session import EngineSession
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.models import load_model

LIMITS = PlanLimits(max_lanes=4, max_chunk=32, max_seq_len=128)


def one_layer(fields: AttentionFields, path: Path, widths: dict[str, int] | None = None, **attributes: Any) -> Path:
    """An ONNX model of one attention layer, with widths or attributes that may be wrong."""
    from onnx import TensorProto, helper

    kind = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
    inputs = []
    for name in fields.inputs:
        if name in ("q", "k", "v"):
            width = (widths or {}).get(name, fields.width_of(name))
            inputs.append(helper.make_tensor_value_info(name, kind[fields.dtype], ["tokens", width]))
        else:
            inputs.append(helper.make_tensor_value_info(name, TensorProto.INT32, ["n" + name]))
    values = {name: value for name, value in {**asdict(fields), **attributes}.items() if value is not None}
    node = helper.make_node(NAME, list(fields.inputs), ["out"], name="attention", **values)
    out = helper.make_tensor_value_info("out", kind[fields.dtype], ["tokens", fields.q_width])
    graph = helper.make_graph([node], "layer", inputs, [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def build(trt: Any, path: Path) -> bytes:
    builder = PlanBuilder(trt, LIMITS, RTX_TARGETS)
    builder.parse(path)
    profile = builder.builder.create_optimization_profile()
    for index in range(builder.network.num_inputs):
        tensor = builder.network.get_input(index)
        sizes = [(count, *tensor.shape[1:]) for count in (1, 2, 4)]
        profile.set_shape(tensor.name, *sizes)
    builder.config.add_optimization_profile(profile)
    plan = builder.builder.build_serialized_network(builder.network, builder.config)
    if plan is None:
        from trtllm_vattn.plugins.callback_errors import error_of

        raise error_of("no plan")
    return bytes(plan)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"slots": 0, "context": 0}, {"slots": 2}])
def test_one_layer_becomes_a_plan(rtx: Any, tmp_path: Path, dtype: str, changes: dict[str, int]) -> None:
    fields = fields_of(dtype=dtype, cache="a-cache-by-name", **changes)
    plan = build(rtx, one_layer(fields, tmp_path / "layer.onnx"))
    assert NAME.encode() in plan
    assert b"a-cache-by-name" in plan
    assert len(plan) < 1 << 20, "a layer has no weights, and a plan no copy of a cache"


def test_wrong_widths_are_refused_with_our_words(rtx: Any, tmp_path: Path) -> None:
    path = one_layer(fields_of(), tmp_path / "layer.onnx", widths={"k": 48})
    with pytest.raises(ConfigError, match=r"input k .* has shape \[-1, 48\]; it must be \[tokens, 32\]"):
        build(rtx, path)


def test_a_wrong_dtype_is_refused_with_our_words(rtx: Any, tmp_path: Path) -> None:
    path = one_layer(fields_of(dtype="float16"), tmp_path / "layer.onnx", dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"input q of attention layer 1 is DataType.HALF; it must be DataType.BF16"):
        build(rtx, path)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"scale": None}, "VattnAttention was given no scale"),
        ({"dtype": "int8"}, "the field dtype is 'int8'"),
        ({"num_kv_heads": 3}, "4 query heads over 3 kv heads"),
        ({"layer": [1, 2]}, "the field layer is"),
    ],
)
def test_wrong_fields_are_refused_with_our_words(
    rtx: Any, tmp_path: Path, attributes: dict[str, Any], message: str
) -> None:
    path = one_layer(fields_of(), tmp_path / "layer.onnx", **attributes)
    with pytest.raises(ConfigError, match=message):
        build(rtx, path)


@pytest.mark.parametrize(("name", "dtype"), [("tiny-llama", torch.bfloat16), ("tiny-qwen3", torch.float16)])
def test_a_whole_model_becomes_a_plan(rtx: Any, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model = load_model(name, "cpu", dtype)
    found = build_folder(model, tmp_path, LIMITS, rtx, RTX_TARGETS, name)
    assert found["layers"]["PLUGIN_V3"] == 2
    assert set(found["tensors"]) == {*inputs_of(LIMITS), "logits"}
    inspection = inspect_folder(tmp_path)
    assert inspection.wrong == []
    assert "2 plugin layers among" in "\n".join(inspection.lines)
    assert "sm_80, sm_89, sm_120" in "\n".join(inspection.lines)


def test_a_plan_holds_no_copy_of_a_cache(rtx: Any, tmp_path: Path) -> None:
    """It does not grow with the cache, of which it has the name alone."""
    model = load_model("tiny-llama", "cpu", torch.float16)
    sizes = []
    for lanes in (4, 1024):
        limits = PlanLimits(max_lanes=lanes, max_chunk=32, max_seq_len=128)
        sizes.append(build_folder(model, tmp_path / str(lanes), limits, rtx, ["89"])["plan_bytes"])
    cache = 1024 * shape_of(model, 1024, 128).token_bytes * 128
    assert abs(sizes[1] - sizes[0]) < 1 << 16 < cache // 1000, (sizes, cache)


def test_a_plan_that_was_changed_is_noticed(rtx: Any, tmp_path: Path) -> None:
    build_folder(load_model("tiny-llama", "cpu", torch.float16), tmp_path, LIMITS, rtx, ["89"], "tiny-llama")
    assert read_folder(tmp_path)["targets"] == ["89"]
    path = tmp_path / "engine.plan"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ConfigError, match=r"is not the plan that engine\.json describes"):
        read_folder(tmp_path)


def test_an_engine_with_a_cache_in_it_is_found_out(rtx: Any, tmp_path: Path) -> None:
    build_folder(load_model("tiny-llama", "cpu", torch.float16), tmp_path, LIMITS, rtx, ["89"], "tiny-llama")
    path = tmp_path / "engine.json"
    engine = json.loads(path.read_text())
    engine["tensors"]["past_key_value_0"] = [-1, 2, 2, 128, 32]
    engine["layers"]["PLUGIN_V3"] = 3
    path.write_text(json.dumps(engine))
    wrong = inspect_folder(tmp_path).wrong
    assert any("3 plugin layers, the decoder has 2" in text for text in wrong)
    assert any("['past_key_value_0']" in text for text in wrong)


def test_unknown_targets_are_refused(rtx: Any) -> None:
    with pytest.raises(ConfigError, match=r"tensorrt_rtx does not build for 90; there are .*80, 86, 89, 120"):
        PlanBuilder(rtx, LIMITS, ["90"])


class WithPlugins:
    """tensorrt_rtx's network, with `add_plugin_v3` of full TensorRT: the plugin's place is taken by its first input, so
    that the real builder checks everything around it."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.plugins: list[tuple[list[str], Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def add_plugin_v3(self, inputs: list[Any], shape_inputs: list[Any], plugin: Any) -> Any:
        assert shape_inputs == []
        plugin.get_output_data_types([tensor.dtype for tensor in inputs])
        self.plugins.append(([tuple(tensor.shape) for tensor in inputs], plugin))
        return self.network.add_identity(inputs[0])


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_network_apis_drawing_is_taken_by_a_real_builder(rtx: Any, name: str, dtype: torch.dtype) -> None:
    model = load_model(name, "cpu", dtype)
    spec = DecoderSpec.of(model, LIMITS.max_seq_len)
    builder = PlanBuilder(rtx, LIMITS, ["89"])
    network = WithPlugins(builder.network)
    emitter = build_network(rtx, network, spec, LIMITS)
    assert [plugin.fields.layer for _, plugin in network.plugins] == [0, 1]
    assert network.plugins[0][0][:3] == [(-1, 128), (-1, 64), (-1, 64)]
    assert tuple(builder.network.get_output(0).shape) == (-1, spec.vocab_size)
    plan = builder.build()
    assert len(plan) > 100_000
    assert set(spec.weights) <= set(emitter.weights), "a weight was left out of the network"


def test_a_network_that_takes_no_plugins_says_where_to_go(rtx: Any) -> None:
    builder = PlanBuilder(rtx, LIMITS)
    with pytest.raises(ConfigError, match="tensorrt_rtx adds no plugins to networks; write ONNX"):
        add_attention(rtx, builder.network, fields_of(), [])


def test_the_command_line_builds_and_inspects(rtx: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "engine")
    arguments = ["plugin", "build", "tiny-llama", "--output", folder, "--with", "tensorrt_rtx", "--max-lanes", "2"]
    assert main([*arguments, "--max-chunk", "16", "--max-seq-len", "64", "--cache", "mine", "--targets", "80,120"]) == 0
    assert "sm_80, sm_120" in capsys.readouterr().out
    assert main(["plugin", "inspect", folder, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["engine"]["limits"]["cache"] == "mine"
    assert found["wrong"] == []
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"does not take .*engine\.plan here, where torch sees no GPU"):
            EngineSession.from_folder(folder)
    assert main(["plugin", "list"]) == 0
    listed = capsys.readouterr().out
    assert "VattnAttention version 1, IPluginV3" in listed
    assert str(rtx.__version__) in listed
    assert main(["plugin", "inspect", str(tmp_path)]) == 2
    assert "holds no engine" in capsys.readouterr().err
