"""Drafts on the device: where they come from, how they are laid out in a step, and what becomes of them.

All that a step needs lies on the device: the tokens of every lane's sequence so far, its drafts, how many were
accepted, and the new length, which is as if the rejected ones had never been written. So the next launch need not wait
for tokens, as without drafts. The host knows lower and upper bounds of lengths until it reads what a launch did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.runtime.compiled import Wrap, as_it_is
from trtllm_vattn.runtime.speculation import DraftLength, Speculation, SpeculationStats
from trtllm_vattn.runtime.speculation_draft import Choose, DraftModel
from trtllm_vattn.vmm.regions import Region
from trtllm_vattn.vmm.tensors import upload

REPORTS = 3
"""Rows of a launch's report behind its tokens: tokens taken, drafts that were compared, and drafts that were right."""


def look_up(
    history: torch.Tensor,
    inputs: torch.Tensor,
    row: int,
    drafts: torch.Tensor,
    counts: torch.Tensor,
    shortest: int,
    longest: int,
) -> None:
    """Draft what followed the last tokens of each lane where they stood before (prompt lookup: Saxena, 2023).

    The longest match of `shortest` to `longest` tokens counts, of equal ones the latest. What follows is taken as going
    on with the period of the match, so that drafts may be longer than what there is behind it.

    Parameters
    ----------
    history : Tensor
        int32 ``[rows, width]``: the first tokens of a row, as many as a lane is long, are that lane's.
    inputs, row : Tensor, int
        As `DecodeBatch.inputs`; its row `row` says which row of `history` is a lane's. All idle lanes have one that is
        no other lane's.
    drafts, counts : Tensor
        int64 ``[lanes, most]`` and ``[lanes]``, written: tokens, and how many of them count; none of an idle lane, and
        no more than lead to its limit.
    """
    lengths, limits, row_of = inputs[3], inputs[4], inputs[row]
    rows, width = history.shape
    place = torch.arange(width, device=history.device)
    last = lengths.new_zeros(rows).scatter(0, row_of, lengths)[:, None] - 1
    same = (place < last) & (place >= 0)
    run = torch.zeros_like(place)
    for back in range(longest):
        token = history.gather(1, (last - back).clamp(min=0))
        same = same & (history == token).roll(back, 1) & (place >= back)
        run = run + same
    best = torch.where(run >= shortest, run * width + place, -1).amax(dim=1, keepdim=True)
    match = best.remainder(width)
    ahead = torch.arange(drafts.shape[1], device=history.device).remainder((last - match).clamp(min=1))
    found = history.gather(1, (match + 1 + ahead).clamp(max=width - 1))
    drafts.copy_(found.index_select(0, row_of))
    there = (best.squeeze(1) >= 0).index_select(0, row_of) & (lengths > 0)
    counts.copy_(torch.where(there, (limits - lengths).clamp(min=0, max=drafts.shape[1]), 0))


def lay_out(
    inputs: torch.Tensor,
    drafts: torch.Tensor,
    counts: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    query_lens: torch.Tensor,
    dummy: int,
) -> None:
    """Put the first lanes' tokens and drafts into the rows of a step.

    Parameters
    ----------
    inputs, drafts, counts : Tensor
        As `DecodeBatch.inputs`, and as `look_up` leaves them.
    rows : Tensor
        int64 ``[3, bucket, queries]``, written: positions, tokens and slots; rows without a token write to the dummy
        slot.
    lengths, query_lens : Tensor
        int32 ``[bucket]``, written, as `Attention.decode_queries` takes them.
    """
    _, bucket, queries = rows.shape
    position, token, slot, length = inputs[:4, :bucket]
    query = torch.arange(queries, device=rows.device)
    more = counts[:bucket].clamp(max=queries - 1)
    running = length > 0
    there = running[:, None] & (query <= more[:, None])
    tokens = torch.cat((token[:, None], drafts[:bucket, : queries - 1]), dim=1)
    rows[0].copy_(torch.where(there, position[:, None] + query, 0))
    rows[1].copy_(torch.where(there, tokens, 0))
    rows[2].copy_(torch.where(there, slot[:, None], dummy))
    lengths.copy_(torch.where(running, length + more, 0))
    query_lens.copy_(torch.where(running, more + 1, 0))


