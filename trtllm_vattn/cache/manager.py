"""`KVCacheManager`: the cache whose addresses never change.

Reservations are made once; a slot's K and V lie at the same addresses for life, so tensors over them, and CUDA graphs
that baked those addresses in, stay valid while extents come and go beneath (vAttention, arXiv 2405.04437, with
extents of many sizes instead of one page at a time).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import ClassVar

import numpy as np
import torch

from trtllm_vattn.cache.base import CacheShape, CacheStats, FlatKV, PagedKV, SequenceId
from trtllm_vattn.cache.books import SlottedCache
from trtllm_vattn.errors import ConfigError, InvariantViolation, NoFreeSlot, OutOfPages
from trtllm_vattn.memory import remap
from trtllm_vattn.memory.arena import Arena
from trtllm_vattn.memory.layout import SlotLayout, default_layers_per_range
from trtllm_vattn.memory.pool import CLASSES, ExtentPool
from trtllm_vattn.vmm.base import Driver, Fence
from trtllm_vattn.vmm.tensors import copy_bytes, current_stream, strided, tensor_at

DEFAULT_LOOKAHEAD = 64
"""Tokens. On Llama-3-8B one page in each of four ranges a sequence in 64 steps."""


class KVCacheManager(SlottedCache):
    """A KV cache at fixed addresses over one device's virtual memory. Used from one stream, not thread-safe.

    Parameters
    ----------
    shape : CacheShape
    driver : Driver
        Whose memory; the cache closes nothing of it but what it made.
    budget : int or None
        Bytes of physical memory the cache may hold; None is what the dummy slot takes, which is enough to capture
        graphs over. `set_budget` changes it.
    layers_per_range : int or None
        Layers that share a token's row; more of them make a page hold fewer tokens. None is as many as make a row of
        32 KiB, 8 for Llama-3-8B.
    lookahead : int
        Tokens that `map_ahead` keeps mapped past a sequence's length; 0 maps each token in its own step.

    Raises
    ------
    ConfigError
        The budget is smaller than one granule a range, or a setting is out of its range.
    AddressSpaceExhausted, DriverError
        The driver refused; nothing is left behind.
    """

    extent_classes: ClassVar[int] = CLASSES
    one_by_one: ClassVar[bool] = False

    def __init__(
        self,
        shape: CacheShape,
        driver: Driver,
        budget: int | None = None,
        layers_per_range: int | None = None,
        lookahead: int = DEFAULT_LOOKAHEAD,
    ) -> None:
        super().__init__(shape, driver.device)
        if lookahead < 0:
            raise ConfigError(f"lookahead is {lookahead}; it must be 0 or more tokens")
        self.driver, self.lookahead = driver, lookahead
        self.layout = self._make_layout(layers_per_range)
        with ExitStack() as undo:
            pool = ExtentPool(driver, self.layout.least_bytes if budget is None else budget, self.extent_classes)
            undo.callback(pool.close)
            self.arena = Arena(pool, self.layout, self.one_by_one)
            undo.pop_all()
        self.frontiers = self.arena.frontiers
        self._admission_maps = self._critical_path_maps = self._ahead_maps = 0
        self._flat = [
            tensor_at(reservation.base, reservation.size, driver.device, owner=reservation)
            for reservation in self.arena.reservations
        ]
        self._layers = [self._view(layer) for layer in range(shape.num_layers)]

    def _make_layout(self, layers_per_range: int | None) -> SlotLayout:
        shape = self.shape
        if layers_per_range is None:
            layers_per_range = default_layers_per_range(shape.num_layers, shape.layer_token_bytes)
        return SlotLayout(
            num_layers=shape.num_layers,
            layers_per_range=layers_per_range,
            layer_token_bytes=shape.layer_token_bytes,
            max_seq_len=shape.max_seq_len,
            num_slots=shape.num_slots,
            granule=self.driver.granularity(),
        )

    def _view(self, layer: int) -> FlatKV | PagedKV:
        shape, itemsize = self.shape, self.shape.dtype.itemsize
        index, offset = self.layout.place_of(layer)
        size = (shape.num_slots + 1, shape.max_seq_len, shape.num_kv_heads, shape.head_dim)
        strides = (self.layout.slot_stride // itemsize, self.layout.row_bytes // itemsize, shape.head_dim, 1)
        half = shape.layer_token_bytes // shape.kv_factor
        k, v = (
            strided(self._flat[index], shape.dtype, size, strides, at)
            for at in (offset, offset + half * (shape.kv_factor - 1))
        )
        return FlatKV(k, v)

    # -- memory ----------------------------------------------------------------------------------------------------

    def _claim(self, tokens: int) -> int:
        slot, maps = self.arena.occupy(tokens, limit=self._limit())
        self._admission_maps += maps
        return slot

    def _limit(self) -> int:
        """Slots below this are worth taking: a lane is a slot, so that adopting one beyond the current bucket would
        replay a larger graph than is needed. Raises NoFreeSlot where none is."""
        self.arena.settle()
        if not self.arena.free_slots():
            self.arena.settle(wait=True)
        free = self.arena.free_slots()
        if not free:
            raise NoFreeSlot(
                f"no slot is usable: {self.shape.num_slots - len(self._slot_of)} are retired after a driver call "
                "failed in them; close the cache and build another"
            )
        return 1 << max([free[0], *self._owner]).bit_length()

    def _back(self, lengths: np.ndarray) -> None:
        short = np.flatnonzero(lengths > self.frontiers)
        self._critical_path_maps += self.arena.grow({slot: int(lengths[slot]) for slot in short.tolist()})

    def _vacate(self, slot: int) -> None:
        self.arena.park(slot, self._fence())

    def _fence(self) -> Fence:
        return self.driver.record(current_stream(self.device))

    def set_budget(self, budget: int) -> None:
        """Raise or lower the bytes of physical memory that the cache may hold, at any time; no address changes.

        Lowering it takes parked memory away, behind its fences. Raises ConfigError for less than the dummy slot takes,
        OutOfPages where running sequences have more: release or preempt some first. Nothing changed then.
        """
        self._check_open()
        self.arena.set_budget(budget)

    def move(self, sequence: SequenceId, slot: int) -> int:
        """Give a running sequence another, free slot by remapping; returns the mappings made.

        Nothing is copied and nothing waits: its memory is mapped at both addresses until work submitted so far is done.
        Raises UnknownSequence, ConfigError where the slot is not free, DriverError; nothing changed.
        """
        source = self.slot_of(sequence)
        moved = remap.move(self.arena, source, slot, self._fence)
        self._rehouse(sequence, slot)
        return moved

    def fork(self, sequence: SequenceId, new_sequence: SequenceId, tokens: int) -> int:
        """Begin a sequence with the first `tokens` of another one; returns its slot.

        Extents that hold nothing else are shared, what is left is copied on the current stream. A shared extent is not
        written by either: `truncate` into it gives the sequence a copy of its own first.

        Raises
        ------
        UnknownSequence, DuplicateSequence, ConfigError, NoFreeSlot, OutOfPages, DriverError
            Nothing changed.
        """
        source = self.slot_of(sequence)
        if tokens > self.lengths[source]:
            raise ConfigError(f"sequence {sequence!r} has {self.lengths[source]} tokens, not {tokens} to fork")
        self._check_new(new_sequence, tokens)
        limit = self._limit()
        free = [slot for slot in self.arena.free_slots() if slot < limit]
        target = min(free, key=lambda slot: (self.arena.slots[slot].mapped, slot))
        shared = remap.share(self.arena, source, tokens, tokens, target)
        rest = self.layout.touched_bytes(tokens) - shared
        for reservation in self.arena.reservations if rest else ():
            to, at = (reservation.base + slot * self.layout.slot_stride + shared for slot in (target, source))
            copy_bytes(self.driver.device, to, at, rest)
        self._house(new_sequence, target, tokens)
        return target

    def truncate(self, sequence: SequenceId, length: int) -> None:
        slot = self.slot_of(sequence)
        if 0 < length < self.lengths[slot]:
            self._own_from(slot, self.layout.whole_bytes(length))
        super().truncate(sequence, length)

    def _own_from(self, slot: int, start: int) -> None:
        """Copy on write: what a slot shares at or behind a byte of it becomes its own."""
        end = 0
        for index, column in enumerate(self.arena.slots[slot].columns):
            end += column[0].size
            if end > start and any(mapping.extent.serial in self.arena.places for mapping in column):
                self._replace(slot, index)
                return

    def replace(self, sequence: SequenceId) -> int:
        """Put other physical memory with the same bytes under a sequence; returns the mappings replaced.

        Waits for the device. Raises UnknownSequence, OutOfPages, DriverError; nothing changed.
        """
        return self._replace(self.slot_of(sequence), 0)

    def _replace(self, slot: int, first: int) -> int:
        def copy(to: int, source: int, nbytes: int) -> None:
            copy_bytes(self.driver.device, to, source, nbytes)

        return remap.replace(self.arena, slot, first, copy, self._fence)

    def map_ahead(self) -> int:
        """Keep running slots' frontiers up to `lookahead` tokens past their lengths; returns the mappings made.

        A slot is due when less than half the lookahead is left, and is filled up to the whole; the fewest steps left
        go first, and only as many at a time as let all be served before the first runs out, so that sequences of
        equal length do not all map in one step. Where memory is short nothing is mapped: the step that needs it asks.
        """
        self._check_open()
        self.arena.settle()
        wanted = np.minimum(self.lengths + self.lookahead, self.shape.max_seq_len)
        low_water = np.minimum(self.lengths + (self.lookahead + 1) // 2, self.shape.max_seq_len)
        due = np.flatnonzero(self._occupied & (self.frontiers < low_water))
        if not due.size:
            return 0
        most = max(1, -(-4 * len(self._slot_of) // max(1, self.lookahead)))
        nearest = due[np.argsort((self.frontiers - self.lengths)[due], kind="stable")][:most]
        try:
            made = self.arena.grow({slot: int(wanted[slot]) for slot in nearest.tolist()})
        except OutOfPages:
            return 0
        self._ahead_maps += made
        return made

    def _free(self) -> None:
        self.arena.close(self._fence())
        self._layers, self._flat = [], []

    # -- views and books -------------------------------------------------------------------------------------------

    def layer(self, layer: int) -> FlatKV | PagedKV:
        self._check_layer(layer)
        return self._layers[layer]

    def storages(self) -> list[torch.Tensor]:
        return list(self._flat)

    def stats(self) -> CacheStats:
        self._check_open()
        pool = self.arena.pool
        return CacheStats(
            sequences=len(self._slot_of),
            live_bytes=self.live_bytes,
            mapped_bytes=self.arena.running_bytes,
            parked_bytes=self.arena.parked_bytes,
            held_bytes=pool.held_bytes,
            budget_bytes=pool.budget,
            admission_maps=self._admission_maps,
            critical_path_maps=self._critical_path_maps,
            ahead_maps=self._ahead_maps,
            quarantined=len(self.arena.quarantine) + len(pool.quarantine),
        )

    def check_integrity(self) -> None:
        super().check_integrity()
        self.arena.check_integrity()
        free = self.arena.free_slots()
        for slot in range(self.shape.num_slots):
            if self._occupied[slot] and slot in free:
                raise InvariantViolation(f"slot {slot} of sequence {self._owner[slot]!r} is free in the arena")
