"""Requests in host memory, by wish and under pressure; engines that sleep: the same tokens as undisturbed ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache as remember
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from trtllm_vattn.cache.base import Transfers
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import (
    ConfigError,
    DriverError,
    EngineAsleep,
    HostMemoryFull,
    KVCacheOutOfMemory,
    MemoryQuarantined,
    WeightsMixed,
)
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.sleeping import WeightsMemory
from trtllm_vattn.runtime.swap_cost import SwapCost
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import FaultyDriver

PROMPTS = [np.random.default_rng(n).integers(0, 512, n).tolist() for n in (40, 33, 25, 37)]
PARAMS = SamplingParams(24)
SWAP = {"out_bandwidth": 1e18, "in_bandwidth": 1e18, "token_s": 1.0}
RECOMPUTE = {"out_bandwidth": 1.0, "in_bandwidth": 1.0, "token_s": 1e-9}
Build = Callable[..., Engine]


@remember
def model_of() -> PreTrainedModel:
    return load_model("tiny-llama", "cpu", torch.float32)


@pytest.fixture
def build() -> Iterator[Build]:
    """Builds an engine; `pages` is the budget beside the dummy slot."""
    with ExitStack() as closing:

        def make(slots: int = 4, pages: int | None = None, host: int | str = "64MiB", **options: Any) -> Engine:
            driver = options.pop("driver", None) or HostDriver()
            shape = shape_of(options.get("model") or model_of(), slots, 96)
            budget = None if pages is None else (pages + 1) * 4096
            cache = make_cache("vattn", shape, "cpu", budget, lookahead=0, host_memory=host, driver=driver)
            closing.callback(cache.close)
            model = options.pop("model", None) or model_of()
            engine = Engine(
                model, cache, **{"compile": False, "chunk": 64, "prefix_cache": False, "packed": False, **options}
            )
            closing.callback(engine.close)
            return engine

        yield make


@remember
def undisturbed() -> dict[int, list[int]]:
    with make_cache("vattn", shape_of(model_of(), 4, 96), "cpu") as cache:
        engine = Engine(model_of(), cache, compile=False, chunk=64, capture=False, prefix_cache=False)
        numbers = [engine.submit(prompt, PARAMS) for prompt in PROMPTS]
        return {numbers.index(number): tokens for number, tokens in collect(engine).items()}


def collect(engine: Engine, tokens: dict[int, list[int]] | None = None) -> dict[int, list[int]]:
    tokens = {} if tokens is None else tokens
    for event in engine.run():
        assert event.error is None
        note(tokens, [event])
    return tokens


def note(tokens: dict[int, list[int]], events: list[Any]) -> None:
    for event in events:
        if event.token is not None:
            tokens.setdefault(event.request, []).append(event.token)


def captures(engine: Engine) -> list[int]:
    """Identities of what is captured."""
    return [id(graph) for graph in engine.decode.runner._graphs.values()]


@pytest.mark.parametrize("prefixes", [False, True])
@pytest.mark.parametrize("capture", [False, True])
def test_a_suspended_request_goes_on_as_if_nothing_had_been(build: Build, capture: bool, prefixes: bool) -> None:
    engine = build(capture=capture, prefix_cache=prefixes)
    numbers = [engine.submit(prompt, PARAMS) for prompt in PROMPTS]
    tokens: dict[int, list[int]] = {}
    while len(tokens.get(numbers[1], ())) < 5:
        note(tokens, engine.step())
    slot = engine.scheduler.requests[numbers[1]].slot
    assert engine.suspend(numbers[1]) > 0
    assert engine.cache.frontiers[slot] == 0
    engine.cache.check_integrity()
    seen = len(tokens[numbers[1]])
    while engine.busy:
        note(tokens, engine.step())
    assert len(tokens[numbers[1]]) <= seen + 2
    with pytest.raises(ConfigError, match="already"):
        engine.suspend(numbers[1])
    with pytest.raises(ConfigError, match="no request"):
        engine.suspend(numbers[0])
    # Others may be generated for meanwhile.
    assert engine.generate([PROMPTS[0]], PARAMS)[0].tokens == undisturbed()[0]
    engine.resume(numbers[1])
    note(tokens, engine.step())
    # With captured batches of several sizes it may move to a lower slot, whose lane is in a smaller one.
    assert engine.scheduler.requests[numbers[1]].slot in ((0, slot) if capture else (slot,))
    with pytest.raises(ConfigError, match="not suspended"):
        engine.resume(numbers[1])
    collect(engine, tokens)
    assert tokens == {numbers[n]: found for n, found in undisturbed().items()}
    assert engine.scheduler.swaps == 1
    engine.cache.check_integrity()


@pytest.mark.parametrize("prefixes", [False, True])
@pytest.mark.parametrize("then", ["goes on", "is aborted", "is suspended again", "sleeps"])
def test_others_go_on_while_a_request_comes_back(build: Build, then: str, prefixes: bool) -> None:
    driver = HostDriver()
    engine = build(driver=driver, capture=False, prefix_cache=prefixes, mapping="between-steps")
    numbers = [engine.submit(prompt, PARAMS) for prompt in PROMPTS]
    tokens: dict[int, list[int]] = {}
    while len(tokens.get(numbers[3], ())) < 3:
        note(tokens, engine.step())
    # Its copies are not done until `complete`.
    driver.hold()
    engine.suspend(numbers[1])
    before = len(tokens[numbers[0]])
    note(tokens, engine.step())
    driver.complete()
    driver.hold()
    engine.resume(numbers[1])
    for _ in range(4):
        note(tokens, engine.step())
    came = engine.scheduler.requests[numbers[1]]
    assert [*engine.scheduler.arriving] == [numbers[1]]
    assert came in engine.scheduler.holders
    assert len(tokens[numbers[0]]) > before + 3
    seen = len(tokens[numbers[1]])
    driver.complete()
    if then == "is aborted":
        engine.abort(numbers[1])
    elif then == "is suspended again":
        assert engine.suspend(numbers[1]) > 0
        note(tokens, engine.step())
        engine.resume(numbers[1])
    elif then == "sleeps":
        engine.sleep()
        engine.wake()
    collect(engine, tokens)
    want = {numbers[n]: found for n, found in undisturbed().items()}
    if then == "is aborted":
        want[numbers[1]] = want[numbers[1]][:seen]
    assert tokens == want
    assert not engine.scheduler.arriving
    engine.cache.check_integrity()


def test_a_request_is_suspended_wherever_it_is(build: Build) -> None:
    engine = build(slots=2, chunk=8)
    numbers = [engine.submit(prompt, PARAMS) for prompt in PROMPTS]
    # One waits, one's prompt goes in by chunks.
    assert engine.suspend(numbers[3]) == 0
    tokens: dict[int, list[int]] = {}
    for _ in range(3):
        note(tokens, engine.step())
    assert engine.scheduler.requests[numbers[0]].prefilled > 8
    assert engine.suspend(numbers[0]) > 0
    for _ in range(4):
        note(tokens, engine.step())
    engine.resume(numbers[0])
    engine.resume(numbers[3])
    collect(engine, tokens)
    assert tokens == {numbers[n]: found for n, found in undisturbed().items()}


def test_suspended_requests_that_can_never_fit_any_more_leave_their_slots_to_the_next(build: Build) -> None:
    engine = build(slots=2)
    long = [engine.submit(prompt, SamplingParams(40, ignore_eos=True)) for prompt in PROMPTS[:2]]
    while not all(engine.scheduler.requests[number].chosen for number in long):
        engine.step()
    for number in long:
        assert engine.suspend(number) > 0
        engine.resume(number)
    engine.set_budget(9 * 4096)
    assert engine.cache.longest_alone < 33
    # They are in front of it, and their slots are theirs until they are told.
    short = engine.submit([1, 2, 3], SamplingParams(2, ignore_eos=True))
    ended = {event.request: event.finish_reason for event in engine.run() if event.finish_reason is not None}
    assert ended == {long[0]: "error", long[1]: "error", short: "length"}
    engine.cache.check_integrity()


def test_a_suspended_request_is_aborted_and_its_host_memory_is_free(build: Build) -> None:
    engine = build()
    numbers = [engine.submit(prompt, PARAMS) for prompt in PROMPTS[:2]]
    for _ in range(4):
        engine.step()
    engine.suspend(numbers[0])
    assert engine.cache.stats().host_bytes > 0
    engine.abort(numbers[0])
    assert engine.cache.stats().host_bytes == 0
    collect(engine)
    engine.cache.check_integrity()


@pytest.mark.parametrize("host", [0, "16KiB", "64MiB"])
def test_a_full_host_computes_anew(build: Build, host: int | str) -> None:
    engine = build(host=host)
    numbers = [engine.submit(prompt, PARAMS) for prompt in PROMPTS]
    tokens: dict[int, list[int]] = {}
    for _ in range(5):
        note(tokens, engine.step())
    copied = [engine.suspend(number) for number in numbers]
    assert [size > 0 for size in copied] == [host == "64MiB"] * 4
    for number in reversed(numbers):
        engine.resume(number)
    collect(engine, tokens)
    assert tokens == {numbers[n]: found for n, found in undisturbed().items()}


@pytest.mark.parametrize("prefixes", [False, True])
@pytest.mark.parametrize(("cost", "swaps"), [(SWAP, True), (RECOMPUTE, False)])
def test_pressure_swaps_or_recomputes_by_cost(
    build: Build, cost: dict[str, float], swaps: bool, prefixes: bool
) -> None:
    engine = build(pages=50, swap_cost=SwapCost(**cost), prefix_cache=prefixes, capture=True)
    captured = captures(engine)
    numbers = [engine.submit(prompt, PARAMS) for prompt in PROMPTS]
    tokens: dict[int, list[int]] = {}
    order: list[int] = []
    for event in engine.run():
        note(tokens, [event])
        assert event.error is None
        if event.finish_reason:
            order.append(event.request)
    assert tokens == {numbers[n]: found for n, found in undisturbed().items()}
    assert (engine.scheduler.swaps > 0) is swaps
    # Who was first is not overtaken.
    assert order[0] == numbers[0]
    assert captures(engine) == captured
    assert engine.cache.stats().host_bytes == 0
    engine.cache.check_integrity()


def test_whatever_driver_call_fails_under_pressure_tokens_are_the_same(build: Build) -> None:
    for skip in range(0, 60, 12):
        driver = FaultyDriver(HostDriver())
        engine = build(pages=50, swap_cost=SwapCost(**SWAP), driver=driver, capture=False)
        numbers = [engine.submit(prompt, PARAMS) for prompt in PROMPTS]
        tokens: dict[int, list[int]] = {}
        driver.fail("copy_to_host" if skip % 24 else "copy_to_device", skip=skip // 24)
        driver.fail("unmap", skip=skip)
        while engine.busy:
            try:
                note(tokens, engine.step())
            except (DriverError, MemoryQuarantined):
                continue
        assert tokens == {numbers[n]: found for n, found in undisturbed().items()}


def test_costs_are_measured() -> None:
    cost = SwapCost()
    assert cost.choose(100, 1 << 20) == "swap"
    cost.observe_prompt(1000, 0.1)
    assert cost.token_s == pytest.approx(1e-4)
    cost.observe_transfers(Transfers(10**9, 0.1, 10**9, 0.05))
    assert (cost.out_bandwidth, cost.in_bandwidth) == (pytest.approx(1e10), pytest.approx(2e10))
    # 100 tokens are computed in 10 ms; 60 MB go out and in within 9 ms, 70 MB within 10.5.
    assert cost.choose(100, 60 * 10**6) == "swap"
    assert cost.choose(100, 70 * 10**6) == "recompute"


def test_an_engine_measures_its_prompts_and_copies(build: Build) -> None:
    engine = build()
    number = engine.submit(PROMPTS[0], PARAMS)
    for _ in range(3):
        engine.step()
    engine.suspend(number)
    assert engine.swap_cost.token_s is not None
    assert 0 < engine.swap_cost.out_bandwidth != SwapCost().out_bandwidth
    with pytest.raises(ConfigError, match="swap_cost"):
        build(swap_cost=3)


# -- sleep -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefixes", [False, True])
@pytest.mark.parametrize("kv", ["keep", "drop"])
def test_an_engine_sleeps_and_goes_on(build: Build, kv: Any, prefixes: bool) -> None:
    driver = HostDriver()
    engine = build(driver=driver, prefix_cache=prefixes, capture=True)
    captured = captures(engine)
    numbers = [engine.submit(prompt, PARAMS) for prompt in PROMPTS]
    tokens: dict[int, list[int]] = {}
    for _ in range(3):
        note(tokens, engine.step())
    engine.suspend(numbers[2])
    for _ in range(4):
        note(tokens, engine.step())
    report = engine.sleep(kv=kv)
    assert (report.kv_bytes, driver.physical_bytes) == (0, 0)
    assert report == engine.sleeping_report()
    assert report.host_pinned_bytes >= report.host_bytes > 0
    with pytest.raises(EngineAsleep, match="kv_cache"):
        engine.step()
    asleep: list[Callable[[], object]] = [
        engine.sleep,
        lambda: engine.suspend(numbers[0]),
        lambda: engine.set_budget(1 << 30),
    ]
    for call in asleep:
        with pytest.raises(EngineAsleep, match=r"call wake\(\)"):
            call()
    late = engine.submit(PROMPTS[0], PARAMS)
    assert engine.wake() > 0
    assert engine.sleeping_report().kv_bytes > 0
    engine.resume(numbers[2])
    collect(engine, tokens)
    assert tokens == {**{numbers[n]: found for n, found in undisturbed().items()}, late: undisturbed()[0]}
    assert captures(engine) == captured
    engine.cache.check_integrity()


@pytest.mark.parametrize("call", ["sleep", "wake"])
def test_an_engine_goes_on_behind_a_sleep_or_wake_that_failed_and_was_not_undone(build: Build, call: str) -> None:
    for first in (0, 3, 6):
        driver = FaultyDriver(HostDriver())
        engine = build(driver=driver, capture=False, packed=None)
        numbers = [engine.submit(prompt, PARAMS) for prompt in PROMPTS]
        tokens: dict[int, list[int]] = {}
        for _ in range(4):
            note(tokens, engine.step())
        if call == "wake":
            engine.sleep()
        driver.fail("create" if call == "wake" else "unmap", first, "CUDA_ERROR_OUT_OF_MEMORY")
        for undoing in ("map", "set_access") * 3 if call == "sleep" else ("unmap", "unmap"):
            driver.fail(undoing)
        with pytest.raises((DriverError, KVCacheOutOfMemory)):
            engine.wake() if call == "wake" else engine.sleep()
        driver.disarm()
        assert engine.sleeping.is_asleep is (call == "wake")
        engine.wake()
        while engine.busy:
            try:
                note(tokens, engine.step())
            except MemoryQuarantined:
                # Who lost memory is computed anew, by the next step.
                assert call == "sleep"
        assert tokens == {numbers[n]: found for n, found in undisturbed().items()}
        engine.close()


def test_who_is_aborted_or_overdue_while_it_sleeps_is_gone(build: Build) -> None:
    engine = build()
    numbers = [engine.submit(prompt, PARAMS) for prompt in PROMPTS[:2]]
    for _ in range(3):
        engine.step()
    engine.sleep()
    engine.abort(numbers[0])
    engine.wake()
    assert {event.request for event in engine.run()} == {numbers[1]}
    assert engine.cache.stats().sequences == 0


def test_a_request_is_forked_while_it_sleeps(build: Build) -> None:
    engine = build(prefix_cache=True)
    number = engine.submit(PROMPTS[0], PARAMS)
    tokens: dict[int, list[int]] = {}
    while len(tokens.get(number, ())) < 4:
        note(tokens, engine.step())
    engine.sleep()
    fork = engine.fork(number)
    tokens[fork] = list(engine.scheduler.requests[fork].chosen)
    assert len(tokens[fork]) >= 4
    engine.wake()
    assert collect(engine, tokens) == {number: undisturbed()[0], fork: undisturbed()[0]}
    engine.cache.check_integrity()


def test_weights_are_written_while_keys_and_values_of_ended_requests_sleep(build: Build) -> None:
    engine = build(prefix_cache=True)
    engine.generate(PROMPTS, PARAMS)
    assert engine.prefix_stats()["retained_slots"] > 0
    engine.sleep(kv="keep")
    same = {name: each.clone() for name, each in model_of().state_dict().items()}
    assert engine.update_weights(same) == 1
    engine.wake()
    (done,) = engine.generate(PROMPTS[:1], PARAMS)
    assert (done.tokens, done.cached_tokens) == (undisturbed()[0], 0)
    engine.flush_prefix_cache()
    assert [row.state for row in engine.slot_stats() if row.state == "retained"] == []
    engine.cache.check_integrity()


def test_who_is_suspended_begins_anew_with_weights_that_are_written_while_keys_and_values_sleep(build: Build) -> None:
    """What is in host memory is given up once, however often, and by whom, before there is memory again."""
    engine = build()
    numbers = [engine.submit(prompt, PARAMS) for prompt in PROMPTS]
    tokens: dict[int, list[int]] = {}
    for _ in range(4):
        note(tokens, engine.step())
    engine.suspend(numbers[0])
    engine.suspend(numbers[1])
    engine.sleep(kv="keep")
    same = {name: each.clone() for name, each in model_of().state_dict().items()}
    for version in (1, 2):
        assert engine.update_weights(same, running="restart") == version
    engine.abort(numbers[0])
    engine.resume(numbers[1])
    engine.wake()
    collect(engine, tokens)
    wanted = {numbers[n]: found for n, found in undisturbed().items()}
    assert {**tokens, numbers[0]: []} == {**wanted, numbers[0]: []}
    stats = engine.cache.stats()
    assert (stats.sequences, stats.suspended_sequences, stats.host_bytes) == (0, 0, 0)


def test_a_small_host_refuses_to_keep_and_loses_nothing(build: Build) -> None:
    engine = build(host="16KiB")
    numbers = [engine.submit(prompt, PARAMS) for prompt in PROMPTS]
    tokens: dict[int, list[int]] = {}
    for _ in range(5):
        note(tokens, engine.step())
    with pytest.raises(HostMemoryFull):
        engine.sleep()
    note(tokens, engine.step())
    engine.sleep(kv="drop")
    engine.wake()
    collect(engine, tokens)
    assert tokens == {numbers[n]: found for n, found in undisturbed().items()}


@pytest.fixture
def own_model() -> PreTrainedModel:
    """A model of the test's own, whose weights go with its engine."""
    return load_model("tiny-llama", "cpu", torch.float32)


