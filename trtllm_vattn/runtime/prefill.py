"""Chunks of prompts through the model: short prompts as one replay of a captured graph, longer ones by eager chunks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.graphs.guard import Guard
from trtllm_vattn.graphs.runner import CaptureReport, GraphRunner, Outputs
from trtllm_vattn.runtime.binding import PrefillStep, forward
from trtllm_vattn.vmm.tensors import upload

SMALLEST_PAD = 16
LONGEST_CAPTURED = 512
"""Tokens. Beyond, computing takes longer than launching, and a graph would only hold memory."""


TILE = 128
"""Tokens that longer chunks are a multiple of; matrix products take whole tiles anyway."""


def padded_length(tokens: int, chunk: int) -> int:
    """Tokens a chunk is padded to, no more than `chunk`: a power of two where it may be captured, so that few graphs
    are, and whole tiles beyond."""
    if tokens > LONGEST_CAPTURED:
        return min(chunk, -(-tokens // TILE) * TILE)
    return min(chunk, max(SMALLEST_PAD, 1 << (tokens - 1).bit_length()))


class Prefill:
    """Puts prompts in, up to `chunk` tokens at a time; padding tokens write to the dummy slot.

    Prompts that go in whole and have at most `LONGEST_CAPTURED` tokens are one replay each, where captured.
    """

    def __init__(self, model: PreTrainedModel, attention: Attention, chunk: int, pool: object = None) -> None:
        self.model, self.attention, self.chunk = model, attention, chunk
        cache = attention.cache
        self._guard = Guard(cache, attention.over_read)
        longest = padded_length(min(chunk, cache.shape.max_seq_len, LONGEST_CAPTURED), chunk)
        sizes = {padded_length(tokens, chunk) for tokens in range(1, longest + 1)}
        self._static = torch.zeros(3 * longest + 4, dtype=torch.int64, device=cache.device)
        self._static[2 * longest : 3 * longest] = cache.dummy_slot
        self._static[3 * longest :] = torch.tensor([1, 1, 0, cache.dummy_slot])
        static = [*model.parameters(), *model.buffers(), *cache.storages(), *attention.storages(), self._static]
        self.runner = GraphRunner(self._step, sorted(sizes), static, cache.device, pool=pool)
        self.captured = False

    def capture(self) -> CaptureReport:
        """Capture every size; short prompts are replays from then on."""
        report = self.runner.capture()
        self.captured = True
        return report

    def _step(self, size: int) -> Outputs:
        longest = self.runner.buckets[-1]
        rows, scalars = self._static[:-4].view(3, longest)[:, :size], self._static[-4:]
        return (self._forward(rows, scalars, max_length=min(size, self.attention.cache.shape.max_seq_len)),)

    def run(self, slot: int, tokens: Sequence[int], start: int) -> torch.Tensor:
        """Put `tokens` of a slot's sequence in at position `start`; returns the logits ``[1, vocab]`` after the last.

        Raises UnmappedAccess, with nothing launched, where they have no memory.
        """
        self._guard.check_chunk(slot, start + len(tokens))
        if self.captured and start == 0 and len(tokens) <= self.runner.buckets[-1]:
            size = self.runner.bucket_for(len(tokens))
            self._static.copy_(self._pack(slot, tokens, start, self.runner.buckets[-1]))
            return self.runner.replay(size)[0].clone()
        padded = padded_length(len(tokens), self.chunk)
        packed = self._pack(slot, tokens, start, padded)
        return self._forward(packed[:-4].view(3, padded), packed[-4:], max_length=start + len(tokens))

    def warm_up(self, rows: int) -> None:
        """One pass of so many rows that touches the dummy slot alone."""
        packed = self._pack(self.attention.cache.dummy_slot, [0], 0, rows)
        self._forward(packed[:-4].view(3, rows), packed[-4:], max_length=1)

    def _pack(self, slot: int, tokens: Sequence[int], start: int, padded: int) -> torch.Tensor:
        """Token ids, positions and slots, `padded` of each, and four numbers, as int64 on the device."""
        count = len(tokens)
        packed = np.zeros(3 * padded + 4, np.int64)
        ids, positions, slots = packed[:-4].reshape(3, padded)
        ids[:count] = tokens
        positions[:count] = np.arange(start, start + count)
        slots[:] = self.attention.cache.dummy_slot
        slots[:count] = slot
        packed[-4:] = count, start + count, count - 1, slot
        return upload(packed, self.attention.cache.device)

    def _forward(self, rows: torch.Tensor, scalars: torch.Tensor, max_length: int) -> torch.Tensor:
        ids, positions, slots = rows
        query_len, length, last, slot = scalars[:, None]
        step = PrefillStep(
            self.attention,
            slots=slots,
            positions=positions,
            slot=slot,
            query_len=query_len.to(torch.int32),
            length=length.to(torch.int32),
            max_length=max_length,
        )
        return forward(self.model, ids, positions, step, last)

    def close(self) -> None:
        """Drop all graphs. Idempotent."""
        self.runner.close()
