"""`run`: start a command whose Python processes keep TensorRT-LLM's KV cache at fixed addresses.

The command takes this process's place. What it starts inherits the environment, so MPI and Ray workers on this machine
install the adapter by themselves.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from trtllm_vattn.arguments import non_negative, positive, size
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trtllm.config import TrtllmConfig
from trtllm_vattn.trtllm.installation import environment_for
from trtllm_vattn.trtllm.versions import RANGE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `run`; a setting given by flag goes before the file's."""
    add = parser.add_argument
    text = "YAML file whose section `vattn` holds settings (default: flags alone)"
    add("--config", type=Path, metavar="FILE", help=text)
    text = "KV memory on each GPU, as 40GiB (default: what TensorRT-LLM would take, once captured)"
    add("--budget", type=size, metavar="BYTES", help=text)
    add("--layers-per-range", type=positive, metavar="LAYERS", help="layers of one pool (default: all)")
    text = "tokens mapped before they are needed (default: one block)"
    add("--lookahead", type=non_negative, metavar="TOKENS", help=text)
    add(
        "--any-version",
        action="store_true",
        help=f"try a version of TensorRT-LLM that the adapter was not held against ({RANGE})",
    )
    add(
        "--allow-stock",
        action="store_true",
        help="where TensorRT-LLM uses a KV cache that is not ours, say so and carry on (default: an error)",
    )
    add("--single-process", action="store_true", help="run the worker in the server's process, to resize it from there")
    add("command", nargs=argparse.REMAINDER, metavar="-- command", help="for example: -- trtllm-serve MODEL")


def settings(args: argparse.Namespace) -> TrtllmConfig:
    """The file's settings and the flags over them."""
    base = TrtllmConfig.from_yaml(args.config) if args.config else TrtllmConfig()
    flags = {name: getattr(args, name) for name in ("budget", "layers_per_range", "lookahead")}
    given = {name: value for name, value in flags.items() if value is not None}
    given.update({name: True for name in ("any_version", "allow_stock") if getattr(args, name)})
    return TrtllmConfig.of({**vars(base), **given})


def run(args: argparse.Namespace) -> int:
    """Become the command. Raises ConfigError where there is none, or it is not found."""
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise ConfigError("no command to run; write: trtllm-vattn run -- trtllm-serve MODEL")
    environment = {**os.environ, **environment_for(settings(args))}
    if args.single_process:
        environment["TLLM_WORKER_USE_SINGLE_PROCESS"] = "1"
    sys.stdout.flush()
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        raise ConfigError(f"cannot run {command[0]}: {error.strerror}; is it installed, and on PATH?") from error
