"""Two ranks on the host: tokens of one rank, whatever comes and goes, fails or ends. One pair of processes for all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import forking
import looked_at
import numpy as np
import pytest
import torch

from trtllm_vattn.cache.compression import H2O
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cli.main import main
from trtllm_vattn.errors import ConfigError, DriverError, KVCacheOutOfMemory, MemoryQuarantined, NoFreeSlot, RankLost
from trtllm_vattn.memory.mapping_policy import MappingPolicy
from trtllm_vattn.runtime.decode import Launch
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.features import FEATURES, refusal
from trtllm_vattn.runtime.models import SHAPES
from trtllm_vattn.runtime.parallel import Ranks
from trtllm_vattn.runtime.parallel.build import Parts, Recipe
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.speculation import Speculation
from trtllm_vattn.tenancy.config import TenantConfig

PROMPTS = [np.random.default_rng(n).integers(0, 512, n).tolist() for n in (3, 40, 1, 16, 75, 33)]
PARAMS = [SamplingParams(max_tokens=8, temperature=0.8 * (i % 2), seed=i, ignore_eos=True) for i in range(6)]
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "max_seqs": 6,
    "max_seq_len": 128,
    "buckets": [6],
    "max_step_tokens": 32,
    "prefix_cache": False,
    "compile": False,
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """This process and another one, whose drivers can be made to fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        patch.setattr("trtllm_vattn.runtime.parallel.build.open_driver", looked_at.faulty)
        patch.setattr("sys.executable", forking.python())
        started = Ranks.start(2, "cpu")
        started.call(looked_at.use_faulty)
        started.call(looked_at.use_shapes, dict(SHAPES))
        yield started
        started.close()


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """One rank's tokens."""
    with Engine.from_pretrained("tiny-llama", **SETTINGS) as engine:
        return [done.tokens for done in engine.generate(PROMPTS, PARAMS)]


@pytest.fixture(scope="module")
def engine(ranks: Ranks) -> Iterator[Engine]:
    """Of two ranks, with memory for all sequences; tests leave it idle, and armed nowhere."""
    with Engine.from_pretrained("tiny-llama", tensor_parallel=ranks, **SETTINGS) as made:
        yield made


def disarm(ranks: Ranks, engine: Engine | None = None) -> None:
    looked_at.disarm(engine)
    ranks.call(looked_at.disarm)


def agree(ranks: Ranks, engine: Engine) -> None:
    """All ranks hold the same sequences in the same slots, under the same budget."""
    assert [looked_at.slots(engine)] == ranks.call(looked_at.slots)


