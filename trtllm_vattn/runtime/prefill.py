"""Chunks of prompts through the model: short prompts by replays of captured graphs, what is longer in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from trtllm_vattn.attention.base import MIN_CHUNK_ROWS, Attention, PackedPrefill, PrefillChunk, Span
from trtllm_vattn.graphs.audit import AuditReport
from trtllm_vattn.graphs.capture import Outputs
from trtllm_vattn.graphs.guard import Guard
from trtllm_vattn.graphs.replay import CaptureReport, GraphRunner
from trtllm_vattn.runtime.binding import PrefillStep, forward
from trtllm_vattn.runtime.step_model import StepModel
from trtllm_vattn.vmm.tensors import upload

LONGEST_CAPTURED = 512
"""Tokens. Beyond, computing takes longer than launching, and a graph would only hold memory."""


TILE = 128
"""Tokens that longer chunks are a multiple of; matrix products take whole tiles anyway."""


def padded_length(tokens: int, chunk: int) -> int:
    """Tokens a chunk is padded to, no more than `chunk`: a power of two where it may be captured, so that few graphs
    are, and whole tiles beyond."""
    if tokens > LONGEST_CAPTURED:
        return min(chunk, -(-tokens // TILE) * TILE)
    return min(chunk, max(MIN_CHUNK_ROWS, 1 << (tokens - 1).bit_length()))


def padded_lengths(chunk: int) -> list[int]:
    """All that `padded_length` may give, in order."""
    few = {1 << power for power in range(LONGEST_CAPTURED.bit_length())}
    return sorted({padded_length(tokens, chunk) for tokens in {*few, *range(LONGEST_CAPTURED, chunk, TILE), chunk}})


@dataclass(frozen=True)
class PromptChunk:
    """`tokens` of the sequence in `slot`, from position `start` on."""

    slot: int
    tokens: Sequence[int]
    start: int

    @property
    def end(self) -> int:
        """How long the sequence is then."""
        return self.start + len(self.tokens)

    @property
    def span(self) -> Span:
        return Span(self.slot, self.start, self.end)


def packed_prefill(
    numbers: torch.Tensor, parts: Sequence[tuple[int, int]], spans: Sequence[Span] = ()
) -> PackedPrefill:
    """Chunks as backends take them: numbers int64 ``[5, parts]`` as `Prefill.fill` writes them, on the device; `parts`
    their rows and bounds on their lengths."""
    # Each on a cache line of its own: libraries ask that what they are given be aligned.
    counts, lengths = numbers[:2, :, None].to(torch.int32).repeat(1, 1, 16)
    tokens, ends, _, where, first = numbers
    made = [
        PrefillChunk(rows, where[i : i + 1], counts[i, :1], lengths[i, :1], most)
        for i, (rows, most) in enumerate(parts)
    ]
    return PackedPrefill(made, spans, torch.stack((first, tokens, ends, where), dim=1).to(torch.int32))


class Prefill:
    """Puts prompts in, up to `chunk` tokens at a time; padding tokens write to the dummy slot.

    Where all begin with at most `LONGEST_CAPTURED` tokens, each is one replay, where captured and where those together
    take no longer than a pass would; else they share a pass.

    Parameters
    ----------
    supports_packed_prefill : bool
        Whether the model takes chunks of several prompts in one pass.
    """

    def __init__(
        self,
        model: StepModel,
        attention: Attention,
        chunk: int,
        pool: object = None,
        supports_packed_prefill: bool = True,
    ) -> None:
        self.model, self.attention, self.chunk = model, attention, chunk
        self.supports_packed_prefill = supports_packed_prefill
        cache = attention.cache
        self._guard = Guard(cache, attention.over_read)
        longest = padded_length(min(chunk, cache.shape.max_seq_len, LONGEST_CAPTURED), chunk)
        sizes = {padded_length(tokens, chunk) for tokens in range(1, longest + 1)}
        self._static = torch.zeros(3 * longest + 5, dtype=torch.int64, device=cache.device)
        self._static[2 * longest : 3 * longest] = cache.dummy_slot
        self._static[3 * longest :] = torch.tensor([1, 1, 0, cache.dummy_slot, 0])
        static = [*model.parameters(), *model.buffers(), *cache.storages(), *attention.storages(), self._static]
        self.runner = GraphRunner(self._step, sorted(sizes), static, cache.device, pool=pool)
        self.captured = False
        self.replay_s: dict[int, float] = {}
        self.pass_s = 0.0
        """Of a captured size, and of an eager pass that launching bounds; measured on a GPU. Whether prompts are
        replays follows from them."""

    def capture(self) -> CaptureReport:
        """Capture every size; short prompts are replays from then on, where that is sooner over than a pass."""
        report = self.runner.capture()
        self.captured = True
        if self.supports_packed_prefill and self.attention.cache.device.type == "cuda":
            self.replay_s = report.replay_s
            self.pass_s = min(self._timed_pass() for _ in range(2))
        return report

    def _timed_pass(self) -> float:
        started = perf_counter()
        self.warm_up(self.runner.buckets[-1])
        torch.cuda.synchronize(self.attention.cache.device)
        return perf_counter() - started

    def _step(self, size: int) -> Outputs:
        longest = self.runner.buckets[-1]
        rows, numbers = self._static[:-5].view(3, longest)[:, :size], self._static[-5:].view(5, 1)
        most = min(size, self.attention.cache.shape.max_seq_len)
        return (self._forward(rows, numbers, [(size, most)]),)

    def run(self, chunks: Sequence[PromptChunk]) -> torch.Tensor:
        """Put chunks of different prompts in, `chunk` tokens at most in all; returns the logits ``[chunks, vocab]``
        after the last token of each.

        Raises UnmappedAccess, with nothing launched, where one has no memory.
        """
        self.check(chunks)
        if self.supports_packed_prefill and not self._should_replay(chunks):
            return self._pass(chunks)
        # Copies: the next replay writes to the same tensor.
        return torch.cat([self._pass([chunk]).clone() for chunk in chunks])

    def check(self, chunks: Sequence[PromptChunk]) -> None:
        """Raise UnmappedAccess where one has no memory."""
        for chunk in chunks:
            self._guard.check_chunk(chunk.slot, chunk.end, chunk.start)

    def _should_replay(self, chunks: Sequence[PromptChunk]) -> bool:
        """Whether each is one replay: all are captured, and a pass, which launches kernel by kernel, takes longer."""
        if not all(map(self._is_captured, chunks)):
            return False
        replays = sum(self.replay_s.get(self.runner.bucket_for(chunk.end), 0.0) for chunk in chunks)
        return len(chunks) == 1 or replays <= self.pass_s

    def _is_captured(self, chunk: PromptChunk) -> bool:
        return self.captured and chunk.start == 0 and chunk.end <= self.runner.buckets[-1]

    def _pass(self, chunks: Sequence[PromptChunk]) -> torch.Tensor:
        if len(chunks) == 1 and self._is_captured(chunks[0]):
            size = self.runner.bucket_for(chunks[0].end)
            self._static.copy_(self._pack(chunks, self.runner.buckets[-1]))
            return self.runner.replay(size)[0]
        padded = padded_length(sum(len(chunk.tokens) for chunk in chunks), self.chunk)
        # A single one is padded itself, so that few shapes are planned for.
        parts = [(len(chunk.tokens) if len(chunks) > 1 else padded, chunk.end) for chunk in chunks]
        return self._forward_packed(self._pack(chunks, padded), padded, parts, [chunk.span for chunk in chunks])

    def warm_up(self, rows: int, prompts: int = 1) -> None:
        """One pass of so many rows, and logits of so many prompts, that touches the dummy slot alone."""
        chunks = [PromptChunk(self.attention.cache.dummy_slot, [0], 0)] * prompts
        parts = [(1 if prompts > 1 else rows, 1)] * prompts
        self._forward_packed(self._pack(chunks, rows), rows, parts, [chunk.span for chunk in chunks])

    def _pack(self, chunks: Sequence[PromptChunk], padded: int) -> torch.Tensor:
        """Positions, token ids and slots, `padded` of each, and five numbers of each chunk, as int64 on the device."""
        packed = np.zeros(3 * padded + 5 * len(chunks), np.int64)
        self.fill(chunks, packed[: 3 * padded].reshape(3, padded), packed[3 * padded :].reshape(5, -1))
        return upload(packed, self.attention.cache.device)

    def fill(self, chunks: Sequence[PromptChunk], rows: np.ndarray, numbers: np.ndarray, first: int = 0) -> None:
        """Write chunks, packed one after another, to rows int64 ``[3, rows]`` (positions, tokens, slots), of which the
        first is row `first` of the pass, and to numbers int64 ``[5, chunks]``: each chunk's tokens, the length after
        it, its last row and its slot, and its first row."""
        positions, ids, slots = rows
        slots[:] = self.attention.cache.dummy_slot
        at = 0
        for chunk, column in zip(chunks, numbers.T, strict=True):
            mine = slice(at, at + len(chunk.tokens))
            ids[mine], positions[mine], slots[mine] = chunk.tokens, np.arange(chunk.start, chunk.end), chunk.slot
            column[:] = len(chunk.tokens), chunk.end, first + mine.stop - 1, chunk.slot, first + at
            at = mine.stop

    def _forward_packed(
        self, packed: torch.Tensor, padded: int, parts: Sequence[tuple[int, int]], spans: Sequence[Span]
    ) -> torch.Tensor:
        return self._forward(packed[: 3 * padded].view(3, padded), packed[3 * padded :].view(5, -1), parts, spans)

    def _forward(
        self,
        rows: torch.Tensor,
        numbers: torch.Tensor,
        parts: Sequence[tuple[int, int]],
        spans: Sequence[Span] = (),
    ) -> torch.Tensor:
        """Logits after each part; rows ``[3, padded]`` and numbers ``[5, parts]`` as packed, `parts` their rows and
        bounds on their lengths."""
        positions, ids, slots = rows
        step = PrefillStep(self.attention, slots, positions, packed_prefill(numbers, parts, spans))
        return forward(self.model, ids, positions, step, numbers[2])

    def audit(self) -> AuditReport:
        """Whose the addresses are that the captured sizes' graphs hold. Raises CaptureError where there is none."""
        return self.runner.audit(self.attention.regions(), "prompt")

    def close(self) -> None:
        """Drop all graphs. Idempotent."""
        self.runner.close()
