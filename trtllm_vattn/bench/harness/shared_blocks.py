"""Block tables that share what prompts begin with: what a prefix cache at fixed addresses is compared with.

As vLLM's automatic prefix caching: each whole block has a number by its tokens and those before it; a prompt's table
begins with the blocks of its numbers, counted references; what nobody refers to is kept, and goes, the least recently
used first, the end of a sequence before its beginning, where blocks are short.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import numpy as np
import torch

from trtllm_vattn.bench.harness.ideal_tree import block_numbers
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.paged import PagedCache
from trtllm_vattn.errors import InvariantViolation
from trtllm_vattn.runtime.request import RequestState
from trtllm_vattn.runtime.reuse import Left, RequestSlots


class SharedBlocks(PagedCache):
    """A `PagedCache` whose blocks may be in several tables; parameters as its own."""

    def __init__(
        self, shape: CacheShape, device: torch.device | str, block_size: int = 16, num_blocks: int | None = None
    ) -> None:
        self._begins_with: list[int] = []
        super().__init__(shape, device, block_size, num_blocks)

    def admit_with_prefix(self, sequence: Hashable, tokens: np.ndarray) -> tuple[int, int]:
        """Admit a sequence of these tokens; returns its slot, and how many of them are there. One at least is not."""
        whole = (len(tokens) - 1) // self.block_size
        self._begins_with = []
        for number in self._numbers_of(tokens[: whole * self.block_size]):
            if number not in self._block_of:
                break
            self._begins_with.append(self._block_of[number])
        cached = len(self._begins_with) * self.block_size
        try:
            return self.admit(sequence, len(tokens)), cached
        finally:
            self._begins_with = []

    def keep(self, sequence: Hashable, tokens: np.ndarray) -> None:
        """These tokens of a sequence are computed: others may begin with them from now on."""
        row = self._rows[self.slot_of(sequence)]
        whole = len(tokens) // self.block_size
        for block, number in zip(row[:whole].tolist(), self._numbers_of(tokens), strict=False):
            if number not in self._block_of and block not in self._number_in:
                self._block_of[number], self._number_in[block] = block, number

    def forget_kept(self) -> None:
        """Forget what nobody refers to."""
        while self._kept:
            self._evict()

    def _numbers_of(self, tokens: np.ndarray) -> list[int]:
        """A number for each whole block, by its tokens and those before it."""
        return block_numbers(self._numbers, tokens, self.block_size)

    def _allocate(self, tokens: int) -> int:
        slot, shared = self._lowest_free(), self._begins_with
        for block in shared:
            self._refs[block] += 1
            self._kept.pop(block, None)
        self._rows[slot, : len(shared)] = shared
        self._held[slot] = len(shared)
        lengths = np.zeros_like(self.lengths)
        lengths[slot] = tokens
        try:
            self._grow(lengths)
        except BaseException:
            self._release(slot)
            raise
        return slot

    def _grow(self, lengths: np.ndarray) -> None:
        missing = int(np.maximum(-(-lengths // self.block_size) - self._held, 0).sum())
        while len(self._free_blocks) < missing and self._kept:
            self._evict()
        before = self._held.copy()
        super()._grow(lengths)
        for slot in np.flatnonzero(self._held > before).tolist():
            self._refs[self._rows[slot, before[slot] : self._held[slot]]] = 1

    def _evict(self) -> None:
        block, _ = self._kept.popitem(last=False)
        del self._block_of[self._number_in.pop(block)]
        self._free_blocks.append(block)

    def _release(self, slot: int) -> None:
        for block in reversed(self._rows[slot, : self._held[slot]].tolist()):
            self._refs[block] -= 1
            if self._refs[block] > 0:
                continue
            if block in self._number_in:
                self._kept[block] = None
            else:
                self._free_blocks.append(block)
        self._held[slot] = 0
        # Nothing is left that would be given back.
        super()._release(slot)

    def _clear(self) -> None:
        self._refs = np.zeros(self.num_blocks + 1, np.int64)
        self._numbers: dict[tuple[int, bytes], int] = {}
        self._block_of: dict[int, int] = {}
        self._number_in: dict[int, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()
        super()._clear()

    def _do_check_integrity(self) -> None:
        used = {int(block) for slot, held in enumerate(self._held) for block in self._rows[slot, :held]}
        counted = np.zeros_like(self._refs)
        for slot, held in enumerate(self._held):
            np.add.at(counted, self._rows[slot, :held], 1)
        if sorted([*used, *self._kept, *self._free_blocks]) != list(range(1, self.num_blocks + 1)):
            raise InvariantViolation(
                f"{len(used)} blocks in tables, {len(self._kept)} kept and {len(self._free_blocks)} free do not make "
                f"up the {self.num_blocks} there are"
            )
        if (counted != self._refs).any():
            raise InvariantViolation(f"blocks {np.flatnonzero(counted != self._refs).tolist()} are counted wrongly")


class BlockSlots(RequestSlots):
    """Has an engine's requests begin with the blocks of a `SharedBlocks`; put in place of `Engine.slots` and
    `Scheduler.slots`.

    Attributes
    ----------
    cached_tokens, prompt_tokens : int
        Of all requests: tokens that were there, and all.
    """

    def __init__(self, cache: SharedBlocks) -> None:
        super().__init__(cache, None)
        self._blocks = cache
        self.cached_tokens = self.prompt_tokens = 0

    def admit(self, request: RequestState) -> None:
        tokens = np.array(request.tokens, np.int64)
        request.slot, cached = self._blocks.admit_with_prefix(request.id, tokens)
        request.prefilled, request.known = cached, len(request.chosen)
        if request.cached_tokens is None:
            request.cached_tokens = min(cached, len(request.prompt))
            self.cached_tokens += request.cached_tokens
            self.prompt_tokens += len(request.prompt)

    def computed(self, request: RequestState) -> None:
        self._blocks.keep(request.id, request.stored)

    def leaving(self, request: RequestState) -> Left:
        keep = request.is_verified and request.finish_reason != "error"
        return Left(request.id, request.stored if keep else None)

    def release(self, left: Left) -> None:
        if left.tokens is not None:
            self._blocks.keep(left.request, left.tokens)
        super().release(left)

    def flush(self) -> int:
        self._blocks.forget_kept()
        return 0
