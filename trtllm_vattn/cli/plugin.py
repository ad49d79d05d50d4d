"""`trtllm-vattn plugin`: list what is supported, build an engine, inspect one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from trtllm_vattn.arguments import device, non_negative, output_folder, positive
from trtllm_vattn.plugins.build import EMULATED, RTX_TARGETS, build_folder, module_name
from trtllm_vattn.plugins.fields import DTYPES, KINDS
from trtllm_vattn.plugins.inspect import inspect_folder
from trtllm_vattn.plugins.networks.spec import PlanLimits
from trtllm_vattn.plugins.plugin import NAME, VERSION
from trtllm_vattn.plugins.tensorrt import MODULES, available, load_tensorrt
from trtllm_vattn.runtime.models import SHAPES, load_model, longest_of
from trtllm_vattn.table import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sub-commands list, build, inspect."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    text = "the plugin's fields, and which TensorRT is installed"
    actions.add_parser("list", help=text, description=text)
    text = "an engine from a model"
    build = actions.add_parser("build", help=text, description=text)
    add = build.add_argument
    add("model", metavar="MODEL", help=f"checkpoint folder, or a shape with random weights: {', '.join(SHAPES)}")
    add("--output", type=output_folder, required=True, metavar="FOLDER", help="where the engine goes")
    text = f"what builds the plan; auto is the first of {', '.join(MODULES)} installed, {EMULATED} makes no plan"
    add("--with", dest="module", type=module_name, default="auto", choices=["auto", *MODULES, EMULATED], help=text)
    text = f"compute capabilities, for tensorrt_rtx (default: {','.join(RTX_TARGETS)})"
    add("--targets", default="", metavar="CAPABILITIES", help=text)
    add("--dtype", default="bfloat16", choices=list(DTYPES), help="type of the weights, and of K and V")
    add("--device", type=device, default="cpu", metavar="DEVICE", help="where weights are loaded: cpu or cuda:N")
    defaults = PlanLimits()
    text = "sequences of a decode step, at most"
    add("--max-lanes", type=positive, default=defaults.max_lanes, metavar="SEQUENCES", help=text)
    text = "prompt tokens that go in at once, at most; 0 is a plan without prompts"
    add("--max-chunk", type=non_negative, default=defaults.max_chunk, metavar="TOKENS", help=text)
    text = "longest sequence, prompt and output together"
    add("--max-seq-len", type=positive, default=defaults.max_seq_len, metavar="TOKENS", help=text)
    add("--any-slot", action="store_true", help="look lanes' slots up in decode, too")
    add("--cache", default=defaults.cache, metavar="NAME", help="under which the cache will be attached")
    text = "what an engine's folder holds"
    inspect = actions.add_parser("inspect", help=text, description=text)
    inspect.add_argument("folder", type=Path, metavar="FOLDER", help="that `plugin build` made")
    inspect.add_argument("--json", action="store_true", help="everything, TensorRT's own description included")


def run(args: argparse.Namespace) -> int:
    """Run a sub-command, or show the help without one; 1 where an engine fails its inspection."""
    if args.action is None:
        args.shown.print_help()
        return 0
    return {"list": _list, "build": _build, "inspect": _inspect}[args.action](args)


def _list(args: argparse.Namespace) -> int:
    print(f"{NAME} version {VERSION}, IPluginV3")
    print(table(["field", "type"], [[name, kind] for name, kind in KINDS.items()]))
    print(table(["module", "version"], [list(pair) for pair in available().items()]))
    return 0


def _build(args: argparse.Namespace) -> int:
    limits = PlanLimits(args.max_lanes, args.max_chunk, args.max_seq_len, args.any_slot, args.cache)
    trt = None if args.module == EMULATED else load_tensorrt(args.module)
    targets = [target for target in args.targets.split(",") if target]
    if trt is not None and not targets and hasattr(trt, "ComputeCapability"):
        targets = list(RTX_TARGETS)
    longest_of(args.model, args.max_seq_len)
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
