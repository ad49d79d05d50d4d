"""Memory reaches as far as the C++ manager counts, whatever requests do; else nothing is launched."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from trtllm_shape import SHAPE, VERSIONS, drafts

from trtllm_vattn.errors import KVCacheOutOfMemory, UnmappedAccess
from trtllm_vattn.trtllm.config import TrtllmConfig
from trtllm_vattn.trtllm.manager import make_manager
from trtllm_vattn.vmm.host import HostDriver

Make = Callable[..., Any]
MOST = 3
"""Draft tokens a step at most."""
every = pytest.mark.parametrize("series", list(VERSIONS))


class Machine(RuleBasedStateMachine):
    """An executor with the overlap scheduler, as far as its manager sees it: a step is updated after the next one has
    been prepared, so a request may have been paused, ended or begun again in between."""

    fake: SimpleNamespace
    driver: HostDriver

    @initialize(extra=st.integers(0, 2), attention_dp=st.booleans())
    def begin(self, extra: int, attention_dp: bool) -> None:
        managers, bindings = self.fake.managers, self.fake.bindings
        kind = make_manager(managers.KVCacheManager, TrtllmConfig(budget=400_000), lambda: self.driver)
        # TensorRT-LLM makes room for drafts beyond the sequence the user may have.
        shape = {**SHAPE, "mapping": managers.Mapping(enable_attention_dp=attention_dp)}
        self.manager = kind(
            managers.KvCacheConfig(),
            bindings.CacheType.SELF,
            spec_config=drafts(MOST, extra),
            dtype=bindings.DataType.FLOAT,
            **shape,
        )
        self.longest = SHAPE["max_seq_len"] - 2 * (MOST + 1) - extra
        self.running: list[Any] = []
        self.waiting: list[Any] = []
        self.in_flight: Any = None
        self.dummies: list[Any] = []
        self.next = 1
        self.table = torch.zeros((1, 8, 2, self.manager.max_blocks_per_seq), dtype=torch.int32)

    @rule(tokens=st.lists(st.integers(1, 200), min_size=1, max_size=4), drafted=st.integers(0, MOST))
    def warm_up(self, tokens: list[int], drafted: int) -> None:
        """With lengths up to what a sequence may have, and a token or so more."""
        lengths = [min(each, self.longest + 2) for each in tokens]
        numbers = [1 << 60 | each for each in range(len(lengths))]
        made = self.manager.add_dummy_requests(numbers, lengths, is_gen=True, max_num_draft_tokens=drafted)
        if made is not None:
            self.manager.copy_batch_block_offsets(self.table, numbers, 1, 0, len(numbers))
            for request in made:
                self.manager.free_resources(request)

    @rule()
    @precondition(lambda self: len(self.dummies) < 2)
    def add_dummy(self) -> None:
        """Of padding, or of attention data parallelism, which takes part in steps."""
        self.next += 1
        made = self.manager.add_dummy_requests([(1 << 61) + self.next], is_gen=True, max_num_draft_tokens=MOST)
        assert made is not None
        self.dummies += made

    @rule()
    @precondition(lambda self: self.dummies)
    def drop_dummy(self) -> None:
        dummy = self.dummies.pop()
        if self.in_flight is not None and dummy in self.in_flight.generation_requests:
            self.in_flight.generation_requests.remove(dummy)
        self.manager.free_resources(dummy)

    @rule(prompt=st.integers(1, 70))
    @precondition(lambda self: len(self.waiting) < 3)
    def submit(self, prompt: int) -> None:
        self.next += 1
        self.waiting.append(self.fake.managers.LlmRequest(self.next, prompt, 50))

    def _prepare(self, drafted: list[int], with_dummies: bool) -> None:
        managers, states = self.fake.managers, self.fake.bindings.LlmRequestState
        room = SHAPE["max_batch_size"] - len(self.running)
        starting = [self.waiting.pop(0) for _ in range(min(room, len(self.waiting)))]
        going = [each for each in self.running if self._length(each) + 2 * (MOST + 1) <= self.longest]
        for request in self.running:
            if request not in going:
                self.end(self.running.index(request))
        for index, request in enumerate(going):
            request.draft_tokens = drafted[index % len(drafted)]
        space = SHAPE["max_batch_size"] - len(starting) - len(going)
        batch = managers.ScheduledRequests(starting, going + (self.dummies[:space] if with_dummies else []))
        try:
            self.manager.prepare_resources(batch)
        except KVCacheOutOfMemory:
            self.waiting = starting + self.waiting
            return
        numbers = [request.py_request_id for request in batch.all_requests()]
        self.manager.copy_batch_block_offsets(self.table, numbers, 1, len(starting), len(numbers))
        self.manager.get_batch_cache_indices(numbers)
        self._update()
        self.in_flight = batch
        for request in starting:
            request.is_first_context_chunk = False
            request.state = states.GENERATION_IN_PROGRESS
        self.running = going + starting

    def _length(self, request: Any) -> int:
        cache = self.manager.vattn.cache
        return int(cache.lengths[cache.slot_of(request.py_request_id)])

    def _update(self) -> None:
        if self.in_flight is not None:
            self.manager.update_resources(self.in_flight)
            self.in_flight = None

    @rule(
        drafted=st.lists(st.integers(0, MOST), min_size=1, max_size=4),
        accepted=st.lists(st.integers(0, MOST), min_size=1, max_size=4),
        with_dummies=st.booleans(),
    )
    def step(self, drafted: list[int], accepted: list[int], with_dummies: bool) -> None:
        self._prepare(drafted, with_dummies)
        for index, request in enumerate(self.in_flight.generation_requests if self.in_flight else []):
            kept = min(request.draft_tokens, accepted[index % len(accepted)])
            request.py_num_accepted_draft_tokens = kept
            request.py_rewind_len = request.draft_tokens - kept

    @rule(index=st.integers(0, 3))
    @precondition(lambda self: self.running)
    def pause(self, index: int) -> None:
        """Its blocks are freed while its last step is in flight; it begins again with what it has as its prompt."""
        request = self.running.pop(index % len(self.running))
        tokens = min(self._length(request), 70)
        self.manager.free_resources(request)
        request.state = self.fake.bindings.LlmRequestState.CONTEXT_INIT
        request.is_first_context_chunk, request.prompt_len, request.draft_tokens = True, tokens, 0
        self.waiting.append(request)

    @rule(index=st.integers(0, 3))
    @precondition(lambda self: self.running)
    def end(self, index: int) -> None:
        request = self.running.pop(index % len(self.running))
        request.state = self.fake.bindings.LlmRequestState.GENERATION_COMPLETE
        self.manager.free_resources(request)
        self.manager.free_resources(request)  # Cancelled and finished at once.

    @invariant()
    def memory_reaches_as_far_as_the_count(self) -> None:
        if not hasattr(self, "manager"):
            return
        cache = self.manager.vattn.cache
        for number in self.manager.vattn.running:
            slot = cache.slot_of(number)
            assert self.manager.impl._tokens[number] == cache.lengths[slot] <= cache.frontiers[slot]
        self.manager.vattn.check_mapped(list(self.manager.vattn.running))
        cache.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            self.manager.shutdown()


@every
def test_random_lives(fake: SimpleNamespace, host_driver: HostDriver) -> None:
    machine: Any = type("Life", (Machine,), {"fake": fake, "driver": host_driver})
    case = machine.TestCase
    case.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
    case("runTest").runTest()
    assert host_driver.live_handles == 0


@pytest.fixture
def stepped(make: Make, fake: SimpleNamespace) -> Any:
    """Two requests in the middle of decoding, and a dummy."""
    manager = make(spec_config=drafts(2))
    executor = fake.executor.PyExecutor(manager, manager.max_batch_size, manager.max_seq_len)
    manager.vattn.set_initial_budget()
    for number in (11, 12):
        executor.submit(fake.managers.LlmRequest(number, 30, 30))
    executor.step()
    executor.step()
    return executor


@every
@pytest.mark.parametrize("way", ["copy_batch_block_offsets", "get_batch_cache_indices", "get_cache_indices"])
def test_counts_that_are_ahead_stop_the_step_by_the_requests_name(stepped: Any, way: str, series: str) -> None:
    manager = stepped.manager
    calls = {
        "copy_batch_block_offsets": lambda: manager.copy_batch_block_offsets(stepped.table, [11, 12], 1, 0, 2),
        "get_batch_cache_indices": lambda: manager.get_batch_cache_indices([11, 12]),
        "get_cache_indices": lambda: manager.get_cache_indices(stepped.running[1]),
    }
    calls[way]()
    before = stepped.table.clone()
    for _ in range(20):
        manager.impl.add_token(12)
    with pytest.raises(UnmappedAccess) as stopped:
        calls[way]()
    assert "request 12: " in str(stopped.value)
    assert "request 11" not in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert torch.equal(stepped.table, before)
    # Requests that are not in the batch stop nobody.
    manager.copy_batch_block_offsets(stepped.table, [11], 1, 0, 1)


@every
def test_a_growth_rule_that_we_do_not_know_is_caught(
    make: Make, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, series: str
) -> None:
    """As 1.3's was for an adapter of 1.2: sequences grow by more at every step, and nothing else tells."""
    manager = make()
    executor = fake.executor.PyExecutor(manager, manager.max_batch_size, manager.max_seq_len)
    manager.vattn.set_initial_budget()
    executor.submit(fake.managers.LlmRequest(5, 20, 60))
    executor.step()
    token = manager.impl.add_token
    monkeypatch.setattr(type(manager.impl), "add_token", lambda self, number: (token(number), token(number)))
    with pytest.raises(UnmappedAccess, match="request 5: "):
        executor.run()


@every
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_counts_that_fail_amid_a_step_leave_nothing_unbacked_or_held(
    stepped: Any, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The C++ manager counts some of the batch by then, and some not."""
    manager, requests = stepped.manager, fake.managers
    starting = [requests.LlmRequest(number, 20, 5) for number in (21, 22)]
    real, calls = type(manager.impl)._fit, iter(range(100))

    def fit(self: Any, number: int, tokens: int) -> None:
        if next(calls) == at and sys._getframe(1).f_code.co_name != "remove_sequence":
            raise RuntimeError("no free block")
        real(self, number, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(type(manager.impl), "_fit", fit)
        with pytest.raises(RuntimeError, match="no free block"):
            manager.prepare_resources(requests.ScheduledRequests(starting, list(stepped.running)))
    cache = manager.vattn.cache
    for number in (11, 12, 21, 22):
        assert manager.vattn.slots.holds(number) == (number in manager.impl._ids), number
        if number in manager.impl._ids:
            assert cache.lengths[cache.slot_of(number)] >= manager.impl._tokens[number]
    cache.check_integrity()
    for request in starting:
        manager.free_resources(request)
    assert cache.stats().sequences == 3
    manager.copy_batch_block_offsets(stepped.table, [11, 12], 1, 0, 2)
