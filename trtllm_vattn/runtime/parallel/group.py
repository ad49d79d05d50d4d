"""The process group of a tensor parallel engine, and its collectives as operations that a layer can be compiled with
and a graph can hold.

NCCL between GPUs, gloo on the host. An operation names no group: a process has one. All are on the current stream, so a
capture takes them in as any other kernel. What they are given are activations, in torch's own memory; keys and values,
whose memory is remapped, never go through NCCL.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trtllm_vattn.errors import ConfigError

_all_gather: Callable[..., object] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""By its name since torch 2.13."""
PATIENCE = timedelta(minutes=10)
"""That a collective waits for a rank which is late; of one that has ended the others know at once (channel.py)."""
SETTINGS = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
"""NVLink multicast stays off: on machines that are shared, setting it up may fail or hang."""


@dataclass(frozen=True)
class Group:
    """This process's place among the ranks of a model: rank `rank` of `size`, on `device`."""

    rank: int
    size: int
    device: torch.device

    @property
    def alone(self) -> bool:
        return self.size == 1


ALL_REDUCE = ("nccl", "symmetric")
"""Who sums: NCCL, or torch's symmetric memory for small bfloat16 sums and NCCL for others."""
SYMMETRIC_BYTES = 4 << 20
_symmetric: torch.Tensor | None = None
_ALONE = Group(0, 1, torch.device("cpu"))
_current = _ALONE


def current_group() -> Group:
    """The group that this process has joined; of one rank before."""
    return _current


def check_free() -> None:
    """Raise ConfigError where this process has a process group."""
    if dist.is_initialized():
        raise ConfigError(
            "this process has a default process group of torch.distributed already, and a tensor parallel engine makes "
            "its own; close that engine, or destroy that group, or start the engine in another process"
        )


def join(rank: int, size: int, device: torch.device, store: Any, all_reduce: str = "nccl") -> Group:
    """Join a group, by a `torch.distributed.Store` that all ranks reach, and choose who sums (`ALL_REDUCE`).

    Raises ConfigError where this process has a group already.
    """
    global _current, _symmetric
    check_free()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
        device_id=device if on_gpu else None,
    )
    _current = Group(rank, size, device)
    if all_reduce == "symmetric" and on_gpu:
        _symmetric = _symmetric_buffer(device)
    return _current


def _symmetric_buffer(device: torch.device) -> torch.Tensor:
    """Memory of this rank that the others' kernels read; all ranks make it at once."""
    from torch.distributed import _symmetric_memory as symmetric

    assert dist.group.WORLD is not None
    buffer = symmetric.empty(SYMMETRIC_BYTES // 2, dtype=torch.bfloat16, device=device)
    symmetric.rendezvous(buffer, dist.group.WORLD.group_name)
    return buffer


def leave() -> None:
    """Leave the group. Idempotent."""
    global _current, _symmetric
    _symmetric = None
    if not _current.alone:
        _current = _ALONE
        if dist.is_initialized():
            dist.destroy_process_group()


def forget() -> None:
    """Leave a group of which a rank has ended. Idempotent."""
    global _current, _symmetric
    _symmetric = None
    on_gpu, _current = _current.device.type == "cuda", _ALONE
    if dist.is_initialized() and not on_gpu:
        dist.destroy_process_group()


def abort() -> None:
    """Have collectives that wait for a rank which has ended give up, those on the device too. From any thread."""
    if not _current.alone and _current.device.type == "cuda":
        # Kernels that wait poll a flag of their communicator, captured ones too.
        assert dist.group.WORLD is not None
        dist.group.WORLD.abort()


def numbers_of_all(number: int) -> list[int]:
    """A number of each rank, by rank; waits for all of them."""
    mine = torch.tensor([number], dtype=torch.int64, device=_current.device)
    of_all = torch.empty(_current.size, dtype=torch.int64, device=_current.device)
    _all_gather(of_all, mine)
    listed: list[int] = of_all.tolist()
    return listed


@torch.library.custom_op("trtllm_vattn::all_reduce_", mutates_args=("x",))
def all_reduce_(x: torch.Tensor) -> None:
    """The sum of all ranks' x, in its place."""
    if _symmetric is not None and x.dtype is torch.bfloat16 and x.numel() <= _symmetric.numel():
        # Each rank copies its part to where the others read it, and adds theirs, in one kernel.
        assert dist.group.WORLD is not None
        flat = x.view(-1)
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(
            _symmetric[: len(flat)], flat, "sum", dist.group.WORLD.group_name, flat
        )
    else:
        dist.all_reduce(x)


@all_reduce_.register_fake
def _(x: torch.Tensor) -> None:
    return None


@torch.library.custom_op("trtllm_vattn::from_first_", mutates_args=("x",))
def from_first_(x: torch.Tensor) -> None:
    """Rank 0's x, in its place."""
    dist.broadcast(x, src=0)


@from_first_.register_fake
def _(x: torch.Tensor) -> None:
    return None


@torch.library.custom_op("trtllm_vattn::gather_last", mutates_args=())
def gather_last(x: torch.Tensor, size: int) -> torch.Tensor:
    """All ranks' x ``[..., n]``, side by side: ``[..., size * n]``."""
    parts = x.new_empty(size, *x.shape)
    _all_gather(parts.view(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]))
    return parts.movedim(0, -2).reshape(*x.shape[:-1], size * x.shape[-1])


@gather_last.register_fake
def _(x: torch.Tensor, size: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], size * x.shape[-1])
