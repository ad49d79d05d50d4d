"""Networks by TensorRT's own network API (TensorRT 10 or newer). Networks are strongly typed, so casts are explicit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.plugins.callback_errors import clear_errors, error_of
from trtllm_vattn.plugins.fields import AttentionFields, to_collection
from trtllm_vattn.plugins.networks.decoder import build_decoder, inputs_of
from trtllm_vattn.plugins.networks.spec import DecoderSpec, PlanLimits
from trtllm_vattn.plugins.plugin import NAME, NAMESPACE, VERSION, register

KINDS = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16", torch.int32: "INT32"}


def add_attention(trt: Any, network: Any, fields: AttentionFields, inputs: Sequence[Any]) -> Any:
    """Add a layer with the plugin to a network; returns the layer, its output 0 is ``[tokens, q_width]``.

    Raises ConfigError where an input's shape or dtype is refused, or the module's networks take no plugins
    (tensorrt_rtx takes them from ONNX alone).
    """
    register(trt)
    if not hasattr(network, "add_plugin_v3"):
        raise ConfigError(
            f"{trt.__name__} adds no plugins to networks; write ONNX and parse it (networks.onnx_emitter)"
        )
    for name, tensor in zip(fields.inputs, inputs, strict=True):
        fields.check_input(name, tensor.shape)
    clear_errors()
    collection, keep = to_collection(trt, fields)
    creator = trt.get_plugin_registry().get_creator(NAME, VERSION, NAMESPACE)
    plugin = creator.create_plugin(f"attention_{fields.layer}", collection, trt.TensorRTPhase.BUILD)
    layer = network.add_plugin_v3(list(inputs), [], plugin)
    del keep
    if layer is None:
        raise error_of(f"TensorRT did not take attention layer {fields.layer}")
    layer.name = f"attention_{fields.layer}"
    return layer


class TensorRTEmitter:
    """Emits layers of a network; T is an ITensor. `weights` keeps the weights alive until the plan is built."""

    def __init__(self, trt: Any, network: Any, dtype: torch.dtype) -> None:
        self.trt, self.network, self.dtype = trt, network, dtype
        self.weights: dict[str, tuple[torch.Tensor | np.ndarray, Any]] = {}

    def _kind(self, dtype: torch.dtype) -> Any:
        return getattr(self.trt.DataType, KINDS[dtype])

    def weight(self, name: str, value: torch.Tensor) -> Any:
        if name not in self.weights:
            held = value.detach().cpu().contiguous()
            weights = self.trt.Weights(self._kind(held.dtype), held.data_ptr(), held.numel())
            layer = self.network.add_constant(tuple(held.shape), weights)
            layer.name = name
            self.weights[name] = (held, layer.get_output(0))
        return self.weights[name][1]

    def gather(self, table: Any, indices: Any) -> Any:
        return self.network.add_gather(table, indices, 0).get_output(0)

    def linear(self, x: Any, weight: Any) -> Any:
        plain, turned = self.trt.MatrixOperation.NONE, self.trt.MatrixOperation.TRANSPOSE
        return self.network.add_matrix_multiply(x, plain, weight, turned).get_output(0)

    def _elementwise(self, a: Any, b: Any, operation: str) -> Any:
        return self.network.add_elementwise(a, b, getattr(self.trt.ElementWiseOperation, operation)).get_output(0)

    def add(self, a: Any, b: Any) -> Any:
        return self._elementwise(a, b, "SUM")

    def subtract(self, a: Any, b: Any) -> Any:
        return self._elementwise(a, b, "SUB")

    def multiply(self, a: Any, b: Any) -> Any:
        return self._elementwise(a, b, "PROD")

    def reshape(self, x: Any, shape: Sequence[int]) -> Any:
        layer = self.network.add_shuffle(x)
        layer.reshape_dims = tuple(shape)
        return layer.get_output(0)

    def slice(self, x: Any, start: int, stop: int) -> Any:
        # The number of tokens is known only when the network runs, so the slice's size is computed there.
        shape = self._cast_to(self.network.add_shape(x).get_output(0), self.trt.DataType.INT32)
        times = self._constant(f"narrow_to_{stop - start}", np.array([1, 1, stop - start], np.int32))
        over = self._constant(f"narrow_from_{x.shape[2]}", np.array([1, 1, x.shape[2]], np.int32))
        size = self._elementwise(self._elementwise(shape, times, "PROD"), over, "FLOOR_DIV")
        layer = self.network.add_slice(x, (0, 0, start), (0, 0, 0), (1, 1, 1))
        layer.set_input(2, size)
        return layer.get_output(0)

    def _constant(self, name: str, values: np.ndarray) -> Any:
        if name not in self.weights:
            layer = self.network.add_constant(values.shape, self.trt.Weights(values))
            self.weights[name] = (values, layer.get_output(0))
        return self.weights[name][1]

    def concat(self, a: Any, b: Any) -> Any:
        layer = self.network.add_concatenation([a, b])
        layer.axis = 2
        return layer.get_output(0)

    def _cast_to(self, x: Any, kind: Any) -> Any:
        return x if x.dtype == kind else self.network.add_cast(x, kind).get_output(0)

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        dimensions = len(x.shape)
        wide = self._cast_to(x, self.trt.DataType.FLOAT)
        mean = self.network.add_reduce(
            self.multiply(wide, wide), self.trt.ReduceOperation.AVG, 1 << (dimensions - 1), True
        ).get_output(0)
        small = self._constant(f"eps_{eps}_{dimensions}", np.full([1] * dimensions, eps, np.float32))
        root = self.network.add_unary(self.add(mean, small), self.trt.UnaryOperation.SQRT).get_output(0)
        normal = self._cast_to(self._elementwise(wide, root, "DIV"), self._kind(self.dtype))
        return self.multiply(weight, normal)

    def silu(self, x: Any) -> Any:
        sigmoid = self.network.add_activation(x, self.trt.ActivationType.SIGMOID).get_output(0)
        return self.multiply(x, sigmoid)

    def to_float(self, x: Any) -> Any:
        return self._cast_to(x, self.trt.DataType.FLOAT)

    def attention(self, fields: AttentionFields, given: Mapping[str, Any]) -> Any:
        inputs = [given[name] for name in fields.inputs]
        return add_attention(self.trt, self.network, fields, inputs).get_output(0)


def build_network(trt: Any, network: Any, spec: DecoderSpec, limits: PlanLimits) -> TensorRTEmitter:
    """Emit a decoder into an empty, strongly typed network, with its inputs and the output ``logits``."""
    emitter = TensorRTEmitter(trt, network, spec.weights["lm_head.weight"].dtype)
    inputs = {name: network.add_input(name, trt.DataType.INT32, (-1,)) for name in inputs_of(limits)}
    logits = build_decoder(emitter, spec, limits, inputs)
    logits.name = "logits"
    network.mark_output(logits)
    return emitter
