"""`trtllm-vattn doctor`: what works on this machine and what does not, and why; with a live check of each driver."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch

from trtllm_vattn.attention import trust
from trtllm_vattn.attention.select import available
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.errors import VattnError
from trtllm_vattn.machine import machine, versions
from trtllm_vattn.memory.mapping_policy import start_policy_probe
from trtllm_vattn.observe.surroundings import conditions
from trtllm_vattn.plugins import tensorrt
from trtllm_vattn.transfer.ucx import check_ucx, installed_ucx
from trtllm_vattn.trtllm.selfcheck import MODEL, self_check
from trtllm_vattn.trtllm.versions import OVERRIDE, RANGE, series_of
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.cuda import CudaDriver
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.owners import Extent, Reservation
from trtllm_vattn.vmm.tensors import tensor_at


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    works: bool
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `doctor`."""
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.add_argument(
        "--trtllm",
        nargs="?",
        const=MODEL,
        metavar="MODEL",
        help="instead, run stock and fixed-address TensorRT-LLM side by side on a small model "
        f"(default: not; without a name {MODEL})",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 where the host driver or a GPU works, or with ``--trtllm`` where all its checks passed."""
    if args.trtllm:
        return _check_trtllm(args)
    findings, drivers = examine()
    if args.json:
        report = {"machine": machine(), "versions": versions(), "findings": [asdict(f) for f in findings]}
        print(json.dumps(report, indent=1))
    else:
        facts = {**{k: v for k, v in machine().items() if k != "gpu"}, **versions()}
        for name, value in facts.items():
            print(f"{name:>24}  {value}")
        for finding in findings:
            print(f"{finding.name:>24}  {'ok' if finding.works else 'no'}: {finding.detail}")
    return 0 if drivers else 1


def _check_trtllm(args: argparse.Namespace) -> int:
    checks = self_check(args.trtllm)
    if args.json:
        print(json.dumps({"versions": versions(), "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        for check in checks:
            print(f"{check.name:>24}  {'ok' if check.passed else 'NO'}: {check.detail}")
    return 0 if all(check.passed for check in checks) else 1


def examine() -> tuple[list[Finding], int]:
    """All findings, and how many drivers passed their check."""
    findings = [_gpu(), *_attributes()]
    drivers = 0
    for name, opens in (("CUDA driver seam", CudaDriver), ("host driver seam", HostDriver)):
        try:
            finding = Finding(name, True, _remap(opens()))
            drivers += 1
        except VattnError as error:
            finding = Finding(name, False, str(error))
        findings.append(finding)
    findings += _surroundings()
    findings.append(_mapping())
    findings += [Finding(f"attention {name}", why == "yes", why) for name, why in available().items()]
    usual = CacheShape(1, 8, 128, torch.bfloat16, 1, 1)
    for name, (_, availability, _) in trust.PROVIDERS.items():
        why = availability(usual)
        findings.append(Finding(f"prompts {name}", why == "yes", why))
    for name, version in tensorrt.available().items():
        findings.append(Finding(name, not version.startswith("no: "), version.removeprefix("no: ")))
    for package, what in (
        ("transformers", "Engine over Hugging Face models (pip install 'trtllm-vattn[runtime]')"),
        ("starlette", "the server (pip install 'trtllm-vattn[serve]')"),
        ("llguidance", "JSON schemas and regular expressions (pip install 'trtllm-vattn[grammar]')"),
        ("msgspec", "brokers (pip install 'trtllm-vattn[tenancy]')"),
        ("rich", "top (pip install 'trtllm-vattn[observe]')"),
        ("matplotlib", "plots (pip install 'trtllm-vattn[bench]')"),
    ):
        findings.append(Finding(package, importlib.util.find_spec(package) is not None, what))
    findings += [_transfer(), _tensorrt_llm()]
    return findings, drivers


def _transfer() -> Finding:
    """Whether sequences can be sent to other machines, and by which versions."""
    try:
        found = installed_ucx()
        check_ucx(found, "cuda" if torch.cuda.is_available() else "cpu")
    except VattnError as error:
        return Finding("transfer", False, str(error))
    return Finding("transfer", True, str(found))


def _surroundings() -> list[Finding]:
    """What this process may take here."""
    found: dict[str, Any] | None = machine()["gpu"]
    try:
        driver: Driver | None = CudaDriver()
    except VattnError:
        driver = None
    return [
        Finding(*each)
        for each in conditions(driver, None if driver is None or found is None else found["memory_bytes"])
    ]


def _tensorrt_llm() -> Finding:
    """Whether the adapter was held against the installed version."""
    what = "TensorRT-LLM (trtllm-vattn run, doctor --trtllm; trtllm-build with plugins/models)"
    try:
        version = importlib.metadata.version("tensorrt_llm")
    except importlib.metadata.PackageNotFoundError:
        return Finding("tensorrt_llm", False, f"{what}: not installed; pip install 'tensorrt-llm>=1.2,<1.5'")
    if series_of(version) is None:
        return Finding(
            "tensorrt_llm",
            False,
            f"{version} is none that the adapter was held against ({RANGE}); try it by {OVERRIDE}",
        )
    return Finding("tensorrt_llm", True, f"{version}; {what}")


def _mapping() -> Finding:
    """The policy that an engine would get on this machine; on a GPU by a probe, unless its report is stored."""
    with start_policy_probe("cuda:0" if torch.cuda.is_available() else "cpu") as probe:
        choice = probe.result()
    return Finding("mapping policy", True, f"{choice.policy.value}: {choice.why}")


def _gpu() -> Finding:
    found: dict[str, Any] | None = machine()["gpu"]
    if found is None:
        return Finding(
            "GPU", False, "NVML finds none: everything runs on the host driver, benchmarks with a tiny model"
        )
    text = f"{found['name']}, {found['memory_bytes'] / 2**30:.0f} GiB, driver {found['driver']}, CUDA {found['cuda']}"
    if not torch.cuda.is_available():
        return Finding(
            "GPU", False, f"{text}; but this torch ({torch.__version__}) cannot use it: install a CUDA build"
        )
    return Finding("GPU", True, text)


def _attributes() -> list[Finding]:
    """The GPU's attributes of virtual memory management; empty without a GPU."""
    try:
        driver = CudaDriver()
    except VattnError:
        return []
    names = {
        "memory management": "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED",
        "handles as descriptors": "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED",
        "handles over fabric": "HANDLE_TYPE_FABRIC_SUPPORTED",
        "GPUDirect RDMA": "GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED",
    }
    device = driver.call("cuDeviceGet", int(driver.device.partition(":")[2]))
    found = []
    for name, attribute in names.items():
        asked = getattr(driver.cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{attribute}")
        supported = bool(driver.call("cuDeviceGetAttribute", asked, device))
        found.append(Finding(name, supported, f"the driver says of virtual memory ({attribute.lower()})"))
    return found


def _remap(driver: Driver) -> str:
    """Map a page, read it through a tensor, map another page there, and read again."""
    granularity = driver.granularity()
    started = perf_counter()
    reservation = Reservation(driver, granularity)
    extents = [Extent(driver, granularity) for _ in range(2)]
    window = tensor_at(reservation.base, granularity, driver.device)
    seen = []
    for value, extent in enumerate(extents, 1):
        (mapping,) = reservation.map(0, [extent])
        window.fill_(value)
        # Reading waits for the device: an unmap is not ordered behind what it still has to do.
        seen.append(int(window[granularity // 2]))
        mapping.close()
    for extent in extents:
        (mapping,) = reservation.map(0, [extent])
        seen.append(int(window[granularity // 2]))
        mapping.close()
    for extent in extents:
        extent.close()
    reservation.close()
    if seen != [1, 2, 1, 2]:
        raise VattnError(f"under two pages in turn, the same address read {seen} instead of [1, 2, 1, 2]")
    return f"granularity {granularity:,} bytes; remap check passed in {1e3 * (perf_counter() - started):.1f} ms"
