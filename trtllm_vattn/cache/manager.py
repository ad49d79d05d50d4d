"""`KVCacheManager`: the cache whose addresses never change.

Reservations are made once, and a slot's K and V keep their addresses for life. So tensors over them, and the addresses
in captured CUDA graphs, stay valid while extents are mapped and unmapped beneath (vAttention, arXiv 2405.04437, with
extents of many sizes instead of one page at a time).
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch

from trtllm_vattn.cache.base import (
    CacheShape,
    CacheStats,
    ExtentPlace,
    FlatKV,
    PagedKV,
    RetainedSlot,
    SequenceId,
    SlotStats,
    Tokens,
    Transfers,
)
from trtllm_vattn.cache.config import CacheConfig, Layout
from trtllm_vattn.cache.host_tier import CopyStream, HostTier
from trtllm_vattn.cache.slotted import SlottedCache
from trtllm_vattn.errors import (
    CacheAsleep,
    ConfigError,
    DuplicateSequence,
    InvariantViolation,
    KVCacheOutOfMemory,
    MemoryQuarantined,
    NoFreeSlot,
    PrefixEvicted,
    SequenceSuspended,
    UnknownSequence,
)
from trtllm_vattn.memory import remap
from trtllm_vattn.memory.arena import Arena, Placement, retry_discarded
from trtllm_vattn.memory.layout import SlotLayout, default_layers_per_range
from trtllm_vattn.memory.lifetime import CacheMemory, MemoryRef
from trtllm_vattn.memory.lookahead import BackgroundThread, Lookahead
from trtllm_vattn.memory.pool import ExtentPool, Preallocation
from trtllm_vattn.memory.reclaim import drop_surplus, set_budget, surplus_bytes, take_surplus, trim
from trtllm_vattn.memory.slot import RUNNING, SlotState
from trtllm_vattn.sizes import parse_bytes
from trtllm_vattn.tenancy.borrowing import Borrowing, Keeper, Lender
from trtllm_vattn.trace import Trace
from trtllm_vattn.vmm.base import Driver, Fence
from trtllm_vattn.vmm.owners import Extent
from trtllm_vattn.vmm.regions import RESERVATION, STATIC, Region, tensor_regions
from trtllm_vattn.vmm.tensors import (
    SideStream,
    copy_bytes,
    current_stream,
    on_stream,
    stream_of,
    strided,
    tensor_at,
    upload,
)
from trtllm_vattn.vmm.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from trtllm_vattn.tenancy.journal import KeptSlot, State
    from trtllm_vattn.tenancy.placements import Placements

T = TypeVar("T")


class AllFences(Fence):
    """Several fences as one: done when each of them is."""

    def __init__(self, fences: Iterable[Fence]) -> None:
        self._fences = list(fences)

    def done(self) -> bool:
        return all(fence.done() for fence in self._fences)

    def wait(self) -> None:
        for fence in self._fences:
            fence.wait()


def _bits(rows: torch.Tensor) -> torch.Tensor:
    """The same memory in a dtype that every kernel of torch takes."""
    return rows.view(torch.uint8) if rows.dtype.itemsize == 1 else rows


def _gathered(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """A copy ``[tokens, heads, head_dim]`` of the rows ``[max_seq_len, heads, head_dim]`` that each head has at
    `places`, int64 ``[heads, tokens]``."""
    return _bits(rows).gather(0, places.t()[..., None].expand(-1, -1, rows.shape[-1]))


class KVCacheManager(SlottedCache):
    """A KV cache at fixed addresses over one device's virtual memory. Used from one stream and one thread; a thread of
    its own may map ahead beside it.

    A call that is interrupted (KeyboardInterrupt) is still done to its end, or was not begun: signals do not reach what
    changes the cache (vmm/uninterrupted.py). A cache that is dropped without `close()` is closed, with a
    ResourceWarning, once nobody holds a tensor over its memory either.

    Parameters
    ----------
    shape : CacheShape
    driver : Driver
        Whose memory; the cache closes nothing of it but what it made.
    budget : int, str or None
        Bytes of physical memory the cache may hold, ``"40GiB"`` too; None is what the dummy slot takes, which is enough
        to capture graphs over. `set_budget` changes it.
    layers_per_range, lookahead, idle_after_s, idle_floor
        As `CacheConfig` has them; what is given here takes the place of what `config` says.
    config : CacheConfig or None
        Everything else; None is `CacheConfig()`.

    Attributes
    ----------
    ahead : Lookahead
        What is mapped ahead, and how far.

    Raises
    ------
    ConfigError
        The budget is smaller than the driver's granularity in each range, or a setting is out of its range.
    AddressSpaceExhausted, DriverError
        The driver refused; nothing is left behind.
    """

    remaps: ClassVar[bool] = True
    layouts: ClassVar[tuple[Layout, ...]] = (Layout.ROWS, Layout.TENSORS)

    def __init__(
        self,
        shape: CacheShape,
        driver: Driver,
        budget: int | str | None = None,
        layers_per_range: int | None = None,
        lookahead: int | None = None,
        idle_after_s: float | None = None,
        idle_floor: int | str | None = None,
        *,
        config: CacheConfig | None = None,
    ) -> None:
        super().__init__(shape, driver.device)
        budget = None if budget is None else parse_bytes(budget, "the budget")
        config = config or CacheConfig(layout=self.layouts[0])
        settings = {
            "layers_per_range": layers_per_range,
            "lookahead": lookahead,
            "idle_after_s": idle_after_s,
            "idle_floor": idle_floor,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        self.config = dataclasses.replace(config, **given)  # type: ignore[arg-type]
        if self.config.layout not in self.layouts:
            raise ConfigError(f"{type(self).__name__} has no layout {self.config.layout.value!r}")
        self.driver = driver
        self.layout = self._make_layout()
        uninterrupted(self._build, budget)
        self._memory.is_owned = True

    def _build(self, budget: int | None) -> None:
        retry_discarded()
        config = self.config
        pool = ExtentPool(self.driver, self.layout.least_bytes if budget is None else budget, config.extent_classes)
        self.arena = Arena(pool, self.layout, one_by_one=not config.batch_access, own_lengths=config.own_lengths)
        self.frontiers = self.arena.frontiers
        self.ahead = Lookahead(self.arena, self.lengths, config.lookahead, config.step_timing)
        idle_floor, host_memory = parse_bytes(config.idle_floor), parse_bytes(config.host_memory)
        self._memory = CacheMemory(self.arena, self.ahead, config.idle_after_s, idle_floor, host_memory)
        self._tier = HostTier(self.arena, self._memory.host)
        self._copies: SideStream | None = None
        """Of copies between the device and host memory; made with the first one."""
        self._arriving: dict[SequenceId, Fence] = {}
        """Sequences whose tokens are on their way back, and when they are there."""
        self._asleep: dict[SequenceId, tuple[int, int]] = {}
        """Slot and length of each sequence that runs again when the cache wakes."""
        self._borrowing: Borrowing | None = None
        self._placements: Placements | None = None
        """What of that is in a broker's journal; None without one."""
        self._placed_anew: set[SequenceId] = set()
        """Sequences that came to a slot since that was noted in the journal."""
        self._noted_frontiers = np.zeros(self.shape.num_slots, np.int64)
        """Tokens of each slot's sequence that have memory by the journal."""
        self._lock = self._memory.lock
        self._preallocation = Preallocation(pool, self.layout)
        self._admission_maps = self._critical_path_maps = self._reported_maps = 0
        self._memory_ref = MemoryRef(self._memory)
        try:
            self._flat = [
                tensor_at(reservation.base, reservation.size, self.driver.device, owner=self._memory_ref)
                for reservation in self.arena.reservations
            ]
            parts = range(self.layout.head_groups)
            self._layers = [tuple(self._view(layer, part) for part in parts) for layer in range(self.shape.num_layers)]
            size = (self.num_groups, self.shape.num_slots + 1)
            self._deficits = torch.zeros(size, dtype=torch.int32, device=self.device) if config.own_lengths else None
        except BaseException:
            self._memory.discard()
            raise

    def _make_layout(self) -> SlotLayout:
        return SlotLayout(**self._layout_sizes())

    def _layout_sizes(self) -> dict[str, Any]:
        shape, layers, tensors = self.shape, self.config.layers_per_range, 1
        heads = self.config.heads_per_range or shape.num_kv_heads
        if shape.num_kv_heads % heads:
            raise ConfigError(f"heads_per_range is {heads}; it must divide the {shape.num_kv_heads} KV heads")
        parts = shape.num_kv_heads // heads
        if self.config.layout is Layout.TENSORS:
            layers, tensors = 1, shape.kv_factor
        elif layers is None:
            layers = default_layers_per_range(shape.num_layers, shape.layer_token_bytes // parts, shape.windows)
        return {
            "num_layers": shape.num_layers * tensors,
            "layers_per_range": layers,
            "layer_token_bytes": shape.layer_token_bytes // tensors // parts,
            "head_groups": parts,
            "max_seq_len": shape.max_seq_len,
            "num_slots": shape.num_slots,
            "granularity": self.driver.granularity(),
            "windows": self._served_windows(),
        }

    def _served_windows(self) -> tuple[int | None, ...]:
        """The shape's windows. Raises ConfigError where the configuration keeps no windows."""
        config, windows = self.config, self.shape.windows
        if windows and config.layout is not Layout.ROWS:
            raise ConfigError(
                f"a cache of layout {config.layout.value!r} keeps all tokens of all layers; make one of rows for "
                f"windows of {sorted({each for each in windows if each})} tokens"
            )
        if windows and config.own_lengths:
            raise ConfigError("layers with windows have no other lengths of their own; leave own_lengths out")
        return windows

    def _view(self, layer: int, part: int) -> FlatKV | PagedKV:
        shape, layout, itemsize = self.shape, self.layout, self.shape.dtype.itemsize
        heads = shape.num_kv_heads // layout.head_groups
        size = (shape.num_slots + 1, shape.window_of(layer) or shape.max_seq_len, heads, shape.head_dim)
        strides = (layout.slot_stride // itemsize, layout.row_bytes // itemsize, shape.head_dim, 1)
        half = heads * shape.head_dim * itemsize
        if self.config.layout is Layout.TENSORS:
            first = layer * shape.kv_factor
            places = [layout.place_of(first), layout.place_of(first + shape.kv_factor - 1)]
        else:
            index, offset = layout.place_of(layer, part)
            places = [(index, offset), (index, offset + half * (shape.kv_factor - 1))]
        k, v = (strided(self._flat[index], shape.dtype, size, strides, offset) for index, offset in places)
        return FlatKV(k, v)

    # -- calls -----------------------------------------------------------------------------------------------------

    def _run(self, call: Callable[..., T], *arguments: Any) -> T:
        # It stays set where the call raised or was interrupted: the next call looks then.
        self._needs_check = True
        with self._noted(call):
            answer = self._uninterrupted(call, *arguments)
        self._needs_check = self.is_asleep or not self.arena.has_dummy
        return answer

    def _check_state(self, recovering: bool = False) -> None:
        super()._check_state(recovering)
        if self.is_asleep:
            self._needs_check = True
            if not recovering:
                raise CacheAsleep("this cache gave its memory back by sleep(); call wake() first")
        elif not (self.arena.has_dummy or recovering):
            # A sleep that failed could not leave it where it was.
            self._needs_check = True
            self._uninterrupted(self._do_mend_dummy)
            self._needs_check = False

    def _do_mend_dummy(self) -> None:
        with self._lock:
            self.arena.mend_dummy()

    def _uninterrupted(self, call: Callable[..., T], *arguments: Any) -> T:
        answer: T = uninterrupted(on_stream, stream_of(self.device), call, *arguments)
        return answer

    def at_once(self, call: Callable[..., T], *arguments: Any) -> T:
        return self._uninterrupted(call, *arguments)

    @property
    def _thread(self) -> BackgroundThread | None:
        return self._memory.thread

    # -- memory ----------------------------------------------------------------------------------------------------

    @property
    def lower_edges(self) -> np.ndarray | None:
        return self.arena.lower_edges

    @property
    def retained_frontiers(self) -> np.ndarray | None:
        return self.arena.retained_frontiers

    @property
    def segments(self) -> np.ndarray | None:
        return self.arena.segments

    @property
    def write_floors(self) -> np.ndarray | None:
        return self.arena.write_floors

    @property
    def num_groups(self) -> int:
        return len(self.arena.slots[self.dummy_slot].groups) if self.config.own_lengths else 1

    def lengths_of(self, group: int) -> np.ndarray:
        if self._deficits is None:
            return self.lengths
        deficits = [slot.groups[group].deficit for slot in self.arena.slots[: self.dummy_slot]]
        lengths: np.ndarray = np.maximum(self.lengths - deficits, 0)
        return lengths

    @property
    def length_deficits(self) -> torch.Tensor | None:
        """int32 ``[num_groups, num_slots + 1]`` on the device, at one address for life: how many tokens fewer than
        `lengths` each group holds of each slot's sequence. It changes when a length is set, and in no step, so a
        captured kernel that has a sequence's length has each group's. None where ranges have no lengths of their own.
        """
        return self._deficits

    def bytes_of(self, tokens: int) -> int:
        return self.layout.total_bytes(tokens)

    @property
    def budget_bytes(self) -> int:
        return self.arena.pool.budget

    @property
    def held_bytes(self) -> int:
        return self.arena.pool.held_bytes

    @property
    def bytes_for_sequences(self) -> int:
        """Of the budget, or of what a broker may lend, without what the dummy slot takes and what could not be unmapped
        or given back to the driver."""
        budget = self.arena.pool.budget
        if self._borrowing is not None:
            budget = max(budget, self._borrowing.most)
        return max(0, budget - self.layout.least_bytes - self.arena.quarantined_bytes)

    @property
    def longest_alone(self) -> int:
        there, layout = self.bytes_for_sequences, self.layout
        if not layout.windows:
            return layout.tokens_in(there // (layout.num_ranges * layout.granularity) * layout.granularity)
        return bisect_right(range(1, layout.max_seq_len + 1), there, key=layout.total_bytes)

    def _allocate(self, tokens: int) -> int:
        with self._lock:
            exact = self.config.exact_admission
            need = self.layout.total_bytes(tokens)
            if self._borrowing is not None:
                self._borrowing.check_room(need)
            limit = self._limit(need)
            # Those that run keep what their next steps need, unless this sequence was promised its memory.
            self._make_room(need, 0 if exact else self.ahead.tokens)
            slot, maps = self.arena.allocate_slot(tokens, limit, self.ahead.tokens, exact)
            self._admission_maps += maps
        self._wake_for_memory()
        return slot

    def _wake_for_memory(self) -> None:
        """After an admission: wake the thread where extents are to be created or unmapped. It maps ahead once it is
        asked to (`map_ahead`), not between the prompts of a burst."""
        if self.arena.has_pending_work or self.arena.pool.next_to_create() is not None:
            self._wake()

    def _make_room(self, size: int, ahead: int = 0, lengths: np.ndarray | None = None) -> None:
        """Where memory is short of `size` bytes, take what running slots have more than `ahead` tokens beyond their
        lengths, which are at least `lengths`, if that is enough; waits for the device then."""
        pool = self.arena.pool
        if size > pool.available_bytes:
            self.arena.complete_pending_unmaps(wait=True)
            short = size - pool.available_bytes - self.arena.parked_bytes
            if short > 0 and (short := short - self.arena.evictable_bytes) > 0:
                needed = self.ahead.past(ahead) if lengths is None else np.maximum(self.lengths, lengths)
                take_surplus(self.arena, short, needed.tolist(), self._fence())

    def _limit(self, need: int) -> int:
        """Slots below this are worth taking: a lane is a slot, so that adopting one beyond the current bucket would
        replay a larger graph than is needed. Raises NoFreeSlot where none is, KVCacheOutOfMemory where one would have
        to be evicted, and there still were no memory for so many bytes."""
        self.arena.complete_pending_unmaps()
        first = self.arena.first_free()
        while first is None:
            self.arena.complete_pending_unmaps(wait=True)
            first = self.arena.first_free()
            if first is None:
                self._check_worth_evicting(need)
                if not self.arena.evict_slot():
                    break
        if first is None:
            retained = self.arena.retained_slots
            raise NoFreeSlot(
                f"no slot is usable: {len(self._tier.sequences)} are kept for suspended sequences, {retained} for "
                "tokens that are pinned, have an infinite priority or are read by others, and "
                f"{len(self.broken_slots())} are retired after a driver call failed in them; release or resume, unpin, "
                "or close the cache and build another"
            )
        return 1 << max([first, *self._owner]).bit_length()

    def _check_worth_evicting(self, need: int) -> None:
        arena, pool = self.arena, self.arena.pool
        there = (
            pool.available_bytes
            + arena.parked_bytes
            + arena.evictable_bytes
            + surplus_bytes(arena, self.lengths.tolist())
        )
        if need > there:
            raise KVCacheOutOfMemory(
                f"{need:,} bytes asked for; of a budget of {pool.budget:,} evicting all retained tokens would leave "
                f"{there:,}; release or preempt a sequence, or raise the budget"
            )

    def _grow(self, lengths: np.ndarray) -> None:
        with self._lock:
            wants = {slot: int(lengths[slot]) for slot in np.flatnonzero(lengths > self.frontiers).tolist()}
            self._make_room(self.arena.missing_bytes(wants), lengths=lengths)
            self._critical_path_maps += self.arena.grow(wants)

    def _release(self, slot: int) -> None:
        with self._lock:
            self.arena.park(slot, self._fence())

    def _clear(self) -> None:
        with self._lock:
            self.arena.clear(self._fence())
            self._tier.forget(self.dummy_slot)
            self._arriving.clear()
            self._placed_anew.clear()
            self._asleep.clear()

    def _fence(self) -> Fence:
        streams: tuple[int, ...] = (current_stream(self.device), *self.config.fence_streams)
        if self._copies is not None:
            streams = (*streams, self._copies.number)
        fences = [self.driver.record(stream) for stream in streams]
        return fences[0] if len(fences) == 1 else AllFences(fences)

    def borrow(self, tenant: Lender, beside: bool = True, keeper: Keeper | None = None) -> None:
        self._check_open()
        tenant.need(self.layout.least_bytes)
        self._borrowing = Borrowing(tenant, self._memory, beside, keeper)
        self._memory.on_closed = tenant.close

    def take_over(self, slots: Mapping[int, KeptSlot], tokens: Mapping[int, int]) -> None:
        if self._borrowing is None or self._borrowing.keeper is None:
            raise ConfigError("this cache's memory is no broker's that keeps it; give TenantConfig(keep_s=...)")
        self._run(self._do_take_over, slots, tokens)

    def _do_take_over(self, slots: Mapping[int, KeptSlot], tokens: Mapping[int, int]) -> None:
        assert self._borrowing is not None
        assert self._borrowing.keeper is not None
        take = self._borrowing.keeper.take_over
        with self._lock:
            for index, kept in slots.items():
                with ExitStack() as undo:
                    groups = [
                        (
                            lower,
                            [[self._extent_of(take, lease, size, undo) for lease in leases] for size, leases in all_],
                        )
                        for lower, all_ in kept.groups
                    ]
                    undo.pop_all()
                self.arena.take_over(index, groups)
                self._place_sequence(kept.owner, index, tokens[kept.owner])

    def _extent_of(self, take: Callable[[int, int], int], lease: int, size: int, undo: ExitStack) -> Extent:
        extent = Extent(self.driver, size, take(lease, size))
        undo.callback(extent.close)
        return extent

    def begin_journal(self, state: State) -> None:
        self._run(self._do_begin_journal, state)

    def _do_begin_journal(self, state: State) -> None:
        assert self._borrowing is not None
        assert self._borrowing.keeper is not None
        with self._lock:
            keeper = self._borrowing.keeper
            keeper.journal.begin(state)
            keeper.go_on()
            # With msgspec, which is an extra.
            from trtllm_vattn.tenancy.placements import Placements

            self._placements = Placements(keeper.journal, keeper.lease_of)
            self.arena.changed = set(self._owner)
            self.arena.pool.before_reuse = self._memory.after_mapping = self._note_placements
            self._note_placements()

    def end_journal(self) -> None:
        if self._placements is not None:
            self._uninterrupted(self._do_end_journal)

    def _do_end_journal(self) -> None:
        assert self._borrowing is not None
        assert self._borrowing.keeper is not None
        with self._lock:
            self._placements = self.arena.changed = None
            self.arena.pool.before_reuse = self._memory.after_mapping = None
            self._borrowing.keeper.leave()

    def note_placements(self) -> None:
        self._check_open()
        # What the thread maps ahead it notes itself, once nothing more is due: a step waits for it only where it writes
        # there.
        arena = self.arena
        if arena.changed or (arena.grown_ahead and (self.lengths > self._noted_frontiers).any()):
            self._uninterrupted(self._do_note_placements)

    def _do_note_placements(self) -> None:
        with self._lock:
            self._note_placements()

    def _note_placements(self) -> None:
        """Before an extent is used by another slot, or by nobody: what was taken from a slot is not noted as its own
        any more."""
        arena = self.arena
        if self._placements is None or arena.changed is None or not (arena.changed or arena.grown_ahead):
            return
        changed = sorted(arena.changed | arena.grown_ahead)
        slots, owner_of, noted = arena.slots, self._owner, []
        for index in changed:
            owner: Any = owner_of.get(index) if slots[index].state is RUNNING else None
            noted.append((index, owner, slots[index].groups, owner is not None and owner in self._placed_anew))
            self._placed_anew.discard(owner)
        self._placements.note(noted)
        self._noted_frontiers[changed] = arena.frontiers[changed]
        # Behind the note, for a step that begins meanwhile is not to go without it.
        arena.changed, arena.grown_ahead = set(), set()

    @property
    def asked_to_sleep(self) -> bool:
        return self._borrowing is not None and self._borrowing.tenant.asked_to_sleep

    @property
    def waits_for_memory(self) -> bool:
        return self._borrowing is not None and not self._borrowing.tenant.broker_has_ended

    @property
    def remedy(self) -> str:
        if self._borrowing is None or not self._borrowing.tenant.broker_has_ended:
            return super().remedy
        return f"start a broker and this engine anew, for the one at {self._borrowing.tenant.path} has ended"

    def follow_budget(self) -> int:
        borrowing = self._borrowing
        if borrowing is None or self.is_asleep:
            return 0
        wanted = max(borrowing.wanted, self.layout.least_bytes)
        if wanted == self.arena.pool.budget:
            borrowing.stuck, borrowing.owes_since = 0, None
            return 0
        # Who runs goes on while kept memory is given back; where nobody does, nobody waits for it.
        if self._owner and wanted < self.held_bytes and self._run(self._do_give_part, wanted):
            return 0
        borrowing.owes_since = None
        reached = self.shrink_towards(wanted)
        return borrowing.owed(wanted, reached)

    def _do_give_part(self, wanted: int) -> bool:
        assert self._borrowing is not None
        with self._lock:
            return self._borrowing.give_before_step(wanted)

    def mark_changing(self, changing: bool) -> None:
        if self._borrowing is not None:
            # No lock, which an interrupt could leave taken: each side says what it does before it looks at the other.
            self._borrowing.is_changing = changing
            if changing and self._borrowing.is_giving_back:
                self._uninterrupted(self._borrowing.wait)

    def report_demand(self, prompts: Iterable[int], at_once: bool = False) -> None:
        if self._borrowing is not None and (at_once or self._borrowing.is_due()):
            self._uninterrupted(self._do_report_demand, sum(map(self.layout.total_bytes, prompts)))

    def _do_report_demand(self, waiting: int) -> None:
        assert self._borrowing is not None
        with self._lock:
            self._borrowing.report(waiting)

    def wait_for_memory(self, timeout_s: float) -> None:
        if self._borrowing is not None:
            self._borrowing.tenant.wait_for_change(timeout_s)

    def set_budget(self, budget: int | str) -> None:
        """Raise or lower the bytes (``"40GiB"`` too) of physical memory that the cache may hold, at any time; no
        address changes.

        Lowering it takes parked memory away, behind its fences. Raises ConfigError for less than the dummy slot takes,
        KVCacheOutOfMemory where running sequences have more: release or preempt some first. Nothing changed then.
        """
        self._check_open()
        size = parse_bytes(budget, "the budget")
        self._run(self._do_set_budget, size)
        if self._borrowing is not None:
            self._borrowing.own = size

    def _do_set_budget(self, budget: int) -> None:
        with self._lock:
            if self._borrowing is not None:
                # As much as there was before, where this raises.
                budget = min(budget, max(self._borrowing.tenant.budget, self.layout.least_bytes))
            if budget < self.arena.used_bytes:
                self.arena.complete_pending_unmaps(wait=True)
                short = self.arena.used_bytes - self.arena.evictable_bytes - budget
                take_surplus(self.arena, short, self.lengths.tolist(), self._fence())
            set_budget(self.arena, budget)

    def shrink_towards(self, budget: int) -> int:
        """Set the budget to `budget` bytes, or as near above it as running sequences, and what the driver does not take
        back, allow; returns the budget set.

        Memory beyond it that is parked or mapped ahead goes back to the driver.
        """
        self._check_open()
        return self._run(self._do_shrink_towards, budget)

    def _do_shrink_towards(self, budget: int) -> int:
        with self._lock:
            if budget < self.held_bytes:
                drop_surplus(self.arena, self.lengths.tolist(), self._fence())
                self.arena.complete_pending_unmaps(wait=True)
                budget = max(budget, self.arena.used_bytes - self.arena.evictable_bytes)
            try:
                set_budget(self.arena, budget)
            except KVCacheOutOfMemory:
                # A driver call failed meanwhile, and what it named is held.
                self.arena.pool.budget = max(budget, self.held_bytes)
            return self.budget_bytes

    def release_free_memory(self, size: int | None = None) -> int:
        self._check_open()
        return self._run(self._do_release_free_memory, size)

    def _do_release_free_memory(self, size: int | None) -> int:
        with self._lock:
            if size is not None:
                return self.arena.reclaim_parked(size)
            before = self.held_bytes
            self.arena.complete_pending_unmaps(wait=True)
            self.arena.reclaim_parked(self.arena.parked_bytes)
            self.arena.pool.drop_free()
            return before - self.held_bytes

    def preallocate(self, sequences: int, tokens: int) -> None:
        self._check_open()
        self._run(self._do_preallocate, sequences, tokens)

    def _do_preallocate(self, sequences: int, tokens: int) -> None:
        with self._lock:
            self._preallocation.announce(sequences, tokens)
            while self._thread is None and self.arena.pool.create_one():
                pass
        self._wake()

    def preallocate_for(self, prompts: Sequence[int]) -> None:
        self._check_open()
        if self._thread is not None:
            fitting = self._preallocation.fitting(prompts[self.arena.parked_slots :])
            if fitting != self._preallocation.expected:
                self._run(self._preallocation.expect, fitting)
                self._wake()

    stock_up = preallocate  # alias for 0.1
    stock_for = preallocate_for  # alias for 0.1

    def move(self, sequence: SequenceId, slot: int) -> int:
        """Give a running sequence another, free slot by remapping; returns the mappings made.

        Nothing is copied and nothing waits: its memory is mapped at both addresses until work submitted so far is done.
        Raises UnknownSequence, ConfigError where the slot is not free, DriverError; nothing changed.
        """
        return self._run(self._do_move, sequence, self.slot_of(sequence), slot)

    def _do_move(self, sequence: SequenceId, source: int, slot: int) -> int:
        with self._lock:
            moved = remap.move(self.arena, source, slot, self._fence)
            self._move_sequence(sequence, slot)
            self._publish_deficits(slot)
            self._changed(source)
            self._changed(slot)
        return moved

    def _place_sequence(self, sequence: SequenceId, slot: int, tokens: int) -> None:
        super()._place_sequence(sequence, slot, tokens)
        self._publish_deficits(slot)
        self._changed(slot, sequence)

    def _changed(self, slot: int, placed: SequenceId | None = None) -> None:
        """What is noted of a slot in the journal changed, with the sequence that came there. By the lock, for the
        tenant's thread may be noting."""
        if self.arena.changed is not None:
            with self._lock:
                self.arena.changed.add(slot)
                if placed is not None:
                    self._placed_anew.add(placed)

    def fork(self, sequence: SequenceId, new_sequence: SequenceId, tokens: int) -> int:
        """Begin a sequence with the first `tokens` of another one; returns its slot.

        Extents that hold nothing else are shared, what is left is copied on the current stream. A shared extent is not
        written by either: `truncate` into it gives the sequence a copy of its own first.

        Raises
        ------
        UnknownSequence, DuplicateSequence, ConfigError, NoFreeSlot, KVCacheOutOfMemory, DriverError
            Nothing changed.
        """
        source = self.slot_of(sequence)
        if tokens > self.lengths[source]:
            raise ConfigError(f"sequence {sequence!r} has {self.lengths[source]} tokens, not {tokens} to fork")
        self._check_new(new_sequence, tokens)
        return self._run(self._do_begin_with, new_sequence, tokens, (source, tokens), False)

    def _admit_with(self, sequence: SequenceId, prompt_len: int, prefix: Tokens | None, alias: Tokens | None) -> int:
        if prefix is not None and alias is not None:
            raise ConfigError("a sequence begins with a prefix or with an alias, not with both; give one")
        self._check_new(sequence, prompt_len)
        given = prefix or alias
        if given is None or not 0 < given[1] <= prompt_len:
            raise ConfigError(f"sequence {sequence!r} of {prompt_len} tokens cannot begin with {given}")
        return self._run(self._do_begin_with, sequence, prompt_len, given, prefix is not None)

    def _do_begin_with(self, sequence: SequenceId, prompt_len: int, given: Tokens, reads: bool) -> int:
        with self._lock:
            source, tokens = self._source(*given)
            # Nothing of the source may be evicted for the place of the new sequence.
            with self.arena.pinned(source):
                need = self.bytes_behind(prompt_len, tokens)
                limit = self._limit(need)
                self._make_room(need, self.ahead.tokens)
                target = min(self.arena.free_slots(limit), key=lambda slot: (self.arena.slots[slot].mapped, slot))
                if reads:
                    remap.reach(self.arena, source, tokens, target, prompt_len)
                else:
                    remap.share(self.arena, source, tokens, target, prompt_len, self._copy, self._fence)
            self._place_sequence(sequence, target, prompt_len)
        self._wake_for_memory()
        return target

    def bytes_behind(self, tokens: int, prefix: int) -> int:
        """Bytes that a sequence of so many tokens needs where nothing has to be mapped for its first `prefix` tokens,
        but for windows."""
        layout = self.layout
        first = layout.whole_bytes(prefix) // layout.granularity * layout.granularity
        return sum(
            max(0, layout.bytes_for(kind.held(tokens)) - (first if kind.window is None else 0)) * len(kind.ranges)
            for kind in layout.kinds
        )

    def has_windows_of(self, owner: int | RetainedSlot, tokens: int) -> bool:
        """Whether the tokens that each layer keeps of a slot's first `tokens` are still there; later ones may have
        taken the places of those in a window."""
        if isinstance(owner, RetainedSlot):
            return self.arena.has_windows_of(owner.slot, tokens)
        return self.arena.has_windows_of(owner, tokens, int(self.lengths[owner]))

    def _source(self, owner: int | RetainedSlot, tokens: int) -> tuple[int, int]:
        """The slot whose first tokens are asked for. Raises ConfigError or PrefixEvicted where they are not there."""
        if isinstance(owner, RetainedSlot):
            if (kept := self.arena.retained_tokens(*owner)) < tokens:
                raise PrefixEvicted(f"{tokens} tokens of {owner} asked for, of which {kept} are kept")
            if not self.has_windows_of(owner, tokens):
                raise PrefixEvicted(
                    f"{tokens} tokens of {owner} asked for, whose windows later tokens took the place of"
                )
            return owner.slot, tokens
        self._check_has(owner, tokens)
        self._check_window(owner, tokens)
        self._check_rewritten(owner, tokens)
        return owner, tokens

    def _check_has(self, owner: int, tokens: int) -> None:
        """Raise ConfigError where there are not so many tokens of a sequence in a slot."""
        if not 0 <= owner < self.shape.num_slots or self.lengths[owner] < tokens:
            held = f"it has {self.lengths[owner]}" if 0 <= owner < self.shape.num_slots else "there is none"
            raise ConfigError(f"{tokens} tokens of the sequence in slot {owner} asked for; {held}")

    def _copy(self, to: int, source: int, nbytes: int) -> None:
        copy_bytes(self.driver.device, to, source, nbytes)

    def extents(self, sequence: SequenceId) -> list[ExtentPlace]:
        index = self.slot_of(sequence)
        slot, needed = self.arena.slots[index], self.layout.touched_bytes(int(self.lengths[index]))
        if slot.prefix or any(group.deficit or group.lower for group in slot.groups):
            raise ConfigError(
                f"sequence {sequence!r} does not have all its tokens in its own slot; admit it without a prefix, and "
                "do not shorten its ranges, where it is to be sent"
            )
        places = []
        with self._lock:
            for group in slot.groups:
                for number, where in enumerate(group.ranges):
                    start = self.arena.reservations[where].base + index * self.layout.slot_stride
                    offset = 0
                    for stripe in group.stripes:
                        if offset < needed:
                            size = stripe[number].size
                            places.append(ExtentPlace(where, offset, start + offset, size))
                            offset += size
        return sorted(places)

    @property
    def byte_order(self) -> dict[str, Any]:
        shape = self.shape
        return {
            "layout": self.config.layout.value,
            "ranges": self.layout.num_ranges,
            "row_bytes": self.layout.row_bytes,
            "layers": shape.num_layers,
            "kv_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "dtype": str(shape.dtype),
        }

    def copy_prefix(self, owner: int | RetainedSlot, sequence: SequenceId, tokens: int) -> None:
        self._run(self._do_copy_prefix, owner, self.slot_of(sequence), tokens)

    def _do_copy_prefix(self, owner: int | RetainedSlot, target: int, tokens: int) -> None:
        with self._lock:
            source, tokens = self._source(owner, tokens)
            self._check_has(target, tokens)
            slots = self.arena.slots
            floors = self.arena.write_floors
            if source == target or slots[target].lower or (floors is not None and floors[target]):
                raise ConfigError(
                    f"slot {target} does not have its first {tokens} tokens to itself, so nothing is copied over them; "
                    "admit the sequence without a prefix"
                )
            if any(group.deficit for index in (source, target) for group in slots[index].groups):
                raise ConfigError(f"ranges of slot {source} or {target} hold different tokens; fork the sequence")
            remap.copy_tokens(self.arena, source, tokens, target, self._copy, self._fence)

    # -- retained slots ----------------------------------------------------------------------------------------------

    def retain(self, sequence: SequenceId) -> RetainedSlot:
        return self._run(self._do_retain, sequence, self.slot_of(sequence))

    def _do_retain(self, sequence: SequenceId, slot: int) -> RetainedSlot:
        with self._lock:
            if self.arena.slots[slot].rewritten:
                raise ConfigError(
                    f"tokens of sequence {sequence!r} were evicted, so nobody can begin with it; release it"
                )
            serial = self.arena.retain(slot, int(self.lengths[slot]), self._fence())
            self._remove_sequence(sequence, slot)
        return RetainedSlot(slot, serial)

    def retained_tokens(self, retained: RetainedSlot) -> int:
        self._check_open()
        return self.arena.retained_tokens(*retained)

    def adopt(
        self, retained: RetainedSlot, sequence: SequenceId, keep_tokens: int, prompt_len: int | None = None
    ) -> int:
        prompt_len = keep_tokens if prompt_len is None else prompt_len
        self._check_new(sequence, prompt_len)
        if not 0 < keep_tokens <= prompt_len:
            raise ConfigError(f"sequence {sequence!r} of {prompt_len} tokens cannot keep {keep_tokens}")
        return self._run(self._do_adopt, retained, sequence, keep_tokens, prompt_len)

    def _do_adopt(self, retained: RetainedSlot, sequence: SequenceId, keep_tokens: int, prompt_len: int) -> int:
        with self._lock:
            slot, _ = self._source(retained, keep_tokens)
            self.arena.check_not_held(slot, keep_tokens)
            self._check_behind_segments(slot, keep_tokens)
            retain_again = self.arena.adopt(slot)
            try:
                remap.own_from(self.arena, slot, keep_tokens, self._copy, self._fence)
                self._make_room(self.arena.missing_bytes({slot: prompt_len}), self.ahead.tokens)
                self._admission_maps += self.arena.grow({slot: prompt_len})
            except BaseException:
                retain_again()
                raise
            self._place_sequence(sequence, slot, prompt_len)
        self._wake_for_memory()
        return slot

    def _check_behind_segments(self, slot: int, tokens: int) -> None:
        """Raise ConfigError where tokens from this one on, which are to be written, lie in other slots."""
        if tokens < (prefix := self.arena.slots[slot].prefix):
            raise ConfigError(
                f"the first {prefix} tokens of slot {slot} lie in other slots, so those from {tokens} on cannot be "
                f"written; keep {prefix}, or admit another sequence"
            )

    def release_retained(self, retained: RetainedSlot, keep_tokens: int = 0) -> None:
        self._check_open()
        self._run(self._do_release_retained, retained, keep_tokens)

    def _do_release_retained(self, retained: RetainedSlot, keep_tokens: int) -> None:
        with self._lock:
            if self.arena.retained_tokens(*retained) > keep_tokens:
                self.arena.shrink_retained(retained.slot, keep_tokens)

    def touch(self, retained: RetainedSlot, priority: float = 0.0) -> None:
        self._check_open()
        self._run(self._do_touch, retained, priority)

    def _do_touch(self, retained: RetainedSlot, priority: float) -> None:
        with self._lock:
            if self.arena.retained_tokens(*retained):
                self.arena.slots[retained.slot].touch(priority)

    def take_evicted(self) -> list[tuple[RetainedSlot, int]]:
        self._check_open()
        evicted = self.arena.evicted
        taken = (evicted.popleft() for _ in range(len(evicted)))
        return [(RetainedSlot(slot, serial), left) for slot, serial, left in taken]

    # -- host memory -------------------------------------------------------------------------------------------------

    def slot_of(self, sequence: SequenceId) -> int:
        if sequence in self._arriving:
            # Whatever is done with it comes behind its copies.
            self._arriving[sequence].wait()
            del self._arriving[sequence]
        if sequence in self._tier.sequences:
            self._check_open()
            raise SequenceSuspended(f"sequence {sequence!r} is suspended; resume it first, or release it")
        return super().slot_of(sequence)

    def _check_new(self, sequence: SequenceId, tokens: int) -> None:
        super()._check_new(sequence, tokens)
        if sequence in self._tier.sequences:
            raise DuplicateSequence(f"sequence {sequence!r} is suspended; resume or release it")

    def suspend(self, sequence: SequenceId, *, wait: bool = True) -> int:
        return self._run(self._do_suspend, sequence, self.slot_of(sequence), wait)

    def _do_suspend(self, sequence: SequenceId, slot: int, wait: bool) -> int:
        with self._lock:
            copied = self._tier.suspend(sequence, slot, int(self.lengths[slot]), self._copy_stream(), wait)
            self._remove_sequence(sequence, slot)
        return copied

    def _copy_stream(self) -> CopyStream:
        """The cache's own stream for copies, behind what torch's current one has; what others have was waited for."""
        if self.config.fence_streams:
            self._fence().wait()
        if self._copies is None:
            self._copies = SideStream(self.device)
        self._copies.follow()
        stream = self._copies.number
        return CopyStream(stream, lambda: self.driver.record(stream), self._copies.timing)

    def prepare_step(self, lengths: np.ndarray) -> None:
        if self._arriving:
            for sequence in [each for each in self._arriving if lengths[self._slot_of[each]] > 0]:
                self.slot_of(sequence)
        super().prepare_step(lengths)

    def has_arrived(self, sequence: SequenceId) -> bool:
        fence = self._arriving.get(sequence)
        if fence is None:
            return True
        if not fence.done():
            return False
        del self._arriving[sequence]
        return True

    def resume(self, sequence: SequenceId, tokens: int | None = None, *, wait: bool = True) -> int:
        found = self._suspended(sequence)
        tokens = found if tokens is None else tokens
        if tokens < found:
            raise ConfigError(f"sequence {sequence!r} has {found} tokens; resume it for those or more, not {tokens}")
        self._check_fits(sequence, tokens)
        return self._run(self._do_resume, sequence, tokens, wait)

    def _do_resume(self, sequence: SequenceId, tokens: int, wait: bool) -> int:
        with self._lock:
            self._tier.settle(sequence)
            if self.arena.slots[self._tier.sequences[sequence].slot].broken:
                self._limit(self._tier.missing_bytes(sequence, tokens))
                target = self.arena.free_slots()[0]
                self.arena.unmap_parked(target)
                self._tier.relocate(sequence, target)
            self._make_room(self._tier.missing_bytes(sequence, tokens), self.ahead.tokens)
            slot, maps, fence = self._tier.resume(sequence, tokens, self._copy_stream(), wait)
            self._admission_maps += maps
            self._place_sequence(sequence, slot, tokens)
            if not wait:
                self._arriving[sequence] = fence
        self._wake_for_memory()
        return slot

    def is_suspended(self, sequence: SequenceId) -> bool:
        return sequence in self._tier.sequences

    def _suspended(self, sequence: SequenceId) -> int:
        """How many tokens a suspended sequence has. Raises UnknownSequence."""
        self._check_open()
        if sequence not in self._tier.sequences:
            raise UnknownSequence(f"no sequence {sequence!r} is suspended, of {len(self._tier.sequences)}")
        return self._tier.sequences[sequence].tokens

    @property
    def transfers(self) -> Transfers:
        return self._tier.transfers

    def release(self, sequence: SequenceId) -> None:
        if sequence in self._tier.sequences:
            self._check_open()
            self._run(self._do_discard, sequence)
        else:
            super().release(sequence)

    def _remove_sequence(self, sequence: SequenceId, slot: int) -> None:
        self._arriving.pop(sequence, None)
        self._placed_anew.discard(sequence)
        super()._remove_sequence(sequence, slot)
        self._changed(slot)

    def _do_discard(self, sequence: SequenceId) -> None:
        with self._lock:
            self._tier.discard(sequence)

    def sleep(self, keep: bool) -> int:
        self._check_open()
        if self._slot_of and not keep:
            raise ConfigError(f"{len(self._slot_of)} sequences run; release them first, or sleep with keep=True")
        return self._run(self._do_sleep, keep)

    def _do_sleep(self, keep: bool) -> int:
        arena, slots = self.arena, self.arena.slots
        with self._lock:
            if broken := [slot for slot in self._owner if slots[slot].broken]:
                raise MemoryQuarantined(f"an unmap failed in slots {broken}; release their sequences first")
            kept = {slot: int(self.lengths[slot]) for slot in self._owner}
            for index in arena.retained_indices():
                # What suspended sequences read has to come back, too.
                if (keep and not slots[index].broken) or not arena.evict(index):
                    kept[index] = max(slots[index].tokens, arena.held_tokens(index))
            held = arena.pool.held_bytes
            arena.complete_pending_unmaps(wait=True)
            arena.reclaim_parked(arena.parked_bytes)
            self._tier.sleep({**kept, self.dummy_slot: 0}, self._copy_stream())
            self._memory.is_asleep = True
            for sequence, slot in list(self._slot_of.items()):
                self._asleep[sequence] = slot, int(self.lengths[slot])
                self._remove_sequence(sequence, slot)
            arena.pool.drop_free()
            if self._borrowing is not None:
                self._borrowing.sleeps()
        return held - arena.pool.held_bytes

    def wake(self) -> int:
        if not self.is_asleep:
            self._check_open()
            return 0
        super()._check_state()
        return self._run(self._do_wake)

    def _do_wake(self) -> int:
        # Who looks at the cache meanwhile does not wait for others' memory.
        with nullcontext() if self._borrowing is None else self._borrowing.waking(self._tier.used_bytes), self._lock:
            copied = self._tier.wake(self._copy_stream())
            self._memory.is_asleep = False
            for sequence, (slot, tokens) in self._asleep.items():
                self._place_sequence(sequence, slot, tokens)
            self._asleep.clear()
        self._wake()
        return copied

    @property
    def host_bytes(self) -> tuple[int, int]:
        return self._tier.used_bytes, self._tier.held_bytes

    @property
    def is_asleep(self) -> bool:
        return self._memory.is_asleep

    # -- writing and lengths -----------------------------------------------------------------------------------------

    def truncate(self, sequence: SequenceId, length: int) -> None:
        slot = self.slot_of(sequence)
        if 0 < length < self.lengths[slot]:
            self._check_window(slot, length)
            if self.arena.has_sharing(slot):
                self._run(self._do_make_writable, slot, length)
            self._check_deficits(slot, length)
        super().truncate(sequence, length)

    def _check_roll_back(self, lengths: np.ndarray) -> None:
        if self._deficits is not None:
            for slot in np.flatnonzero(lengths > 0).tolist():
                self._check_deficits(slot, int(lengths[slot]))

    def expect_growth(self, tokens: int) -> None:
        self.ahead.timing.most_growth = tokens

    def make_writable(self, sequence: SequenceId, start: int) -> None:
        self._run(self._do_make_writable, self.slot_of(sequence), start)

    def _do_make_writable(self, slot: int, start: int) -> None:
        with self._lock:
            self.arena.check_not_held(slot, start)
            self._check_behind_segments(slot, start)
            remap.own_from(self.arena, slot, start, self._copy, self._fence)

    def _check_deficits(self, slot: int, length: int) -> None:
        if (least := max(group.deficit for group in self.arena.slots[slot].groups)) >= length:
            raise ConfigError(f"a range group of slot {slot} holds {least} tokens fewer, so none of its first {length}")
        self._check_rewritten(slot, length)

    def _check_rewritten(self, slot: int, tokens: int) -> None:
        """Raise ConfigError where tokens were evicted behind a slot's first `tokens` ones."""
        if (rewritten := self.arena.slots[slot].rewritten) > tokens:
            raise ConfigError(
                f"tokens of slot {slot} were evicted when it had {rewritten}, so there is no state of its first "
                f"{tokens}; keep {rewritten} or more, or compute them anew"
            )

    def set_length(self, sequence: SequenceId, group: int, tokens: int) -> None:
        slot = self.slot_of(sequence)
        if self._deficits is None:
            raise ConfigError("all ranges of this cache have one length; build it with CacheConfig(own_lengths=True)")
        if not 0 <= group < self.num_groups:
            raise ConfigError(f"range group {group} asked for; there are {self.num_groups}")
        held = int(self.lengths_of(group)[slot])
        if not 0 < tokens <= held:
            raise ConfigError(f"range group {group} holds {held} tokens of sequence {sequence!r}; keep 1 to {held}")
        self._check_rewritten(slot, 0)
        self._run(self._do_set_length, slot, group, tokens)

    def _do_set_length(self, slot: int, group: int, tokens: int) -> None:
        with self._lock:
            self.arena.check_not_held(slot)
            self._check_behind_segments(slot, 0)
            held = [int(self.lengths[slot]) - each.deficit for each in self.arena.slots[slot].groups]
            held[group] = tokens
            longest = max(held)
            deficits = [longest - each for each in held]
            self.arena.set_deficits(slot, deficits, {group: tokens + self.ahead.tokens}, self._fence())
            self.lengths[slot] = longest
            self._publish_deficits(slot)

    def keep_places(self, sequence: SequenceId, places: Sequence[Sequence[torch.Tensor]]) -> int:
        slot = self.slot_of(sequence)
        if self._deficits is None or self.config.layout is not Layout.ROWS:
            raise ConfigError(
                "ranges of this cache have no lengths of their own, in rows; build it with "
                "CacheConfig(own_lengths=True)"
            )
        held = self._check_places(slot, places)
        return self._run(self._do_keep_places, slot, places, held)

    def _check_places(self, slot: int, places: Sequence[Sequence[torch.Tensor]]) -> list[int]:
        """How many tokens each group holds then. Raises ConfigError for what is no choice of places."""
        shape, parts = self.shape, self.layout.head_groups
        if len(places) != shape.num_layers or any(len(each) != parts for each in places):
            raise ConfigError(f"places are for {shape.num_layers} layers, of {parts} parts of the heads each; give all")
        held: dict[int, int] = {}
        wrong = torch.zeros((), dtype=torch.bool, device=self.device)
        for layer, each in enumerate(places):
            for part, chosen in enumerate(each):
                group = self.group_of(layer, part)
                there = int(self.lengths_of(group)[slot])
                if chosen.ndim != 2 or len(chosen) != shape.num_kv_heads // parts or chosen.dtype != torch.int64:
                    raise ConfigError(
                        f"places of layer {layer} are {chosen.dtype} {list(chosen.shape)}; give int64 "
                        f"[{shape.num_kv_heads // parts}, tokens] on the device"
                    )
                count = held.setdefault(group, chosen.shape[1])
                if not 0 < count <= there or count != chosen.shape[1]:
                    raise ConfigError(
                        f"{chosen.shape[1]} places of layer {layer}, whose range holds {there} tokens; keep 1 to "
                        f"{there}, as many in each layer and head of a range"
                    )
                wrong |= (chosen[:, 1:] <= chosen[:, :-1]).any() | (chosen[:, 0] < 0).any()
                wrong |= (chosen[:, -1] >= there).any()
        if wrong:
            raise ConfigError(f"places of slot {slot} do not ascend, or lie behind its tokens")
        return [held[group] for group in range(self.num_groups)]

    def _do_keep_places(self, slot: int, places: Sequence[Sequence[torch.Tensor]], held: list[int]) -> int:
        with self._lock:
            self._do_make_writable(slot, 0)
            length, arena = int(self.lengths[slot]), self.arena
            if arena.slots[slot].lower:
                raise ConfigError(
                    f"slot {slot} backs tokens from {arena.lower_edge(slot)} on; nothing moves before them"
                )
            mapped = arena.slots[slot].mapped_bytes
            moves = [
                (rows[slot, : chosen.shape[1]], _gathered(rows[slot], chosen))
                for layer, parts in enumerate(places)
                for kv, chosen in zip(self._layers[layer], parts, strict=True)
                for rows in (kv.k, kv.v)[: self.shape.kv_factor]
            ]
            # The last driver call that may fail, before anything is written. What is unmapped lies behind what is.
            fence = self._fence()
            for to, rows in moves:
                _bits(to).copy_(rows)
            keep = {group: count + self.ahead.tokens for group, count in enumerate(held)}
            arena.set_deficits(slot, [length - count for count in held], keep, fence, rewritten=length)
            self._publish_deficits(slot)
        return mapped - arena.slots[slot].mapped_bytes

    @property
    def live_bytes(self) -> int:
        if self._deficits is None:
            return super().live_bytes
        held = sum(
            group.held(int(self.lengths[slot])) * len(group.ranges)
            for slot in list(self._owner)
            for group in self.arena.slots[slot].groups
        )
        return held * self.layout.row_bytes

    def _publish_deficits(self, slot: int) -> None:
        if self._deficits is not None:
            deficits = np.array([group.deficit for group in self.arena.slots[slot].groups], np.int32)
            self._deficits[:, slot].copy_(upload(deficits, self.device))

    def replace(self, sequence: SequenceId) -> int:
        """Put other physical memory with the same bytes under a sequence; returns the mappings replaced.

        Waits for the device. Raises UnknownSequence, KVCacheOutOfMemory, DriverError; nothing changed.
        """
        return self._run(self._do_replace, self.slot_of(sequence))

    def _do_replace(self, slot: int) -> int:
        with self._lock:
            return remap.replace(self.arena, slot, self._copy, self._fence)

    # -- ahead -----------------------------------------------------------------------------------------------------

    def trace_to(self, trace: Trace) -> None:
        super().trace_to(trace)
        self._memory.trace = trace
        layout = self.layout
        where = {
            "slots": layout.num_slots,
            "slot_bytes": layout.slot_stride,
            "row_bytes": layout.row_bytes,
            "granularity": layout.granularity,
            "ranges": [reservation.base for reservation in self.arena.reservations],
        }
        trace.instant("address space", where, "cache")

    def start_thread(self) -> None:
        """Have a thread map ahead from now on, so that `map_ahead` has no more to do than wake it when something is
        due. Idempotent; `close` ends it."""
        self._check_open()
        self._run(self._memory.start_thread)

    def map_ahead(self) -> int:
        """Keep running slots' frontiers up to the lookahead past their lengths; returns the mappings made.

        Where memory is short nothing is mapped: the step that needs it asks. With a thread, the mappings are those
        since the last call, and an error that it met is raised here; what the next launch needs, it is not left to.
        """
        self._check_open()
        self.ahead.timing.observe_lengths(self.lengths)
        if self._thread is None:
            if not self.arena.has_pending_work and not self.ahead.due(self.ahead.at_once()).size:
                return 0
            return self._run(self._map_due)
        self._thread.raise_error()
        due = self.ahead.due()
        if self.arena.has_pending_work or due.size:
            self._wake()
        if due.size and self.ahead.is_urgent(due):
            self._run(self._map_urgent)
        made, self._reported_maps = self.ahead.maps - self._reported_maps, self.ahead.maps
        return made

    def _wake(self) -> None:
        if self._thread is not None:
            self._thread.wake()

    def _map_urgent(self) -> None:
        with self._lock:
            while self.ahead.is_urgent(self.ahead.due()) and self.ahead.map_due():
                pass

    def _map_due(self) -> int:
        with self._lock:
            self.arena.complete_pending_unmaps()
            made = self.ahead.map_due(self.ahead.at_once())
            if not made:
                trim(self.arena, self.ahead.at_once())
            return made

    def work_ahead(self) -> bool:
        """Do one unit of the background thread's work in this call, and return whether there may be more; for caches
        without a thread. Raises DriverError."""
        self._check_open()
        return self._run(self._do_work_ahead)

    def _do_work_ahead(self) -> bool:
        return self._memory.work()

    def wait_ahead(self, timeout_s: float = 10.0) -> bool:
        """Whether the thread has nothing left to do, within so many seconds; at once without one."""
        return self._thread is None or self._thread.wait_idle(timeout_s)

    def _free(self) -> None:
        self._uninterrupted(self._close_memory)

    def _close_memory(self) -> None:
        try:
            self._memory.close(self._fence())
        finally:
            if self._memory.is_closed:
                self._layers, self._flat = [], []

    # -- views and counts ------------------------------------------------------------------------------------------

    def layer(self, layer: int) -> FlatKV | PagedKV:
        self._check_layer(layer)
        if len(self._layers[layer]) > 1:
            raise ConfigError("heads of this cache have ranges of their own; use head_groups() instead of layer()")
        return self._layers[layer][0]

    def head_groups(self, layer: int) -> tuple[FlatKV | PagedKV, ...]:
        self._check_layer(layer)
        return self._layers[layer]

    def group_of(self, layer: int, heads: int = 0) -> int:
        self._check_layer(layer)
        first = layer * self.shape.kv_factor if self.config.layout is Layout.TENSORS else layer
        return self.layout.place_of(first, heads)[0] if self.num_groups > 1 else 0

    def storages(self) -> list[torch.Tensor]:
        return [*self._flat] if self._deficits is None else [*self._flat, self._deficits]

    def regions(self) -> list[Region]:
        deficits = [] if self._deficits is None else [self._deficits]
        return [*tensor_regions(RESERVATION, self._flat), *tensor_regions(STATIC, deficits)]

    @property
    def sequences(self) -> Mapping[SequenceId, int]:
        """Slots by sequence."""
        return self._slot_of

    def mapped_tensors(self) -> Iterator[torch.Tensor]:
        """Flat views, of the cache's dtype, over all memory that is mapped: one for each slot in each range."""
        itemsize = self.shape.dtype.itemsize
        for index, slot in enumerate(self.arena.slots):
            start = index * self.layout.slot_stride
            for group in slot.groups:
                for where in group.ranges:
                    size = group.mapped // itemsize * itemsize
                    yield self._flat[where][start + group.lower :][:size].view(self.shape.dtype)

    def free_slots(self) -> list[int]:
        return self.arena.free_slots()

    def broken_slots(self) -> list[int]:
        return [index for index, slot in enumerate(self.arena.used_slots) if slot.broken]

    def mappings_in(self, slot: int) -> int:
        return sum(len(group.stripes) * len(group.ranges) for group in self.arena.slots[slot].groups)

    def stats(self) -> CacheStats:
        # Not by `_run`, whose notes are the stepping thread's; but no interrupt comes while the lock is held.
        self._check_readable()
        return uninterrupted(self._do_stats)

    def _do_stats(self) -> CacheStats:
        with self._lock.in_background():
            pool = self.arena.pool
            owned = list(self._owner)
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
                ahead_wait_s=self._lock.waited_s,
                retained_slots=self.arena.retained_slots,
                retained_bytes=self.arena.retained_bytes,
                segment_tokens=sum(self.arena.slots[slot].prefix for slot in owned),
                suspended_sequences=len(self._tier.sequences),
                host_bytes=self._tier.used_bytes,
                host_held_bytes=self._tier.held_bytes,
                window_bytes=self.arena.window_bytes,
                free_bytes=pool.free_bytes,
                free_extents=len(pool.free_extents()),
                parked_slots=self.arena.parked_slots,
                lease=None if self._borrowing is None else self._borrowing.lease(),
            )

    def slot_stats(self) -> list[SlotStats]:
        self._check_readable()
        return uninterrupted(self._do_slot_stats)

    def _do_slot_stats(self) -> list[SlotStats]:
        with self._lock.in_background():
            lengths, backed = self.lengths.tolist(), np.maximum(self.frontiers, self.arena.retained_frontiers).tolist()
            return [
                SlotStats(index, slot.state.value, lengths[index] or slot.tokens, backed[index], slot.mapped_bytes)
                for index, slot in enumerate(self.arena.used_slots)
                if slot.state is not SlotState.FREE
            ]

    def placement(self) -> Placement:
        """How nearly slots' memory lies in the order of its creation."""
        self._check_open()
        return self._run(self._do_placement)

    def _do_placement(self) -> Placement:
        with self._lock:
            return self.arena.placement()

    def shuffle_free_memory(self, seed: int) -> None:
        with self._lock:
            self.arena.pool.shuffle_free(seed)

    def remap_free_slot(self, slot: int, tokens: Sequence[int]) -> int:
        """Map a slot that has no sequence up to each of these numbers of tokens in turn, then unmap it; returns the
        mappings made. From any thread, beside running steps: what remapping costs them is measured by it."""
        maps = 0
        for each in tokens:
            with self._lock.in_background():
                maps += self.arena.grow({slot: each}, wait=False)
        with self._lock.in_background():
            self.arena.unmap_parked(slot)
        return maps

    def _lost_memory(self, slot: int) -> bool:
        return self.arena.slots[slot].broken

    def check_integrity(self) -> None:
        """As of every cache; of one that sleeps, too."""
        super()._check_state()
        self._run(self._do_check_integrity)

    def _do_check_integrity(self) -> None:
        with self._lock:
            super()._do_check_integrity()
            self.arena.check_integrity()
            for slot in self._owner:
                if self.arena.held_tokens(slot) > self.lengths[slot]:
                    raise InvariantViolation(
                        f"slot {slot} has {self.lengths[slot]} tokens, other slots read {self.arena.held_tokens(slot)}"
                    )
            suspended = self._tier.slots(self.dummy_slot)
            if suspended != self.arena.suspended_slots():
                raise InvariantViolation(
                    f"slots {suspended} are kept for suspended sequences, {self.arena.suspended_slots()} are suspended"
                )
            free = set(self.arena.free_slots())
            for slot in range(self.shape.num_slots):
                if self._occupied[slot] and slot in free:
                    raise InvariantViolation(f"slot {slot} of sequence {self._owner[slot]!r} is free in the arena")
