"""Importing TensorRT: the module `tensorrt` or `tensorrt_rtx`, which offer the same plugin interface.

The wheels of tensorrt-rtx hold only `libtensorrt_rtx.so.1`, but the library looks for its unversioned name when it
loads a plan's kernels or parses ONNX. A link of that name is made in the user's cache folder, because site-packages may
be read-only, and loaded by its path before the module is imported.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from trtllm_vattn.errors import ConfigError

MODULES = ("tensorrt", "tensorrt_rtx")
"""In the order in which ``auto`` tries them."""
UNVERSIONED = ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so")

_linked: list[ctypes.CDLL] = []


def available() -> dict[str, str]:
    """Each module's version, or why it cannot be imported."""
    found = {}
    for name in MODULES:
        try:
            found[name] = str(load_tensorrt(name).__version__)
        except ConfigError as error:
            found[name] = f"no: {error}"
    return found


def load_tensorrt(name: str = "auto") -> Any:
    """Import the module `name`, or with ``auto`` the first of `MODULES` that is installed.

    Raises ConfigError for another name, where it is not installed, or where it has no Python plugins of version 3.
    """
    if name not in ("auto", *MODULES):
        raise ConfigError(f"no TensorRT module {name!r}; there are auto, {', '.join(MODULES)}")
    wanted = MODULES if name == "auto" else (name,)
    for each in wanted:
        if importlib.util.find_spec(each) is not None:
            return _checked(each)
    raise ConfigError(
        f"{' and '.join(wanted)}: not installed; pip install 'trtllm-vattn[tensorrt-rtx]', or TensorRT 10 or newer"
    )


def _checked(name: str) -> ModuleType:
    if name == "tensorrt_rtx" and not _linked:
        _linked.extend(_load_unversioned())
    module = importlib.import_module(name)
    if not hasattr(module, "IPluginV3"):
        raise ConfigError(f"{name} {module.__version__} has no IPluginV3; install version 10 or newer")
    return module


def _load_unversioned() -> list[ctypes.CDLL]:
    """Load the wheel's libraries by their unversioned names."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:
        return []  # installed by other means, with its libraries on the loader's path
    folder = Path(spec.origin).parent
    links = link_folder(folder)
    there = [str(links / name) for name in UNVERSIONED if (links / name).exists()]
    return [ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL) for path in there]


def link_folder(libraries: Path) -> Path:
    """A folder with unversioned links to the libraries in another folder, made at the first call.

    Other programs that load tensorrt-rtx, such as its command line tools, need it on LD_LIBRARY_PATH.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trtllm-vattn" / "tensorrt-rtx"
    root.mkdir(parents=True, exist_ok=True)
    for name in UNVERSIONED:
        for target in sorted(libraries.glob(f"{name}.*"))[:1]:
            link, partial = root / name, root / f"{name}.{os.getpid()}"
            if not link.is_symlink() or link.readlink() != target:
                partial.unlink(missing_ok=True)
                partial.symlink_to(target)
                os.replace(partial, link)
    return root
