"""Whatever a step raises, the next ones go on: every token comes once, and no slot is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cache as remember
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError, DriverError, KVCacheOutOfMemory, SequenceTooLong
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.decode import Launch
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import SHAPES, load_model
from trtllm_vattn.runtime.request import StepRecord
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import FaultyDriver

PROMPTS = [np.random.default_rng(n).integers(0, 512, n).tolist() for n in (7, 31)]


@remember
def model_of(name: str = "tiny-llama") -> PreTrainedModel:
    return load_model(name, "cpu", torch.float32)


def build(driver: Any = None, slots: int = 4, name: str = "tiny-llama", **options: Any) -> Engine:
    options = {"compile": False, "capture": False, "mapping": "between-steps", **options}
    cache = KVCacheManager(shape_of(model_of(name), slots, 128), driver or HostDriver(), 64 << 20, lookahead=0)
    return Engine(model_of(name), cache, **options)


@remember
def wanted(name: str = "tiny-llama") -> list[list[int]]:
    with build(name=name) as engine:
        return [done.tokens for done in engine.generate(PROMPTS, SamplingParams(30))]


def finish(engine: Engine, before_step: Callable[[int], None] = lambda step: None) -> tuple[list[list[int]], list[str]]:
    """Both prompts' tokens, and what steps raised."""
    got: dict[int, list[int]] = {engine.submit(prompt, SamplingParams(30)): [] for prompt in PROMPTS}
    raised = []
    for step in range(100):
        before_step(step)
        try:
            for event in engine.step():
                got[event.request].append(event.token)
        except BaseException as error:
            raised.append(type(error).__name__)
        if not engine.busy:
            break
    assert engine.cache.stats().sequences == 0
    engine.cache.check_integrity()
    return list(got.values()), raised


def test_an_observer_that_raises_costs_no_token() -> None:
    seen: list[StepRecord] = []

    def observe(record: StepRecord) -> None:
        seen.append(record)
        if len(seen) == 5:
            raise RuntimeError("no space left")

    with build(observer=observe) as engine:
        assert finish(engine) == (wanted(), ["RuntimeError"])


