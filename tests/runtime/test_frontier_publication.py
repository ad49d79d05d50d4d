"""When frontiers are published to a loop on the device, and which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.wrappers import WrappedDriver


class Noting(WrappedDriver):
    """Notes what was mapped, when, and which addresses are accessible."""

    def __init__(self, device: str) -> None:
        super().__init__(open_driver(device))
        self.order: list[str] = []
        self.accessible: list[tuple[int, int]] = []

    def _call(self, name: str, *arguments: int) -> Any:
        answer = super()._call(name, *arguments)
        if name in ("map", "set_access"):
            self.order.append(name)
        if name == "set_access":
            self.accessible.append((arguments[0], arguments[0] + arguments[1]))
        return answer

    def reaches(self, base: int) -> int:
        """Bytes from `base` on that are accessible."""
        end = base
        while more := [stop for start, stop in self.accessible if start <= end < stop]:
            end = max(more)
        return end - base


def publish_early(cache: KVCacheManager, publish: Callable[[], None]) -> None:
    """Has the cache's mapping ahead publish frontiers before the memory is accessible."""
    grow = cache.arena.grow

    def early(wants: dict[int, int], **options: Any) -> Any:
        for slot, tokens in wants.items():
            cache.frontiers[slot] = tokens
        publish()
        return grow(wants, **options)

    cache.arena.grow = early  # type: ignore[method-assign]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mistake", [None, "an extra time before mapping", "of memory not mapped yet"])
def test_the_device_learns_of_memory_after_it_was_made_accessible(device: str, mistake: str | None) -> None:
    model = load_model("tiny-llama", device, torch.float32)
    driver = Noting(str(model.device))
    shape = shape_of(model, 1, 8192)
    page = driver.granularity() // shape.token_bytes
    cache = KVCacheManager(shape, driver, 64 << 20, shape.num_layers, lookahead=page)
    too_far: list[int] = []
    with Engine(model, cache, attention="torch", compile=False, steps=4, loop=True) as engine:
        decode, order = engine.decode, driver.order
        launch, publish, map_ahead = decode.runner.replay_while, decode.publish_frontiers, cache.map_ahead

        def launched(bucket: int) -> Any:
            order.append("launch")
            return launch(bucket)

        def published() -> None:
            publish()
            order.append("publish")
            reached = cache.layout.touched_bytes(int(decode._frontiers[0]))
            too_far.append(reached - driver.reaches(cache.layer(0).k.data_ptr()))  # type: ignore[union-attr]

        decode.runner.replay_while = launched  # type: ignore[method-assign]
        decode.publish_frontiers = published  # type: ignore[method-assign]
        engine._map_ahead._publish = published
        if mistake == "an extra time before mapping":
            cache.map_ahead = lambda: (published(), map_ahead())[1]  # type: ignore[method-assign,func-returns-value]
        elif mistake:
            publish_early(cache, published)
        # A decode step, not the prompt, is the first to come near the end of what is mapped.
        engine.submit([1] * max(1, page // 2 - 3), SamplingParams(40))
        while engine.busy and "set_access" not in order[order.index("launch") if "launch" in order else len(order) :]:
            engine.step()
        assert "set_access" in order[order.index("launch") :]
        # Each time by what was mapped just before, or to begin with.
        named = list(zip(["", *order], order, [*order[1:], ""], strict=False))
        right = max(too_far) <= 0 and all(
            before == "set_access" or after == "launch" for before, name, after in named if name == "publish"
        )
        assert right is (mistake is None), (order, too_far)
        if mistake is None:
            assert decode._frontiers[0] == cache.frontiers[0]
