"""Passes that hold prompts and decoding sequences: everybody's tokens are those of the request alone, no running
sequence skips a pass, and a pass starts before the last one's tokens are read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache as remember
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from interrupting import THOROUGH
from transformers import PreTrainedModel

from trtllm_vattn.attention.base import PackedPrefill
from trtllm_vattn.attention.reference import TorchAttention
from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import CaptureError, ConfigError, UnmappedAccess
from trtllm_vattn.graphs.replay import GraphRunner
from trtllm_vattn.runtime import engine as engine_module
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.decode import DecodeBatch, Launch
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.pass_cost import PassCost, PassLoad
from trtllm_vattn.runtime.pass_graphs import ladder
from trtllm_vattn.runtime.request import StepRecord
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.settings import usual_step_tokens
from trtllm_vattn.runtime.step_plan import StepPlan

SLOTS, LENGTH = 4, 96
PROMPTS = [np.random.default_rng(n).integers(0, 512, n).tolist() for n in (3, 40, 1, 16, 75, 33, 9, 58)]
PARAMS = [
    SamplingParams(12),
    SamplingParams(30, stop_token_ids=(1, 2, 3, 4, 5, 6, 7)),
    SamplingParams(7, temperature=0.9, seed=5),
    SamplingParams(20, temperature=0.7, top_k=20, top_p=0.9, seed=6),
    SamplingParams(1),
    SamplingParams(25),
    SamplingParams(1, temperature=1.5, seed=8),
    SamplingParams(18),
]


class DescribedAttention(TorchAttention):
    """The reference, which reads everything about a pass on the device: each row is a lane of its own."""

    name: ClassVar[str] = "described"
    captures_prompts: ClassVar[bool] = True

    def attend_mixed(
        self,
        layer: int,
        q: torch.Tensor,
        decode_lengths: torch.Tensor,
        decode_slots: torch.Tensor,
        packed: PackedPrefill,
    ) -> torch.Tensor:
        assert packed.descriptors is not None
        first, rows, ends, slots = packed.descriptors.long()[:, :, None].unbind(1)
        row = torch.arange(len(q), device=q.device)
        mine = (row >= first) & (row < first + rows)
        lengths = torch.where(mine, ends - rows + row - first + 1, 0).sum(dim=0)
        where = torch.where(mine, slots, 0).sum(dim=0)
        lanes = len(decode_lengths)
        decodes = decode_lengths > 0
        lengths[:lanes] = torch.where(decodes, decode_lengths, lengths[:lanes])
        where[:lanes] = torch.where(decodes, decode_slots, where[:lanes])
        return self.decode(layer, q, lengths.to(torch.int32), where)


@remember
def model_of() -> PreTrainedModel:
    return load_model("tiny-llama", "cpu", torch.float32)


Build = Callable[..., Engine]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Iterator[Build]:
    with ExitStack() as closing:

        def make(described: bool = False, budget: int | None = None, kind: str = "vattn", **options: Any) -> Engine:
            def made(name: str, cache: KVCache, heads: int, scale: float | None = None, **_: Any) -> TorchAttention:
                return (DescribedAttention if described else TorchAttention)(cache, heads, scale)

            monkeypatch.setattr(engine_module, "make_attention", made)
            cache = make_cache(kind, shape_of(model_of(), SLOTS, LENGTH), "cpu", budget)
            engine = Engine(model_of(), cache, **{"compile": False, "capture": False, "chunk": 24, **options})
            closing.callback(engine.close)
            return engine

        yield make


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """Each request's tokens where it is the only one, in a pass of its own and single steps of one lane."""
    cache = make_cache("contiguous", shape_of(model_of(), 1, LENGTH), "cpu")
    with Engine(model_of(), cache, attention="torch", compile=False, capture=False) as engine:
        engine.pipeline.one_by_one, engine.scheduler.mixed = True, False
        return [engine.generate([prompt], params)[0].tokens for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


def test_what_runs_alone_is_what_transformers_gives(alone: list[list[int]]) -> None:
    for number in (0, 5, 7):
        prompt, count = PROMPTS[number], PARAMS[number].max_tokens
        out = load_model("tiny-llama", "cpu", torch.float32).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert out[0, len(prompt) :].tolist() == alone[number]


WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "packed": {"packed": True},
    "unmixed": {},
    "4 steps": {"steps": 4, "packed": True},
    "loop": {"steps": 4, "loop": True},
    "margins": {"record_margins": True},
    "paged": {"kind": "paged"},
    "short of memory": {"budget": 120 * 1024},
    "tiny passes": {"chunk": 1},
    "captured steps": {"capture": True, "buckets": [2, 4]},
    "captured passes": {"capture": True, "buckets": [4], "described": True},
    "captured passes, packed, 4 steps": {
        "capture": True,
        "buckets": [4],
        "described": True,
        "packed": True,
        "steps": 4,
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_a_request_alone(build: Build, alone: list[list[int]], way: str) -> None:
    """Requests come, some are abandoned, at random times; whoever stays has the tokens it has alone."""
    engine = build(**WAYS[way])
    if way == "unmixed":
        engine.scheduler.mixed = False
    # Another order in each way.
    for seed in [*WAYS] if THOROUGH else [way]:
        rng = random.Random(seed)
        order = rng.sample(range(len(PROMPTS)), len(PROMPTS))
        abandoned = {order[rng.randrange(len(order))]}
        number_of: dict[int, int] = {}
        tokens: dict[int, list[int]] = {}
        while order or engine.busy:
            if order and rng.random() < 0.5:
                which = order.pop()
                number = engine.submit(PROMPTS[which], PARAMS[which])
                number_of[number], tokens[number] = which, []
            for event in engine.step():
                tokens[event.request].append(event.token)
            for number, which in number_of.items():
                if which in abandoned and number in engine.scheduler.requests and rng.random() < 0.3:
                    engine.abort(number)
            engine.cache.check_integrity()
        for number, which in number_of.items():
            if which in abandoned:
                assert tokens[number] == alone[which][: len(tokens[number])]
            else:
                assert tokens[number] == alone[which]
        assert engine.cache.stats().sequences == 0
    if WAYS[way].get("described"):
        graphs = engine.passes.graphs
        assert graphs is not None
        assert any(kind.sampled and chooser.captured for kind, chooser in engine.decode._choosers.items())
        assert engine.startup.passes.seconds.keys() == graphs.runner.captured
        assert not engine.startup.prefill.seconds
        report = engine.audit()
        report.raise_if_foreign()
        assert "pass of 24" in report.graphs


def launches(engine: Engine) -> list[tuple[StepPlan, Launch]]:
    """Each launch from now on, with its plan."""
    seen: list[tuple[StepPlan, Launch]] = []
    launched, started = engine.scheduler.launched, engine.pipeline._launch
    plans: list[StepPlan] = []

    def noted(plan: StepPlan) -> None:
        plans.append(plan)
        launched(plan)

    def start(ahead: bool) -> Launch | None:
        launch = started(ahead)
        if launch is not None:
            seen.append((plans[-1], launch))
        return launch

    engine.scheduler.launched = noted  # type: ignore[method-assign]
    engine.pipeline._launch = start  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("described", [False, True])
def test_no_running_sequence_skips_a_pass(build: Build, described: bool) -> None:
    engine = build(described, capture=described)
    seen = launches(engine)
    records: list[StepRecord] = []
    engine.observer = records.append
    first = engine.submit(PROMPTS[0], SamplingParams(60))
    got = [event.token for _ in range(3) for event in engine.step()]
    before = len(seen)
    for prompt in (PROMPTS[4], PROMPTS[7]):
        engine.submit(prompt, SamplingParams(1))
    steps = 0
    while engine.prefilling:
        got += [event.token for event in engine.step() if event.request == first]
        steps += 1
    # 133 tokens of prompts, at most 23 at a time beside the one that decodes, by equal passes; a captured one is full.
    passes = [plan for plan, _ in seen[before:] if plan.chunks]
    assert [plan.prompt_tokens for plan in passes] == ([23] * 5 + [18] if described else [23] + [22] * 5)
    assert all(plan.decodes for plan in passes)
    assert len(got) == 3 + steps
    assert all(record.lanes >= 1 for record in records)
    got += [event.token for event in engine.run() if event.request == first]
    assert got == build().generate([PROMPTS[0]], SamplingParams(60))[0].tokens


def test_the_next_pass_starts_before_the_last_one_is_read(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build()
    order: list[tuple[str, int]] = []
    number: dict[int, int] = {}
    started, read = engine.pipeline._launch, Launch.read

    def start(ahead: bool) -> Launch | None:
        launch = started(ahead)
        if launch is not None:
            number[id(launch)] = len(number)
            kept.append(launch)
            order.append(("start", number[id(launch)]))
        return launch

    def noted(launch: Launch) -> list[list[int]]:
        order.append(("read", number[id(launch)]))
        return read(launch)

    kept: list[Launch] = []
    engine.pipeline._launch = start  # type: ignore[method-assign]
    monkeypatch.setattr(Launch, "read", noted)
    for prompt in PROMPTS[:6]:
        engine.submit(prompt, SamplingParams(8))
    for _ in engine.run():
        pass
    assert sum(bool(launch.prompt_tokens) for launch in kept) > 5
    at = {what: place for place, what in enumerate(order)}
    ahead = [n for n in range(len(kept) - 1) if at["start", n + 1] < at["read", n]]
    # But where nobody knew of more to do: the end, and slots that only an end gives free.
    assert len(ahead) >= len(kept) - 3


def test_forced_tokens_are_fed_ahead_of_what_is_read(build: Build, alone: list[list[int]]) -> None:
    engine = build()
    forced = [*alone[5][:5], 7, *alone[5][6:]]
    with_margins = build(record_margins=True)
    events = []
    for each in (engine, with_margins):
        each.submit(PROMPTS[5], SamplingParams(25), forced=forced)
        each.submit(PROMPTS[4], SamplingParams(3))
        assert each.step() == [] or each is with_margins
        events.append([event.token for event in each.run() if event.request == 0])
    assert events[0] == events[1]
    assert events[0][:6] == alone[5][:6]
    assert events[0] != alone[5]


def test_a_request_that_ends_while_its_pass_is_unread_leaves_nothing(build: Build, alone: list[list[int]]) -> None:
    engine = build()
    first, other = engine.submit(PROMPTS[1], SamplingParams(20)), engine.submit(PROMPTS[0], PARAMS[0])
    tokens = [event.token for event in engine.step() if event.request == other]
    assert engine.pipeline.unread is not None
    assert engine.pipeline.unread.prompt_tokens
    engine.abort(first)
    assert engine.cache.stats().sequences == 1
    tokens += [event.token for event in engine.run()]
    assert tokens == alone[0]


def test_a_pass_is_guarded_before_anything_changes(build: Build) -> None:
    engine = build()
    engine.submit(PROMPTS[0], SamplingParams(40))
    tokens = [event.token for _ in range(3) for event in engine.step()]
    engine.submit(PROMPTS[3], SamplingParams(2))
    slot = 1
    prepare = engine.cache.prepare_step

    def broken(lengths: np.ndarray) -> None:
        prepare(lengths)
        engine.cache.frontiers[slot] = 0

    engine.cache.prepare_step = broken  # type: ignore[method-assign]
    kept: list[int] = []
    engine.scheduler.admit()
    kept.append(int(engine.cache.frontiers[slot]))
    with pytest.raises(UnmappedAccess, match="in slot 1"):
        engine.step()
    engine.cache.prepare_step = prepare  # type: ignore[method-assign]
    engine.cache.frontiers[slot] = kept[0]
    tokens += [event.token for event in engine.run() if event.request == 0]
    assert tokens == build().generate([PROMPTS[0]], SamplingParams(40))[0].tokens


def test_who_cannot_be_captured_with_leaves_no_lane(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several ranks none goes on without a graph that the others have: a pass is refused when its request has a
    lane already, and it may be aborted before the next one."""
    monkeypatch.setattr(DecodeBatch, "captures_alone", False)
    engine = build(described=True, capture=True, prefix_cache=False)
    first = engine.submit(PROMPTS[0], SamplingParams(60))
    tokens = [event.token for _ in range(3) for event in engine.step()]
    sampled = engine.submit(PROMPTS[3], PARAMS[2])

    def refuse(*arguments: Any, **options: Any) -> None:
        raise CaptureError("no memory for a graph")

    with monkeypatch.context() as patched:
        patched.setattr(GraphRunner, "capture", refuse)
        for _ in range(2):
            with pytest.raises(CaptureError):
                tokens += [event.token for event in engine.step()]
    assert engine.decode.lane_of.keys() == {engine.scheduler.requests[first].slot}
    engine.abort(sampled)
    tokens += [event.token for event in engine.run()]
    assert tokens == build().generate([PROMPTS[0]], SamplingParams(60))[0].tokens


@pytest.mark.parametrize("way", ["captured passes", "captured steps", "4 steps", "loop"])
def test_what_cannot_be_captured_runs_without_a_graph(
    build: Build, alone: list[list[int]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    engine = build(**{**WAYS[way], "capture": True})

    def refuse(*arguments: Any, **options: Any) -> None:
        raise CaptureError("no memory for a graph")

    with monkeypatch.context() as patched:
        patched.setattr(GraphRunner, "capture", refuse)
        assert [done.tokens for done in engine.generate(PROMPTS, PARAMS)] == alone
        assert "without a graph until one can be captured: no memory for a graph" in caplog.text
        refused = engine.captures_while_running
        assert [done.tokens for done in engine.generate(PROMPTS, PARAMS)] == alone
        # Nobody waits for another attempt.
        assert engine.captures_while_running == refused > 0
    while engine.capture_wanted():
        pass
    assert not engine.decode.wanted
    assert [done.tokens for done in engine.generate(PROMPTS, PARAMS)] == alone
    assert not engine.decode.wanted
    engine.audit().raise_if_foreign()


@pytest.mark.parametrize("way", ["captured passes", "captured steps", "4 steps", "loop"])
def test_who_asks_for_a_step_that_has_no_memory_ends_and_others_go_on(
    build: Build, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    engine = build(**{**WAYS[way], "capture": True, "prefix_cache": False})

    def lack(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("nothing is left\nadvice")

    params = [*PARAMS[:-1], SamplingParams(18, logprobs=1)]
    with monkeypatch.context() as patched:
        patched.setattr(GraphRunner, "capture", lack)
        done = engine.generate(PROMPTS, params)
    failed = {each.request: each.error or "" for each in done if each.finish_reason == "error"}
    # Some have all their tokens by passes that run as they are.
    assert {3, 7} <= failed.keys() <= {2, 3, 6, 7}
    assert all("which it asks for: nothing is left" in error and "advice" not in error for error in failed.values())
    for each, expected in zip(done, alone, strict=True):
        assert each.finish_reason == "error" or each.tokens == expected
    assert not engine.decode.lane_of
    assert [each.tokens for each in engine.generate(PROMPTS, PARAMS)] == alone


@pytest.mark.parametrize(
    "error", [CaptureError("no graph holds it"), ConfigError("no pool"), torch.OutOfMemoryError("nothing is left")]
)
def test_what_cannot_be_captured_ahead_of_need_is_wanted_again_when_it_is_needed(
    build: Build, alone: list[list[int]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    engine = build(capture=True)

    def refuse(reason: Exception) -> None:
        def capture(*arguments: Any, **options: Any) -> None:
            raise reason

        monkeypatch.setattr(GraphRunner, "capture", capture)

    refuse(CaptureError("no memory for a graph"))
    engine.generate(PROMPTS, PARAMS)
    assert (count := len(engine.decode.wanted))
    refuse(error)
    # Each is tried once.
    assert [engine.capture_wanted() for _ in range(count + 1)] == [*reversed(range(count)), 0]
    assert caplog.text.count(str(error)) == count
    refuse(CaptureError("no memory for a graph"))
    assert [done.tokens for done in engine.generate(PROMPTS, PARAMS)] == alone
    assert engine.decode.wanted
    refuse(RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.capture_wanted()


# -- sizes of passes ---------------------------------------------------------------------------------------------------


def costing(engine: Engine, coefficients: list[float]) -> PassCost:
    """Passes cost this from now on, whatever they take."""
    cost = PassCost(coefficients)
    cost.measure = lambda *measured: None  # type: ignore[method-assign]
    engine.scheduler.cost = cost
    return cost


def test_chunks_shrink_as_a_prompt_grows_so_that_a_pass_fits_its_time(build: Build) -> None:
    engine = build(chunk=64, target_itl_ms=1.0)
    cost = costing(engine, [0.1, 0.01, 0.0005, 0.0001])
    seen = launches(engine)
    engine.submit(PROMPTS[0], SamplingParams(60))
    engine.step()
    engine.submit(PROMPTS[4], SamplingParams(2))
    engine.submit(PROMPTS[1], SamplingParams(2))
    while engine.prefilling:
        engine.step()
    passes = [plan for plan, _ in seen if plan.chunks][1:]
    rows = [len(plan.chunks[0][1].tokens) for plan in passes]
    assert rows[0] > rows[1] >= 16
    for plan in passes:
        pairs = sum(len(chunk.tokens) * chunk.end for _, chunk in plan.chunks)
        load = PassLoad(1 + plan.prompt_tokens, pairs, 10)
        # Chunks are never shorter than a few tokens.
        assert cost.milliseconds(load) <= 1.01 or len(plan.chunks[0][1].tokens) == 16


def test_a_pass_with_a_target_fills_one_of_the_captured_sizes(build: Build) -> None:
    """A captured pass takes the time of its padding too: 40 of 64 rows would take what 64 do."""
    engine = build(chunk=64, target_itl_ms=1.0)
    engine.scheduler.pass_sizes = [16, 32, 64]
    cost = costing(engine, [0.1, 0.02, 0.0, 0.0])
    seen = launches(engine)
    engine.submit(PROMPTS[0], SamplingParams(60))
    engine.step()
    engine.submit(PROMPTS[4], SamplingParams(2))
    while engine.prefilling:
        engine.step()
    rows = [1 + plan.prompt_tokens for plan, _ in seen if plan.chunks][1:]
    # By tokens alone, 42 would fit 0.95 ms.
    assert cost.milliseconds(PassLoad(42)) < 0.95
    assert rows[0] == 32
    assert max(rows) == 32
    cost.coefficients = [5.0, 0.02, 0.0, 0.0]
    engine.submit(PROMPTS[4], SamplingParams(2))
    engine.scheduler.admit()
    # Where nothing fits, a few tokens go in all the same.
    assert [len(chunk.tokens) for _, chunk in engine.scheduler.next_chunks()] == [16]


@pytest.mark.parametrize("target_ms", [2.0, 3.0, 5.0])
def test_a_pass_that_is_padded_fits_its_time_with_its_padding(build: Build, target_ms: float) -> None:
    engine = build(chunk=1024, target_itl_ms=target_ms)
    cost = costing(engine, [0.1, 0.01, 0.0, 0.0])
    loads: list[PassLoad] = []
    engine.passes.cost = cost
    cost.measure = lambda load, milliseconds: loads.append(load)  # type: ignore[method-assign]
    engine.submit(PROMPTS[0], SamplingParams(60))
    engine.step()
    # Together more than any of these passes holds.
    for _ in range(SLOTS - 1):
        engine.submit((PROMPTS[4] * 2)[:90], SamplingParams(1))
        engine.submit((PROMPTS[4] * 2)[:90], SamplingParams(1))
    while engine.prefilling:
        engine.step()
    assert 1.0 < max(cost.milliseconds(load) for load in loads) <= target_ms


def test_a_pass_with_log_probabilities_fits_its_time_beside_captured_ones(build: Build) -> None:
    """It runs as it is, and is padded to other rows: 127 tokens beside one would fit the captured 128, and take 144."""
    engine = build(described=True, capture=True, chunk=1024, target_itl_ms=1.5, prefix_cache=False)
    cost = costing(engine, [0.1, 0.01, 0.0, 0.0])
    loads: list[PassLoad] = []
    engine.passes.cost = cost
    cost.measure = lambda load, milliseconds: loads.append(load)  # type: ignore[method-assign]
    assert 128 in engine.scheduler.pass_sizes
    engine.submit(PROMPTS[0], SamplingParams(60))
    engine.step()
    for most in (None, 1, 1):
        engine.submit((PROMPTS[4] * 2)[:90], SamplingParams(1, prompt_logprobs=most))
    while engine.prefilling or engine.scheduler.waiting:
        engine.step()
    captured = set(engine.scheduler.pass_sizes)
    # Who asks for none goes in by a captured pass, whoever is behind it.
    assert captured >= {load.tokens for load in loads[1:2]}
    assert not captured >= {load.tokens for load in loads}
    assert max(cost.milliseconds(load) for load in loads) <= 1.5


@pytest.mark.parametrize(
    ("sizes", "running", "expected"),
    [
        # 42 tokens in passes of 32 rows, one of them a running sequence's: 31 and 11 would hold it up for longer.
        ([], True, [21, 21]),
        ([16, 24, 32], True, [23, 19]),
        # Nobody is held up.
        ([16, 24, 32], False, [32, 10]),
    ],
)
def test_prompts_of_several_passes_go_in_by_equal_ones_beside_running_sequences(
    build: Build, sizes: list[int], running: bool, expected: list[int]
) -> None:
    engine = build(chunk=32)
    engine.scheduler.pass_sizes = sizes
    seen = launches(engine)
    if running:
        engine.submit(PROMPTS[0], SamplingParams(60))
        engine.step()
    for prompt in (PROMPTS[1][:30], PROMPTS[1][:12]):
        engine.submit(prompt, SamplingParams(2))
    while engine.prefilling:
        engine.step()
    assert [plan.prompt_tokens for plan, _ in seen if plan.chunks][running:] == expected


@pytest.mark.parametrize("described", [False, True])
def test_costs_are_learnt_from_the_passes_that_ran(build: Build, described: bool) -> None:
    engine = build(described, capture=described, target_itl_ms=1e6)
    cost = engine.passes.cost
    assert cost is not None
    assert engine.scheduler.cost is cost
    assert min(cost.coefficients) >= 0
    guessed = list(cost.coefficients)
    for _ in range(3):
        engine.generate(PROMPTS, SamplingParams(2))
    assert len(cost._measured) > 16
    assert list(cost.coefficients) != guessed
    assert all(load.tokens and load.prompt_attention for load, _ in cost._measured)


def test_a_fitted_cost_is_what_passes_take() -> None:
    rng = np.random.default_rng(0)
    true = np.array([4.0, 0.02, 3e-6, 1e-5])
    cost = PassCost([1.0, 0.1, 1e-5, 1e-6])
    for _ in range(200):
        rows, end, kv = (int(rng.integers(*bounds)) for bounds in ((16, 2048), (2048, 100_000), (0, 200_000)))
        load = PassLoad(rows, rows * end, kv)
        cost.measure(load, float(true @ [1, *vars(load).values()]) * float(rng.normal(1, 0.02)))
    for load in (PassLoad(512, 512 * 512, 0), PassLoad(256, 256 * 90_000, 100_000)):
        assert cost.milliseconds(load) == pytest.approx(float(true @ [1, *vars(load).values()]), rel=0.15)
    for start in (0, 1000, 90_000):
        rows = cost.rows_within(50.0, start)
        assert cost.chunk(rows, start) <= 50.0 < cost.chunk(rows + 1, start)
    assert cost.rows_within(0.0, 5) == 0


def test_passes_of_few_rows_do_not_make_one_of_many_look_short() -> None:
    """Small passes wait for the weights: a line through them says 50 ms of one that takes 98."""

    def took(rows: int) -> float:
        return max(6.0 + 0.005 * rows, 0.024 * rows)

    sizes = [128, 512, 2048]
    cost = PassCost.first_guess(sizes, [0.9 * took(rows) for rows in sizes], 8 << 30, 1 << 17, 16 << 30, 1 << 19)
    for rows in (64, 96, 128, 192, 256, 384, 512) * 8:
        cost.measure(PassLoad(rows, rows * rows, 32 * 200), took(rows))
    assert cost.milliseconds(PassLoad(4096, 4096 * 4096)) == pytest.approx(took(4096), rel=0.2)
    assert cost.milliseconds(PassLoad(2300, 2300 * 2300, 32 * 200)) > 47.5
    cost.measure(PassLoad(2048, 2048 * 2048, 32 * 200), took(2048))
    alone = PassCost.first_guess([24], [3.0], 1000, 1 << 10, 1 << 20, 1 << 10)
    assert alone.milliseconds(PassLoad(24)) == pytest.approx(3.0)
    assert alone.milliseconds(PassLoad(25)) > 3.0


@pytest.mark.parametrize("odd", [1e-6, 0.1, 1.0, 1e3, 1e9])
def test_one_odd_time_does_not_outweigh_the_others(odd: float) -> None:
    sizes, took = [128, 512, 2048], [6.0, 12.0, 48.0]
    cost = PassCost.first_guess(sizes, took, 8 << 30, 1 << 17, 16 << 30, 1 << 19)
    for _ in range(20):
        for rows, milliseconds in zip(sizes, took, strict=True):
            cost.measure(PassLoad(rows), milliseconds)
    cost.measure(PassLoad(2048), odd)
    cost.fit()
    for rows, milliseconds in zip(sizes, took, strict=True):
        assert cost.milliseconds(PassLoad(rows)) == pytest.approx(milliseconds, rel=0.15)


def test_any_time_and_any_cost_give_some_number_of_rows() -> None:
    for coefficients in ([0.0, 1e-12, 4e-27, 0.0], [1e3, 1e6, 1e9, 1e9], [0.0] * 4):
        cost = PassCost(coefficients)
        for milliseconds in (1e-12, 1.0, 1e12, 1e308):
            for start in (0, 1 << 20):
                rows = cost.rows_within(milliseconds, start)
                assert 0 <= rows <= 1 << 31
                assert rows == 1 << 31 or cost.chunk(rows, start) <= milliseconds * (1 + 1e-6)


def test_the_first_passes_are_learnt_from_at_once() -> None:
    cost = PassCost([0.0, 1.0, 0.0, 0.0], ([128, 512, 2048], [6.0, 12.0, 48.0]))
    guessed = cost.milliseconds(PassLoad(2048))
    cost.measure(PassLoad(2048), 1.2 * guessed)
    assert cost.milliseconds(PassLoad(2048)) > 1.1 * guessed


def test_rungs_end_at_the_largest_pass() -> None:
    assert ladder(24) == [24]
    assert ladder(128) == [32, 128]
    assert ladder(1 << 31)[-1] == ladder(8192)[-1] == 8192
    assert ladder(2000)[-2:] == [1920, 2000]
    assert all(above - below == 128 for below, above in pairwise(ladder(4096)[1:]))


@pytest.mark.parametrize(("gib", "tokens"), [(24, 2048), (79, 4096), (140, 4096)])
def test_passes_of_a_large_gpu_hold_more(monkeypatch: pytest.MonkeyPatch, gib: int, tokens: int) -> None:
    properties = SimpleNamespace(total_memory=gib << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert usual_step_tokens(torch.device("cuda", 0)) == tokens
    assert usual_step_tokens(torch.device("cuda", 0), shared=True) == 2048
    assert usual_step_tokens(torch.device("cpu")) == 2048


def test_what_is_asked_for_is_what_passes_hold(build: Build) -> None:
    assert build(chunk=None).scheduler.chunk == 2048
    assert build(chunk=None, max_step_tokens=33).scheduler.chunk == 33
