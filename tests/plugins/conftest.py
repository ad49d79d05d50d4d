"""Fixtures for the plugin's tests: a TensorRT that builds, layers that are called, a registry left empty."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.plugins import callback_errors, registry
from trtllm_vattn.plugins.tensorrt import load_tensorrt


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    """Each test leaves no cache attached; what was refused in it is its own."""
    callback_errors.clear_errors()
    yield
    left = list(registry._attached)
    for name in left:
        registry.detach(name)
    assert not left, f"caches left attached: {left}"


@pytest.fixture(scope="session")
def rtx() -> Any:
    """tensorrt_rtx, which builds plans on any machine; the extra ``tensorrt-rtx`` installs it."""
    pytest.importorskip("onnx")
    try:
        return load_tensorrt("tensorrt_rtx")
    except ConfigError as error:
        pytest.skip(str(error))
