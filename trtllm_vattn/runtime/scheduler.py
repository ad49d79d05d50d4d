"""Which requests run: the queue, the prompts going in, the sequences decoding, and who goes back for lack of memory."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from itertools import islice

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.errors import DriverError, KVCacheOutOfMemory, MemoryQuarantined, NoFreeSlot
from trtllm_vattn.runtime.compaction import Compaction
from trtllm_vattn.runtime.decode import DecodeBatch
from trtllm_vattn.runtime.prefill import PromptChunk
from trtllm_vattn.runtime.request import RequestQueue, RequestState

logger = logging.getLogger(__name__)

PromptChunks = list[tuple[RequestState, PromptChunk]]
"""Prompt tokens that go in at once, in the order of their requests."""


class Scheduler:
    """First come, first served; the youngest is preempted first and prefilled again later.

    Parameters
    ----------
    chunk : int
        Prompt tokens that go in at once.
    fail : callable
        Called with a request that can never be served and the reason; it ends it (`end`).

    Attributes
    ----------
    requests : dict of int to RequestState
        By number, all that have not ended, wherever they are.
    waiting : RequestQueue
        Those without a slot, in the order in which they get one.
    prefilling : deque of RequestState
        In the order of their requests; they hold a slot.
    decoding : dict of int to RequestState
        By slot, in the order in which they joined; each has a lane.
    ended : deque of int
        Requests that left and whose slot and memory are still to be released.
    """

    def __init__(
        self,
        cache: KVCache,
        decode: DecodeBatch,
        compaction: Compaction | None,
        chunk: int,
        fail: Callable[[RequestState, str], None],
    ) -> None:
        self.cache, self.decode, self.compaction, self.chunk, self.fail = cache, decode, compaction, chunk, fail
        self.requests: dict[int, RequestState] = {}
        self.waiting = RequestQueue()
        self.prefilling: deque[RequestState] = deque()
        self.decoding: dict[int, RequestState] = {}
        self.ended: deque[int] = deque()

    def add(self, request: RequestState) -> None:
        """Queue a new request."""
        self.requests[request.id] = request
        self.waiting.append(request)

    @property
    def holders(self) -> list[RequestState]:
        """Requests with a slot."""
        return [*self.decoding.values(), *self.prefilling]

    def admit(self) -> None:
        """Give the next waiting requests slots if there is room. Who would not fit even alone ends with an error, so
        that nobody waits behind it for ever. Raises NoFreeSlot where none is usable though nobody runs.

        Prompts go in one after another, so more than the next two chunks would hold memory for nothing, and a burst
        would map all of it at once instead of beside the prompts before.
        """
        left = sum(request.length - request.prefilled for request in self.prefilling)
        while self.waiting and (len(self.prefilling) < 2 or left < 2 * self.chunk):
            request = self.waiting.first
            try:
                request.slot = self.cache.admit(request.id, request.length)
            except NoFreeSlot:
                if not self.holders:
                    raise
                return
            except KVCacheOutOfMemory as error:
                cache = self.cache
                if request.length > cache.longest_alone:
                    self.fail(
                        request,
                        f"its {request.length} tokens take {cache.bytes_of(request.length):,} bytes, and the budget "
                        f"has {cache.bytes_for_sequences:,} for sequences; raise the budget",
                    )
                elif not self.holders:
                    self.fail(request, f"no memory for its {request.length} tokens, though nobody else runs: {error}")
                else:
                    return
                continue
            self.waiting.remove(request)
            self.prefilling.append(request)
            left += request.length

    def admit_during_step(self) -> None:
        """`admit` while the device is busy; and have the cache's thread, if it has one, create memory for those left
        waiting whom there are slots for."""
        self.admit()
        free = self.cache.shape.num_slots - len(self.holders)
        self.cache.preallocate_for([request.length for request in islice(self.waiting, free)])

    def plan_prompts(self, may_move: bool) -> PromptChunks:
        """Decide which prompts go in next: release what ended requests held, admit who waits, and give the chunks.
        `may_move` says that no launch is under way, so that sequences may be moved to other slots (`compact`)."""
        if self.ended or self.waiting:
            self.cache.at_once(self._release_and_admit)
        if may_move:
            self.compact()
        return self.next_chunks()

    def _release_and_admit(self) -> None:
        self.release_ended()
        self.admit()

    def next_chunks(self) -> PromptChunks:
        """What goes in now, in the order of requests."""
        room = self.chunk
        chunks = []
        for request in self.prefilling:
            if not room:
                break
            tokens = request.tokens[request.prefilled : request.prefilled + room]
            chunks.append((request, PromptChunk(request.slot, tokens, request.prefilled)))
            room -= len(tokens)
        return chunks

    def compact(self) -> None:
        """Move sequences out of high slots where a smaller bucket repays it."""
        if self.compaction is None or not self.decoding:
            return
        by_slot = {request.slot: request for request in self.holders}
        left = {slot: request.left for slot, request in by_slot.items()}
        for source, target in self.compaction.plan(left):
            try:
                self.compaction.move(source, target)
            except (KVCacheOutOfMemory, DriverError, MemoryQuarantined) as error:
                logger.warning("sequences stay where they are, for a move failed: %s", error)
                return
            request = by_slot[source]
            request.slot = target
            if self.decoding.pop(source, None) is not None:
                self.decode.clear_lane(source)
                self.decode_next(request)

    def decode_next(self, request: RequestState) -> None:
        """Have a request take part in the next launch, with its last token."""
        self.decoding[request.slot] = request
        generated = len(request.chosen)
        self.decode.set_lane(request.slot, request.last, request.length, request.limit, request.params, generated)

    def preempt(self) -> None:
        """Send the youngest request back to the queue. Where it is the only one nobody can make room for it, and it
        ends with an error."""
        holders = self.holders
        if len(holders) > 1:
            self.preempt_youngest()
            return
        (alone,) = holders
        cache = self.cache
        self.fail(
            alone,
            f"it alone outgrew the cache's memory at {alone.length} tokens: the budget has "
            f"{cache.bytes_for_sequences:,} bytes for sequences; raise the budget",
        )
        self.release_ended()

    def preempt_youngest(self) -> None:
        """Send the youngest request back to the queue, even if it is the only one."""
        self._send_back(max(self.holders, key=lambda request: request.id))

    def preempt_all(self) -> None:
        """Send every request with a slot back to the queue, where they stand in their order."""
        while self.holders:
            self.preempt_youngest()

    def preempt_broken(self) -> None:
        """Send back who is in a slot that cannot grow any more, since unmapping failed in it; it starts in another."""
        broken = self.cache.broken_slots()
        for request in sorted(self.holders, key=lambda request: -request.id):
            if request.slot in broken:
                self._send_back(request)

    def _send_back(self, request: RequestState) -> None:
        if request in self.prefilling:
            self.prefilling.remove(request)
        self.leave(request)
        request.prefilled = 0
        self.waiting.put_back(request)
        self.release_ended()

    def leave(self, request: RequestState) -> None:
        """Take a request's lane; its slot and memory are taken by `release_ended`."""
        if self.decoding.pop(request.slot, None) is not None:
            self.decode.clear_lane(request.slot)
        if request.slot >= 0:
            request.slot = -1
            self.ended.append(request.id)

    def release_ended(self) -> None:
        """Release what those who left had. Raises DriverError where one fails, which the next call tries again."""
        while self.ended:
            self.cache.release(self.ended[0])
            self.ended.popleft()

    def end(self, request: RequestState) -> None:
        """Take a request out wherever it is; its slot and memory are taken by `release_ended`."""
        self.requests.pop(request.id, None)
        self.waiting.remove(request)
        if request in self.prefilling:
            self.prefilling.remove(request)
        self.leave(request)

    def drop(self, request: RequestState) -> None:
        """Forget a request that waits."""
        self.requests.pop(request.id, None)
        self.waiting.remove(request)

    def begin_anew(self) -> None:
        """Have all requests wait, in their order, for nobody holds a slot any more. Begins from any state; only which
        requests there are and what they have in their records has to be right."""
        self.waiting.clear()
        self.prefilling.clear()
        self.decoding.clear()
        self.ended.clear()
        for _, request in sorted(self.requests.items()):
            request.slot, request.prefilled = -1, 0
            self.waiting.append(request)

    def clear(self) -> None:
        """Forget all requests."""
        self.requests.clear()
        self.waiting.clear()
        self.prefilling.clear()
        self.decoding.clear()
        self.ended.clear()
