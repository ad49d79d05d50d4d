"""Commands under torchrun: its processes are the ranks of one model, and rank 0 runs the command for all.

The others serve it until it ends. They print nothing but what ends them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from trtllm_vattn.errors import ConfigError

DIVIDED = ("generate", "serve")
"""Commands with an engine that the ranks compute."""
OF_RANKS = ("tp", "transfer")
"""Benchmarks that are of several processes, and take torchrun's themselves."""


def launched() -> bool:
    """Whether this process is one of several that torchrun started."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK")) and os.environ.get("WORLD_SIZE", "1") != "1"


def own_rank() -> int:
    """This process's rank; 0 where it is the only one."""
    return int(os.environ["RANK"]) if launched() else 0


@contextmanager
def spoken_once() -> Iterator[None]:
    """Around what all ranks do alike: rank 0 alone prints."""
    if own_rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def run_on_ranks(parsed: argparse.Namespace) -> int:
    """Run a command on rank 0; on another rank, serve it and leave by SystemExit.

    Raises ConfigError where the command is not of several processes.
    """
    from trtllm_vattn.runtime.parallel import Ranks, size_of_torchrun

    name = parsed.benchmark if parsed.command == "bench" else parsed.command
    code: int
    if parsed.command == "bench" and name in OF_RANKS:
        code = parsed.run(parsed)
        return code
    if parsed.command not in DIVIDED:
        if own_rank():
            raise SystemExit(2)
        asked = f"bench {name}" if parsed.command == "bench" else name
        raise ConfigError(
            f"{asked} is of one process, and torchrun started {os.environ['WORLD_SIZE']}; start it alone, or take "
            f"{', '.join(DIVIDED)}, {', '.join(f'bench {each}' for each in OF_RANKS)}"
        )
    size = parsed.tensor_parallel or size_of_torchrun()
    ranks = Ranks.of_torchrun(size, parsed.device.partition(":")[0])
    parsed.tensor_parallel = ranks
    try:
        code = parsed.run(parsed)
    finally:
        ranks.close()
    return code
