"""Scales for keys and values of eight bits (kv_dtype.py), from what a model's keys and values are for some prompts: by
tensor or by head, as NVIDIA's Model Optimizer finds them for TensorRT-LLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from trtllm_vattn.attention.options import FP8
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import BoundCache
from trtllm_vattn.runtime.kv_dtype import KVScales


class _Recording(BoundCache):
    """Notes the largest keys and values, by layer and head; tokens attend to those of their own pass."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = [states.detach().float().abs().amax(dim=(0, 2, 3)) for states in (key_states, value_states)]
        if key_states.shape[-1] != value_states.shape[-1]:
            # A latent and the part of the keys with positions are one row, with one scale.
            found = [torch.maximum(*found)] * 2
        before = self.largest.get(layer_idx, tuple(found))
        self.largest[layer_idx] = (torch.maximum(before[0], found[0]), torch.maximum(before[1], found[1]))
        return key_states, value_states


@torch.inference_mode()
def calibrated_scales(model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, per_head: bool = True) -> KVScales:
    """Scales by which the largest key and value of these prompts become the largest number of eight bits, 448.

    Parameters
    ----------
    model : PreTrainedModel
        Before an `Engine` takes it.
    prompts : sequence of sequences of int
        Some hundreds of typical tokens each.
    per_head : bool
        One scale a head of keys and values, instead of one a layer.

    Raises
    ------
    ConfigError
        There is no prompt, or a layer stores no keys.
    """
    recording = _Recording()
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], dtype=torch.int64, device=model.device)
        model(input_ids=ids, past_key_values=recording, use_cache=True, logits_to_keep=1)
    layers = model.config.get_text_config().num_hidden_layers
    if missing := [layer for layer in range(layers) if layer not in recording.largest]:
        raise ConfigError(f"{len(prompts)} prompts gave no keys of layers {missing}; give at least one prompt")
    pairs = (torch.stack([recording.largest[layer][part] for layer in range(layers)]) for part in (0, 1))
    return KVScales(*(_scale(largest if per_head else largest.amax(dim=1, keepdim=True)) for largest in pairs))


def _scale(largest: torch.Tensor) -> torch.Tensor:
    return torch.where(largest > 0, largest / torch.finfo(FP8).max, 1.0)
