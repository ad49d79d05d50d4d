"""Which requests run: the queue, the prompts going in, the sequences decoding, and who goes back for lack of memory."""

from __future__ import annotations

import logging
from collections import deque
from itertools import islice

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import ConfigError, DriverError, NoFreeSlot, OutOfPages
from trtllm_vattn.runtime.compaction import Compaction
from trtllm_vattn.runtime.decode import DecodeBatch
from trtllm_vattn.runtime.prefill import PromptChunk
from trtllm_vattn.runtime.request import Running

logger = logging.getLogger(__name__)


class Scheduler:
    """First come, first served; the youngest is preempted first and prefilled again later.

    Parameters
    ----------
    chunk : int
        Prompt tokens that go in at once.

    Attributes
    ----------
    waiting, prefilling : deque of Running
        In the order of their requests; those prefilling hold a slot.
    decoding : dict of int to Running
        By slot, in the order in which they joined; each has a lane.
    ended : deque of int
        Requests that left and whose slot and memory are still to be released.
    """

    def __init__(self, cache: KVCache, decode: DecodeBatch, compaction: Compaction | None, chunk: int) -> None:
        self.cache, self.decode, self.compaction, self.chunk = cache, decode, compaction, chunk
        self.waiting: deque[Running] = deque()
        self.prefilling: deque[Running] = deque()
        self.decoding: dict[int, Running] = {}
        self.ended: deque[int] = deque()

    @property
    def holders(self) -> list[Running]:
        """Requests with a slot."""
        return [*self.decoding.values(), *self.prefilling]

    def admit(self) -> None:
        """Give the next waiting requests slots if there is room; raises where the first has none though nobody runs.

        Prompts go in one after another, so more than the next two chunks would hold memory for nothing, and a burst
        would map all of it at once instead of beside the prompts before.
        """
        left = sum(request.length - request.prefilled for request in self.prefilling)
        while self.waiting and (len(self.prefilling) < 2 or left < 2 * self.chunk):
            request = self.waiting[0]
            try:
                request.slot = self.cache.admit(request.id, request.length)
            except (NoFreeSlot, OutOfPages):
                if not self.holders:
                    raise
                return
            self.prefilling.append(self.waiting.popleft())
            left += request.length

    def admit_beside(self) -> None:
        """`admit` while the device is busy; and have the cache's thread, if it has one, create memory for those left
        waiting whom there are slots for."""
        self.admit()
        if isinstance(self.cache, KVCacheManager):
            free = self.cache.shape.num_slots - len(self.holders)
            self.cache.stock_for([request.length for request in islice(self.waiting, free)])

    def next_chunks(self) -> list[tuple[Running, PromptChunk]]:
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
        left = {slot: request.params.max_tokens - len(request.fed) for slot, request in by_slot.items()}
        for source, target in self.compaction.plan(left):
            try:
                self.compaction.move(source, target)
            except (OutOfPages, DriverError) as error:
                logger.warning("sequences stay where they are, for a move failed: %s", error)
                return
            request = by_slot[source]
            request.slot = target
            if self.decoding.pop(source, None) is not None:
                self.decode.vacate(source)
                self.decode_next(request)

    def decode_next(self, request: Running) -> None:
        """Have a request take part in the next launch, with its last token."""
        self.decoding[request.slot] = request
        drawn = len(request.fed)
        self.decode.occupy(request.slot, request.fed[-1], request.length, request.limit, request.params, drawn)

    def preempt(self) -> None:
        """Send the youngest request back to the queue. Raises OutOfPages where it is the only one: it can never be
        served."""
        holders = self.holders
        if len(holders) == 1:
            raise OutOfPages(
                f"request {holders[0].id} alone outgrew the cache's memory at {holders[0].length} tokens; abort it, or "
                "raise the budget"
            )
        self.preempt_youngest()

    def preempt_youngest(self) -> None:
        """Send the youngest request back to the queue, even if it is the only one."""
        self._send_back(max(self.holders, key=lambda request: request.id))

    def preempt_all(self) -> None:
        """Send every request with a slot back to the queue, where they stand in their order."""
        while self.holders:
            self.preempt_youngest()

    def preempt_broken(self) -> None:
        """Send back who is in a slot that cannot grow any more, since unmapping failed in it; it starts in another."""
        if isinstance(self.cache, KVCacheManager):
            for request in sorted(self.holders, key=lambda request: -request.id):
                if self.cache.arena.slots[request.slot].broken:
                    self._send_back(request)

    def _send_back(self, request: Running) -> None:
        if request in self.prefilling:
            self.prefilling.remove(request)
        self.leave(request)
        request.prefilled = 0
        self.waiting.appendleft(request)
        self.release_ended()

    def leave(self, request: Running) -> None:
        """Take a request's lane; its slot and memory are taken by `release_ended`."""
        if self.decoding.pop(request.slot, None) is not None:
            self.decode.vacate(request.slot)
        if request.slot >= 0:
            request.slot = -1
            self.ended.append(request.id)

    def release_ended(self) -> None:
        """Release what those who left had. Raises DriverError where one fails, which the next call tries again."""
        while self.ended:
            self.cache.release(self.ended[0])
            self.ended.popleft()

    def abort(self, number: int) -> None:
        """Drop a request wherever it is. Raises ConfigError for an unknown one."""
        for queue in (self.waiting, self.prefilling):
            for request in queue:
                if request.id == number:
                    queue.remove(request)
                    self.leave(request)
                    return self.release_ended()
        for request in self.decoding.values():
            if request.id == number:
                self.leave(request)
                return self.release_ended()
        raise ConfigError(f"no request {number} is waiting or running")

    def drop_all(self) -> None:
        """Drop every request."""
        for request in self.holders:
            self.leave(request)
        self.waiting.clear()
        self.prefilling.clear()
        self.release_ended()

    def clear(self) -> None:
        """Forget all requests."""
        self.waiting.clear()
        self.prefilling.clear()
        self.decoding.clear()
        self.ended.clear()
