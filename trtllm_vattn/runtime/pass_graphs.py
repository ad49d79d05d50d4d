"""Whole passes captured, for a ladder of row counts: prompts and decoding sequences in one graph, up to the logits.

All that differs between two passes of a rung is read on the device, from buffers that the host writes before a replay:
the prompts' tokens, positions and slots, which lane each of the first rows is, where each lane's logits come from, and
the chunks' descriptors (`PackedPrefill.descriptors`), which the attention backend has to read there itself.

Tokens are chosen by a graph of the lanes alone behind it (`DecodeBatch.chooser`), so that one ladder serves lanes that
ask for whatever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from trtllm_vattn.attention.base import PackedPrefill
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.graphs.audit import AuditReport
from trtllm_vattn.graphs.capture import Outputs
from trtllm_vattn.graphs.replay import CaptureReport, GraphRunner
from trtllm_vattn.runtime.binding import MixedStep, forward
from trtllm_vattn.runtime.decode import DecodeBatch
from trtllm_vattn.runtime.lane_processors import FORWARD, StepKind
from trtllm_vattn.runtime.likely import few_buckets, sampled_rows
from trtllm_vattn.runtime.prefill import Prefill, PromptChunk
from trtllm_vattn.runtime.step_plan import StepPlan
from trtllm_vattn.vmm.tensors import upload

RUNGS = (32, *range(128, 4096, 128), *range(4096, 8193, 256))
"""A tenth of a second of the start each. A pass takes the time of the rung above its rows, and rows that are nobody's
delay all prompts behind it (scripts/results/README.md). Another pass would cost more than this padding: what it takes
without a prompt, the weights' reading, is as long as some 200 rows take."""
TIMED_ROWS = (128, 512, 2048)
"""Of the passes whose replays say first what passes cost."""
MOST_CHUNKS = 128
"""Of a captured pass; one of more prompts runs eagerly."""


def ladder(most: int) -> list[int]:
    """Rows to capture passes for, up to `most` and no more than the largest rung."""
    return [*(rung for rung in RUNGS if rung < most), min(most, RUNGS[-1])] if most < RUNGS[-1] else [*RUNGS]


def fill_rows(rows: torch.Tensor, lengths: torch.Tensor, inputs: torch.Tensor, lane_of_row: torch.Tensor) -> None:
    """Put lanes into the first rows of a pass: rows int64 ``[3, rows]`` (positions, tokens, slots), lengths int32
    ``[lanes]``; from inputs int64 ``[.., lanes]`` by lane_of_row int64 ``[lanes]``, -1 for a row that is no lane's,
    which is left as it is, with length 0."""
    there = lane_of_row >= 0
    columns = inputs[:4].index_select(1, lane_of_row.clamp(min=0))
    first = rows[:, : len(lane_of_row)]
    first.copy_(torch.where(there, columns[:3], first))
    lengths.copy_(torch.where(there, columns[3], 0))


