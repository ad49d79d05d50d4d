"""The contract every KV cache keeps, so that one Engine runs over all of them and a comparison changes one word.

A cache has `num_slots` slots of up to `max_seq_len` tokens and one dummy slot (`dummy_slot == num_slots`), always
backed, that padding writes to. A sequence owns a slot from `admit` to `release`. Lane i of a captured batch is slot i.

Numbered contract, tested over every sibling in tests/cache/test_contract.py:

C1. Positions of a sequence's slot from `lower_edges[slot]` (0 where that is None) up to `frontiers[slot]` are backed by
    memory: they may be read, and written from `write_floors[slot]` (0 where that is None) on. Those that a row of
    `segments` names are read in another slot. Edge and frontier are 0 for a free slot, whatever is still mapped there.
C2. `lengths[slot]` tokens of a slot belong to its sequence; `lengths <= frontiers` always.
C3. A call succeeds whole or raises and changes nothing.
C4. Tensors from `layer()` are made once and stay valid until `close()`, at the same addresses.
C5. `close()` is idempotent; any other call after it raises `ManagerClosed`.
C6. A call that is interrupted (KeyboardInterrupt) is done whole, or not at all, or the next call raises
    `CacheInterrupted`, until `reset()` or `close()`. Nothing waits for ever, and `close()` then gives everything back.
C7. In a forked child every call raises `WrongProcess`, and the parent's memory is not touched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.tenancy.borrowing import Keeper, Lease, Lender
from trtllm_vattn.trace import Trace
from trtllm_vattn.vmm.regions import STATIC, Region, tensor_regions

if TYPE_CHECKING:
    from typing_extensions import Self

    from trtllm_vattn.memory.arena import Placement
    from trtllm_vattn.tenancy.journal import KeptSlot, State

SequenceId = Hashable
T = TypeVar("T")


@dataclass(frozen=True)
class CacheShape:
    """What one token costs and how many there may be.

    `kv_factor` is 2 for K and V, 1 where one latent serves as both (MLA). `windows` has a number for each layer: of a
    layer with a sliding window only the last so many tokens are kept, that at position p in row ``p % window`` of its
    slot (a ring), so that the next one takes the place of the one that leaves the window; None keeps all. Empty is None
    for all layers, and a window of `max_seq_len` or more is none.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    num_slots: int
    max_seq_len: int
    kv_factor: int = 2
    windows: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "num_slots", "max_seq_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a positive whole number")
        if not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise ConfigError(
                f"dtype is {self.dtype!r}; K and V are of a floating-point torch dtype, torch.bfloat16 say"
            )
        if self.kv_factor not in (1, 2):
            raise ConfigError(f"kv_factor is {self.kv_factor!r}; it is 2 for K and V, 1 for a shared latent")
        object.__setattr__(self, "windows", self._checked_windows())

    def _checked_windows(self) -> tuple[int | None, ...]:
        """A number a layer, or none at all where no window is shorter than `max_seq_len`."""
        if self.windows and len(self.windows) != self.num_layers:
            raise ConfigError(
                f"{len(self.windows)} windows for {self.num_layers} layers; give one a layer, None for none"
            )
        wrong = [each for each in self.windows if each is not None and (not isinstance(each, int) or each < 1)]
        if wrong:
            raise ConfigError(f"a window is {wrong[0]!r}; it is a positive number of tokens, or None")
        windows = tuple(each if each is not None and each < self.max_seq_len else None for each in self.windows)
        return windows if any(windows) else ()

    def window_of(self, layer: int) -> int | None:
        """How many of a sequence's last tokens a layer keeps; None is all."""
        return self.windows[layer] if self.windows else None

    def kept_bytes(self, tokens: int) -> int:
        """Bytes that a sequence of so many tokens takes in all layers, of which some keep a window."""
        kept = sum(tokens if each is None else min(each, tokens) for each in self.windows or (None,) * self.num_layers)
        return kept * self.layer_token_bytes

    @property
    def layer_token_bytes(self) -> int:
        """Bytes one token takes in one layer."""
        return self.kv_factor * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes one token takes in all layers."""
        return self.num_layers * self.layer_token_bytes


class RetainedSlot(NamedTuple):
    """What `KVCache.retain` kept: the tokens of an ended sequence, in its slot, until they are evicted."""

    slot: int
    serial: int


class ExtentPlace(NamedTuple):
    """A mapping that holds tokens of a sequence: `offset` bytes from the start of its slot in range `range`."""

    range: int
    offset: int
    address: int
    size: int


Tokens = tuple["int | RetainedSlot", int]
"""The first so many tokens of a running sequence's slot, or of a retained one."""


