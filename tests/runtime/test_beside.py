"""Memory mapped beside running steps: what goes wrong there, and how prompts of a burst get theirs."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import DriverError
from trtllm_vattn.runtime import Engine, SamplingParams
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import FaultyDriver

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 10]]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    import torch

    return load_model("tiny-llama", "cpu", torch.float32, 0)


def build(model: PreTrainedModel, driver: FaultyDriver, **options: object) -> Engine:
    cache = KVCacheManager(shape_of(model, 4, 128), driver, 64 << 20)
    return Engine(model, cache, buckets=[4], chunk=16, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"loop": True, "steps": 4}])
def test_what_fails_beside_a_step_is_raised_by_the_next_and_costs_no_token(
    model: PreTrainedModel, options: dict[str, object]
) -> None:
    tokens: list[dict[int, list[int]]] = []
    for failing in (False, True):
        driver = FaultyDriver(HostDriver())
        raised = 0
        with build(model, driver, **options) as engine:
            seen: dict[int, list[int]] = {engine.submit(prompt, SamplingParams(100)): [] for prompt in PROMPTS}
            cache = engine.cache
            assert isinstance(cache, KVCacheManager)
            count = 0
            while engine.busy:
                if failing and count in (5, 12):
                    driver.fail("set_access")
                count += 1
                try:
                    for event in engine.step():
                        seen[event.request].append(event.token)
                except DriverError:
                    raised += 1
                assert cache.wait_ahead()
            cache.check_integrity()
        driver.disarm()
        assert (raised > 0) is failing
        tokens.append(seen)
    assert tokens[0] == tokens[1]
    assert {len(each) for each in tokens[0].values()} == {100}


def test_a_burst_is_given_memory_two_prompts_at_a_time(model: PreTrainedModel) -> None:
    with build(model, FaultyDriver(HostDriver())) as engine:
        for _ in range(4):
            engine.submit(list(range(1, 30)), SamplingParams(4))
        engine.step()
        # The first goes in by chunks, the second's memory was mapped beside it; the others hold none.
        assert engine.cache.stats().sequences == 2
        assert len(engine.scheduler.waiting) == 2
        done = {event.request for event in engine.run() if event.finish_reason}
        assert done == {0, 1, 2, 3}
