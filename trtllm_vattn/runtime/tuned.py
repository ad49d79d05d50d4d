"""What tuning found for the layers of a single token, by card, kept as data and used in place of a search.

A layer of one token is tuned at the first start on a machine (compiled.SINGLE_TOKEN): Inductor walks from one kernel
configuration to the next by what it measures, and where it ends differs from machine to machine. `bench tune` does so
several times, keeps what made the fastest step, and writes it to ``tuned/CARD.json``. Inductor keeps a configuration in
a file beside the kernel's source, whose name is a hash of that source, of torch and of triton; so what was found is a
file's name and content, and holds for exactly the kernels that it was found for.
"""

from __future__ import annotations

import json
import logging
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from trtllm_vattn.machine import card

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "tuned"
_NAME = re.compile(r"[a-z0-9]{1,4}/[a-z0-9]+\.best_config")

Kernels = dict[str, dict[str, Any]]
"""Configurations by the names of Inductor's files, from its cache folder on."""


def toolchain() -> dict[str, str]:
    """Versions that kernels' sources depend on."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    return {"torch": torch.__version__, "triton": triton}


def card_of(device: torch.device) -> str:
    """The card's name, as results are filed by."""
    return card({"gpu": {"name": torch.cuda.get_device_name(device)}})


def collect(cache: Path) -> Kernels:
    """What tuning put into an Inductor cache folder: the configurations that a search ended with."""
    found: Kernels = {}
    for path in sorted(cache.glob("*/*.best_config")):
        content = json.loads(path.read_text())
        if content.get("found_by_coordesc"):
            found[path.relative_to(cache).as_posix()] = content
    return found


def entries(name: str) -> list[dict[str, Any]]:
    """What was found for a card: for each model and toolchain its ``kernels``, and how fast a step was."""
    path = FOLDER / f"{name}.json"
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    return found


def merged(old: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries with a new one in the place of that of the same model and toolchain."""
    keys = ("model", "torch", "triton")
    return [each for each in old if any(each[key] != new[key] for key in keys)] + [new]


def kernels_for(name: str) -> Kernels:
    """Of a card and this toolchain, whatever the model: a kernel of another one has another name."""
    found: Kernels = {}
    for entry in entries(name):
        if {key: entry[key] for key in ("torch", "triton")} == toolchain():
            found.update(entry["kernels"])
    return found


def install(device: torch.device) -> int:
    """Put what was found for this card where Inductor looks before it searches, over what a search here may have left;
    returns how many kernels that are. Nothing on the host, or for another toolchain."""
    if device.type != "cuda":
        return 0
    found = kernels_for(card_of(device))
    write(found, inductor_cache())
    return len(found)


def write(kernels: Kernels, cache: Path) -> None:
    """As the files that Inductor reads; each is there whole or not at all."""
    for name, content in kernels.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a configuration of Inductor's")
        path, text = cache / name, json.dumps(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(text)
        os.replace(partial, path)
    if kernels:
        logger.info("%d tuned kernels were put into %s", len(kernels), cache)


def inductor_cache() -> Path:
    """Where Inductor keeps what it made."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())