@pytest.mark.parametrize("weights", ["host", "drop"])
@pytest.mark.parametrize("merged", [False, True])
def test_weights_sleep_at_their_addresses(build: Build, own_model: PreTrainedModel, weights: Any, merged: bool) -> None:
    from trtllm_vattn.runtime.compiled import merge_projections

    if merged:
        merge_projections(own_model)
    kept = {name: tensor.clone() for name, tensor in own_model.state_dict().items()}
    engine = build(model=own_model, capture=True, sleepable_weights=True)
    captured = captures(engine)
    assert all(torch.equal(kept[name], tensor) for name, tensor in own_model.state_dict().items())
    addresses = [parameter.data_ptr() for parameter in own_model.parameters()]
    memory = engine.sleeping.weights
    assert memory is not None
    numbers = [engine.submit(prompt, PARAMS) for prompt in PROMPTS]
    tokens: dict[int, list[int]] = {}
    for _ in range(5):
        note(tokens, engine.step())
    report = engine.sleep(weights=weights)
    assert (report.weights_bytes, report.kv_bytes) == (0, 0)
    assert (report.host_bytes > memory.size) is (weights == "host")
    with pytest.raises(EngineAsleep, match="weights and kv_cache"):
        engine.step()
    with pytest.raises(EngineAsleep, match=r"wake\(\['weights'\]\)"):
        engine.update_weights(kept)
    engine.wake(["weights"])
    assert engine.sleeping_report().weights_bytes == memory.size
    with pytest.raises(EngineAsleep, match="without kv_cache"):
        engine.step()
    if weights == "drop":
        engine.wake()
        with pytest.raises(WeightsMixed, match="dropped"):
            engine.step()
        engine.update_weights(kept)
    engine.wake(["kv_cache"])
    assert [parameter.data_ptr() for parameter in own_model.parameters()] == addresses
    collect(engine, tokens)
    assert tokens == {numbers[n]: found for n, found in undisturbed().items()}
    assert captures(engine) == captured
    engine.close()
    assert memory.driver.physical_bytes == 0  # type: ignore[attr-defined]
    assert all(parameter.numel() == 0 for parameter in own_model.parameters())


