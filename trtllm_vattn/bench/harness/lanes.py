"""Lanes of an engine that hold random tokens, for steps to be timed without prompts."""

from __future__ import annotations

import torch

from trtllm_vattn.cache.base import FlatKV, KVCache
from trtllm_vattn.runtime.engine import Engine


@torch.inference_mode()
def fill_lanes(engine: Engine, context: int, seed: int) -> None:
    """Admit a sequence of `context` tokens for each slot, with random keys and values, the same in all slots, and have
    it decode. Sequences are numbered from 0."""
    cache = engine.cache
    for sequence in range(cache.shape.num_slots):
        slot = cache.admit(sequence, context)
        engine.decode.set_lane(slot, sequence, context + 1, cache.shape.max_seq_len)
    _fill(cache, context, seed)


def empty_lanes(engine: Engine) -> None:
    """Undo `fill_lanes`."""
    for sequence in range(engine.cache.shape.num_slots):
        engine.decode.clear_lane(engine.cache.slot_of(sequence))
        engine.cache.release(sequence)


def _fill(cache: KVCache, context: int, seed: int) -> None:
    shape = cache.shape
    generator = torch.Generator(cache.device).manual_seed(seed)
    for layer in range(shape.num_layers):
        for kv in cache.head_groups(layer):
            assert isinstance(kv, FlatKV)
            size = (context, *kv.k.shape[2:])
            for rows in (kv.k, kv.v):
                # A lane whose logits are no numbers would become idle.
                made = torch.randn(size, generator=generator, device=cache.device).to(shape.dtype)
                bits = torch.uint8 if shape.dtype.itemsize == 1 else shape.dtype
                for slot in range(shape.num_slots):
                    rows[slot, :context].view(bits).copy_(made.view(bits))
