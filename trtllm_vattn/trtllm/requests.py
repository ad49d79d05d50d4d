"""The life of requests: backed before the stock books are kept, ended after."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from trtllm_vattn.errors import ConfigError, DriverError, OutOfPages, UnknownSequence
from trtllm_vattn.trtllm.books import Books
from trtllm_vattn.trtllm.features import UnsupportedFeature

logger = logging.getLogger(__name__)


class Requests(Books):
    """Admission, growth, rewind, end, and dummies."""

    def prepare_resources(self, scheduled_batch: Any) -> None:
        """Back the batch's new tokens, then keep the stock books. Raises OutOfPages; nothing changed then. Where the
        stock class fails, memory stays beneath what its books hold by then."""
        with self._vattn_lock:
            admitted, grown = self._vattn_needs(scheduled_batch)
            if admitted and not self._vattn_sized:
                self.vattn_size()
            self._vattn_step(admitted, grown)
            try:
                super().prepare_resources(scheduled_batch)
            except BaseException:
                self._vattn_take_back(admitted, grown)
                raise
            finally:
                for request in scheduled_batch.context_requests if admitted else ():
                    if request.py_request_id in admitted and self._vattn_pages.holds(request.py_request_id):
                        self._vattn_live[request.py_request_id] = request

    def _vattn_needs(self, batch: Any) -> tuple[dict[int, int], dict[int, int]]:
        """Tokens of requests that begin, and tokens more of those that go on, by id."""
        draft, reserve = self._vattn_module.get_draft_token_length, self._vattn_draft_reserve
        admitted = {
            request.py_request_id: request.prompt_len + self.num_extra_kv_tokens + draft(request)
            for request in batch.context_requests
            if request.is_first_context_chunk and request.py_request_id not in self._vattn_dummies
        }
        grown = {
            request.py_request_id: 1 + max(draft(request), reserve)
            for request in batch.generation_requests
            if request.py_request_id not in self._vattn_dummies
        }
        return admitted, grown

    def _vattn_step(self, admitted: dict[int, int], grown: dict[int, int]) -> None:
        pages = self._vattn_pages
        try:
            pages.step(admitted, grown)
        except OutOfPages:
            # A budget was lowered, or memory released, since the scheduler was told what is free.
            promised = pages.bytes_of(self._vattn_promised)
            if pages.cache.arena.pool.budget >= promised:
                raise
            pages.cache.set_budget(promised)
            pages.step(admitted, grown)

    def update_resources(self, scheduled_batch: Any, *arguments: Any, **named: Any) -> None:
        """The stock rewinds; then memory is mapped ahead, beside the step that runs, what fails when it is needed."""
        with self._vattn_lock:
            super().update_resources(scheduled_batch, *arguments, **named)
            try:
                self._vattn_pages.cache.map_ahead()
            except DriverError as error:
                logger.warning("mapping ahead failed and is left to the next step: %s", error)

    def rewind_kv_cache(self, request: Any, rewind_len: int) -> None:
        """Take rejected draft tokens back; their memory stays."""
        with self._vattn_lock:
            super().rewind_kv_cache(request, rewind_len)
            if self._vattn_pages.holds(request.py_request_id):
                self._vattn_pages.rewind(request.py_request_id, rewind_len)

    def free_resources(self, request: Any, pin_on_release: bool = False) -> Any:
        """End a request: finished, cancelled or paused. Its memory waits for the next one."""
        if pin_on_release:
            raise UnsupportedFeature("pinning blocks on release is not supported by the fixed-address KV cache")
        with self._vattn_lock:
            number = request.py_request_id
            done = super().free_resources(request)
            if self._vattn_dummies.pop(number, None) is None and self._vattn_pages.holds(number):
                self._vattn_pages.cache.release(number)
                self._vattn_live.pop(number, None)
            self._vattn_rows.epoch += 1
            self._vattn_sync()
            return done

    def add_dummy_requests(self, request_ids: Sequence[int], *arguments: Any, **named: Any) -> Any:
        """Dummies of any length take no memory: all their blocks are block 0. Ballast makes room in the books."""
        with self._vattn_lock:
            taken = [number for number in request_ids if number in self._vattn_live]
            if taken:
                raise ConfigError(f"dummy requests cannot take the ids {taken}, which running requests have")
            self._vattn_ballast.hold(self._vattn_ballast.blocks - len(request_ids) * (self.max_blocks_per_seq + 1))
            before = self.get_num_free_blocks()
            try:
                made = super().add_dummy_requests(request_ids, *arguments, **named)
                numbers = [request.py_request_id for request in made or []]
                booked = self.get_num_free_blocks() < before
                counts = self._vattn_booked(numbers) if booked else [0] * len(numbers)
                self._vattn_dummies.update(zip(numbers, counts, strict=True))
            finally:
                self._vattn_sync()
            return made

    # -- what only the C++ pool can do -----------------------------------------------------------------------------

    def pin_blocks(self, request_id: int) -> None:
        """Refused."""
        self._vattn_refuse("pinning blocks")

    def store_blocks_for_reuse(self, request: Any, pin_blocks: bool = False) -> None:
        """Refused."""
        self._vattn_refuse("block reuse")

    def get_unique_primary_pool(self) -> None:
        """Refused: most of the pool has no memory, and whoever asks for all of it would read it."""
        self._vattn_refuse("the whole pool as one tensor")

    def get_last_block_id(self, request_id: int) -> None:
        """Refused."""
        self._vattn_refuse("block ids for a KV connector")

    def _vattn_refuse(self, what: str) -> None:
        raise UnsupportedFeature(f"{what} is not supported by the fixed-address KV cache; run without trtllm-vattn")

    def _vattn_requests(self, numbers: Iterable[int]) -> list[int]:
        """Rows of the table for some requests; of a dummy, the row that is block 0 throughout."""
        slots, dummies, row = self._vattn_pages.cache.sequences, self._vattn_dummies, self._vattn_rows.tables.dummy_row
        try:
            return [row if number in dummies else slots[number] for number in numbers]
        except KeyError as error:
            raise UnknownSequence(f"request {error} is in a batch, but was never prepared") from error
