"""The engine with a prefix cache: the same tokens as without, whatever is reused, evicted, forked or interrupted."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache as remember

import numpy as np
import pytest
import torch
from interrupting import THOROUGH
from transformers import PreTrainedModel

from trtllm_vattn.cache.base import CacheShape, FlatKV
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.prefix.events import AllBlocksCleared, BlockRemoved, BlockStored
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.request import Completion, TokenEvent
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import CountingDriver

BASE = np.random.default_rng(29).integers(0, 512, 64).tolist()
draw = np.random.default_rng(29)


@pytest.fixture(autouse=True)
def fixed_prompts() -> None:
    """Each test has prompts of its own, whatever ran before it. Keys and values that are computed again by another pass
    differ by rounding: logits by 1e-5 here, and the two largest of every 40,000 are closer than that. Of prompts that
    were others in each run, one in some hundred runs of 180 tokens gave another token."""
    global draw
    draw = np.random.default_rng(30)


def tail(count: int) -> list[int]:
    return draw.integers(0, 512, count).tolist()


@remember
def model_of(whose: str = "engines") -> PreTrainedModel:
    """`own` is one whose attention is transformers' still."""
    return load_model("tiny-llama", "cpu", torch.float32)


def shape(slots: int, longest: int = 128) -> CacheShape:
    return shape_of(model_of(), slots, longest)


class Bench:
    """Engines over one counted host driver each, closed and checked at the end."""

    def __init__(self, closing: ExitStack) -> None:
        self._closing = closing
        self.drivers: list[CountingDriver] = []

    def engine(
        self,
        slots: int = 8,
        longest: int = 128,
        budget: int | None = None,
        lookahead: int | None = None,
        **options: object,
    ) -> Engine:
        inner = HostDriver()
        self._closing.callback(inner.close)
        self.drivers.append(CountingDriver(inner))
        made = shape(slots, longest)
        cache = make_cache("vattn", made, "cpu", budget, lookahead=lookahead, driver=self.drivers[-1])
        self._closing.callback(cache.close)
        engine = Engine(model_of(), cache, compile=False, **{"attention": "torch", **options})  # type: ignore[arg-type]
        return self._closing.enter_context(engine)


@pytest.fixture
def bench() -> Iterator[Bench]:
    with ExitStack() as closing:
        yield Bench(closing)


def finish(engine: Engine) -> dict[int, list[TokenEvent]]:
    events: dict[int, list[TokenEvent]] = {}
    for event in engine.run():
        events.setdefault(event.request, []).append(event)
    engine.cache.check_integrity()
    return events


def tokens(engine: Engine, prompt: list[int], params: SamplingParams = SamplingParams(6)) -> Completion:  # noqa: B008
    (done,) = engine.generate([prompt], params)
    return done


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("running", [None, 3])
def test_a_prompt_begins_behind_what_an_earlier_one_left(bench: Bench, capture: bool, running: int | None) -> None:
    prompts = [BASE + tail(20) for _ in range(3)]
    plain = bench.engine(prefix_cache=False, capture=capture)
    want = [tokens(plain, prompt).tokens for prompt in prompts]
    engine = bench.engine(capture=capture, max_running=running)
    prefilled: list[int] = []
    engine.observer = lambda record: prefilled.append(record.prefilled)
    done = [tokens(engine, prompt) for prompt in prompts]
    assert [each.tokens for each in done] == want
    assert [each.cached_tokens for each in done] == [0, 64, 64]
    assert sum(prefilled) == 84 + 20 + 20
    again = tokens(engine, prompts[2])
    # All but one token, which there are logits of.
    assert (again.tokens, again.cached_tokens) == (want[2], 83)
    turn = prompts[2] + again.tokens
    # The last token of an answer was never fed.
    assert tokens(engine, turn).cached_tokens == len(turn) - 1
    assert tokens(engine, turn).tokens == tokens(plain, turn).tokens
    stats = engine.prefix_stats()
    assert stats["cached_tokens"] == 64 + 64 + 83 + 2 * (len(turn) - 1)
    assert stats["requests"] == 6
    engine.cache.check_integrity()


