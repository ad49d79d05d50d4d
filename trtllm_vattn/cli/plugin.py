"""`trtllm-vattn plugin`: what is there, build an engine, look into one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from trtllm_vattn.bench.report import table
from trtllm_vattn.plugins.build import PLAYED, RTX_TARGETS, build_folder
from trtllm_vattn.plugins.fields import DTYPES, KINDS
from trtllm_vattn.plugins.inspect import inspect_folder
from trtllm_vattn.plugins.networks.spec import PlanLimits
from trtllm_vattn.plugins.plugin import NAME, VERSION
from trtllm_vattn.plugins.tensorrt import MODULES, available, load_tensorrt
from trtllm_vattn.runtime.models import SHAPES, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sub-commands list, build, inspect."""
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="the plugin's fields, and which TensorRT is installed")
    build = actions.add_parser("build", help="an engine from a model")
    add = build.add_argument
    add("model", help=f"checkpoint directory, or one of {', '.join(SHAPES)}")
    add("--output", type=Path, required=True, help="the engine's folder")
    add("--with", dest="module", default="auto", help=f"auto, {', '.join(MODULES)}, or {PLAYED} (no plan)")
    add("--targets", default="", help=f"compute capabilities for tensorrt_rtx (default: {','.join(RTX_TARGETS)})")
    add("--dtype", default="bfloat16", choices=list(DTYPES))
    add("--device", default="cpu", help="where weights are loaded")
    defaults = PlanLimits()
    add("--max-lanes", type=int, default=defaults.max_lanes, help="sequences of a decode step")
    add("--max-chunk", type=int, default=defaults.max_chunk, help="prompt tokens of one call")
    add("--max-seq-len", type=int, default=defaults.max_seq_len, help="tokens of a sequence")
    add("--any-slot", action="store_true", help="look lanes' slots up in decode, too")
    add("--cache", default=defaults.cache, help="the name under which the cache will be attached")
    inspect = actions.add_parser("inspect", help="what an engine's folder holds")
    inspect.add_argument("folder", type=Path)
    inspect.add_argument("--json", action="store_true", help="everything, TensorRT's own description included")


def run(args: argparse.Namespace) -> int:
    """Run a sub-command; 1 where an engine is not what it should be."""
    return {"list": _list, "build": _build, "inspect": _inspect}[args.action](args)


def _list(args: argparse.Namespace) -> int:
    print(f"{NAME} version {VERSION}, IPluginV3")
    print(table(["field", "type"], [[name, kind] for name, kind in KINDS.items()]))
    print(table(["module", "version"], [list(pair) for pair in available().items()]))
    return 0


def _build(args: argparse.Namespace) -> int:
    limits = PlanLimits(args.max_lanes, args.max_chunk, args.max_seq_len, args.any_slot, args.cache)
    trt = None if args.module == PLAYED else load_tensorrt(args.module)
    targets = [target for target in args.targets.split(",") if target]
    if trt is not None and not targets and hasattr(trt, "ComputeCapability"):
        targets = list(RTX_TARGETS)
    model = load_model(args.model, args.device, DTYPES[args.dtype])
    build_folder(model, args.output, limits, trt, targets, args.model)
    return _report(args.output, as_json=False)


def _inspect(args: argparse.Namespace) -> int:
    return _report(args.folder, args.json)


def _report(folder: Path, as_json: bool) -> int:
    found = inspect_folder(folder)
    if as_json:
        print(json.dumps({"engine": found.engine, "wrong": found.wrong, "layers": found.layers}, indent=1))
    else:
        print("\n".join(found.lines))
    return int(bool(found.wrong))
