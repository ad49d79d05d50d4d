"""What changes logits in the captured step, for the lanes that ask for it: penalties, biases, bad words, grammars.

Each such request has a row of tables on the device, wherever its lane moves; a vector that is sent with every launch
says which row a lane has. The step notes each chosen token in its row, so nothing waits for the host between steps. The
last row is for lanes that ask for nothing. A row is written from the request's record when it is given a lane, which is
also how a preempted or interrupted request goes on.

The tables are made when the first request asks, and so are the graphs that read them; steps without such a request are
those without tables. Sizes are fixed (`sampling_fields`), so nothing is captured twice.

What a grammar allows follows from the token before, which the host has to know. So while a request with a grammar has a
lane, a step is two graphs: the *forward* pass, up to the logits, which needs no mask; and the *choice* of the tokens,
with all that is behind it. The forward pass of step n + 1 is launched behind the choice of step n, before anybody has
read a token of it. While it runs, the host waits for the tokens of step n (an event behind their choice), has the
matchers take them, computes the masks, sends them on the stream of the copies, and launches the choice of step n + 1,
which waits for the forward pass and for that copy:

    device   | forward n | choice n | forward n+1              | choice n+1 | forward n+2 ...
    copies                      | tokens n        | masks n+1 |
    host      launch forward n+1 |  take tokens n, masks n+1, launch choice n+1, launch forward n+2 | ...

The device waits for the host only where what the host does in a step takes longer than a forward pass and a choice.
Logits pass from one graph to the other in a buffer of fixed address, so that one graph
of the choice stands behind decode steps and passes with prompts alike, and one forward pass before every kind of
choice. All lanes of the batch go this way, those without a grammar too, with the same operations on the same numbers.
A captured pass with prompts is a forward pass always, and without a grammar its choice is launched right behind it.
The masks are computed by other threads, begun as soon as tokens are read, while this one commits those tokens
(`begin_masks`). They are written where the copy reads them, in pinned memory, whose rows are those of the table, so one
copy of a range of rows sends them all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.compiled import Wrap, as_it_is
from trtllm_vattn.runtime.grammar import Grammar, MaskJob, fill_masks
from trtllm_vattn.runtime.logprobs import of_logits
from trtllm_vattn.runtime.sampling import NO_TOKEN, SamplingParams
from trtllm_vattn.runtime.sampling_fields import (
    LONGEST_BAD_WORD,
    MOST_BAD_WORDS,
    MOST_BIASED,
    MOST_LOGPROBS,
    MOST_STOP_IDS,
)
from trtllm_vattn.vmm.tensors import upload

GENERATED, MIN_TOKENS, FLOATS, STOPS = 0, 1, 2, 6
"""First columns of a row: tokens generated, `min_tokens`, four floats by their bits (repetition, presence and frequency
penalty, min_p), stop tokens; behind them token ids and their biases, the latest tokens, and bad words."""
BIASED = STOPS + MOST_STOP_IDS
BIASES = BIASED + MOST_BIASED
RECENT = BIASES + MOST_BIASED
BAD_WORDS = RECENT + LONGEST_BAD_WORD - 1
WIDTH = BAD_WORDS + MOST_BAD_WORDS * LONGEST_BAD_WORD
ANY, NONE = -1, -2
"""In bad words: a place before a shorter word, which any token matches; and no token, which no word matches."""


class StepKind(NamedTuple):
    """What a step does behind the model: each kind is captured when it is first wanted."""

    sampled: bool = False
    processed: bool = False
    logprobs: bool = False
    forward: bool = False
    """It leaves the logits to a graph that chooses tokens."""
    truncated: bool = False
    """Some lanes sample from the likeliest tokens alone (top_k, top_p), for which all logits are sorted. It does what
    the kind that is not truncated does, too."""

    @property
    def name(self) -> str:
        if self.forward:
            return "forward"
        more = [name for name, wanted in (("processed", self.processed), ("logprobs", self.logprobs)) if wanted]
        first = "truncated sampling" if self.truncated else "sampling" if self.sampled else "decode"
        return " ".join((first, *more))


FORWARD = StepKind(forward=True)
"""Of steps behind which tokens are chosen by a graph of its own."""


@dataclass(frozen=True)
class LaneAsks:
    """What a lane's request asks for beside a token: its parameters, its prompt, the tokens it has chosen (the record's
    own list), bad words as token ids, and its grammar."""

    params: SamplingParams
    prompt: Sequence[int]
    chosen: Sequence[int]
    bad_words: Sequence[Sequence[int]] = ()
    grammar: Grammar | None = None

    def row(self) -> np.ndarray:
        """The request's row as it is now, int64 ``[WIDTH]``."""
        params, row = self.params, np.zeros(WIDTH, np.int64)
        row[GENERATED], row[MIN_TOKENS] = len(self.chosen), params.min_tokens
        row[FLOATS:STOPS].view(np.float64)[:] = (
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            params.min_p,
        )
        row[STOPS:BIASED] = ANY
        if params.min_tokens:
            row[STOPS : STOPS + len(params.stop_token_ids)] = params.stop_token_ids
        biases = params.biases
        biases.update({word[0]: -np.inf for word in self.bad_words if len(word) == 1})
        row[BIASED : BIASED + len(biases)] = list(biases)
        row[BIASES : BIASES + len(biases)].view(np.float64)[:] = list(biases.values())
        latest = [*self.prompt[-LONGEST_BAD_WORD:], *self.chosen[-LONGEST_BAD_WORD:]][1 - LONGEST_BAD_WORD :]
        row[RECENT:BAD_WORDS] = NONE
        row[BAD_WORDS - len(latest) : BAD_WORDS] = latest
        words = row[BAD_WORDS:].reshape(MOST_BAD_WORDS, LONGEST_BAD_WORD)
        words[:] = ANY
        for place, word in enumerate(word for word in self.bad_words if len(word) > 1):
            words[place, LONGEST_BAD_WORD - len(word) :] = word
        return row

    @property
    def forbid(self) -> list[str]:
        """What of the request may forbid tokens, by name."""
        params = self.params
        given = {"bad_words": self.bad_words, "min_tokens": params.min_tokens, "grammar": self.grammar}
        named = {"json_schema": params.json_schema, "regex": params.regex}
        grammar = next((name for name, value in named.items() if value is not None), "grammar")
        return [grammar if name == "grammar" else name for name, value in given.items() if value]

    def leaves_nothing(self, vocab_size: int) -> bool:
        """Whether what it asks for forbids all tokens that may come next, whatever the model's logits are."""
        masks = np.full((1, -(-vocab_size // 32)), -1, np.int32)
        if self.grammar is not None:
            fill_masks({0: (self.grammar, self.chosen)}, masks)
        row, counts = torch.from_numpy(self.row())[None], torch.zeros(1, vocab_size, dtype=torch.int32)
        alike = torch.zeros(1, vocab_size)
        changed = process(alike, torch.zeros(1, dtype=torch.int64), row, counts, torch.from_numpy(masks))
        return not changed.isfinite().any()


def check_sizes(params: SamplingParams, bad_words: Sequence[Sequence[int]]) -> None:
    """Raise ConfigError where a request asks for more than its row holds."""
    longest = max(map(len, bad_words), default=0)
    if longest > LONGEST_BAD_WORD:
        raise ConfigError(f"a bad word has {longest} tokens; at most {LONGEST_BAD_WORD} are possible")
    if (many := sum(len(word) > 1 for word in bad_words)) > MOST_BAD_WORDS:
        raise ConfigError(f"{many} bad words have more than one token; at most {MOST_BAD_WORDS} are possible")
    singles = {word[0] for word in bad_words if len(word) == 1} | set(params.biases)
    if len(singles) > MOST_BIASED:
        raise ConfigError(
            f"logit_bias and bad_words of one token name {len(singles)} token ids; at most {MOST_BIASED} are possible"
        )
    if params.min_tokens and len(params.stop_token_ids) > MOST_STOP_IDS:
        raise ConfigError(
            f"min_tokens is given, and there are {len(params.stop_token_ids)} stop tokens, those of the checkpoint "
            f"among them; at most {MOST_STOP_IDS} are possible then"
        )


def process(
    logits: torch.Tensor, rows: torch.Tensor, table: torch.Tensor, counts: torch.Tensor, masks: torch.Tensor
) -> torch.Tensor:
    """Changed logits, float32 ``[lanes, vocab]``, of logits of the same shape.

    rows int64 ``[lanes]``, table int64 ``[rows, WIDTH]``; counts int32 ``[rows, vocab]``: how often each token was
    chosen, doubled, plus one where it is in the prompt; masks int32 ``[rows, words]``: a bit for each token that the
    grammar allows.
    """
    logits = logits.float()
    vocab = logits.shape[1]
    mine = table.index_select(0, rows)
    penalty, presence, frequency, _ = mine[:, FLOATS:STOPS].view(torch.float64).float()[:, :, None].unbind(1)
    logits = logits.scatter_add(1, mine[:, BIASED:BIASES], mine[:, BIASES:RECENT].view(torch.float64).float())
    count = counts.index_select(0, rows)
    logits = torch.where(count > 0, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    chosen = count >> 1
    logits = logits - frequency * chosen - presence * (chosen > 0)
    words = mine[:, BAD_WORDS:].reshape(len(mine), MOST_BAD_WORDS, LONGEST_BAD_WORD)
    before, banned = words[:, :, :-1], words[:, :, -1]
    matches = ((before == mine[:, None, RECENT:BAD_WORDS]) | (before == ANY)).all(dim=-1) & (banned >= 0)
    too_early = (mine[:, GENERATED] < mine[:, MIN_TOKENS])[:, None] & (mine[:, STOPS:BIASED] >= 0)
    ids = torch.cat((banned, mine[:, STOPS:BIASED]), dim=1).clamp(min=0)
    forbidden = torch.where(torch.cat((matches, too_early), dim=1), -torch.inf, 0.0)
    logits = logits.scatter_add(1, ids, forbidden)
    token = torch.arange(vocab, device=logits.device)
    bits = masks.index_select(0, rows).index_select(1, token >> 5) >> (token & 31).int()
    return torch.where((bits & 1) > 0, logits, -torch.inf)


def note(
    chosen: torch.Tensor, running: torch.Tensor, rows: torch.Tensor, table: torch.Tensor, counts: torch.Tensor
) -> None:
    """Note tokens, chosen int64 ``[lanes]``, in the rows of lanes that are running, bool ``[lanes]``."""
    there = running & (chosen >= 0)
    rows = torch.where(there, rows, len(table) - 1)
    # Of lanes behind the bucket `chosen` holds anything.
    token = torch.where(there, chosen, 0)
    recent = table[:, RECENT:BAD_WORDS]
    recent.index_copy_(0, rows, torch.cat((recent.index_select(0, rows)[:, 1:], token[:, None]), dim=1))
    table.view(-1).scatter_add_(0, rows * WIDTH + GENERATED, there.long())
    counts.view(-1).scatter_add_(0, rows * counts.shape[1] + token, there.int() * 2)


class LaneProcessors:
    """The rows of a batch's lanes, and the log-probabilities of its last launches.

    Parameters
    ----------
    lanes : int
        Sequences that run at once.
    steps : int
        Most steps of one launch.
    wrap : callable
        As `DecodeBatch` takes it.
    """

    def __init__(self, lanes: int, steps: int, device: torch.device, wrap: Wrap = as_it_is) -> None:
        self._lanes, self._steps, self._device = lanes, steps, device
        self._process = wrap(process)
        self._asks: dict[int, LaneAsks] = {}
        self._row: dict[int, int] = {}
        self._stale: set[int] = set()
        """Slots whose row is other than their request's record."""
        self._free = list(range(lanes))
        self.static: list[torch.Tensor] = []
        """What steps read and write beside `logits`; empty until `require`."""
        self.unread: list[torch.Tensor] = []
        """Of these, what launches leave to be fetched: log-probabilities by step and lane (`of_logits`)."""
        self.logits = torch.empty(0)
        """What forward passes leave to who chooses tokens, ``[lanes, vocab]``; empty until `require_logits`."""
        self._grammars: dict[int, tuple[Grammar, Sequence[int]]] = {}
        """By slot, those of lanes, and the tokens that their requests have chosen."""
        self._staged = torch.empty(0)
        """Masks on the host, int32 ``[rows, words]``; pinned where they go to a GPU."""
        self._read: torch.cuda.Event | None = None
        """Behind the last copy of them."""
        self._ahead: tuple[MaskJob, dict[int, Grammar]] | None = None
        """Masks that `begin_masks` has begun, and by row whose they are."""

    def require(self, vocab_size: int, grammar: bool = False) -> None:
        """Make the tables, with `grammar` what masks and forward passes need too, unless they are there. Raises
        torch.OutOfMemoryError where there is no memory for them, with nothing changed."""
        if not self.static:
            self._make_tables(vocab_size)
        if grammar and not self._staged.numel():
            self.require_logits(vocab_size)
            gpu = self._device.type == "cuda"
            self._staged = torch.full(self._masks.shape, -1, dtype=torch.int32, pin_memory=gpu)

    def require_logits(self, vocab_size: int, dtype: torch.dtype = torch.float32) -> None:
        """Make what forward passes leave logits in, unless it is there. Raises as `require`."""
        if not self.logits.numel():
            self.logits = torch.zeros(self._lanes, vocab_size, dtype=dtype, device=self._device)

    def _make_tables(self, vocab_size: int) -> None:
        rows, words, most = self._lanes + 1, -(-vocab_size // 32), min(MOST_LOGPROBS, vocab_size)
        nothing = LaneAsks(SamplingParams(), (), ()).row()
        table = torch.from_numpy(nothing).to(self._device).repeat(rows, 1)
        counts = torch.zeros(rows, vocab_size, dtype=torch.int32, device=self._device)
        masks = torch.full((rows, words), -1, dtype=torch.int32, device=self._device)
        row_of_lane = torch.full((self._lanes,), self._lanes, dtype=torch.int64, device=self._device)
        shape = 2 * self._steps, self._lanes
        own = torch.zeros(shape, device=self._device)
        ids = torch.zeros(*shape, most, dtype=torch.int64, device=self._device)
        values = torch.zeros(*shape, most, device=self._device)
        self._table, self._counts, self._masks, self._row_of_lane = table, counts, masks, row_of_lane
        self.unread = [own, ids, values]
        self.static = [table, counts, masks, row_of_lane, *self.unread]

    # -- lanes -----------------------------------------------------------------------------------------------------

    def set(self, slot: int, asks: LaneAsks | None) -> None:
        """A slot's sequence has a lane from now on, or again."""
        if asks is None:
            return
        self._asks[slot] = asks
        if asks.grammar is not None:
            self._grammars[slot] = asks.grammar, asks.chosen
        if asks.params.changes_logits:
            if slot not in self._row:
                self._row[slot] = self._free.pop()
            self._stale.add(slot)

    def clear(self, slot: int) -> None:
        """A slot's sequence has no lane any more."""
        if self._asks.pop(slot, None) is not None:
            self._grammars.pop(slot, None)
            self._stale.discard(slot)
            if (row := self._row.pop(slot, None)) is not None:
                self._free.append(row)

    def clear_all(self) -> None:
        """No sequence has a lane. Begins from any state."""
        self._asks.clear()
        self._grammars.clear()
        self._row.clear()
        self._stale.clear()
        self._free = list(range(self._lanes))

    def kind(self, sampled: bool, truncated: bool = False) -> StepKind:
        """What the next step does."""
        if not self._asks:
            return StepKind(sampled, truncated=truncated)
        wanted = any(asks.params.logprobs is not None for asks in self._asks.values())
        return StepKind(sampled, bool(self._row), wanted, truncated=truncated)

    @property
    def asking(self) -> list[int]:
        """Slots of who asks for log-probabilities; where nobody does, of who asks for other logits."""
        return [slot for slot, asks in self._asks.items() if asks.params.logprobs is not None] or [*self._row]

    @property
    def has_grammars(self) -> bool:
        """Whether the choice of tokens is a graph of its own, which waits for the tokens of the launch before."""
        return bool(self._grammars)

    # -- a launch --------------------------------------------------------------------------------------------------

    def send(self, lane_of: dict[int, int]) -> None:
        """Bring the tables, but for masks, up to date for these lanes by slot, on the stream of the next launch."""
        if not self._row:
            return
        stale = sorted(self._stale)
        if stale:
            rows = upload(np.array([self._row[slot] for slot in stale]), self._device)
            self._table.index_copy_(0, rows, upload(np.stack([self._asks[slot].row() for slot in stale]), self._device))
            self._masks.index_fill_(0, rows, -1)
            for slot in stale:
                self._count_again(slot)
            self._stale.clear()
        where = np.full(self._lanes, self._lanes)
        for slot, row in self._row.items():
            if slot in lane_of:
                where[lane_of[slot]] = row
        self._row_of_lane.copy_(upload(where, self._device))

    def new_masks(self, slots: Collection[int]) -> range | None:
        """Write what may come next in these slots, by the records of their requests, for `put_masks`; returns the rows,
        from the first with a grammar to the last, in which those without one allow all tokens. None where none of the
        slots has a grammar. On the host alone."""
        ahead = self._ahead
        there = ahead is not None and ahead[0].settle()
        # Behind it: where that is interrupted, the next call has to wait for whoever writes to these rows.
        self._ahead = None
        asked = {self._row[slot]: each for slot, each in self._grammars.items() if slot in slots}
        if not asked:
            return None
        rows, masks = range(min(asked), max(asked) + 1), self._writable()
        if len(asked) < len(rows):
            masks[[row for row in rows if row not in asked]] = -1
        if ahead is not None and there:
            job, lent = ahead
            asked = {
                row: (grammar, chosen)
                for row, (grammar, chosen) in asked.items()
                if lent.get(row) is not grammar or not grammar.is_lent(job, chosen)
            }
        fill_masks(asked, masks)
        return rows

    def begin_masks(self, slots: Collection[int], tokens: Mapping[int, int]) -> None:
        """Begin, by other threads, what `new_masks` of these slots will want once these tokens, by slot, are in their
        requests' records. Nothing depends on it."""
        if self._ahead is not None:
            self._ahead[0].settle()
        job, lent, matchers = MaskJob(), dict[int, Grammar](), list[tuple[Any, int]]()
        self._ahead = job, lent
        for slot, (grammar, chosen) in self._grammars.items():
            if slot not in slots or tokens.get(slot, NO_TOKEN) < 0:
                continue
            matcher, row = grammar.lend(chosen, tokens[slot], job), self._row[slot]
            if matcher is not None:
                lent[row] = grammar
                matchers.append((matcher, row))
        if matchers:
            job.start(matchers, self._writable())

    def _writable(self) -> np.ndarray:
        """The masks on the host, which nothing copies any more: mostly long since, for tokens that were chosen by them
        have been read."""
        if self._read is not None:
            self._read.synchronize()
        masks: np.ndarray = self._staged.numpy()
        return masks

    def put_masks(self, rows: range) -> None:
        """Have the device have the masks of these rows, on the current stream."""
        self._masks[rows.start : rows.stop].copy_(self._staged[rows.start : rows.stop], non_blocking=True)
        if self._device.type == "cuda":
            self._read = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._read.record()

    def _count_again(self, slot: int) -> None:
        asks, counts = self._asks[slot], self._counts[self._row[slot]]
        counts.zero_()
        if asks.params.uses_history:
            tokens, times = np.unique(np.array(asks.chosen, np.int64), return_counts=True)
            counts.index_fill_(0, upload(np.unique(np.array(asks.prompt, np.int64)), self._device), 1)
            counts.index_add_(0, upload(tokens, self._device), upload(2 * times.astype(np.int32), self._device))

    # -- a step ----------------------------------------------------------------------------------------------------

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Changed logits of the first lanes, ``[bucket, vocab]``."""
        rows = self._row_of_lane[: len(logits)]
        changed: torch.Tensor = self._process(logits, rows, self._table, self._counts, self._masks)
        return changed

    def min_p(self, bucket: int) -> torch.Tensor:
        """Of the first lanes, float64 ``[bucket]``."""
        return self._table[:, STOPS - 1].view(torch.float64).index_select(0, self._row_of_lane[:bucket])

    def note(self, chosen: torch.Tensor, running: torch.Tensor) -> None:
        """The step chose these tokens, int64 ``[lanes]``."""
        note(chosen, running, self._row_of_lane, self._table, self._counts)

    def keep_logprobs(self, logits: torch.Tensor, chosen: torch.Tensor, row: torch.Tensor) -> None:
        """Keep log-probabilities of the tokens of the first lanes, by the model's logits ``[bucket, vocab]``, at a row
        of what is fetched, int64 ``[1]``."""
        bucket = len(logits)
        for kept, value in zip(self.unread, of_logits(logits, chosen[:bucket]), strict=True):
            kept[:, :bucket].index_copy_(0, row, value[None])
