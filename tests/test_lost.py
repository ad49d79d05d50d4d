"""What an error says of the device, and that an engine whose device is lost is never freed."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from trtllm_vattn.errors import ConfigError, DriverError, EngineClosed, VattnError
from trtllm_vattn.lost import is_lost_behind
from trtllm_vattn.runtime.engine import _Changing

ASSERT = DriverError("CUDA_ERROR_ASSERT", "cuEventCreate", ())


def handled(first: Exception, then: Exception) -> Exception:
    """`then`, raised while `first` was handled."""
    try:
        try:
            raise first
        except Exception:
            raise then  # noqa: B904
    except Exception as error:
        return error


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (None, False),
        (ConfigError("no"), False),
        (DriverError("CUDA_ERROR_OUT_OF_MEMORY", "cuMemCreate", (1,)), False),
        (ASSERT, True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (handled(ASSERT, EngineClosed("closing failed")), True),
        (handled(ConfigError("no"), EngineClosed("closed")), False),
    ],
    ids=str,
)
def test_an_error_tells_of_a_lost_device_also_through_those_behind_it(error: Exception | None, lost: bool) -> None:
    assert is_lost_behind(error) == lost


class Holder:
    """As much of an engine as its context of changes looks at."""

    def __init__(self, device: str) -> None:
        self.cache = SimpleNamespace(device=torch.device(device), mark_changing=lambda _: None)
        self._attention = self._interrupted = False


@pytest.mark.parametrize(
    ("device", "error", "kept"),
    [("cuda:0", ASSERT, True), ("cuda:0", VattnError("no"), False), ("cpu", ASSERT, False)],
)
def test_an_engine_whose_device_is_lost_is_never_freed(device: str, error: VattnError, kept: bool) -> None:
    engine = Holder(device)
    before = sys.getrefcount(engine)
    with pytest.raises(VattnError), _Changing(engine):  # type: ignore[arg-type]
        raise error
    assert sys.getrefcount(engine) - before == kept
