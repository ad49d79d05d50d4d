"""A fake TensorRT-LLM on the path, for one test; small managers over the host driver."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from trtllm_shape import FAKE, SHAPE, VERSIONS

from trtllm_vattn.trtllm import uninstall
from trtllm_vattn.trtllm.config import TrtllmConfig
from trtllm_vattn.trtllm.manager import make_manager
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.open import open_driver


@pytest.fixture
def series() -> str:
    """Which recorded version the fake is; tests that are parametrized over `series` play several."""
    return "1.2"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, series: str) -> Iterator[SimpleNamespace]:
    """The fake's modules, freshly imported; nothing of it is left behind.

    Its kernels run on the host, so its managers are over the host driver on any machine.
    """
    monkeypatch.setattr("trtllm_vattn.trtllm.manager.open_driver", lambda device: open_driver("cpu"))
    monkeypatch.setenv("TRTLLM_FAKE_VERSION", VERSIONS[series])
    sys.path.insert(0, str(FAKE))
    inner = "_torch.pyexecutor."
    names = ("bindings", f"{inner}resource_manager", f"{inner}py_executor", f"{inner}_util")
    try:
        bindings, managers, executor, util = (importlib.import_module(f"tensorrt_llm.{name}") for name in names)
        yield SimpleNamespace(bindings=bindings, managers=managers, executor=executor, util=util)
    finally:
        uninstall()
        sys.path.remove(str(FAKE))
        for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
            del sys.modules[name]


@pytest.fixture
def make(fake: SimpleNamespace, host_driver: HostDriver) -> Iterator[Callable[..., Any]]:
    """Makes fixed-address managers over the host driver, shut down at the end."""
    made = []

    def build(config: TrtllmConfig | None = None, cache_config: Any = None, **shape: Any) -> Any:
        kind = make_manager(fake.managers.KVCacheManager, config, lambda: host_driver)
        arguments = {**SHAPE, "mapping": fake.managers.Mapping(), "dtype": fake.bindings.DataType.FLOAT, **shape}
        manager = kind(cache_config or fake.managers.KvCacheConfig(), fake.bindings.CacheType.SELF, **arguments)
        made.append(manager)
        return manager

    yield build
    for manager in made:
        manager.shutdown()
        manager.shutdown()
