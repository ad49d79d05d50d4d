"""Passes over the model with chunks of prompts and one token of every running sequence (Sarathi-Serve, OSDI'24).

Decoding sequences take the first rows, whatever their lanes; prompts follow. A prompt that is complete with the pass
has a lane of its own in it, set as if its last token were the lane's token, with the prompt's last row for its logits.
So the device chooses the tokens of both kinds as it does in a decode step, advances the lanes, and the next launch may
start before anything is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from trtllm_vattn.attention.base import MIN_CHUNK_ROWS
from trtllm_vattn.errors import VattnError
from trtllm_vattn.graphs.audit import AuditReport
from trtllm_vattn.graphs.replay import CaptureReport, GraphRunner
from trtllm_vattn.runtime.binding import MixedStep, forward
from trtllm_vattn.runtime.compiled import Wrap, as_it_is
from trtllm_vattn.runtime.decode import DecodeBatch, Launch, PromptLogprobs
from trtllm_vattn.runtime.logprobs import of_logits
from trtllm_vattn.runtime.pass_cost import PassCost, PassLoad, Timing
from trtllm_vattn.runtime.pass_graphs import TIMED_ROWS, PassGraphs, fill_rows
from trtllm_vattn.runtime.prefill import (
    LONGEST_CAPTURED,
    TILE,
    Prefill,
    PromptChunk,
    packed_prefill,
    padded_length,
    padded_lengths,
)
from trtllm_vattn.runtime.request import RequestState
from trtllm_vattn.runtime.step_plan import StepPlan
from trtllm_vattn.vmm.tensors import finish, upload

FEWEST_DECODE_ROWS = 8


def decode_rows(lanes: int, most: int) -> int:
    """Rows of a pass for so many decoding sequences: few different numbers, for backends that plan for each."""
    return min(most, max(FEWEST_DECODE_ROWS, 1 << (lanes - 1).bit_length())) if lanes else 0


def most_rows(chunk: int, lanes: int, max_seq_len: int) -> int:
    """Rows of the largest pass of at most `chunk` prompt tokens and one of each of so many lanes."""
    prompts = padded_length(min(chunk, lanes * (max_seq_len + 1)), chunk)
    prompts = max(LONGEST_CAPTURED, prompts, min(chunk, TIMED_ROWS[-1]))
    return -(-(lanes + prompts + TILE) // TILE) * TILE


class Passes:
    """Launches passes for `StepPlan`s with prompts, over the lanes of a `DecodeBatch`.

    Where the attention backend reads all about the prompts on the device (`Attention.captures_prompts`), whole passes
    are captured for a few numbers of rows (`ladder`); else they run eagerly.

    Parameters
    ----------
    prefill : Prefill
        Puts prompts in alone, where nobody decodes and nothing is captured here, or where the model takes no decoding
        sequences with them.

    Attributes
    ----------
    cost : PassCost or None
        What passes cost, once it was learnt (`learn`).
    """

    def __init__(self, decode: DecodeBatch, prefill: Prefill, wrap: Wrap = as_it_is) -> None:
        self.decode, self.prefill = decode, prefill
        self._fill_rows = wrap(fill_rows)
        self.cost: PassCost | None = None
        self._padded = padded_lengths(prefill.chunk)
        self.graphs: PassGraphs | None = None
        self.replay_s: dict[int, float] = {}
        """Of a few captured passes over idle rows, by their rows."""

    # -- starting --------------------------------------------------------------------------------------------------

    def capture(self) -> CaptureReport:
        """Capture whole passes, which are replays from then on. Raises ConfigError where the backend cannot."""
        self.graphs = PassGraphs(self.decode, self.prefill, self._fill_rows)
        report = self.graphs.capture()
        self.replay_s = dict(sorted(report.replay_s.items()))
        return report

    def likely(self) -> Iterator[tuple[GraphRunner, int]]:
        """What captured passes may want without having wanted it."""
        return iter(()) if self.graphs is None else self.graphs.likely()

    def warm_up(self) -> None:
        """One pass over the dummy slot for each number of decode rows: kernels are compiled and planned for them."""
        most = len(self.decode.lengths)
        chunk = PromptChunk(self.decode.attention.cache.dummy_slot, [0], 0)
        self.decode.send(1)
        eager = not self.decode.attention.captures_prompts
        for rows in sorted({decode_rows(lanes, most) for lanes in range(1, most + 1 if eager else 2)}):
            self._mixed([chunk], {}, {}, rows)

    def learn(self) -> None:
        """Find out what passes cost, by a few over the dummy slot; later ones are measured as they run."""
        decode, cache = self.decode, self.decode.attention.cache
        if self.graphs is not None:
            sizes, took = [*self.replay_s], [seconds * 1e3 for seconds in self.replay_s.values()]
        else:
            sizes = sorted({min(size, self.prefill.chunk) for size in TIMED_ROWS})
            took = [min(self._timed(rows) for _ in range(3)) for rows in sizes]
        weights = sum(parameter.numel() for parameter in decode.model.parameters())
        nbytes = sum(parameter.numel() * parameter.itemsize for parameter in decode.model.parameters())
        of_pair = 4 * cache.shape.num_layers * decode.attention.num_heads * cache.shape.head_dim
        self.cost = PassCost.first_guess(sizes, took, max(1, weights), cache.shape.token_bytes, max(1, nbytes), of_pair)

    def _timed(self, rows: int) -> float:
        device = self.decode.attention.cache.device
        timing = Timing(PassLoad(rows), device)
        self.prefill.warm_up(max(rows, MIN_CHUNK_ROWS))
        timing.end()
        finish(str(device))
        return timing.milliseconds()

    # -- launching -------------------------------------------------------------------------------------------------

    def launch(self, plan: StepPlan) -> Launch:
        """Guard and start a plan with prompts. Raises UnmappedAccess before anything is launched or changed."""
        self.prefill.check([chunk for _, chunk in plan.chunks])
        return self._start(plan, self.decode.check(1) if plan.decodes else 0.0)

    def _start(self, plan: StepPlan, guard_s: float) -> Launch:
        """Start what was guarded."""
        decode = self.decode
        chunks = [chunk for _, chunk in plan.chunks]
        running = decode.lanes if plan.decodes else {}
        for request in plan.joins:
            decode.join(request)
        lanes = {**running, **{request.slot: decode.lane_of[request.slot] for request in plan.joins}}
        graphs = self.graphs if self.graphs is not None and self.graphs.fits(plan, running) else None
        steps = 1 if lanes else 0
        only = None if plan.decodes or not lanes else self._mask(lanes)
        try:
            choice = decode.choice(lanes, graphs is None, only) if steps else None
            # Without a grammar nothing has to come before the tokens of a captured pass are chosen.
            choose = decode.captured_choice(lanes) if graphs is not None and steps and choice is None else None
        except (RuntimeError, VattnError):
            # It cannot be captured: nothing was started.
            for request in plan.joins:
                decode.clear_lane(request.slot)
            raise
        decode.send(1)
        of_prompts: tuple[PromptLogprobs, ...] = ()
        timing = self._timing(chunks, running, graphs)
        if graphs is not None:
            logits = graphs.replay(chunks, running, lanes)
            if choose is not None:
                choose()
        else:
            asked = [(request, chunk) for request, chunk in plan.chunks if request.wants_prompt_logprobs]
            if asked:
                logits, of_prompts = self._with_prompt_logprobs(plan, asked, running, lanes)
            else:
                logits = self._mixed(chunks, running, lanes) if running else self._alone(chunks, lanes)
            if lanes:
                decode.take(logits, decode.kind, only)
        if timing is not None:
            timing.end()
        return decode.launched(lanes, steps, logits, guard_s, plan.prompt_tokens, timing, of_prompts, choice=choice)

    def _with_prompt_logprobs(
        self,
        plan: StepPlan,
        asked: Sequence[tuple[RequestState, PromptChunk]],
        running: dict[int, int],
        lanes: dict[int, int],
    ) -> tuple[torch.Tensor, tuple[PromptLogprobs, ...]]:
        """Logits as `_mixed` gives them, and log-probabilities of prompts that are asked for, on their way."""
        chunks = [chunk for _, chunk in plan.chunks]
        ahead = decode_rows(max(1, len(running)), len(self.decode.lengths))
        starts, first = {}, ahead
        for chunk in chunks:
            starts[chunk.slot] = first
            first += len(chunk.tokens)
        rows: list[np.ndarray] = []
        targets: list[int] = []
        made, at = [], 0
        for request, chunk in asked:
            # A row's logits are of the token behind it.
            wanted = request.prompt[chunk.start + 1 : chunk.end + 1]
            rows.append(np.arange(starts[chunk.slot], starts[chunk.slot] + len(wanted)))
            targets += wanted
            made.append((request, chunk.start, at, wanted))
            at += len(wanted)
        logits = self._mixed(chunks, running, lanes, ahead, np.concatenate(rows))
        tokens = upload(np.array(targets, np.int64), logits.device)
        fetched = self.decode.fetch(of_logits(logits[len(logits) - len(tokens) :], tokens))
        of_prompts = (PromptLogprobs(request, start, first, wanted, fetched) for request, start, first, wanted in made)
        return logits[: len(logits) - len(tokens)], tuple(of_prompts)

    def _timing(
        self, chunks: Sequence[PromptChunk], running: dict[int, int], graphs: PassGraphs | None
    ) -> Timing | None:
        if self.cost is None:
            return None
        tokens = sum(len(chunk.tokens) for chunk in chunks)
        if graphs is not None:
            rows = graphs.rows(running, tokens)
        else:
            rows = self._rows(decode_rows(len(running), len(self.decode.lengths)), tokens)
        pairs = sum(len(chunk.tokens) * chunk.end for chunk in chunks)
        kv = int(self.decode.lengths[list(running.values())].sum())
        return Timing(PassLoad(rows, pairs, kv), self.decode.attention.cache.device)

    def measured(self, launch: Launch) -> None:
        """A launch's tokens are read: learn from what it took."""
        if self.cost is not None and launch.timing is not None:
            self.cost.measure(launch.timing.load, launch.timing.milliseconds())

    def _mask(self, lanes: dict[int, int]) -> torch.Tensor:
        """Which lanes take part, bool ``[lanes]`` on the device."""
        mask = np.zeros(len(self.decode.lengths), np.bool_)
        mask[list(lanes.values())] = True
        return upload(mask, self.decode.attention.cache.device)

    def _alone(self, chunks: Sequence[PromptChunk], lanes: dict[int, int]) -> torch.Tensor:
        """Logits ``[bucket, vocab]`` by lane of prompts that go in without decoding sequences."""
        logits = self.prefill.run(chunks)
        row = np.zeros(self.decode.bucket_of(lanes), np.int64)
        for i, chunk in enumerate(chunks):
            if chunk.slot in lanes:
                row[lanes[chunk.slot]] = i
        return logits.index_select(0, upload(row, logits.device))

    def _rows(self, ahead: int, tokens: int) -> int:
        """Rows of an eager pass of so many prompt tokens behind `ahead` rows."""
        return -(-(ahead + max(MIN_CHUNK_ROWS, padded_length(tokens, self.prefill.chunk))) // 16) * 16

    def padded_sizes(self, running: int) -> list[tuple[int, int]]:
        """Rows of eager passes beside so many decoding sequences, and how many prompt tokens each holds."""
        ahead = decode_rows(running, len(self.decode.lengths))
        return [(self._rows(ahead, tokens), tokens) for tokens in self._padded]

    def _mixed(
        self,
        chunks: Sequence[PromptChunk],
        running: dict[int, int],
        lanes: dict[int, int],
        ahead: int | None = None,
        more: np.ndarray | None = None,
    ) -> torch.Tensor:
        """Logits ``[bucket, vocab]`` by lane of a pass that holds both, prompts from row `ahead` on; and below them
        those of the rows `more`, where given."""
        decode, cache = self.decode, self.decode.attention.cache
        ahead = ahead or decode_rows(len(running), len(decode.lengths))
        tokens = sum(len(chunk.tokens) for chunk in chunks)
        # Whole cache lines of numbers: compiled code asks that what it is given be aligned.
        padded = self._rows(ahead, tokens)
        prompts, bucket = padded - ahead, decode.bucket_of(lanes)
        wanted = bucket if more is None else bucket + len(more)
        packed = np.zeros(3 * padded + ahead + wanted + 5 * len(chunks), np.int64)
        rows, lane_of_row, last, numbers = np.split(packed, np.cumsum((3 * padded, ahead, wanted)))
        if more is not None:
            last[bucket:] = more
        rows, numbers = rows.reshape(3, padded), numbers.reshape(5, len(chunks))
        rows[2] = cache.dummy_slot
        lane_of_row[:] = -1
        lane_of_row[: len(running)] = list(running.values())
        last[list(running.values())] = np.arange(len(running))
        self.prefill.fill(chunks, rows[:, ahead:], numbers, ahead)
        for slot, end in zip(numbers[3].tolist(), numbers[2].tolist(), strict=True):
            if slot in lanes:
                last[lanes[slot]] = end
        sent = upload(packed, cache.device)
        rows_, lane_of_row_, last_, numbers_ = torch.split(sent, [3 * padded, ahead, wanted, 5 * len(chunks)])
        lengths = torch.empty(ahead, dtype=torch.int32, device=cache.device)
        on_device = rows_.view(3, padded)
        self._fill_rows(on_device, lengths, decode.inputs, lane_of_row_)
        positions, ids, slots = on_device
        # A single one is padded itself, so that few shapes are planned for.
        parts = [(len(chunk.tokens) if len(chunks) > 1 else prompts, chunk.end) for chunk in chunks]
        step = MixedStep(
            decode.attention,
            slots,
            positions,
            lengths,
            slots[:ahead],
            packed_prefill(numbers_.view(5, -1), parts, [chunk.span for chunk in chunks]),
        )
        return forward(decode.model, ids, positions, step, last_)

    def audit(self) -> list[AuditReport]:
        """Whose the addresses are that captured passes hold; none where nothing is captured."""
        return [] if self.graphs is None else self.graphs.audit()

    def close(self) -> None:
        """Drop all graphs. Idempotent."""
        if self.graphs is not None:
            self.graphs.close()
