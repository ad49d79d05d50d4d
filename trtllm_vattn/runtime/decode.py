"""Decode steps for a batch: static input buffers, the step function, and its captured or eager execution.

One captured step is replayed alone, several times over in one launch, or in a loop that the device ends. Between the
steps of a launch the host touches nothing: tokens, positions and lengths are advanced on the device. So a launch may
also be started before the tokens of the one before it are read, as engines with asynchronous scheduling do.

What the device has of the lanes is authoritative. The host sends patches: new columns for lanes that begin or end, and
from where the columns of others move; it never needs to know their tokens for that. So lanes may join, leave and move
although launches are unread.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.attention.options import PREFIXES
from trtllm_vattn.errors import CaptureError, VattnError, is_device_lost
from trtllm_vattn.graphs.audit import AuditReport
from trtllm_vattn.graphs.capture import Outputs
from trtllm_vattn.graphs.guard import Guard
from trtllm_vattn.graphs.replay import CaptureReport, GraphRunner
from trtllm_vattn.runtime.binding import DecodeStep, VerifyStep, forward
from trtllm_vattn.runtime.compiled import Wrap, as_it_is
from trtllm_vattn.runtime.lane_processors import FORWARD, LaneAsks, LaneProcessors, StepKind
from trtllm_vattn.runtime.likely import few_buckets, sampled_rows, serving
from trtllm_vattn.runtime.logprobs import Fetched, TokenLogprob
from trtllm_vattn.runtime.pass_cost import Timing
from trtllm_vattn.runtime.prefix_reading import PrefixReading
from trtllm_vattn.runtime.request import RequestState
from trtllm_vattn.runtime.sampling import (
    SamplingParams,
    add_noise,
    in_parts,
    keys_at,
    of_parts,
    sample_on_device,
    settings,
)
from trtllm_vattn.runtime.speculation import MOST_ROWS, Speculation
from trtllm_vattn.runtime.speculation_draft import DraftModel
from trtllm_vattn.runtime.speculation_step import REPORTS, Speculator
from trtllm_vattn.runtime.step_model import StepModel
from trtllm_vattn.vmm.tensors import finish, tensor_at, upload

logger = logging.getLogger(__name__)

STOPS = 4
"""Stop tokens of a lane that the device looks for in a loop; further ones are found after the launch."""
ROWS = 5 + STOPS
"""Of `DecodeBatch.inputs`, without those of drafts."""
ABSENT = -2
"""Stands for a token where a lane was given fewer than another one by the same launch."""


class PromptLogprobs(NamedTuple):
    """Log-probabilities of tokens of a prompt, those at `start` + 1 and on, on their way to the host: at the place
    `first` of what is fetched, and on."""

    request: RequestState
    start: int
    first: int
    tokens: Sequence[int]
    fetched: Fetched

    def read(self) -> None:
        """Put them to the request's record; they may be there already."""
        request, most = self.request, self.request.params.prompt_logprobs or 0
        for place, token in enumerate(self.tokens):
            at = self.start + 1 + place
            request.prompt_logprobs[at:] = [self.fetched.token(token, most, self.first + place)]


class StepOutOfMemory(VattnError):
    """A kind of step has no memory for its first run; nothing was launched.

    Attributes
    ----------
    slots : frozenset of int
        Of the requests that ask for what no step before it did; empty where it is none of theirs.
    """

    def __init__(self, kind: StepKind, slots: Iterable[int], reason: str) -> None:
        self.slots = frozenset(slots)
        super().__init__(f"the device has no memory for a {kind.name} step, which it asks for: {reason}")


class Choice(NamedTuple):
    """The second half of a launch whose first one left logits (`lane_processors.FORWARD`): what kind of step chooses
    tokens by them, and what starts it."""

    kind: StepKind
    start: Callable[[], object]


