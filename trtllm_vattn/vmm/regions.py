"""Ranges of addresses and what their memory is: what owners of memory tell an audit of captured graphs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

RESERVATION, POOL, STATIC = "reservation", "pool", "static"
"""Kinds of regions: a reserved range beneath which memory may be remapped, the memory pool of captured graphs, and
memory that stays allocated at its address."""


@dataclass(frozen=True)
class Region:
    """`size` bytes from address `base`; `kind` is ``reservation``, ``pool`` or ``static``."""

    base: int
    size: int
    kind: str


def tensor_regions(kind: str, tensors: Iterable[torch.Tensor]) -> list[Region]:
    """The storages of tensors, each once; empty storages are left out."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return [Region(base, size, kind) for base, size in storages.items() if base and size]