@pytest.mark.parametrize("capture", [False, True])
def test_a_prompt_of_which_one_token_is_left_goes_in_by_a_decode_step(bench: Bench, capture: bool) -> None:
    plain, engine = bench.engine(prefix_cache=False), bench.engine(slots=16, max_running=4, capture=capture)
    prompts = [[*BASE, token] for token in (5, 77)]
    params = [SamplingParams(5), SamplingParams(5, temperature=0.9, seed=11)]
    want = [done.tokens for done in plain.generate(prompts, params)]
    tokens(engine, BASE)
    # Beside one that decodes, and one whose prompt goes in.
    engine.submit(tail(20), SamplingParams(30))
    engine.submit(tail(90), SamplingParams(3))
    engine.step()
    prefilled: list[int] = []
    engine.observer = lambda record: prefilled.append(record.prefilled)
    first = engine.submit(prompts[0], params[0], forced=[9, 8, 7, 6, 5])
    numbers = [engine.submit(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
    events = finish(engine)
    assert [[event.token for event in events[number]] for number in numbers] == want
    forced = plain.submit(prompts[0], params[0], forced=[9, 8, 7, 6, 5])
    assert [event.token for event in events[first]] == [event.token for event in finish(plain)[forced]]
    assert {event.cached_tokens for number in (first, *numbers) for event in events[number]} == {64}
    assert sum(prefilled) in (0, 20, 90, 110), "no token of theirs"


def test_events_say_how_many_tokens_were_cached_and_many_run_at_once(bench: Bench) -> None:
    prompts = [BASE + tail(7) for _ in range(6)]
    plain, engine = bench.engine(prefix_cache=False), bench.engine(slots=12, max_running=4)
    want = [each.tokens for each in plain.generate(prompts, SamplingParams(9))]
    first = engine.submit(prompts[0], SamplingParams(9))
    events = finish(engine)
    numbers = [engine.submit(prompt, SamplingParams(9)) for prompt in prompts[1:]]
    events |= finish(engine)
    assert [[event.token for event in events[number]] for number in (first, *numbers)] == want
    assert {event.cached_tokens for event in events[first]} == {0}
    assert {event.cached_tokens for number in numbers for event in events[number]} == {64}


def test_salts_share_nothing_and_low_priorities_go_first(bench: Bench) -> None:
    engine = bench.engine(slots=3)
    one, other = SamplingParams(2, cache_salt="one"), SamplingParams(2, cache_salt="other")
    assert tokens(engine, BASE, one).cached_tokens == 0
    assert tokens(engine, BASE, other).cached_tokens == 0
    assert tokens(engine, BASE, one).cached_tokens == 63
    assert tokens(engine, BASE, SamplingParams(2)).cached_tokens == 0
    engine.flush_prefix_cache()
    kept, others = tail(40), [tail(40) for _ in range(5)]
    tokens(engine, kept, SamplingParams(2, retention_priority=50))
    for each in others:
        tokens(engine, each, SamplingParams(2))
    # There are three slots.
    assert tokens(engine, kept, SamplingParams(2, retention_priority=50)).cached_tokens == 39
    assert tokens(engine, others[0]).cached_tokens == 0


def test_what_is_pinned_stays_until_it_is_unpinned_or_flushed(bench: Bench) -> None:
    engine = bench.engine(slots=2)
    tokens(engine, BASE)
    assert engine.pin(BASE) == 64
    for _ in range(4):
        tokens(engine, tail(70))
    assert tokens(engine, BASE).cached_tokens == 63
    engine.unpin(BASE)
    with pytest.raises(ConfigError, match="not pinned"):
        engine.unpin(BASE)
    for _ in range(4):
        tokens(engine, tail(70))
    assert tokens(engine, BASE).cached_tokens == 0
    engine.pin(BASE)
    assert engine.flush_prefix_cache() >= 64
    assert tokens(engine, BASE).cached_tokens == 0


def test_nothing_of_a_request_without_a_token_or_with_an_error_is_kept(bench: Bench) -> None:
    engine = bench.engine(max_step_tokens=32)
    number = engine.submit(BASE, SamplingParams(4))
    engine.step()
    engine.abort(number)
    assert tokens(engine, BASE, SamplingParams(1)).cached_tokens == 0
    model = model_of()
    head = model.get_output_embeddings().weight
    kept = head.detach().clone()
    try:
        engine.flush_prefix_cache()
        number = engine.submit(BASE, SamplingParams(40))
        while len(engine.scheduler.requests[number].chosen) < 3:
            engine.step()
        with torch.no_grad():
            head.fill_(torch.nan)
        assert finish(engine)[number][-1].finish_reason == "error"
        assert engine.prefix_stats()["retained_slots"] == 0
    finally:
        with torch.no_grad():
            head.copy_(kept)
    assert tokens(engine, BASE).cached_tokens == 0


def test_an_aborted_request_leaves_what_was_verified(bench: Bench) -> None:
    engine = bench.engine()
    number = engine.submit(BASE, SamplingParams(30))
    while len(engine.scheduler.requests[number].chosen) < 5:
        engine.step()
    engine.abort(number)
    assert tokens(engine, BASE).cached_tokens == 63


def test_new_weights_meet_no_old_keys(bench: Bench) -> None:
    model = load_model("tiny-llama", "cpu", torch.float32)
    cache = make_cache("vattn", shape_of(model, 4, 128), "cpu")
    new = {name: value.clone() * 1.01 for name, value in model.state_dict().items()}
    old = {name: value.clone() for name, value in model.state_dict().items()}
    with Engine(model, cache, compile=False) as engine:
        first = tokens(engine, BASE)
        running = engine.submit(BASE, SamplingParams(20))
        engine.step()
        engine.update_weights(new)
        finish(engine)
        assert running not in engine.scheduler.requests
        changed = tokens(engine, BASE)
        assert changed.cached_tokens == 0
        assert tokens(engine, BASE).cached_tokens == 63
        engine.update_weights(old)
        assert tokens(engine, BASE).tokens == first.tokens
        # Written behind the engine's back.
        model.load_state_dict(new)
        assert (tokens(engine, BASE).tokens, engine.prefix_stats()["retained_slots"]) == (changed.tokens, 1)


def test_who_goes_back_to_the_queue_finds_its_own_prefix(bench: Bench) -> None:
    plain = bench.engine(prefix_cache=False)
    prompts = [tail(40) for _ in range(3)]
    want = [each.tokens for each in plain.generate(prompts, SamplingParams(60))]
    # How far memory is mapped ahead goes by measured times, and what it takes is not kept.
    engine = bench.engine(slots=3, budget=281 * 1024, lookahead=4)
    seen: Counter[int] = Counter()
    admit = engine.slots.admit

    def counted(request: object) -> None:
        admit(request)  # type: ignore[arg-type]
        seen[request.prefilled] += 1  # type: ignore[attr-defined]

    engine.slots.admit = counted  # type: ignore[method-assign, assignment]
    numbers = [engine.submit(prompt, SamplingParams(60)) for prompt in prompts]
    events = finish(engine)
    assert [[event.token for event in events[number]] for number in numbers] == want
    assert sum(seen.values()) > 3, "nobody was preempted"
    assert max(seen) > 40


def test_a_steady_state_makes_no_driver_call(bench: Bench) -> None:
    engine = bench.engine(slots=16, longest=256, lookahead=200, max_running=4, mapping="between-steps")
    for _ in range(8):
        tokens(engine, BASE + tail(20))
    numbers = [engine.submit(BASE + tail(3), SamplingParams(150)) for _ in range(4)]
    first = engine.scheduler.requests[numbers[0]]
    while any(len(engine.scheduler.requests[number].chosen) < 1 for number in numbers):
        engine.step()
    for _ in range(30):
        engine.step()
    calls = Counter(bench.drivers[0].calls)
    for _ in range(60):
        engine.step()
    made = Counter(bench.drivers[0].calls) - calls
    assert {name: count for name, count in made.items() if name != "record"} == {}
    # A hit that adopts makes none either.
    finish(engine)
    calls = Counter(bench.drivers[0].calls)
    assert tokens(engine, first.tokens, SamplingParams(2)).cached_tokens == len(first.tokens) - 1
    assert engine.prefix_stats()["ways"]["adopt"] > 0
    made = Counter(bench.drivers[0].calls) - calls
    assert {name: count for name, count in made.items() if name != "record"} == {}


def test_events_are_those_of_vllm(bench: Bench) -> None:
    engine = bench.engine(slots=2, kv_events=True)
    tokens(engine, BASE, SamplingParams(2, cache_salt="a"))
    (stored,) = engine.kv_events()
    assert isinstance(stored, BlockStored)
    assert stored.token_ids == BASE
    assert stored.extra_keys == [("a",)] * 4
    for _ in range(3):
        tokens(engine, tail(40), SamplingParams(1))
    removed = [event for event in engine.kv_events() if isinstance(event, BlockRemoved)]
    assert sorted(number for event in removed for number in event.block_hashes)[:1]
    assert set(stored.block_hashes) <= {number for event in removed for number in event.block_hashes}
    engine.flush_prefix_cache()
    assert engine.kv_events() == [AllBlocksCleared()]
    with pytest.raises(ConfigError, match="kv_events=True"):
        bench.engine().kv_events()


def test_what_cannot_work_is_refused(bench: Bench) -> None:
    for options, message in (
        ({"prefix_cache": 1}, "prefix_cache"),
        ({"max_running": 9}, "max_running is 9"),
        ({"max_running": 2, "packed": False}, "a lane is a slot"),
        ({"prefix_cache": False, "kv_events": True}, "this engine has not"),
    ):
        with pytest.raises(ConfigError, match=message):
            bench.engine(**options)  # type: ignore[arg-type]
    paged = make_cache("paged", shape(2), "cpu")
    with pytest.raises(ConfigError, match="PagedCache cannot keep prefixes"):
        Engine(model_of(), paged, compile=False, prefix_cache=True)
    with Engine(model_of(), paged, compile=False) as engine:
        assert tokens(engine, BASE).cached_tokens == 0
        assert engine.flush_prefix_cache() == 0
        with pytest.raises(ConfigError, match="keeps no prefixes"):
            engine.pin(BASE)
    for values, message in (
        ({"n": 0}, "n is 0"),
        ({"cache_salt": ""}, "cache_salt is ''"),
        ({"cache_salt": 3}, "cache_salt is 3"),
        ({"retention_priority": 101}, "retention_priority is 101"),
    ):
        with pytest.raises(ConfigError, match=message):
            SamplingParams(**values)  # type: ignore[arg-type]


# -- forks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reusing", [False, True])
def test_samples_are_those_of_requests_with_the_next_seeds(bench: Bench, reusing: bool) -> None:
    engine = bench.engine(slots=8, prefix_cache=reusing, max_running=4)
    params = SamplingParams(7, temperature=1.0, seed=(1 << 64) - 2, n=6)
    done = engine.generate([BASE, BASE[:40]], params)
    assert [each.index for each in done] == [*range(6)] * 2
    assert [each.request for each in done] == list(range(12))
    plain = bench.engine(prefix_cache=False)
    seeds = [(params.seed + branch) % (1 << 64) for branch in range(6)]  # type: ignore[operator]
    for prompt, group in ((BASE, done[:6]), (BASE[:40], done[6:])):
        alone = [SamplingParams(7, temperature=1.0, seed=seed) for seed in seeds]
        assert [each.tokens for each in group] == [each.tokens for each in plain.generate([prompt] * 6, alone)]
    number = engine.submit(BASE, params)
    events = finish(engine)
    assert sorted(events) == list(range(number, number + 6))
    assert all(event.request - event.branch == number for each in events.values() for event in each)
    assert len({tuple(each.tokens) for each in done[:6]}) > 1


def test_the_memory_of_16_samples_is_that_of_one_and_their_own_tokens(bench: Bench) -> None:
    prompt = tail(2000)
    engine = bench.engine(16, 2048)
    cache = engine.cache
    assert isinstance(cache, KVCacheManager)
    own, page = 8, cache.layout.granularity * cache.layout.num_ranges
    peaks = []
    for n, start in ((1, prompt), (16, tail(2000))):
        engine.flush_prefix_cache()
        cache.release_free_memory()
        before, peak = cache.arena.running_bytes, 0
        engine.submit(start, SamplingParams(own, temperature=1.0, seed=1, n=n))
        while engine.busy:
            engine.step()
            if len(engine.scheduler.decoding) == n:
                peak = max(peak, cache.arena.running_bytes - before)
        peaks.append(peak)
    one, many = peaks
    # Each branch has the page that it begins in, those of its own tokens, and what is mapped ahead of it.
    pages = 2 + -(-own * cache.shape.token_bytes // page)
    assert one >= cache.bytes_of(2000)
    assert one < many <= 1.05 * one + 16 * pages * page
    cache.check_integrity()


def test_a_fork_goes_on_from_the_tokens_so_far(bench: Bench) -> None:
    engine, plain = bench.engine(slots=6), bench.engine(prefix_cache=False)
    params = SamplingParams(20, temperature=1.0, seed=3)
    number = engine.submit(BASE, params)
    while len(engine.scheduler.requests[number].chosen) < 6:
        engine.step()
    so_far = list(engine.scheduler.requests[number].chosen)
    same = engine.fork(number, params)
    other = engine.fork(number)
    events = finish(engine)
    want = tokens(plain, BASE, params).tokens
    assert [event.token for event in events[same]] == want[len(so_far) :]
    assert [event.index for event in events[same]] == list(range(len(so_far), 20))
    later = [event.token for event in events[other]]
    assert later != want[len(so_far) :]
    assert len(later) == 20 - len(so_far)
    # 64 + 6 tokens, of which the last was not fed for certain.
    assert engine.prefix_stats()["cached_tokens"] == 2 * (64 + len(so_far) - 1)
    with pytest.raises(ConfigError, match="no request"):
        engine.fork(number)


def test_forks_that_cannot_be_are_refused(bench: Bench) -> None:
    engine = bench.engine()
    number = engine.submit(BASE, SamplingParams(9))
    while len(engine.scheduler.requests[number].chosen) < 4:
        engine.step()
    for params, message in (
        (SamplingParams(4), "max_tokens is 4"),
        (SamplingParams(9, n=2), "fork once for each"),
        ("hot", "the parameters are"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine.fork(number, params)  # type: ignore[arg-type]
    forced = engine.submit(BASE, SamplingParams(2), forced=[1, 2])
    with pytest.raises(ConfigError, match="forced"):
        engine.fork(forced)


def test_the_first_number_aborts_all_samples_and_another_one_its_own(bench: Bench) -> None:
    engine = bench.engine(slots=4)
    number = engine.submit(BASE, SamplingParams(20, n=3))
    while not engine.scheduler.requests[number].chosen:
        engine.step()
    engine.abort(number + 1)
    assert sorted(engine.scheduler.requests) == [number, number + 2]
    engine.abort(number)
    assert not engine.busy
    engine.cache.check_integrity()
    done = engine.generate([BASE], SamplingParams(3, n=3))
    assert len({tuple(each.tokens) for each in done}) == 1


# -- random lives -----------------------------------------------------------------------------------------------------


def check_pages(engine: Engine) -> None:
    """What each running sequence's slot holds, and those that it reads in, are the keys and values that its tokens give
    without reuse."""
    model, cache = model_of("own"), engine.cache
    segments = [] if cache.segments is None else cache.segments.tolist()
    for request in engine.scheduler.decoding.values():
        if not request.is_verified:
            continue
        ids = torch.from_numpy(request.stored)[None]
        where = torch.full((ids.shape[1],), request.slot)
        for _, owner, start, stop in (each for each in segments if each[0] == request.slot):
            where[start:stop] = owner
        with torch.inference_mode():
            past = model(ids, use_cache=True).past_key_values
        for layer in range(cache.shape.num_layers):
            kv = cache.layer(layer)
            assert isinstance(kv, FlatKV)
            for mine, theirs in ((kv.k, past.layers[layer].keys), (kv.v, past.layers[layer].values)):
                got = mine[where, torch.arange(len(where))]
                torch.testing.assert_close(got, theirs[0].transpose(0, 1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(30 if THOROUGH else 3))
def test_random_lives_give_the_same_tokens_with_and_without_reuse(bench: Bench, seed: int) -> None:
    """Shared prefixes, salts, aborts, forks, flushes, ends of text and preemptions, in little memory."""
    draw = random.Random(seed)
    roots = [[draw.randrange(512) for _ in range(draw.choice((20, 48, 70)))] for _ in range(3)]
    pages = draw.choice((50, 90, 400))
    engine = bench.engine(
        slots=draw.choice((4, 9)),
        budget=(pages + 1) * 4096,
        capture=draw.random() < 0.5,
        max_running=draw.choice((None, 3)),
        steps=draw.choice((1, 4)),
        max_step_tokens=draw.choice((16, 64, 2048)),
    )
    if seed % 2:
        # Reading elsewhere costs nothing, and every group is worth it.
        prefixes, reading = engine.slots.prefixes, engine.decode.reading
        assert prefixes is not None
        assert reading is not None
        prefixes.costs, reading.least = replace(prefixes.costs, table_step_us=0), 16
    plain = bench.engine(slots=4, prefix_cache=False)
    asked: dict[int, tuple[list[int], SamplingParams]] = {}
    got: dict[int, list[int | None]] = {}
    gone: set[int] = set()
    for turn in range(60):
        kind = draw.random()
        if kind < 0.4 and len(engine.scheduler.requests) < 8:
            prompt = draw.choice(roots)[: draw.randrange(1, 71)] + [
                draw.randrange(512) for _ in range(draw.randrange(8))
            ]
            params = SamplingParams(
                draw.randrange(1, 14),
                temperature=draw.choice((0.0, 1.0)),
                seed=draw.randrange(100),
                stop_token_ids=[draw.randrange(512) for _ in range(20)],
                n=draw.choice((1, 1, 1, 3)),
                cache_salt=draw.choice((None, None, "a")),
                retention_priority=draw.choice((0, 50)),
            )
            number = engine.submit(prompt, params)
            asked |= {number + i: (prompt, params.of_branch(i)) for i in range(params.n)}
        elif kind < 0.45 and engine.scheduler.requests:
            number = draw.choice(sorted(engine.scheduler.requests))
            gone |= {each.id for each in engine.scheduler.requests.values() if number in (each.id, each.first)}
            engine.abort(number)
        elif kind < 0.5 and engine.scheduler.requests:
            number = draw.choice(sorted(engine.scheduler.requests))
            made = engine.fork(number, asked[number][1])
            asked[made] = asked[number]
            got[made] = list(engine.scheduler.requests[number].chosen)
        elif kind < 0.52:
            engine.flush_prefix_cache()
        elif kind < 0.54:
            engine.pin(draw.choice(roots))
        for event in engine.step():
            got.setdefault(event.request, []).append(event.token)
        engine.cache.check_integrity()
        if turn % 10 == 0:
            check_pages(engine)
    for number, events in finish(engine).items():
        got.setdefault(number, []).extend(event.token for event in events)
    assert engine.prefix_stats()["cached_tokens"] > 0
    numbers = [number for number in asked if number not in gone]
    want = plain.generate([asked[number][0] for number in numbers], [asked[number][1] for number in numbers])
    assert {number: got[number] for number in numbers} == {
        number: each.tokens for number, each in zip(numbers, want, strict=True)
    }
