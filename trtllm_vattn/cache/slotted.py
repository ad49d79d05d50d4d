"""Sequences, slots and lengths: the part of the contract that every cache keeps alike."""

from __future__ import annotations

import os
import weakref
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch

from trtllm_vattn.cache.base import CacheShape, KVCache, SequenceId, Tokens
from trtllm_vattn.errors import (
    CacheInterrupted,
    ConfigError,
    DuplicateSequence,
    InvariantViolation,
    ManagerClosed,
    NoFreeSlot,
    SequenceTooLong,
    UnknownSequence,
    VattnError,
    WrongProcess,
)
from trtllm_vattn.trace import Trace
from trtllm_vattn.vmm.uninterrupted import drain

T = TypeVar("T")
NOTHING = nullcontext()
PLACED, LEFT = "sequence placed", "sequence left"
"""Events of a trace: a sequence has a slot, and has it no more."""
_caches: weakref.WeakSet[SlottedCache] = weakref.WeakSet()


class SlottedCache(KVCache):
    """Checks every call against the contract, and knows sequences, slots and lengths; subclasses manage the memory by
    the hooks below."""

    def __init__(self, shape: CacheShape, device: torch.device | str) -> None:
        self.shape = shape
        self.device = torch.device(device)
        self.lengths = np.zeros(shape.num_slots, np.int64)
        self.frontiers = np.zeros(shape.num_slots, np.int64)
        self._slot_of: dict[SequenceId, int] = {}
        self._owner: dict[int, SequenceId] = {}
        self._occupied = np.zeros(shape.num_slots, np.bool_)
        self._flags = np.zeros(shape.num_slots, np.bool_)
        self._closed = False
        self._process = os.getpid()
        self._needs_check = False
        """Whether the next call must look first whether the last one was cut short, the cache is closed, or the process
        is another."""
        self._call_under_way: str | None = None
        self._trace: Trace | None = None
        _caches.add(self)

    # -- hooks -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def _allocate(self, tokens: int) -> int:
        """Choose a free slot, of which there is at least one, and back it for `tokens`; returns it. Where it raises,
        nothing changed."""

    @abstractmethod
    def _grow(self, lengths: np.ndarray) -> None:
        """Raise the frontier of every slot to `lengths` where it is lower. Where it raises, no frontier changed."""

    @abstractmethod
    def _release(self, slot: int) -> None:
        """A slot's sequence has ended."""

    @abstractmethod
    def _clear(self) -> None:
        """All sequences have ended; take their memory back."""

    @abstractmethod
    def _free(self) -> None:
        """Give all memory back; called by `close()`, again where it raised."""

    # -- contract --------------------------------------------------------------------------------------------------

    def admit(
        self, sequence: SequenceId, prompt_len: int, *, prefix: Tokens | None = None, alias: Tokens | None = None
    ) -> int:
        if prefix is not None or alias is not None:
            return self._admit_with(sequence, prompt_len, prefix, alias)
        self._check_new(sequence, prompt_len)
        return self._run(self._do_admit, sequence, prompt_len)

    def _admit_with(self, sequence: SequenceId, prompt_len: int, prefix: Tokens | None, alias: Tokens | None) -> int:
        self._cannot("begin a sequence with another slot's tokens")

    def _do_admit(self, sequence: SequenceId, prompt_len: int) -> int:
        slot = self._allocate(prompt_len)
        self._place_sequence(sequence, slot, prompt_len)
        return slot

    def extend(self, sequence: SequenceId, tokens: int) -> None:
        slot = self.slot_of(sequence)
        if tokens < 0:
            raise ConfigError(f"cannot extend sequence {sequence!r} by {tokens} tokens; use truncate to shorten it")
        lengths = np.zeros_like(self.lengths)
        lengths[slot] = self.lengths[slot] + tokens
        self.prepare_step(lengths)

    def truncate(self, sequence: SequenceId, length: int) -> None:
        slot = self.slot_of(sequence)
        if not 0 < length <= self.lengths[slot]:
            raise ConfigError(
                f"sequence {sequence!r} has {self.lengths[slot]} tokens; it can be truncated to between 1 and that, "
                f"not to {length}"
            )
        self._check_window(slot, length)
        self.lengths[slot] = length

    def _check_window(self, slot: int, tokens: int) -> None:
        """Raise ConfigError where a layer's window has gone on beyond what the first `tokens` tokens of a running slot
        need."""
        shortest = min((each for each in self.shape.windows if each is not None), default=None)
        length = int(self.lengths[slot])
        if shortest is not None and shortest < length != tokens:
            raise ConfigError(
                f"sequence {self._owner[slot]!r} has {length} tokens, of which a layer keeps the last {shortest}, so "
                f"there are no windows of its first {tokens}; compute them anew"
            )

    def release(self, sequence: SequenceId) -> None:
        self._run(self._do_release, sequence, self.slot_of(sequence))

    def _do_release(self, sequence: SequenceId, slot: int) -> None:
        self._release(slot)
        self._remove_sequence(sequence, slot)

    def _remove_sequence(self, sequence: SequenceId, slot: int) -> None:
        """A sequence is in no slot any more."""
        del self._slot_of[sequence], self._owner[slot]
        self._occupied[slot] = False
        self.lengths[slot] = 0
        self._note(LEFT, sequence, slot)

    def prepare_step(self, lengths: np.ndarray) -> None:
        self._check_open()
        if lengths.shape != self.lengths.shape:
            raise ConfigError(f"lengths has shape {lengths.shape}; one entry a slot is needed: {self.lengths.shape}")
        # In most steps all frontiers are far enough and nothing becomes shorter, so only that is tested first. This
        # runs before every step, with the processor's caches cold: it makes few calls and no new arrays.
        flags = self._flags
        np.greater(lengths, self.frontiers, out=flags)
        unusual = np.count_nonzero(flags)
        np.less(lengths, self.lengths, out=flags)
        if unusual or (np.count_nonzero(flags) and lengths[flags].any()):
            self._check_step(lengths)
            self._run(self._do_prepare_step, lengths)
        else:
            np.maximum(self.lengths, lengths, out=self.lengths)

    def roll_back(self, lengths: np.ndarray) -> None:
        self._check_open()
        if lengths.shape != self.lengths.shape:
            raise ConfigError(f"lengths has shape {lengths.shape}; one entry a slot is needed: {self.lengths.shape}")
        # Behind every step with drafts: few calls, and no new arrays.
        flags = self._flags
        if np.count_nonzero(np.greater(lengths, self.lengths, out=flags)):
            raise ConfigError(f"slots {np.flatnonzero(flags).tolist()} would become longer; use prepare_step")
        floors = self.write_floors
        np.greater(lengths, 0, out=flags)
        if floors is not None and (shared := (lengths < floors) & flags).any():
            slots = np.flatnonzero(shared).tolist()
            raise ConfigError(f"other sequences read what lies behind these lengths in slots {slots}; use truncate")
        self._check_roll_back(lengths)
        np.copyto(self.lengths, lengths, where=flags)

    def _check_roll_back(self, lengths: np.ndarray) -> None:
        """Raise ConfigError where lengths cannot go back for another reason."""

    def _do_prepare_step(self, lengths: np.ndarray) -> None:
        self._grow(lengths)
        np.maximum(self.lengths, lengths, out=self.lengths)

    def _check_step(self, lengths: np.ndarray) -> None:
        """Raise what is wrong with a step, if anything is."""
        active = lengths > 0
        if (active & ~self._occupied).any():
            slots = np.flatnonzero(active & ~self._occupied).tolist()
            raise UnknownSequence(f"slots {slots} hold no sequence; admit one, or pass 0 for them")
        if (lengths > self.shape.max_seq_len).any():
            worst = int(lengths.argmax())
            self._check_fits(self._owner[worst], int(lengths[worst]))
        if (active & (lengths < self.lengths)).any():
            slots = np.flatnonzero(active & (lengths < self.lengths)).tolist()
            raise ConfigError(f"slots {slots} would become shorter; use truncate")

    def sequence_at(self, slot: int) -> SequenceId | None:
        if self._needs_check and not self._closed:
            self._check_state()
        return self._owner.get(slot)

    def slot_of(self, sequence: SequenceId) -> int:
        self._check_open()
        try:
            return self._slot_of[sequence]
        except KeyError:
            raise UnknownSequence(
                f"no sequence {sequence!r} in the cache, which holds {len(self._slot_of)}; admit it first"
            ) from None

    def check_integrity(self) -> None:
        self._check_open()
        self._run(self._do_check_integrity)

    def _do_check_integrity(self) -> None:
        owned = {slot: sequence for sequence, slot in self._slot_of.items()}
        if owned != self._owner or sorted(owned) != np.flatnonzero(self._occupied).tolist():
            raise InvariantViolation(
                f"sequences own slots {owned}, slots are owned by {self._owner}, "
                f"occupied are {np.flatnonzero(self._occupied).tolist()}"
            )
        for slot in np.flatnonzero((self.lengths > self.frontiers) | ((self.lengths > 0) != self._occupied)).tolist():
            if not self._lost_memory(slot):
                raise InvariantViolation(
                    f"slot {slot} of sequence {self._owner.get(slot)!r}: length {self.lengths[slot]}, "
                    f"frontier {self.frontiers[slot]}"
                )

    def _lost_memory(self, slot: int) -> bool:
        """Whether a driver failure took memory away that its sequence needs."""
        return False

    def reset(self) -> None:
        if self._needs_check:
            self._check_state(recovering=True)
        self._run(self._do_reset)

    def _do_reset(self) -> None:
        self._clear()
        for sequence, slot in self._slot_of.items():
            self._note(LEFT, sequence, slot)
        self._slot_of.clear()
        self._owner.clear()
        self._occupied[:] = False
        self.lengths[:] = 0

    def close(self) -> None:
        if self._needs_check:
            self._check_process()
            drain()
        self._needs_check = self._closed = True
        self._free()

    def _move_sequence(self, sequence: SequenceId, slot: int) -> None:
        """A sequence is in another slot now."""
        old = self._slot_of[sequence]
        self._slot_of[sequence], self._owner[slot] = slot, self._owner.pop(old)
        self._occupied[[old, slot]] = False, True
        self.lengths[slot], self.lengths[old] = self.lengths[old], 0
        self._note(LEFT, sequence, old)
        self._note(PLACED, sequence, slot, tokens=int(self.lengths[slot]))

    def _place_sequence(self, sequence: SequenceId, slot: int, tokens: int) -> None:
        """A new sequence of so many tokens is in a slot."""
        self._slot_of[sequence], self._owner[slot] = slot, sequence
        self._occupied[slot] = True
        self.lengths[slot] = tokens
        self._note(PLACED, sequence, slot, tokens=tokens)

    def _check_new(self, sequence: SequenceId, tokens: int) -> None:
        """Raise unless a new sequence of so many tokens may come."""
        self._check_open()
        if sequence in self._slot_of:
            raise DuplicateSequence(f"sequence {sequence!r} is in slot {self._slot_of[sequence]} already; release it")
        if tokens < 1:
            raise ConfigError(f"the prompt of sequence {sequence!r} has {tokens} tokens; at least 1 is needed")
        self._check_fits(sequence, tokens)
        if len(self._slot_of) == self.shape.num_slots:
            raise NoFreeSlot(
                f"sequence {sequence!r} found all {self.shape.num_slots} slots taken; release one or build the cache "
                "with more slots"
            )

    # -- for siblings ----------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._needs_check:
            self._check_state()

    def _check_readable(self) -> None:
        """For calls that change nothing, from any thread, and of a cache in whatever state: raise WrongProcess, or
        ManagerClosed."""
        self._check_process()
        if self._closed:
            raise ManagerClosed("this cache is closed; build another")

    def _check_state(self, recovering: bool = False) -> None:
        """What `_needs_check` asks for, before a call begins; `recovering` is one that mends what was cut short."""
        self._check_process()
        if self._closed:
            raise ManagerClosed("this cache is closed; build another")
        drain()
        if self._call_under_way is not None and not recovering:
            raise CacheInterrupted(f"interrupted inside {self._call_under_way}(); call reset() or close()")
        self._needs_check = False

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise WrongProcess(f"this cache was made in process {self._process}; make one in this process")

    def _run(self, call: Callable[..., T], *arguments: Any) -> T:
        """Make a call that changes the cache. Where it is cut short (KeyboardInterrupt), or what it raises is not of
        those that change nothing, the cache says so from then on."""
        self._needs_check = True
        self._call_under_way = call.__name__.removeprefix("_do_")
        try:
            with self._noted(call):
                answer = call(*arguments)
        except VattnError:
            self._call_under_way = None
            raise
        self._call_under_way = None
        self._needs_check = False
        return answer

    def trace_to(self, trace: Trace) -> None:
        self._trace = trace

    def _noted(self, call: Callable[..., Any]) -> AbstractContextManager[None]:
        """A span of a call, where there is a trace."""
        if self._trace is None:
            return NOTHING
        return self._trace.spanning(call.__name__.removeprefix("_do_").removeprefix("_"), "cache")

    def _note(self, what: str, sequence: SequenceId, slot: int, **more: int) -> None:
        """What became of a sequence, where there is a trace."""
        if self._trace is not None:
            self._trace.instant(what, {"sequence": sequence, "slot": slot, **more}, "cache")

    def _check_fits(self, sequence: SequenceId, tokens: int) -> None:
        if tokens > self.shape.max_seq_len:
            raise SequenceTooLong(
                f"sequence {sequence!r} would have {tokens} tokens of a max_seq_len of {self.shape.max_seq_len}; "
                "shorten it or build the cache with a larger max_seq_len"
            )

    def _check_layer(self, layer: int) -> None:
        self._check_open()
        if not 0 <= layer < self.shape.num_layers:
            raise ConfigError(f"layer {layer} asked for; the cache has layers 0 to {self.shape.num_layers - 1}")

    def _lowest_free(self) -> int:
        return int(self._occupied.argmin())

    @property
    def live_bytes(self) -> int:
        """Bytes that hold tokens of sequences."""
        if not self.shape.windows:
            return int(self.lengths.sum()) * self.shape.token_bytes
        return sum(map(self.shape.kept_bytes, self.lengths.tolist()))


def _refuse_in_child() -> None:
    """What a forked child inherits is its parent's: the next call of it finds out."""
    for cache in _caches:
        cache._needs_check = True


os.register_at_fork(after_in_child=_refuse_in_child)
