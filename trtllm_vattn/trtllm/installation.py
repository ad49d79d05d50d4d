"""Patching TensorRT-LLM so that it makes the adapter's KV cache managers, and undoing that.

There is no official hook for a manager's class. `KvCacheCreator` asks the module global `get_kv_cache_manager_cls` of
``tensorrt_llm._torch.pyexecutor._util`` for it, and later versions may then fall back to another class; both functions
are wrapped. V1's estimate of the cache's size, with its second set of managers and graphs, is skipped. Executors are
patched too: each checks its managers when it starts (`start.check_executor`), however it came to them. Nothing here
imports torch or TensorRT-LLM.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trtllm.choose import Chooser, refuse_disaggregation
from trtllm_vattn.trtllm.config import ENVIRONMENT, TrtllmConfig
from trtllm_vattn.trtllm.start import check_executor, note_failed
from trtllm_vattn.trtllm.v2 import is_v2, limit_bytes
from trtllm_vattn.trtllm.versions import RANGE, VERSION_MODULE, refuse_unrecorded

logger = logging.getLogger(__name__)

TARGET = "tensorrt_llm._torch.pyexecutor._util"
"""Where managers are chosen and made."""
EXECUTOR = "tensorrt_llm._torch.pyexecutor.py_executor"
"""Where every executor of the PyTorch backend and of AutoDeploy starts."""
HOOK = Path(__file__).with_name("hook")
"""A folder for PYTHONPATH, whose sitecustomize has every Python process call `watch`."""


class _Patches:
    """Replaced attributes, restored in reverse order."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def put(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        before = getattr(owner, name)
        self._before.append((owner, name, before))
        setattr(owner, name, make(before))

    def undo(self) -> None:
        while self._before:
            setattr(*self._before.pop())


_patches = _Patches()
_environment: dict[str, str | None] = {}
"""Environment variables as they were before `install` set them."""


def install(config: TrtllmConfig | None = None, **keywords: Any) -> bool:
    """Have every LLM that is made from now on, in this process and its children, keep its KV cache at fixed addresses,
    or fail; returns whether TensorRT-LLM is installed.

    Parameters
    ----------
    config : TrtllmConfig or None
        None takes the keywords, which are its fields (``budget="40GiB"``, ``any_version=True``, …); without any, the
        environment.

    Raises
    ------
    ConfigError
        A setting is wrong, the installed version was not recorded (unless ``any_version``), or it lacks a name that the
        adapter needs; nothing is changed then.
    """
    if importlib.util.find_spec("tensorrt_llm") is None:
        logger.warning("tensorrt_llm is not installed; trtllm-vattn has nothing to do")
        return False
    if config is None:
        config = TrtllmConfig.of(keywords) if keywords else TrtllmConfig.from_environment()
    uninstall()
    try:
        for name, act in ACTIONS.items():
            act(_import(name), config)
    except BaseException:
        uninstall()
        raise
    for name, value in environment_for(config).items():
        _environment[name] = os.environ.get(name)
        os.environ[name] = value
    return True


def uninstall() -> None:
    """Undo `install`; LLMs that were made keep their KV caches. Idempotent."""
    _patches.undo()
    for finder in [each for each in sys.meta_path if isinstance(each, _Watch)]:
        sys.meta_path.remove(finder)
    while _environment:
        name, value = _environment.popitem()
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def environment_for(config: TrtllmConfig) -> dict[str, str]:
    """Environment variables with which a Python process and its children install the adapter by themselves."""
    others = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and part != str(HOOK)]
    return {**config.as_environment(), "PYTHONPATH": os.pathsep.join([str(HOOK), *others])}


def watch() -> None:
    """Install when TensorRT-LLM is imported; a process that does not import it stays as it is."""
    if ENVIRONMENT in os.environ and not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Has each module of `ACTIONS` patched right after it is loaded.

    It stays on ``sys.meta_path``, so that a module refused at its first import is refused at the next one too.
    """

    def __init__(self) -> None:
        self._looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in ACTIONS or self._looking:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Acting(spec.loader, ACTIONS[fullname])
        return spec


class _Acting(Loader):
    """A loader that calls `act` with each module it has loaded."""

    def __init__(self, real: Loader, act: Callable[[Any, TrtllmConfig], None]) -> None:
        self._real, self._act = real, act

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        self._act(module, TrtllmConfig.from_environment())


def _import(name: str) -> Any:
    """Import a module of the installed TensorRT-LLM. Raises ConfigError where there is none of that name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("tensorrt_llm"):
            raise
        raise ConfigError(_unknown(name, "is not there")) from error