class PassGraphs:
    """Captures and replays passes over the lanes of a `DecodeBatch`. To be made once
    decode steps are captured. Raises ConfigError where the attention backend does not read descriptors."""

    def __init__(self, decode: DecodeBatch, prefill: Prefill, fill: Callable[..., None] = fill_rows) -> None:
        attention = decode.attention
        if not attention.captures_prompts:
            raise ConfigError(f"the {attention.name} backend's prompts cannot be captured; passes run eagerly")
        self.decode, self._fill, self._prefill = decode, fill, prefill
        cache = attention.cache
        lanes = len(decode.lengths)
        rows = ladder(min(prefill.chunk, lanes * (cache.shape.max_seq_len + 1)))
        self._most, self._chunks = rows[-1], min(lanes, MOST_CHUNKS, attention.most_chunks or MOST_CHUNKS)
        self._sizes = [3 * self._most, lanes, lanes, 5 * self._chunks]
        self._idle = np.zeros(sum(self._sizes), np.int64)
        positions_tokens_slots, lane_of_row, _, numbers = self._parts(self._idle)
        positions_tokens_slots.reshape(3, -1)[2] = cache.dummy_slot
        lane_of_row[:] = -1
        numbers.reshape(5, -1)[3] = cache.dummy_slot
        self._static = upload(self._idle, cache.device)
        # Decode steps are captured already: what chooses tokens is compiled for logits as they give them.
        (logits,) = decode.runner.replay(decode.runner.buckets[0])
        decode.processors.require_logits(logits.shape[1], logits.dtype)
        static = [*decode.static, self._static, decode.processors.logits]
        self.runner = GraphRunner(self._pass, rows, static, cache.device, pool=decode.runner.pool)

    def likely(self) -> Iterator[tuple[GraphRunner, int]]:
        """Choices of tokens that may be wanted without having been (likely.py): those of lanes that sample."""
        rows = sampled_rows(self.decode.processors.logits.shape[1])
        chooser = self.decode.chooser(StepKind(sampled=True, truncated=True))
        yield from ((chooser, bucket) for bucket in few_buckets(chooser.buckets, rows))

    def _parts(self, array: np.ndarray) -> list[np.ndarray]:
        return np.split(array, np.cumsum(self._sizes)[:-1])

    def capture(self) -> CaptureReport:
        """Capture all rungs, and the choice of the likeliest tokens; before any sequence has a lane. The report is of
        the rungs, its `replay_s` of a few of them."""
        array = self._idle.copy()
        # Rows that are all alike take a GPU less power, and so less time, than those of a prompt.
        tokens = self._parts(array)[0].reshape(3, -1)[1]
        tokens[:] = np.random.default_rng(0).integers(0, self.decode.processors.logits.shape[1], len(tokens))
        self._static.copy_(upload(array, self._static.device))
        try:
            report = self.runner.capture(timed={self.runner.bucket_for(min(rows, self._most)) for rows in TIMED_ROWS})
        finally:
            self._static.copy_(upload(self._idle, self._static.device))
        chooser = self.decode.chooser(StepKind()).capture(timed=())
        return replace(report, pool_bytes=report.pool_bytes + chooser.pool_bytes)

    def fits(self, plan: StepPlan, running: dict[int, int]) -> bool:
        """Whether a plan is a replay."""
        if any(request.wants_prompt_logprobs for request, _ in plan.chunks):
            return False
        return plan.decodes and len(plan.chunks) <= self._chunks and len(running) + plan.prompt_tokens <= self._most

    def rows(self, running: dict[int, int], tokens: int) -> int:
        """Of the graph by which so many prompt tokens go in beside what runs."""
        return self.runner.bucket_for(len(running) + tokens)

    def replay(self, chunks: Sequence[PromptChunk], running: dict[int, int], lanes: dict[int, int]) -> torch.Tensor:
        """Logits ``[lanes, vocab]`` of a pass, which are left to who chooses tokens and advances lanes, too."""
        first = len(running)
        array = self._idle.copy()
        rows, lane_of_row, last, numbers = self._parts(array)
        where = list(running.values())
        lane_of_row[:first], last[where] = where, np.arange(first)
        columns = numbers.reshape(5, -1)
        self._prefill.fill(chunks, rows.reshape(3, -1)[:, first:], columns[:, : len(chunks)], first)
        for chunk, end in zip(chunks, columns[2].tolist(), strict=False):
            if chunk.slot in lanes:
                last[lanes[chunk.slot]] = end
        self._static.copy_(upload(array, self._static.device))
        (logits,) = self.runner.replay(self.rows(running, sum(len(chunk.tokens) for chunk in chunks)))
        return logits

    def _forward(self, rows: int) -> torch.Tensor:
        decode = self.decode
        everything, lane_of_row, last, numbers = torch.split(self._static, self._sizes)
        on_device = everything.view(3, self._most)[:, :rows]
        lane_of_row = lane_of_row[:rows]
        lengths = torch.empty(len(lane_of_row), dtype=torch.int32, device=last.device)
        self._fill(on_device, lengths, decode.inputs, lane_of_row)
        positions, ids, slots = on_device
        tokens, ends, _, where, first = numbers.view(5, -1)
        descriptors = torch.stack((first, tokens, ends, where), dim=1).to(torch.int32)
        packed = PackedPrefill((), (), descriptors)
        step = MixedStep(decode.attention, slots, positions, lengths, slots[: len(lengths)], packed)
        return forward(decode.model, ids, positions, step, last)

    def _pass(self, rows: int) -> Outputs:
        logits = self._forward(rows)
        self.decode.take(logits, FORWARD)
        return (logits,)

    def audit(self) -> list[AuditReport]:
        """Whose the addresses are that the graphs hold. Raises CaptureError where there is none."""
        return [self.runner.audit(self.decode.attention.regions(), "pass")]

    def close(self) -> None:
        """Drop all graphs. Idempotent."""
        self.runner.close()
