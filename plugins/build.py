"""Building an engine's folder from a model: the network, its optimisation profiles, the plan and its description.

A plan has two profiles, decode (one row for each lane) and context (one lane of many rows). Folders hold
``engine.json``, the model's ``config.json``, ``engine.plan``, and for tensorrt-rtx the ONNX model it came from.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.files import reason, write_json, write_whole
from trtllm_vattn.plugins.callback_errors import clear_errors, error_of
from trtllm_vattn.plugins.fields import LARGEST_FIELD, AttentionFields
from trtllm_vattn.plugins.networks.decoder import inputs_of
from trtllm_vattn.plugins.networks.onnx_emitter import write_onnx
from trtllm_vattn.plugins.networks.spec import DecoderSpec, PlanLimits
from trtllm_vattn.plugins.networks.trt_emitter import TensorRTEmitter, build_network
from trtllm_vattn.plugins.plugin import NAME, register
from trtllm_vattn.runtime.checkpoint import end_of_text
from trtllm_vattn.values import described, whole

logger = logging.getLogger(__name__)

DECODE, CONTEXT = 0, 1
"""The optimisation profiles by number."""
EMULATED = "emulated"
"""In place of a TensorRT module's name: a folder without a plan, for `plugins.emulated`."""
RTX_TARGETS = ("80", "89", "120")
"""Compute capabilities that tensorrt-rtx builds for by default."""


def module_name(name: str) -> str:
    """A module's name; ``played`` is an alias of `EMULATED`, for 0.1."""
    return EMULATED if name == "played" else name


def profile_sizes(limits: PlanLimits, profile: int) -> dict[str, tuple[int, int, int]]:
    """Smallest, optimal and largest size of each dimension of the network in a profile."""
    lanes, chunk, longest = limits.max_lanes, limits.max_chunk, limits.max_seq_len
    if profile == DECODE:
        return {"tokens": (1, lanes, lanes), "lanes": (1, lanes, lanes), "most": (1, 1, 1)}
    return {"tokens": (1, chunk, chunk), "lanes": (1, 1, 1), "most": (1, min(chunk, longest), longest)}


def profiles_of(limits: PlanLimits) -> tuple[int, ...]:
    """The profiles of a plan with these limits."""
    return (DECODE, CONTEXT) if limits.max_chunk else (DECODE,)


def make_logger(trt: Any) -> Any:
    """An ILogger of a TensorRT module that passes its messages to `logging`."""

    def start(self: Any) -> None:
        trt.ILogger.__init__(self)

    def log(self: Any, severity: Any, message: str) -> None:
        names = {"INTERNAL_ERROR": logging.ERROR, "ERROR": logging.ERROR, "WARNING": logging.WARNING}
        logger.log(names.get(severity.name, logging.DEBUG), "%s", message)

    return type("Log", (trt.ILogger,), {"__init__": start, "log": log})()


class PlanBuilder:
    """Builds one plan with a TensorRT module.

    Parameters
    ----------
    targets : sequence of str
        Compute capabilities like ``89``, for tensorrt-rtx. TensorRT builds for the GPU at hand and takes none.
    """

    def __init__(self, trt: Any, limits: PlanLimits, targets: Sequence[str] = ()) -> None:
        self.trt, self.limits = trt, limits
        register(trt)
        self.log = make_logger(trt)
        self.builder = trt.Builder(self.log)
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network = self.builder.create_network(flags)
        self.config = self.builder.create_builder_config()
        self.config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        self._target(targets)
        self._emitter: TensorRTEmitter | None = None

    def _target(self, targets: Sequence[str]) -> None:
        if not targets:
            return
        if not hasattr(self.trt, "ComputeCapability"):
            raise ConfigError(f"{self.trt.__name__} builds for the card at hand; give no targets, or use tensorrt_rtx")
        known = self.trt.ComputeCapability.__members__
        unknown = [target for target in targets if f"SM{target}" not in known]
        if unknown:
            there = ", ".join(name.removeprefix("SM") for name in known if name.startswith("SM"))
            raise ConfigError(f"{self.trt.__name__} does not build for {', '.join(unknown)}; there are {there}")
        self.config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            self.config.set_compute_capability(known[f"SM{target}"], index)

    def emit(self, spec: DecoderSpec) -> None:
        """Build the network with TensorRT's own API."""
        self._emitter = build_network(self.trt, self.network, spec, self.limits)

    def parse(self, path: Path) -> None:
        """Parse the network from ONNX. Raises ConfigError with the messages of parser and plugin."""
        clear_errors()
        parser = self.trt.OnnxParser(self.network, self.log)
        if not parser.parse_from_file(str(path)):
            errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
            raise error_of(f"{self.trt.__name__} does not take {path}", "; ".join(errors))

    def build(self) -> bytes:
        """The serialised plan. Raises ConfigError where the plugin or the builder refuses the network."""
        clear_errors()
        inputs = inputs_of(self.limits)
        for number in profiles_of(self.limits):
            profile = self.builder.create_optimization_profile()
            sizes = profile_sizes(self.limits, number)
            for name, dimension in inputs.items():
                profile.set_shape(name, *((size,) for size in sizes[dimension]))
            self.config.add_optimization_profile(profile)
        plan = self.builder.build_serialized_network(self.network, self.config)
        if plan is None:
            raise error_of(f"{self.trt.__name__} {self.trt.__version__} built no plan")
        return bytes(plan)

    def layers(self) -> dict[str, int]:
        """How many layers of each type the network has."""
        kinds = (self.network.get_layer(index).type.name for index in range(self.network.num_layers))
        return dict(sorted(Counter(kinds).items()))

    def tensors(self) -> dict[str, list[int]]:
        """The network's inputs and outputs with their dimensions."""
        both = [self.network.get_input(i) for i in range(self.network.num_inputs)]
        both += [self.network.get_output(i) for i in range(self.network.num_outputs)]
        return {tensor.name: list(tensor.shape) for tensor in both}


