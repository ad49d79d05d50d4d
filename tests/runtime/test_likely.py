"""Graphs of steps that nobody asked for yet: which ones, within which bounds, and who waits for what."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from trtllm_vattn.cache.prefix import Way
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import CaptureError
from trtllm_vattn.graphs.replay import CaptureReport
from trtllm_vattn.runtime import async_engine, likely
from trtllm_vattn.runtime.async_engine import AsyncEngine
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.decode import DecodeBatch
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import SHAPES, load_model
from trtllm_vattn.runtime.parallel.engine import RankedDecode
from trtllm_vattn.runtime.pass_cost import PassLoad
from trtllm_vattn.runtime.reuse import RequestSlots
from trtllm_vattn.runtime.sampling import SamplingParams

SAMPLED = SamplingParams(6, temperature=0.8, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> Iterator[PreTrainedModel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES["tiny-llama"], "num_hidden_layers", 1)
        yield load_model("tiny-llama", "cpu", torch.float32)


def engine_of(model: PreTrainedModel, slots: int = 4, attention: str = "torch", **options: object) -> Engine:
    cache = make_cache("vattn", shape_of(model, slots + 8, 64), "cpu")
    return Engine(model, cache, attention=attention, max_running=slots, **options)


def capture_likely(engine: Engine) -> CaptureReport:
    """What an engine on a GPU does at its start."""
    with torch.inference_mode():
        report = likely.capture_within(engine.decode.likely())
        engine.decode.measure_prefixes()
    return report


class Runner:
    """Counts what it captures; each takes as much of the pool."""

    def __init__(self, nbytes: int = 0, seconds: float = 0.0, fails_at: int = 0) -> None:
        self.captured: set[int] = set()
        self.nbytes, self.seconds, self.fails_at = nbytes, seconds, fails_at

    def capture(self, buckets: list[int], timed: tuple[()]) -> CaptureReport:
        if self.fails_at in buckets:
            raise CaptureError("it holds what a graph cannot")
        self.captured |= set(buckets)
        return CaptureReport(dict.fromkeys(buckets, self.seconds), {}, self.nbytes)


@pytest.mark.parametrize(
    ("buckets", "most", "found"),
    [
        ([1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64], None, [64, 8, 1]),
        ([1, 2, 4, 8, 16, 24, 32], 30, [24, 4]),
        ([3], None, [3]),
        ([8, 16], 4, []),
    ],
)
def test_few_sizes_serve_all(buckets: list[int], most: int | None, found: list[int]) -> None:
    assert likely.few_buckets(buckets, most) == found
    for bucket in buckets if most is None else [each for each in buckets if each <= most]:
        assert any(bucket <= each <= likely.SPARE * bucket for each in found)


def test_captures_end_at_the_bounds() -> None:
    large, slow = Runner(likely.MOST_BYTES // 2), Runner(seconds=likely.MOST_SECONDS / 3)
    report = likely.capture_within((large, bucket) for bucket in (8, 4, 2, 1))
    assert (large.captured, report.pool_bytes) == ({8, 4}, likely.MOST_BYTES)
    likely.capture_within((slow, bucket) for bucket in (8, 4, 2, 1))
    assert slow.captured == {8, 4, 2}


def test_an_engine_starts_though_a_likely_graph_cannot_be_captured(caplog: pytest.LogCaptureFixture) -> None:
    runner = Runner(nbytes=5, fails_at=4)
    with caplog.at_level("WARNING"):
        report = likely.capture_within((runner, bucket) for bucket in (8, 4, 2))
    assert (runner.captured, report.pool_bytes) == ({8}, 5)
    assert "it holds what a graph cannot" in caplog.text


def test_who_samples_first_waits_for_a_capture_and_is_counted(model: PreTrainedModel) -> None:
    prompts = [[5, 6, 7], [9, 8, 7, 6]]
    with engine_of(model) as cold:
        want = [each.tokens for each in cold.generate(prompts, SAMPLED)]
        assert cold.captures_while_running > 0
    with engine_of(model) as warm:
        capture_likely(warm)
        assert [each.tokens for each in warm.generate(prompts, SAMPLED)] == want
        # Two lanes ran in the graph of four.
        assert warm.captures_while_running == 0
        assert {bucket for _, bucket in warm.decode.wanted} == {2}
        number = warm.submit(prompts[0], SAMPLED)
        assert warm.capture_wanted() == 1
        warm.abort(number)
        while warm.busy:
            warm.step()
        assert warm.capture_wanted() == 0
        assert [each.tokens for each in warm.generate(prompts, SAMPLED)] == want
        assert (warm.captures_while_running, warm.decode.wanted) == (0, {})


def test_passes_of_lanes_that_sample_take_no_more_rows_than_others(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One ladder serves whatever lanes ask for: what is captured for them is the choice of their tokens alone."""
    with engine_of(model, attention="shares", target_itl_ms=1000.0, max_step_tokens=64) as engine:
        graphs, cost = engine.passes.graphs, engine.passes.cost
        assert graphs is not None
        assert cost is not None
        passes = set(graphs.runner.captured)
        assert passes == set(graphs.runner.buckets)
        loads: list[PassLoad] = []
        monkeypatch.setattr(cost, "measure", lambda load, milliseconds: loads.append(load))
        engine.generate([[5, 6]], SAMPLED)
        assert loads[0].tokens == graphs.runner.buckets[0]
        assert graphs.runner.captured == passes


