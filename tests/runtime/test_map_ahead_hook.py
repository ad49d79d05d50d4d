"""Memory mapped beside running steps: what goes wrong there, and how prompts of a burst get theirs."""

from __future__ import annotations

from threading import get_ident
from time import monotonic, sleep
from typing import Any

import pytest
from transformers import PreTrainedModel

from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import ConfigError, DriverError, ManagerClosed
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
        # The first is in by two passes, the second goes in, the memory of the third was mapped beside it.
        assert engine.cache.stats().sequences == 3
        assert len(engine.scheduler.waiting) == 1
        done = {event.request for event in engine.run() if event.finish_reason}
        assert done == {0, 1, 2, 3}


def test_what_fails_beside_the_last_step_is_raised_by_close_which_closes_all_the_same(model: PreTrainedModel) -> None:
    driver = FaultyDriver(HostDriver())
    engine = build(model, driver)
    cache = engine.cache
    assert isinstance(cache, KVCacheManager)
    engine.submit([1, 2, 3], SamplingParams(6))
    left = 6
    while left > 1:
        left -= len(engine.step())
    assert cache.wait_ahead()
    driver.fail("create")
    cache.preallocate(1, 100)
    assert cache.wait_ahead()
    assert (len(engine.step()), engine.busy) == (1, False)
    with pytest.raises(DriverError, match="injected"):
        engine.close()
    engine.close()
    with pytest.raises(ManagerClosed):
        cache.stats()


def test_memory_for_the_queue_is_created_beside_the_prompts_before(model: PreTrainedModel) -> None:
    made_by: list[tuple[int, int]] = []

    class Watched(FaultyDriver):
        def create(self, size: int) -> int:
            made_by.append((get_ident(), size))
            return super().create(size)

    cache = KVCacheManager(shape_of(model, 6, 512), Watched(HostDriver()), 64 << 20)
    with Engine(model, cache, buckets=[6], chunk=16) as engine:
        for _ in range(8):
            engine.submit(list(range(1, 400)), SamplingParams(4))
        engine.step()
        assert cache.wait_ahead()
        # Two have slots; of the six that wait four will find one free.
        assert len(engine.scheduler.waiting) == 6
        each = cache.layout.bytes_for(399) * cache.layout.num_ranges
        assert cache.arena.pool.free_bytes >= 4 * each
        large = max(cache.arena.pool.split(cache.layout.bytes_for(399)))
        made_by.clear()
        while engine.scheduler.waiting:
            engine.step()
            assert cache.wait_ahead()
        assert not [size for who, size in made_by if who == get_ident() and size == large]
        for _ in engine.run():
            pass
        # Nobody waits, so nothing is kept for them.
        assert not cache._preallocation.expected


def test_memory_that_no_sequence_uses_goes_back_while_the_engine_is_idle() -> None:
    floor = 1 << 20
    # What is kept for prompts that begin alike is in use.
    options: dict[str, Any] = {
        "device": "cpu",
        "compile": False,
        "max_seqs": 4,
        "max_seq_len": 512,
        "prefix_cache": False,
    }
    with Engine.from_pretrained("tiny-llama", idle_after_s=0.05, idle_floor=floor, **options) as engine:
        engine.generate([list(range(1, 400))] * 4, SamplingParams(4))
        until = monotonic() + 20
        while engine.cache.stats().held_bytes > floor + (64 << 10) and monotonic() < until:
            sleep(0.02)
        assert engine.cache.stats().held_bytes <= floor + (64 << 10)
        assert len(engine.generate([[1, 2, 3]], SamplingParams(4))[0].tokens) == 4
    with pytest.raises(ConfigError, match="idle_after_s is -1"):
        Engine.from_pretrained("tiny-llama", idle_after_s=-1, **options)
