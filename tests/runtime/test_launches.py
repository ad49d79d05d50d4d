"""Launches of many steps, loops, lanes over any slots, launches one ahead: the same tokens as one step at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from trtllm_vattn.attention.gather import GatheringAttention
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.select import COMPARED, make_cache
from trtllm_vattn.errors import CaptureError, ConfigError, SequenceTooLong
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.compaction import MOST_S
from trtllm_vattn.runtime.decode import Launch
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.request import StepRecord
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.vmm.open import open_driver

PROMPTS = [np.random.default_rng(n).integers(0, 512, n).tolist() for n in (3, 40, 1, 16, 75, 33)]
PARAMS = [
    SamplingParams(12),
    SamplingParams(33, stop_token_ids=(1, 2, 3, 4, 5, 6, 7)),
    SamplingParams(7, temperature=0.9, seed=5),
    SamplingParams(20, temperature=0.7, top_k=20, top_p=0.9, seed=6),
    SamplingParams(1),
    SamplingParams(53),
]
DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]
WAYS: dict[str, dict[str, Any]] = {
    "eager": {"capture": False},
    "4 steps": {"steps": 4},
    "4 steps, eager": {"steps": 4, "capture": False},
    "16 steps": {"steps": 16},
    "loop": {"steps": 8, "loop": True},
    "loop, eager": {"steps": 8, "loop": True, "capture": False},
    "packed": {"packed": True},
    "packed, 4 steps": {"packed": True, "steps": 4},
    "packed, loop": {"packed": True, "steps": 8, "loop": True},
    "between steps": {"mapping": "between-steps"},
    "quiesce": {"mapping": "quiesce", "steps": 4},
}


@pytest.fixture(scope="module", params=DEVICES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return load_model("tiny-llama", request.param, torch.float32)


@pytest.fixture
def build(model: PreTrainedModel) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(kind: str = "vattn", slots: int = 3, budget: int | None = None, **options: Any) -> Engine:
        cache = make_cache(kind, shape_of(model, slots, 128), model.device, budget)
        try:
            made.append(Engine(model, cache, attention="torch", compile=False, **options))
        except ConfigError:
            cache.close()
            raise
        return made[-1]

    yield make
    for engine in made:
        if not engine.busy and not engine.cache._closed:  # type: ignore[attr-defined]
            engine.cache.check_integrity()
        engine.close()


@pytest.fixture(scope="module")
def single(model: PreTrainedModel) -> list[list[int]]:
    cache = make_cache("contiguous", shape_of(model, 3, 128), model.device)
    with Engine(model, cache, attention="torch", compile=False, capture=False) as engine:
        engine.pipeline.one_by_one, engine.prefill.supports_packed_prefill = True, False
        engine.scheduler.mixed = False
        return [done.tokens for done in engine.generate(PROMPTS, PARAMS)]


OWN_CODE = ("eager", "16 steps", "loop", "packed, 4 steps")
"""Ways that reach each cache's own code: what goes by a step, by many, by the device alone, over any slots."""


@pytest.mark.parametrize(
    ("kind", "way"), [(kind, way) for kind in COMPARED for way in WAYS if kind == "vattn" or way in OWN_CODE]
)
def test_every_way_gives_the_tokens_of_single_steps(
    build: Callable[..., Engine], single: list[list[int]], kind: str, way: str
) -> None:
    engine = build(kind, **WAYS[way])
    assert [done.tokens for done in engine.generate(PROMPTS, PARAMS)] == single
    assert engine.cache.stats().sequences == 0


