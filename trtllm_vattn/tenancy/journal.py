"""What an engine has, noted in memory that its broker holds, so that it outlives the engine's process however it ends.

The memory is a head and two halves. A half begins with a record of everything (a snapshot), behind which records of
changes follow. When those are as long as the snapshot, or `TAIL`, the next snapshot is written to the other half, and
one word of the head says then that this half is what holds. A record is its length, a checksum, a number that is one
greater than that of the record before, and its bytes, which are written before these. So a process may be killed
between any two stores, or within one: what was being written has a wrong length, checksum or number and is not there,
the records before it are the state, and before the word is written the other half is. Nothing that depends on a record
(an extent used again, a token given to the consumer) is done before it.

It never fills. A snapshot has room for all that the slots may hold, and for all requests with all the tokens that they
may come to, which each of them is promised when it comes: who finds no room left is refused then (`check_room`), and
nobody later. Pages that nothing was written to take no memory.

A process that is killed does not take its stores to shared memory back; a machine that loses power does.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import os
import struct
import threading
import zlib
from array import array
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np

from trtllm_vattn.errors import ConfigError, EngineOverloaded, InvariantViolation

logger = logging.getLogger(__name__)

FORMAT = int.from_bytes(b"vattnJ03", "little")
"""The head's first word."""
KIND, LIVE = range(2)
"""Words of the head: `FORMAT`, and the half that holds, 1 or 2; 0 is none. Each changes in one byte."""
HEAD = mmap.PAGESIZE
TAIL = 1 << 20
"""Bytes of changes behind a snapshot, at least, before the next one is written (`tail_of`)."""
QUEUE = 256 << 20
"""Bytes for requests that wait, beside twice as many as there are slots, of the greatest length."""
MOST = 8 << 30
"""Bytes of a snapshot, at most."""
SETTINGS, SLOT, GROUP, LEASE, REQUEST, PARAMETERS = 4096, 40, 24, 24, 80, 1024
"""Bytes of a snapshot, at most: of the engine's settings, of a slot, of a range group of it, of a lease (with a stripe
of its own), of a request without its tokens and parameters, and of those of most requests."""
APPLIED_AT = 128
"""Changes that are taken into the state together, which takes less than one after another."""
TOKENS = 1
"""The first byte of a record of tokens, which no record of msgpack has: all requests' numbers follow, then all places,
then all tokens, of 8 bytes each."""
POPULATE_WRITE = 23
"""Linux' MADV_POPULATE_WRITE, which `mmap` has no name for."""
_HEAD = struct.Struct("<IIQ")
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode

Stripes = list[tuple[int, list[int]]]
"""Of one range group, one after another: bytes a range, and the lease of each range."""


def store(memory: mmap.mmap, at: int, data: bytes) -> None:
    """Every store to a journal's records; a test, or `bench survival`, ends the process in the middle of one."""
    memory[at : at + len(data)] = data


def store_word(words: memoryview[int], word: int, value: int) -> None:
    """Every store to a journal's head: one aligned word."""
    words[word] = value


def tail_of(snapshot: int) -> int:
    """Bytes of changes behind a snapshot of so many, before the next one is written."""
    return max(TAIL, snapshot)


class Token(Protocol):
    """A token that a request got, and its place there (`TokenEvent`)."""

    @property
    def request(self) -> int: ...
    @property
    def index(self) -> int: ...
    @property
    def token(self) -> int | None: ...


def _packed(tokens: Sequence[Token]) -> bytes:
    """The record of tokens. A step has hundreds of them: the less is done for each, the better."""
    numbers, places = [each.request for each in tokens], [each.index for each in tokens]
    return struct.pack(f"<B{3 * len(tokens)}q", TOKENS, *numbers, *places, *[each.token for each in tokens])


def is_begun(descriptor: int) -> bool:
    """Whether a journal's memory says anything."""
    return any(os.pread(descriptor, 8, 8 * LIVE))


