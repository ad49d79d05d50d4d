"""Networks as ONNX models with the plugin as a node, for tensorrt-rtx, which takes plugins only from ONNX.

Weights are in a file beside the model, so that models of any size stay below protobuf's limit of 2 GB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.plugins.fields import AttentionFields
from trtllm_vattn.plugins.networks.decoder import build_decoder, inputs_of
from trtllm_vattn.plugins.networks.spec import DecoderSpec, PlanLimits
from trtllm_vattn.plugins.plugin import NAME

OPSET = 17
IR_VERSION = 9
KINDS = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.int64: "INT64"}


class OnnxEmitter:
    """Emits nodes; T is the name of a tensor. Weights are written to `file` as they come."""

    def __init__(self, file: Path, dtype: torch.dtype) -> None:
        try:
            import onnx
        except ImportError as error:
            raise ConfigError("ONNX models need onnx: pip install 'trtllm-vattn[tensorrt-rtx]'") from error
        self.onnx, self.dtype = onnx, dtype
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._names: set[str] = set()
        self._file = file
        self._file.write_bytes(b"")
        self._end = 0

    def _node(self, operation: str, inputs: Sequence[str], name: str = "", **attributes: Any) -> str:
        name = name or f"{operation}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(operation, list(inputs), [name], name=name, **attributes))
        return name

    def _kind(self, dtype: torch.dtype) -> int:
        return int(self.onnx.TensorProto.DataType.Value(KINDS[dtype]))

    def _integers(self, values: Sequence[int]) -> str:
        return self.weight(f"integers_{'_'.join(str(v).replace('-', 'm') for v in values)}", torch.tensor(list(values)))

    def weight(self, name: str, value: torch.Tensor) -> str:
        if name in self._names:
            return name
        self._names.add(name)
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        proto = self.onnx.TensorProto(name=name, dims=list(value.shape), data_type=self._kind(value.dtype))
        if value.numel() < 64:
            proto.raw_data = raw  # shapes and factors; some of them must be known when the model is read
        else:
            proto.data_location = self.onnx.TensorProto.EXTERNAL
            for key, text in (("location", self._file.name), ("offset", self._end), ("length", len(raw))):
                proto.external_data.add(key=key, value=str(text))
            with self._file.open("ab") as out:
                # Aligned, as ONNX asks of files that are mapped.
                self._end += out.write(raw + bytes(-len(raw) % 4096))
        self.initializers.append(proto)
        return name

    def gather(self, table: str, indices: str) -> str:
        return self._node("Gather", [table, indices], axis=0)

    def linear(self, x: str, weight: str) -> str:
        return self._node("MatMul", [x, self._node("Transpose", [weight], perm=[1, 0])])

    def add(self, a: str, b: str) -> str:
        return self._node("Add", [a, b])

    def subtract(self, a: str, b: str) -> str:
        return self._node("Sub", [a, b])

    def multiply(self, a: str, b: str) -> str:
        return self._node("Mul", [a, b])

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        return self._node("Reshape", [x, self._integers(shape)])

    def slice(self, x: str, start: int, stop: int) -> str:
        return self._node("Slice", [x, *(self._integers([value]) for value in (start, stop, 2))])

    def concat(self, a: str, b: str) -> str:
        return self._node("Concat", [a, b], axis=2)

    def _cast(self, x: str, dtype: torch.dtype) -> str:
        return self._node("Cast", [x], to=self._kind(dtype))

    def rms_norm(self, x: str, weight: str, eps: float) -> str:
        wide = self._cast(x, torch.float32)
        square = self._node("ReduceMean", [self.multiply(wide, wide)], axes=[-1], keepdims=1)
        root = self._node("Sqrt", [self.add(square, self.weight(f"eps_{eps}", torch.tensor([eps])))])
        return self.multiply(weight, self._cast(self._node("Div", [wide, root]), self.dtype))

    def silu(self, x: str) -> str:
        return self.multiply(x, self._node("Sigmoid", [x]))

    def to_float(self, x: str) -> str:
        return self._cast(x, torch.float32)

    def attention(self, fields: AttentionFields, given: Mapping[str, str]) -> str:
        return self._node(NAME, [given[name] for name in fields.inputs], f"attention_{fields.layer}", **asdict(fields))


def write_onnx(spec: DecoderSpec, limits: PlanLimits, path: Path) -> Path:
    """Write a network to `path` and its weights to ``weights.bin`` beside it; returns `path`.

    Inputs and outputs are named as `decoder.inputs_of` and ``logits``. Raises ConfigError without the onnx package.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    emitter = OnnxEmitter(path.parent / "weights.bin", spec.weights["lm_head.weight"].dtype)
    helper, tensor = emitter.onnx.helper, emitter.onnx.TensorProto
    inputs = inputs_of(limits)
    logits = build_decoder(emitter, spec, limits, {name: name for name in inputs})
    emitter.nodes.append(helper.make_node("Identity", [logits], ["logits"], name="logits"))
    graph = helper.make_graph(
        emitter.nodes,
        "decoder",
        [helper.make_tensor_value_info(name, tensor.INT32, [size]) for name, size in inputs.items()],
        [helper.make_tensor_value_info("logits", tensor.FLOAT, ["lanes", spec.vocab_size])],
        emitter.initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    path.write_bytes(model.SerializeToString())
    return path
