"""An engine's settings, checked before anything is loaded or captured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.graphs.replay import default_buckets
from trtllm_vattn.memory.mapping_policy import MappingPolicy
from trtllm_vattn.runtime.speculation import check_speculation
from trtllm_vattn.runtime.swap_cost import SwapCost
from trtllm_vattn.values import described, finite, shown, truth, whole

LONGEST_CHUNK = (1 << 31) - 1
STEP_TOKENS = 2048
STEP_TOKENS_OF_LARGE = 4096
"""Most tokens of a pass, where nobody says, and on a GPU of `LARGE_BYTES` or more. There such a pass takes a tenth of a
second with a model of 8 billion weights, and more prompt tokens go in for each time that running sequences' KV is read
(measured: scripts/results/README.md)."""
LARGE_BYTES = 70 << 30
MOST_SEQUENCES = 1 << 20
"""At once. Each is a lane of the largest captured batch."""


def usual_step_tokens(device: torch.device, shared: bool = False) -> int:
    """Most tokens of a pass on a device, where nobody says: by the memory of a GPU, as vLLM chooses. Where the GPU is
    `shared` with other engines, a pass takes longer by what theirs take meanwhile: no more then than on a small one."""
    if device.type != "cuda" or shared:
        return STEP_TOKENS
    total: int = torch.cuda.get_device_properties(device).total_memory
    return STEP_TOKENS_OF_LARGE if total >= LARGE_BYTES else STEP_TOKENS


def check_settings(
    num_slots: int,
    max_seq_len: int,
    *,
    attention: Any = "auto",
    capture: Any = True,
    buckets: Any = None,
    steps: Any = 1,
    loop: Any = False,
    packed: Any = None,
    max_running: Any = None,
    prefix_cache: Any = None,
    kv_events: Any = False,
    compile: Any = None,
    mapping: Any = "concurrent",
    chunk: Any = STEP_TOKENS,
    max_step_tokens: Any = None,
    target_itl_ms: Any = None,
    max_wait_s: Any = 30.0,
    clock: Any = perf_counter,
    deterministic: Any = False,
    record_margins: Any = False,
    observer: Any = None,
    swap_cost: Any = None,
    sleepable_weights: Any = False,
    speculation: Any = None,
) -> dict[str, Any]:
    """`Engine`'s settings for a cache of so many slots, as the types that they are used as.

    Raises ConfigError naming the one that cannot work. Whether the attention backend runs here is found out when it is
    made.
    """
    if not isinstance(attention, str):
        raise ConfigError(f"attention is {described(attention)}; give a backend's name, or auto")
    if observer is not None and not callable(observer):
        raise ConfigError(f"observer is {described(observer)}; give a function of a StepRecord, or None")
    if swap_cost is not None and not isinstance(swap_cost, SwapCost):
        raise ConfigError(f"swap_cost is {described(swap_cost)}; give a SwapCost, or None to have costs measured")
    if not isinstance(mapping, str):
        raise ConfigError(f"mapping is {described(mapping)}; give a policy's name")
    lanes = num_slots if max_running is None else whole("max_running", max_running, 1, num_slots)
    packed = lanes < num_slots if packed is None else truth("packed", packed)
    if lanes < num_slots and not packed:
        raise ConfigError(
            f"max_running is {lanes} of {num_slots} slots, and packed is False: a lane is a slot then; leave packed out"
        )
    checked = {
        "attention": attention,
        "capture": truth("capture", capture),
        "lanes": lanes,
        "prefix_cache": None if prefix_cache is None else truth("prefix_cache", prefix_cache),
        "kv_events": truth("kv_events", kv_events),
        "buckets": check_buckets(buckets, lanes),
        "steps": whole("steps", steps, 1, max_seq_len),
        "loop": truth("loop", loop),
        "packed": packed,
        "compile": None if compile is None else truth("compile", compile),
        "mapping": MappingPolicy.named(mapping),
        "chunk": whole("chunk", chunk, 1, LONGEST_CHUNK),
        "target_itl_ms": None if target_itl_ms is None else _positive("target_itl_ms", target_itl_ms, "milliseconds"),
        "max_wait_s": _positive("max_wait_s", max_wait_s, "seconds"),
        "deterministic": truth("deterministic", deterministic),
        "record_margins": truth("record_margins", record_margins),
        "observer": observer,
        "swap_cost": SwapCost() if swap_cost is None else swap_cost,
        "sleepable_weights": truth("sleepable_weights", sleepable_weights),
    }
    if max_step_tokens is not None:
        checked["chunk"] = whole("max_step_tokens", max_step_tokens, 1, LONGEST_CHUNK)
    if not callable(clock):
        raise ConfigError(f"clock is {described(clock)}; give a function that returns seconds, or leave it out")
    if checked["record_margins"] and checked["steps"] > 1:
        raise ConfigError(f"margins are recorded of single steps; steps is {checked['steps']}, make it 1")
    checked["speculation"] = check_speculation(speculation, checked)
    if checked["deterministic"]:
        refuse_with_deterministic(buckets, checked)
    return checked


def refuse_with_deterministic(buckets: Any, settings: dict[str, Any]) -> None:
    """Raise ConfigError for settings by which a request's bits would depend on its batch; leave out what a
    deterministic engine has not."""
    asked = {
        "prefix_cache": "what is kept was computed by other requests' steps",
        "kv_events": "they are those of the prefix cache",
        "speculation": "drafts are verified in steps of other shapes",
        "target_itl_ms": "it has prompts cut by how many others run",
    }
    for name, why in asked.items():
        if settings[name]:
            raise ConfigError(f"deterministic is True, and {name} is given: {why}; leave one of them out")
    if buckets is not None and settings["buckets"] != [settings["lanes"]]:
        raise ConfigError(
            f"deterministic is True, and buckets are {shown(buckets)}: the number of rows of a step would depend on "
            "who runs; leave them out"
        )
    settings["prefix_cache"], settings["buckets"] = False, [settings["lanes"]]


def _positive(name: str, given: Any, unit: str) -> float:
    value = finite(name, given)
    if value <= 0:
        raise ConfigError(f"{name} is {value}; it is a positive number of {unit}")
    return value


def check_buckets(given: Any, num_slots: int) -> list[int]:
    """Batch sizes to capture, in order: different whole numbers of at most all slots, and all slots, which may run at
    once, whether given or not; the usual ones for None."""
    if given is None:
        return default_buckets(num_slots)
    if isinstance(given, np.ndarray) and given.ndim == 1:
        given = given.tolist()
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise ConfigError(f"buckets are {described(given)}; give a list of batch sizes, or None for the usual ones")
    buckets: list[int] = sorted(whole("a bucket", bucket, 1, num_slots) for bucket in given)
    if not buckets or len(set(buckets)) < len(buckets):
        raise ConfigError(f"buckets are {shown(buckets)}; give different batch sizes, at least one")
    return buckets if buckets[-1] == num_slots else [*buckets, num_slots]


def check_device(given: Any) -> str:
    """``cpu`` or ``cuda:N`` out of a device or its name; the first GPU, else the host, out of None. Raises ConfigError
    where it is none of these, or that GPU is not there."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if given is None:
        return "cuda:0" if gpus else "cpu"
    there = f"there are {', '.join(['cpu', *(f'cuda:{index}' for index in range(gpus))])}"
    if not isinstance(given, str | torch.device):
        raise ConfigError(f"device is {described(given)}; {there}")
    try:
        device = torch.device(given)
    except RuntimeError:
        raise ConfigError(f"device is {shown(given)}, which torch does not know; {there}") from None
    if device.type == "cpu" and not device.index:
        return "cpu"
    index = device.index or 0
    if device.type != "cuda" or index >= gpus:
        raise ConfigError(f"device is {shown(str(given))}, which is not here; {there}")
    return f"cuda:{index}"


def check_dtype(given: Any, device: str) -> torch.dtype:
    """What weights and K and V are of; for None float32 on the host, bfloat16 on a GPU."""
    if given is None:
        return torch.float32 if device == "cpu" else torch.bfloat16
    known = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    if not isinstance(given, torch.dtype) or given not in known:
        raise ConfigError(f"dtype is {shown(given)}; give one of {', '.join(map(str, known))}, or None")
    return given


def check_model_name(given: Any) -> str:
    """A checkpoint's directory or a model's name."""
    if not isinstance(given, str | os.PathLike):
        raise ConfigError(f"model is {described(given)}; give a checkpoint directory or a named shape")
    name = os.fspath(given)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"model is {shown(name)}; give a checkpoint directory or a named shape")
    try:
        Path(name).is_dir()
    except OSError as error:
        raise ConfigError(
            f"model is {shown(name)}, which names nothing ({error.strerror}); give a checkpoint directory or a named "
            "shape"
        ) from error
    return name
