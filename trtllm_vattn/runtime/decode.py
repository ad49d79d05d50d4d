"""One decode step for a batch: static input buffers, the step function, and its captured or eager execution."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import numpy as np
import torch
from transformers import PreTrainedModel

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.graphs.guard import Guard
from trtllm_vattn.graphs.runner import CaptureReport, GraphRunner
from trtllm_vattn.runtime.binding import DecodeStep, forward


class DecodeBatch:
    """Lane i of the batch is slot i of the cache; an idle lane has length 0 and writes to the dummy slot.

    Attributes
    ----------
    tokens, positions, slots, lengths : numpy.ndarray
        int64 ``[num_slots]``, the next step's inputs by lane, on the host. `lengths` counts the step's own token.
    """

    def __init__(self, model: PreTrainedModel, attention: Attention, buckets: Sequence[int], capture: bool) -> None:
        self.model, self.attention = model, attention
        cache = attention.cache
        self._staging = torch.zeros(4, cache.shape.num_slots, dtype=torch.int64)
        if cache.device.type == "cuda":
            self._staging = self._staging.pin_memory()
        self._inputs = torch.zeros_like(self._staging, device=cache.device)
        self.tokens, self.positions, self.slots, self.lengths = self._staging.numpy()
        self.slots[:] = cache.dummy_slot
        self._inputs.copy_(self._staging)
        self._guard = Guard(cache, attention.over_read)
        static = [
            *model.parameters(),
            *model.buffers(),
            *cache.storages(),
            *attention.storages(),
            self._inputs,
        ]
        self.runner = GraphRunner(self._step, buckets, static, cache.device)
        self.captured = capture
        self.capture_report = self.runner.capture() if capture else CaptureReport({}, 0)

    def _step(self, bucket: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``[bucket, vocab]`` and their argmax ``[bucket]``."""
        tokens, positions, slots, lengths = self._inputs[:, :bucket]
        step = DecodeStep(self.attention, slots, positions, lengths.to(torch.int32))
        logits = forward(self.model, tokens[:, None], positions[:, None], step)[:, -1]
        return logits, logits.argmax(dim=-1)

    def occupy(self, lane: int, token: int, length: int) -> None:
        """Give a lane a sequence whose next step writes `token` and makes it `length` tokens long."""
        self.tokens[lane], self.positions[lane] = token, length - 1
        self.slots[lane], self.lengths[lane] = lane, length

    def vacate(self, lane: int) -> None:
        """Make a lane idle."""
        self.tokens[lane] = self.positions[lane] = self.lengths[lane] = 0
        self.slots[lane] = self.attention.cache.dummy_slot

    def launch(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Guard and start the step that the host arrays describe; returns logits, argmax and the guard's seconds.

        Raises UnmappedAccess before anything is launched.
        """
        started = perf_counter()
        self._guard.check(self.lengths)
        guarded = perf_counter() - started
        bucket = self.runner.bucket_for(int(np.flatnonzero(self.lengths)[-1]) + 1)
        self._inputs.copy_(self._staging, non_blocking=True)
        logits, chosen = self.runner.replay(bucket) if self.captured else self._step(bucket)
        return logits, chosen, guarded

    def close(self) -> None:
        self.runner.close()
