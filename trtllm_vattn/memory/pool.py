"""The pool of physical memory: extents in power-of-two classes, under a budget, handed out in creation order."""

from __future__ import annotations

import bisect
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from operator import attrgetter

from trtllm_vattn.errors import ConfigError, DriverError, InvariantViolation, OutOfPages
from trtllm_vattn.memory.layout import round_up
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.owners import Extent

logger = logging.getLogger(__name__)

CLASSES = 8
"""Classes of extents: granule × 2^0 … 2^7, which is 2 to 256 MiB on the card."""


class ExtentPool:
    """Physical memory of one cache.

    The price of backing memory is per handle, not per byte, so `take` answers with the fewest extents. What comes back
    stays in stock for the next taker; a class that lacks stock while the budget is spent is served by releasing stock
    of other classes.

    Parameters
    ----------
    driver : Driver
    budget : int
        Bytes of physical memory that may be held: handed out, in stock, or quarantined.
    classes : int
        Sizes of extents: the granule and so many doublings of it, less one.

    Raises
    ------
    ConfigError
        The budget is smaller than one granule.
    """

    def __init__(self, driver: Driver, budget: int, classes: int = CLASSES) -> None:
        self.driver = driver
        self.granule = driver.granularity()
        if budget < self.granule:
            raise ConfigError(
                f"the budget is {budget:,} bytes, less than one granule of {self.granule:,}; raise the budget"
            )
        self.budget = budget
        self.classes = [self.granule << power for power in reversed(range(classes))]
        self._stock: dict[int, list[Extent]] = {size: [] for size in self.classes}
        self.stock_bytes = 0
        self.held_bytes = 0
        self.quarantine: list[Extent] = []
        self._high_water: Counter[int] = Counter()
        self._filling: set[int] = set()

    @property
    def available_bytes(self) -> int:
        """Bytes that `take` can still hand out."""
        return self.budget - (self.held_bytes - self.stock_bytes)

    def set_budget(self, budget: int) -> None:
        """Raise or lower the budget; stock beyond it is released.

        Raises OutOfPages, and keeps the old budget, where more than that is handed out or cannot be released.
        """
        before, self.budget = self.budget, budget
        while self.held_bytes > self.budget and self._drop_one([]):
            pass
        if self.held_bytes > self.budget:
            self.budget = before
            raise OutOfPages(
                f"a budget of {budget:,} bytes asked for, but {self.held_bytes:,} are handed out or quarantined; "
                "release or preempt a sequence first"
            )

    def take(self, size: int) -> list[Extent]:
        """The fewest extents that add up to `size` bytes, rounded up to a granule, largest first.

        Raises
        ------
        OutOfPages
            The budget, or the device, has no more; nothing was taken.
        DriverError
            A create failed for another reason; nothing was taken.
        """
        size = round_up(size, self.granule)
        if size > self.available_bytes:
            raise OutOfPages(
                f"{size:,} bytes asked for, {max(0, self.available_bytes):,} left of a budget of {self.budget:,}; "
                "release or preempt a sequence, or raise the budget"
            )
        taken: list[Extent] = []
        wanted = self.split(size)
        try:
            for position, each in enumerate(wanted):
                taken.append(self._take_one(each, spare=wanted[position + 1 :]))
        except (DriverError, OutOfPages) as error:
            self.give(taken)
            if isinstance(error, DriverError) and error.code == "CUDA_ERROR_OUT_OF_MEMORY":
                raise OutOfPages(
                    f"{size:,} bytes asked for and within the budget of {self.budget:,}, but the device has no memory "
                    "left; lower the budget or free device memory"
                ) from error
            raise
        return taken

    def split(self, size: int) -> list[int]:
        """Sizes of the fewest extents that add up to `size` bytes, largest first."""
        pieces = []
        for each in self.classes:
            count, size = divmod(size, each)
            pieces += [each] * count
        return pieces

    def _take_one(self, size: int, spare: list[int]) -> Extent:
        stock = self._stock[size]
        if stock:
            self.stock_bytes -= size
            return stock.pop(0)
        while self.held_bytes + size > self.budget and self._drop_one(spare):
            pass
        if self.held_bytes + size > self.budget:
            raise OutOfPages(
                f"{size:,} bytes asked for, but {sum(e.size for e in self.quarantine):,} bytes could not be released "
                f"under a budget of {self.budget:,}; close the cache to retry them"
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

    # -- stock -----------------------------------------------------------------------------------------------------

    def keep_in_stock(self, high_water: Mapping[int, int]) -> None:
        """How many extents of each class `restock` shall create ahead. A class is filled up when less than half of its
        number is left."""
        unknown = high_water.keys() - set(self.classes)
        if unknown:
            raise ConfigError(f"there are no extents of {sorted(unknown)} bytes; the classes are {self.classes}")
        self._high_water = Counter(high_water)

    def next_for_stock(self) -> int | None:
        """The class whose next extent should be created, and fits the budget; None where the stock is in order."""
        for size, most in self._high_water.items():
            have = len(self._stock[size])
            if have >= most:
                self._filling.discard(size)
            elif 2 * have < most:
                self._filling.add(size)
            if size in self._filling and self.held_bytes + size <= self.budget:
                return size
        return None

    def restock(self) -> bool:
        """Create one extent ahead, if one is wanted; whether it did. Raises DriverError."""
        size = self.next_for_stock()
        if size is None:
            return False
        try:
            extent = Extent(self.driver, size)
        except DriverError as error:
            if error.code != "CUDA_ERROR_OUT_OF_MEMORY":
                raise
            logger.info("the device has no memory to keep %d bytes in stock", size)
            self._high_water[size] = len(self._stock[size])
            return False
        self.held_bytes += size
        self.give([extent])
        return True

    def shrink(self) -> bool:
        """Release one extent of a class that has more in stock than is to be kept; whether there was one."""
        for size in self.classes:
            if len(self._stock[size]) > self._high_water[size]:
                self.stock_bytes -= size
                self._release(self._stock[size].pop())
                return True
        return False

    def _drop_one(self, spare: list[int]) -> bool:
        """Release one extent of the stock, of a small class first and its youngest, so that what lies in order stays;
        what the same request will ask for next goes last. False where the stock is empty."""
        for keep in (spare, []):
            for size in reversed(self.classes):
                if len(self._stock[size]) > keep.count(size):
                    extent = self._stock[size].pop()
                    self.stock_bytes -= size
                    self._release(extent)
                    return True
        return False

    def _release(self, extent: Extent) -> None:
        try:
            extent.close()
        except DriverError as error:
            logger.warning("extent %d of %d bytes is quarantined: %s", extent.serial, extent.size, error)
            self.quarantine.append(extent)
        else:
            self.held_bytes -= extent.size

    def give(self, extents: Iterable[Extent]) -> None:
        """Take extents back into stock; they must be unmapped."""
        for extent in extents:
            if extent.mappings:
                raise InvariantViolation(
                    f"extent {extent.serial} came back to the pool with {extent.mappings} mappings"
                )
            bisect.insort(self._stock[extent.size], extent, key=attrgetter("serial"))
            self.stock_bytes += extent.size

    def stocked(self) -> list[Extent]:
        """Extents in stock, in creation order within a class."""
        return [extent for stock in self._stock.values() for extent in stock]

    def retry(self) -> None:
        """Try again to release what was quarantined."""
        retry, self.quarantine = self.quarantine, []
        for extent in retry:
            self._release(extent)

    def close(self) -> None:
        """Release all stock and retry what was quarantined. Idempotent; raises DriverError where some still fails."""
        self.retry()
        for extent in self.stocked():
            self._release(extent)
        for stock in self._stock.values():
            stock.clear()
        self.stock_bytes = 0
        if self.quarantine:
            held = sum(extent.size for extent in self.quarantine)
            raise DriverError("NOT_RELEASED", "release", (held,), f"{len(self.quarantine)} extents are still held")
