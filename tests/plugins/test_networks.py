"""The networks' arithmetic: ONNX computed by onnx's reference, the plugin's node by the plugin itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layers import Layer, fields_of

from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.plugins import registry
from trtllm_vattn.plugins.fields import AttentionFields
from trtllm_vattn.plugins.networks.decoder import inputs_of
from trtllm_vattn.plugins.networks.onnx_emitter import write_onnx
from trtllm_vattn.plugins.networks.spec import DecoderSpec, PlanLimits
from trtllm_vattn.plugins.plugin import NAME
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.models import load_model

LIMITS = PlanLimits(max_lanes=2, max_chunk=16, max_seq_len=64)


def evaluator(path: Path) -> Any:
    """onnx's reference implementation, with the plugin for our node."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    def run(self: Any, *inputs: np.ndarray, **attributes: Any) -> tuple[np.ndarray]:
        fields = AttentionFields(**{name: attributes[name] for name in AttentionFields.__dataclass_fields__})
        given = {name: torch.from_numpy(np.array(x)) for name, x in zip(fields.inputs, inputs, strict=True)}
        integers = {name: given.pop(name).tolist() for name in fields.inputs[3:]}
        most = len(integers["extent"])
        out = Layer(fields).call(given, integers["lengths"], integers["slots"], integers["query_lengths"], most)
        return (out.numpy(),)

    operation = type(NAME, (OpRun,), {"op_domain": "", "_run": run})
    return ReferenceEvaluator(str(path), new_ops=[operation])


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-qwen3"])
def test_onnx_computes_the_models_logits(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    model = load_model(name, "cpu", torch.float32)
    spec = DecoderSpec.of(model, LIMITS.max_seq_len)
    session = evaluator(write_onnx(spec, LIMITS, tmp_path / "model.onnx"))
    prompt = [5, 9, 200, 7, 31, 2]
    with torch.inference_mode():
        want = model(torch.tensor([prompt])).logits[0]

    def run(**values: list[int]) -> np.ndarray:
        assert set(values) == set(inputs_of(LIMITS))
        given = {name: np.array(value, np.int32) for name, value in values.items()}
        logits: np.ndarray = session.run(None, given)[0]
        return logits

    with make_cache("vattn", shape_of(model, 2, 64), "cpu") as cache:
        registry.attach("kv", cache, "torch")
        cache.admit("a", 5)
        slot, padded = cache.slot_of("a"), [*prompt[:5], 0, 0, 0]
        positions = [0, 1, 2, 3, 4, 0, 0, 0]
        prefilled = run(
            input_ids=padded,
            positions=positions,
            lengths=[5],
            slots=[slot],
            query_lengths=[5],
            extent=[0] * 5,
            last=[4],
        )
        np.testing.assert_allclose(prefilled[0], want[4], rtol=1e-3, atol=1e-4)
        cache.extend("a", 1)
        # Two lanes, one of them idle.
        lengths = [6, 0] if slot == 0 else [0, 6]
        ids = [prompt[5], 0] if slot == 0 else [0, prompt[5]]
        stepped = run(
            input_ids=ids,
            positions=[max(0, length - 1) for length in lengths],
            lengths=lengths,
            slots=[0, 0],
            query_lengths=[0, 0],
            extent=[0],
            last=[0, 1],
        )
        np.testing.assert_allclose(stepped[slot], want[5], rtol=1e-3, atol=1e-4)
        registry.detach("kv")


def test_weights_lie_beside_the_model_once(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    model = load_model("tiny-llama", "cpu", torch.bfloat16)
    spec = DecoderSpec.of(model, 64)
    path = write_onnx(spec, LIMITS, tmp_path / "model.onnx")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in spec.weights.values())
    there = (tmp_path / "weights.bin").stat().st_size
    assert weights <= there < weights + 4096 * len(spec.weights)
    assert path.stat().st_size < 1 << 18


def test_what_is_not_drawn_is_refused() -> None:
    model = load_model("tiny-llama", "cpu", torch.float64)
    with pytest.raises(ConfigError, match=r"the model is of torch\.float64; load it as one of float32"):
        DecoderSpec.of(model, 64)
    model = load_model("tiny-llama", "cpu", torch.float32)
    model.config.model_type = "gpt2"
    with pytest.raises(ConfigError, match="no network for a gpt2 model; there are llama"):
        DecoderSpec.of(model, 64)
    with pytest.raises(ConfigError, match="max_lanes is 0"):
        PlanLimits(max_lanes=0)


def test_a_real_modules_classes_live_the_same_life(rtx: Any) -> None:
    """The classes over tensorrt_rtx's own interfaces: made, asked, cloned, and run on the host."""
    fields = fields_of(slots=0, context=0)
    with make_cache("vattn", fields_cache(), "cpu") as cache:
        registry.attach("kv", cache, "torch")
        cache.admit("a", 1)
        layer = Layer(fields, trt=rtx)
        assert isinstance(layer.plugin, rtx.IPluginV3)
        assert layer.plugin.get_capability_interface(rtx.PluginCapabilityType.RUNTIME) is layer.plugin
        own = {name: torch.randn(1, fields.width_of(name)) for name in ("q", "k", "v")}
        got = layer.call(own, [1])
        want = own["v"].view(fields.num_kv_heads, -1).repeat_interleave(2, 0).flatten()
        torch.testing.assert_close(got[0], want)
        registry.detach("kv")


def fields_cache() -> Any:
    from layers import DIM, KV_HEADS, LAYERS, TOKENS

    from trtllm_vattn.cache.base import CacheShape

    return CacheShape(LAYERS, KV_HEADS, DIM, torch.float32, 2, TOKENS)