def build_folder(
    model: PreTrainedModel,
    folder: Path,
    limits: PlanLimits,
    trt: Any = None,
    targets: Sequence[str] = (),
    source: str = "",
) -> dict[str, Any]:
    """Build an engine's folder; returns what went into its ``engine.json``.

    Parameters
    ----------
    trt : module or None
        The TensorRT module; None for a folder without a plan (`EMULATED`).
    source : str
        Where the model came from; a folder without a plan loads it again from there.

    Raises
    ------
    ConfigError
        The model's family is not known, or TensorRT refuses the network.
    """
    spec = DecoderSpec.of(model, limits.max_seq_len)
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "module": EMULATED if trt is None else trt.__name__,
        "version": None if trt is None else str(trt.__version__),
        "targets": list(targets),
        "limits": asdict(limits),
        "decoder": spec.sizes(),
        "source": source,
    }
    if trt is not None:
        builder = PlanBuilder(trt, limits, targets)
        if hasattr(builder.network, "add_plugin_v3"):
            builder.emit(spec)
        else:
            builder.parse(write_onnx(spec, limits, folder / "onnx" / "model.onnx"))
        plan = builder.build()
        write_whole(folder / "engine.plan", "the plan", lambda partial: partial.write_bytes(plan))
        found |= {
            "plan_bytes": len(plan),
            "plan_sha256": hashlib.sha256(plan).hexdigest(),
            "layers": builder.layers(),
            "tensors": builder.tensors(),
            "plugins_in_plan": plan.count(NAME.encode()),
        }
    config_of(model).save_pretrained(folder)
    write_json(folder / "engine.json", "what the engine is", found)
    return found


def config_of(model: PreTrainedModel) -> Any:
    """A model's configuration for its engine's folder, with all end-of-text tokens, whichever file named them."""
    config = copy.deepcopy(model.config.get_text_config())
    config.eos_token_id = list(end_of_text(model)) or None
    return config


def read_folder(folder: Path) -> dict[str, Any]:
    """An engine's ``engine.json``. Raises ConfigError where there is none, a field of it is missing or cannot be, or
    its plan is another one than it says."""
    try:
        found = json.loads((folder / "engine.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        why = reason(error)
        raise ConfigError(f"{folder} holds no engine: {why}; make one with `trtllm-vattn plugin build`") from error
    try:
        _check_description(found)
    except (ConfigError, TypeError) as error:
        raise ConfigError(
            f"{folder / 'engine.json'} describes no engine: {error}; make it anew with `trtllm-vattn plugin build`"
        ) from error
    found["module"] = module_name(found["module"])
    if found["module"] != EMULATED:
        path = folder / "engine.plan"
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
        if digest != found["plan_sha256"]:
            raise ConfigError(
                f"{path} is not the plan that engine.json describes ({digest[:12]}, not {found['plan_sha256'][:12]}); "
                "build it again"
            )
    description: dict[str, Any] = found
    return description


_PARTS: dict[str, type[Any]] = {
    "module": str,
    "version": object,
    "targets": list,
    "limits": dict,
    "decoder": dict,
    "source": str,
}
_PLANS_PARTS: dict[str, type[Any]] = {"plan_sha256": str, "layers": dict, "tensors": dict}
_SIZES = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size")


def _check_description(found: Any) -> None:
    """Raise ConfigError, or TypeError for limits of other names, where ``engine.json`` is not as `build_folder` writes
    it. Limits that it does not name are `PlanLimits`'s."""
    _check_parts("it", found, _PARTS)
    found["limits"] = asdict(PlanLimits(**found["limits"]))
    decoder = found["decoder"]
    _check_parts("decoder", decoder, dict.fromkeys((*_SIZES, "scale", "dtype"), object))
    sizes = {name: whole(f"decoder's {name}", decoder[name], 1, LARGEST_FIELD) for name in _SIZES}
    layer, heads = sizes["num_layers"] - 1, (sizes["num_heads"], sizes["num_kv_heads"], sizes["head_dim"])
    AttentionFields("kv", layer, *heads, decoder["scale"], decoder.get("window", 0), decoder["dtype"], 0, 0, 0)
    if module_name(found["module"]) == EMULATED:
        return
    _check_parts("it", found, _PLANS_PARTS)
    for name in ("plan_bytes", "plugins_in_plan"):
        whole(name, found.get(name), 0)
    for kind, count in found["layers"].items():
        whole(f"layers' {kind}", count, 0)


def _check_parts(of: str, given: Any, parts: Mapping[str, type[Any]]) -> None:
    """Raise ConfigError where a description lacks one of its parts, or one is of another type."""
    if not isinstance(given, dict):
        raise ConfigError(f"{of} is {described(given)}, and no mapping of names")
    for name, kind in parts.items():
        if name not in given:
            raise ConfigError(f"{of} has no {name}; there are {', '.join(map(str, given)) or 'none'}")
        if not isinstance(given[name], kind):
            raise ConfigError(f"{name} is {described(given[name])}; it is a {kind.__name__}")