@pytest.fixture
def run_bench(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs a benchmark on these ranks; its summary."""
    monkeypatch.setattr(Ranks, "start", lambda *arguments: ranks)
    monkeypatch.setattr(ranks, "close", lambda: None)

    def run(name: str, *arguments: str) -> dict[str, Any]:
        output = tmp_path / "out.json"
        assert main(["bench", name, "--device", "cpu", "--output-json", str(output), *arguments]) == 0
        summary: dict[str, Any] = json.loads(output.read_text())["summary"]
        return summary

    return run


def test_the_benchmark_counts_steps_and_replays(run_bench: Callable[..., dict[str, Any]]) -> None:
    arguments = ("--batch-sizes", "1,2", "--rounds", "1", "--steps", "2", "--replays", "30", "--context", "24")
    told = run_bench("tp", *arguments)
    assert told["gpus"] == 0
    assert told["step_2_over_one_gpu"] > 0
    assert told["replays"] >= 30
    assert told["wrong_replays"] == told["failed_requests"] == 0
    assert told["mappings"] > 0


@pytest.mark.parametrize("link", ["group", "ipc"])
def test_the_benchmark_of_transfers_counts_descriptors_and_wrong_bytes(
    run_bench: Callable[..., dict[str, Any]], link: str
) -> None:
    told = run_bench("transfer", "--link", link, "--sizes", "16,200", "--transfers", "8")
    assert told["transfers"] == 8
    assert told["wrong_bytes"] == 0
    assert told["checked_bytes"] > 0
    assert told["descriptors_per_extent"] == 1
    assert told["extents_per_transfer"] > 1
    assert told["over_link"] > 0
    assert told["complete"]


def test_what_peer_mapping_needs_is_said(
    run_bench: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert run_bench("transfer", "--measure", "peer")["peer"] == "skipped: peer mapping needs two GPUs, and there are 1"
    assert main(["bench", "transfer", "--device", "cpu", "--measure", "sequences,peer"]) == 2
    assert "ask for it alone" in capsys.readouterr().err
    assert main(["bench", "transfer", "--device", "cuda:0", "--link", "group"]) == 2
    assert "NCCL refuses two processes on one GPU" in capsys.readouterr().err


def test_bits_are_the_same_in_random_batches_of_a_deterministic_engine(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of every step, bit by bit."""
    options = {**SETTINGS, "buckets": None, "max_seqs": 4, "max_seq_len": 64, "deterministic": True}
    random = np.random.default_rng(0)
    with Engine.from_pretrained("tiny-llama", tensor_parallel=ranks, **options) as engine:
        seen: dict[int, list[bytes]] = {}
        launched = engine.decode.launched

        def noted(lanes: dict[int, int], steps: int, logits: torch.Tensor, *others: Any, **more: Any) -> Launch:
            number_of = {request.slot: request.id for request in engine.scheduler.holders}
            for slot, lane in lanes.items():
                seen.setdefault(number_of[slot], []).append(logits[lane].numpy().tobytes())
            return launched(lanes, steps, logits, *others, **more)

        monkeypatch.setattr(engine.decode, "launched", noted)

        def run(chosen: list[int]) -> dict[int, list[bytes]]:
            seen.clear()
            place = {}
            for which in chosen:
                params = SamplingParams(4, temperature=0.8 * (which % 2), seed=which, ignore_eos=True)
                place[engine.submit(PROMPTS[which], params)] = which
                # Some come while others run.
                if random.random() < 0.5:
                    engine.step()
            list(engine.run())
            return {place[number]: bits[:4] for number, bits in seen.items()}

        alone = {which: run([which])[which] for which in range(5) if which != 4}
        assert len({str(bits) for bits in alone.values()}) == 4
        for _ in range(3):
            chosen = random.permutation([0, 1, 2, 3])[: int(random.integers(2, 5))].tolist()
            assert run(chosen) == {which: alone[which] for which in chosen}


def test_more_than_two_ranks_are_not_deterministic() -> None:
    with pytest.raises(ConfigError, match="deterministic is True, and tensor_parallel is 3"):
        Engine.from_pretrained("tiny-llama", tensor_parallel=3, deterministic=True, **SETTINGS)


@pytest.mark.parametrize(
    ("changes", "size", "said"),
    [
        ({}, 3, "4 query heads, which 3 ranks do not divide"),
        ({"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}, 2, "3 KV heads for 2 ranks"),
        ({"intermediate_size": 161}, 2, "intermediate_size of 161"),
        ({"model_type": "mistral", "sliding_window": 32}, 2, "layers that keep windows"),
    ],
)
def test_what_ranks_do_not_divide_is_refused_before_any_starts(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], size: int, said: str
) -> None:
    def started(*_: Any) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(Ranks, "start", started)
    monkeypatch.setitem(SHAPES, "odd", {**SHAPES["tiny-llama"], **changes})
    with pytest.raises(ConfigError, match=said):
        Engine.from_pretrained("odd", tensor_parallel=size, **SETTINGS)


def test_each_rank_has_half_of_the_heads_at_its_own_addresses(ranks: Ranks, engine: Engine) -> None:
    assert looked_at.heads(engine) == (2, 1)
    assert ranks.call(looked_at.heads) == [(2, 1)]
    assert [looked_at.addresses(engine)] != ranks.call(looked_at.addresses)


def test_tokens_are_those_of_one_rank(engine: Engine, ranks: Ranks, expected: list[list[int]]) -> None:
    assert [done.tokens for done in engine.generate(PROMPTS, PARAMS)] == expected
    agree(ranks, engine)
    forced = engine.submit(PROMPTS[1], SamplingParams(max_tokens=8, ignore_eos=True), forced=[7] * 8)
    with Engine.from_pretrained("tiny-llama", **SETTINGS) as single:
        assert single.submit(PROMPTS[1], SamplingParams(max_tokens=8, ignore_eos=True), forced=[7] * 8) == 0
        alone = [event.token for event in single.run()]
    assert [event.token for event in engine.run() if event.request == forced] == alone


def random_life(engine: Engine, seed: int, expected: list[list[int]], allowed: tuple[type[Exception], ...] = ()) -> int:
    """Requests come, go and are aborted, and the budget changes; all tokens are right. Returns the errors raised."""
    random = np.random.default_rng(seed)
    whole, raised = engine.cache.budget_bytes, 0
    prompt_of: dict[int, int] = {}
    got: dict[int, list[int]] = {}
    left = 9
    while left or engine.busy:
        try:
            if left and random.random() < 0.5:
                which = int(random.integers(6))
                number = engine.submit(PROMPTS[which], PARAMS[which])
                prompt_of[number], got[number] = which, []
                left -= 1
            if random.random() < 0.1 and (running := list(engine.scheduler.requests)):
                number = running[int(random.integers(len(running)))]
                prompt_of.pop(number)
                engine.abort(number)
            if random.random() < 0.15:
                engine.set_budget(int(whole * random.uniform(0.3, 1.0)))
            for event in engine.step():
                assert event.token is not None or allowed, event.error
                if event.token is not None and event.request in prompt_of:
                    got[event.request].append(event.token)
        except allowed:
            raised += 1
            assert raised < 400
    for number, which in prompt_of.items():
        assert got[number] == expected[which][: len(got[number])]
        assert allowed or len(got[number]) == 8
    return raised


def test_requests_come_and_go_under_changing_budgets(engine: Engine, ranks: Ranks, expected: list[list[int]]) -> None:
    whole = engine.cache.budget_bytes
    random_life(engine, 1, expected)
    agree(ranks, engine)
    engine.set_budget(whole)


@pytest.mark.parametrize("failing", [0, 1])
def test_driver_calls_fail_on_one_rank(engine: Engine, ranks: Ranks, expected: list[list[int]], failing: int) -> None:
    whole = engine.cache.budget_bytes
    engine.cache.release_free_memory()
    if failing:
        ranks.call(looked_at.arm_randomly, 0.05, 5)
    else:
        looked_at.arm_randomly(engine, 0.05, 5)
    allowed = (DriverError, MemoryQuarantined, KVCacheOutOfMemory)
    raised = random_life(engine, 2, expected, allowed)
    disarm(ranks, engine)
    assert raised, "no call failed"
    agree(ranks, engine)
    engine.set_budget(whole)
    assert [done.tokens for done in engine.generate(PROMPTS, PARAMS)] == expected
    agree(ranks, engine)


def test_a_mapping_that_fails_on_the_other_rank_fails_the_admission_on_both(engine: Engine, ranks: Ranks) -> None:
    engine.cache.release_free_memory()
    before = looked_at.slots(engine)
    ranks.call(looked_at.arm, "map", 0)
    with pytest.raises(DriverError, match="on rank 1"):
        engine.cache.admit("alone", 30)
    disarm(ranks)
    assert looked_at.slots(engine) == before
    assert ranks.call(looked_at.slots) == [before]


def test_a_sequence_whose_release_failed_is_released_before_it_begins_again(
    engine: Engine, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(cache: KVCacheManager, sequence: object) -> None:
        raise DriverError("CUDA_ERROR_UNKNOWN", "record", (0,))

    engine.cache.release_free_memory()
    ranks.call(looked_at.arm, "map", 0)
    monkeypatch.setattr(KVCacheManager, "release", refuse)
    with pytest.raises(DriverError, match="on rank 1"):
        engine.cache.admit("again", 30)
    disarm(ranks)
    with pytest.raises(DriverError, match="record"):
        engine.cache.admit("again", 30)
    monkeypatch.undo()
    engine.cache.admit("again", 30)
    agree(ranks, engine)
    engine.cache.release("again")


def test_a_step_has_memory_on_all_ranks_or_on_none(engine: Engine, ranks: Ranks) -> None:
    slot = engine.cache.admit("alone", 3)
    engine.cache.release_free_memory()
    lengths = np.zeros(6, np.int64)
    failed: DriverError | None = None
    for length in range(4, 129):
        lengths[slot] = length
        ranks.call(looked_at.arm, "map", 0)
        try:
            engine.cache.prepare_step(lengths)
        except DriverError as error:
            failed = error
            break
        finally:
            disarm(ranks)
    assert "on rank 1" in str(failed)
    assert engine.cache.lengths[slot] == length - 1
    engine.cache.prepare_step(lengths)
    agree(ranks, engine)
    engine.cache.release("alone")


def test_a_slot_that_is_broken_on_one_rank_is_used_on_none(engine: Engine, ranks: Ranks) -> None:
    # Some are broken already, by the tests before.
    free = engine.cache.free_slots()
    for number, _ in enumerate(free):
        engine.cache.admit(number, 100)
    for number, _ in enumerate(free):
        engine.cache.release(number)
    ranks.call(looked_at.arm, "unmap", 0)
    engine.cache.release_free_memory()
    disarm(ranks)
    admitted: list[int] = []
    for number, _ in enumerate(free):
        with suppress(MemoryQuarantined):
            admitted.append(engine.cache.admit(number, 100))
    assert len(admitted) == len(free) - 1
    with pytest.raises(NoFreeSlot):
        engine.cache.admit("another", 100)
    assert set(free) - set(admitted) <= set(engine.cache.broken_slots())
    agree(ranks, engine)
    for number in looked_at.slots(engine)[0]:
        engine.cache.release(number)


def test_what_several_ranks_cannot_do_is_refused_by_name(engine: Engine, ranks: Ranks) -> None:
    for calls, what in (
        (lambda: engine.sleep(), "sleep"),
        (lambda: engine.update_weights({}), "take new weights"),
        (lambda: engine.cache.suspend("a"), "suspend a sequence"),
        (lambda: engine.submit([1], SamplingParams(logprobs=1)), "give log-probabilities"),
        (lambda: engine.submit([1], SamplingParams(min_p=0.1)), "change logits"),
    ):
        with pytest.raises(ConfigError, match=what):
            calls()
    for option in (
        {"prefix_cache": True},
        {"loop": True},
        {"packed": False},
        {"cache": "paged"},
        {"host_memory": 1},
        {"kv_cache_dtype": "fp8"},
    ):
        with pytest.raises(ConfigError, match=next(iter(option))):
            Engine.from_pretrained("tiny-llama", tensor_parallel=ranks, **{**SETTINGS, **option})
    with pytest.raises(ConfigError, match="default process group"):
        Engine.from_pretrained("tiny-llama", tensor_parallel=2, **SETTINGS)


def test_features_with_several_ranks_are_served_or_refused_as_the_matrix_says(
    engine: Engine, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(**options: Any) -> None:
        Engine.from_pretrained("tiny-llama", tensor_parallel=ranks, **{**SETTINGS, **options})

    monkeypatch.setitem(SHAPES, "windowed", {**SHAPES["tiny-mistral"], "sliding_window": 32})
    windowed = Recipe("windowed", torch.float32, 2, 128, None, None, 0, MappingPolicy.CONCURRENT)
    broker, limits = TenantConfig("/tmp/nobody.sock", "one"), SamplingParams(4, ignore_eos=True)
    refused: dict[str, Callable[[], object]] = {
        "prefix": lambda: built(prefix_cache=True),
        "drafts": lambda: built(speculation=Speculation()),
        "fp8": lambda: built(kv_cache_dtype="fp8"),
        "windows": lambda: Parts(windowed, leads=True),
        "compression": lambda: built(compression=H2O()),
        "tenancy": lambda: built(broker=broker),
        "sleep": lambda: engine.sleep(),
        "grammar": lambda: engine.submit([1], replace(limits, regex="a")),
        "logprobs": lambda: engine.submit([1], replace(limits, logprobs=1)),
    }
    for name, call in refused.items():
        said = refusal("ranks", name)
        assert said is not None
        with pytest.raises(ConfigError, match=said):
            call()
    # Served: `deterministic`, which has a test of its own, and forks.
    served = {name for name in FEATURES if name != "ranks" and refusal("ranks", name) is None}
    assert served == {"deterministic", "fork"}
    number = engine.submit(PROMPTS[0], limits)
    events = [*engine.step(), *engine.step()]
    forked = engine.fork(number)
    events += engine.run()
    own, others = ([event.token for event in events if event.request == each] for each in (number, forked))
    assert others
    assert own[len(own) - len(others) :] == others


def test_ranks_have_one_engine_at_a_time_and_like_models(engine: Engine, ranks: Ranks) -> None:
    with pytest.raises(ConfigError, match="have an engine already"):
        Engine.from_pretrained("tiny-llama", tensor_parallel=ranks, **SETTINGS)
    engine.close()
    ranks.call(looked_at.use_shapes, {"tiny-llama": {**SHAPES["tiny-llama"], "num_hidden_layers": 1}})
    with pytest.raises(ConfigError, match="rank 1 has another model"):
        Engine.from_pretrained("tiny-llama", tensor_parallel=ranks, **SETTINGS)
    ranks.call(looked_at.use_shapes, dict(SHAPES))
    with pytest.raises(ConfigError, match=r"no model 'tiny-lama'"):
        Engine.from_pretrained("tiny-lama", tensor_parallel=ranks, **SETTINGS)


def test_a_rank_that_is_killed_is_named_and_nothing_hangs(ranks: Ranks) -> None:
    engine = Engine.from_pretrained("tiny-llama", tensor_parallel=ranks, **SETTINGS)
    engine.submit(PROMPTS[0], SamplingParams(max_tokens=100, ignore_eos=True))
    engine.step()
    started = monotonic()
    with pytest.raises(RankLost, match=r"rank 1 .* has ended"):
        ranks.call(looked_at.die)
    with pytest.raises(RankLost, match=r"rank 1 .* has ended"):
        engine.step()
    engine.close()
    ranks.close()
    assert monotonic() - started < 60
    assert looked_at.left_behind(engine) == (0, 0, 0)
