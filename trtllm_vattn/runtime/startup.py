"""What starting cost, and what memory is left for KV once everything else has been taken."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from time import perf_counter

import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.graphs.replay import CaptureReport
from trtllm_vattn.machine import free_bytes

progress = logging.getLogger(__name__)
"""Says at INFO what an engine that starts is doing, which takes up to minutes. `generate` and `serve` show it."""

LOAD = "load the model"
"""The phase of `StartupReport.load_s`."""


@dataclass
class StartupReport:
    """Seconds and bytes of an engine's start.

    `compile_s` is the first passes over compiled layers, 0 where none are; `budget_bytes` is what the cache may hold
    once it has started; `drafts` are steps with drafts, by their rows; `likely` are graphs that nobody has asked for
    yet (likely.py); `attention` names the kernels of decode and of
    prompts; `phases` are the seconds of all that it was at, in order, one after the other (`mark`).
    """

    load_s: float = 0.0
    compile_s: float = 0.0
    decode: CaptureReport = field(default_factory=lambda: CaptureReport({}, {}, 0))
    prefill: CaptureReport = field(default_factory=lambda: CaptureReport({}, {}, 0))
    passes: CaptureReport = field(default_factory=lambda: CaptureReport({}, {}, 0))
    drafts: CaptureReport = field(default_factory=lambda: CaptureReport({}, {}, 0))
    likely: CaptureReport = field(default_factory=lambda: CaptureReport({}, {}, 0))
    budget_bytes: int = 0
    attention: str = ""
    phases: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=perf_counter)

    def mark(self, phase: str) -> None:
        """What was done since the last mark is called so."""
        now = perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._since
        self._since = now

    def join(self, before: StartupReport, budget_bytes: int) -> None:
        """The engine has started: `before` says what was done before it was made, `LOAD` among that."""
        self.mark("the rest, budget")
        self.phases = {**before.phases, **self.phases}
        self.load_s, self.budget_bytes = self.phases[LOAD], budget_bytes
        progress.info("%s", self.summary())

    @property
    def capture_s(self) -> float:
        return sum(sum(each.seconds.values()) for each in self._captured)

    @property
    def capture_bytes(self) -> int:
        return sum(each.pool_bytes for each in self._captured)

    def summary(self) -> str:
        """A line of it."""
        return (
            f"loaded in {self.load_s:.1f} s, compiled in {self.compile_s:.1f} s, captured graphs in "
            f"{self.capture_s:.1f} s; {self.budget_bytes / 2**20:,.1f} MiB for keys and values"
        )

    @property
    def _captured(self) -> tuple[CaptureReport, ...]:
        return self.decode, self.prefill, self.passes, self.drafts, self.likely


def memory_left(device: torch.device, utilisation: float = 0.9) -> int:
    """Bytes of a GPU that may still be taken if `utilisation` of its memory is to be used in all.

    The smaller of what the driver calls free and what NVML does, which counts other processes the same way. Raises
    ConfigError where nothing is left.
    """
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    properties = torch.cuda.get_device_properties(device)
    by_nvml = free_bytes(str(properties.uuid))
    free = free if by_nvml is None else min(free, by_nvml)
    left = free - int((1 - utilisation) * total)
    if left <= 0:
        raise ConfigError(
            f"{free:,} of {total:,} bytes are free on {device}, and {1 - utilisation:.0%} are to stay so: nothing is "
            "left for KV; free memory, or give a budget"
        )
    return left