def advance_verified(
    chosen: torch.Tensor,
    inputs: torch.Tensor,
    row: int,
    drafts: torch.Tensor,
    counts: torch.Tensor,
    queries: int,
    control: torch.Tensor,
    out: torch.Tensor,
    history: torch.Tensor,
    dummy: int,
) -> None:
    """`decode.advance` of several tokens a lane: those behind drafts that are right, up to the first that is not.

    Parameters
    ----------
    chosen : Tensor
        int64 ``[lanes, 1 + most]``: the model's choice behind the lane's token and behind each draft.
    row, drafts, counts
        As `look_up` has them.
    queries : int
        Of a lane in the step: one more than it had room for drafts. Without any, the first draft is compared all the
        same, so that it is known whether drafts would pay.
    out : Tensor
        int64 ``[2 * rows, lanes]``, two launches' reports: the chosen tokens, and `REPORTS` rows.
    """
    lengths, limits, row_of = inputs[3], inputs[4], inputs[row]
    compared = counts.clamp(max=max(1, queries - 1))
    used = counts.clamp(max=queries - 1)
    most, rows = drafts.shape[1], len(out) // 2
    query = torch.arange(most + 1, device=out.device)
    agree = (chosen[:, :-1] == drafts) & (query[:-1] < compared[:, None])
    right = agree.long().cumprod(dim=1).sum(dim=1)
    running = lengths > 0
    taken = torch.where(running, torch.minimum(right, used) + 1, 0)
    last = chosen.gather(1, (taken[:, None] - 1).clamp(min=0)).squeeze(1)
    longer = lengths + taken
    goes_on = running & (longer <= limits) & (last >= 0)
    report = torch.cat((chosen.t(), torch.stack((taken, compared, right))))
    launch = control[:1].remainder(2) * rows
    out.index_copy_(0, launch + torch.arange(rows, device=out.device), report)
    control[:1].copy_(control[:1] + 1)
    # What is not taken goes to a place behind all tokens.
    width = history.shape[1]
    place = torch.where(query < taken[:, None], lengths[:, None] + query, width - 1) + row_of[:, None] * width
    history.view(-1).scatter_(0, place.view(-1), chosen.reshape(-1).to(history.dtype))
    positions, tokens, slots = inputs[:3]
    slots.copy_(torch.where(goes_on, slots, dummy))
    tokens.copy_(torch.where(goes_on, last, 0))
    positions.copy_(torch.where(goes_on, longer - 1, 0))
    lengths.copy_(torch.where(goes_on, longer, 0))


