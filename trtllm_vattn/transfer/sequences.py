"""A sequence from a cache that has prefilled it to another that decodes it, at the other's own addresses.

1. The sender waits until the device has written the sequence (a fence), and says what it has: tokens, and the order of
   its bytes.
2. The receiver admits a sequence of as many tokens, waits until the device is done with the memory that it got (parked
   memory may still be read by what ran before), registers its extents and offers them.
3. The sender registers its own extents and writes, in pieces that lie in one extent on either side.
4. It says so, and the receiver has the sequence. Where anything fails, or the peer ends, the receiver ends its
   registrations first, so that nobody writes late, and then the sequence.

Until the end each side has the sequence of its own, so no memory is leased to anybody.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

from trtllm_vattn.cache.base import ExtentPlace, KVCache, SequenceId
from trtllm_vattn.errors import TransferFailed, VattnError
from trtllm_vattn.transfer.connections import quick
from trtllm_vattn.transfer.links import Link
from trtllm_vattn.transfer.pieces import Piece
from trtllm_vattn.transfer.registrations import RegisteringDriver
from trtllm_vattn.vmm.tensors import current_stream

PATIENCE_S = 60.0
"""That a peer is waited for."""


@dataclass(frozen=True)
class Sent:
    """What was sent: tokens, bytes, extents on the sender's side, descriptors, and the seconds of writing alone."""

    tokens: int
    nbytes: int
    extents: int
    descriptors: int
    seconds: float


@dataclass(frozen=True)
class Received:
    """What was received, and where: the sequence's slot, tokens, and extents."""

    slot: int
    tokens: int
    extents: int


def pieces_of(
    sources: Sequence[ExtentPlace], targets: Sequence[ExtentPlace], row_bytes: int, tokens: int
) -> list[Piece]:
    """What is to be written, cut where an extent ends on either side: as many pieces as extents where both have the
    same ones. Only the bytes of tokens are."""
    pieces = []
    whole = row_bytes * tokens
    for index in sorted({place.range for place in sources}):
        mine = [place for place in sources if place.range == index]
        theirs = [place for place in targets if place.range == index]
        ends = {min(place.offset + place.size, whole) for place in (*mine, *theirs)}
        start = 0
        for end in sorted(ends):
            source = next(p for p in mine if p.offset <= start < p.offset + p.size)
            target = next(p for p in theirs if p.offset <= start < p.offset + p.size)
            addresses = source.address + start - source.offset, target.address + start - target.offset
            pieces.append(Piece(*addresses, end - start))
            start = end
            if start == whole:
                break
    return pieces


class Peer:
    """The other process, over a connection. Not thread-safe; one transfer at a time.

    Parameters
    ----------
    cache : KVCache
        At fixed addresses, over `driver`.
    driver : RegisteringDriver
    link : Link
        The same kind as the other process has.
    connection : Connection
        To the other process; nothing else uses it.
    """

    def __init__(
        self,
        cache: KVCache,
        driver: RegisteringDriver,
        link: Link,
        connection: Connection,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.cache, self.driver, self.link, self.patience_s = cache, driver, link, patience_s
        self._connection = quick(connection)
        self._failed: str | None = None
        """Why messages on the connection are in no order any more."""

    def send(self, sequence: SequenceId) -> Sent:
        """Write a sequence into the other process's cache, which is in `receive` or will be. It stays here, too.

        Raises TransferFailed where the other one refuses it, ends or does not answer; UnknownSequence, ConfigError.
        """
        cache = self.cache
        self._check_usable()
        places = cache.extents(sequence)
        tokens = int(cache.lengths[cache.slot_of(sequence)])
        self._wait_for_device()
        order = cache.byte_order
        self._say(("sequence", tokens, order))
        kind, *said = self._hear()
        if kind != "offer":
            raise TransferFailed(f"the peer refused {tokens} tokens: {said[0]}")
        targets, offer = said
        pieces = pieces_of(places, [ExtentPlace(*place) for place in targets], order["row_bytes"], tokens)
        with self._counting():
            for place in places:
                self.driver.registered(place.address, place.size)
        with self._counting():
            self._say(("pieces", pieces))
            started = perf_counter()
            self.link.write(pieces, offer, self._connection, self.patience_s)
            seconds = perf_counter() - started
            self._say(("written",))
            self._hear_the("received")
        return Sent(tokens, sum(piece.size for piece in pieces), len(places), len(pieces), seconds)

    def receive(self, sequence: SequenceId) -> Received:
        """Take the next sequence that the other process sends, under this name; its tokens may be read by what is
        launched from now on.

        Raises TransferFailed where it does not come, or is of another order of bytes; and as `KVCache.admit`, which the
        other one is told of. The cache has nothing of it then.
        """
        self._check_usable()
        tokens, order = self._hear_the("sequence")
        try:
            if order != self.cache.byte_order:
                differing = {name: value for name, value in self.cache.byte_order.items() if order.get(name) != value}
                raise TransferFailed(f"its bytes have another order than the peer's: here {differing}")
            slot = self.cache.admit(sequence, tokens)
        except VattnError as error:
            self._say(("refused", str(error)))
            raise
        try:
            places = self.cache.extents(sequence)
            with self._counting():
                self._take(places)
        except BaseException:
            # In this order: nobody writes late into what others are given.
            for place in self.cache.extents(sequence):
                self.driver.deregister(place.address, place.size)
            self.cache.release(sequence)
            raise
        return Received(slot, tokens, len(places))

    def _take(self, places: list[ExtentPlace]) -> None:
        self._wait_for_device()
        registrations = [self.driver.registered(place.address, place.size) for place in places]
        self._say(("offer", [tuple(place) for place in places], self.link.offer(registrations)))
        (pieces,) = self._hear_the("pieces")
        try:
            self.link.take([Piece(*piece) for piece in pieces], self._connection, self.patience_s)
        except (EOFError, OSError) as error:
            raise TransferFailed(f"the peer has ended: {error}") from error
        self._hear_the("written")
        self._say(("received",))

    def _wait_for_device(self) -> None:
        self.driver.record(current_stream(self.cache.device)).wait()

    def _check_usable(self) -> None:
        if self._failed is not None:
            raise TransferFailed(f"an earlier transfer failed ({self._failed}); open another connection")

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Around what both sides count on: where it fails, the other one is told, and the connection is of no use."""
        try:
            yield
        except BaseException as error:
            self._failed = str(error) or type(error).__name__
            with suppress(TransferFailed):
                self._say(("failed", self._failed))
            raise

    def _hear_the(self, wanted: str) -> list[Any]:
        kind, *said = self._hear()
        if kind != wanted:
            raise TransferFailed(f"the peer {f'failed: {said[0]}' if kind == 'failed' else f'said {kind}'}")
        return said

    def _say(self, message: tuple[Any, ...]) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise TransferFailed(f"the peer has ended: {error}") from error

    def _hear(self) -> tuple[Any, ...]:
        try:
            if not self._connection.poll(self.patience_s):
                raise TransferFailed(f"the peer said nothing for {self.patience_s:g} s")
            heard: tuple[Any, ...] = self._connection.recv()
        except (EOFError, OSError) as error:
            raise TransferFailed(f"the peer has ended: {error}") from error
        return heard