@dataclass(frozen=True)
class FlatKV:
    """One layer as flat tensors; k and v are ``[num_slots + 1, max_seq_len, num_kv_heads, head_dim]``, any strides.

    Of a layer with a window they have ``window`` rows a slot, and a token is in row ``position % window``.
    """

    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True)
class PagedKV:
    """One layer as a pool of blocks behind a table.

    k and v are ``[num_blocks, block_size, num_kv_heads, head_dim]`` (any strides); `table` is int32
    ``[num_slots + 1, blocks_per_slot]`` on the device. All entries of the dummy slot's row are one block that is always
    backed; a row's entries past its slot's frontier may name blocks that are not.
    """

    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor


@dataclass(frozen=True)
class CacheStats:
    """Bytes and counts at one moment.

    `live_bytes` hold tokens of sequences. `mapped_bytes` are mapped for running sequences, with lookahead and rounding.
    `parked_bytes` are mapped in free slots, for the next sequence. `held_bytes` is all physical memory held.
    Mappings made are counted by when: at an admission, in a step that needed them (`critical_path_maps`, 0 in steady
    decode), or ahead, beside a running step. `live_mappings` are this cache's, `device_mappings` all of the process on
    its device (on the host, of the process), out of the `max_mappings` that the driver bears. `surplus_bytes` of
    `mapped_bytes` lie beyond the lookahead: a sequence found them parked in its slot, and others may take them when
    memory is short. `lookahead` tokens are kept mapped past a sequence's length. `ahead_wait_s` is how long callers
    waited for the thread that maps ahead. `retained_bytes` are mapped in `retained_slots` slots that keep the
    tokens of ended sequences; `segment_tokens` tokens of sequences lie in other slots than theirs.
    `suspended_sequences` have their tokens in host memory, of which `host_held_bytes` are pinned and `host_bytes` used.
    `window_bytes` of `mapped_bytes` are those of layers that keep a window. `free_bytes` in `free_extents` extents are
    mapped nowhere; `parked_bytes` are in `parked_slots` slots. `lease` is what a broker lends, None without one.
    """

    sequences: int
    live_bytes: int
    mapped_bytes: int
    parked_bytes: int
    held_bytes: int
    budget_bytes: int
    admission_maps: int = 0
    critical_path_maps: int = 0
    ahead_maps: int = 0
    quarantined: int = 0
    live_mappings: int = 0
    device_mappings: int = 0
    max_mappings: int = 0
    surplus_bytes: int = 0
    lookahead: int = 0
    ahead_wait_s: float = 0.0
    retained_slots: int = 0
    retained_bytes: int = 0
    segment_tokens: int = 0
    suspended_sequences: int = 0
    host_bytes: int = 0
    host_held_bytes: int = 0
    window_bytes: int = 0
    free_bytes: int = 0
    free_extents: int = 0
    parked_slots: int = 0
    lease: Lease | None = None


class SlotStats(NamedTuple):
    """One slot at one moment: its state (`memory.slot.SlotState`, by its value), the tokens of its sequence, how many
    are backed, and the bytes that are mapped in it."""

    slot: int
    state: str
    length: int
    frontier: int
    mapped_bytes: int


@dataclass(frozen=True)
class Transfers:
    """Copies between the device and pinned host memory: bytes and seconds out and in, each with its wait for the
    device."""

    out_bytes: int = 0
    out_s: float = 0.0
    in_bytes: int = 0
    in_s: float = 0.0