class Speculator:
    """The drafts of a `DecodeBatch`'s lanes: on the device, and what the host knows of them.

    Parameters
    ----------
    row : int
        Of `DecodeBatch.inputs`: the row that says which row of `history` is a lane's.

    Attributes
    ----------
    history : Tensor
        int32 ``[lanes + 1, width]``, the tokens of sequences; the last row is that of idle lanes.
    drafts, counts : Tensor
        int64 ``[lanes, most]`` and ``[lanes]``, of the step under way.
    out : Tensor
        As `advance_verified` takes it.
    slack : numpy.ndarray
        int64 ``[num_slots + 1]``: how many tokens longer a slot's sequence may be than the host has counted.
    last : (int, int)
        Tokens drafted and accepted in the last launch with drafts that was read.
    """

    def __init__(
        self,
        config: Speculation,
        cache: KVCache,
        lanes: int,
        row: int,
        wrap: Wrap = as_it_is,
        draft_model: DraftModel | None = None,
    ) -> None:
        self.config, self.row, self.most = config, row, config.num_speculative_tokens
        self.draft_model = draft_model
        self.dummy, device = cache.dummy_slot, cache.device
        num_slots, max_seq_len = cache.shape.num_slots, cache.shape.max_seq_len
        self.length = DraftLength(config.ladder, num_slots, shadow=draft_model is None)
        self.stats = SpeculationStats(most_overshoot=2 * self.most)
        # The last token of a slot's longest sequence is not stored in it; and a place for what is not taken.
        self.history = torch.zeros(lanes + 1, max_seq_len + 2, dtype=torch.int32, device=device)
        self.drafts = torch.zeros(lanes, self.most, dtype=torch.int64, device=device)
        self.counts = torch.zeros(lanes, dtype=torch.int64, device=device)
        self.out = torch.zeros(2 * (self.most + 1 + REPORTS), lanes, dtype=torch.int64, device=device)
        self.slack = np.zeros(num_slots + 1, np.int64)
        self.last = 0, 0
        self._free = list(range(lanes))[::-1]
        self._row_of: dict[int, int] = {}
        self._new: dict[int, Sequence[int]] = {}
        """Tokens of rows of `history` that the device has not got yet."""
        self._look_up, self._lay_out, self._advance = wrap(look_up), wrap(lay_out), wrap(advance_verified)

    @property
    def idle_row(self) -> int:
        return len(self.history) - 1

    def storages(self) -> list[torch.Tensor]:
        """Tensors that a captured step touches."""
        own = [self.history, self.drafts, self.counts, self.out]
        return own if self.draft_model is None else [*own, *self.draft_model.storages()]

    def regions(self) -> list[Region]:
        """Where addresses of a step may lie beside the storages."""
        return [] if self.draft_model is None else self.draft_model.regions()

    def state(self) -> list[torch.Tensor]:
        """Tensors that a step changes for the steps behind it."""
        own = [self.history, self.out]
        return own if self.draft_model is None else [*own, *self.draft_model.state()]

    # -- in a step ---------------------------------------------------------------------------------------------------

    def propose(self, inputs: torch.Tensor, choose: Choose, bucket: int = 0, most: int = 0) -> None:
        """Find the drafts of all lanes, as they are before the step, which has room for `most` in its first lanes.
        `choose` takes tokens out of a draft model's logits."""
        if self.draft_model is None:
            shortest, longest = self.config.prompt_lookup_min, self.config.prompt_lookup_max
            self._look_up(self.history, inputs, self.row, self.drafts, self.counts, shortest, longest)
        elif most:
            self.draft_model.propose(
                inputs, inputs[self.row], self.history, self.drafts, self.counts, choose, bucket, most
            )
        else:
            self.draft_model.leave_out(inputs[self.row], self.counts)

    def rows_of(
        self, inputs: torch.Tensor, bucket: int, queries: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A step's rows, lengths and query counts, as `lay_out` writes them."""
        device = inputs.device
        rows = torch.empty(3, bucket, queries, dtype=torch.int64, device=device)
        lengths, query_lens = (torch.empty(bucket, dtype=torch.int32, device=device) for _ in range(2))
        self._lay_out(inputs, self.drafts, self.counts, rows, lengths, query_lens, self.dummy)
        return rows, lengths, query_lens

    def take(self, chosen: torch.Tensor, queries: int, inputs: torch.Tensor, control: torch.Tensor) -> None:
        """Advance the lanes by what was chosen, int64 ``[bucket * queries]``; `propose` was called before."""
        every = self.drafts.new_empty(len(self.counts), self.most + 1)
        rows = chosen.view(-1, queries)
        every[: len(rows), :queries].copy_(rows)
        self._advance(
            every,
            inputs,
            self.row,
            self.drafts,
            self.counts,
            queries,
            control,
            self.out,
            self.history,
            self.dummy,
        )
        if self.draft_model is not None:
            self.draft_model.settle(inputs, inputs[self.row])

    # -- on the host -------------------------------------------------------------------------------------------------

    def join(self, slot: int, tokens: Sequence[int]) -> int:
        """A slot's sequence has a lane, and these tokens; returns its row of `history`."""
        known = slot in self._row_of
        if not known:
            self._row_of[slot] = self._free.pop()
            self.length.begin(slot)
        row = self._row_of[slot]
        if self.draft_model is not None:
            self.draft_model.join(row, tokens, known)
        self._new[row] = tokens
        self.slack[slot] = 0
        return row

    def leave(self, slot: int) -> None:
        """A slot's sequence has no lane any more."""
        row = self._row_of.pop(slot)
        self._new.pop(row, None)
        if self.draft_model is not None:
            self.draft_model.leave(row)
        self._free.append(row)
        self.slack[slot] = 0

    def clear(self) -> None:
        """No sequence has a lane. Begins from any state."""
        if self.draft_model is not None:
            self.draft_model.clear()
        self._row_of.clear()
        self._new.clear()
        self._free = list(range(self.idle_row))[::-1]
        self.slack[:] = 0

    def send(self) -> None:
        """Bring `history` up to date, on the stream of the launch that follows."""
        for row, tokens in self._new.items():
            self.history[row, : len(tokens)].copy_(upload(np.array(tokens, np.int32), self.history.device))
        self._new.clear()
        if self.draft_model is not None:
            self.draft_model.send()

    def prepare(self, lengths: np.ndarray) -> bool:
        """Back what drafting writes in a step that makes sequences so long at most, int ``[num_slots]``, 0 where there
        is none; whether it can be."""
        return self.draft_model is None or self.draft_model.prepare(self._by_row(lengths))

    def check(self, lengths: np.ndarray) -> None:
        """Raise UnmappedAccess where such a step would touch memory that is not mapped."""
        if self.draft_model is not None:
            self.draft_model.check(self._by_row(lengths))

    def _by_row(self, lengths: np.ndarray) -> dict[int, int]:
        return {row: int(lengths[slot]) for slot, row in self._row_of.items() if lengths[slot] > 0}

    def close(self) -> None:
        """Drop a draft model's graphs and cache. Idempotent."""
        if self.draft_model is not None:
            self.draft_model.close()

    def launched(self, slots: Sequence[int], drafts: int) -> None:
        """A step with room for so many drafts was started for these slots' lanes."""
        self.slack[list(slots)] += drafts
        self.stats.steps[drafts] = self.stats.steps.get(drafts, 0) + 1

    def commit(self, lane_of: Mapping[int, int], report: np.ndarray, drafts: int) -> np.ndarray:
        """What a launch did, int64 ``[rows, lanes]`` as in `out`: returns how many tokens each of these lanes, by slot,
        was given."""
        slots = np.fromiter(lane_of, np.int64, len(lane_of))
        lanes = np.fromiter(lane_of.values(), np.int64, len(lane_of))
        taken, compared, right = report[-REPORTS:, lanes]
        self.length.learn(slots, compared, right, drafts)
        stats = self.stats
        stats.overshoot = max(stats.overshoot, int((self.slack[slots] - (taken - 1).clip(min=0)).max(initial=0)))
        self.slack[slots] -= drafts
        if drafts:
            self.last = int(compared.sum()), int((taken - 1).clip(min=0).sum())
            stats.verified += len(slots)
            stats.drafted += self.last[0]
            stats.accepted += self.last[1]
        return np.asarray(taken)