@dataclass(frozen=True)
class Launch:
    """What was started.

    `lane_of` are the lanes by slot that take part, without those whose sequence has left since; `logits`
    ``[bucket, vocab]`` are of its last step. `first` counts the steps before it. `prompt_tokens` went in with it; where
    no lane takes part in such a launch it has no steps. With `drafts`, its step gives a lane one token, and one more
    for each draft that was right; None where nothing is ever drafted. With a `choice`, nothing chooses tokens yet, and
    there are none to read before `DecodeBatch.choose`.
    """

    lane_of: dict[int, int]
    first: int
    steps: int
    logits: torch.Tensor
    guard_s: float
    _out: torch.Tensor
    _arrived: torch.cuda.Event | None
    prompt_tokens: int = 0
    timing: Timing | None = None
    of_prompts: tuple[PromptLogprobs, ...] = ()
    logprobs: Fetched | None = None
    drafts: int | None = None
    choice: Choice | None = None

    @property
    def wanted(self) -> bool:
        """Whether it has to be waited for: somebody wants its tokens, or prompts went in with it."""
        return bool(self.lane_of or self.prompt_tokens)

    def logprob(self, step: int, lane: int, token: int, most: int) -> TokenLogprob:
        """Of the token of a lane, with `most` of the likeliest, after a step of it."""
        assert self.logprobs is not None
        return self.logprobs.token(token, most, (self.first + step) % (len(self._out) - 1), lane)

    def read(self) -> list[list[int]]:
        """Wait, and give each step's tokens by lane, `sampling.NO_TOKEN` where its logits gave none; with drafts, the
        first tokens of all lanes, then the second ones, and so on, `ABSENT` where a lane has no more."""
        assert self.choice is None
        if self._arrived is not None:
            self._arrived.synchronize()
        if not self.steps:
            return []
        if self.drafts is not None:
            report = self.report()
            taken = report[-REPORTS]
            return [np.where(taken > row, report[row], ABSENT).tolist() for row in range(int(taken.max(initial=0)))]
        *rows, counts = self._out.tolist()
        taken = min(self.steps, counts[0] - self.first)
        return [rows[(self.first + step) % len(rows)] for step in range(taken)]

    def report(self) -> np.ndarray:
        """What a launch with drafts did, int64 ``[rows, lanes]`` as `speculation_step.advance_verified` writes it; its
        tokens were waited for."""
        both: np.ndarray = self._out.numpy()
        return both[: len(both) // 2] if self.first % 2 == 0 else both[len(both) // 2 :]


def advance(
    chosen: torch.Tensor,
    inputs: torch.Tensor,
    control: torch.Tensor,
    frontiers: torch.Tensor,
    out: torch.Tensor,
    go: torch.Tensor,
    dummy: int,
) -> None:
    """Note each lane's token, `chosen` int64 ``[lanes]``, and make the next step's inputs of this one's.

    All lanes, whatever the bucket, so that one compiled function serves all. A lane that has reached its limit, or
    whose logits gave no token (`NO_TOKEN`, which is noted and never fed), becomes idle. `go` is left other than 0 while
    fewer steps were taken than wanted, no lane has ended, and no lane's next length is beyond its slot's in
    `frontiers`.
    """
    positions, tokens, slots, lengths, limits = inputs[:5]
    row = control[:1].remainder(len(out) - 1)
    out.index_copy_(0, row, chosen[None])
    taken = control[:1] + 1
    out[-1, :1].copy_(taken)
    longer = lengths + 1
    running = lengths > 0
    goes_on = running & (longer <= limits) & (chosen >= 0)
    ended = running & ((inputs[5:] == chosen).any(dim=0) | ~goes_on)
    without_memory = goes_on & (longer > frontiers[slots])
    go.copy_((taken < control[1:]) & ~(ended | without_memory).any())
    control[:1].copy_(taken)
    slots.copy_(torch.where(goes_on, slots, dummy))
    tokens.copy_(torch.where(goes_on, chosen, 0))
    positions.copy_(torch.where(goes_on, lengths, 0))
    lengths.copy_(torch.where(goes_on, longer, 0))


def patch(inputs: torch.Tensor, packed: torch.Tensor) -> None:
    """Change lanes: inputs int64 ``[rows, lanes]``; packed int64 ``[1 + rows, lanes]``, of which the first row says
    from which lane each column comes, or -1 where it is the one below."""
    source = packed[0]
    moved = inputs.index_select(1, source.clamp(min=0))
    inputs.copy_(torch.where(source < 0, packed[1:], moved))


def likeliest(largest: torch.Tensor, place: torch.Tensor, width: int, chosen: torch.Tensor) -> None:
    """Write the likeliest token of each row to `chosen`, int64 ``[rows]`` (`of_parts`)."""
    chosen.copy_(of_parts(largest, place, width))


def advance_greedily(largest: torch.Tensor, place: torch.Tensor, width: int, *others: Any) -> None:
    """`advance` with each lane's likeliest token, by the largest logit of each part of it (`of_parts`)."""
    advance(of_parts(largest, place, width), *others)


class DecodeBatch:
    """The lanes of the decode step; an idle lane has length 0 and writes to the dummy slot.

    Parameters
    ----------
    steps : int
        Most steps of one launch.
    loop : bool
        Whether the device decides how many of them are taken.
    packed : bool
        False: lane i is slot i. True: sequences take the first lanes, whatever their slots.
    wrap : callable
        Applied to functions of tensors that are run in every step; torch.compile, or nothing.
    lanes : int or None
        Sequences that may run at once; fewer than the cache's slots only where `packed`. None is all slots.
    speculation : Speculation or None
        How tokens are drafted. `steps` is 1 then, and there is no loop.
    draft_model : DraftModel or None
        What drafts, where that is not looked up; it is closed with the batch.
    reading : PrefixReading or None
        Has the tables of `attention` say which first tokens lie elsewhere, or are shared by lanes; None where none do.

    Attributes
    ----------
    tokens, positions, slots, lengths, limits : numpy.ndarray
        int64 ``[lanes]``, the next launch's inputs as the host knows them, behind all that was launched: of a lane
        that the device advances, `tokens` is an older one. `lengths` counts the step's own token; `limits` is the
        length of a lane's last step. A lane that has taken its last step is idle. With drafts, `lengths` and
        `positions` are the least that they may be, until a launch is read (`Speculator.slack`).
    lane_of : dict
        Lanes by slot.
    captures_while_running : int
        Graphs that were captured while requests waited for them.
    wanted : dict of (GraphRunner, int) to None
        Graphs, by runner and bucket, that steps went without, in larger ones, in the order in which they did.
    inputs : Tensor
        int64 ``[rows, lanes]``, what the device has: positions, tokens, slots, lengths, limits, stop tokens; with
        drafts, the row of `Speculator.history`.
    """

    captures_alone: ClassVar[bool] = True
    """Whether it may capture what others do not: no other rank takes part in its steps."""

    def __init__(
        self,
        model: StepModel,
        attention: Attention,
        buckets: Sequence[int],
        *,
        steps: int = 1,
        loop: bool = False,
        packed: bool = False,
        wrap: Wrap = as_it_is,
        lanes: int | None = None,
        speculation: Speculation | None = None,
        draft_model: DraftModel | None = None,
        reading: PrefixReading | None = None,
    ) -> None:
        self.model, self.attention, self.reading = model, attention, reading
        self.steps, self.loop, self.packed = steps, loop, packed
        cache = attention.cache
        lanes, device = lanes or cache.shape.num_slots, cache.device
        rows = ROWS + (speculation is not None)
        self.speculator = (
            None if speculation is None else Speculator(speculation, cache, lanes, ROWS, wrap, draft_model)
        )
        # Two numbers behind the lanes: steps taken, and steps wanted.
        self._device = torch.zeros(rows * lanes + 2, dtype=torch.int64, device=device)
        self.inputs = self._device[:-2].view(rows, lanes)
        # Positions first: what is given to compiled code begins where its storage does, whatever the bucket.
        self._columns = np.zeros((rows, lanes), np.int64)
        self.positions, self.tokens, self.slots, self.lengths, self.limits, *_ = self._columns
        self._source = np.full(lanes, -1)
        """The lane that has each lane's column on the device, or -1 where it is the host's."""
        self._columns[:] = self._idle_column()
        self._idle = torch.from_numpy(self._idle_column()).to(device)
        self._device[:-2].view(rows, lanes).copy_(self._idle.expand(rows, lanes))
        # Read by the device itself in the middle of a loop, so it stays on the host, where raising it is one store.
        frontiers = _mirrored([cache.shape.num_slots + 1], torch.int64, device)
        self._frontiers = frontiers.numpy()
        nbytes = frontiers.numel() * frontiers.itemsize
        self._frontiers_seen = (
            tensor_at(frontiers.data_ptr(), nbytes, str(device), owner=frontiers).view(torch.int64)
            if device.type == "cuda"
            else frontiers
        )
        # Temperature, top_p and top_k, whose bits are float64, and a key for each step of two launches.
        self._sampling = torch.zeros(3 + 2 * steps, lanes, dtype=torch.int64, device=device)
        # Two launches' tokens, and a row with the count of steps.
        self._out = torch.zeros(2 * steps + 1, lanes, dtype=torch.int64, device=device)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._left: torch.cuda.Stream | None = None
        """The caller's stream, while another is the current one."""
        self._tables_sent = None if self._copies is None else torch.cuda.Event()  # type: ignore[no-untyped-call]
        """Behind the tables of the last launch that leaves logits; masks are copied to them beside it."""
        self._go = torch.zeros(1, dtype=torch.int32, device=device)
        self.lane_of: dict[int, int] = {}
        self._changed = True
        """Whether lanes are other than those on the device."""
        self._others = True
        """Whether lanes are others than when they were grouped."""
        self._taken = 0
        """Steps started, counted as the device counts them."""
        self._miscounted = True
        """Whether the device's count is another one."""
        self._under_way: deque[Launch] = deque(maxlen=2)
        self._params: dict[int, tuple[SamplingParams, int]] = {}
        """By slot: how its lane's tokens are sampled, and how many it has behind all that was launched; for lanes that
        are not greedy."""
        self._truncating: set[int] = set()
        """Slots, of these, whose tokens are drawn from the likeliest ones alone."""
        self._prompt_len: dict[int, int] = {}
        """By slot, of those in `_params`, and of some that were."""
        self.guard = Guard(cache, attention.over_read)
        self._advance, self._advance_greedily, self._add_noise = wrap(advance), wrap(advance_greedily), wrap(add_noise)
        self._patch, self._likeliest = wrap(patch), wrap(likeliest)
        self.processors = LaneProcessors(lanes, steps, device, wrap)
        self._make_runners(buckets, lanes)
        self.captured = False
        self.wanted: dict[tuple[GraphRunner, int], None] = {}
        self.captures_while_running = 0

    def _make_runners(self, buckets: Sequence[int], lanes: int) -> None:
        self.static = static = [
            *self.model.parameters(),
            *self.model.buffers(),
            *self.attention.cache.storages(),
            *self.attention.storages(),
            self._device,
            self._idle,
            self._frontiers_seen,
            self._sampling,
            self._out,
            self._go,
            *(self.speculator.storages() if self.speculator is not None else []),
        ]
        device = self._device.device
        first, plain = self.attention.variants[0], StepKind()
        self.runner = GraphRunner(partial(self._step, first, plain), buckets, static, device, self._loops_by)
        # Steps of other kinds are made when they are first used, or likely to be.
        self._runners = {(first, plain): self.runner}
        self._choosers: dict[StepKind, GraphRunner] = {}
        """Of tokens, behind steps and passes that leave logits."""
        self._verifiers: dict[tuple[int, bool], GraphRunner] = {}
        """Of steps with drafts, by their number and whether any lane samples."""
        for drafts in self.speculator.config.ladder if self.speculator is not None else ():
            some = verified_buckets(lanes, 1 + drafts)
            for sampled in (False, True):
                step = partial(self._verify_step, drafts, sampled)
                self._verifiers[drafts, sampled] = GraphRunner(step, some, static, device, pool=self.runner.pool)

    @property
    def _plain(self) -> list[str]:
        """The attention's kernels that know nothing of `PrefixTables`."""
        return [variant for variant in self.attention.variants if not variant.endswith(PREFIXES)]

    @property
    def _loops_by(self) -> torch.Tensor | None:
        return self._go if self.loop else None

    def _runner(self, variant: str, kind: StepKind) -> GraphRunner:
        made = self._runners.get((variant, kind))
        if made is None:
            step, pool = partial(self._step, variant, kind), self.runner.pool
            static = [*self.static, *self.processors.static, self.processors.logits]
            made = GraphRunner(step, self.runner.buckets, static, self._device.device, self._loops_by, pool)
            self._runners[variant, kind] = made
        return made

    def chooser(self, kind: StepKind) -> GraphRunner:
        """What chooses tokens as a kind of step does, by logits that a forward pass left."""
        made = self._choosers.get(kind)
        if made is None:
            step, pool = partial(self._choose_tokens, kind), self.runner.pool
            static = [*self.static, *self.processors.static, self.processors.logits]
            made = GraphRunner(step, self.runner.buckets, static, self._device.device, pool=pool)
            self._choosers[kind] = made
        return made

    def capture(self) -> CaptureReport:
        """Capture every bucket, by each of the attention's kernels but those that honour `PrefixTables`; launches are
        replays from then on. The report's `replay_s` is that of the first kernel."""
        self.attention.measure(self.runner.buckets, self.packed)
        report, *others = (self._runner(variant, StepKind()).capture() for variant in self._plain)
        self.captured = self._miscounted = True
        seconds = {bucket: sum(each.seconds[bucket] for each in (report, *others)) for bucket in report.seconds}
        return CaptureReport(seconds, report.replay_s, sum(each.pool_bytes for each in (report, *others)))

    def likely(self) -> Iterator[tuple[GraphRunner, int]]:
        """What steps may be wanted without having been, the likeliest first (likely.py)."""
        first, *others = self.attention.variants
        rows = sampled_rows(int(self.model.config.get_text_config().vocab_size))
        for name in (each for each in others if each.endswith(PREFIXES)):
            if self.reading is not None:
                runner = self._runner(name, StepKind())
                yield from ((runner, bucket) for bucket in few_buckets(runner.buckets))
        # These serve steps too that need no sort, until those have graphs of their own.
        sampling = self._runner(first, StepKind(sampled=True, truncated=True))
        yield from ((sampling, bucket) for bucket in few_buckets(sampling.buckets, rows))
        for (drafts, sampled), runner in self._verifiers.items():
            if sampled:
                yield from ((runner, bucket) for bucket in few_buckets(runner.buckets, rows // (1 + drafts)))

    def measure_prefixes(self) -> None:
        """Have `reading` know what a step takes longer where first tokens lie elsewhere, by replays of both over idle
        lanes; before any sequence has a lane, behind `capture` and that of what is `likely`."""
        name = self.attention.variants[-1]
        with_tables = self._runners.get((name, StepKind()))
        if self.reading is None or with_tables is None or not name.endswith(PREFIXES):
            return
        plain = [runner for (each, kind), runner in self._runners.items() if kind == StepKind() and each != name]
        longer = [
            with_tables.replay_s(bucket) - min(runner.replay_s(bucket) for runner in plain)
            for bucket in sorted(with_tables.captured)
        ]
        if longer:
            self.reading.learn(1e6 * median(longer), self.attention.token_us(len(self.lengths), self.packed))

    def capture_drafts(self, replay_s: Mapping[int, float]) -> CaptureReport:
        """Capture the steps with drafts, behind `capture`, by which `replay_s` came: what either takes says how many
        drafts pay. The report is by rows."""
        assert self.speculator is not None
        costs = self.speculator.length.seconds
        costs.update({(0, bucket): took for bucket, took in replay_s.items()})
        seconds: dict[int, float] = {}
        replays: dict[int, float] = {}
        nbytes = 0
        for (drafts, sampled), runner in self._verifiers.items():
            if sampled:
                continue
            report = runner.capture()
            nbytes += report.pool_bytes
            for bucket, took in report.replay_s.items():
                rows = bucket * (1 + drafts)
                costs[drafts, bucket] = replays[rows] = took
                seconds[rows] = seconds.get(rows, 0.0) + report.seconds[bucket]
        return CaptureReport(seconds, replays, nbytes)

    def _idle_column(self) -> np.ndarray:
        """What the device has of a lane without a sequence, int64 ``[rows, 1]``."""
        column = np.zeros((len(self._columns), 1), np.int64)
        column[2], column[5:ROWS] = self.attention.cache.dummy_slot, -1
        if self.speculator is not None:
            column[self.speculator.row] = self.speculator.idle_row
        return column

    # -- one step --------------------------------------------------------------------------------------------------

    def _step(self, variant: str, kind: StepKind, bucket: int) -> Outputs:
        """A step by one of the attention's kernels."""
        self.attention.use(variant)
        logits = self._forward(bucket)
        self.take(logits, kind)
        return (logits,)

    def _forward(self, bucket: int) -> torch.Tensor:
        positions, tokens, slots, lengths = self.inputs[:4, :bucket]
        step = DecodeStep(self.attention, slots, positions, lengths.to(torch.int32), self.packed)
        return forward(self.model, tokens, positions, step)

    def take(self, logits: torch.Tensor, kind: StepKind, only: torch.Tensor | None = None) -> None:
        """Choose tokens of the first lanes as a kind of step does, logits ``[bucket, vocab]``, and `advance`; with
        `only`, bool ``[lanes]``, those lanes alone. A forward pass leaves the logits to who chooses."""
        if kind.forward:
            self.processors.logits[: len(logits)].copy_(logits)
            return
        if not (kind.processed or kind.logprobs):
            if kind.sampled:
                self.take_sampled(logits, only, truncated=kind.truncated)
            else:
                self.take_greedily(logits, only)
            return
        processors, row = self.processors, self._device[-2:-1].remainder(2 * self.steps)
        running = self._those(only)[3] > 0
        changed, min_p = logits, None
        if kind.processed:
            changed, min_p = processors.apply(logits), processors.min_p(len(logits))
        if kind.sampled:
            self.take_sampled(changed, only, min_p, kind.truncated)
        else:
            self.take_greedily(changed, only)
        chosen = self._out.index_select(0, row)[0]
        if kind.processed:
            processors.note(chosen, running)
        if kind.logprobs:
            processors.keep_logprobs(logits, chosen, row)

    def _choose_tokens(self, kind: StepKind, bucket: int) -> Outputs:
        logits = self.processors.logits[:bucket]
        self.take(logits, kind)
        return (logits,)

    def _verify_step(self, drafts: int, sampled: bool, bucket: int) -> Outputs:
        """A step that verifies up to so many drafts of each lane."""
        speculator = self.speculator
        assert speculator is not None
        speculator.propose(self.inputs, partial(self._choose, self.inputs, 1, sampled), bucket, drafts)
        rows, lengths, query_lens = speculator.rows_of(self.inputs, bucket, 1 + drafts)
        positions, tokens, slots = rows.view(3, -1)
        lane_slots = self.inputs[2, :bucket] if self.packed else None
        step = VerifyStep(self.attention, slots, positions, lengths, query_lens, lane_slots)
        logits = forward(self.model, tokens, positions, step)
        self._take_drafts(logits, self.inputs, 1 + drafts, sampled)
        return (logits,)

    def _take_drafts(self, logits: torch.Tensor, inputs: torch.Tensor, queries: int, sampled: bool) -> None:
        """Choose a token by each row of logits ``[bucket * queries, vocab]``, and advance by those that are right."""
        assert self.speculator is not None
        chosen = self._choose(inputs, queries, sampled, logits)
        self.speculator.take(chosen, queries, inputs, self._device[-2:])

    def _choose(
        self, inputs: torch.Tensor, queries: int, sampled: bool, logits: torch.Tensor, ahead: int = 0
    ) -> torch.Tensor:
        """A token by each row of logits ``[bucket * queries, vocab]``, int64 ``[bucket * queries]``: of each lane those
        behind its own token and `ahead` further ones."""
        if not sampled:
            parts = in_parts(logits)
            chosen = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
            self._likeliest(*torch.max(parts, dim=-1), parts.shape[2], chosen)
            return chosen
        bucket = len(logits) // queries
        parameters = self._sampling[:3, :bucket].repeat_interleave(queries, dim=1).view(torch.float64)
        temperature, top_p, top_k = parameters
        base, prompt_len = self._sampling[3:5, :bucket]
        # By the token's place in the output, which the host does not know.
        place = torch.arange(ahead, ahead + queries, device=logits.device)
        keys = keys_at(base[:, None], (inputs[3, :bucket] - prompt_len)[:, None] + place).view(-1)
        return sample_on_device(logits, temperature, top_p, top_k, keys, self._add_noise)

    def _take_undrafted(self, logits: torch.Tensor, only: torch.Tensor | None, sampled: bool) -> None:
        assert self.speculator is not None
        inputs = self._those(only)
        self.speculator.propose(inputs, partial(self._choose, inputs, 1, sampled))
        self._take_drafts(logits, inputs, 1, sampled)
        self._keep(inputs, only)

    def take_greedily(self, logits: torch.Tensor, only: torch.Tensor | None = None) -> None:
        """Choose the likeliest tokens of the first lanes, logits ``[bucket, vocab]``, and `advance`; with `only`, bool
        ``[lanes]``, those lanes alone."""
        if self.speculator is not None:
            self._take_undrafted(logits, only, sampled=False)
            return
        inputs, bucket = self._those(only), len(logits)
        parts = in_parts(logits)
        # Rows of idle lanes hold anything.
        largest = parts.new_empty(len(self.lengths), parts.shape[1])
        place = torch.empty_like(largest, dtype=torch.int64)
        torch.max(parts, dim=-1, out=(largest[:bucket], place[:bucket]))
        self._take_largest(largest, place, parts.shape[2], inputs)
        self._keep(inputs, only)

    def take_sampled(
        self,
        logits: torch.Tensor,
        only: torch.Tensor | None = None,
        min_p: torch.Tensor | None = None,
        truncated: bool = True,
    ) -> None:
        """`take_greedily`, but each lane's token as its parameters say."""
        if self.speculator is not None:
            self._take_undrafted(logits, only, sampled=True)
            return
        inputs, bucket = self._those(only), len(logits)
        row = self._device[-2:-1].remainder(2 * self.steps)
        keys = self._sampling[3:, :bucket].index_select(0, row)[0]
        temperature, top_p, top_k = self._sampling[:3].view(torch.float64)[:, :bucket]
        chosen = self.inputs.new_empty(len(self.lengths))
        made = sample_on_device(logits, temperature, top_p, top_k, keys, self._add_noise, min_p, truncated)
        chosen[:bucket].copy_(made)
        self._take(chosen, inputs)
        self._keep(inputs, only)

    def _take_largest(self, largest: torch.Tensor, place: torch.Tensor, width: int, inputs: torch.Tensor) -> None:
        """`_take` each lane's likeliest token, by the largest logit of each part of it (`of_parts`)."""
        self._advance_greedily(largest, place, width, inputs, *self._books())

    def _take(self, chosen: torch.Tensor, inputs: torch.Tensor) -> None:
        """Note each lane's token, int64 ``[lanes]``, and `advance`."""
        self._advance(chosen, inputs, *self._books())

    def _those(self, only: torch.Tensor | None) -> torch.Tensor:
        return self.inputs if only is None else torch.where(only, self.inputs, self._idle)

    def _keep(self, inputs: torch.Tensor, only: torch.Tensor | None) -> None:
        if only is not None:
            self.inputs.copy_(torch.where(only, inputs, self.inputs))

    def _books(self) -> tuple[Any, ...]:
        """What `advance` takes besides tokens and lanes."""
        return self._device[-2:], self._frontiers_seen, self._out, self._go, self.attention.cache.dummy_slot

    # -- lanes -----------------------------------------------------------------------------------------------------

    def join(self, request: RequestState) -> None:
        """Give a request a lane, which goes on from the tokens in its record."""
        known = request.tokens if self.speculator is not None else ()
        chosen = len(request.chosen)
        self.set_lane(
            request.slot, request.last, request.length, request.limit, request.params, chosen, known, request.asks
        )

    def set_lane(
        self,
        slot: int,
        token: int,
        length: int,
        limit: int,
        params: SamplingParams | None = None,
        generated: int = 0,
        known: Sequence[int] = (),
        asks: LaneAsks | None = None,
    ) -> None:
        """Give a slot's sequence a lane. Its next step writes `token` and makes it `length` tokens long; no step makes
        it longer than `limit`. `params` are those of the sequence, which has `generated` tokens of its own so far;
        `known` are all its tokens, of which `token` is the last, for drafts to be looked up in; `asks` is what else it
        asks for."""
        lane = self.lane_of.get(slot)
        self._others = True
        if lane is None:
            lane = self.lane_of[slot] = len(self.lane_of) if self.packed else slot
        self.tokens[lane], self.positions[lane] = token, length - 1
        self.slots[lane], self.lengths[lane], self.limits[lane] = slot, length, limit
        self._columns[5:ROWS, lane] = -1
        if self.speculator is not None:
            self._columns[self.speculator.row, lane] = self.speculator.join(slot, known)
        if params is not None and params.stop_token_ids:
            some = params.stop_token_ids[:STOPS]
            self._columns[5 : 5 + len(some), lane] = some
        self._source[lane] = -1
        self._changed = True
        if params is not None and not params.greedy:
            self._params[slot] = (params, generated)
            self._prompt_len[slot] = length - generated
            if params.truncates:
                self._truncating.add(slot)
        self.processors.set(slot, asks)

    def feed(self, slot: int, forced: Sequence[int], prompt_len: int) -> None:
        """Have a slot's sequence take its next token from `forced`, the tokens behind its prompt."""
        length = int(self.lengths[self.lane_of[slot]])
        # Of one that decodes the last token of its prompt none is forced yet.
        if length > prompt_len:
            self.feed_token(slot, forced[length - prompt_len - 1])

    def feed_token(self, slot: int, token: int) -> None:
        """Have a slot's sequence take this token next."""
        lane = self.lane_of[slot]
        self.tokens[lane], self._source[lane] = token, -1
        self._changed = True

    def resend(self) -> None:
        """Have the device take all lanes from the host's arrays, which somebody changed, or which it is ahead of."""
        self._source[:] = -1
        self._changed = self._miscounted = True

    def commit(self, launch: Launch, rows: Sequence[Sequence[int]]) -> None:
        """A launch gave these tokens, a row a step."""
        if not rows:
            return
        there = {slot: lane for slot, lane in self.lane_of.items() if slot in launch.lane_of}
        if self.speculator is not None:
            self._commit_drafts(self.speculator, launch, there)
            return
        self.tokens[list(there.values())] = [rows[-1][launch.lane_of[slot]] for slot in there]
        if self.loop and not launch.prompt_tokens:
            self._count({slot: lane for slot, lane in there.items() if self.lengths[lane]}, len(rows))

    def _commit_drafts(self, speculator: Speculator, launch: Launch, there: dict[int, int]) -> None:
        """The host learns how many tokens each lane was given."""
        report = launch.report()
        taken = speculator.commit({slot: launch.lane_of[slot] for slot in there}, report, launch.drafts or 0)
        lanes = np.fromiter(there.values(), np.int64, len(there))
        then = np.fromiter((launch.lane_of[slot] for slot in there), np.int64, len(there))
        running = (self.lengths[lanes] > 0) & (taken > 0)
        lanes, then, taken = lanes[running], then[running], taken[running]
        self.tokens[lanes] = report[taken - 1, then]
        self._lengthen(lanes, taken - 1)

    def clear_lane(self, slot: int) -> None:
        """Take a slot's lane away."""
        self._changed = self._others = True
        for launch in self._under_way:
            launch.lane_of.pop(slot, None)
        lane = self.lane_of.pop(slot)
        self._params.pop(slot, None)
        self._truncating.discard(slot)
        self.processors.clear(slot)
        if self.speculator is not None:
            self.speculator.leave(slot)
        if self.packed and lane != (last := len(self.lane_of)):
            self._columns[:, lane] = self._columns[:, last]
            self._source[lane] = self._source[last]
            moved = next(slot for slot, where in self.lane_of.items() if where == last)
            self.lane_of[moved] = lane
            lane = last
        self._columns[:, lane] = self._idle_column()[:, 0]
        self._source[lane] = -1

    def clear(self) -> None:
        """Take all lanes away, whatever became of a call that was interrupted, and forget what was launched. The device
        is done with it."""
        self._under_way.clear()
        self.lane_of.clear()
        self._params.clear()
        self._truncating.clear()
        self.processors.clear_all()
        if self.speculator is not None:
            self.speculator.clear()
        self._columns[:] = self._idle_column()
        self._source[:] = -1
        self._changed = self._miscounted = self._others = True

    @property
    def lanes(self) -> dict[int, int]:
        """The lanes by slot that take part in the next launch: those that are not behind their last step."""
        return {slot: lane for slot, lane in self.lane_of.items() if self.lengths[lane]}

    @property
    def most_left(self) -> int:
        """Steps that the longest of the lanes still has before it."""
        return int((self.limits - self.lengths)[self.lengths > 0].max(initial=-1)) + 1

    def _count(self, lanes: dict[int, int], steps: int) -> None:
        """These lanes, by slot, were given so many steps."""
        self._lengthen(np.fromiter(lanes.values(), np.int64, len(lanes)), steps)
        for slot in self._params.keys() & lanes.keys():
            params, generated = self._params[slot]
            self._params[slot] = (params, generated + steps)

    def _lengthen(self, lanes: np.ndarray, tokens: int | np.ndarray) -> None:
        self.lengths[lanes] += tokens
        self.positions[lanes] += tokens
        behind = lanes[self.lengths[lanes] > self.limits[lanes]]
        self._columns[:5, behind] = self._idle_column()[:5]

    def _ends(self, steps: int, drafts: int = 0) -> np.ndarray:
        """The most that lanes' lengths may be, int64 ``[lanes]``, in the last of so many steps with so many drafts."""
        ends: np.ndarray = self.lengths + (steps - 1 + drafts)
        if self.speculator is not None:
            ends += self.speculator.slack[self.slots]
        np.minimum(ends, self.limits, out=ends)
        return ends

    def lengths_after(self, steps: int, drafts: int = 0) -> np.ndarray:
        """Lengths by slot, int64 ``[num_slots]``, once so many steps with so many drafts were taken, the most that they
        may be; 0 where there is no lane."""
        ends = self._ends(steps, drafts)
        if not self.packed:
            return ends
        by_slot = np.zeros(self.attention.cache.shape.num_slots, np.int64)
        count = len(self.lane_of)
        slots, lanes = (np.fromiter(each, np.int64, count) for each in (self.lane_of.keys(), self.lane_of.values()))
        by_slot[slots] = ends[lanes]
        return by_slot

    def lengths_taken(self, launch: Launch, steps: int) -> np.ndarray:
        """`lengths_after` so many steps of a launch, for the slots in it: who joined since did not go with it."""
        lengths = self.lengths_after(steps)
        taken = np.zeros_like(lengths)
        slots = [*launch.lane_of]
        taken[slots] = lengths[slots]
        return taken

    # -- launching -------------------------------------------------------------------------------------------------

    def choose_drafts(self) -> int:
        """How many drafts the next step has room for."""
        if self.speculator is None or self.most_left <= 1:
            return 0
        lanes = self.lanes
        highest = max(lanes.values())
        buckets = {0: self.bucket_of(lanes)}
        for (drafts, sampled), runner in self._verifiers.items():
            if not sampled and runner.buckets[-1] > highest:
                buckets[drafts] = runner.bucket_for(1 + highest)
        drafts = self.speculator.length.choose([*lanes], buckets)
        return drafts if drafts and self.speculator.prepare(self.lengths_after(1, drafts)) else 0

    def _launch_drafts(self, drafts: int) -> Launch:
        """`launch` of one step with so many drafts."""
        assert self.speculator is not None
        guarded = self.check(1, drafts)
        self.speculator.check(self.lengths_after(1, drafts))
        runner = self._verifiers[drafts, self.sampling]
        bucket = self.capture_missing(runner, runner.bucket_for(1 + max(self.lanes.values())))
        self.send(1)
        if self.captured:
            (logits,) = runner.replay(bucket)
        else:
            (logits,) = self._verify_step(drafts, self.sampling, bucket)
        return self.launched(self.lanes, 1, logits, guarded, drafts=drafts)

    def launch(self, steps: int = 1, drafts: int = 0) -> Launch:
        """Guard and start what the host arrays describe: `steps` steps, or in a loop so many at most, behind what is
        under way; or one step with room for so many drafts (`choose_drafts`). Raises UnmappedAccess before anything is
        launched."""
        if drafts:
            return self._launch_drafts(drafts)
        guarded = self.check(1 if self.loop else steps)
        bucket = self.bucket
        variant = self.attention.pick(self.lengths[:bucket], self.packed, self._share_reading())
        return self._start(steps, bucket, variant, guarded)

    def _start(self, steps: int, bucket: int, variant: str, guarded: float) -> Launch:
        """Start what was guarded, by one of the attention's kernels."""
        runner = self._runner(variant, self.kind)
        other = self.kind != StepKind() and not variant.endswith(PREFIXES)
        if other and self.captures_alone and serving(runner, bucket) is None:
            # By another kernel, rather than have everybody wait for a graph by this one.
            same = [each for (name, kind), each in self._runners.items() if kind == self.kind and name in self._plain]
            runner = next((each for each in same if serving(each, bucket) is not None), runner)
        general = self._runners.get((variant, self.kind._replace(truncated=True)))
        runner, bucket = self.graph_for(runner, general if self.kind.sampled else None, bucket)
        choice = self.choice(self.lanes)
        self.send(steps)
        if not self.captured:
            (logits,) = self._run_eagerly(variant, bucket, steps)
        elif self.loop and choice is None:
            (logits,) = runner.replay_while(bucket)
        else:
            (logits,) = runner.replay(bucket, steps)
        return self.launched(self.lanes, steps, logits, guarded, choice=choice)

    def choice(self, lanes: dict[int, int], eager: bool = False, only: torch.Tensor | None = None) -> Choice | None:
        """What chooses the tokens of these lanes, by slot, behind the launch that follows, captured unless it is there
        or `eager`; `only` as `take` has it. None where the launch itself does. Before lanes are brought up to date."""
        if not self.processors.has_grammars:
            return None
        kind, bucket = self.choice_kind, self.bucket_of(lanes)
        if eager or not self.captured:
            return Choice(kind, partial(self.take, self.processors.logits[:bucket], kind, only))
        return Choice(kind, self.captured_choice(lanes))

    def captured_choice(self, lanes: dict[int, int]) -> Callable[[], object]:
        """What chooses the tokens of these lanes, by slot, behind a forward pass; captured unless it is there, before
        lanes are brought up to date."""
        kind, bucket = self.choice_kind, self.bucket_of(lanes)
        general = self._choosers.get(kind._replace(truncated=True)) if kind.sampled else None
        chooser, bucket = self.graph_for(self.chooser(kind), general, bucket)
        return partial(chooser.replay, bucket)

    def choose(self, launch: Launch) -> Launch:
        """The same launch, whose tokens are being chosen; what lanes had chosen before it is in the requests' records.

        The host computes masks while the device is at the launch's forward pass, for which nothing here waits.
        """
        assert launch.choice is not None
        kind, start = launch.choice
        rows = self.processors.new_masks(launch.lane_of)
        if rows is not None:
            self._put_masks(rows)
        if launch.timing is not None:
            launch.timing.go_on()
        start()
        if launch.timing is not None:
            launch.timing.end()
        out, arrived, logprobs = self._fetch_chosen(launch.lane_of, kind)
        return replace(launch, choice=None, _out=out, _arrived=arrived, logprobs=logprobs)

    def begin_masks(self, read: Launch, rows: Sequence[Sequence[int]], launch: Launch) -> None:
        """Begin the masks of a launch whose tokens are to be chosen once those of the launch before it, which gave
        these rows, are committed."""
        if launch.choice is not None and len(rows) == 1:
            self.processors.begin_masks(launch.lane_of, {slot: rows[0][lane] for slot, lane in read.lane_of.items()})

    def _put_masks(self, rows: range) -> None:
        """`LaneProcessors.put_masks` beside what the device is at; what is launched next waits for it."""
        if self._copies is None or self._tables_sent is None:
            self.processors.put_masks(rows)
            return
        stream = torch.cuda.current_stream(self._device.device)
        # Behind the last choice, which reads them, and the tables of new lanes.
        self._copies.wait_event(self._tables_sent)
        self._left = stream
        with torch.cuda.stream(self._copies):
            self.processors.put_masks(rows)
        self._left = None
        stream.wait_stream(self._copies)

    def _share_reading(self) -> bool:
        """Group lanes for the launch that follows; returns whether it needs a kernel that honours `PrefixTables`."""
        if self.reading is None:
            return False
        changed, self._others = self._others, False
        return self.reading.share(self.lanes, self.lengths, changed)

    def check(self, steps: int, drafts: int = 0) -> float:
        """Raise UnmappedAccess where so many steps of the lanes would touch memory that is not mapped; returns the
        seconds that it took."""
        started = perf_counter()
        self.guard.check(self._ends(steps, drafts), self.slots, self.positions)
        return perf_counter() - started

    def send(self, steps: int) -> None:
        """Bring the device's lanes up to date, on the stream of the launch that follows, of so many steps."""
        device = self._device.device
        if self.reading is not None:
            self.reading.publish()
        if self.loop or self._miscounted:
            # Only of a loop it is the device that knows how many were taken, and nobody wants more of the last one.
            self._taken, self._miscounted = 0, False
            self._device[-2:].copy_(upload(np.array([0, steps]), device))
            self.publish_frontiers()
        if self._changed:
            self._patch(self.inputs, upload(np.concatenate((self._source[None], self._columns)), device))
            self._source[:] = np.arange(len(self._source))
            self._changed = False
        if self.speculator is not None:
            self.speculator.send()
        if self._params:
            self._upload_sampling(steps)
        self.processors.send(self.lane_of)
        if self._tables_sent is not None and self.processors.has_grammars:
            self._tables_sent.record()

    def launched(
        self,
        lanes: dict[int, int],
        steps: int,
        logits: torch.Tensor,
        guard_s: float = 0.0,
        prompt_tokens: int = 0,
        timing: Timing | None = None,
        of_prompts: tuple[PromptLogprobs, ...] = (),
        drafts: int = 0,
        choice: Choice | None = None,
    ) -> Launch:
        """Note what was started for these lanes, and start fetching their tokens, unless a `choice` is to come."""
        out, arrived, logprobs = self._fetch_chosen(lanes, self.kind) if choice is None else (self._out, None, None)
        launch = Launch(
            lanes,
            self._taken,
            steps,
            logits,
            guard_s,
            out,
            arrived,
            prompt_tokens,
            timing,
            of_prompts,
            logprobs,
            None if self.speculator is None else drafts,
            choice,
        )
        if not self.loop:
            self._taken += steps
        if not self.loop or prompt_tokens:
            self._count(lanes, steps)
        if self.speculator is not None and lanes:
            self.speculator.launched([*lanes], drafts)
        self._under_way.append(launch)
        return launch

    def graph_for(self, runner: GraphRunner, general: GraphRunner | None, bucket: int) -> tuple[GraphRunner, int]:
        """The runner to replay for `bucket`, and the bucket: `runner`, captured unless it is (`capture_missing`); or
        where that has no graph, and somebody would wait for it, `general`, which does what `runner` does and more."""
        if general is not None and self.captured and self.captures_alone and serving(runner, bucket) is None:
            spare = serving(general, bucket)
            if spare is not None:
                self.wanted[runner, bucket] = None
                return general, spare
        return runner, self.capture_missing(runner, bucket)

    def capture_missing(self, runner: GraphRunner, bucket: int, spare: bool = True) -> int:
        """The bucket to replay for `bucket`: itself, or with `spare` a larger one that is captured, and this one is
        wanted then (`capture_wanted`). Where there is none it is captured now; lanes and unread tokens stay as they
        are. Where that fails, its steps run without a graph: whoever asked for such a one costs others no token. Raises
        StepOutOfMemory where they could not run so either."""
        if not self.captured or bucket in runner.captured:
            return bucket
        if spare and self.captures_alone and (larger := serving(runner, bucket)) is not None:
            self.wanted[runner, bucket] = None
            return larger
        if bucket in runner.uncaptured:
            self.wanted[runner, bucket] = None
            return bucket
        self.captures_while_running += 1
        try:
            self._capture_apart(runner, bucket)
        except torch.OutOfMemoryError as error:
            if not self.captures_alone:
                raise
            reason = str(error).partition("\n")[0]
            raise StepOutOfMemory(self.choice_kind, self._asking, reason) from error
        except CaptureError as error:
            if not self.captures_alone:
                raise
            logger.warning("steps run without a graph until one can be captured: %s", error)
            runner.uncaptured.add(bucket)
        return bucket

    @property
    def _asking(self) -> Iterable[int]:
        """Slots of who asks for more than a plain step does; of who asks for the rarest of it, where several do."""
        return self.processors.asking or self._truncating or self._params.keys()

    def capture_wanted(self, most: int = 1) -> int:
        """Capture up to so many graphs that steps went without; returns how many are left. While nobody runs. One that
        cannot be captured now is none of these before a step goes without it again: what it lacks may be there then."""
        for runner, bucket in list(self.wanted)[:most]:
            del self.wanted[runner, bucket]
            try:
                self._capture_apart(runner, bucket)
            except (RuntimeError, VattnError) as error:
                if is_device_lost(error):
                    raise
                logger.warning("steps go on without a graph that could not be captured: %s", error)
        return len(self.wanted)

    def _capture_apart(self, runner: GraphRunner, bucket: int) -> None:
        """Capture a bucket, with lanes and unread tokens as they were afterwards."""
        # What is captured is also run, over idle lanes.
        finish(str(self._device.device))
        state = [self._device, self._out, *self.processors.unread]
        state += self.speculator.state() if self.speculator is not None else []
        kept = [tensor.clone() for tensor in state]
        self.inputs.copy_(self._idle.expand_as(self.inputs))
        try:
            runner.capture([bucket], timed=())
        finally:
            for tensor, value in zip(state, kept, strict=True):
                tensor.copy_(value)

    @property
    def sampling(self) -> bool:
        """Whether any lane's tokens are sampled."""
        return bool(self._params)

    @property
    def kind(self) -> StepKind:
        """What the next step does behind the model: what any of the lanes asks for, or with grammars leave logits."""
        return FORWARD if self.processors.has_grammars else self.choice_kind

    @property
    def choice_kind(self) -> StepKind:
        """How the next step's tokens are chosen: as any of the lanes asks for."""
        return self.processors.kind(self.sampling, bool(self._truncating))

    def _fetch_chosen(
        self, lanes: Mapping[int, int], kind: StepKind
    ) -> tuple[torch.Tensor, torch.cuda.Event | None, Fetched | None]:
        """Start copying what a step of this kind chose for these lanes, by slot."""
        count = 1 + max(lanes.values(), default=0)
        fetched = self._fetch(count)
        return *fetched, self.fetch(each[:, :count] for each in self.processors.unread) if kind.logprobs else None

    def fetch(self, tensors: Iterable[torch.Tensor]) -> Fetched:
        """Start copying log-probabilities to the host, beside whatever is launched next."""
        if self._copies is not None:
            self._left = torch.cuda.current_stream(self._device.device)
        fetched = Fetched(tuple(tensors), self._copies)
        self._left = None
        return fetched

    def _fetch(self, lanes: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Start copying tokens of the first lanes to the host, beside whatever is launched next."""
        out = (self._out if self.speculator is None else self.speculator.out)[:, :lanes]
        if self._copies is None:
            return out, None
        stream = torch.cuda.current_stream(out.device)
        self._copies.wait_stream(stream)
        self._left = stream
        with torch.cuda.stream(self._copies):
            copy = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
            copy.copy_(out, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._left = None
        return copy, arrived

    def return_to_stream(self) -> None:
        """Make the stream the current one again that a launch was interrupted on."""
        if self._left is not None:
            torch.cuda.set_stream(self._left)
            self._left = None

    @property
    def bucket(self) -> int:
        """The bucket of the next launch."""
        return self.bucket_of(self.lanes)

    def bucket_of(self, lanes: dict[int, int]) -> int:
        """The bucket of these lanes, by slot."""
        return self.runner.bucket_for(1 + max(lanes.values(), default=0))

    def publish_frontiers(self) -> None:
        """Tell a running loop how long sequences may be now; to be called after memory was made accessible."""
        self._frontiers[:-1] = self.guard.longest()

    def _run_eagerly(self, variant: str, bucket: int, steps: int) -> Outputs:
        for _ in range(steps):
            outputs = self._step(variant, self.kind, bucket)
            if self.loop and not self._go.item():
                break
        return outputs

    def _upload_sampling(self, steps: int) -> None:
        rows = np.zeros(self._sampling.shape, np.int64)
        parameters, keys = rows[:3].view(np.float64), rows[3:]
        for slot, (params, generated) in self._params.items():
            lane = self.lane_of[slot]
            parameters[:, lane] = settings(params)
            if self.speculator is not None:
                keys[:, lane] = params.noise_base, self._prompt_len[slot]
                continue
            for step in range(steps):
                keys[(self._taken + step) % (2 * self.steps), lane] = params.key(generated + step)
        self._sampling.copy_(upload(rows, self._sampling.device))

    def audit(self, bucket: int | None = None) -> AuditReport:
        """Whose the addresses are that graphs hold, of a bucket or of all: greedy steps, those of other kinds and of
        other kernels of attention, where any did, and launches of many steps. Raises CaptureError where there is no
        graph."""
        regions = self.attention.regions()
        reports = []
        for (variant, kind), runner in self._runners.items():
            if runner is self.runner or bucket in runner.captured or (bucket is None and runner.captured):
                by = "" if len(self.attention.variants) == 1 else f" by {variant}"
                reports.append(runner.audit(regions, f"{kind.name} step{by}", bucket))
        for kind, chooser in self._choosers.items():
            if bucket in chooser.captured or (bucket is None and chooser.captured):
                reports.append(chooser.audit(regions, f"choice of a {kind.name} step", bucket))
        if self.speculator is not None:
            regions += self.speculator.regions()
        for (drafts, sampled), runner in self._verifiers.items():
            if bucket in runner.captured or (bucket is None and runner.captured):
                what = f"{'sampling' if sampled else 'decode'} step with {drafts} drafts"
                reports.append(runner.audit(regions, what, bucket))
        return AuditReport.joined(reports)

    def close(self) -> None:
        """Drop all graphs. Idempotent."""
        for runner in (*self._runners.values(), *self._choosers.values(), *self._verifiers.values()):
            runner.close()
        if self.speculator is not None:
            self.speculator.close()


def verified_buckets(lanes: int, queries: int) -> list[int]:
    """Batch sizes to capture steps of so many queries a lane for: few, and of no more than `MOST_ROWS` rows."""
    most = min(lanes, max(1, MOST_ROWS // queries))
    return [*(1 << power for power in range(lanes.bit_length()) if 1 << power < most), most]


def _mirrored(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros on the host, pinned where they are copied to a GPU."""
    tensor = torch.zeros(*shape, dtype=dtype)
    return tensor.pin_memory() if device.type == "cuda" else tensor
