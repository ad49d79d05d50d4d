"""Inspecting an engine's folder: what it holds, and whether the plan is free of cache tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.plugins.build import EMULATED, make_logger, read_folder
from trtllm_vattn.plugins.networks.decoder import inputs_of
from trtllm_vattn.plugins.networks.spec import PlanLimits
from trtllm_vattn.plugins.plugin import NAME, register
from trtllm_vattn.plugins.tensorrt import load_tensorrt


@dataclass(frozen=True)
class Inspection:
    """``engine.json``, what was found wrong, and TensorRT's own description (JSON) where it loads the plan here."""

    folder: Path
    engine: dict[str, Any]
    wrong: list[str]
    layers: str | None

    @property
    def lines(self) -> list[str]:
        """The inspection as text."""
        engine, limits = self.engine, self.engine["limits"]
        out = [
            f"{self.folder}: {engine['decoder']['num_layers']} layers of {engine['decoder']['dtype']}, "
            f"made by {engine['module']} {engine['version'] or ''}".rstrip(),
            f"cache {limits['cache']!r}, {limits['max_lanes']} lanes, chunks of {limits['max_chunk']} tokens, "
            f"sequences of {limits['max_seq_len']}",
        ]
        if engine["module"] == EMULATED:
            return [*out, f"no plan: torch computes {engine['source']} and calls the plugin as TensorRT would"]
        targets = ", ".join(f"sm_{target}" for target in engine["targets"]) or "the card it was built on"
        out += [
            f"plan of {engine['plan_bytes']:,} bytes for {targets}, sha256 {engine['plan_sha256'][:16]}",
            f"{engine['layers'].get('PLUGIN_V3', 0)} plugin layers among {sum(engine['layers'].values())}",
            f"inputs and outputs: {', '.join(engine['tensors'])}",
        ]
        return [*out, *(f"WRONG: {text}" for text in self.wrong)]


def inspect_folder(folder: Path) -> Inspection:
    """Inspect an engine's folder; where TensorRT loads the plan here, its own inspector is asked, too.

    Raises ConfigError where there is no engine.
    """
    engine = read_folder(folder)
    if engine["module"] == EMULATED:
        return Inspection(folder, engine, [], None)
    wrong = []
    layers, wanted = engine["layers"].get("PLUGIN_V3", 0), engine["decoder"]["num_layers"]
    if layers != wanted:
        wrong.append(f"{layers} plugin layers, the decoder has {wanted}")
    if engine["plugins_in_plan"] < wanted:
        wrong.append(f"the plan names {NAME} {engine['plugins_in_plan']} times, the decoder has {wanted} layers")
    known = {*inputs_of(PlanLimits(**engine["limits"])), "logits"}
    unknown = set(engine["tensors"]) - known
    if unknown:
        wrong.append(f"inputs or outputs that are not ours: {sorted(unknown)}; is a cache among them?")
    return Inspection(folder, engine, wrong, _ask(folder, engine["module"]))


def _ask(folder: Path, module: str) -> str | None:
    """TensorRT's own description of a plan as JSON; None where TensorRT is not installed or refuses the plan here."""
    if not torch.cuda.is_available():
        return None
    try:
        trt = load_tensorrt(module)
    except ConfigError:
        return None
    register(trt)
    runtime = trt.Runtime(make_logger(trt))
    engine = runtime.deserialize_cuda_engine((folder / "engine.plan").read_bytes())
    if engine is None:
        return None
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
