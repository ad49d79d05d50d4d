"""A cache under random operations while some driver calls fail: does it leak, mix up bytes, or hang?

Sequences begin, grow, fork, move and end over the host driver, with and without the thread that maps ahead. After every
operation the cache's integrity and the bytes of one sequence are checked; at the end all bytes, and that nothing is
left in the driver. A run that exceeds its time limit counts as a hang.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from contextlib import suppress

import numpy as np
import torch

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import DriverError, InvariantViolation, KVCacheOutOfMemory, MemoryQuarantined, NoFreeSlot
from trtllm_vattn.verify.workload import CacheWorkload
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import FaultyDriver

SHAPE = CacheShape(num_layers=2, num_kv_heads=1, head_dim=64, dtype=torch.float32, num_slots=6, max_seq_len=64)
"""A token takes 1 KiB, so that a page of 4 KiB holds 4 to 8 tokens."""
PAGE = 4096
WEIGHTS = {"admit": 3, "step": 6, "release": 2, "truncate": 2}
WEIGHTS |= dict.fromkeys(("fork", "move", "replace", "set_budget", "preallocate"), 1)


class CountedFaults(FaultyDriver):
    """Counts the calls that it failed."""

    def __init__(self, inner: HostDriver, counts: Counter[str]) -> None:
        super().__init__(inner)
        self._counts = counts

    def _call(self, name: str, *arguments: int) -> object:
        self._counts["driver calls"] += 1
        try:
            return super()._call(name, *arguments)
        except DriverError:
            self._counts["driver calls failed"] += 1
            raise


class FaultStress(CacheWorkload):
    """One cache with a random configuration, from construction to close, over a driver whose calls fail at random.

    Parameters
    ----------
    seed : int
    probability : float
        Of a driver call to fail, from 0 to 1.
    counts : Counter
        Added to: operations by name and by how they ended, driver calls.
    """

    cache: KVCacheManager
    number = 0
    """Of the operation under way."""

    def __init__(self, seed: int, probability: float, counts: Counter[str]) -> None:
        choose = random.Random(seed)
        self.host = HostDriver()
        self.driver = CountedFaults(self.host, counts)
        layers_per_range, lookahead = choose.choice((1, 2)), choose.choice((None, 0, 4, 20))
        budget = choose.randint(12, 120) * PAGE
        cache = KVCacheManager(
            SHAPE, self.driver, budget, layers_per_range, lookahead, idle_after_s=0.01, idle_floor=10 * PAGE
        )
        super().__init__(cache, seed)
        self.operations, self.probability = counts, probability
        self.views = [view.numpy() for layer in range(SHAPE.num_layers) for view in vars(cache.layer(layer)).values()]
        if choose.random() < 0.5:
            cache.start_thread()

    def run_within(self, seconds: float, operations: int) -> None:
        """`run`, in a thread of its own; raises TimeoutError, naming what it is at, where that takes longer."""
        failed: list[BaseException] = []

        def run() -> None:
            try:
                self.run(operations)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, name="vattn-fault-stress", daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            at = f"operation {self.number}, {self.current},"
            raise TimeoutError(f"{at} is not over {seconds:g} s after the cache was made")
        if failed:
            raise failed[0]

    def run(self, operations: int) -> None:
        """Raises InvariantViolation for a wrong byte, a cache that contradicts itself, or anything left at the end."""
        try:
            self._run(operations)
        except InvariantViolation:
            # What it found is raised; the cache is not left to its finalizer.
            self.driver.disarm()
            with suppress(InvariantViolation, DriverError, MemoryQuarantined):
                self.cache.close()
            raise

    def _run(self, operations: int) -> None:
        self.driver.fail_randomly(self.probability, self.random.randrange(1 << 30))
        for number in range(operations):
            self.number = number
            try:
                self.run_one(WEIGHTS)
            except (DriverError, MemoryQuarantined):
                self.operations["failed"] += 1
            except (KVCacheOutOfMemory, NoFreeSlot):
                self.operations["refused"] += 1
                if self.authors:
                    self.end(next(iter(self.authors)))
            self._end_lost()
            self.cache.check_integrity()
            if self.authors:
                self.check(self.random.choice(list(self.authors)))
            self.operations["operations"] += 1
        for sequence in self.authors:
            self.check(sequence)
        self.number, self.current = operations, "close"
        self.close()

    def close(self) -> None:
        """Close the cache, again where a driver call failed. Raises InvariantViolation where anything is left."""
        for _ in range(200):
            try:
                self.cache.close()
                break
            except (DriverError, MemoryQuarantined):
                self.operations["closed again"] += 1
        left = (self.host.live_mappings, self.host.live_handles, self.host.live_reservations)
        if left != (0, 0, 0):
            raise InvariantViolation(f"mappings, handles and reservations left: {left}")
        self.host.close()
        self.operations["lives"] += 1

    # -- contents --------------------------------------------------------------------------------------------------

    def write(self, sequence: int, tokens: range) -> None:
        slot = self.cache.slot_of(sequence)
        for salt, view in enumerate(self.views):
            view[slot, tokens.start : tokens.stop] = self._expected(sequence, tokens, salt)

    def _expected(self, sequence: int, tokens: range, salt: int) -> np.ndarray:
        authors = np.array(self.authors[sequence][tokens.start : tokens.stop], np.int64)
        values = (authors * 7919 + np.arange(tokens.start, tokens.stop) * 31 + salt * 13) % 65_521
        return values.astype(np.float32)[:, None, None]

    def check(self, sequence: int) -> None:
        """Raise InvariantViolation where a sequence's bytes are not those that were written."""
        slot, tokens = self.cache.slot_of(sequence), range(len(self.authors[sequence]))
        for salt, view in enumerate(self.views):
            if (view[slot, : len(tokens)] != self._expected(sequence, tokens, salt)).any():
                raise InvariantViolation(f"sequence {sequence} in slot {slot} holds bytes that were not written there")

    # -- operations ------------------------------------------------------------------------------------------------

    def _end_lost(self) -> None:
        """End sequences whose slot lost memory because undoing a failed call failed too."""
        for sequence in list(self.authors):
            slot = self.cache.slot_of(sequence)
            if self.cache.lengths[slot] > self.cache.frontiers[slot]:
                self.operations["lost"] += 1
                self.end(sequence)

    def end(self, sequence: int) -> None:
        while True:
            try:
                super().end(sequence)
                break
            except (DriverError, MemoryQuarantined):
                self.operations["failed"] += 1

    def set_budget(self) -> None:
        """Any budget from the dummy slot's to more than all slots take."""
        self.cache.set_budget(self.random.randint(12, 120) * PAGE)

    def preallocate(self) -> None:
        """Memory for a burst of prompts is created ahead."""
        self.cache.preallocate(self.random.randint(0, 3), self.random.randint(1, SHAPE.max_seq_len))
