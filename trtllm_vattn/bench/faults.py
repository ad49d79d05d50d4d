"""`bench faults`: a long random life of the cache in which some driver calls fail. Does it leak, mix up bytes, or hang?

Sequences come, grow, fork, move and end over the host driver, with and without the thread that maps ahead. After every
operation the books are checked, and the bytes of a sequence; after every life, all bytes, and that nothing is left. A
life that is not over in time hangs.
"""

from __future__ import annotations

import argparse
import logging
import random
import threading
from collections import Counter
from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch
from tqdm import tqdm

from trtllm_vattn.bench.flags import add_results, amount, as_config, positive, probability
from trtllm_vattn.bench.report import Result, finish
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import ConfigError, DriverError, InvariantViolation, KVCacheOutOfMemory, NoFreeSlot
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import FaultyDriver

SHAPE = CacheShape(num_layers=2, num_kv_heads=1, head_dim=64, dtype=torch.float32, num_slots=6, max_seq_len=64)
"""A token takes 1 KiB, so that a page of 4 KiB holds 4 to 8 tokens."""
PAGE = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench faults`."""
    add = parser.add_argument
    add("--operations", type=positive, default=20_000, metavar="OPERATIONS", help="operations in all")
    text = "operations of one cache, from its construction to its end"
    add("--life", type=positive, default=2_000, metavar="OPERATIONS", help=text)
    add("--life-seconds", type=amount, default=300.0, metavar="SECONDS", help="after which a life is taken to hang")
    text = "of a driver call to fail, from 0 to 1"
    add("--probability", type=probability, default=0.02, metavar="SHARE", help=text)
    add_results(parser)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 where a byte was wrong, anything was left behind, or a life did not end."""
    counts: Counter[str] = Counter()
    # What is set aside is warned of each time; here that is thousands of times.
    logger = logging.getLogger("trtllm_vattn")
    level = logger.level
    logger.setLevel(logging.ERROR)
    started = perf_counter()
    lives = -(-args.operations // args.life)
    error = hang = None
    try:
        for number in tqdm(range(lives), unit="life", disable=None):
            life = Life(args.seed + number, args.probability, counts)
            life.run_within(args.life_seconds, min(args.life, args.operations - number * args.life))
    except InvariantViolation as violation:
        error = f"life {number}: {violation}"
    except TimeoutError as late:
        hang = f"life {number}: {late}"
    finally:
        logger.setLevel(level)
    result = Result.start("faults", as_config(args), args.seed)
    result.results["counts"] = dict(counts)
    result.summary.update(
        operations=counts["operations"],
        driver_calls=counts["driver calls"],
        driver_calls_failed=counts["driver calls failed"],
        operations_failed=counts["failed"],
        sequences_lost=counts["lost"],
        wrong_bytes_or_leaks=0 if error is None else 1,
        hangs=0 if hang is None else 1,
        lives=counts["lives"],
        seconds=perf_counter() - started,
    )
    finish(result, args)
    for found in (error, hang):
        if found is not None:
            print(found)
    return int(error is not None or hang is not None)


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


class Life:
    """One cache, from its construction to its end; `authors` says who wrote each token of each sequence."""

    def __init__(self, seed: int, probability: float, counts: Counter[str]) -> None:
        self.random, self.counts, self.probability = random.Random(seed), counts, probability
        self.host = HostDriver()
        self.driver = CountedFaults(self.host, counts)
        layers_per_range, lookahead = self.random.choice((1, 2)), self.random.choice((None, 0, 4, 20))
        pages = self.random.randint(12, 120)
        self.cache = KVCacheManager(
            SHAPE, self.driver, pages * PAGE, layers_per_range, lookahead, idle_after_s=0.01, idle_floor=10 * PAGE
        )
        self.views = [
            view.numpy() for layer in range(SHAPE.num_layers) for view in vars(self.cache.layer(layer)).values()
        ]
        self.now = "nothing yet"
        self.authors: dict[int, list[int]] = {}
        self.next = 0
        if self.random.random() < 0.5:
            self.cache.start_thread()

    def run_within(self, seconds: float, operations: int) -> None:
        """`run`, in a thread of its own; raises TimeoutError, naming what it is at, where that takes longer."""
        failed: list[BaseException] = []

        def run() -> None:
            try:
                self.run(operations)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, name="vattn-life", daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            raise TimeoutError(f"{self.now} is not over {seconds:g} s after the life began")
        if failed:
            raise failed[0]

    def run(self, operations: int) -> None:
        """Raises InvariantViolation for a wrong byte, books that disagree, or anything left at the end."""
        self.driver.fail_randomly(self.probability, self.random.randrange(1 << 30))
        actions: list[Callable[[], None]] = [
            *[self.admit, self.step, self.step] * 3,
            *[self.release, self.truncate] * 2,
            *[self.fork, self.move, self.replace, self.set_budget, self.stock_up],
        ]
        for number in range(operations):
            action = self.random.choice(actions)
            self.now = f"operation {number}, {action.__name__},"
            try:
                action()
            except DriverError:
                self.counts["failed"] += 1
            except (KVCacheOutOfMemory, NoFreeSlot):
                self.counts["refused"] += 1
                self.give_up_one()
            self.settle()
            self.cache.check_integrity()
            if self.authors:
                self.check(self.random.choice(list(self.authors)))
            self.counts["operations"] += 1
            self.counts[action.__name__] += 1
        for sequence in self.authors:
            self.check(sequence)
        self.now = "closing"
        self.end()

    def end(self) -> None:
        for _ in range(200):
            try:
                self.cache.close()
                break
            except DriverError:
                self.counts["closed again"] += 1
        left = (self.host.live_mappings, self.host.live_handles, self.host.live_reservations)
        if left != (0, 0, 0):
            raise InvariantViolation(f"mappings, handles and reservations left: {left}")
        self.host.close()
        self.counts["lives"] += 1

    # -- contents --------------------------------------------------------------------------------------------------

    def write(self, sequence: int, tokens: range) -> None:
        slot = self.cache.slot_of(sequence)
        self.authors[sequence][tokens.start :] = [sequence] * len(tokens)
        for salt, view in enumerate(self.views):
            view[slot, tokens.start : tokens.stop] = self._expected(sequence, tokens, salt)

    def _expected(self, sequence: int, tokens: range, salt: int) -> np.ndarray:
        authors = np.array(self.authors[sequence][tokens.start : tokens.stop], np.int64)
        values = (authors * 7919 + np.arange(tokens.start, tokens.stop) * 31 + salt * 13) % 65_521
        return values.astype(np.float32)[:, None, None]

    def check(self, sequence: int) -> None:
        slot, tokens = self.cache.slot_of(sequence), range(len(self.authors[sequence]))
        for salt, view in enumerate(self.views):
            if (view[slot, : len(tokens)] != self._expected(sequence, tokens, salt)).any():
                raise InvariantViolation(f"sequence {sequence} in slot {slot} holds bytes that were not written there")

    # -- operations ------------------------------------------------------------------------------------------------

    def pick(self) -> int | None:
        return self.random.choice(list(self.authors)) if self.authors else None

    def settle(self) -> None:
        """A slot that was cut short, because even taking back failed, has lost its sequence: that one must go."""
        for sequence in list(self.authors):
            slot = self.cache.slot_of(sequence)
            if self.cache.lengths[slot] > self.cache.frontiers[slot]:
                self.counts["lost"] += 1
                self.drop(sequence)

    def give_up_one(self) -> None:
        if self.authors:
            self.drop(next(iter(self.authors)))

    def drop(self, sequence: int) -> None:
        while True:
            try:
                self.cache.release(sequence)
                break
            except DriverError:
                self.counts["failed"] += 1
        del self.authors[sequence]

    def admit(self) -> None:
        tokens = self.random.randint(1, SHAPE.max_seq_len)
        self.cache.admit(self.next, tokens)
        self.authors[self.next] = []
        self.write(self.next, range(tokens))
        self.next += 1

    def step(self) -> None:
        before = self.cache.lengths.copy()
        after = np.where((before > 0) & (before < SHAPE.max_seq_len), before + 1, 0)
        self.cache.prepare_step(after)
        for sequence, authors in self.authors.items():
            if after[self.cache.slot_of(sequence)]:
                self.write(sequence, range(len(authors), len(authors) + 1))
        self.cache.map_ahead()

    def release(self) -> None:
        sequence = self.pick()
        if sequence is not None:
            self.drop(sequence)

    def truncate(self) -> None:
        sequence = self.pick()
        if sequence is not None:
            length = self.random.randint(1, len(self.authors[sequence]))
            self.cache.truncate(sequence, length)
            del self.authors[sequence][length:]

    def fork(self) -> None:
        sequence = self.pick()
        if sequence is not None:
            tokens = self.random.randint(1, len(self.authors[sequence]))
            self.cache.fork(sequence, self.next, tokens)
            self.authors[self.next] = self.authors[sequence][:tokens]
            self.next += 1

    def move(self) -> None:
        sequence, free = self.pick(), self.cache.arena.free_slots()
        if sequence is not None and free:
            slot = self.random.choice(free)
            try:
                self.cache.move(sequence, slot)
            except ConfigError:
                # The thread met a failure in that slot meanwhile, and retired it.
                if slot in self.cache.arena.free_slots():
                    raise
                self.counts["refused"] += 1

    def replace(self) -> None:
        sequence = self.pick()
        if sequence is not None:
            self.cache.replace(sequence)

    def set_budget(self) -> None:
        self.cache.set_budget(self.random.randint(12, 120) * PAGE)

    def stock_up(self) -> None:
        self.cache.preallocate(self.random.randint(0, 3), self.random.randint(1, SHAPE.max_seq_len))
