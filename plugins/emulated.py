"""An emulated TensorRT engine: torch computes the network and calls the plugin as TensorRT would.

It serves where no TensorRT runtime is installed, or none that runs on the GPU at hand (tensorrt-rtx refuses compute
capability 9.0). The plugin gets TensorRT's calls in TensorRT's order: an instance for each layer is made (phase BUILD),
asked for types, shapes and formats, configured and serialised; it is made again from its fields (phase RUNTIME) and
cloned for each execution context; `on_shape_change` comes before the first `enqueue` and at each new shape; `enqueue`
gets raw addresses, a workspace and a stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.plugins import plain
from trtllm_vattn.plugins.attend import tensor_over
from trtllm_vattn.plugins.fields import AttentionFields, to_collection
from trtllm_vattn.plugins.networks.decoder import build_decoder, inputs_of
from trtllm_vattn.plugins.networks.spec import DecoderSpec, PlanLimits
from trtllm_vattn.plugins.plugin import NAME, NAMESPACE, TRT_DTYPES, VERSION, launching_on, register


@dataclass(frozen=True)
class Desc:
    """A PluginTensorDesc."""

    dims: tuple[int, ...]
    type: Any
    format: Any

    @property
    def desc(self) -> Desc:
        """This descriptor as a DynamicPluginTensorDesc's field."""
        return self


class Constants:
    """The IExprBuilder, of which the plugin uses constants alone."""

    def constant(self, value: int) -> int:
        return value


def describe(trt: Any, fields: AttentionFields, tokens: int, lanes: int, most: int) -> tuple[list[Desc], list[Desc]]:
    """Descriptors of a layer's inputs and outputs; -1 is a size not known yet."""
    linear, own = trt.TensorFormat.LINEAR, getattr(trt.DataType, TRT_DTYPES[fields.dtype])
    inputs = []
    for name in fields.inputs:
        if name in ("q", "k", "v", "qkv"):
            inputs.append(Desc((tokens, fields.width_of(name)), own, linear))
        else:
            inputs.append(Desc((most if name == "extent" else lanes,), trt.DataType.INT32, linear))
    return inputs, [Desc((tokens, fields.q_width), own, linear)]


def built_layer(trt: Any, fields: AttentionFields) -> Any:
    """A layer that was built, serialised and loaded as TensorRT does it. Raises as the plugin's callbacks."""
    register(trt)
    creator = trt.get_plugin_registry().get_creator(NAME, VERSION, NAMESPACE)
    collection, keep = to_collection(trt, fields)
    added = creator.create_plugin(f"attention_{fields.layer}", collection, trt.TensorRTPhase.BUILD)
    del keep
    layer = added.clone()
    inputs, outputs = describe(trt, fields, -1, -1, -1)
    layer.get_output_data_types([each.type for each in inputs])
    if trt is plain:
        # Real expressions can only be made by a real builder.
        layer.get_output_shapes([list(each.dims) for each in inputs], [], Constants())
    both = [*inputs, *outputs]
    for position in range(len(both)):
        if not layer.supports_format_combination(position, both, len(inputs)):
            raise ConfigError(f"attention layer {fields.layer} refuses {both[position]} at position {position}")
    layer.configure_plugin(inputs, outputs)
    layer.get_workspace_size(inputs, outputs)
    return creator.create_plugin(
        f"attention_{fields.layer}", layer.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME
    )


def run_layer(
    trt: Any,
    layer: Any,
    fields: AttentionFields,
    given: Mapping[str, torch.Tensor],
    out: torch.Tensor,
    shaped: dict[int, tuple[int, ...]],
    stream: int,
) -> None:
    """Call a layer as TensorRT does: `on_shape_change` where its shapes are not those in `shaped`, then `enqueue`."""
    sizes = (len(given[fields.inputs[0]]), len(given["lengths"]), len(given.get("extent", ())))
    inputs, outputs = describe(trt, fields, *sizes)
    if shaped.get(id(layer)) != sizes:
        layer.on_shape_change(inputs, outputs)
        shaped[id(layer)] = sizes
    addresses = [given[name].data_ptr() for name in fields.inputs]
    layer.enqueue(inputs, outputs, addresses, [out.data_ptr()], 0, stream)


class TorchEmitter:
    """Computes eagerly; T is a torch tensor. `layers` are an execution context's plugins by layer number."""

    def __init__(self, trt: Any, layers: Mapping[int, Any], stream: int, shaped: dict[int, tuple[int, ...]]) -> None:
        self.trt, self.layers, self.stream, self.shaped = trt, layers, stream, shaped

    def weight(self, name: str, value: torch.Tensor) -> torch.Tensor:
        return value

    def gather(self, table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return table.index_select(0, indices)

    add, subtract, multiply = staticmethod(torch.add), staticmethod(torch.sub), staticmethod(torch.mul)
    reshape, to_float = staticmethod(torch.reshape), staticmethod(torch.Tensor.float)
    linear, silu = staticmethod(torch.nn.functional.linear), staticmethod(torch.nn.functional.silu)

    def slice(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return x[..., start:stop]

    def concat(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([a, b], dim=-1)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    def attention(self, fields: AttentionFields, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        inputs = {name: given[name].contiguous() for name in fields.inputs}
        q = inputs[fields.inputs[0]]
        out = q.new_empty(len(q), fields.q_width)
        run_layer(self.trt, self.layers[fields.layer], fields, inputs, out, self.shaped, self.stream)
        return out


class EmulatedContext:
    """The part of IExecutionContext that `EngineModel` uses."""

    def __init__(self, engine: EmulatedEngine) -> None:
        self.engine = engine
        self.layers = {number: layer.attach_to_context(None) for number, layer in engine.layers.items()}
        self._shaped: dict[int, tuple[int, ...]] = {}
        self._dims: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return 0 <= index < self.engine.num_optimization_profiles

    def set_device_memory(self, address: int, size: int) -> None:
        """Emulation needs none."""

    def set_input_shape(self, name: str, dims: Sequence[int]) -> bool:
        self._dims[name] = tuple(dims)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        """Compute the network on a stream, reading inputs and writing ``logits`` at the addresses that were set."""
        engine = self.engine
        given = {
            name: tensor_over(self._addresses[name], self._dims[name], torch.int32, engine.device)
            for name in inputs_of(engine.limits)
        }
        emitter = TorchEmitter(engine.trt, self.layers, stream, self._shaped)
        with launching_on(stream, engine.device), torch.inference_mode():
            logits = build_decoder(emitter, engine.spec, engine.limits, given)
            tensor_over(self._addresses["logits"], tuple(logits.shape), logits.dtype, engine.device).copy_(logits)
        return True


class EmulatedEngine:
    """The part of ICudaEngine that `EngineModel` uses, without a plan.

    Parameters
    ----------
    trt : module
        The TensorRT module whose plugin classes are used; `plain` where none is installed.

    Raises
    ------
    ConfigError
        The plugin refuses a layer.
    """

    device_memory_size_v2 = 0

    def __init__(self, spec: DecoderSpec, limits: PlanLimits, trt: Any = plain) -> None:
        self.spec, self.limits, self.trt = spec, limits, trt
        self.device = spec.weights["lm_head.weight"].device
        self.num_optimization_profiles = 2 if limits.max_chunk else 1
        self.layers = {layer: built_layer(trt, spec.layer_fields(layer, limits)) for layer in range(spec.num_layers)}

    @property
    def storages(self) -> list[torch.Tensor]:
        """The weights, which a captured step reads."""
        return list(self.spec.weights.values())

    def create_execution_context(self, strategy: object = None) -> EmulatedContext:
        return EmulatedContext(self)