def test_a_launch_has_many_steps_and_what_is_beyond_an_end_is_discarded(
    build: Callable[..., Engine], single: list[list[int]]
) -> None:
    engine = build(steps=8)
    records: list[StepRecord] = []
    engine.observer = records.append
    stop = single[5][9]
    params = SamplingParams(50, stop_token_ids=(stop,))
    (done,) = engine.generate([PROMPTS[5]], params)
    assert done.tokens == single[5][: single[5].index(stop) + 1]
    assert done.finish_reason == "stop"
    # The first one is the prompt's pass.
    assert [(record.prefilled, record.steps) for record in records[:1]] == [(33, 1)]
    records = records[1:]
    assert {record.steps for record in records} == {8}
    # The prompt gave the first token.
    assert sum(record.steps for record in records) >= len(done.tokens) - 1
    assert len(records) == -(-(len(done.tokens) - 1) // 8)


def test_a_loop_ends_at_a_stop_token(build: Callable[..., Engine], single: list[list[int]]) -> None:
    engine = build(steps=32, loop=True)
    records: list[StepRecord] = []
    engine.observer = records.append
    stop = single[5][9]
    (done,) = engine.generate([PROMPTS[5]], SamplingParams(50, stop_token_ids=(stop,)))
    assert done.tokens == single[5][: single[5].index(stop) + 1]
    assert [record.steps for record in records] == [1, len(done.tokens) - 1]


def test_a_loop_goes_no_further_than_memory_reaches(build: Callable[..., Engine], single: list[list[int]]) -> None:
    engine = build(steps=32, loop=True)
    cache = engine.cache
    assert isinstance(cache, KVCacheManager)
    cache.ahead.fixed = 0
    engine.submit(PROMPTS[0], SamplingParams(50))
    records: list[StepRecord] = []
    engine.observer = records.append
    engine.step()
    engine.step()
    # It started at 4 tokens; on the card a page holds more than are wanted.
    assert records[1].steps == min(32, int(cache.frontiers[0]) - 3)
    assert cache.lengths[0] == 3 + records[1].steps


def test_a_loop_leaves_room_for_what_a_backend_loads_past_a_length(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GatheringAttention, "over_read", 5)
    engine = build(steps=64, loop=True)
    cache = engine.cache
    assert isinstance(cache, KVCacheManager)
    cache.ahead.fixed = 16
    # Prompts get no more than their own memory, so only decoding is by such a backend.
    engine.prefill._guard.over_read = 0
    frontiers: list[int] = []
    launch = engine.decode.runner.replay_while

    def launched(bucket: int) -> Any:
        frontiers.append(int(cache.frontiers[0]))
        return launch(bucket)

    engine.decode.runner.replay_while = launched  # type: ignore[method-assign]
    engine.submit(PROMPTS[0], SamplingParams(100))
    engine.step()
    engine.step()
    # A slot that is mapped whole, as on the card by one page, is read to its end and no further.
    longest = frontiers[0] if frontiers[0] == 128 else frontiers[0] - 5
    assert cache.lengths[0] == min(3 + 64, longest)


def test_launches_run_ahead_of_their_tokens(build: Callable[..., Engine], single: list[list[int]]) -> None:
    engine = build()
    number = engine.submit(PROMPTS[5], SamplingParams(53))
    tokens = [event.token for _ in range(4) for event in engine.step()]
    assert engine.pipeline.unread is not None
    length = int(engine.cache.lengths[0])
    assert length == len(PROMPTS[5]) + len(tokens)
    # Who joins or leaves meanwhile changes nothing.
    other = engine.submit(PROMPTS[0], SamplingParams(12))
    seen: dict[int, list[int]] = {number: tokens, other: []}
    for _ in range(6):
        for event in engine.step():
            seen[event.request].append(event.token)
    engine.abort(other)
    for event in engine.run():
        seen[event.request].append(event.token)
    assert seen[number] == single[5]
    assert seen[other] == single[0][: len(seen[other])]


@pytest.mark.parametrize("short_of", ["slots", "memory"])
def test_launches_run_ahead_while_others_wait(
    build: Callable[..., Engine], single: list[list[int]], short_of: str
) -> None:
    engine = build(slots=2 if short_of == "slots" else 3)
    cache = engine.cache
    assert isinstance(cache, KVCacheManager)
    if short_of == "memory":
        # Enough for two of the prompts, not for three.
        engine.set_budget(cache.layout.least_bytes + 2 * cache.layout.bytes_for(128) * cache.layout.num_ranges)
    numbers = [engine.submit(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    tokens: dict[int, list[int]] = {number: [] for number in numbers}
    ahead = 0
    while engine.busy:
        for event in engine.step():
            tokens[event.request].append(event.token)
        ahead += bool(engine.scheduler.waiting) and engine.pipeline.unread is not None
        cache.check_integrity()
    assert ahead >= 8
    assert [tokens[number] for number in numbers] == single


@pytest.mark.parametrize("options", [{"loop": True, "steps": 4}, {"record_margins": True}])
def test_what_needs_the_tokens_first_does_not_run_ahead(build: Callable[..., Engine], options: dict[str, Any]) -> None:
    engine = build(**options)
    engine.submit(PROMPTS[0], SamplingParams(12))
    for _ in range(3):
        engine.step()
        assert engine.pipeline.unread is None


def test_a_budget_is_lowered_and_raised_beneath_running_requests(
    build: Callable[..., Engine], single: list[list[int]]
) -> None:
    engine = build(steps=4)
    cache = engine.cache
    assert isinstance(cache, KVCacheManager)
    captured = [engine.decode.runner.graph(bucket) for bucket in engine.decode.runner.buckets]
    numbers = [engine.submit(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    tokens: dict[int, list[int]] = {number: [] for number in numbers}
    most, startup = cache.stats().budget_bytes, replace(engine.startup)
    # Enough for the longest of them alone.
    alone = cache.layout.least_bytes + cache.layout.bytes_for(128) * cache.layout.num_ranges
    for round_ in range(200):
        if round_ % 3 == 1:
            engine.set_budget(alone if round_ % 2 else most)
        for event in engine.step():
            tokens[event.request].append(event.token)
        cache.check_integrity()
        if not engine.busy:
            break
    assert [tokens[number] for number in numbers] == single
    assert engine.startup == startup
    assert [engine.decode.runner.graph(bucket) for bucket in engine.decode.runner.buckets] == captured
    with pytest.raises(ConfigError, match="the dummy slot alone takes"):
        engine.set_budget(1)


def test_a_budget_belongs_to_the_vattn_cache(build: Callable[..., Engine]) -> None:
    with pytest.raises(ConfigError, match="ContiguousCache has its memory for life"):
        build("contiguous").set_budget(1 << 30)


def test_graphs_are_captured_over_the_dummy_slot_and_memory_comes_later(
    model: PreTrainedModel, single: list[list[int]]
) -> None:
    cache = KVCacheManager(shape_of(model, 3, 128), open_driver(str(model.device)))
    with Engine(model, cache, attention="torch", compile=False) as engine:
        assert cache.stats().held_bytes == cache.layout.least_bytes
        assert set(engine.startup.decode.seconds) == {1, 2, 3}
        assert set(engine.startup.decode.replay_s) == {1, 2, 3}
        assert set(engine.startup.prefill.seconds) == {16, 32, 64, 128}
        assert engine.startup.capture_s > 0
        with pytest.raises(SequenceTooLong, match="the budget has 0 for sequences"):
            engine.submit(PROMPTS[0], PARAMS[0])
        engine.set_budget(256 << 20)
        engine.submit(PROMPTS[0], PARAMS[0])
        assert [event.token for event in engine.run()] == single[0]


def test_holes_are_closed_where_a_smaller_bucket_repays_it(
    build: Callable[..., Engine], single: list[list[int]]
) -> None:
    engine = build(slots=4, prefix_cache=False)
    compaction = engine.scheduler.compaction
    assert compaction is not None
    compaction.replay_s = {1: 0.001, 2: 0.002, 4: 1.0}
    numbers = [engine.submit(PROMPTS[5], SamplingParams(count)) for count in (3, 4, 3, 53)]
    tokens: dict[int, list[int]] = {number: [] for number in numbers}
    for event in engine.run():
        tokens[event.request].append(event.token)
    assert compaction.moves >= 1
    assert [tokens[number] for number in numbers] == [single[5][:count] for count in (3, 4, 3, 53)]
    # A move that costs more than it saves is not made.
    compaction.seconds_per_mapping = 1e9
    moves = compaction.moves
    assert compaction.plan({3: 1000}) == []
    compaction.seconds_per_mapping = 1e-9
    assert compaction.plan({3: 1000}) == [(3, 0)]
    assert compaction.plan({0: 1000}) == []
    assert compaction.plan({}) == []
    assert compaction.moves == moves


def test_moves_that_take_long_are_made_between_several_steps(
    build: Callable[..., Engine], single: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(slots=4, prefix_cache=False)
    compaction = engine.scheduler.compaction
    assert compaction is not None
    compaction.replay_s = {1: 0.5, 2: 0.5, 4: 1.0}
    move, made = compaction.move, []

    def slowly(source: int, target: int) -> None:
        made.append(engine.totals.launches)
        sleep(2 * MOST_S)
        move(source, target)

    monkeypatch.setattr(compaction, "move", slowly)
    counts = (3, 3, 40, 40)
    numbers = [engine.submit(PROMPTS[5], SamplingParams(count)) for count in counts]
    tokens: dict[int, list[int]] = {number: [] for number in numbers}
    for event in engine.run():
        tokens[event.request].append(event.token)
    assert len(made) == 2
    assert made[0] < made[1]
    assert [tokens[number] for number in numbers] == [single[5][:count] for count in counts]


def test_a_short_prompt_is_one_replay(build: Callable[..., Engine]) -> None:
    engine = build(prefix_cache=False)
    sizes: list[int] = []
    replay = engine.prefill.runner.replay
    engine.prefill.runner.replay = lambda size: (sizes.append(size), replay(size))[1]  # type: ignore[method-assign,assignment]
    for prompt in PROMPTS:
        engine.generate([prompt], SamplingParams(1))
    assert sizes == [16, 64, 16, 16, 128, 64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0; it is a whole number from 1 to 128"),
        ({"steps": 2, "record_margins": True}, "margins are recorded of single steps"),
        ({"mapping": "sometimes"}, "no mapping policy 'sometimes'"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    build: Callable[..., Engine], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_forced_tokens_need_single_steps(build: Callable[..., Engine]) -> None:
    with pytest.raises(ConfigError, match="this engine takes 4 a launch"):
        build(steps=4).submit([1], SamplingParams(2), forced=[1, 2])


@pytest.mark.parametrize("device", DEVICES)
def test_two_engines_live_side_by_side(device: str) -> None:
    models = [load_model(name, device, torch.float32) for name in ("tiny-llama", "tiny-qwen3")]
    engines = [
        Engine(each, make_cache("vattn", shape_of(each, 2, 64), device), attention="torch", compile=False)
        for each in models
    ]
    alone = [[done.tokens for done in engine.generate(PROMPTS[:1], SamplingParams(20))] for engine in engines]
    for engine in engines:
        engine.submit(PROMPTS[0], SamplingParams(20))
    together: list[list[int]] = [[], []]
    while any(engine.busy for engine in engines):
        for engine, tokens in zip(engines, together, strict=True):
            tokens += [event.token for event in engine.step()]
    assert [[tokens] for tokens in together] == alone
    engines[0].close()
    assert [done.tokens for done in engines[1].generate(PROMPTS[:1], SamplingParams(20))] == alone[1]
    engines[1].close()


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_captured_graphs_hold_no_foreign_address(device: str, loop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # However slow the machine is, what is likely is captured at the start, and no more of it later.
    monkeypatch.setattr("trtllm_vattn.runtime.likely.MOST_SECONDS", 600.0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    loaded = load_model("small-llama", device, dtype)
    cache = make_cache("vattn", shape_of(loaded, 4, 64), device)
    with Engine(loaded, cache, compile=False, buckets=[1, 4], steps=4, loop=loop) as engine:
        for temperature in (0.0, 0.8):
            engine.generate([[1]], SamplingParams(9, temperature))
        # Without a target nobody asks what a pass costs, and none is timed.
        assert engine.passes.cost is None
        for bucket in (1, 4):
            report = engine.decode.audit(bucket=bucket)
            report.raise_if_foreign()
            assert report.addresses["reservation"] > 0
            assert report.addresses["static"] > 0
            assert report.addresses["pool"] > 0
        whole = engine.audit()
        whole.raise_if_foreign()
        # Where attention has several kernels, the names say which one a step is of.
        names = {re.sub(" by .*? of ", " of ", name) for name in whole.graphs}
        # On a GPU the largest step that draws is captured at the start, and serves the others.
        kind, lanes = ("sampling", 1) if device == "cpu" else ("truncated sampling", 4)
        expected = {"decode step of 1", "decode step of 4", f"{kind} step of {lanes}"}
        if engine.attention.captures_prompts:
            expected |= {f"pass of {size}" for size in (32, 128, 256, 260)}
            chosen = {"decode step of 1", "decode step of 4", f"{kind} step of {lanes}"}
            expected |= {f"choice of a {step}" for step in chosen}
        else:
            expected |= {f"prompt of {size}" for size in (16, 32, 64)}
        if device != "cpu":
            # On the host a launch of many steps is as many replays.
            how = "in a loop" if loop else "4 times over"
            expected |= {f"decode step of 1, {how}", f"{kind} step of {lanes}, {how}"}
        assert names == expected, names ^ expected
        assert not [part for _, _, part in whole.opaque if "conditional" in part.why]


def test_what_is_not_captured_is_not_audited(build: Callable[..., Engine]) -> None:
    with pytest.raises(CaptureError, match=r"no decode step.* is captured"):
        build(capture=False).audit()


def test_nothing_is_launched_after_closing(build: Callable[..., Engine]) -> None:
    engine = build()
    engine.submit([1, 2], SamplingParams(9))
    engine.step()
    runner = engine.decode.runner
    engine.close()
    engine.close()
    with pytest.raises(CaptureError, match="the runner is closed"):
        runner.replay(1)


def test_who_joins_while_a_loop_runs_did_not_go_with_it(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory is asked for steps that the new lane did not take: there may be none."""
    engine = build(steps=4, loop=True)
    engine.submit(PROMPTS[0], SamplingParams(40, ignore_eos=True))
    while not engine.scheduler.decoding:
        engine.step()
    other = engine.cache.admit("beside", 5)
    asked: list[np.ndarray] = []
    read, prepare = Launch.read, engine.cache.prepare_step

    def joined_meanwhile(launch: Launch) -> list[list[int]]:
        rows = read(launch)
        engine.decode.set_lane(other, 1, 40, 50)
        asked.clear()
        return rows

    def noting(lengths: np.ndarray) -> None:
        asked.append(lengths.copy())
        prepare(lengths)

    monkeypatch.setattr(Launch, "read", joined_meanwhile)
    monkeypatch.setattr(engine.cache, "prepare_step", noting)
    engine.step()
    running = next(iter(engine.scheduler.decoding))
    assert asked[0][other] == 0 < asked[0][running]
    engine.decode.clear_lane(other)
    engine.cache.release("beside")
