"""`VattnAttention`, a TensorRT plugin (IPluginV3) in Python, and its creator.

Lengths and slots are device tensors and the cache's addresses never change, so a CUDA graph of an engine with this
plugin is captured once and stays valid while memory is remapped beneath the cache; no Python runs in a replay.
TensorRT-LLM's own plugin takes lengths on the host, so its session captures anew in every step.

q and k arrive with RoPE applied. The same classes serve `tensorrt`, `tensorrt_rtx` and `plain`.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.plugins import registry
from trtllm_vattn.plugins.attend import attend, rows_per_lane, tensor_over
from trtllm_vattn.plugins.callback_errors import keep_error
from trtllm_vattn.plugins.fields import KINDS, AttentionFields, from_collection, to_collection

NAME = "VattnAttention"
VERSION = "1"
NAMESPACE = ""

TRT_DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
"""TensorRT's DataType names by the names in `fields.DTYPES`."""


class AttentionLayer:
    """The plugin's methods. `plugin_types` combines them with the interfaces of a TensorRT module.

    Parameters
    ----------
    building : bool
        Whether the layer belongs to a network that is being built. A builder may time it on inputs of any content,
        lengths and slots among them, so it launches nothing then. Layers of a loaded plan have the phase RUNTIME.
    """

    def __init__(self, trt: Any, fields: AttentionFields, building: bool) -> None:
        self.trt, self.fields, self.building = trt, fields, building
        self.num_outputs = 1
        self.plugin_name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
        self._dtype = getattr(trt.DataType, TRT_DTYPES[fields.dtype])
        self._buffers: list[Any] = []

    def get_capability_interface(self, type: Any) -> Any:
        return self

    def clone(self) -> Any:
        return plugin_types(self.trt).plugin(self.fields, self.building)

    def attach_to_context(self, context: Any) -> Any:
        """A clone for an execution context; clones attend over the same cache."""
        return self.clone()

    def get_fields_to_serialize(self) -> Any:
        collection, self._buffers = to_collection(self.trt, self.fields)
        return collection

    # -- building --------------------------------------------------------------------------------------------------

    @keep_error
    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        self._check_count(len(input_types))
        for name, got in zip(self.fields.inputs, input_types, strict=True):
            if got != self._type_of(name):
                raise ConfigError(
                    f"input {name} of attention layer {self.fields.layer} is {got}; it must be {self._type_of(name)}: "
                    "cast it, or build the layer with another dtype"
                )
        return [self._dtype]

    @keep_error
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], expressions: Any) -> list[Any]:
        self._check_count(len(inputs))
        for name, dims in zip(self.fields.inputs, inputs, strict=True):
            self.fields.check_input(name, [-1] * len(dims))
        out = self.trt.DimsExprs(2)
        out[0], out[1] = inputs[0][0], expressions.constant(self.fields.q_width)
        return [out]

    @keep_error
    def supports_format_combination(self, position: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        """Linear memory only: q, k, v and the output in the plan's dtype, all else int32."""
        self._check_count(num_inputs)
        names = (*self.fields.inputs, "out")
        described = in_out[position].desc
        linear = described.format == self.trt.TensorFormat.LINEAR
        return bool(linear and described.type == self._type_of(names[position]))

    @keep_error
    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._check_count(len(inputs))
        for name, dynamic in zip(self.fields.inputs, inputs, strict=True):
            self.fields.check_input(name, dynamic.desc.dims)

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        """0: the attention backend holds the kernels' workspace, one for all layers."""
        return 0

    def get_valid_tactics(self) -> list[int]:
        return []

    def set_tactic(self, tactic: int) -> None:
        """There is only one tactic."""

    # -- running ---------------------------------------------------------------------------------------------------

    @keep_error
    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Raise ConfigError for shapes and caches that do not fit, before anything runs."""
        given = dict(zip(self.fields.inputs, (tuple(desc.dims) for desc in inputs), strict=True))
        self.fields.check_inputs(given)
        rows_per_lane(self.fields, given[self.fields.inputs[0]][0], given["lengths"][0])
        if registry.is_attached(self.fields.cache):
            self.fields.check_cache(registry.attached(self.fields.cache).cache.shape)

    @keep_error
    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Launch the layer on `stream`. Nothing waits for the device, so the call may be captured in a CUDA graph."""
        fields = self.fields
        if self.building:
            return
        attached = registry.attached(fields.cache)
        device = attached.cache.device
        given = {
            name: tensor_over(address, tuple(desc.dims), self._torch_type(name), device)
            for name, desc, address in zip(fields.inputs, input_desc, inputs, strict=True)
        }
        out = tensor_over(outputs[0], tuple(output_desc[0].dims), fields.torch_dtype, device)
        with launching_on(stream, device), torch.inference_mode():
            attend(fields, attached, given, out)

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _type_of(self, name: str) -> Any:
        return self._dtype if name in ("q", "k", "v", "qkv", "out") else self.trt.DataType.INT32

    def _torch_type(self, name: str) -> torch.dtype:
        return self.fields.torch_dtype if name in ("q", "k", "v", "qkv") else torch.int32

    def _check_count(self, count: int) -> None:
        names = self.fields.inputs
        if count != len(names):
            raise ConfigError(
                f"attention layer {self.fields.layer} was given {count} inputs; its fields ask for {', '.join(names)}"
            )


def launching_on(stream: int, device: torch.device) -> Any:
    """A context in which torch launches on TensorRT's stream; it does nothing on the host."""
    if device.type != "cuda" or stream == torch.cuda.current_stream(device).cuda_stream:
        return nullcontext()
    return torch.cuda.stream(torch.cuda.ExternalStream(stream, device))  # type: ignore[no-untyped-call]


class AttentionCreator:
    """The creator's methods; see `AttentionLayer`."""

    def __init__(self, trt: Any) -> None:
        self.trt = trt
        self.name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
        kinds = [trt.PluginField(name, b"", getattr(trt.PluginFieldType, kind)) for name, kind in KINDS.items()]
        self.field_names = trt.PluginFieldCollection(kinds)

    @keep_error
    def create_plugin(self, name: str, collection: Any, phase: Any) -> Any:
        """A layer of a network (phase BUILD) or of a loaded plan (RUNTIME). Raises ConfigError for wrong fields."""
        return plugin_types(self.trt).plugin(from_collection(collection), phase == self.trt.TensorRTPhase.BUILD)


@dataclass(frozen=True)
class PluginTypes:
    """Classes over one TensorRT module: ``plugin(fields, building)`` and ``creator()``."""

    plugin: Any
    creator: Any


_types: dict[str, PluginTypes] = {}


def plugin_types(trt: Any) -> PluginTypes:
    """The plugin's and the creator's class for a TensorRT module; the same ones every time."""
    made = _types.get(trt.__name__)
    if made is None:
        bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

        def start_plugin(self: Any, fields: AttentionFields, building: bool) -> None:
            for base in bases:
                base.__init__(self)
            AttentionLayer.__init__(self, trt, fields, building)

        def start_creator(self: Any) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            AttentionCreator.__init__(self, trt)

        made = PluginTypes(
            types.new_class(NAME, (AttentionLayer, *bases), exec_body=lambda ns: ns.update(__init__=start_plugin)),
            types.new_class(
                NAME + "Creator",
                (AttentionCreator, trt.IPluginCreatorV3One),
                exec_body=lambda ns: ns.update(__init__=start_creator),
            ),
        )
        _types[trt.__name__] = made
    return made


_registered: dict[str, Any] = {}


def register(trt: Any) -> Any:
    """Register the creator with a TensorRT module, once; returns the creator.

    A process must do so before it loads plans. Raises ConfigError where the module refuses it.
    """
    creator = _registered.get(trt.__name__)
    if creator is None:
        creator = plugin_types(trt).creator()
        if not trt.get_plugin_registry().register_creator(creator, NAMESPACE):
            raise ConfigError(
                f"{trt.__name__} did not take the creator of {NAME} {VERSION}; is another one registered?"
            )
        _registered[trt.__name__] = creator
    return creator
