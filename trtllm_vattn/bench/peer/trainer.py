"""A process that trains, beside an engine: it sends one of two sets of weights whenever it is asked for."""

from __future__ import annotations

from multiprocessing.connection import Connection

import torch

from trtllm_vattn.bench.harness.flags import dtype_of
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.weights_ipc import send_weights

CHANGED = 0.1
"""How far each weight of the second set is from the first one's, relatively, one standard deviation."""


def train(connection: Connection, model: str, device: str, seed: int) -> None:
    """Say that both sets are there, then send set 0, the model's own, or 1 as often as its number comes; None ends
    it."""
    loaded = load_model(model, device, dtype_of(device), seed)
    first = {name: each.detach() for name, each in loaded.state_dict().items()}
    generator = torch.Generator(device).manual_seed(seed + 1)
    second = {
        name: each * (1 + CHANGED * torch.randn(each.shape, generator=generator, device=device, dtype=each.dtype))
        for name, each in first.items()
    }
    for name, parameter in loaded.named_parameters(remove_duplicate=False):
        # Tied ones stay equal.
        second[name] = second[next(other for other, each in first.items() if each.data_ptr() == parameter.data_ptr())]
    connection.send("ready")
    while (wanted := connection.recv()) is not None:
        send_weights(connection, (first, second)[wanted])
