"""`KVCacheManager`: the cache whose addresses never change.

Reservations are made once; a slot's K and V lie at the same addresses for life, so tensors over them, and CUDA graphs
that baked those addresses in, stay valid while extents come and go beneath (vAttention, arXiv 2405.04437, with
extents of many sizes instead of one page at a time).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from trtllm_vattn.cache.base import CacheShape, CacheStats, FlatKV, PagedKV, SequenceId
from trtllm_vattn.cache.books import SlottedCache
from trtllm_vattn.errors import ConfigError, InvariantViolation, NoFreeSlot
from trtllm_vattn.memory import leftovers, remap
from trtllm_vattn.memory.ahead import BackgroundThread
from trtllm_vattn.memory.arena import Arena
from trtllm_vattn.memory.backing import Backing, Lease
from trtllm_vattn.memory.layout import SlotLayout, default_layers_per_range
from trtllm_vattn.memory.lookahead import Lookahead
from trtllm_vattn.memory.placement import Placement, placement
from trtllm_vattn.memory.pool import CLASSES, ExtentPool
from trtllm_vattn.memory.reclaim import reclaim, set_budget, surplus_bytes, take_surplus, trim
from trtllm_vattn.memory.stock import Stock
from trtllm_vattn.sizes import parse_bytes
from trtllm_vattn.values import finite, whole
from trtllm_vattn.vmm.base import Driver, Fence
from trtllm_vattn.vmm.tensors import copy_bytes, current_stream, on_stream, stream_of, strided, tensor_at
from trtllm_vattn.vmm.uninterrupted import uninterrupted

T = TypeVar("T")


class KVCacheManager(SlottedCache):
    """A KV cache at fixed addresses over one device's virtual memory. Used from one stream and one
    thread, beside its own that maps ahead.

    An interrupted call (KeyboardInterrupt) is done to its end all the same, or was not begun: what changes the cache is
    done where no signal comes (vmm/uninterrupted.py). A cache that is dropped without `close()` is closed, with a
    ResourceWarning, once nobody holds a tensor over its memory either.

    Parameters
    ----------
    shape : CacheShape
    driver : Driver
        Whose memory; the cache closes nothing of it but what it made.
    budget : int, str or None
        Bytes of physical memory the cache may hold, ``"40GiB"`` too; None is what the dummy slot takes, which is enough
        to capture graphs over. `set_budget` changes it.
    layers_per_range : int or None
        Layers that share a token's row; more of them make a page hold fewer tokens. None is as many as make a row of
        64 KiB, 16 for Llama-3-8B.
    lookahead : int or None
        Tokens that `map_ahead` keeps mapped past a sequence's length; 0 maps each token in its own step. None is as
        many as the measured times of steps and mappings ask for (memory/pace.py).
    idle_after_s : float or None
        With a thread of its own (`start_thread`), the cache gives memory back to the driver that no sequence has used
        for so long; None keeps it for the next sequence.
    idle_floor : int or str
        Bytes of idle memory that are kept all the same.

    Attributes
    ----------
    ahead : Lookahead
        What is mapped ahead, and how far.

    Raises
    ------
    ConfigError
        The budget is smaller than one granule a range, or a setting is out of its range.
    AddressSpaceExhausted, DriverError
        The driver refused; nothing is left behind.
    """

    remaps: ClassVar[bool] = True
    extent_classes: ClassVar[int] = CLASSES
    one_by_one: ClassVar[bool] = False

    def __init__(
        self,
        shape: CacheShape,
        driver: Driver,
        budget: int | str | None = None,
        layers_per_range: int | None = None,
        lookahead: int | None = None,
        idle_after_s: float | None = None,
        idle_floor: int | str = 0,
    ) -> None:
        super().__init__(shape, driver.device)
        budget = None if budget is None else parse_bytes(budget, "the budget")
        lookahead = None if lookahead is None else whole("lookahead", lookahead, 0)
        if idle_after_s is not None and finite("idle_after_s", idle_after_s) <= 0:
            raise ConfigError(f"idle_after_s is {idle_after_s}; it is a positive number of seconds, or None")
        idle_floor = parse_bytes(idle_floor, "idle_floor")
        self.driver = driver
        self.idle_after_s, self.idle_floor = idle_after_s, idle_floor
        self.layout = self._make_layout(layers_per_range)
        uninterrupted(self._build, budget, lookahead)
        self._backing.is_owned = True

    def _build(self, budget: int | None, lookahead: int | None) -> None:
        leftovers.retry()
        pool = ExtentPool(self.driver, self.layout.least_bytes if budget is None else budget, self.extent_classes)
        self.arena = Arena(pool, self.layout, self.one_by_one)
        self.frontiers = self.arena.frontiers
        self.ahead = Lookahead(self.arena, self.lengths, lookahead)
        self._backing = Backing(self.arena, self.ahead, self.idle_after_s, self.idle_floor)
        self._gate = self._backing.gate
        self._stock = Stock(self.arena.pool, self.layout)
        self._admission_maps = self._critical_path_maps = self._told = 0
        self._lease = Lease(self._backing)
        try:
            self._flat = [
                tensor_at(reservation.base, reservation.size, self.driver.device, owner=self._lease)
                for reservation in self.arena.reservations
            ]
            self._layers = [self._view(layer) for layer in range(self.shape.num_layers)]
        except BaseException:
            self._backing.discard()
            raise

    def _make_layout(self, layers_per_range: int | None) -> SlotLayout:
        return SlotLayout(**self._sizes(layers_per_range))

    def _sizes(self, layers_per_range: int | None) -> dict[str, int]:
        """What every layout of this cache is made of."""
        shape = self.shape
        if layers_per_range is None:
            layers_per_range = default_layers_per_range(shape.num_layers, shape.layer_token_bytes)
        return {
            "num_layers": shape.num_layers,
            "layers_per_range": layers_per_range,
            "layer_token_bytes": shape.layer_token_bytes,
            "max_seq_len": shape.max_seq_len,
            "num_slots": shape.num_slots,
            "granule": self.driver.granularity(),
        }

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

    # -- calls -----------------------------------------------------------------------------------------------------

    def _run(self, call: Callable[..., T], *arguments: Any) -> T:
        # Attention is left where the call raised or was interrupted; it costs the next call a moment.
        self._attention = True
        answer = self._apart(call, *arguments)
        self._attention = False
        return answer

    def _apart(self, call: Callable[..., T], *arguments: Any) -> T:
        answer: T = uninterrupted(on_stream, stream_of(self.device), call, *arguments)
        return answer

    @property
    def _thread(self) -> BackgroundThread | None:
        return self._backing.thread

    # -- memory ----------------------------------------------------------------------------------------------------

    def bytes_of(self, tokens: int) -> int:
        return self.layout.bytes_for(tokens) * self.layout.num_ranges

    @property
    def bytes_for_sequences(self) -> int:
        """Of the budget, without what the dummy slot takes and what could not be given back to the driver."""
        pool = self.arena.pool
        lost = sum(extent.size for extent in pool.quarantine)
        return max(0, pool.budget - self.layout.least_bytes - lost)

    @property
    def longest_alone(self) -> int:
        layout = self.layout
        pages = self.bytes_for_sequences // (layout.num_ranges * layout.granule)
        return layout.tokens_in(pages * layout.granule)

    def _claim(self, tokens: int) -> int:
        with self._gate:
            limit = self._limit()
            need = self.layout.bytes_for(tokens) * self.layout.num_ranges
            # Those that run keep what their next steps need.
            self._make_room(need, self.ahead.past(self.ahead.tokens))
            slot, maps = self.arena.occupy(tokens, limit, self.ahead.tokens)
            self._admission_maps += maps
        self._wake()
        return slot

    def _make_room(self, size: int, needed: np.ndarray) -> None:
        """Where memory is short of `size` bytes, take what running slots have beyond the tokens needed, if that is
        enough; waits for the device then."""
        pool = self.arena.pool
        if size > pool.available_bytes:
            self.arena.settle(wait=True)
            short = size - pool.available_bytes - self.arena.parked_bytes
            if short > 0:
                take_surplus(self.arena, short, needed.tolist(), self._fence())

    def _limit(self) -> int:
        """Slots below this are worth taking: a lane is a slot, so that adopting one beyond the current bucket would
        replay a larger graph than is needed. Raises NoFreeSlot where none is."""
        self.arena.settle()
        first = self.arena.first_free()
        if first is None:
            self.arena.settle(wait=True)
            first = self.arena.first_free()
        if first is None:
            raise NoFreeSlot(
                f"no slot is usable: {self.shape.num_slots - len(self._slot_of)} are retired after a driver call "
                "failed in them; close the cache and build another"
            )
        return 1 << max([first, *self._owner]).bit_length()

    def _back(self, lengths: np.ndarray) -> None:
        with self._gate:
            wants = {slot: int(lengths[slot]) for slot in np.flatnonzero(lengths > self.frontiers).tolist()}
            more = (self.layout.bytes_for(wanted) - self.arena.slots[slot].mapped for slot, wanted in wants.items())
            self._make_room(sum(more) * self.layout.num_ranges, np.maximum(self.lengths, lengths))
            self._critical_path_maps += self.arena.grow(wants)

    def _vacate(self, slot: int) -> None:
        with self._gate:
            self.arena.park(slot, self._fence())

    def _clear(self) -> None:
        with self._gate:
            self.arena.clear(self._fence())

    def _fence(self) -> Fence:
        return self.driver.record(current_stream(self.device))

    def set_budget(self, budget: int | str) -> None:
        """Raise or lower the bytes (``"40GiB"`` too) of physical memory that the cache may hold, at any time; no
        address changes.

        Lowering it takes parked memory away, behind its fences. Raises ConfigError for less than the dummy slot takes,
        OutOfPages where running sequences have more: release or preempt some first. Nothing changed then.
        """
        self._check_open()
        self._run(self._set_budget, parse_bytes(budget, "the budget"))

    def _set_budget(self, budget: int) -> None:
        with self._gate:
            pool = self.arena.pool
            used = pool.held_bytes - pool.stock_bytes - self.arena.parked_bytes
            if budget < used:
                self.arena.settle(wait=True)
                take_surplus(self.arena, used - budget, self.lengths.tolist(), self._fence())
            set_budget(self.arena, budget)

    def stock_up(self, sequences: int, tokens: int) -> None:
        """Keep enough memory created ahead for a burst of so many prompts of so many tokens, within the budget.

        The thread creates it (`start_thread`), and again when less than half is left; without one it is created now,
        once. Raises ConfigError, DriverError.
        """
        self._check_open()
        self._run(self._stock_up, sequences, tokens)

    def _stock_up(self, sequences: int, tokens: int) -> None:
        with self._gate:
            self._stock.announce(sequences, tokens)
            while self._thread is None and self.arena.pool.restock():
                pass
        self._wake()

    def stock_for(self, prompts: Sequence[int]) -> None:
        """Have the thread keep memory created ahead for prompts of these tokens, which will come in this order: for
        those that no parked slot is there for, as far as the budget goes. Waits for nothing; needs `start_thread`."""
        self._check_open()
        if self._thread is not None:
            fitting = self._stock.fitting(prompts[self.arena.parked_slots :])
            if fitting != self._stock.expected:
                self._run(self._stock.expect, fitting)
                self._wake()

    def release_free_memory(self, size: int | None = None) -> int:
        self._check_open()
        return self._run(self._release_free_memory, size)

    def _release_free_memory(self, size: int | None) -> int:
        with self._gate:
            pool = self.arena.pool
            if size is not None:
                return reclaim(self.arena, size)
            held = pool.held_bytes
            reclaim(self.arena, self.arena.parked_bytes)
            while pool.shrink():
                pass
            return held - pool.held_bytes

    def free_slots(self) -> list[int]:
        self._check_open()
        return self._run(self._free_slots)

    def _free_slots(self) -> list[int]:
        with self._gate:
            return self.arena.free_slots()

    def move(self, sequence: SequenceId, slot: int) -> int:
        """Give a running sequence another, free slot by remapping; returns the mappings made.

        Nothing is copied and nothing waits: its memory is mapped at both addresses until work submitted so far is done.
        Raises UnknownSequence, ConfigError where the slot is not free, DriverError; nothing changed.
        """
        return self._run(self._move, sequence, self.slot_of(sequence), slot)

    def _move(self, sequence: SequenceId, source: int, slot: int) -> int:
        with self._gate:
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
        return self._run(self._fork, source, new_sequence, tokens)

    def _fork(self, source: int, new_sequence: SequenceId, tokens: int) -> int:
        with self._gate:
            limit = self._limit()
            target = min(self.arena.free_slots(limit), key=lambda slot: (self.arena.slots[slot].mapped, slot))
            shared = remap.share(self.arena, source, tokens, tokens, target)
            rest = self.layout.touched_bytes(tokens) - shared
            try:
                for reservation in self.arena.reservations if rest else ():
                    to, at = (reservation.base + slot * self.layout.slot_stride + shared for slot in (target, source))
                    copy_bytes(self.driver.device, to, at, rest)
            except BaseException:
                self.arena.park(target, self._fence())
                raise
            self._house(new_sequence, target, tokens)
        return target

    def truncate(self, sequence: SequenceId, length: int) -> None:
        slot = self.slot_of(sequence)
        if 0 < length < self.lengths[slot] and self.arena.places:
            self._run(self._own_from, slot, self.layout.whole_bytes(length))
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
        return self._run(self._replace, self.slot_of(sequence), 0)

    def _replace(self, slot: int, first: int) -> int:
        def copy(to: int, source: int, nbytes: int) -> None:
            copy_bytes(self.driver.device, to, source, nbytes)

        with self._gate:
            return remap.replace(self.arena, slot, first, copy, self._fence)

    # -- ahead -----------------------------------------------------------------------------------------------------

    def start_thread(self) -> None:
        """Have a thread map ahead from now on, so that `map_ahead` has no more to do than wake it when something is
        due. Idempotent; `close` ends it."""
        self._check_open()
        self._run(self._backing.start_thread)

    def map_ahead(self) -> int:
        """Keep running slots' frontiers up to the lookahead past their lengths; returns the mappings made.

        Where memory is short nothing is mapped: the step that needs it asks. With a thread, the mappings are those
        since the last call, and an error that it met is raised here.
        """
        self._check_open()
        self.ahead.pace.observe_lengths(self.lengths)
        if self._thread is None:
            if not self.arena.is_leaving and not self.ahead.due(self.ahead.at_once()).size:
                return 0
            return self._run(self._map_due)
        self._thread.raise_error()
        if self.arena.is_leaving or self.ahead.due().size:
            self._wake()
        made, self._told = self.ahead.maps - self._told, self.ahead.maps
        return made

    def _wake(self) -> None:
        if self._thread is not None:
            self._thread.wake()

    def _map_due(self) -> int:
        with self._gate:
            self.arena.settle()
            made = self.ahead.map_due(self.ahead.at_once())
            if not made:
                trim(self.arena, self.ahead.at_once())
            return made

    def work_ahead(self) -> bool:
        """Do one unit of the background thread's work in this call, and return whether there may be more; for caches
        without a thread. Raises DriverError."""
        self._check_open()
        return self._run(self._work_ahead)

    def _work_ahead(self) -> bool:
        return self._backing.work()

    def wait_ahead(self, timeout_s: float = 10.0) -> bool:
        """Whether the thread has nothing left to do, within so many seconds; at once without one."""
        return self._thread is None or self._thread.wait_idle(timeout_s)

    def _free(self) -> None:
        self._apart(self._close_backing)

    def _close_backing(self) -> None:
        try:
            self._backing.close(self._fence())
        finally:
            if self._backing.is_closed:
                self._layers, self._flat = [], []

    # -- views and books -------------------------------------------------------------------------------------------

    def layer(self, layer: int) -> FlatKV | PagedKV:
        self._check_layer(layer)
        return self._layers[layer]

    def storages(self) -> list[torch.Tensor]:
        return list(self._flat)

    def stats(self) -> CacheStats:
        self._check_open()
        return self._run(self._stats)

    def _stats(self) -> CacheStats:
        with self._gate:
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
                ahead_maps=self.ahead.maps,
                quarantined=len(self.arena.quarantine) + len(pool.quarantine),
                live_mappings=self.arena.live_mappings,
                device_mappings=self.driver.mappings.alive,
                max_mappings=self.driver.max_mappings,
                surplus_bytes=surplus_bytes(self.arena, self.ahead.past(self.ahead.tokens).tolist()),
                lookahead=self.ahead.tokens,
                ahead_wait_s=self._gate.waited_s,
            )

    def placement(self) -> Placement:
        """How nearly slots' memory lies in the order of its creation."""
        self._check_open()
        return self._run(self._placement)

    def _placement(self) -> Placement:
        with self._gate:
            return placement(self.arena)

    def _is_cut(self, slot: int) -> bool:
        return self.arena.slots[slot].broken

    def _check_integrity(self) -> None:
        with self._gate:
            super()._check_integrity()
            self.arena.check_integrity()
            free = set(self.arena.free_slots())
            for slot in range(self.shape.num_slots):
                if self._occupied[slot] and slot in free:
                    raise InvariantViolation(f"slot {slot} of sequence {self._owner[slot]!r} is free in the arena")
