"""When memory may be mapped and unmapped: beside running work, or not.

Mapping beside running kernels was reported to end in faults on some machines ("driver TLB interference"). So a short
soak asks the machine's own driver (`remap_soak.py`), in a process of its own, because a fault ends a process; its
verdict is remembered by GPU and driver version.
"""

from __future__ import annotations

import enum
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.graphs.remap_soak import SoakReport
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.wrappers import QuiescingDriver

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

SOAK_SECONDS = 1.5


class MappingPolicy(str, enum.Enum):
    """When driver calls that change mappings happen."""

    CONCURRENT = "concurrent"
    """Beside running work: memory is mapped ahead while the device computes."""
    BETWEEN_STEPS = "between-steps"
    """When the work of our own stream is done."""
    QUIESCE = "quiesce"
    """When the whole device is idle."""

    @classmethod
    def named(cls, name: str) -> Self:
        """The policy of that name. Raises ConfigError where there is none."""
        try:
            return cls(name)
        except ValueError:
            names = ", ".join(policy.value for policy in cls)
            raise ConfigError(f"no mapping policy {name!r}; there are {names}, and auto at start-up") from None

    def wrap(self, driver: Driver) -> Driver:
        """A driver that keeps to the policy. On the host nothing runs beside it, and the driver is as it was."""
        if self is MappingPolicy.CONCURRENT or not driver.device.startswith("cuda"):
            return driver
        device = torch.device(driver.device)
        if self is MappingPolicy.BETWEEN_STEPS:
            return QuiescingDriver(driver, lambda: torch.cuda.current_stream(device).synchronize())
        return QuiescingDriver(driver, lambda: torch.cuda.synchronize(device))


@dataclass(frozen=True)
class PolicyChoice:
    """A policy, why it was chosen, and the soak that it rests on, if there was one."""

    policy: MappingPolicy
    why: str
    soak: SoakReport | None = None


class Choosing:
    """A choice under way: the soak runs beside whatever else starts. Closed by leaving its context."""

    def __init__(self, choice: PolicyChoice | None, soak: subprocess.Popen[str] | None, file: Path | None) -> None:
        self._choice, self._soak, self._file = choice, soak, file

    def result(self, timeout_s: float = 60.0) -> PolicyChoice:
        """Wait for the soak, judge it, and remember what it found."""
        if self._choice is None:
            assert self._soak is not None
            assert self._file is not None
            report = _await(self._soak, timeout_s)
            self._choice = _judge(report)
            _remember(self._file, report)
        return self._choice

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._soak is not None:
            self._soak.kill()
            self._soak.communicate()


def start_choosing(
    device: str,
    wanted: str = "auto",
    *,
    cache_dir: Path | None = None,
    command: Sequence[str] | None = None,
) -> Choosing:
    """Begin to choose a policy for a device.

    Parameters
    ----------
    wanted : str
        A policy's name, taken as it is, or ``auto``.
    cache_dir : Path or None
        Where verdicts are kept; None is ``trtllm-vattn`` in the user's cache folder.
    command : sequence of str or None
        What to run for the soak; it prints a `SoakReport` as one line of JSON.

    Raises
    ------
    ConfigError
        There is no such policy.
    """
    if wanted != "auto":
        return Choosing(PolicyChoice(MappingPolicy.named(wanted), "asked for"), None, None)
    if not device.startswith("cuda"):
        return Choosing(PolicyChoice(MappingPolicy.CONCURRENT, "no device runs beside the host"), None, None)
    folder = cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trtllm-vattn"
    file = folder / f"mapping-{_machine_key(device)}.json"
    known = _recall(file)
    if known is not None:
        return Choosing(_judge(known), None, None)
    if command is None:
        command = [sys.executable, "-m", "trtllm_vattn.graphs.remap_soak", "--device", device]
        command += ["--seconds", str(SOAK_SECONDS)]
    soak = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return Choosing(None, soak, file)


def _machine_key(device: str) -> str:
    """The GPU and its driver, fit for a file's name."""
    import pynvml

    pynvml.nvmlInit()
    try:
        version = pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()
    return f"{torch.cuda.get_device_properties(torch.device(device)).uuid}-{version}"


def _await(soak: subprocess.Popen[str], timeout_s: float) -> SoakReport:
    try:
        printed, complaint = soak.communicate(timeout=timeout_s)
        return SoakReport(**json.loads(printed.strip().splitlines()[-1]))
    except subprocess.TimeoutExpired:
        soak.kill()
        soak.communicate()
        error = f"the soak did not end within {timeout_s:.0f} s"
    except (ValueError, TypeError, IndexError):
        last = complaint.strip().splitlines()[-1:] or ["it printed nothing"]
        error = f"the soak ended with code {soak.returncode}: {last[0]}"
    return SoakReport(reads=0, remaps=0, wrong_words=0, seconds=0.0, error=error)


def _judge(report: SoakReport) -> PolicyChoice:
    did = f"{report.remaps:,} remappings beside {report.reads:,} reads in {report.seconds:.1f} s"
    if report.error or report.wrong_words or not report.remaps or not report.reads:
        why = report.error or f"{report.wrong_words:,} wrong words in {did}"
        return PolicyChoice(MappingPolicy.BETWEEN_STEPS, why, report)
    return PolicyChoice(MappingPolicy.CONCURRENT, f"{did}, no wrong word", report)


def _recall(file: Path) -> SoakReport | None:
    try:
        return SoakReport(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s is not a soak's report (%s); the soak runs again", file, error)
        return None


def _remember(file: Path, report: SoakReport) -> None:
    """Written whole or not at all. A folder that cannot be written costs the next start another soak."""
    written = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as written:
            json.dump(asdict(report), written)
        os.replace(written.name, file)
    except OSError as error:
        logger.warning("the soak's verdict could not be kept in %s: %s", file, error)
        if written is not None:
            with suppress(FileNotFoundError):
                os.unlink(written.name)
