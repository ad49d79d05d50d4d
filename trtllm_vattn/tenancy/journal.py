"""What an engine has, noted in memory that its broker holds, so that it outlives the engine's process however it ends.

The memory is two halves. One begins with a record of everything (a checkpoint), behind which records of changes follow;
when it is full, the next checkpoint begins the other half. A record is its length, a checksum, a number that is one
greater than that of the record before, and msgpack. What was being written when the process ended has a wrong length,
checksum or number, and is not there: the records before it are the state. A record's bytes are written before its head,
and nothing that depends on a record (an extent used again, a token given to the consumer) is done before it.

A process that is killed does not take its stores to shared memory back; a machine that loses power does.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import msgspec

from trtllm_vattn.errors import ConfigError

HALF = 16 << 20
SIZE = 2 * HALF
"""Bytes; pages that nothing was written to take no memory."""
_HEAD = struct.Struct("<IIQ")
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode

Stripes = list[tuple[int, list[int]]]
"""Of one range group, one after another: bytes a range, and the lease of each range."""


@dataclass
class KeptRequest:
    """A request as the journal has it: what it was submitted with, its tokens so far, why it ended, if it did, and how
    many tokens it had `known` when it came to its slot: before the next one, not all of them need be stored there."""

    settings: dict[str, Any]
    chosen: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    known: int = 0


@dataclass
class KeptSlot:
    """The sequence in a slot, and what is mapped there, by range group: the first byte, and stripes."""

    owner: int
    groups: list[tuple[int, Stripes]]

    def leases(self) -> set[int]:
        """Of all its memory."""
        return {lease for _, stripes in self.groups for _, leases in stripes for lease in leases}


@dataclass
class State:
    """All that a journal says.

    Attributes
    ----------
    settings : dict
        What another engine has to have in common with the one that wrote it.
    next_number : int
        Greater than that of every request so far, forgotten ones too: a consumer may know them still.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    slots: dict[int, KeptSlot] = field(default_factory=dict)
    requests: dict[int, KeptRequest] = field(default_factory=dict)
    next_number: int = 0

    def apply(self, change: list[Any]) -> None:
        """Take a record in."""
        kind, *what = change
        if kind == "all":
            settings, slots, requests, self.next_number = what
            self.settings = settings
            self.requests = {number: KeptRequest(*each) for number, each in requests}
            self.slots = {}
            self._set_slots(slots)
        elif kind == "slots":
            self._set_slots(what[0])
        elif kind == "add":
            self.requests[what[0]] = KeptRequest(what[1])
            self.next_number = max(self.next_number, what[0] + 1)
        elif kind == "forget":
            for number in what[0]:
                self.requests.pop(number, None)
        else:
            for number, place, token, reason in what[0]:
                request = self.requests[number]
                if token is not None:
                    request.chosen[place:] = [token]
                request.finish_reason = reason

    def _set_slots(self, slots: list[Any]) -> None:
        for index, owner, groups, is_new in slots:
            if is_new and (request := self.requests.get(owner)) is not None:
                request.known = len(request.chosen)
            if owner is None:
                self.slots.pop(index, None)
            else:
                kept = [(lower, [(size, list(leases)) for size, leases in stripes]) for lower, stripes in groups]
                self.slots[index] = KeptSlot(owner, kept)

    def whole(self) -> list[Any]:
        """The record of everything."""
        slots = [(index, slot.owner, slot.groups, False) for index, slot in self.slots.items()]
        requests = [
            (number, (each.settings, each.chosen, each.finish_reason, each.known))
            for number, each in self.requests.items()
        ]
        return ["all", self.settings, slots, requests, self.next_number]

    def kept_slots(self) -> dict[int, KeptSlot]:
        """Slots of sequences that got a token there and have not ended: those that another engine goes on with. Who was
        preempted, and whose tokens were on their way back, to be computed or copied, is not among them."""
        return {
            index: slot
            for index, slot in self.slots.items()
            if (request := self.requests.get(slot.owner)) is not None
            and len(request.chosen) > request.known
            and request.finish_reason is None
        }


class Journal:
    """Reads, then writes, the journal over a descriptor, which stays the caller's. One thread at a time.

    Attributes
    ----------
    state : State
        What it says now.
    is_written : bool
        Whether anything readable was there.
    """

    def __init__(self, descriptor: int) -> None:
        if os.fstat(descriptor).st_size < SIZE:
            raise ConfigError("a broker's journal is too short; the broker is of another version")
        self._memory = mmap.mmap(descriptor, SIZE)
        self._half, self._at, self._number = 0, 0, 0
        self.state = State()
        self.is_written = False
        self._read()

    def _read(self) -> None:
        found = [(number, half) for half in (0, 1) if (number := self._number_at(half * HALF)) is not None]
        # The newer half first; its checkpoint may be torn, which its checksum tells.
        for _, half in sorted(found, reverse=True):
            at, state, number = half * HALF, State(), None
            while (record := self._record_at(at, (half + 1) * HALF, number)) is not None:
                number, change, at = record
                if not (state.settings or change[0] == "all"):
                    break
                state.apply(change)
            if number is not None:
                self._half, self._at, self._number, self.state = half, at, number, state
                self.is_written = True
                return

    def _number_at(self, at: int) -> int | None:
        length, _, number = _HEAD.unpack_from(self._memory, at)
        return number if length else None

    def _record_at(self, at: int, end: int, before: int | None) -> tuple[int, list[Any], int] | None:
        if at + _HEAD.size > end:
            return None
        length, checksum, number = _HEAD.unpack_from(self._memory, at)
        start = at + _HEAD.size
        if not 0 < length <= end - start or (before is not None and number != before + 1):
            return None
        payload = self._memory[start : start + length]
        if zlib.crc32(payload, number & 0xFFFFFFFF) != checksum:
            return None
        return number, _decode(payload), start + length

    def begin(self, state: State) -> None:
        """What was read is taken over, or given up: from now on this is the state, without slots that nobody took."""
        self.state = state
        state.slots = state.kept_slots()
        self._checkpoint()

    def write(self, *change: Any) -> None:
        """Note a change."""
        self.state.apply(list(change))
        payload = _encode(change)
        if self._at + _HEAD.size + len(payload) > (self._half + 1) * HALF:
            self._checkpoint()
        else:
            self._put(payload)

    def _checkpoint(self) -> None:
        payload = _encode(self.state.whole())
        if _HEAD.size + len(payload) > HALF:
            raise ConfigError(
                f"the journal has {HALF:,} bytes, and what runs takes {len(payload):,}; run fewer or shorter requests"
            )
        self._half = 1 - self._half
        self._at = self._half * HALF
        self._put(payload)

    def _put(self, payload: bytes) -> None:
        self._number += 1
        start = self._at + _HEAD.size
        self._memory[start : start + len(payload)] = payload
        head = _HEAD.pack(len(payload), zlib.crc32(payload, self._number & 0xFFFFFFFF), self._number)
        self._memory[self._at : start] = head
        self._at = start + len(payload)

    def close(self) -> None:
        """Unmap it. Idempotent."""
        self._memory.close()