def test_lanes_of_several_ranks_capture_in_the_launch_that_needs_it(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not RankedDecode.captures_alone
    monkeypatch.setattr(DecodeBatch, "captures_alone", False)
    with engine_of(model) as engine:
        capture_likely(engine)
        engine.generate([[5, 6, 7], [9, 8, 7, 6]], SAMPLED)
        assert engine.captures_while_running > 0
        assert engine.decode.wanted == {}


def test_what_a_table_costs_is_measured_and_said(model: PreTrainedModel) -> None:
    with engine_of(model, prefix_cache=True) as engine:
        assert engine.prefix_stats()["table_step_is_measured"] is False
        capture_likely(engine)
        stats, reading = engine.prefix_stats(), engine.slots.reading
        assert reading is not None
        assert stats["table_step_is_measured"] is True
        assert 0 <= stats["table_step_us"] < 1e5
        # What an engine does behind its start; then whoever begins with a running sequence's tokens.
        reading.learn(0.25)
        engine.slots = engine.scheduler.slots = RequestSlots.over(engine.cache, True, False, reading)
        prefixes = engine.slots.prefixes
        assert prefixes is not None
        assert (prefixes.costs.table_step_us, prefixes.costs.table_is_measured) == (0.25, True)
        prompt = np.arange(1, 40).tolist()
        owner = engine.submit(prompt, SamplingParams(20, ignore_eos=True))
        while not engine.scheduler.requests[owner].chosen:
            engine.step()
        engine.submit([*prompt, 77], SamplingParams(4, ignore_eos=True))
        while engine.busy:
            engine.step()
        stats = engine.prefix_stats()
        assert stats["ways"][Way.TABLE.value] == 1
        assert "0.25 us each (measured at the start)" in stats["reasons"][Way.TABLE.value]
        assert engine.captures_while_running == 0


def test_a_group_saves_as_much_reading_as_the_launch_for_it_takes(model: PreTrainedModel) -> None:
    with engine_of(model, prefix_cache=True) as engine:
        reading = engine.slots.reading
        assert reading is not None
        reading.learn(30.0, 0.01)
        assert reading.least == 3000
        reading.learn(-2.0, 0.01)
        assert (reading.step_us, reading.least) == (0.0, 1024)


def test_what_steps_went_without_is_captured_while_a_server_has_nothing_to_do(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine, "IDLE_S", 0.001)
    engine = engine_of(model, packed=True)
    capture_likely(engine)
    left, came = threading.Event(), engine.capture_wanted

    def capture_wanted(most: int = 1) -> int:
        count = came(most)
        if not count:
            left.set()
        return count

    monkeypatch.setattr(engine, "capture_wanted", capture_wanted)

    async def serve() -> int:
        serving = AsyncEngine(engine)
        streams = [await serving.add_request(prompt, SAMPLED) for prompt in ([5, 6, 7], [7, 8])]
        got = 0
        for stream in streams:
            async for _ in stream:
                got += 1
        assert await asyncio.to_thread(left.wait, 10)
        assert not engine.decode.wanted
        await serving.shutdown()
        return got

    assert asyncio.run(serve()) == 12
    assert engine.captures_while_running == 0


def test_nothing_is_sorted_where_nobody_asks_for_the_likeliest_tokens_alone(model: PreTrainedModel) -> None:
    """One request with top_k has all lanes' logits sorted; a graph that sorts serves who needs no sort, too."""
    prompts, top = [[5, 6, 7], [9, 8, 7, 6]], replace(SAMPLED, top_k=5)
    with engine_of(model) as engine:
        want = [each.tokens for each in engine.generate(prompts, SAMPLED)]
        sorted_ = [each.tokens for each in engine.generate(prompts, [SAMPLED, top])]
        assert sorted_[0] == want[0]
        sorts = {
            kind.truncated: any(
                "sort" in name for graph in map(runner.graph, runner.captured) for name in graph.operations()
            )
            for (_, kind), runner in engine.decode._runners.items()
            if kind.sampled
        }
        assert sorts == {False: False, True: True}
