"""When the driver may map and unmap memory: while kernels run, or only while they do not.

Mapping beside running kernels was reported to cause faults on some machines ("driver TLB interference"). So
`remap_probe.py` tests this machine's driver for a second or two, in a process of its own because a fault ends a
process. Its report is stored by GPU and driver version.
"""

from __future__ import annotations

import enum
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.files import write_json
from trtllm_vattn.machine import nvml
from trtllm_vattn.memory.remap_probe import RemapReport
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.wrappers import QuiescingDriver

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

PROBE_SECONDS = 1.5


class MappingPolicy(str, enum.Enum):
    """When driver calls that change mappings happen."""

    CONCURRENT = "concurrent"
    """While the device computes: memory is mapped ahead of the steps that need it."""
    BETWEEN_STEPS = "between-steps"
    """When all work of torch's current stream has finished."""
    QUIESCE = "quiesce"
    """When the whole device is idle."""

    @classmethod
    def named(cls, name: str) -> Self:
        """The policy with this name. Raises ConfigError if there is none."""
        try:
            return cls(name)
        except ValueError:
            names = ", ".join(policy.value for policy in cls)
            raise ConfigError(f"no mapping policy {name!r}; there are {names}, and auto at start-up") from None

    def wrap(self, driver: Driver) -> Driver:
        """Wrap a driver so that its mapping calls wait as the policy says. A host driver is returned as it is."""
        if self is MappingPolicy.CONCURRENT or not driver.device.startswith("cuda"):
            return driver
        device = torch.device(driver.device)
        if self is MappingPolicy.BETWEEN_STEPS:
            return QuiescingDriver(driver, lambda: torch.cuda.current_stream(device).synchronize())
        return QuiescingDriver(driver, lambda: torch.cuda.synchronize(device))


@dataclass(frozen=True)
class PolicyChoice:
    """A policy, the reason for it, and the probe's report, if a probe decided."""

    policy: MappingPolicy
    why: str
    report: RemapReport | None = None


class PolicyProbe:
    """The choice of a policy, while the probe's process runs; leaving the context ends the process."""

    def __init__(
        self, choice: PolicyChoice | None, process: subprocess.Popen[str] | None = None, file: Path | None = None
    ) -> None:
        self._choice, self._process, self._file = choice, process, file

    def result(self, timeout_s: float = 60.0) -> PolicyChoice:
        """Wait for the probe's report, store it, and choose a policy by it."""
        if self._choice is None:
            assert self._process is not None
            assert self._file is not None
            report = _await(self._process, timeout_s)
            self._choice = _judge(report)
            _store(self._file, report)
        return self._choice

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def start_policy_probe(
    device: str,
    wanted: str = "auto",
    *,
    cache_dir: Path | None = None,
    command: Sequence[str] | None = None,
) -> PolicyProbe:
    """Start choosing a policy for a device; on a GPU without a stored report this starts the probe's process.

    Parameters
    ----------
    wanted : str
        A policy's name, taken as it is, or ``auto``.
    cache_dir : Path or None
        Where reports are stored; None is ``trtllm-vattn`` in the user's cache folder.
    command : sequence of str or None
        The probe's command, which prints a `RemapReport` as one line of JSON; None is `remap_probe.py`.

    Raises
    ------
    ConfigError
        There is no such policy.
    """
    if wanted != "auto":
        return PolicyProbe(PolicyChoice(MappingPolicy.named(wanted), "asked for"))
    if not device.startswith("cuda"):
        return PolicyProbe(PolicyChoice(MappingPolicy.CONCURRENT, "no device runs beside the host"))
    folder = cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trtllm-vattn"
    file = folder / f"mapping-{_machine_key(device)}.json"
    stored = _load(file)
    if stored is not None:
        return PolicyProbe(_judge(stored))
    if command is None:
        command = [sys.executable, "-m", "trtllm_vattn.memory.remap_probe", "--device", device]
        command += ["--seconds", str(PROBE_SECONDS)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return PolicyProbe(None, process, file)


def _machine_key(device: str) -> str:
    """The GPU's UUID and the driver's version, as part of a file name."""
    with nvml() as library:
        version = "unknown" if library is None else library.nvmlSystemGetDriverVersion()
    return f"{torch.cuda.get_device_properties(torch.device(device)).uuid}-{version}"


def _await(process: subprocess.Popen[str], timeout_s: float) -> RemapReport:
    try:
        printed, complaint = process.communicate(timeout=timeout_s)
        return RemapReport(**json.loads(printed.strip().splitlines()[-1]))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        error = f"the probe did not end within {timeout_s:.0f} s"
    except (ValueError, TypeError, IndexError):
        last = complaint.strip().splitlines()[-1:] or ["it printed nothing"]
        error = f"the probe ended with code {process.returncode}: {last[0]}"
    return RemapReport(reads=0, remaps=0, wrong_words=0, seconds=0.0, error=error)


def _judge(report: RemapReport) -> PolicyChoice:
    did = f"{report.remaps:,} remappings beside {report.reads:,} reads in {report.seconds:.1f} s"
    if report.error or report.wrong_words or not report.remaps or not report.reads:
        why = report.error or f"{report.wrong_words:,} wrong words in {did}"
        return PolicyChoice(MappingPolicy.BETWEEN_STEPS, why, report)
    return PolicyChoice(MappingPolicy.CONCURRENT, f"{did}, no wrong word", report)


def _load(file: Path) -> RemapReport | None:
    try:
        return RemapReport(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s is not a probe's report (%s); the probe runs again", file, error)
        return None


def _store(file: Path, report: RemapReport) -> None:
    """Write the file whole or not at all. If the folder cannot be written, the next start probes again."""
    try:
        write_json(file, "the probe's report", asdict(report))
    except ConfigError as error:
        logger.warning("the probe's report could not be stored in %s: %s", file, error)
