"""The pool of physical memory: extents in power-of-two classes, under a budget, handed out in creation order."""

from __future__ import annotations

import bisect
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter

from trtllm_vattn.errors import (
    BrokerLost,
    ConfigError,
    DriverError,
    InvariantViolation,
    KVCacheOutOfMemory,
    MemoryQuarantined,
)
from trtllm_vattn.memory.layout import SlotLayout, round_up
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.owners import Extent

logger = logging.getLogger(__name__)

CLASSES = 8
"""Classes of extents: granularity × 2^0 … 2^7, which is 2 to 256 MiB on CUDA."""
HEADROOM = 8
"""Memory is short where less than this part of the budget would be free."""


class ExtentPool:
    """Physical memory of one cache.

    Driver calls cost per handle, not per byte, so `acquire` answers with the fewest extents. Extents that are released
    stay in the pool as free extents. Where the budget is used up and no free extent has the size that is needed, free
    extents of other sizes are given back to the driver.

    Parameters
    ----------
    driver : Driver
    budget : int
        Bytes of physical memory that may be held: in use, free, or quarantined.
    classes : int
        Number of extent sizes: the granularity, and doublings of it.

    Raises
    ------
    ConfigError
        The budget is smaller than the granularity.
    """

    def __init__(self, driver: Driver, budget: int, classes: int = CLASSES) -> None:
        self.driver = driver
        self.granularity = driver.granularity()
        if budget < self.granularity:
            raise ConfigError(
                f"the budget is {budget:,} bytes, less than the driver's granularity of {self.granularity:,}; raise "
                "the budget"
            )
        self.budget = budget
        self.classes = [self.granularity << power for power in reversed(range(classes))]
        self._free: dict[int, list[Extent]] = {size: [] for size in self.classes}
        self.free_bytes = 0
        self.held_bytes = 0
        self.quarantine: list[Extent] = []
        self.before_reuse: Callable[[], None] | None = None
        """Called before extents that were in use may be used by others, or given back to the driver."""
        self._targets: Counter[int] = Counter()
        self._filling: set[int] = set()

    @property
    def available_bytes(self) -> int:
        """Bytes that `acquire` can still hand out."""
        return self.budget - (self.held_bytes - self.free_bytes)

    @property
    def headroom(self) -> int:
        """Bytes; memory is short where less would be available."""
        return self.budget // HEADROOM

    @property
    def quarantined_bytes(self) -> int:
        """Bytes that could not be given back to the driver."""
        return sum(extent.size for extent in self.quarantine)

    def set_budget(self, budget: int) -> None:
        """Raise or lower the budget; free extents beyond it are given back to the driver.

        Raises KVCacheOutOfMemory, and keeps the old budget, where more is in use or quarantined.
        """
        before, self.budget = self.budget, budget
        while self.held_bytes > self.budget and self._drop_one([]):
            pass
        if self.held_bytes > self.budget:
            self.budget = before
            raise KVCacheOutOfMemory(
                f"a budget of {budget:,} bytes asked for, but {self.held_bytes:,} are handed out or quarantined; "
                "release or preempt a sequence first"
            )

    def acquire(self, size: int, ahead: bool = False) -> list[Extent]:
        """The fewest extents that add up to `size` bytes, rounded up to the granularity, largest first.

        With `ahead`, for what no step needs yet: free extents within the targets are kept for those whom they were
        created for.

        Raises
        ------
        KVCacheOutOfMemory
            The budget, or the device, has no more, or, with `ahead`, none but what is kept; nothing changed.
        DriverError
            A create failed for another reason; nothing changed.
        """
        size = round_up(size, self.granularity)
        if size > self.available_bytes:
            raise KVCacheOutOfMemory(
                f"{size:,} bytes asked for, {max(0, self.available_bytes):,} left of a budget of {self.budget:,}; "
                "release or preempt a sequence, or raise the budget"
            )
        acquired: list[Extent] = []
        wanted = self.split(size)
        try:
            for position, each in enumerate(wanted):
                acquired.append(self._acquire_one(each, wanted[position + 1 :], ahead))
        except (DriverError, KVCacheOutOfMemory) as error:
            self.release(acquired)
            if isinstance(error, DriverError) and error.code == "CUDA_ERROR_OUT_OF_MEMORY":
                why = "the device has no memory left; lower the budget or free device memory"
                if isinstance(error.__cause__, BrokerLost):
                    why = f"{error.__cause__}; start a broker and this engine anew"
                elif isinstance(error.__cause__, KVCacheOutOfMemory):
                    why = f"the broker lends no more now: {error.__cause__}"
                raise KVCacheOutOfMemory(
                    f"{size:,} bytes asked for and within the budget of {self.budget:,}, but {why}"
                ) from error
            raise
        return acquired

    def split(self, size: int) -> list[int]:
        """Sizes of the fewest extents that add up to `size` bytes, largest first."""
        pieces = []
        for each in self.classes:
            count, size = divmod(size, each)
            pieces += [each] * count
        return pieces

    def _acquire_one(self, size: int, spare: list[int], ahead: bool) -> Extent:
        free = self._free[size]
        if len(free) > (self._targets[size] if ahead else 0):
            self.free_bytes -= size
            return free.pop(0)
        if ahead and self.held_bytes + size > self.budget:
            raise KVCacheOutOfMemory(f"the free extents of {size:,} bytes are kept for prompts that were announced")
        while self.held_bytes + size > self.budget and self._drop_one(spare):
            pass
        if self.held_bytes + size > self.budget:
            raise KVCacheOutOfMemory(
                f"{size:,} bytes asked for, but {self.quarantined_bytes:,} bytes could not be released under a budget "
                f"of {self.budget:,}; close the cache to retry them"
            )
        extent = self._create(size, spare)
        self.held_bytes += size
        return extent

    def _create(self, size: int, spare: list[int]) -> Extent:
        while True:
            try:
                return Extent(self.driver, size)
            except DriverError as error:
                if error.code != "CUDA_ERROR_OUT_OF_MEMORY" or not self._drop_one(spare):
                    raise

    def release(self, extents: Iterable[Extent]) -> None:
        """Take extents back; they must be unmapped, and are free then."""
        if self.before_reuse is not None:
            self.before_reuse()
        for extent in extents:
            if extent.mappings:
                raise InvariantViolation(
                    f"extent {extent.serial} came back to the pool with {extent.mappings} mappings"
                )
            bisect.insort(self._free[extent.size], extent, key=attrgetter("serial"))
            self.free_bytes += extent.size

    # -- free extents ----------------------------------------------------------------------------------------------

    def free_extents(self) -> list[Extent]:
        """Extents that nobody uses, in creation order within a class."""
        return [extent for free in self._free.values() for extent in free]

    def take_over(self, extents: Iterable[Extent]) -> None:
        """Extents that were not created here are in use; the budget is what is held then, where that is more."""
        self.held_bytes += sum(extent.size for extent in extents)
        self.budget = max(self.budget, self.held_bytes)

    def set_targets(self, targets: Mapping[int, int]) -> None:
        """How many free extents of each class `create_one` shall keep, for prompts to come: `acquire` gives them to
        nobody who maps ahead. A class is filled up when less than half of its number is left."""
        unknown = targets.keys() - set(self.classes)
        if unknown:
            raise ConfigError(f"there are no extents of {sorted(unknown)} bytes; the classes are {self.classes}")
        self._targets = Counter(targets)

    def next_to_create(self) -> int | None:
        """The class of which a further free extent should be created and fits the budget; None where all are filled."""
        for size, most in self._targets.items():
            have = len(self._free[size])
            if have >= most:
                self._filling.discard(size)
            elif 2 * have < most:
                self._filling.add(size)
            if size in self._filling and self.held_bytes + size <= self.budget:
                return size
        return None

    def create_one(self) -> bool:
        """Create one free extent, if one is wanted; returns whether it did. Raises DriverError."""
        size = self.next_to_create()
        if size is None:
            return False
        try:
            extent = Extent(self.driver, size)
        except DriverError as error:
            if error.code != "CUDA_ERROR_OUT_OF_MEMORY":
                raise
            logger.info("the device has no memory to preallocate %d bytes", size)
            self._targets[size] = len(self._free[size])
            return False
        self.held_bytes += size
        self.release([extent])
        return True

    def shrink(self) -> bool:
        """Give one extent of a class that has more free than its target back to the driver; returns whether it did."""
        for size in self.classes:
            if len(self._free[size]) > self._targets[size]:
                self._drop(size)
                return True
        return False

    def give_back(self, size: int, spare: int) -> int:
        """Give free extents of at least `size` bytes together back to the driver, or all but `spare` of the smallest
        class, the largest first; the budget is as it was, or what is held then where that is less. Returns the bytes
        given back."""
        before = self.held_bytes
        for each in self.classes:
            least = spare if each == self.granularity else 0
            while before - self.held_bytes < size and len(self._free[each]) > least:
                self._drop(each)
        self.budget = min(self.budget, self.held_bytes)
        return before - self.held_bytes

    def shuffle_free(self, seed: int) -> None:
        """Hand out the free extents of each size in a random order."""
        for free in self._free.values():
            random.Random(seed).shuffle(free)

    def drop_free(self) -> None:
        """Give all free extents back to the driver."""
        while self._drop_one([]):
            pass

    def _drop_one(self, spare: list[int]) -> bool:
        """Give one free extent back to the driver: of the smallest class, and the youngest of it, so that what lies in
        order stays. `spare`, which the same request needs next, goes last. False where nothing is free."""
        for keep in (spare, []):
            for size in reversed(self.classes):
                if len(self._free[size]) > keep.count(size):
                    self._drop(size)
                    return True
        return False

    def _drop(self, size: int) -> None:
        self.free_bytes -= size
        self._destroy(self._free[size].pop())

    def _destroy(self, extent: Extent) -> None:
        try:
            extent.close()
        except DriverError as error:
            numbers = {"extent": extent.serial, "bytes": extent.size, "code": error.code}
            text = "extent %d of %d bytes is quarantined: %s"
            logger.warning(text, extent.serial, extent.size, error, extra=numbers)
            self.quarantine.append(extent)
        else:
            self.held_bytes -= extent.size

    def retry(self) -> None:
        """Try again to give quarantined extents back to the driver."""
        retry, self.quarantine = self.quarantine, []
        for extent in retry:
            self._destroy(extent)

    def close(self) -> None:
        """Give all free and quarantined extents back. Idempotent; raises MemoryQuarantined where some still
        fails."""
        self.retry()
        self.drop_free()
        if self.quarantine:
            raise MemoryQuarantined(
                f"{len(self.quarantine)} extents of {self.quarantined_bytes:,} bytes could not be released; call "
                "close() again"
            )


