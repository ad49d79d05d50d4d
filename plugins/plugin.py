"""`VattnAttention`, a TensorRT plugin of version 3 in Python, and its creator.

Its lengths and slots are device tensors and the cache's addresses never change, so an engine that holds it is captured
once: whatever memory does beneath the cache, a replay stays right, and no Python runs in it. TensorRT-LLM's own plugin
takes lengths on the host, which is why its session captures anew in every step.

RoPE is outside: q and k arrive rotated. The same classes serve `tensorrt` and `tensorrt_rtx`, and `plain`, which stands
in for either where only the plugin's life is played through.
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
from trtllm_vattn.plugins.attend import attend, lanes_and_rows, tensor_over
from trtllm_vattn.plugins.fields import KINDS, AttentionFields, from_collection, to_collection
from trtllm_vattn.plugins.refusals import reported

NAME = "VattnAttention"
VERSION = "1"
NAMESPACE = ""

TRT_DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
"""Names of DataType by ours."""


class AttentionLayer:
    """The plugin's methods, in the words of a TensorRT module; `plugin_types` joins it with that module's interfaces.

    Parameters
    ----------
    building : bool
        Whether it is part of a network that is being built. A builder may time it, on inputs of any content, lengths
        and slots among them: it launches nothing, whether a cache is attached or not. An engine that is to run is
        loaded from its plan, whose layers are made with the phase RUNTIME.
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
        """Each execution context gets a layer of its own; all of them find the same cache."""
        return self.clone()

    def get_fields_to_serialize(self) -> Any:
        collection, self._buffers = to_collection(self.trt, self.fields)
        return collection

    # -- building --------------------------------------------------------------------------------------------------

    @reported
    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        self._check_count(len(input_types))
        for name, got in zip(self.fields.inputs, input_types, strict=True):
            if got != self._type_of(name):
                raise ConfigError(
                    f"input {name} of attention layer {self.fields.layer} is {got}; it must be {self._type_of(name)}: "
                    "cast it, or build the layer with another dtype"
                )
        return [self._dtype]

    @reported
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], expressions: Any) -> list[Any]:
        self._check_count(len(inputs))
        for name, dims in zip(self.fields.inputs, inputs, strict=True):
            self.fields.check_input(name, [-1] * len(dims))
        out = self.trt.DimsExprs(2)
        out[0], out[1] = inputs[0][0], expressions.constant(self.fields.q_width)
        return [out]

    @reported
    def supports_format_combination(self, position: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        """Linear memory only, in the plan's dtype, int32 for the rest."""
        self._check_count(num_inputs)
        names = (*self.fields.inputs, "out")
        described = in_out[position].desc
        linear = described.format == self.trt.TensorFormat.LINEAR
        return bool(linear and described.type == self._type_of(names[position]))

    @reported
    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._check_count(len(inputs))
        for name, dynamic in zip(self.fields.inputs, inputs, strict=True):
            self.fields.check_input(name, dynamic.desc.dims)

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        """None: what the kernels need between calls, the attention backend holds for all layers together."""
        return 0

    def get_valid_tactics(self) -> list[int]:
        return []

    def set_tactic(self, tactic: int) -> None:
        """There is one way to do it."""

    # -- running ---------------------------------------------------------------------------------------------------

    @reported
    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Refuse shapes and caches that do not fit, before anything runs."""
        given = dict(zip(self.fields.inputs, (tuple(desc.dims) for desc in inputs), strict=True))
        for name, dims in given.items():
            self.fields.check_input(name, dims)
        lanes_and_rows(self.fields, given[self.fields.inputs[0]][0], given["lengths"][0])
        if registry.is_attached(self.fields.cache):
            self.fields.check_cache(registry.attached(self.fields.cache).cache.shape)

    @reported
    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Launch the layer on `stream`: nothing waits, so it may be captured; then no Python runs any more."""
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
    """A context in which torch launches on a stream of TensorRT's; nothing to do on the host."""
    if device.type != "cuda" or stream == torch.cuda.current_stream(device).cuda_stream:
        return nullcontext()
    return torch.cuda.stream(torch.cuda.ExternalStream(stream, device))  # type: ignore[no-untyped-call]


class AttentionCreator:
    """The creator's methods, as `AttentionLayer` has the plugin's."""

    def __init__(self, trt: Any) -> None:
        self.trt = trt
        self.name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
        kinds = [trt.PluginField(name, b"", getattr(trt.PluginFieldType, kind)) for name, kind in KINDS.items()]
        self.field_names = trt.PluginFieldCollection(kinds)

    @reported
    def create_plugin(self, name: str, collection: Any, phase: Any) -> Any:
        """A layer of a network (phase BUILD) or of a plan that is being loaded. Raises ConfigError for its fields."""
        return plugin_types(self.trt).plugin(from_collection(collection), phase == self.trt.TensorRTPhase.BUILD)


@dataclass(frozen=True)
class PluginTypes:
    """The two classes over one TensorRT module; ``plugin(fields, building)``, ``creator()``."""

    plugin: Any
    creator: Any


_types: dict[str, PluginTypes] = {}


def plugin_types(trt: Any) -> PluginTypes:
    """The plugin and its creator as classes of a TensorRT module; made once a module."""
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
    """Put the creator into the module's plugin registry, once; returns the creator.

    A process that loads plans must have done so before it deserialises one.
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
