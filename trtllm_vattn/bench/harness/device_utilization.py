"""How much of a decode step the device works, by the profiler's record of its kernels and copies."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

WORK = {"kernel", "gpu_memcpy", "gpu_memset"}
"""Categories of events, in the profiler's trace, in which the device works."""


@dataclass(frozen=True)
class DeviceUtilization:
    """Milliseconds a step in which the device worked, and pieces of work a step.

    `profiled_step_ms` is how long a step took meanwhile, longer than without a profiler.
    """

    device_busy_ms: float
    work_a_step: float
    profiled_step_ms: float


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the spans, from beginning to end, was under way; some run beside others."""
    whole, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        whole += max(0.0, end - max(begin, until))
        until = max(until, end)
    return whole


def work_of(events: Iterable[dict[str, Any]]) -> list[tuple[float, float]]:
    """Beginnings and ends, in microseconds, of the device's work among the events of a Chrome trace."""
    return [(event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in WORK]


def device_utilization(decode: Callable[[], int], device: torch.device) -> DeviceUtilization | None:
    """Profile `decode`, which returns how many steps it took; None on the host, or where the profiler saw no work.

    As many steps must be submitted meanwhile as it returns.
    """
    if device.type != "cuda":
        return None
    # What is under way already is not of these steps.
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        started = perf_counter()
        steps = decode()
        torch.cuda.synchronize(device)
        wall_s = perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        spans = work_of(json.loads(trace.read_text())["traceEvents"])
    if not spans:
        return None
    return DeviceUtilization(covered(spans) / 1e3 / steps, len(spans) / steps, 1e3 * wall_s / steps)
