"""Does a captured graph stay right while the memory beneath it is remapped, moved, shared and taken away?

One step captured once is replayed over and over on a seeded workload; a replica, captured over memory that never
changes, must give the same bits (verify/differential.py). Two replicas whose memory is left alone show first that the
kernels are repeatable, and negative controls show that what would be wrong is seen.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch

from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.progress import Progress
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.verify.differential import MAX_SEQ_LEN, SLOTS, Differential, Replica, Tally
from trtllm_vattn.verify.negative_controls import MappingTable, run_controls
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.wrappers import CountingDriver


class Soak:
    """Differential runs of one model on one device.

    Parameters
    ----------
    model : str
        Checkpoint folder, or a shape with random weights; loaded in float32.
    device : str
    seed : int
        Of the weights, and of the workload of the first part.
    tolerance : float
        Of eager logits, in standard deviations of the logits.
    seconds : float
        After which a run ends before its replays are done.
    """

    def __init__(self, model: str, device: str, seed: int, tolerance: float, seconds: float) -> None:
        self.name, self.device, self.seed = model, device, seed
        self.tolerance, self.seconds = tolerance, seconds
        self.model = load_model(model, device, torch.float32, seed)
        self.shape = shape_of(self.model, SLOTS, MAX_SEQ_LEN)
        self.driver = CountingDriver(open_driver(device))

    def _remapped(self, driver: Driver) -> Replica:
        # All layers in a token's row, so that a page holds few tokens and much is remapped.
        budget = 2 * SLOTS * (MAX_SEQ_LEN * self.shape.token_bytes + 2 * self.driver.granularity())
        return Replica(self.model, KVCacheManager(self.shape, driver, budget, self.shape.num_layers, lookahead=16))

    def _still(self) -> Replica:
        return Replica(self.model, make_cache("contiguous", self.shape, self.device))

    def differential(self, seed: int, driver: Driver | None) -> Differential:
        """Two replicas, the first above this driver's memory, which is remapped; without a driver, as the second."""
        subject = self._still() if driver is None else self._remapped(driver)
        return Differential(subject, self._still(), seed, self.tolerance)

    def run(self, differential: Differential, replays: int, label: str, before: int = 0) -> Tally:
        """Step until `replays` are done, `before` of which were done already, or the time is over."""
        started, tally = perf_counter(), differential.tally
        with Progress(label, replays, "replay", before) as bar:
            while before + tally.replays < replays and perf_counter() - started < self.seconds:
                done = tally.replays
                differential.step(check_eager=done >= 100 * tally.eager_checks)
                bar.update(tally.replays - done)
        differential.count_mismatches()
        tally.seconds = perf_counter() - started
        return tally

    @torch.inference_mode()
    def left_alone(self, replays: int) -> Tally:
        """Two replicas whose memory never changes: whether the kernels are repeatable at all."""
        differential = self.differential(self.seed, None)
        tally = self.run(differential, replays, "left alone")
        differential.close()
        return tally

    @torch.inference_mode()
    def remapped(self, replays: int, part: int = 0, before: int = 0) -> dict[str, Any]:
        """One part of a soak: its tally, driver calls, and graphs captured."""
        calls = dict(self.driver.calls)
        differential = self.differential(self.seed + part, self.driver)
        tally = self.run(differential, replays, "remapped", before)
        made = {name: count - calls.get(name, 0) for name, count in self.driver.calls.items()}
        captures = differential.subject.captures
        differential.close()
        return {**tally.as_dict(), "driver_calls": made, "captures": captures}

    @torch.inference_mode()
    def controls(self) -> dict[str, str]:
        """What caught each negative control, or ``missed``."""
        table = MappingTable(self.driver)
        return run_controls(lambda: self.differential(self.seed, table), table, self.device, self.name)