def _unknown(name: str, what: str) -> str:
    return (
        f"{name} of the installed TensorRT-LLM {what}; the fixed-address cache fits {RANGE}: install one of these, or "
        "run without trtllm-vattn"
    )


def _require(owner: Any, name: str, names: Sequence[str]) -> None:
    missing = [each for each in names if not hasattr(owner, each)]
    if missing:
        raise ConfigError(_unknown(name, f"has no {', '.join(missing)}"))


def check_version(module: Any, config: TrtllmConfig) -> None:
    """Raise ConfigError for a version that was not recorded, unless ``any_version``."""
    if not config.any_version:
        refuse_unrecorded(str(getattr(module, "__version__", "of no named version")))


def patch_executor(module: Any, config: TrtllmConfig) -> None:
    """Patch a loaded ``py_executor``: executors check their managers when they start, and name the requests that end in
    an error. Raises ConfigError where it lacks a name that is needed."""
    _require(module, EXECUTOR, ["PyExecutor"])
    _require(module.PyExecutor, f"{EXECUTOR}.PyExecutor", ["start_worker", "_handle_errors"])

    def checking(original: Any) -> Any:
        def start_worker(self: Any, *args: Any, **named: Any) -> Any:
            check_executor(self, config)
            return original(self, *args, **named)

        return functools.wraps(original)(start_worker)

    def noting(original: Any) -> Any:
        def _handle_errors(self: Any, *args: Any, **named: Any) -> Any:
            given = named.get("requests")
            note_failed(self, self.active_requests if given is None else given)
            return original(self, *args, **named)

        return functools.wraps(original)(_handle_errors)

    _patches.put(module.PyExecutor, "start_worker", checking)
    _patches.put(module.PyExecutor, "_handle_errors", noting)


def patch(module: Any, config: TrtllmConfig) -> None:
    """Patch a loaded ``_util``. Raises ConfigError where it lacks a name that is needed."""
    _require(module, TARGET, ["get_kv_cache_manager_cls", "KvCacheCreator", "KVCacheManager"])
    creator = module.KvCacheCreator
    _require(creator, f"{TARGET}.KvCacheCreator", ["try_prepare_estimation"])
    choose = Chooser(module.KVCacheManager, config)

    def choosing(original: Any) -> Any:
        return functools.wraps(original)(lambda *args, **named: choose(original(*args, **named)))

    def creating(original: Any) -> Any:
        def __init__(self: Any, *args: Any, **named: Any) -> None:
            refuse_disaggregation(named)
            given: Any = named.get("kv_cache_config")
            before = getattr(given, "max_gpu_total_bytes", None)
            if config.budget_bytes is not None and hasattr(given, "max_gpu_total_bytes"):
                # For V2: TensorRT-LLM itself divides these bytes between a model and its draft model.
                limit_bytes(given, config.budget_bytes)
            original(self, *args, **named)
            _require(self, f"{TARGET}.KvCacheCreator", ["_kv_cache_manager_cls"])
            if hasattr(given, "max_gpu_total_bytes") and not is_v2(self._kv_cache_manager_cls):
                given.max_gpu_total_bytes = before

        return functools.wraps(original)(__init__)

    def skipping(original: Any) -> Any:
        def try_prepare_estimation(self: Any) -> bool:
            # V2 must be estimated: that is where its quota comes from.
            return not choose.is_fixed(self._kv_cache_manager_cls) and bool(original(self))

        return functools.wraps(original)(try_prepare_estimation)

    _patches.put(module, "get_kv_cache_manager_cls", choosing)
    _patches.put(creator, "__init__", creating)
    _patches.put(creator, "try_prepare_estimation", skipping)
    if hasattr(creator, FALLBACK):
        _patches.put(creator, FALLBACK, choosing)
    logger.info("process %d takes its KV cache managers from trtllm-vattn (%s)", os.getpid(), config)


FALLBACK = "_fallback_if_unsupported_kv_cache_manager_v2"
"""The method of `KvCacheCreator` that falls back from V2 to the stock V1 class."""
ACTIONS: dict[str, Callable[[Any, TrtllmConfig], None]] = {
    VERSION_MODULE: check_version,
    EXECUTOR: patch_executor,
    TARGET: patch,
}
"""What is done with each module of TensorRT-LLM, in the order in which `install` imports them."""