class Preallocation:
    """Tells a pool how many free extents to keep: for a burst that was announced, and for prompts that wait already.

    Makes no driver call. Of a class, as many are kept as the larger of the two needs: those who wait may be the burst.

    Attributes
    ----------
    expected : tuple of int
        Tokens of the waiting prompts that memory is preallocated for.
    """

    def __init__(self, pool: ExtentPool, layout: SlotLayout) -> None:
        self._pool, self._layout = pool, layout
        self._announced: Counter[int] = Counter()
        self.expected: tuple[int, ...] = ()

    def announce(self, sequences: int, tokens: int) -> None:
        """So many prompts of so many tokens may come at once. Raises ConfigError for impossible numbers."""
        longest = self._layout.max_seq_len
        if sequences < 0 or not 1 <= tokens <= longest:
            raise ConfigError(
                f"preallocation for {sequences} prompts of {tokens} tokens asked for; give 0 or more, of 1 to "
                f"{longest} tokens"
            )
        each = self._extents([tokens])
        self._announced = Counter({size: count * sequences for size, count in each.items()})
        self._update()

    def fitting(self, prompts: Sequence[int]) -> tuple[int, ...]:
        """The first of these prompts, in tokens, that the budget's rest holds together, without its headroom."""
        left, fitting = self._pool.available_bytes - self._pool.headroom, 0
        for tokens in prompts:
            left -= self._layout.total_bytes(tokens)
            if left < 0:
                break
            fitting += 1
        return tuple(prompts[:fitting])

    def expect(self, prompts: tuple[int, ...]) -> None:
        """Prompts of these tokens wait and will come in this order."""
        self.expected = prompts
        self._update()

    def _extents(self, prompts: Iterable[int]) -> Counter[int]:
        found: Counter[int] = Counter()
        for tokens in prompts:
            for size, count in self._layout.needs(tokens):
                found.update(self._pool.split(size) * count)
        return found

    def _update(self) -> None:
        self._pool.set_targets(self._announced | self._extents(self.expected))
