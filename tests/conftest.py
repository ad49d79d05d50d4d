"""Fixtures for all tests: drivers that must be left as they were found, and what to do without a GPU."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Tests need no network: names of models are looked up in the cache alone. It is read when the library is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import forking
import hypothesis
import pytest
import torch

from trtllm_vattn.runtime.models import SHAPES
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.cuda import CudaDriver
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import CountingDriver

# Tiny models: threads of one operation would only wait for one another, and where others want the processors, long.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Two layers show what four do, in half the time. Their heads are twice as large, so that a token takes as many bytes.
WHOLE = {name: shape for name, shape in SHAPES.items() if name.startswith("tiny-")}
SHAPES.update({name: {**shape, "num_hidden_layers": 2, "head_dim": 32} for name, shape in WHOLE.items()})

hypothesis.settings.register_profile(
    "default",
    deadline=None,
    max_examples=30,
    stateful_step_count=40,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="fail where there is no GPU instead of skipping")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--require-gpu") and not torch.cuda.is_available():
        raise pytest.UsageError("--require-gpu: torch sees no GPU")
    if torch.cuda.is_available():
        # Libraries look at devices when they are imported, and CUDA does not outlive a fork.
        os.environ[forking.VARIABLE] = sys.executable
    elif not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="vattn-")
        server = forking.start(Path(folder.name))

        def end() -> None:
            server.communicate()
            folder.cleanup()

        config.add_cleanup(end)


def pytest_collection_finish() -> None:
    # What the libraries made at their import stays: no collection, of which some tests ask for many, looks at it again.
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def whole_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own `tiny-` models, as other processes have them."""
    for name, shape in WHOLE.items():
        monkeypatch.setitem(SHAPES, name, shape)


@pytest.fixture
def host_driver() -> Iterator[HostDriver]:
    """A host driver whose granularity is 4 KiB; the test must leave nothing in it."""
    driver = HostDriver()
    yield driver
    left = (driver.live_mappings, driver.live_handles, driver.live_reservations)
    driver.close()
    assert left == (0, 0, 0), f"mappings, handles, reservations left: {left}"


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    """Either driver; the test must leave nothing in it."""
    counting = CountingDriver(HostDriver() if request.param == "host" else CudaDriver())
    yield counting
    calls = counting.calls
    assert calls["create"] == calls["release"], calls
    assert calls["reserve"] == calls["free"], calls


@pytest.fixture
def forked_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that the package starts by ``sys.executable`` have their libraries imported (`forking`)."""
    monkeypatch.setattr(sys, "executable", forking.python())


@pytest.fixture
def run_apart() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python source in a process of its own, which may die; libraries are imported there (`forking`), but where
    it is to be a `fresh` one."""

    def run(
        source: str, *arguments: str, timeout: float = 240, fresh: bool = False
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable if fresh else forking.python(), "-c", source, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)

    return run
