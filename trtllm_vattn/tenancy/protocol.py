"""What tenants and a broker say to one another, version 2: msgpack by msgspec, a message a packet of a Unix socket
(SOCK_SEQPACKET), so that none begins inside another one. File descriptors travel beside (SCM_RIGHTS), from the broker
to the tenant alone.

Every request but `Report` gets one answer, in order. Fields that are not known, of the wrong type, or out of range make
a message malformed: the broker answers `Refused` and closes the connection.
"""

from __future__ import annotations

import array
import os
import socket
from typing import Annotated, Literal

import msgspec

from trtllm_vattn.errors import VattnError

VERSION = 2
LONGEST = 1 << 16
"""Bytes of a message, at most."""
MOST_DESCRIPTORS = 4
MOST_LEASES = 2000
"""Of a message: each takes up to 19 bytes."""
MOST_TENANTS = 100
"""Of a message: each takes up to 500 bytes."""

Bytes = Annotated[int, msgspec.Meta(ge=0, le=(1 << 62))]
Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 62))]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9._:@+-]+$")]
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e6)]
Priority = Annotated[int, msgspec.Meta(ge=-1000, le=1000)]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=str.lower):
    """Of either side."""


# -- requests ----------------------------------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag="hello"):
    """A process becomes a tenant. Whose it is says the socket (SO_PEERCRED), not the message. With `keep_s`, what it is
    lent and its journal (`MakeJournal`) outlive its process for so many seconds, for the next one of the same name and
    user, whose limits are those of its own Hello."""

    version: int
    name: Name
    floor: Bytes = 0
    ceiling: Bytes | None = None
    priority: Priority = 0
    device: str = ""
    keep_s: Seconds = 0.0


class Create(Message, frozen=True, tag="create"):
    """Lend `size` bytes: an extent that nobody had before."""

    size: Bytes


class Release(Message, frozen=True, tag="release"):
    """The tenant has unmapped and released a lease."""

    lease: Number


class Fetch(Message, frozen=True, tag="fetch"):
    """Give a lease's descriptor again, to a tenant whose process before had it."""

    lease: Number


class Leases(Message, frozen=True, tag="leases"):
    """Name more of the leases that the process before had: those of a number above `after`."""

    after: Number


class MakeJournal(Message, frozen=True, tag="journal"):
    """Make memory of so many bytes for the tenant's journal, which outlives its process (`Hello.keep_s`)."""

    size: Bytes


class Leave(Message, frozen=True, tag="leave"):
    """Nothing outlives the tenant's process any more: its journal is dropped, and what it is lent ends with it."""


class Need(Message, frozen=True, tag="need"):
    """The tenant cannot do with less than so many bytes."""

    least: Bytes


class Report(Message, frozen=True, tag="report"):
    """Look at the tenant's page: what it needs or wants has changed. Has no answer."""


class Status(Message, frozen=True, tag="status"):
    """What is lent to whom: tenants whose names sort behind `after`."""

    after: str = ""


class SetLimits(Message, frozen=True, tag="limits"):
    """Change a tenant's limits, for whoever operates the broker; None leaves one as it is."""

    name: Name
    floor: Bytes | None = None
    ceiling: Bytes | None = None
    priority: Priority | None = None


class SetAsleep(Message, frozen=True, tag="asleep"):
    """Have a tenant sleep or wake, for whoever operates the broker."""

    name: Name
    asleep: bool


Request = (
    Hello | Create | Release | Fetch | Leases | MakeJournal | Leave | Need | Report | Status | SetLimits | SetAsleep
)

# -- answers -----------------------------------------------------------------------------------------------------------


class Welcome(Message, frozen=True, tag="welcome"):
    """Comes with two descriptors, the tenant's page and an end of a pipe that wakes it where it owes memory, and with a
    journal's where the process before it left one. `leases` and their bytes are those that it had, the first
    `MOST_LEASES` of them (`Leases`)."""

    version: int
    granularity: int
    memory: int
    deadline_s: float
    leases: list[tuple[int, int]] = []


class Lent(Message, frozen=True, tag="lent"):
    """Comes with the extent's descriptor."""

    lease: int


class Leased(Message, frozen=True, tag="leased"):
    """The answer to `Leases`: the next ones with their bytes, `MOST_LEASES` at most, none behind the last."""

    leases: list[tuple[int, int]]


class Done(Message, frozen=True, tag="done"):
    """It was done. To `MakeJournal` it comes with the journal's descriptor."""


class Refused(Message, frozen=True, tag="refused"):
    """It was not, and nothing changed. `code`: ``malformed`` (the connection is closed), ``version``, ``denied``,
    ``short`` (no memory within the budget now), ``config``, or ``driver``."""

    code: Literal["malformed", "version", "denied", "short", "config", "driver"]
    message: str


class TenantStatus(msgspec.Struct, frozen=True):
    """One tenant in a `Standing`; sizes in bytes. `overdue_s` is how long it owes memory beyond its deadline,
    `beside_bytes` what its process has on the device that the broker did not lend, None where nobody can tell."""

    name: str
    pid: int
    uid: int
    floor: int
    ceiling: int
    priority: int
    lent: int
    leases: int
    needs: int
    wants: int
    share: int
    budget: int
    state: Literal["serving", "asleep", "owing", "overdue", "lost", "kept"]
    overdue_s: float
    beside_bytes: int | None


class Standing(Message, frozen=True, tag="standing"):
    """The answer to `Status`; sizes in bytes. The first tenants by name, `MOST_TENANTS` at most, and whether there are
    `more`."""

    device: str
    memory: int
    lent: int
    deadline_s: float
    refused: int
    tenants: list[TenantStatus]
    more: bool = False


Answer = Welcome | Lent | Leased | Done | Refused | Standing

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Request)
_answers = msgspec.msgpack.Decoder(Answer)


class Malformed(VattnError):
    """A packet is no message of this version."""


def encode(message: Message) -> bytes:
    """The packet of a message."""
    return _encoder.encode(message)


def decode_request(packet: bytes) -> Request:
    """What a tenant says. Raises Malformed."""
    try:
        return _requests.decode(packet)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(str(error)) from error


def decode_answer(packet: bytes) -> Answer:
    """What a broker says. Raises Malformed."""
    try:
        return _answers.decode(packet)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"the broker speaks another version: {error}") from error


def receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """The next packet and the descriptors beside it, which are the caller's then; empty at the connection's end.
    Raises Malformed for a packet, or descriptors, that do not fit."""
    packet, beside, flags, _ = connection.recvmsg(
        LONGEST, socket.CMSG_SPACE(MOST_DESCRIPTORS * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
    )
    descriptors = array.array("i")
    for level, kind, data in beside:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(descriptors.tolist())
        raise Malformed(f"a packet of more than {LONGEST} bytes, or with more than {MOST_DESCRIPTORS} descriptors")
    return packet, descriptors.tolist()


def close_all(descriptors: list[int]) -> None:
    """Close what came with a packet."""
    for descriptor in descriptors:
        os.close(descriptor)
