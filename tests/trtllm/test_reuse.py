"""Requests begin behind what earlier ones left, with the right bytes, under the fake's scheduler iterations."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from trtllm_shape import SHAPE, VERSIONS, drafts

from trtllm_vattn.cache.prefix import Retention, Way
from trtllm_vattn.errors import DriverError, KVCacheOutOfMemory
from trtllm_vattn.trtllm.config import TrtllmConfig
from trtllm_vattn.trtllm.installation import patch_executor
from trtllm_vattn.trtllm.manager import make_manager
from trtllm_vattn.trtllm.reuse import retention_of
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import FaultyDriver

Make = Callable[..., Any]
every = pytest.mark.parametrize("series", list(VERSIONS))
A = list(range(1, 101))
"""A prompt of 100 tokens."""


def executor_of(fake: SimpleNamespace, manager: Any) -> Any:
    executor = fake.executor.PyExecutor(manager, manager.max_batch_size, manager.max_seq_len)
    manager.vattn.set_initial_budget()
    return executor


def ask(fake: SimpleNamespace, number: int, tokens: list[int], new: int = 2, **fields: Any) -> Any:
    request = fake.managers.LlmRequest(number, len(tokens), new, tokens)
    vars(request).update(fields)
    return request


def run(fake: SimpleNamespace, executor: Any, number: int, tokens: list[int], new: int = 2, **fields: Any) -> int:
    """Runs one request to its end, all bytes checked; returns the token that it began to compute at."""
    executor.submit(ask(fake, number, tokens, new, **fields))
    executor.run()
    assert executor.wrong == []
    executor.manager.vattn.cache.check_integrity()
    return int(executor.computed[number][0].start)


@every
def test_a_second_request_computes_only_its_rest(make: Make, fake: SimpleNamespace, series: str) -> None:
    executor = executor_of(fake, make())
    assert run(fake, executor, 1, A[:60]) == 0
    # Its two tokens were kept too, but for the last one, whose KV was never written.
    assert run(fake, executor, 2, [*A[:60], *range(500, 520)]) == 60
    assert executor.computed[2] == [range(60, 80)]
    # A match goes to the token, and leaves one to be computed.
    assert run(fake, executor, 3, [*A[:37], 7, 7]) == 37
    assert run(fake, executor, 4, A[:60]) == 59
    stats = executor.manager.get_kv_cache_stats()
    assert (stats.reused_blocks, stats.missed_blocks) == ((60 + 37 + 59) // 16, (60 + 80 + 39 + 60 - 156) // 16)


def test_a_conversation_goes_on_where_it_stopped(make: Make, fake: SimpleNamespace) -> None:
    executor = executor_of(fake, make())
    request = ask(fake, 1, A[:30], 20)
    executor.submit(request)
    executor.run()
    # All that was generated is there but for the last token.
    assert run(fake, executor, 2, [*request.tokens, 7, 7, 7]) == len(request.tokens) - 1 == 49


@pytest.mark.parametrize("series", ["1.2", "1.3.0rc"])
def test_prompts_in_chunks_begin_behind_what_is_held(make: Make, fake: SimpleNamespace, series: str) -> None:
    executor = executor_of(fake, make())
    executor.chunk = 32
    assert run(fake, executor, 1, A) == 0
    assert executor.computed[1] == [range(0, 32), range(32, 64), range(64, 96), range(96, 100)]
    # Chunks end with a block, whatever token the first begins at.
    tokens = [*A[:20], *range(500, 580)]
    assert run(fake, executor, 2, tokens) == 20
    assert executor.computed[2] == [range(20, 48), range(48, 80), range(80, 100)]


def test_whole_blocks_only_where_partial_reuse_is_off(make: Make, fake: SimpleNamespace) -> None:
    manager = make(cache_config=fake.managers.KvCacheConfig(enable_partial_reuse=False))
    assert not manager.enable_partial_reuse
    executor = executor_of(fake, manager)
    run(fake, executor, 1, A[:60])
    assert run(fake, executor, 2, [*A[:60], 7]) == 48
    assert run(fake, executor, 3, [*A[:15], 7]) == 0


def test_prompts_are_shared_while_they_run(make: Make, fake: SimpleNamespace) -> None:
    executor = executor_of(fake, make())
    executor.submit(ask(fake, 1, A[:64], 20))
    executor.step()
    assert run(fake, executor, 2, [*A[:64], 7, 7], 9) == 64
    # Not by requests of the same step, whose KV is not there yet.
    for number in (3, 4):
        executor.submit(ask(fake, number, A[40:90], 5))
    executor.run()
    assert [executor.computed[number][0].start for number in (3, 4)] == [0, 0]
    assert executor.wrong == []


def test_with_drafts_only_accepted_tokens_are_kept(make: Make, fake: SimpleNamespace) -> None:
    executor = executor_of(fake, make(spec_config=drafts(3)))
    request = ask(fake, 1, A[:30], 12)
    request.draft_tokens = 3
    executor.submit(request)
    executor.run()
    assert run(fake, executor, 2, [*request.tokens, 7, 7]) == len(request.tokens) - 1


@pytest.mark.parametrize("series", ["1.2", "1.4.0rc"])
def test_keys_do_not_meet(make: Make, fake: SimpleNamespace, series: str) -> None:
    executor = executor_of(fake, make())
    keys: list[dict[str, Any]] = [
        {},
        {"cache_salt_id": 5},
        {"lora_task_id": 5},
        {"cache_salt_id": 5, "lora_task_id": 1},
    ]
    for number, key in enumerate(keys, 1):
        assert run(fake, executor, number, A[:40], **key) == 0
    for number, key in enumerate(keys, 11):
        assert run(fake, executor, number, [*A[:40], 7], **key) == 40
    if series != "1.2":
        manager = executor.manager
        assert manager.probe_prefix_match_length(A[:45]) == 32
        assert manager.probe_prefix_match_length(A[:45], lora_task_id=5) == 32
        assert manager.probe_prefix_match_length(A[:45], lora_task_id=6) == 0
        assert manager.probe_prefix_match_length(A[:45], cache_salt="5") == 0


def test_what_the_key_does_not_cover_is_computed_whole(
    make: Make, fake: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    executor = executor_of(fake, make())
    run(fake, executor, 1, A[:40])
    for number, name in enumerate(("py_multimodal_data", "py_return_context_logits", "prompt_embedding_table"), 2):
        before = executor.manager.vattn.reuse.prefixes.as_dict()["blocks"]
        assert run(fake, executor, number, [*A[:40], *range(900, 930)], **{name: True}) == 0
        assert executor.manager.vattn.reuse.prefixes.as_dict()["blocks"] == before
        assert f"requests with {name} are computed whole" in caplog.text
    assert run(fake, executor, 9, [*A[:40], 7], py_lora_path="/lora") == 0
    assert caplog.text.count("computed whole") == 4


def test_a_failed_requests_pages_never_enter(
    make: Make, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake.executor.PyExecutor, "_handle_errors", fake.executor.PyExecutor._handle_errors)
    monkeypatch.setattr(fake.executor.PyExecutor, "start_worker", fake.executor.PyExecutor.start_worker)
    patch_executor(fake.executor, TrtllmConfig())
    executor = executor_of(fake, make())
    failing, other = ask(fake, 1, A[:60], 30), ask(fake, 2, A[60:], 30)
    for request in (failing, other):
        executor.submit(request)
    for _ in range(4):
        executor.step()
    executor._handle_errors("sampling went wrong", requests=[failing])
    assert run(fake, executor, 3, [*A[:60], 7]) == 0
    assert run(fake, executor, 4, [*A[60:], 7]) == 40
    # Without names, all that run fail.
    executor.submit(ask(fake, 5, A[20:70], 30))
    executor.step()
    executor._handle_errors("the device is gone")
    assert run(fake, executor, 6, [*A[20:70], 7]) == 0


def test_what_was_sampled_from_is_kept_though_its_step_is_updated_later(make: Make, fake: SimpleNamespace) -> None:
    """`PyExecutor` frees requests that ended before it updates their last step."""
    manager = make()
    executor = executor_of(fake, manager)
    request = ask(fake, 1, A[:60], 1)
    batch = fake.managers.ScheduledRequests([request], [])
    manager.prepare_resources(batch)
    manager.copy_batch_block_offsets(executor.table, [1], 1, 1, 1)
    executor.kernels.write(executor.table[:, 0], fake.executor.identities(request), range(60))
    request.move_to_next_context_chunk()
    request.tokens.append(7)
    request.state = fake.bindings.LlmRequestState.GENERATION_COMPLETE
    manager.free_resources(request)
    manager.update_resources(batch)
    assert run(fake, executor, 2, [*A[:60], 8]) == 60


def test_a_step_that_sampled_nothing_leaves_nothing(make: Make, fake: SimpleNamespace) -> None:
    manager = make()
    executor = executor_of(fake, manager)
    request = ask(fake, 1, A[:60])
    manager.prepare_resources(fake.managers.ScheduledRequests([request], []))
    manager.free_resources(request)
    assert run(fake, executor, 2, [*A[:60], 7]) == 0
    # What it began with stays.
    again = ask(fake, 3, [*A[:60], *range(500, 530)])
    manager.prepare_resources(fake.managers.ScheduledRequests([again], []))
    assert again.context_current_position == 60
    manager.free_resources(again)
    assert run(fake, executor, 4, [*A[:60], *range(500, 530)]) == 60


def test_a_batch_that_does_not_fit_changes_nothing_for_others(make: Make, fake: SimpleNamespace) -> None:
    manager = make()
    type(manager).stock_blocks = 13
    executor = executor_of(fake, manager)
    run(fake, executor, 1, A[:40])
    requests = [ask(fake, number, list(range(number, number + 120)), 1) for number in (500, 700, 900)]
    with pytest.raises(KVCacheOutOfMemory, match="release or preempt"):
        manager.prepare_resources(fake.managers.ScheduledRequests(requests, []))
    assert all(request.context_current_position == 0 for request in requests)
    assert manager.vattn.cache.stats().sequences == 1
    manager.vattn.cache.check_integrity()
    run(fake, executor, 2, A[:40])


def test_copies_go_to_the_stream_that_the_model_runs_on(
    make: Make, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, inside, copied = SimpleNamespace(cuda_stream=0), [], []

    @contextmanager
    def on(given: Any) -> Iterator[None]:
        assert given is stream
        inside.append(1)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "stream", on)
    manager = make(execution_stream=stream)
    copy = manager.vattn.cache._copy
    monkeypatch.setattr(manager.vattn.cache, "_copy", lambda *given: (copied.append(len(inside)), copy(*given)))
    executor = executor_of(fake, manager)
    manager.vattn.reuse.prefixes.ways = frozenset({Way.COPY})
    run(fake, executor, 1, A[:60])
    assert run(fake, executor, 2, [*A[:60], 7]) == 60
    assert set(copied) == {1}


def test_what_is_kept_gives_way_to_requests(make: Make, fake: SimpleNamespace) -> None:
    manager = make()
    type(manager).stock_blocks = 20
    executor = executor_of(fake, manager)
    choose = random.Random(2)
    free = manager.get_num_free_blocks()
    run(fake, executor, 1, A[:60])
    assert manager.vattn.cache.stats().retained_bytes > 0
    # The scheduler sees as many free blocks as if nothing were kept.
    assert manager.get_num_free_blocks() in (free, free - 1)  # the padding dummy
    for number in range(2, 14):
        length = choose.randint(20, 90)
        executor.submit(ask(fake, number, [*A[: choose.randint(0, 20)], *choose.sample(range(9999), length)], 8))
    executor.run()
    assert executor.wrong == []
    stats = manager.vattn.reuse.prefixes.stats
    assert stats.evicted_tokens > 0 < stats.cached_tokens
    assert manager.vattn.cache.stats().held_bytes <= manager.vattn.target
    # A smaller budget gives back what is kept.
    manager.vattn.release()
    assert manager.vattn.cache.stats().retained_bytes == 0
    assert run(fake, executor, 99, A[:40]) == 0


@pytest.mark.parametrize("way", [Way.ADOPT, Way.ALIAS, Way.COPY])
def test_a_request_holds_no_more_than_it_was_promised(make: Make, fake: SimpleNamespace, way: Way) -> None:
    """Large extents of a long slot would stay with whoever goes on in it with less."""
    manager = make(TrtllmConfig(lookahead=0))
    executor = executor_of(fake, manager)
    manager.vattn.reuse.prefixes.ways = frozenset({way})
    run(fake, executor, 1, A)
    for number in (2, 3):
        executor.submit(ask(fake, number, [*A[:60], number], 3))
    executor.step()
    cache = manager.vattn.cache
    for number in (2, 3):
        slot = cache.slot_of(number)
        assert cache.arena.slots[slot].mapped == cache.layout.bytes_for(int(cache.lengths[slot]))
    executor.run()
    assert executor.wrong == []
    # A slot that is no longer than what is needed is gone on in.
    assert run(fake, executor, 4, [*A, 7, 7, 7, 7]) == 100


def test_retention_is_as_it_was_asked_for(make: Make, fake: SimpleNamespace) -> None:
    def config(*ranges: tuple[int, int | None, int, Any], decode: int = 35, duration: Any = None) -> Any:
        names = ("token_start", "token_end", "priority", "duration_ms")
        found = [SimpleNamespace(**dict(zip(names, each, strict=True))) for each in ranges]
        return SimpleNamespace(
            token_range_retention_configs=found, decode_retention_priority=decode, decode_duration_ms=duration
        )

    def steps(given: Any) -> Any:
        return retention_of(ask(fake, 1, A, kv_cache_retention_config=given))

    assert steps(None) == 35
    assert steps(config()) == [(0, 35, None)]
    assert steps(config((0, 20, 90, timedelta(seconds=2)), (20, None, 60, None))) == [
        (0, 90, 2.0),
        (20, 60, None),
        (100, 35, None),
    ]
    # What lies behind counts no more than what it needs.
    assert steps(config((40, 60, 80, 1500.0), decode=10)) == [(0, 35, None), (100, 10, None)]
    assert steps(config((0, 60, 80, 1500.0), decode=10, duration=500)) == [(0, 80, 1.5), (60, 35, None), (100, 10, 0.5)]

    manager = make()
    type(manager).stock_blocks = 20
    executor = executor_of(fake, manager)
    run(fake, executor, 1, A[:60], kv_cache_retention_config=config((0, 48, 90, None)))
    for number in range(2, 9):
        run(fake, executor, number, list(range(1000 * number, 1000 * number + 70)))
    assert manager.vattn.reuse.prefixes.stats.evicted_tokens > 0
    assert run(fake, executor, 20, [*A[:60], 7]) >= 48
    assert isinstance(steps(config())[0], Retention)


def test_reset_and_zeros_leave_nothing_to_reuse(make: Make, fake: SimpleNamespace) -> None:
    executor = executor_of(fake, make())
    manager = executor.manager
    run(fake, executor, 1, A[:40])
    manager.reset_reuse_state()
    assert run(fake, executor, 2, A[:40]) == 0
    manager.check_invalid_values_in_kv_cache(fill_with_zero=True)
    assert run(fake, executor, 3, A[:40]) == 0


def test_events_tell_of_blocks_that_are_stored_and_removed(make: Make, fake: SimpleNamespace) -> None:
    manager = make(cache_config=fake.managers.KvCacheConfig(event_buffer_max_size=8))
    assert manager.event_buffer_max_size == 8
    executor = executor_of(fake, manager)
    (created,) = manager.get_latest_events(0)
    assert created.data.num_blocks_per_cache_level == [manager.get_max_resource_count(), 0]
    run(fake, executor, 1, A[:40], lora_task_id=3)
    assert manager.get_latest_events(0) == []
    manager.flush_iteration_events()
    (stored,) = manager.get_latest_events(0)
    assert (stored.event_id, stored.window_size, type(stored.data).__name__) == (1, 128, "KVCacheStoredData")
    assert stored.data.parent_hash is None
    assert [[token.token_id for token in block.tokens] for block in stored.data.blocks] == [A[:16], A[16:32]]
    assert {block.lora_id for block in stored.data.blocks} == {3}
    run(fake, executor, 2, A[:60], lora_task_id=3)
    manager.flush_iteration_events()
    (more,) = manager.get_latest_events(0)
    assert more.data.parent_hash == stored.data.blocks[-1].block_hash
    manager.reset_reuse_state()
    manager.flush_iteration_events()
    (gone,) = manager.get_latest_events(0)
    known = [block.block_hash for event in (stored, more) for block in event.data.blocks]
    assert sorted(gone.data.block_hashes) == sorted(known)
    assert gone.event_id == 3


@pytest.mark.parametrize("way", [Way.ADOPT, Way.ALIAS, Way.COPY])
def test_a_driver_call_that_fails_costs_no_byte(fake: SimpleNamespace, host_driver: HostDriver, way: Way) -> None:
    """Each call in turn fails while a request begins behind what another left, beside one that decodes."""
    driver = FaultyDriver(host_driver)
    kind = make_manager(fake.managers.KVCacheManager, TrtllmConfig(budget=400_000, lookahead=0), lambda: driver)
    raised = 0
    for skip in range(60):
        arguments = {**SHAPE, "mapping": fake.managers.Mapping(), "dtype": fake.bindings.DataType.FLOAT}
        manager = kind(fake.managers.KvCacheConfig(), fake.bindings.CacheType.SELF, **arguments)
        executor = fake.executor.PyExecutor(manager, manager.max_batch_size)
        manager.vattn.set_initial_budget()
        manager.vattn.reuse.prefixes.ways = frozenset({way})
        run(fake, executor, 1, A[:60])
        executor.submit(ask(fake, 2, A[60:], 30))
        executor.step()
        executor.submit(ask(fake, 3, [*A[:60], *range(500, 540)]))
        driver.seen = 0
        driver.fail("*", skip=skip)
        batch = executor._schedule()
        try:
            manager.prepare_resources(batch)
        except DriverError:
            raised += 1
            assert batch.context_requests[0].context_current_position == 0
        done = driver.seen <= skip
        driver.disarm()
        manager.vattn.cache.check_integrity()
        for request in batch.context_requests:
            manager.free_resources(request)
        if done:
            assert batch.context_requests[0].context_current_position == 60
        assert run(fake, executor, 4, [*A[:60], *range(500, 540)]) in ((60,) if done else (0, 60))
        manager.shutdown()
        if done:
            break
    assert done
    assert raised > 3


def common(one: list[int], other: list[int]) -> int:
    """Tokens that both begin with."""
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


class Machine(RuleBasedStateMachine):
    """Requests with common prefixes beside a model: a request begins with no more than one of its key computed, and,
    where memory is not short, with no less than one of its key left. Every byte that a request begins with, and reads
    in each step, is checked by the fake's kernels."""

    fake: SimpleNamespace
    driver: HostDriver

    @initialize(chunk=st.sampled_from([None, 32]), partial=st.booleans(), budget=st.sampled_from([150_000, 4_000_000]))
    def begin(self, chunk: int | None, partial: bool, budget: int) -> None:
        managers, bindings = self.fake.managers, self.fake.bindings
        kind = make_manager(managers.KVCacheManager, TrtllmConfig(budget=budget), lambda: self.driver)
        self.manager = kind(
            managers.KvCacheConfig(enable_partial_reuse=partial),
            bindings.CacheType.SELF,
            dtype=bindings.DataType.FLOAT,
            mapping=managers.Mapping(),
            **SHAPE,
        )
        self.executor = executor_of(self.fake, self.manager)
        self.executor.chunk, self.partial, self.has_room = chunk, partial, budget > 1_000_000
        self.asked: dict[int, Any] = {}
        self.left: list[Any] = []
        self.least: dict[int, int] = {}
        self.not_kept: set[int] = set()
        self.next = 1

    @rule(head=st.integers(0, 2), length=st.integers(0, 60), tail=st.integers(1, 40), salt=st.integers(0, 1))
    @precondition(lambda self: len(self.executor.waiting) < 4)
    def submit(self, head: int, length: int, tail: int, salt: int) -> None:
        self.next += 1
        heads = list(range(1000 * head, 1000 * head + length))
        tokens = [*heads, *range(9000, 9000 + tail)]
        request = ask(self.fake, self.next, tokens, 8, cache_salt_id=salt)
        self.asked[self.next] = request
        self.executor.submit(request)

    @rule(steps=st.integers(1, 4))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            for request in self.executor.waiting:
                self.least[request.py_request_id] = self.held_of(request)
            before = len(self.executor.finished)
            self.executor.step()
            self.left += [self.asked[number] for number in self.executor.finished[before:]]

    def held_of(self, request: Any) -> int:
        """Tokens of a prompt, all but one at most, that requests have left; less than a block is not worth it."""
        alike = [each for each in self.left if each.cache_salt_id == request.cache_salt_id]
        alike = [each.tokens[:-1] for each in alike if each.py_request_id not in self.not_kept]
        prompt = request.tokens[:-1]
        found = max((common(prompt, tokens) for tokens in alike), default=0)
        found = found if self.partial else found // 16 * 16
        return found if found >= 16 and self.has_room else 0

    @rule(index=st.integers(0, 3), fails=st.booleans())
    @precondition(lambda self: self.executor.running)
    def leave(self, index: int, fails: bool) -> None:
        request = self.executor.running[index % len(self.executor.running)]
        if fails:
            self.manager.vattn.fail([request.py_request_id])
        self.executor.cancel(request.py_request_id)

    @rule()
    def reset(self) -> None:
        self.manager.reset_reuse_state()
        self.left.clear()
        self.not_kept |= {request.py_request_id for request in self.executor.running}

    @invariant()
    def nothing_is_reused_that_nobody_computed(self) -> None:
        if not hasattr(self, "manager"):
            return
        assert self.executor.wrong == []
        self.manager.vattn.cache.check_integrity()
        for number, parts in self.executor.computed.items():
            request, began = self.asked[number], parts[0].start
            assert self.least[number] <= began < request.orig_prompt_len
            assert self.partial or began % SHAPE["tokens_per_block"] == 0
            # Parts follow one another to the prompt's end.
            assert all(one.stop == two.start for one, two in itertools.pairwise(parts))
            sources = [
                each.tokens[:began]
                for other, each in self.asked.items()
                if other < number and each.cache_salt_id == request.cache_salt_id
            ]
            assert not began or request.tokens[:began] in sources

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            self.executor.run()
            assert self.executor.wrong == []
            self.manager.shutdown()


@pytest.mark.parametrize("series", ["1.2", "1.4.0rc"])
def test_random_lives(fake: SimpleNamespace, host_driver: HostDriver, series: str) -> None:
    machine: Any = type("Life", (Machine,), {"fake": fake, "driver": host_driver})
    case = machine.TestCase
    case.settings = settings(max_examples=6, stateful_step_count=20, deadline=None)
    case("runTest").runTest()
    assert host_driver.live_handles == 0
