"""Which NIXL and UCX move bytes, and what is known of them over memory that is remapped.

* openucx/ucx#11283 (open, so every version): CUDA IPC exports one handle a registered region, and reads wrong bytes
  behind the first extent of a longer one. Each extent is a registration of its own here, so no version is refused for
  it.
* UCX 1.21 keeps the other process's memory mapped (openucx/ucx#11288, rapidsai/ucxx#733, "resolved in v1.22 and
  above"): what is unmapped here would not return to the GPU. It is refused for memory of a GPU, unless ``UCX_TLS``
  leaves CUDA IPC out.
* Memory of cuMemCreate is shared on one host by file descriptors since 1.22, where UCX was built with pidfd_getfd
  (openucx/ucx#11183, #11548). Else it goes through host memory and TCP, hundreds of times slower: a warning says so.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import logging
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtllm_vattn.errors import ConfigError

logger = logging.getLogger(__name__)

KEEPS_MEMORY = (1, 21)
"""The version that does not give other processes' memory back."""


@dataclass(frozen=True)
class Ucx:
    """What is installed.

    Parameters
    ----------
    nixl, ucx : str
        Versions.
    shares_vmm : bool
        Whether its CUDA IPC was built to take memory of cuMemCreate by file descriptors.
    """

    nixl: str
    ucx: str
    shares_vmm: bool

    def as_dict(self) -> dict[str, Any]:
        """For statistics."""
        return asdict(self)

    def __str__(self) -> str:
        shared = "shares" if self.shares_vmm else "does not share"
        return f"NIXL {self.nixl} over UCX {self.ucx}, which {shared} cuMemCreate's memory on one host"


def nixl_installed() -> bool:
    """Whether NIXL can be imported here."""
    return importlib.util.find_spec("nixl_cu13") is not None


def installed_ucx() -> Ucx:
    """NIXL and the UCX that it has loaded, or would load. Raises ConfigError where there is none."""
    if not nixl_installed():
        raise ConfigError("nixl is not installed: pip install 'trtllm-vattn[transfer]'")
    library = _library()
    get_version = ctypes.CDLL(str(library)).ucp_get_version_string
    get_version.restype = ctypes.c_char_p
    modules = [path.read_bytes() for path in library.parent.glob("ucx/libuct_cuda.so*")]
    # By the symbols that it calls: pidfd_getfd, or the system call by its number.
    shares = any(b"pidfd_getfd" in module or b"\0syscall\0" in module for module in modules)
    return Ucx(importlib.metadata.version("nixl-cu13"), get_version().decode(), shares)


def _library() -> Path:
    """UCX's protocol library: the one that is loaded, or the wheel's."""
    loaded = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libucp" in line]
    if loaded:
        return Path(loaded[0])
    spec = importlib.util.find_spec("nixl_cu13")
    assert spec is not None
    assert spec.origin is not None
    beside = sorted(Path(spec.origin).parents[1].glob("nixl_cu13.libs/libucp*.so*"))
    if not beside:
        raise ConfigError(f"{spec.origin} brings no UCX (libucp); install nixl-cu13's wheel")
    return beside[0]


def check_ucx(found: Ucx, device: str) -> None:
    """Refuse what would lose memory of a device, and warn of what would be slow.

    Raises ConfigError.
    """
    if not device.startswith("cuda"):
        return
    # As `UCX_TLS=^cuda_ipc`, or a list without it.
    lanes = os.environ.get("UCX_TLS", "all")
    has_ipc = "cuda_ipc" not in lanes if lanes.startswith("^") else bool(re.search(r"\b(all|cuda|cuda_ipc)\b", lanes))
    version = tuple(int(number) for number in re.findall(r"\d+", found.ucx)[:2])
    if version == KEEPS_MEMORY and has_ipc:
        raise ConfigError(
            f"UCX {found.ucx} keeps memory of other processes mapped (rapidsai/ucxx#733), so what is unmapped would "
            "not return to the GPU; install a NIXL with UCX 1.22 or newer, or set UCX_TLS=^cuda_ipc"
        )
    if not (has_ipc and found.shares_vmm):
        logger.warning(
            "%s: between processes of one host, bytes go through host memory and TCP; link='ipc' maps them instead",
            found,
        )