@dataclass(frozen=True)
class Sizes:
    """What a journal has to have room for: `slots` sequences of `tokens` tokens at once, in `groups` range groups each,
    by `leases` leases in all."""

    slots: int
    tokens: int
    groups: int
    leases: int

    @property
    def placements(self) -> int:
        """Bytes of a snapshot for what is no request's."""
        return SETTINGS + self.slots * (SLOT + self.groups * GROUP) + self.leases * LEASE

    @property
    def file_bytes(self) -> int:
        """Of the journal's memory. Raises ConfigError where it would be too large."""
        running = self.slots * (REQUEST + PARAMETERS + 4 * (self.tokens + 1))
        snapshot = self.placements + 2 * running + QUEUE
        if snapshot > MOST:
            raise ConfigError(
                f"max_seqs is {self.slots:,} and max_seq_len {self.tokens:,}: a journal of all that may run takes "
                f"{snapshot:,} bytes, and has {MOST:,} at most; lower one of both, or leave keep_s out"
            )
        # A snapshot, and as many bytes of changes behind it, in each half.
        return HEAD + 2 * 2 * (-(-snapshot // HEAD) * HEAD)


@dataclass
class KeptRequest:
    """A request as the journal has it: its prompt, how many tokens it may come to, what else it was submitted with
    (msgpack), its tokens so far, why it ended, if it did, and how many tokens it had `known` when it came to its slot:
    before the next one, not all of them need be stored there."""

    prompt: array[int]
    max_tokens: int
    settings: bytes
    chosen: array[int] = field(default_factory=lambda: array("i"))
    finish_reason: str | None = None
    known: int = 0

    @classmethod
    def of(
        cls, prompt: Sequence[int], max_tokens: int, settings: dict[str, Any], chosen: Sequence[int] = ()
    ) -> KeptRequest:
        """One that was submitted with these."""
        return cls(array("i", prompt), max_tokens, _encode(settings), array("i", chosen))

    @property
    def most_bytes(self) -> int:
        """What it may come to take in a snapshot."""
        return REQUEST + len(self.settings) + 4 * (len(self.prompt) + self.max_tokens)

    def decoded(self) -> dict[str, Any]:
        """Its settings."""
        settings: dict[str, Any] = _decode(self.settings)
        return settings

    def set_token(self, place: int, token: int) -> None:
        """The token of a place, behind which there is none."""
        if place == len(self.chosen):
            self.chosen.append(token)
        else:
            self.chosen[place:] = array("i", (token,))

    def packed(self) -> list[Any]:
        """For a record."""
        prompt, chosen = self.prompt.tobytes(), self.chosen.tobytes()
        return [prompt, self.max_tokens, self.settings, chosen, self.finish_reason, self.known]

    @classmethod
    def unpacked(cls, packed: Sequence[Any]) -> KeptRequest:
        """From a record."""
        prompt, max_tokens, settings, chosen, reason, known = packed
        return cls(array("i", prompt), max_tokens, settings, array("i", chosen), reason, known)


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

    def apply(self, change: Sequence[Any]) -> None:
        """Take a record in."""
        kind, *what = change
        if kind == "all":
            self.settings, slots, requests, self.next_number = what
            self.requests = {number: KeptRequest.unpacked(each) for number, each in requests}
            self.slots = {}
            self._set_slots(slots)
        elif kind == "slots":
            self._set_slots(what[0])
        elif kind == "add":
            number, packed = what
            self.requests[number] = KeptRequest.unpacked(packed)
            self.next_number = max(self.next_number, number + 1)
        elif kind == "forget":
            for number in what[0]:
                self.requests.pop(number, None)
        elif kind == "ends":
            for number, place, token, reason in what[0]:
                if (request := self.requests.get(number)) is not None:
                    if token is not None:
                        request.set_token(place, token)
                    request.finish_reason = reason
        else:
            raise InvariantViolation(f"a journal's record is of the kind {kind!r}, which there is not")

    def set_tokens(self, records: Iterable[bytes]) -> None:
        """Take records of tokens in, without their first bytes."""
        # Mostly the same sequences step after step, of which each gets its next token.
        for _, alike in itertools.groupby(records, lambda record: record[: len(record) // 3]):
            run = list(alike)
            table = np.frombuffer(b"".join(run), np.int64).reshape(len(run), 3, -1)
            if not self._set_rows(table):
                self._set_each(table.transpose(0, 2, 1).reshape(-1, 3))

    def _set_rows(self, table: np.ndarray) -> bool:
        """Take tokens in (``[record][number, place, token][sequence]``) of which each record has the same numbers, none
        twice, and the next token of each; False, with nothing changed, where they are no such ones."""
        places, numbers = table[:, 1], table[0, 0].tolist()
        if len(set(numbers)) < len(numbers) or (places != places[0] + np.arange(len(table))[:, None]).any():
            return False
        known = [self.requests.get(number) for number in numbers]
        for request, first in zip(known, places[0].tolist(), strict=True):
            if request is not None and len(request.chosen) != first:
                return False
        tokens, each = table[:, 2].T.astype(np.int32).tobytes(), 4 * len(table)
        for at, request in enumerate(known):
            if request is not None:
                request.chosen.frombytes(tokens[at * each : (at + 1) * each])
        return True

    def _set_each(self, table: np.ndarray) -> None:
        """Take tokens in, a row each: number, place, token."""
        table = table[np.argsort(table[:, 0], kind="stable")]
        numbers, starts, counts = np.unique(table[:, 0], return_index=True, return_counts=True)
        known = [self.requests.get(number) for number in numbers.tolist()]
        lengths = np.array([0 if request is None else len(request.chosen) for request in known])
        is_next = table[:, 1] == np.arange(len(table)) + np.repeat(lengths - starts, counts)
        tokens = memoryview(table[:, 2].astype(np.int32).tobytes())
        for request, start, count in zip(known, starts.tolist(), counts.tolist(), strict=True):
            if request is None:
                continue
            if is_next[start : start + count].all():
                request.chosen.frombytes(tokens[4 * start : 4 * (start + count)])
                continue
            for _, place, token in table[start : start + count].tolist():
                request.set_token(place, token)

    def _set_slots(self, slots: Iterable[Any]) -> None:
        """Of each slot its sequence and, by range group, the first byte, how many of its stripes are not its own any
        more in front, how many behind those still are, and those that follow."""
        for index, owner, groups, is_new in slots:
            if is_new and (request := self.requests.get(owner)) is not None:
                request.known = len(request.chosen)
            if owner is None:
                self.slots.pop(index, None)
                continue
            slot = self.slots.setdefault(index, KeptSlot(owner, [(0, []) for _ in groups]))
            slot.owner = owner
            for place, ((_, stripes), (lower, front, keep, added)) in enumerate(zip(slot.groups, groups, strict=True)):
                # Mostly it grew: a long sequence's stripes are hundreds.
                del stripes[front + keep :], stripes[:front]
                stripes += [(size, list(leases)) for size, leases in added]
                slot.groups[place] = lower, stripes

    def whole(self) -> list[Any]:
        """The record of everything."""
        slots = [
            (index, slot.owner, [(lower, 0, 0, stripes) for lower, stripes in slot.groups], False)
            for index, slot in self.slots.items()
        ]
        requests = [(number, each.packed()) for number, each in self.requests.items()]
        return ["all", self.settings, slots, requests, self.next_number]

    def kept_slots(self, there: Container[int] | None = None) -> dict[int, KeptSlot]:
        """Slots of sequences that got a token there and have not ended: those that another engine goes on with. Who was
        preempted, and whose tokens were on their way back, to be computed or copied, is not among them; nor is a slot
        with a lease that is not `there`, where that is given."""
        return {
            index: slot
            for index, slot in self.slots.items()
            if (request := self.requests.get(slot.owner)) is not None
            and len(request.chosen) > request.known
            and request.finish_reason is None
            and (there is None or all(lease in there for lease in slot.leases()))
        }


class Journal:
    """Reads, then writes, the journal over a descriptor, which stays the caller's.

    From any thread. A call that a signal handler's exception ends is to be made again, and then done whole.

    Attributes
    ----------
    is_written : bool
        Whether anything readable was there.
    capacity : int
        Bytes of a snapshot, at most.
    placements : int
        Bytes of that for what is no request's (`Sizes`).
    pending, ends : list
        Tokens that are to be written with the next record, and ends of requests (number, place, token or None, reason).
        Who appends to them needs no lock.
    snapshots : int
        How many were written.
    """

    def __init__(self, descriptor: int, placements: int = 0) -> None:
        size = os.fstat(descriptor).st_size
        self._half_bytes = (size - HEAD) // 2
        self.capacity, self.placements = self._half_bytes // 2, placements
        if self.capacity < HEAD:
            raise ConfigError(f"a broker's journal has {size:,} bytes, which is too few; the broker is another version")
        self._memory = mmap.mmap(descriptor, size)
        self._words = memoryview(self._memory).cast("Q")
        self._lock = threading.Lock()
        self._where = 1, 0, 0, 0
        """The half, where its next record goes, the number of the last one, and where no record goes any more: one
        attribute, so that no interrupt finds one of them new and another old."""
        self._state = State()
        self._unapplied: list[bytes | tuple[Any, ...]] = []
        """Changes that are written, and are not in `_state`: tokens as they are written, and others."""
        self._room: dict[int, int] = {}
        """Bytes that each request was promised."""
        self.is_written = False
        self.pending: list[Token] = []
        self.ends: list[tuple[int, int, int | None, str]] = []
        self.snapshots = self._promised = 0
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    # -- reading ---------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        kind, live = self._words[KIND], self._words[LIVE]
        if not live:
            return
        if kind != FORMAT or live > 2:
            raise ConfigError(
                "the process before this one wrote its journal by another version; start that version, or begin anew "
                "without keep_s"
            )
        half = live - 1
        at = HEAD + half * self._half_bytes
        end, number, state = at + self._half_bytes, None, State()
        while (record := self._record_at(at, end, number)) is not None:
            payload = record[1]
            change = None if payload[0] == TOKENS else _decode(payload)
            if number is None and (change is None or change[0] != "all"):
                break
            if change is None:
                state.set_tokens([payload[1:]])
            else:
                state.apply(change)
            number, _, at = record
        if number is None:
            logger.error("the journal of the process before this one cannot be read; its sequences are lost")
            return
        self._where = half, at, number, at
        self._state, self.is_written = state, True

    def _record_at(self, at: int, end: int, before: int | None) -> tuple[int, bytes, int] | None:
        if at + _HEAD.size > end:
            return None
        length, checksum, number = _HEAD.unpack_from(self._memory, at)
        start = at + _HEAD.size
        if not 0 < length <= end - start or (before is not None and number != before + 1):
            return None
        payload = self._memory[start : start + length]
        if zlib.crc32(payload, number & 0xFFFFFFFF) != checksum:
            return None
        return number, payload, start + length

    @property
    def state(self) -> State:
        """What it says now."""
        with self._lock:
            self._apply()
            return self._state

    # -- writing ---------------------------------------------------------------------------------------------------

    def begin(self, state: State) -> None:
        """What was read is taken over, or given up: from now on this is the state. Raises ConfigError where it does not
        fit."""
        with self._lock:
            room = {number: each.most_bytes for number, each in state.requests.items()}
            promised = sum(room.values())
            if promised + self.placements > self.capacity:
                raise ConfigError(
                    f"the process before this one left requests of {promised:,} bytes, and this one's journal has room "
                    f"for {self.capacity - self.placements:,}; start it with the max_seqs and max_seq_len of before"
                )
            self._state, self._unapplied, self._room, self._promised = state, [], room, promised
            store_word(self._words, KIND, FORMAT)
            self._snapshot()

    def check_room(self, request: KeptRequest) -> None:
        """Raise EngineOverloaded for a request that there is no room for now, and ConfigError for one that there will
        never be room for."""
        room, most = self.capacity - self.placements, request.most_bytes
        if most > room:
            raise ConfigError(
                f"a request of {len(request.prompt):,} tokens, {request.max_tokens:,} to come and parameters of "
                f"{len(request.settings):,} bytes takes {most:,} bytes of the journal, which has room for {room:,}; "
                "make it smaller, or leave keep_s out"
            )
        if self._promised + most > room:
            raise EngineOverloaded(
                f"the journal has room for requests of {room:,} bytes; {len(self._room):,} are known, which "
                f"may come to {self._promised:,}, and this one to {most:,}: submit it again when some have ended, or "
                "ask for fewer tokens"
            )

    def add(self, number: int, request: KeptRequest) -> None:
        """A request was submitted. Raises what `check_room` raises; nothing changed then."""
        with self._lock:
            self.check_room(request)
            self._flush()
            self._change("add", number, request.packed())
            self._room[number] = request.most_bytes
            self._promised += request.most_bytes

    def forget(self, numbers: Iterable[int]) -> None:
        """Nobody wants these requests any more, nor their tokens."""
        with self._lock:
            self._flush()
            known = [number for number in numbers if number in self._room]
            if known:
                self._change("forget", known)
                self._promised -= sum(self._room.pop(number) for number in known)

    def note_slots(self, slots: Sequence[Any]) -> None:
        """What lies in slots changed (`State._set_slots`), after what is pending: who has ended is noted so before its
        slot is another's."""
        with self._lock:
            self._flush()
            self._change("slots", slots)

    def flush(self) -> None:
        """Write what is pending."""
        if self.pending or self.ends:
            with self._lock:
                self._flush()

    def _flush(self) -> None:
        # Copies, and deleted once they are written: where this is interrupted, it is done again, to the same effect.
        if tokens := self.pending[:]:
            record = _packed(tokens)
            self._unapplied.append(record[1:])
            self._write(record)
            del self.pending[: len(tokens)]
            if len(self._unapplied) >= APPLIED_AT:
                self._apply()
        if ends := self.ends[:]:
            self._change("ends", ends)
            del self.ends[: len(ends)]

    def _change(self, *change: Any) -> None:
        self._unapplied.append(change)
        self._write(_encode(change))

    def _apply(self) -> None:
        """Have `_state` say what is written."""
        tokens: list[bytes] = []
        for change in self._unapplied:
            if isinstance(change, bytes):
                tokens.append(change)
                continue
            # What a slot grew by is the same before tokens and after them: these are taken in together.
            if change[0] != "slots" or any(is_new for *_, is_new in change[1]):
                self._state.set_tokens(tokens)
                tokens = []
            self._state.apply(change)
        self._state.set_tokens(tokens)
        self._unapplied = []

    def _write(self, payload: bytes) -> None:
        """The record of a change that is applied, or to be."""
        half, at, number, limit = self._where
        end = at + _HEAD.size + len(payload)
        if end > limit:
            self._snapshot()
            return
        if self._words[LIVE] != half + 1:
            # An interrupt came between a snapshot and this.
            store_word(self._words, LIVE, half + 1)
        self._put(at, payload, number + 1)
        self._where = half, end, number + 1, limit

    def _snapshot(self) -> None:
        """Write everything to the other half, and have that hold."""
        self._apply()
        payload = _encode(self._state.whole())
        if len(payload) > self.capacity:
            raise InvariantViolation(
                f"what a journal says takes {len(payload):,} bytes, and was promised no more than {self.capacity:,}"
            )
        half, _, number, _ = self._where
        half = 1 - half
        at = HEAD + half * self._half_bytes
        end = at + _HEAD.size + len(payload)
        self._put(at, payload, number + 1)
        limit = min(end + tail_of(len(payload)), at + self._half_bytes)
        self._where = half, end, number + 1, limit
        self._populate(end, min(limit, end + TAIL))
        self.snapshots += 1
        store_word(self._words, LIVE, half + 1)

    def _populate(self, at: int, end: int) -> None:
        """Have pages of memory there at once: a step would wait for each of them else."""
        first = at // HEAD * HEAD
        # A kernel before 5.14 cannot: they come one by one.
        with suppress(OSError):
            self._memory.madvise(POPULATE_WRITE, first, end - first)

    def _put(self, at: int, payload: bytes, number: int) -> None:
        store(self._memory, at + _HEAD.size, payload)
        checksum = zlib.crc32(payload, number & 0xFFFFFFFF)
        store(self._memory, at, _HEAD.pack(len(payload), checksum, number))

    def close(self) -> None:
        """Unmap it. Idempotent."""
        self._words.release()
        self._memory.close()
