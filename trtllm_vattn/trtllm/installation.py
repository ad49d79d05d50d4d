"""Putting the adapter where TensorRT-LLM takes its KV cache manager from, and taking it away again.

There is no official hook in 1.2.x. `KvCacheCreator` asks the module global `get_kv_cache_manager_cls` of
``tensorrt_llm._torch.pyexecutor._util`` for the class; that global is wrapped, whatever its arguments. Start-up is cut
short too: the estimate of the cache's size, with its second set of managers and graphs, is skipped, and the budget is
set once everything is captured, before the executor's loop starts. Nothing here imports torch or TensorRT-LLM.
"""

from __future__ import annotations

import functools
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
from trtllm_vattn.trtllm.config import ENVIRONMENT, TrtllmConfig

logger = logging.getLogger(__name__)

TARGET = "tensorrt_llm._torch.pyexecutor._util"
HOOK = Path(__file__).with_name("hook")
"""A folder for PYTHONPATH, whose sitecustomize makes every Python process watch for the target."""


class _Patches:
    """Attributes put over others, and put back in reverse."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def put(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        before = getattr(owner, name)
        self._before.append((owner, name, before))
        setattr(owner, name, make(before))

    def undo(self) -> None:
        while self._before:
            setattr(*self._before.pop())

    def __bool__(self) -> bool:
        return bool(self._before)


_patches = _Patches()
_environment: dict[str, str | None] = {}
"""Variables as they were before they were set."""


def install(config: TrtllmConfig | None = None, **keywords: Any) -> bool:
    """Have every LLM that is made from now on, here and in processes started from here, keep its KV cache at fixed
    addresses; returns whether TensorRT-LLM is there.

    Parameters
    ----------
    config : TrtllmConfig or None
        None takes the keywords, which are its fields; without any, the environment.

    Raises
    ------
    ConfigError
        Settings are wrong, or the installed TensorRT-LLM is none that the adapter fits; nothing is changed.
    """
    if importlib.util.find_spec("tensorrt_llm") is None:
        logger.warning("tensorrt_llm is not installed; trtllm-vattn has nothing to do")
        return False
    if config is None:
        config = TrtllmConfig.of(keywords) if keywords else TrtllmConfig.from_environment()
    uninstall()
    __import__(TARGET)
    patch(sys.modules[TARGET], config)
    for name, value in environment_for(config).items():
        _environment[name] = os.environ.get(name)
        os.environ[name] = value
    return True


def uninstall() -> None:
    """Take everything back; LLMs that live keep what they have. Idempotent."""
    _patches.undo()
    for finder in [each for each in sys.meta_path if isinstance(each, _Watch)]:
        sys.meta_path.remove(finder)
    while _environment:
        name, value = _environment.popitem()
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def environment_for(config: TrtllmConfig) -> dict[str, str]:
    """Variables with which a Python process, and those that it starts, install the adapter by themselves."""
    others = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and part != str(HOOK)]
    return {**config.as_environment(), "PYTHONPATH": os.pathsep.join([str(HOOK), *others])}


def watch() -> None:
    """Install as soon as the target module is imported; nothing happens in a process that does not import it."""
    if ENVIRONMENT in os.environ and not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Finds the target as everyone else does, and patches it once it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Patching(spec.loader)
        return spec


class _Patching(Loader):
    """A loader that patches what it has loaded."""

    def __init__(self, real: Loader) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        if not _patches:
            patch(module, TrtllmConfig.from_environment())


def patch(module: Any, config: TrtllmConfig) -> None:
    """Patch a loaded ``_util``. Raises ConfigError where it is another than the adapter knows."""
    from trtllm_vattn.trtllm import elastic
    from trtllm_vattn.trtllm.choose import Chooser, refuse_disaggregation

    names = ("get_kv_cache_manager_cls", "KvCacheCreator", "KVCacheManager")
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise ConfigError(
            f"{module.__name__} of the installed TensorRT-LLM has no {', '.join(missing)}; the fixed-address cache "
            "fits 1.2.x: install tensorrt-llm>=1.2,<1.3, or run without trtllm-vattn"
        )
    choose = Chooser(module.KVCacheManager, config)

    def choosing(original: Any) -> Any:
        return functools.wraps(original)(lambda *args, **named: choose(original(*args, **named)))

    def checking(original: Any) -> Any:
        def __init__(self: Any, *args: Any, **named: Any) -> None:
            refuse_disaggregation(named)
            original(self, *args, **named)

        return functools.wraps(original)(__init__)

    def skipping(original: Any) -> Any:
        return functools.wraps(original)(lambda self: False)

    def sizing(original: Any) -> Any:
        def start_worker(self: Any, *args: Any, **named: Any) -> Any:
            elastic.size_all()
            return original(self, *args, **named)

        return functools.wraps(original)(start_worker)

    _patches.put(module, "get_kv_cache_manager_cls", choosing)
    _patches.put(module.KvCacheCreator, "__init__", checking)
    if hasattr(module.KvCacheCreator, "try_prepare_estimation"):
        _patches.put(module.KvCacheCreator, "try_prepare_estimation", skipping)
    executor = getattr(module, "PyExecutor", None)
    if hasattr(executor, "start_worker"):
        _patches.put(executor, "start_worker", sizing)
    logger.warning(
        "trtllm-vattn is installed in process %d: KV caches made from now on are at fixed addresses (%s)",
        os.getpid(),
        config,
    )
