"""What a cache has in pinned host memory: suspended sequences, and the tokens that it keeps while it sleeps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import NamedTuple

from trtllm_vattn.cache.base import SequenceId, Transfers
from trtllm_vattn.memory import suspend as images
from trtllm_vattn.memory.arena import Arena
from trtllm_vattn.memory.host_pool import HostPool
from trtllm_vattn.vmm.base import Driver, Fence
from trtllm_vattn.vmm.owners import Extent, Reservation
from trtllm_vattn.vmm.tensors import StreamTiming


class CopyStream(NamedTuple):
    """The stream that copies are made on, what records a fence behind all that it has, and what times it."""

    stream: int
    record: Callable[[], Fence]
    timing: Callable[[], StreamTiming]


@dataclass(frozen=True)
class Suspended:
    """A sequence of `tokens` tokens whose slot is in host memory."""

    image: images.Image
    tokens: int

    @property
    def slot(self) -> int:
        return self.image.slots[0].index


class HostTier:
    """Suspends and resumes slots of an arena; each call succeeds whole or raises and changes nothing. It refers to no
    cache, so that one that is dropped is given back at once.

    Attributes
    ----------
    sequences : dict
        Suspended sequences.
    asleep : memory.suspend.Image or None
        All used slots and the dummy, while the cache sleeps.
    """

    def __init__(self, arena: Arena, host: HostPool) -> None:
        self._arena, self._host = arena, host
        self.sequences: dict[SequenceId, Suspended] = {}
        self.asleep: images.Image | None = None
        self._done = Transfers()
        self._under_way: list[tuple[Transfers, StreamTiming]] = []
        """Bytes out and in of copies that nobody waited for, and what times them."""
        self._counting = threading.Lock()
        """`transfers` is asked for by other threads than the one that copies."""

    @property
    def transfers(self) -> Transfers:
        """Copies so far, those under way when they are done."""
        with self._counting:
            under_way, self._under_way = self._under_way, []
            for copied, timing in under_way:
                if (took := timing.seconds()) is None:
                    self._under_way.append((copied, timing))
                else:
                    self._add(copied, took)
            return self._done

    def _add(self, copied: Transfers, took: float) -> None:
        done = self._done
        self._done = Transfers(
            done.out_bytes + copied.out_bytes,
            done.out_s + (took if copied.out_bytes else 0.0),
            done.in_bytes + copied.in_bytes,
            done.in_s + (took if copied.in_bytes else 0.0),
        )

    @property
    def used_bytes(self) -> int:
        return self._host.used_bytes

    @property
    def held_bytes(self) -> int:
        return self._host.held_bytes

    def slots(self, dummy: int) -> list[int]:
        """Slots whose tokens are here, in order, but for the dummy."""
        asleep = [slot.index for slot in self.asleep.slots] if self.asleep is not None else []
        found = [found.slot for found in self.sequences.values()]
        return sorted({*found, *asleep} - {dummy})

    def suspend(self, sequence: SequenceId, slot: int, tokens: int, on: CopyStream, wait: bool = True) -> int:
        """Suspend a slot; returns the bytes copied. Raises ConfigError where other slots read it."""
        self._arena.check_not_held(slot)
        image = self._suspend({slot: tokens}, on, wait)
        self.sequences[sequence] = Suspended(image, tokens)
        return image.content_bytes

    def settle(self, sequence: SequenceId) -> None:
        """Have all of a suspended sequence's memory unmapped, by waiting for copies that are under way."""
        if self._arena.slots[self.sequences[sequence].slot].pending_unmap:
            self._arena.complete_pending_unmaps(wait=True)

    def resume(self, sequence: SequenceId, tokens: int, on: CopyStream, wait: bool = True) -> tuple[int, int, Fence]:
        """Resume a sequence, backed for so many tokens; returns its slot, the mappings made, and the fence behind its
        copies."""
        found = self.sequences[sequence]
        maps, fence = self._resume(found.image.upto({found.slot: tokens}, self._arena), on, wait)
        del self.sequences[sequence]
        return found.slot, maps, fence

    def missing_bytes(self, sequence: SequenceId, tokens: int) -> int:
        """Bytes of device memory that `resume` takes."""
        found = self.sequences[sequence]
        return found.image.upto({found.slot: tokens}, self._arena).mapped_bytes

    def relocate(self, sequence: SequenceId, target: int) -> None:
        """Have a sequence come back in another slot, which is free and empty."""
        found = self.sequences[sequence]
        self.sequences[sequence] = replace(found, image=images.relocate(self._arena, found.image, target))

    def discard(self, sequence: SequenceId) -> None:
        """End a suspended sequence."""
        images.discard(self._arena, self.sequences.pop(sequence).image, self._host)

    def sleep(self, tokens: Mapping[int, int], on: CopyStream) -> None:
        """Suspend all these slots together, until `wake`."""
        self.asleep = self._suspend(tokens, on)

    def wake(self, on: CopyStream) -> int:
        """Resume them; returns the bytes copied."""
        assert self.asleep is not None
        image = self.asleep
        self._resume(image, on)
        self.asleep = None
        return image.content_bytes

    def forget(self, dummy: int) -> None:
        """All slots but the dummy were reset: nobody wants their tokens."""
        for found in self.sequences.values():
            self._host.release(found.image.spans)
        self.sequences.clear()
        if self.asleep is not None:
            self._host.release(self.asleep.spans)
            slots = tuple(slot for slot in self.asleep.slots if slot.index == dummy)
            self.asleep = images.Image(slots, (), ())

    def _suspend(self, tokens: Mapping[int, int], on: CopyStream, wait: bool = True) -> images.Image:
        timing = on.timing()
        image = images.suspend(self._arena, tokens, self._host, on.stream, on.record, wait)
        self._note(Transfers(out_bytes=image.content_bytes), timing)
        return image

    def _resume(self, image: images.Image, on: CopyStream, wait: bool = True) -> tuple[int, Fence]:
        timing = on.timing()
        maps, fence = images.resume(self._arena, image, self._host, on.stream, on.record, wait)
        self._note(Transfers(in_bytes=image.content_bytes), timing)
        return maps, fence

    def _note(self, copied: Transfers, timing: StreamTiming) -> None:
        timing.end()
        if copied.out_bytes or copied.in_bytes:
            with self._counting:
                self._under_way.append((copied, timing))


def measure_link(driver: Driver, size: int, stream: int = 0, rounds: int = 3) -> tuple[float, float]:
    """Bytes a second of plain copies of `size` bytes, in one mapping, to pinned host memory and back: the best of
    `rounds`. Raises DriverError, with nothing left behind."""
    size = -(-size // driver.granularity()) * driver.granularity()
    reservation = Reservation(driver, size)
    try:
        extent = Extent(driver, size)
        try:
            (mapping,) = reservation.map(0, [extent])
            try:
                host = driver.create_host(size)
                try:
                    out = _best(driver, rounds, stream, driver.copy_to_host, (host, mapping.address, size))
                    back = _best(driver, rounds, stream, driver.copy_to_device, (mapping.address, host, size))
                finally:
                    driver.release_host(host, size)
            finally:
                mapping.close()
        finally:
            extent.close()
    finally:
        reservation.close()
    return size / out, size / back


def _best(driver: Driver, rounds: int, stream: int, copy: Callable[..., None], arguments: Sequence[int]) -> float:
    """Seconds of the fastest of some copies."""
    took = []
    for _ in range(rounds + 1):  # the first touches the memory
        driver.record(stream).wait()
        started = perf_counter()
        copy(*arguments, stream)
        driver.record(stream).wait()
        took.append(perf_counter() - started)
    return min(took[1:])