@pytest.mark.parametrize("waking", [False, True])
def test_every_driver_call_of_weights_may_fail(own_model: PreTrainedModel, waking: bool) -> None:
    from trtllm_vattn.runtime import sleeping

    host = HostDriver()
    driver = FaultyDriver(host)
    memory = sleeping.move_weights(own_model, driver)
    kept = {name: tensor.clone() for name, tensor in own_model.state_dict().items()}
    raised = 0
    for skip in range(100):
        if waking:
            memory.release(keep=True)
        driver.seen = 0
        driver.fail("*", skip=skip)
        try:
            memory.restore() if waking else memory.release(keep=True)
        except DriverError:
            raised += 1
            assert memory.is_mapped is not waking
        done = driver.seen <= skip
        driver.disarm()
        if not memory.is_mapped:
            memory.restore()
        assert all(torch.equal(kept[name], tensor) for name, tensor in own_model.state_dict().items())
        if done:
            break
    assert raised >= 3
    for parameter in own_model.parameters():
        parameter.data = torch.empty(0)
    memory.close()
    memory.close()
    assert (host.physical_bytes, host.live_host_bytes, host.live_reservations) == (0, 0, 0)
    host.close()


@pytest.mark.parametrize("waking", [False, True])
def test_weights_come_back_whatever_fails_and_fails_to_be_undone(
    own_model: PreTrainedModel, waking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trtllm_vattn.runtime import sleeping

    # Several extents, as weights of more than 256 MiB have.
    monkeypatch.setattr(sleeping, "LARGEST_EXTENT", 256 << 10)
    host = HostDriver()
    driver = FaultyDriver(host)
    memory = sleeping.move_weights(own_model, driver)
    kept = {name: tensor.clone() for name, tensor in own_model.state_dict().items()}
    whole, extents = host.physical_bytes, len(memory._mappings)
    assert extents > 2
    for keep in (True, False) if not waking else (True,):
        for undoing in ("unmap", "map", "set_access"):
            for first in range(3 * extents + 2):
                for times in (1, 30):
                    if waking:
                        memory.release(keep)
                    driver.fail("*" if waking else "unmap", skip=first)
                    for _ in range(times):
                        driver.fail(undoing, skip=first % 2)
                    try:
                        memory.restore() if waking else memory.release(keep)
                    except DriverError:
                        # Where a sleep failed, no byte is lost, whatever was to be kept.
                        driver.disarm()
                    else:
                        driver.disarm()
                        assert memory.is_mapped is waking
                        if not (keep or waking):
                            memory.restore()
                            own_model.load_state_dict(kept)
                    if not memory.is_mapped:
                        memory.restore()
                    assert all(torch.equal(kept[name], tensor) for name, tensor in own_model.state_dict().items())
                    assert host.physical_bytes == memory.held_bytes >= whole
                    for extent in memory._stuck:
                        extent.close()
                    memory._stuck.clear()
                    assert host.physical_bytes == whole
    for parameter in own_model.parameters():
        parameter.data = torch.empty(0)
    memory.close()
    assert (host.physical_bytes, host.live_host_bytes, host.live_reservations) == (0, 0, 0)
    host.close()


def test_what_cannot_sleep_says_so(build: Build) -> None:
    engine = build()
    for given, text in (
        ({"kv": "lose"}, "keep or drop"),
        ({"weights": "lose"}, "keep, host or drop"),
        ({"weights": "host"}, "sleepable_weights"),
    ):
        with pytest.raises(ConfigError, match=text):
            engine.sleep(**given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no tag 'graphs'"):
        engine.wake(["graphs"])
    assert engine.wake() >= 0
    with make_cache("paged", shape_of(model_of(), 2, 64), "cpu") as cache:
        paged = Engine(model_of(), cache, compile=False, capture=False)
        with pytest.raises(ConfigError, match="sleep needs the vattn cache"):
            paged.sleep()
        number = paged.submit(PROMPTS[2], SamplingParams(4))
        paged.step()
        assert paged.suspend(number) == 0
        paged.resume(number)
        assert [event.token for event in paged.run()][-1] == undisturbed()[2][3]


def test_from_pretrained_takes_host_memory_and_weights_that_sleep() -> None:
    with Engine.from_pretrained(
        "tiny-llama",
        device="cpu",
        max_seqs=2,
        max_seq_len=96,
        host_memory="8MiB",
        sleepable_weights=True,
        compile=False,
    ) as engine:
        before = engine.generate([PROMPTS[0]], PARAMS)[0].tokens
        report = engine.sleep(weights="host")
        assert report.host_bytes > report.kv_bytes + report.weights_bytes == 0
        engine.wake()
        assert engine.generate([PROMPTS[0]], PARAMS)[0].tokens == before == undisturbed()[0]


def test_weights_that_a_finalizer_closes_beside_their_engine_are_given_back_once() -> None:
    """An engine that its own thread closes drops its last tensor there, and finalizers have a thread of theirs."""

    class Beside(HostDriver):
        """While it unmaps, another thread closes the same memory."""

        other: threading.Thread | None = None

        def unmap(self, address: int, size: int) -> None:
            if self.other is None:
                self.other = threading.Thread(target=lambda: failing(memory.close))
                self.other.start()
                self.other.join(0.05)
            super().unmap(address, size)

    failed: list[BaseException] = []

    def failing(call: Callable[[], None]) -> None:
        try:
            call()
        except DriverError as error:
            failed.append(error)

    driver = Beside()
    memory = WeightsMemory(driver, 3 * driver.granularity())
    memory.map_to(memory.size)
    failing(memory.close)
    assert driver.other is not None
    driver.other.join()
    assert (failed, driver.physical_bytes) == ([], 0)
