"""A process that trains: it sends versions of the tiny model's weights, and may die while it does."""

from __future__ import annotations

import copy
from multiprocessing.connection import Connection
from typing import Any

import torch
from tiny_text import tiny_model

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.weights_ipc import send_weights

SMALL = 8192
"""Bytes of a bucket: several are needed."""
OWN = copy.deepcopy(tiny_model()).state_dict()


def drawn(version: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Weights of a version, the same in every process; 0 are those that the engine starts with."""
    generator = torch.Generator().manual_seed(version)
    return {
        name: (each if not version else each + 0.05 * torch.randn(each.shape, generator=generator)).to(device)
        for name, each in OWN.items()
    }


def train(connection: Connection, device: str, bucket_bytes: int = SMALL) -> None:
    """A trainer: sends the versions that it is asked for, and says which one the engine then has."""
    while (version := connection.recv()) is not None:
        try:
            given = drawn(abs(version), device)
            if version < 0:
                # Dies behind the first bucket.
                given = Dying(given)
            connection.send(send_weights(connection, given, bucket_bytes))
        except ConfigError as error:
            connection.send(str(error))


class Dying(dict):  # type: ignore[type-arg]
    """Its process ends when the last of its tensors is asked for."""

    def items(self) -> Any:
        *first, (name, last) = super().items()
        return [*first, (name, Deadly(last))]


class Deadly:
    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.shape, self.dtype, self.device, self.itemsize = tensor.shape, tensor.dtype, tensor.device, tensor.itemsize
        self.numel = tensor.numel

    def detach(self) -> Deadly:
        return self

    def __torch_function__(self, *arguments: Any) -> None:
        raise SystemExit(9)
