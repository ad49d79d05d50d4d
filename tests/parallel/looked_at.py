"""What tests have other ranks do (`Ranks.call`); a module that other processes import, too."""

from __future__ import annotations

import os
import signal
from typing import Any

from trtllm_vattn.runtime.models import SHAPES
from trtllm_vattn.runtime.parallel import build
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.wrappers import FaultyDriver

_made: list[FaultyDriver] = []


def faulty(device: str) -> Driver:
    """Opens a driver whose calls can be made to fail, and that is found again by `arm`."""
    _made.append(FaultyDriver(open_driver(device)))
    return _made[-1]


def use_faulty(engine: Any) -> None:
    """Caches that are built here from now on have faulty drivers."""
    build.open_driver = faulty  # type: ignore[attr-defined]


def use_shapes(engine: Any, shapes: dict[str, dict[str, Any]]) -> None:
    """Named shapes are these from now on."""
    SHAPES.clear()
    SHAPES.update(shapes)


def arm(engine: Any, call: str, skip: int) -> None:
    """Have a later call of the newest driver fail."""
    _made[-1].fail(call, skip)


def arm_randomly(engine: Any, probability: float, seed: int) -> None:
    """Have any call of the newest driver fail, now and then."""
    _made[-1].fail_randomly(probability, seed)


def disarm(engine: Any) -> int:
    """How many calls the newest driver has seen; none fails any more, and what was left to release is released."""
    _made[-1].disarm()
    if engine is not None:
        engine.cache.release_left()
    return _made[-1].seen


def slots(engine: Any) -> tuple[dict[int, int], int]:
    """The running sequences' slots, and the bytes of the budget; the cache agrees with itself."""
    engine.cache.check_integrity()
    return dict(engine.cache.sequences), engine.cache.budget_bytes


def addresses(engine: Any) -> list[int]:
    """Where the cache's ranges begin."""
    return [tensor.data_ptr() for tensor in engine.cache.storages()]


def heads(engine: Any) -> tuple[int, int]:
    """Query and KV heads of this rank."""
    return engine.model.config.num_attention_heads, engine.cache.shape.num_kv_heads


def left_behind(engine: Any) -> tuple[int, int, int]:
    """Mappings, handles and reservations of the newest driver."""
    host = _made[-1].inner
    return host.live_mappings, host.live_handles, host.live_reservations  # type: ignore[attr-defined]


def die(engine: Any) -> None:
    """End this process as a crash does."""
    os.kill(os.getpid(), signal.SIGKILL)
