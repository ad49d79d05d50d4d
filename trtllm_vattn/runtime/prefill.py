"""One chunk of one prompt through the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.runtime.binding import PrefillStep, forward
from trtllm_vattn.vmm.tensors import upload

SMALLEST_PAD = 16


def padded_length(tokens: int, chunk: int) -> int:
    """Tokens a chunk is padded to: a power of two, so that few shapes are planned for, but no more than `chunk`."""
    return min(chunk, max(SMALLEST_PAD, 1 << (tokens - 1).bit_length()))


def prefill_chunk(
    model: PreTrainedModel, attention: Attention, slot: int, tokens: Sequence[int], start: int, chunk: int
) -> torch.Tensor:
    """Put `tokens` of a sequence in at position `start`; returns the logits ``[1, vocab]`` after the last of them.

    Padding tokens write to the dummy slot.
    """
    cache = attention.cache
    padded, count = padded_length(len(tokens), chunk), len(tokens)
    rows = np.zeros((3, padded), np.int64)
    rows[0, :count] = tokens
    rows[1, :count] = np.arange(start, start + count)
    rows[2] = cache.dummy_slot
    rows[2, :count] = slot
    ids, positions, slots = upload(rows, cache.device)
    query_len, length, last = upload(np.array([count, start + count, count - 1]), cache.device)[:, None]
    step = PrefillStep(
        attention,
        slots=slots,
        positions=positions,
        slot=slot,
        query_len=query_len.to(torch.int32),
        length=length.to(torch.int32),
        max_length=start + count,
    )
    return forward(model, ids[None], positions[None], step, last)[:, -1]