class KVCache(ABC):
    """One KV cache; see the module's numbered contract. Not thread-safe."""

    remaps: ClassVar[bool] = False
    """Whether the memory beneath its fixed addresses can be moved; calls that need it raise ConfigError otherwise."""
    shape: CacheShape
    device: torch.device
    lengths: np.ndarray
    """int64 ``[num_slots]``, tokens of each slot's sequence, 0 for a free slot. Read-only for callers."""
    frontiers: np.ndarray
    """int64 ``[num_slots]``, tokens backed by memory, 0 for a free slot. Read-only for callers."""

    @property
    def lower_edges(self) -> np.ndarray | None:
        """int64 ``[num_slots]``, the first token of each slot that lies in its own memory; None where all are 0."""
        return None

    @property
    def retained_frontiers(self) -> np.ndarray | None:
        """int64 ``[num_slots]``, tokens backed by memory in each retained slot, 0 for others; None without any."""
        return None

    @property
    def segments(self) -> np.ndarray | None:
        """int64 ``[segments, 4]``: (holder, owner, start, stop) of tokens `start` to `stop` (excluded) of the sequence
        in slot `holder` that lie in slot `owner`, at the same positions; a holder's in order. None without any."""
        return None

    @property
    def write_floors(self) -> np.ndarray | None:
        """int64 ``[num_slots]``, the first token of each slot that may be written: those before it lie in other slots,
        or in memory that is shared. None where all are 0."""
        return None

    @property
    def num_groups(self) -> int:
        """Range groups, which may hold different numbers of a sequence's tokens; 1 where all hold the same."""
        return 1

    def lengths_of(self, group: int) -> np.ndarray:
        """int64 ``[num_slots]``: how many tokens of each slot's sequence a range group holds."""
        return self.lengths

    @property
    def length_deficits(self) -> torch.Tensor | None:
        """int32 ``[num_groups, num_slots + 1]`` on the device, at one address for life: how many tokens fewer than
        `lengths` each group holds of each slot's sequence. None where all hold the same."""
        return None

    @property
    def dummy_slot(self) -> int:
        """Index of the slot that padding writes to; always backed for at least one token."""
        return self.shape.num_slots

    def bytes_of(self, tokens: int) -> int:
        """Bytes of physical memory that a sequence of so many tokens takes."""
        return self.shape.kept_bytes(tokens)

    @property
    def bytes_for_sequences(self) -> int:
        """Bytes of physical memory that all sequences together may take now."""
        return self.shape.num_slots * self.shape.kept_bytes(self.shape.max_seq_len)

    @property
    def longest_alone(self) -> int:
        """Tokens of the longest sequence that fits where it is the only one; 0 where the budget is the dummy slot's."""
        return self.shape.max_seq_len

    @abstractmethod
    def admit(
        self, sequence: SequenceId, prompt_len: int, *, prefix: Tokens | None = None, alias: Tokens | None = None
    ) -> int:
        """Give a sequence a slot backed for `prompt_len` tokens; returns the slot.

        Parameters
        ----------
        prefix : (slot or RetainedSlot, int) or None
            The sequence's first so many tokens are read in that slot, by `segments`; its own memory begins behind
            them. Until the sequence is released, that slot keeps its tokens and its place.
        alias : (slot or RetainedSlot, int) or None
            The sequence begins with that slot's first so many tokens: extents that hold nothing else are mapped in
            both slots, and written in neither; the rest is copied on the current stream.

        Raises
        ------
        DuplicateSequence, SequenceTooLong, NoFreeSlot, KVCacheOutOfMemory
            Nothing changed.
        ConfigError
            The slot holds fewer tokens, or the cache has no memory that can be shared.
        PrefixEvicted
            So many tokens are not kept any more.
        """

    @abstractmethod
    def extend(self, sequence: SequenceId, tokens: int) -> None:
        """Lengthen a sequence by `tokens`, backed. Raises UnknownSequence, SequenceTooLong, KVCacheOutOfMemory."""

    @abstractmethod
    def truncate(self, sequence: SequenceId, length: int) -> None:
        """Shorten a sequence to `length` tokens; its memory stays. Raises UnknownSequence, ConfigError: of a sequence
        longer than a layer's window, the tokens that left that window are gone, which a shorter one would need."""

    @abstractmethod
    def release(self, sequence: SequenceId) -> None:
        """End a sequence; its slot is free for the next one. Raises UnknownSequence, ConfigError where other sequences
        read its slot: release those first, or `retain` it."""

    @abstractmethod
    def prepare_step(self, lengths: np.ndarray) -> None:
        """Back a whole batch for one step: `lengths` is int ``[num_slots]``, each slot's length after the step, 0 where
        the slot takes no part. For all or for none.

        Raises UnknownSequence, SequenceTooLong, KVCacheOutOfMemory, ConfigError.
        """

    def roll_back(self, lengths: np.ndarray) -> None:
        """Shorten a whole batch: `lengths` is int ``[num_slots]``, each slot's length from now on, 0 where it stays. No
        memory is unmapped and the driver is not called: what lies behind is written again. For all or for none.

        Raises ConfigError where a sequence would become longer, and where other sequences read what lies behind
        (`truncate` copies that).
        """
        self._cannot("roll lengths back")

    def expect_growth(self, tokens: int) -> None:  # noqa: B027
        """A sequence may grow by up to so many tokens in one launch, whatever it grew by of late: memory is
        mapped ahead for it. Nothing to do where memory is backed from the start."""

    def trace_to(self, trace: Trace) -> None:  # noqa: B027
        """Note in a trace, from now on: each call that changes the cache, which sequence is in which slot, and what is
        done in the background. Driver calls are noted by a `TracingDriver` that the cache is built over."""

    def map_ahead(self) -> int:
        """Back tokens that coming steps will need; returns the number of mappings made.

        Called while the device is busy with a step. Nothing to do where memory is backed from the start.
        """
        return 0

    def start_thread(self) -> None:  # noqa: B027
        """Have `map_ahead` done by a thread of its own from now on, where there is anything to map."""

    @abstractmethod
    def layer(self, layer: int) -> FlatKV | PagedKV:
        """The tensors of one layer; the same objects every time. Raises ConfigError where its heads have memory of
        their own: `head_groups`."""

    def head_groups(self, layer: int) -> tuple[FlatKV | PagedKV, ...]:
        """The tensors of one layer, one of each part of its heads that has memory of its own, in the heads' order."""
        return (self.layer(layer),)

    def group_of(self, layer: int, heads: int = 0) -> int:
        """The range group of a layer and a part of its heads."""
        return 0

    @abstractmethod
    def storages(self) -> list[torch.Tensor]:
        """Every tensor whose storage a captured step may touch (views share them)."""

    def regions(self) -> list[Region]:
        """Where the addresses lie that a captured step may touch: the storages, or reservations where it has them."""
        return tensor_regions(STATIC, self.storages())

    @abstractmethod
    def sequence_at(self, slot: int) -> SequenceId | None:
        """The sequence that owns a slot."""

    @abstractmethod
    def slot_of(self, sequence: SequenceId) -> int:
        """The slot of a sequence. Raises UnknownSequence."""

    @abstractmethod
    def stats(self) -> CacheStats:
        """Bytes and counts now. From any thread, beside whatever the cache does; of one that sleeps, too. Raises
        ManagerClosed, WrongProcess."""

    def slot_stats(self) -> list[SlotStats]:
        """Slots that hold anything, in order. From any thread, as `stats`."""
        lengths, frontiers = self.lengths.tolist(), self.frontiers.tolist()
        size = self.shape.token_bytes
        return [
            SlotStats(slot, "running", length, frontiers[slot], frontiers[slot] * size)
            for slot, length in enumerate(lengths)
            if length
        ]

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise InvariantViolation, with its numbers, where the cache's own counts contradict one another."""

    @abstractmethod
    def reset(self) -> None:
        """Drop every sequence and take their memory back, once the device is done with it; the cache is as it was built
        then, with its budget, and tensors and addresses stay. Idempotent.

        For whoever was interrupted and does not know what became of a call (`sequence_at` tells what there is).
        """

    @abstractmethod
    def close(self) -> None:
        """Give everything back. Idempotent; where it raised or was interrupted, calling again goes on."""

    # -- capabilities: what not every cache can do ------------------------------------------------------------------

    def _cannot(self, what: str) -> NoReturn:
        raise ConfigError(f"a {type(self).__name__} has its memory for life and cannot {what}; use the vattn cache")

    @property
    def budget_bytes(self) -> int:
        """Bytes of physical memory that the cache may hold."""
        return self.stats().budget_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes of physical memory that the cache holds."""
        return self.stats().held_bytes

    def borrow(self, tenant: Lender, beside: bool = True, keeper: Keeper | None = None) -> None:
        """Have the budget follow what a broker lends to this process from now on (tenancy/README.md), and never be
        larger than `set_budget` said last. The cache's driver has to be a `BrokerDriver` of this tenant, which is
        closed with the cache. Without `beside` memory is given back by `follow_budget` alone, and else as soon as the
        broker asks, beside running steps. `keeper` knows the leases, where they outlive this process. Raises
        ConfigError where the broker cannot promise what the dummy slot takes, or the cache cannot give memory back."""
        self._cannot("borrow it")

    def take_over(self, slots: Mapping[int, KeptSlot], tokens: Mapping[int, int]) -> None:
        """Have sequences that another process left in a broker's memory at the same slots and offsets: by their number,
        with so many tokens each. Raises ConfigError, KVCacheOutOfMemory or DriverError."""
        self._cannot("take another's over")

    def begin_journal(self, state: State) -> None:
        """Note in a broker's journal what changes from `state` on, which is what there is now. Raises ConfigError where
        that does not fit the journal."""
        self._cannot("be taken over by another process")

    def end_journal(self) -> None:  # noqa: B027
        """Nothing outlives this process any more, and nothing is noted; where there is no journal, nothing changes."""

    def note_placements(self) -> None:  # noqa: B027
        """Before a launch, which is refused where the cache is in no state for one: note where sequences' memory lies,
        if that has changed and is journaled."""

    @property
    def asked_to_sleep(self) -> bool:
        """Whether the operator of a broker, whose the memory is, wants it all back until further notice."""
        return False

    @property
    def waits_for_memory(self) -> bool:
        """Whether memory that is short now may come later, from others whom it was lent to: nobody fails for it."""
        return False

    @property
    def remedy(self) -> str:
        """What to do for a sequence that the cache has too little memory for."""
        return "raise the budget"

    def follow_budget(self) -> int:
        """Between steps, have the budget be what a broker lends, where the memory is a broker's; parked and retained
        memory beyond it is given back. Returns the bytes that are owed all the same: who runs has to be preempted."""
        return 0

    def mark_changing(self, changing: bool) -> None:  # noqa: B027
        """Whether somebody looks retained slots up and then uses what was found: none is evicted meanwhile for a
        broker, but for those calls of this cache."""

    def report_demand(self, prompts: Iterable[int], at_once: bool = False) -> None:  # noqa: B027
        """Tell the broker, where the memory is a broker's, what is used, and that prompts of these tokens wait: now and
        then, however often it is called, or `at_once`."""

    def wait_for_memory(self, timeout_s: float) -> None:  # noqa: B027
        """Return once a broker lends more or less than before, or after so many seconds; at once without one."""

    def set_budget(self, budget: int | str) -> None:
        """Raise or lower the bytes (``"40GiB"`` too) of physical memory that the cache may hold; no address changes.

        Raises ConfigError for too little and where the cache cannot; KVCacheOutOfMemory where running sequences have
        more: release or preempt some first. Nothing changed then.
        """
        self._cannot("change its budget")

    def move(self, sequence: SequenceId, slot: int) -> int:
        """Give a running sequence another, free slot by remapping; returns the mappings made."""
        self._cannot("move a sequence")

    def fork(self, sequence: SequenceId, new_sequence: SequenceId, tokens: int) -> int:
        """Begin a sequence with the first `tokens` of another one; returns its slot."""
        self._cannot("fork a sequence")

    def replace(self, sequence: SequenceId) -> int:
        """Put other physical memory with the same bytes under a sequence; returns the mappings replaced."""
        self._cannot("replace a sequence's memory")

    def retain(self, sequence: SequenceId) -> RetainedSlot:
        """End a sequence, but keep its tokens in its slot, for sequences that begin with the same ones.

        Its memory counts under the budget, and is taken back when it is needed: from the slot's tail, slots of lower
        priority first, then those that were used longest ago (`touch`). What a running sequence reads stays.
        """
        self._cannot("retain a sequence")

    def retained_tokens(self, retained: RetainedSlot) -> int:
        """How many of the tokens are still kept; 0 where they were evicted."""
        self._cannot("retain a sequence")

    def adopt(
        self, retained: RetainedSlot, sequence: SequenceId, keep_tokens: int, prompt_len: int | None = None
    ) -> int:
        """Begin a sequence of `prompt_len` tokens in a retained slot, with the first `keep_tokens` tokens that are kept
        there; returns the slot. None is no more than these.

        What it shares behind them is copied first. Raises as `admit`, and ConfigError where other sequences read behind
        `keep_tokens`, or they end within tokens that lie in other slots; nothing changed.
        """
        self._cannot("retain a sequence")

    def release_retained(self, retained: RetainedSlot, keep_tokens: int = 0) -> None:
        """Keep no more than the first `keep_tokens` tokens. Idempotent. Raises ConfigError where other sequences read
        behind them."""
        self._cannot("retain a sequence")

    def touch(self, retained: RetainedSlot, priority: float = 0.0) -> None:
        """The tokens were used now. Slots of lower priority are evicted first, one of ``math.inf`` never. Does nothing
        where they were evicted."""
        self._cannot("retain a sequence")

    def take_evicted(self) -> list[tuple[RetainedSlot, int]]:
        """Retained slots that memory was taken from since the last call, and how many tokens each kept, in order."""
        return []

    def copy_prefix(self, owner: int | RetainedSlot, sequence: SequenceId, tokens: int) -> None:
        """Copy the first `tokens` tokens of a slot over those of a running sequence, on the current stream: one copy a
        range. Raises ConfigError where either has fewer, or the sequence's are not its own memory; PrefixEvicted."""
        self._cannot("copy between slots")

    def make_writable(self, sequence: SequenceId, start: int) -> None:  # noqa: B027
        """Have tokens of a sequence from `start` on lie in memory that it shares with nobody; waits for the device
        where they do not. Raises ConfigError where they lie in other slots, KVCacheOutOfMemory, DriverError."""

    def set_length(self, sequence: SequenceId, group: int, tokens: int) -> None:
        """A range group holds no more than the first `tokens` tokens of a sequence from now on; `lengths` has the
        longest group's number. Whole extents behind them are unmapped once work submitted so far is done.

        Raises ConfigError where it holds fewer, where other sequences read the slot, or where ranges have no lengths of
        their own (`CacheConfig.own_lengths`).
        """
        self._cannot("give ranges lengths of their own")

    def keep_places(self, sequence: SequenceId, places: Sequence[Sequence[torch.Tensor]]) -> int:
        """Of a sequence, keep the tokens at these places, moved to the front of its slot, and evict all others; returns
        the bytes that are mapped for it no more. ``places[layer][part]`` is int64 ``[heads, tokens]`` on the device, by
        part of a layer's heads (`head_groups`), ascending; as many in all layers and heads of a range group.

        `lengths` stays: it counts positions, where the sequence goes on. `lengths_of` and `length_deficits` say what
        each group holds. Whole extents behind are unmapped once work submitted so far is done. Waits for the device.

        Raises ConfigError for places that are not there, where other sequences read the slot, or where ranges have no
        lengths of their own (`CacheConfig.own_lengths`); KVCacheOutOfMemory, DriverError. Nothing changed.
        """
        self._cannot("give ranges lengths of their own")

    # -- other machines ----------------------------------------------------------------------------------------------

    def extents(self, sequence: SequenceId) -> list[ExtentPlace]:
        """The mappings that hold a sequence's tokens, by range and in order; they stay until it ends, or is moved.

        Raises ConfigError where its tokens lie in other slots, or its ranges hold different ones.
        """
        self._cannot("say where a sequence's extents are")

    @property
    def byte_order(self) -> dict[str, Any]:
        """What has to be equal for a slot's bytes in one cache to mean the same in another: sizes, and their order."""
        self._cannot("say how its bytes are ordered")

    # -- host memory -------------------------------------------------------------------------------------------------

    def suspend(self, sequence: SequenceId, *, wait: bool = True) -> int:
        """Copy a sequence's tokens to pinned host memory and give its memory to others; returns the bytes copied.

        Nothing is mapped for it any more, but its slot stays its own, so that `resume` brings the tokens back at the
        same addresses. Until then it can be resumed or released, and nothing else. Tokens that it reads in other slots
        stay there, held. Waits for the device; without `wait` the copies go on beside what is submitted next, and
        others get the memory when they are done.

        Raises
        ------
        UnknownSequence, DriverError
            Nothing changed.
        ConfigError
            Other sequences read its slot, or the cache cannot.
        MemoryQuarantined
            An unmap failed in its slot.
        HostMemoryFull
            `host_memory` is too small for its tokens, beside what is suspended already; nothing changed.
        """
        self._cannot("suspend a sequence")

    def resume(self, sequence: SequenceId, tokens: int | None = None, *, wait: bool = True) -> int:
        """Bring a suspended sequence's tokens back; returns its slot, which is the one it had, unless an unmap failed
        there meanwhile. `tokens` backs it for so many, as `extend` would. Waits for the device; without
        `wait` the copies go on beside what is submitted next, and every call that names the sequence, or a step of it,
        waits for them: ask `has_arrived` first.

        Raises UnknownSequence for one that is not suspended, SequenceTooLong, KVCacheOutOfMemory, DriverError; it is
        suspended as before then.
        """
        self._cannot("suspend a sequence")

    def has_arrived(self, sequence: SequenceId) -> bool:
        """Whether a sequence that was resumed without waiting has its tokens by now; True for every other one."""
        return True

    def is_suspended(self, sequence: SequenceId) -> bool:
        """Whether a sequence's tokens are in host memory."""
        return False

    @property
    def transfers(self) -> Transfers:
        """What was copied to and from host memory so far."""
        return Transfers()

    def sleep(self, keep: bool) -> int:
        """Give all physical memory back to the driver, the dummy slot's too; returns its bytes. Addresses, tensors and
        captured graphs stay, and must not be used until `wake`; every other call but `reset` and `close` raises
        CacheAsleep.

        With `keep`, running and retained sequences go to host memory, with what they share and read of one another.
        Else retained ones are forgotten; suspended ones stay in host memory either way.

        Raises ConfigError without `keep` where sequences run: release them first. As `suspend` else; nothing changed.
        """
        self._cannot("give its memory back")

    def wake(self) -> int:
        """Have the memory again that `sleep` gave back, with the tokens that it kept, at the same addresses; returns
        the bytes copied. Does nothing to a cache that is awake. Raises KVCacheOutOfMemory, DriverError, or
        MemoryQuarantined where an earlier call could not take back what it had mapped there, and this one cannot,
        either; it is asleep then, and calling again tries again."""
        self._cannot("give its memory back")

    @property
    def host_bytes(self) -> tuple[int, int]:
        """Bytes of pinned host memory that hold tokens, and all that are pinned."""
        return 0, 0

    @property
    def is_asleep(self) -> bool:
        """Whether it gave its memory back by `sleep`."""
        return False

    def preallocate(self, sequences: int, tokens: int) -> None:  # noqa: B027
        """Keep enough memory created ahead for a burst of so many prompts of so many tokens, within the budget.

        The cache's thread creates it (`start_thread`), and again when less than half is left; without a thread it is
        created now, once. Nothing to do where memory is backed from the start. Raises ConfigError, DriverError.
        """

    def preallocate_for(self, prompts: Sequence[int]) -> None:  # noqa: B027
        """Have the thread keep memory created ahead for prompts of these tokens, which will come in this order: for
        those that find no parked slot, as far as the budget goes. Waits for nothing; needs `start_thread`."""

    def free_slots(self) -> list[int]:
        """Slots that a sequence may be given, in order."""
        return [slot for slot in range(self.shape.num_slots) if self.sequence_at(slot) is None]

    def broken_slots(self) -> list[int]:
        """Slots whose memory cannot grow any more, because a driver call failed in them."""
        return []

    def mappings_in(self, slot: int) -> int:
        """Mappings that back a slot."""
        return 0

    def release_free_memory(self, size: int | None = None) -> int:
        """Unmap `size` bytes of memory that no sequence uses, for the next sequences to take; None gives all of it back
        to the driver. Returns the bytes."""
        return 0

    def placement(self) -> Placement | None:
        """How nearly slots' memory lies in the order of its creation; None where it is one allocation."""
        return None

    def shuffle_free_memory(self, seed: int) -> None:  # noqa: B027
        """Put free pages, or blocks, in a random order, as hours of service leave them; for measurements."""

    def at_once(self, call: Callable[..., T], *arguments: Any) -> T:
        """``call(*arguments)``, which makes several calls of this cache: for a cache that has its calls made where no
        signal interrupts them, all of it is made there. It is interrupted before or behind it then, not inside."""
        return call(*arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
