"""Which requests run, and what the next launch does (`StepPlan`): the queue, the prompts going in, the sequences
decoding, and who goes back for lack of memory."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import islice
from time import perf_counter
from typing import Literal

from trtllm_vattn.attention.base import MIN_CHUNK_ROWS
from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.errors import (
    ConfigError,
    DriverError,
    HostMemoryFull,
    KVCacheOutOfMemory,
    MemoryQuarantined,
    NoFreeSlot,
)
from trtllm_vattn.runtime.compaction import MOST_S, Compaction
from trtllm_vattn.runtime.decode import DecodeBatch
from trtllm_vattn.runtime.pass_cost import PassCost, PassLoad
from trtllm_vattn.runtime.prefill import PromptChunk
from trtllm_vattn.runtime.request import RequestState
from trtllm_vattn.runtime.request_queue import RequestQueue
from trtllm_vattn.runtime.reuse import Left, RequestSlots
from trtllm_vattn.runtime.step_plan import StepPlan
from trtllm_vattn.runtime.swap_cost import SwapCost
from trtllm_vattn.runtime.watermark import Watermark
from trtllm_vattn.trace import Trace

logger = logging.getLogger(__name__)

MARGIN = 0.95
"""Of a target time, what a pass is planned for."""

MOST_LOGPROB_ROWS = 512
"""Of a chunk of a prompt whose log-probabilities are asked for: each row has logits of a whole vocabulary."""

PromptChunks = list[tuple[RequestState, PromptChunk]]
"""Prompt tokens that go in at once, in the order of their requests."""


def choose_preemption(
    request: RequestState, tokens: int = 0, nbytes: int = 0, cost: SwapCost | None = None
) -> Literal["swap", "recompute"]:
    """What becomes of the keys and values of a request that has to give its memory up, of which it has `tokens` in
    `nbytes`: they go to host memory, or are computed again when there is room."""
    return "recompute" if cost is None or tokens < 1 else cost.choose(tokens, nbytes)


class Scheduler:
    """Whose turn it is says `RequestQueue`; whoever would be the last is preempted first, and prefilled again later.

    Parameters
    ----------
    slots : RequestSlots
        Gives requests slots of the cache, and takes them back.
    chunk : int
        Most tokens of a pass, prompts' and decoding sequences' together.
    steps : int
        Most decode steps of a launch without prompts.
    mixed : bool
        Whether prompts and decoding sequences share a pass.
    alone : bool
        Whether each prompt goes in by passes of its own, cut by its own length alone, and who is computed anew chooses
        the same tokens again by the same steps, so that nothing about others changes a bit. Not with `mixed`.
    clock, max_wait_s
        As `RequestQueue` takes them.
    swap_cost : SwapCost or None
        Says whether who is preempted goes to host memory; None has all tokens computed anew.
    cost, target_ms : PassCost, float, or None
        With both, a pass holds no more prompt tokens than it can take in so many milliseconds.
    pass_sizes : sequence of int
        Numbers of rows that passes are captured for, in order. A pass takes the time of all its rows, those without a
        token too: with a target, and where prompts go in by equal passes, it fills one of them. Empty where passes
        run as they are.
    padded_sizes : callable
        Called with how many sequences decode beside it: numbers of rows that a pass that runs as it is may be padded
        to, in order, and how many prompt tokens each holds.
    fail : callable
        Called with a request that can never be served and the reason; it ends it (`end`).

    Attributes
    ----------
    requests : dict of int to RequestState
        By number, all that have not ended, wherever they are.
    waiting : RequestQueue
        Those without a slot.
    prefilling : deque of RequestState
        In the order of their requests; they hold a slot.
    decoding : dict of int to RequestState
        By slot, in the order in which they joined; each has a lane.
    arriving : dict of int to RequestState
        By number; they hold a slot, and their tokens are on their way back from host memory.
    parked : dict of int to RequestState
        Those that were suspended until they are resumed (`park`); they neither run nor wait.
    watermark : Watermark
        Keeps those that were sent back from pushing out others.
    swaps, preempted : int
        How often a request's tokens went to host memory, and how often one with a slot went back to the queue.
    trace : Trace or None
        Notes requests from their coming to their end.
    ended : deque of Left
        Requests that left and whose slot and memory are still to be released.
    """

    def __init__(
        self,
        slots: RequestSlots,
        decode: DecodeBatch,
        compaction: Compaction | None,
        chunk: int,
        fail: Callable[[RequestState, str], None],
        *,
        steps: int = 1,
        mixed: bool = True,
        alone: bool = False,
        clock: Callable[[], float] = perf_counter,
        max_wait_s: float = math.inf,
        swap_cost: SwapCost | None = None,
        cost: PassCost | None = None,
        target_ms: float | None = None,
        pass_sizes: Sequence[int] = (),
        padded_sizes: Callable[[int], Sequence[tuple[int, int]]] = lambda lanes: (),
    ) -> None:
        self.cache: KVCache = slots.cache
        self.slots, self.decode, self.compaction, self.chunk, self.fail = slots, decode, compaction, chunk, fail
        self.steps, self.mixed, self.alone, self.cost, self.target_ms = steps, mixed, alone, cost, target_ms
        self.pass_sizes, self.padded_sizes = pass_sizes, padded_sizes
        self.swap_cost, self.swaps, self.preempted = swap_cost, 0, 0
        self.watermark = Watermark(self.cache)
        self.trace: Trace | None = None
        self.parked: dict[int, RequestState] = {}
        self._decoded_last = True
        """Whether the last launch was of decode steps, where prompts go in apart from them."""
        self._moved_out = False
        """Whether anybody left since moves were looked for (`Compaction`)."""
        self.requests: dict[int, RequestState] = {}
        self.waiting = RequestQueue(clock, max_wait_s)
        self._deadlines: list[tuple[float, int]] = []
        """A heap, of requests with a deadline, some of which have ended."""
        self.prefilling: deque[RequestState] = deque()
        self.decoding: dict[int, RequestState] = {}
        self.arriving: dict[int, RequestState] = {}
        self.ended: deque[Left] = deque()

    def add(self, request: RequestState) -> None:
        """Queue a new request."""
        self.requests[request.id] = request
        if self.trace is not None:
            self.trace.begin("request", request.id, {"request": request.id, "tokens": request.length})
        if request.deadline < math.inf:
            heappush(self._deadlines, (request.deadline, request.id))
        self.waiting.add(request)

    def overdue(self) -> Iterator[RequestState]:
        """Requests whose deadline has passed; each has to be ended before the next one is asked for."""
        now = self.waiting.clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            request = self.requests.get(self._deadlines[0][1])
            if request is not None:
                yield request
            heappop(self._deadlines)

    @property
    def next_deadline(self) -> float:
        """When the first deadline of a request passes, by the clock; infinite where none has one."""
        while self._deadlines and self._deadlines[0][1] not in self.requests:
            heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else math.inf

    @property
    def has_active(self) -> bool:
        """Whether any request runs or waits; suspended ones do neither."""
        return len(self.requests) > len(self.parked)

    @property
    def holders(self) -> list[RequestState]:
        """Requests with a slot."""
        return [*self.decoding.values(), *self.prefilling, *self.arriving.values()]

    def admit(self) -> None:
        """Give the next waiting requests slots if there is room. Who would not fit even alone ends with an error, so
        that nobody waits behind it for ever. Raises NoFreeSlot where none is usable though nobody runs.

        Prompts go in one after another, so more than the next two chunks would hold memory for nothing, and a burst
        would map all of it at once instead of beside the prompts before.
        """
        if not self.waiting:
            self.watermark.emptied()
        self._take_arrived()
        left = sum(request.length - request.prefilled for request in self.prefilling)
        while self.waiting and len(self.holders) < len(self.decode.lengths):
            request = self.waiting.first
            if len(self.prefilling) >= 2 and left >= 2 * self.chunk and not self._goes_before_all(request):
                return
            if self._begins_with_another(request) or not self.watermark.lets_in(
                request, self.holders, self.slots.changes
            ):
                return
            resumed = self.cache.is_suspended(request.id)
            if self.alone and not resumed:
                request.begin_again()
            try:
                (self.slots.resume if resumed else self.slots.admit)(request)
            except NoFreeSlot:
                if not self.holders and not self._forget_suspended(but=request):
                    raise
                return
            except KVCacheOutOfMemory as error:
                cache = self.cache
                if request.length > cache.longest_alone:
                    self.fail(
                        request,
                        f"its {request.length} tokens take {cache.bytes_of(request.length):,} bytes, and the budget "
                        f"has {cache.bytes_for_sequences:,} for sequences; {cache.remedy}",
                    )
                elif not self.holders and self._forget_suspended(but=request):
                    continue
                elif not self.holders and not cache.waits_for_memory:
                    self.fail(request, f"no memory for its {request.length} tokens, though nobody else runs: {error}")
                else:
                    return
                # What it had, in host memory too, is for the next one.
                self.release_ended()
                continue
            self.waiting.remove(request)
            if resumed:
                self.arriving[request.id] = request
                self._take_arrived()
                continue
            if request.prefilled and request.decodes_next and not (self.alone or request.wants_prompt_logprobs):
                # All but its last token is kept: a decode step takes that one, as it takes any sequence's last token.
                self.decode_next(request)
                continue
            self.prefilling.append(request)
            left += request.length - request.prefilled

    def _take_arrived(self, wait: bool = False) -> None:
        """Have those go on whose tokens came back from host memory; with `wait`, one at least."""
        for request in list(self.arriving.values()):
            if wait or self.cache.has_arrived(request.id):
                wait = False
                self._take(request)
                if request.decodes_next:
                    self.decode_next(request)
                else:
                    self.prefilling.append(request)

    def _take(self, request: RequestState) -> None:
        """A request's tokens are there, or are waited for now; nothing of one that is not on its way."""
        if self.arriving.pop(request.id, None) is not None:
            self.slots.arrived(request)

    def _begins_with_another(self, request: RequestState) -> bool:
        """Whether this is a branch whose prompt goes in for another one now, which it waits for."""
        if request.group is None or self.slots.prefixes is None:
            return False
        others = [other for other in self.holders if request.group in (other.id, other.group)]
        return bool(others) and not any(other.is_verified for other in others) and not self.slots.has_all(request)

    def _goes_before_all(self, request: RequestState) -> bool:
        rank = self.waiting.rank(request)
        return all(rank[0] < self.waiting.rank(other)[0] for other in self.prefilling)

    def admit_during_step(self) -> None:
        """`admit` while the device is busy; and have the cache's thread, if it has one, create memory for those left
        waiting whom there are slots for."""
        self.admit()
        free = len(self.decode.lengths) - len(self.holders)
        self.cache.preallocate_for([request.length for request in islice(self.waiting, free)])

    # -- planning --------------------------------------------------------------------------------------------------

    def plan(self, ahead: bool) -> StepPlan | None:
        """Decide what the next launch does: release what ended requests held, admit who waits, back what the launch
        writes, by preemption where memory is short.

        With `ahead` launches are under way whose tokens nobody knows yet: nobody is preempted or moved then. None where
        there is nothing to launch, or nothing before these tokens are read.
        """
        if self.ended or self.waiting or self.arriving:
            self.cache.at_once(self._release_and_admit)
        if self.arriving and not (ahead or self.decoding or self.prefilling):
            self._take_arrived(wait=True)
        if self._moves_wait(ahead):
            return None
        drafting = True
        while True:
            plan = self._next_plan(drafting)
            if plan is None:
                return None
            if not plan.decodes or not self.decode.lanes:
                return plan
            steps = 1 if self.decode.loop else plan.steps
            try:
                self.cache.prepare_step(self.decode.lengths_after(steps, plan.drafts))
            except KVCacheOutOfMemory:
                if plan.drafts and self.decode.speculator is not None:
                    # Nobody gives memory up for tokens that may be rejected.
                    drafting = False
                    self.decode.speculator.stats.without_memory += 1
                elif ahead:
                    return None
                else:
                    self.preempt()
            except (DriverError, MemoryQuarantined):
                if not ahead:
                    self.preempt_broken()
                raise
            else:
                return plan

    def _next_plan(self, drafting: bool) -> StepPlan | None:
        """What comes next if there is memory, with drafts or without."""
        decoding = bool(self.decode.lanes)
        for request in self.decoding.values():
            if request.forced is not None:
                self.decode.feed(request.slot, request.forced, len(request.prompt))
        if self.prefilling and (self.mixed or self._decoded_last or not decoding):
            return StepPlan(1, tuple(self.next_chunks()), decodes=self.mixed)
        if not decoding:
            return None
        if self.decode.processors.has_grammars:
            # A grammar's next mask is made of the token before, by the host.
            return StepPlan(1)
        # What the longest of the requests still needs, but few different numbers.
        steps = min(self.steps, 1 << (self.decode.most_left - 1).bit_length())
        return StepPlan(steps, drafts=self.decode.choose_drafts() if drafting else 0)

    def launched(self, plan: StepPlan) -> None:
        """A plan was launched: its prompt tokens are in, and whose prompt is complete decodes from then on."""
        self._decoded_last = not plan.chunks
        for request, chunk in plan.chunks:
            if self.trace is not None:
                tokens = {"start": chunk.start, "stop": chunk.end}
                self.trace.mark("request", request.id, "prompt tokens", tokens)
            request.prefilled = chunk.end
        for request in plan.joins:
            self.prefilling.remove(request)
            self.decoding[request.slot] = request

    def _release_and_admit(self) -> None:
        self.release_ended()
        self.admit()

    def next_chunks(self) -> PromptChunks:
        """What goes in now, in the order of requests: what running sequences leave of the pass, but at least a few
        tokens; and with a target, as many as its cost allows."""
        order = sorted(self.prefilling, key=self.waiting.rank)
        chunks: PromptChunks = []
        for request, rows in zip(order, self._rows(order), strict=False):
            tokens = request.tokens[request.prefilled : request.prefilled + rows]
            chunks.append((request, PromptChunk(request.slot, tokens, request.prefilled)))
        return chunks

    def _rows(self, order: Sequence[RequestState]) -> list[int]:
        """How many tokens of each of the first requests go in now."""
        lanes = self.decode.lanes if self.mixed else {}
        least = min(self.chunk, MIN_CHUNK_ROWS)
        room = max(self.chunk - len(lanes), least)
        if not order:
            return []
        if self.cost is None or self.target_ms is None:
            return self._rows_within(order, self._equal_part(order, room, len(lanes)) if self.mixed else room)
        kv = int(self.decode.lengths[list(lanes.values())].sum())
        target_ms = MARGIN * self.target_ms
        best = self._rows_within(order[:1], least)
        sizes = [(size, size - len(lanes)) for size in self.pass_sizes if size > len(lanes)]
        if sizes:
            # A pass with log-probabilities of prompts runs as it is: who asks for them waits for the next one, or is
            # the first of this one.
            asks = [request.wants_prompt_logprobs for request in order]
            sizes = [] if asks[0] else sizes
            order = order[: asks.index(True)] if sizes and True in asks else order
        for rows, holds in sizes or self.padded_sizes(len(lanes)):
            left_ms = target_ms - self.cost.milliseconds(PassLoad(rows, 0, kv))
            if left_ms <= 0:
                break
            best = max(best, self._rows_within(order, min(room, holds), left_ms), key=sum)
        return best

    def _equal_part(self, order: Sequence[RequestState], room: int, lanes: int) -> int:
        """The room of a pass, or less of it where prompts take several passes anyway: by equal ones, none of which
        holds running sequences up for longer than it has to."""
        left = sum(request.length - request.prefilled for request in order)
        passes = -(-left // room)
        if not lanes or passes == 1:
            return room
        needed = lanes + -(-left // passes)
        return min(room, next((size for size in self.pass_sizes if size >= needed), needed) - lanes)

    def _rows_within(self, order: Sequence[RequestState], room: int, left_ms: float = math.inf) -> list[int]:
        """Tokens of the first requests, of at most so many rows in all whose attention takes at most so much time
        (`PassCost.rows_within`)."""
        found: list[int] = []
        for request in order[: 1 if self.alone else None]:
            rows = min(room, request.length - request.prefilled)
            if request.wants_prompt_logprobs:
                rows = min(rows, MOST_LOGPROB_ROWS)
            if self.cost is not None and left_ms < math.inf:
                rows = min(rows, self.cost.rows_within(left_ms, request.prefilled))
                left_ms -= self.cost.chunk(rows, request.prefilled)
            if not rows:
                break
            found.append(rows)
            room -= rows
        return found

    def _moves_wait(self, ahead: bool) -> bool:
        """Move sequences out of high slots where a smaller bucket repays it; where that takes long, some of them. True
        where that has to wait for launches that are under way, which use the slots."""
        if self.compaction is None or not self.decoding or not self._moved_out:
            return False
        by_slot = {request.slot: request for request in self.holders}
        moves = self.compaction.plan({slot: request.left for slot, request in by_slot.items()})
        if moves and ahead:
            return True
        self._moved_out = False
        began = perf_counter()
        for source, target in moves:
            if perf_counter() - began > MOST_S:
                self._moved_out = True
                break
            try:
                self.compaction.move(source, target)
            except (KVCacheOutOfMemory, DriverError, MemoryQuarantined) as error:
                logger.warning("sequences stay where they are, for a move failed: %s", error)
                break
            request = by_slot[source]
            request.slot = target
            self.slots.moved(request)
            if self.decoding.pop(source, None) is not None:
                self.decode.clear_lane(source)
                self.decode_next(request)
        return False

    def decode_again(self) -> None:
        """Have all running sequences go on from their records: what was launched for them is not read."""
        for request in self.decoding.values():
            self.decode_next(request)
        self.decode.resend()

    def decode_next(self, request: RequestState) -> None:
        """Have a request take part in the next launch, with its last token."""
        self.decoding[request.slot] = request
        self.decode.join(request)

    def preempt(self) -> None:
        """Send the youngest request back to the queue. Where it is the only one nobody can make room for it, and it
        ends with an error; unless others may give memory back, which it waits for in the queue then."""
        holders = self.holders
        if len(holders) > 1:
            self.watermark.sent_back()
            self.preempt_youngest()
            return
        if self._forget_suspended():
            return
        (alone,) = holders
        cache = self.cache
        if cache.waits_for_memory and alone.length < cache.longest_alone:
            self.preempt_youngest()
            return
        self.fail(
            alone,
            f"it alone outgrew the cache's memory at {alone.length} tokens: the budget has "
            f"{cache.bytes_for_sequences:,} bytes for sequences; {cache.remedy}",
        )
        self.release_ended()

    def preempt_youngest(self) -> None:
        """Send the request back to the queue whose turn would come last, of equal ones the youngest; even if it is the
        only one."""
        self._send_back(max(self.holders, key=self.waiting.rank))

    def preempt_all(self) -> None:
        """Send every request with a slot back to the queue, where they stand in their order; all are computed anew."""
        cost, self.swap_cost = self.swap_cost, None
        try:
            while self.holders:
                self.preempt_youngest()
        finally:
            self.swap_cost = cost

    def recompute(self, request: RequestState) -> None:
        """Have a request with a slot go back to the queue, to be computed anew."""
        self._leave_to_recompute(request)
        self.waiting.add(request)
        self.release_ended()

    def forget_suspended(self) -> None:
        """Have all tokens that are in host memory computed anew."""
        while self._forget_suspended():
            pass

    def _forget_suspended(self, but: RequestState | None = None) -> bool:
        """Have the tokens of one suspended request, the last in order, computed anew, so that it holds no slot and no
        other slot's tokens; returns whether there was one. `but` is not it."""
        suspended = [
            request
            for request in (*self.waiting, *self.parked.values())
            if request is not but and self._has_suspended(request)
        ]
        if not suspended:
            return False
        request = max(suspended, key=self.waiting.rank)
        request.prefilled = 0
        self.ended.append(self.slots.leaving(request))
        self.release_ended()
        return True

    def is_kept(self, request: RequestState) -> bool:
        """Whether a slot or host memory has a request's tokens."""
        return request.slot >= 0 or self._has_suspended(request)

    def _has_suspended(self, request: RequestState) -> bool:
        """Whether host memory has a request's tokens, and it has not left them already: while the cache sleeps, what is
        left is released by nobody."""
        left = any(left.request == request.id for left in self.ended)
        return not left and self.cache.is_suspended(request.id)

    # -- host memory -------------------------------------------------------------------------------------------------

    def park(self, request: RequestState) -> int:
        """Suspend a request until `unpark`; returns the bytes that host memory holds of it: none of one that has none,
        or where host memory is full, and its tokens are computed anew then."""
        self.parked[request.id] = request
        self.waiting.remove(request)
        if request.slot < 0:
            return 0
        copied = self._swap_out(request, wait=False)
        if not copied:
            self._leave_to_recompute(request)
        self.release_ended()
        return copied

    def unpark(self, request: RequestState) -> None:
        """Have a suspended request wait for its turn."""
        del self.parked[request.id]
        self.waiting.add(request)

    def _swap_out(self, request: RequestState, wait: bool = True) -> int:
        """Put a request's tokens to host memory; returns the bytes, 0 where that is full or cannot be. Without `wait`,
        beside what others do; who needs the memory waits for it anyway."""
        self._take(request)
        tokens = self._computed_tokens(request)
        if tokens < 1:
            return 0
        slot = request.slot
        try:
            copied = self.slots.suspend(request, tokens, wait)
        except (ConfigError, HostMemoryFull, KVCacheOutOfMemory, MemoryQuarantined):
            return 0
        except DriverError as error:
            text = "request %d is computed anew, for copying its tokens failed: %s"
            logger.warning(text, request.id, error, extra={"request": request.id})
            return 0
        if request in self.prefilling:
            self.prefilling.remove(request)
        if self.decoding.pop(slot, None) is not None:
            self.decode.clear_lane(slot)
        self._moved_out = True
        self.swaps += 1
        if self.swap_cost is not None:
            self.swap_cost.observe_transfers(self.cache.transfers)
        return copied

    def _computed_tokens(self, request: RequestState) -> int:
        """Tokens of a request with a slot that the cache holds, whatever is under way: all but the last of one that
        decodes."""
        return request.length - 1 if request.slot in self.decoding else request.prefilled

    def _leave_to_recompute(self, request: RequestState) -> None:
        if request in self.prefilling:
            self.prefilling.remove(request)
        self.leave(request)
        request.prefilled = 0

    def preempt_broken(self) -> None:
        """Send back who is in a slot that cannot grow any more, since unmapping failed in it; it starts in another."""
        broken = self.cache.broken_slots()
        for request in sorted(self.holders, key=lambda request: -request.id):
            if request.slot in broken:
                self._send_back(request)

    def _send_back(self, request: RequestState) -> None:
        self.preempted += 1
        if self.trace is not None:
            self.trace.mark("request", request.id, "preempted")
        tokens = self._computed_tokens(request)
        chosen = choose_preemption(request, tokens, self.cache.bytes_of(tokens), self.swap_cost)
        if chosen == "recompute" or not self._swap_out(request):
            self._leave_to_recompute(request)
        self.waiting.add(request)
        self.release_ended()

    def leave(self, request: RequestState) -> None:
        """Take a request's lane; its slot and memory are taken by `release_ended`."""
        self._take(request)
        if self.decoding.pop(request.slot, None) is not None:
            self.decode.clear_lane(request.slot)
        if request.slot >= 0:
            self._moved_out = True
            left = self.slots.leaving(request)
            request.slot = -1
            self.ended.append(left)
        elif self._has_suspended(request):
            self.ended.append(self.slots.leaving(request))

    def release_ended(self) -> None:
        """Release what those who left had. Raises DriverError where one fails, which the next call tries again."""
        while self.ended and not self.cache.is_asleep:
            self.slots.release(self.ended[0])
            self.ended.popleft()

    def end(self, request: RequestState) -> None:
        """Take a request out wherever it is; its slot and memory are taken by `release_ended`."""
        if self._forget(request) and request.finish_reason in ("stop", "length"):
            self.watermark.ended(len(request.chosen))
        self.parked.pop(request.id, None)
        self.waiting.remove(request)
        if request in self.prefilling:
            self.prefilling.remove(request)
        self.leave(request)

    def drop(self, request: RequestState) -> None:
        """Forget a request that waits."""
        self._forget(request)
        self.waiting.remove(request)

    def _forget(self, request: RequestState) -> bool:
        """Whether it was still there."""
        known = self.requests.pop(request.id, None) is not None
        if known and self.trace is not None:
            ended = {"tokens": len(request.chosen), "finish_reason": request.finish_reason}
            self.trace.end("request", request.id, ended)
        return known

    def begin_anew(self) -> None:
        """Have all requests wait, in their order, for nobody holds a slot any more. Begins from any state; only which
        requests there are and what they have in their records has to be right."""
        self.waiting.clear()
        self.prefilling.clear()
        self.decoding.clear()
        self.arriving.clear()
        self.ended.clear()
        for number, request in sorted(self.requests.items()):
            request.slot, request.prefilled = -1, 0
            if number not in self.parked:
                self.waiting.add(request)
        self._deadlines = [
            (request.deadline, number) for number, request in self.requests.items() if request.deadline < math.inf
        ]
        heapify(self._deadlines)

    def clear(self) -> None:
        """Forget all requests."""
        self.requests.clear()
        self.parked.clear()
        self.waiting.clear()
        self.arriving.clear()
        self.prefilling.clear()
        self.decoding.clear()
        self.ended.clear()