@pytest.mark.parametrize("options", [{}, {"steps": 4}, {"steps": 4, "loop": True}])
def test_an_interrupted_wait_skips_no_token(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    read, calls = Launch.read, []

    def interrupted(launch: Launch) -> list[list[int]]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(launch)

    monkeypatch.setattr(Launch, "read", interrupted)
    with build(**options) as engine:
        assert finish(engine) == (wanted(), ["KeyboardInterrupt"])


def test_first_tokens_are_not_lost_where_decoding_runs_out_of_memory() -> None:
    with build() as engine:
        layout = engine.cache.layout  # type: ignore[attr-defined]
        # The prompt fits to the last byte of a page.
        prompt = [5] * (layout.granularity // layout.row_bytes)
        engine.set_budget(2 * layout.num_ranges * layout.granularity)
        tokens = []
        with pytest.raises(SequenceTooLong, match=r"max_tokens 3 take 8,192 bytes, and the budget has 4,096"):
            engine.submit(prompt, SamplingParams(3))
        engine.set_budget(64 << 20)
        engine.submit(prompt, SamplingParams(3))
        engine.set_budget(2 * layout.num_ranges * layout.granularity)
        while engine.busy:
            tokens += engine.step()
        assert [event.finish_reason for event in tokens] == [None, "error"]
        assert tokens[1].error is not None
        assert "it alone outgrew the cache's memory at 5 tokens" in tokens[1].error
        engine.set_budget(64 << 20)
        (again,) = engine.generate([prompt], SamplingParams(3))
        assert tokens[0].token == again.tokens[0]


def test_a_release_that_fails_is_made_by_the_next_step() -> None:
    driver = FaultyDriver(HostDriver())

    def fail_at_the_end(step: int) -> None:
        if any(len(request.fed) == 29 for request in engine.scheduler.holders):
            driver.fail("record")

    with build(driver) as engine:
        tokens, raised = finish(engine, fail_at_the_end)
        assert tokens == wanted()
        assert "DriverError" in raised
        driver.disarm()


def test_who_is_in_a_broken_slot_goes_on_in_another() -> None:
    driver = FaultyDriver(HostDriver())

    def break_a_slot(step: int) -> None:
        if step == 2:
            driver.fail("set_access")
            driver.fail("unmap")

    with build(driver) as engine:
        tokens, raised = finish(engine, break_a_slot)
        assert tokens == wanted()
        assert raised == ["RollbackFailed"]
        assert any(slot.broken for slot in engine.cache.arena.slots)  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [KVCacheOutOfMemory("no room"), DriverError("CUDA_ERROR_UNKNOWN", "map", ())])
def test_a_move_that_fails_changes_nothing_but_the_estimate(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def refuse(*arguments: Any) -> int:
        raise error

    with build(capture=True) as engine:
        compaction = engine.scheduler.compaction
        assert compaction is not None
        monkeypatch.setattr(engine.cache, "move", refuse)
        # A smaller batch is worth a lot.
        compaction.replay_s = {1: 0.001, 2: 1.0, 4: 1.0}
        before = compaction.seconds_per_mapping
        short, long = (engine.submit(prompt, SamplingParams(n)) for prompt, n in zip(PROMPTS, (5, 30), strict=True))
        tokens: dict[int, list[int]] = {short: [], long: []}
        for event in engine.run():
            tokens[event.request].append(event.token)
        assert [tokens[short], tokens[long]] == [wanted()[0][:5], wanted()[1]]
        assert compaction.seconds_per_mapping >= 2 * before
        assert compaction.moves == 0
    assert "sequences stay where they are" in caplog.text


def test_a_launch_nobody_waits_for_is_not_read() -> None:
    seen: list[StepRecord] = []
    with build(observer=seen.append) as engine:
        number = engine.submit(PROMPTS[0], SamplingParams(100))
        for _ in range(3):
            engine.step()
        assert engine.pipeline.running
        engine.abort(number)
        assert not engine.pipeline.running
        time.sleep(0.1)
        seen.clear()
        started = time.perf_counter()
        engine.submit(PROMPTS[1], SamplingParams(2))
        engine.step()
        assert [(record.lanes, record.steps) for record in seen] == [(1, 1)]
        assert seen[0].wall_s < time.perf_counter() - started


def test_generate_leaves_nothing_behind() -> None:
    with build() as engine:
        with pytest.raises(ConfigError, match="token ids outside"):
            engine.generate([[1, 2], [9999]], SamplingParams(3))
        assert not engine.busy
        engine.set_budget(4 * engine.cache.layout.num_ranges * engine.cache.layout.granularity)  # type: ignore[attr-defined]
        with pytest.raises(SequenceTooLong):
            engine.generate([[3] * 4, [1] * 100], SamplingParams(20))
        assert not engine.busy
        assert engine.cache.stats().sequences == 0
        engine.set_budget(64 << 20)
        assert [done.tokens for done in engine.generate(PROMPTS, SamplingParams(30))] == wanted()
        engine.submit([1], SamplingParams(2))
        with pytest.raises(ConfigError, match="requests are running"):
            engine.generate(PROMPTS)


def test_engines_on_two_threads_do_not_meet() -> None:
    names = ["tiny-llama", "tiny-qwen3"]
    want = [wanted(name) for name in names]
    got: dict[str, list[list[list[int]]]] = {name: [] for name in names}

    def work(name: str, engine: Engine) -> None:
        for _ in range(3):
            got[name].append([done.tokens for done in engine.generate(PROMPTS, SamplingParams(30))])

    engines = [build(name=name) for name in names]
    threads = [threading.Thread(target=work, args=pair) for pair in zip(names, engines, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for engine in engines:
        engine.close()
    assert list(got.values()) == [[each] * 3 for each in want]


SIZES = {key: SHAPES["tiny-llama"][key] for key in SHAPES["tiny-llama"] if key != "model_type"}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("stablelm", {}, "StableLmForCausalLM .* is not served: it computes attention by its own code"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "has rope_type dynamic, by which the longest sequence of a batch changes the tokens of all",
        ),
    ],
)
def test_attention_that_is_not_computed_here_is_refused(kind: str, options: dict[str, Any], message: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **options}), dtype=torch.float32)
    with (
        pytest.raises(ConfigError, match=message),
        make_cache("contiguous", shape_of(model, 2, 64), "cpu") as cache,
        Engine(model, cache, compile=False, capture=False) as engine,
    ):
        engine.generate([[1, 2, 3]], SamplingParams(2))
