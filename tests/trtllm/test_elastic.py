"""The budget of a running executor: raised, lowered, released, resumed, and never short of what was promised."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from trtllm_vattn.errors import ConfigError, DriverError
from trtllm_vattn.trtllm import elastic
from trtllm_vattn.trtllm.config import TrtllmConfig
from trtllm_vattn.trtllm.start import check_executor
from trtllm_vattn.verify.workload import Workload

Make = Callable[..., Any]
BUDGET = 300_000


@pytest.fixture
def executor(make: Make, fake: SimpleNamespace) -> Any:
    """With a budget of its own, in force after warm-up."""
    manager = make(TrtllmConfig(budget=BUDGET))
    made = fake.executor.PyExecutor(manager, 4, 128)
    manager.vattn.set_initial_budget()
    return made


def submit(executor: Any, fake: SimpleNamespace, count: int, first: int = 0, seed: int = 1) -> None:
    choose = random.Random(seed)
    for number in range(first, first + count):
        executor.submit(fake.managers.LlmRequest(number, choose.randint(10, 70), choose.randint(5, 50)))


def healthy(executor: Any) -> None:
    assert executor.wrong == []
    executor.manager.vattn.cache.check_integrity()


def held(executor: Any) -> int:
    return int(executor.manager.vattn.cache.stats().held_bytes)


def test_the_scheduler_is_told_what_the_budget_backs(executor: Any) -> None:
    manager = executor.manager
    backed = manager.vattn.slots.blocks_backed_by(BUDGET)
    assert 8 <= backed < manager.vattn.total_blocks
    assert manager.get_num_free_blocks() == manager.get_max_resource_count() == backed
    assert manager.get_kv_cache_stats().max_num_blocks == backed
    assert manager.vattn.slots.budget_for(backed) <= BUDGET < manager.vattn.slots.budget_for(backed + 1)


def test_lowered_while_requests_run_it_is_approached_as_they_end(executor: Any, fake: SimpleNamespace) -> None:
    manager = executor.manager
    submit(executor, fake, 12)
    for _ in range(6):
        executor.step()
    least = manager.vattn.slots.budget_for(8)
    in_force = elastic.set_budget(least)
    assert in_force >= least
    seen = []
    while executor.waiting or executor.running:
        executor.step()
        healthy(executor)
        seen.append(manager.vattn.cache.budget_bytes)
    assert seen[-1] == least >= held(executor)
    assert sorted(seen, reverse=True)[0] <= BUDGET
    assert len(executor.finished) == 12
    assert manager.get_max_resource_count() == 8


def test_raised_it_serves_more_at_once(make: Make, fake: SimpleNamespace) -> None:
    manager = make(TrtllmConfig(budget=BUDGET))
    executor = fake.executor.PyExecutor(manager, 4, 128)
    manager.vattn.set_initial_budget()
    elastic.set_budget(manager.vattn.slots.budget_for(8))
    submit(executor, fake, 1, seed=3)
    executor.run()
    for number in range(1, 5):
        executor.submit(fake.managers.LlmRequest(number, 60, 30))
    together = [executor.step() for _ in range(3)]
    assert max(together) == 1
    elastic.set_budget(2 * BUDGET)
    while executor.waiting or executor.running:
        together.append(executor.step())
        healthy(executor)
    assert max(together) > 1


def test_released_it_keeps_what_lives_and_grows_again_on_demand(executor: Any, fake: SimpleNamespace) -> None:
    manager = executor.manager
    submit(executor, fake, 5)
    executor.run()
    assert held(executor) > manager.vattn.slots.least_bytes
    assert elastic.release() == manager.vattn.slots.least_bytes == held(executor)
    # A request that comes takes its memory; nothing is recaptured, no address is another.
    pointers = manager.kv_cache_pool_pointers.tolist()
    submit(executor, fake, 3, first=10)
    executor.step()
    assert held(executor) > manager.vattn.slots.least_bytes
    elastic.release()
    executor.run()
    healthy(executor)
    assert elastic.resume() == BUDGET
    assert manager.kv_cache_pool_pointers.tolist() == pointers


class Operator(Workload):
    """Whoever changes the budget of a server, and cancels requests of it, while it runs."""

    def __init__(self, executor: Any, seed: int) -> None:
        super().__init__(seed)
        self.executor = executor

    def set_budget(self) -> None:
        elastic.set_budget(self.random.randint(self.executor.manager.vattn.slots.budget_for(8), 2 * BUDGET))

    def release(self) -> None:
        elastic.release()

    def resume(self) -> None:
        elastic.resume()

    def cancel(self) -> None:
        if self.executor.running:
            self.executor.cancel(self.random.choice(self.executor.running).py_request_id)


def test_budgets_change_all_the_time_and_no_history_is_lost(executor: Any, fake: SimpleNamespace) -> None:
    operator = Operator(executor, 11)
    submit(executor, fake, 40, seed=7)
    steps = 0
    while executor.waiting or executor.running:
        assert executor.step() or steps
        steps += 1
        operator.run_some({"set_budget": 0.2, "release": 0.05, "resume": 0.05, "cancel": 0.03})
        healthy(executor)
    assert len(executor.finished) == 40


def test_too_little_is_refused(executor: Any) -> None:
    with pytest.raises(ConfigError, match="raise it to"):
        elastic.set_budget(1000)


class Communicator:
    """Of stand-in ranks, a thread each."""

    def __init__(self, size: int) -> None:
        self.all = threading.Barrier(size, timeout=20)
        self.values: list[Any] = [None] * size

    def of(self, rank: int) -> SimpleNamespace:
        def allgather(value: Any) -> list[Any]:
            self.values[rank] = value
            self.all.wait()
            found = list(self.values)
            self.all.wait()
            return found

        return SimpleNamespace(allgather=allgather)


@pytest.fixture
def ranks(make: Make, fake: SimpleNamespace) -> list[Any]:
    """Two executors of the same requests, as tensor parallel ranks are; the second has fewer heads."""
    meeting, made = Communicator(2), []
    for rank in range(2):
        mapping = fake.managers.Mapping(world_size=2)
        manager = make(TrtllmConfig(budget=BUDGET), mapping=mapping, num_kv_heads=2 - rank)
        executor = fake.executor.PyExecutor(manager, 4, 128)
        executor.dist = meeting.of(rank)
        # What the stock constructor agreed on with the other rank.
        type(manager).other_ranks_blocks = 40
        check_executor(executor, TrtllmConfig())
        for number in range(12):
            executor.submit(fake.managers.LlmRequest(number, 20 + number, 14))
        made.append(executor)
    return made


def lives_of(ranks: list[Any], ask: Callable[[int], None]) -> list[list[tuple[int, int]]]:
    """Run all ranks to the end: requests that took part in each step and blocks that the scheduler counted on, by
    rank. ``ask(step)`` is called before each step of the first rank."""
    lives: list[list[tuple[int, int]]] = [[] for _ in ranks]

    def live(rank: int) -> None:
        executor = ranks[rank]
        while executor.waiting or executor.running:
            if rank == 0:
                ask(len(lives[0]))
            lives[rank].append((executor.step(), executor.manager.vattn.promised_blocks))
            healthy(executor)

    with ThreadPoolExecutor(len(ranks)) as pool:
        for done in [pool.submit(live, rank) for rank in range(len(ranks))]:
            done.result()
    return lives


def test_ranks_change_their_budget_at_the_same_step_to_the_least(ranks: list[Any]) -> None:
    first, second = (each.manager.vattn for each in ranks)
    before = second.target

    def ask(step: int) -> None:
        if step == 9:
            first.set_budget(first.slots.budget_for(11))
            second.set_budget(second.slots.budget_for(9))
            assert second.target == before
        if step == 33:
            first.set_budget(first.slots.budget_for(30))

    lives = lives_of(ranks, ask)
    assert lives[0] == lives[1]
    counted = [blocks for _, blocks in lives[0]]
    assert 9 in counted
    assert counted.index(9) > 9
    assert counted[-1] == 30
    assert [each.slots.blocks_backed_by(each.target) for each in (first, second)] == [30, 30]
    assert [len(each.finished) for each in ranks] == [12, 12]


def test_a_budget_that_one_rank_cannot_change_stays_on_all(
    ranks: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (each.manager.vattn for each in ranks)
    before = [(each.target, each.promised_blocks) for each in (first, second)]
    shrink, failures = second.cache.shrink_towards, [DriverError("CUDA_ERROR_UNKNOWN", "unmap", (1, 2))]

    def fail_once(budget: int) -> int:
        if failures and budget < before[1][0]:
            raise failures.pop()
        return int(shrink(budget))

    monkeypatch.setattr(second.cache, "shrink_towards", fail_once)

    def ask(step: int) -> None:
        if step == 3:
            first.set_budget(first.slots.budget_for(9))

    lives = lives_of(ranks, ask)
    assert not failures
    assert lives[0] == lives[1]
    assert [(each.target, each.promised_blocks) for each in (first, second)] == before
    assert [len(each.finished) for each in ranks] == [12, 12]
    assert "rank 1: DriverError" in caplog.text


@pytest.mark.parametrize(
    ("setting", "why"),
    [({"pp_size": 2}, "of a pipeline"), ({"enable_attention_dp": True}, "attention data"), ({}, "no communicator")],
)
def test_ranks_that_cannot_meet_are_refused_by_name(
    make: Make, fake: SimpleNamespace, setting: dict[str, Any], why: str
) -> None:
    manager = make(TrtllmConfig(budget=BUDGET), mapping=fake.managers.Mapping(world_size=2, **setting))
    executor = fake.executor.PyExecutor(manager, 4, 128)
    executor.dist = Communicator(2).of(0) if setting else None
    check_executor(executor, TrtllmConfig())
    with pytest.raises(ConfigError, match=rf"2 ranks.*{why}.*give the budget at start"):
        elastic.set_budget(BUDGET)
    assert elastic.release() <= BUDGET
    assert elastic.resume() == manager.vattn.target


def test_without_a_manager_it_says_where_to_call() -> None:
    with pytest.raises(ConfigError, match="TLLM_WORKER_USE_SINGLE_PROCESS=1"):
        elastic.release()


def test_ranks_agree_on_the_least_that_one_of_them_backs(make: Make, fake: SimpleNamespace) -> None:
    manager = make(TrtllmConfig(budget=BUDGET), mapping=fake.managers.Mapping(world_size=2))
    mine = manager.vattn.slots.blocks_backed_by(BUDGET)
    manager.vattn.set_initial_budget()
    assert manager.get_max_resource_count() == mine
    other = make(TrtllmConfig(budget=BUDGET), mapping=fake.managers.Mapping(world_size=2))
    type(other).other_ranks_blocks = mine - 5
    other.vattn.set_initial_budget()
    assert other.get_max_resource_count() == mine - 5
    assert other.vattn.slots.blocks_backed_by(other.vattn.target) == mine - 5


def test_what_requests_might_still_need_is_not_promised_twice(make: Make, fake: SimpleNamespace) -> None:
    """A scheduler that overcommits runs more than fits to its end; that is no reason to have more memory."""
    manager = make(TrtllmConfig(budget=110_000))
    manager.vattn.set_initial_budget()
    backed = manager.get_max_resource_count()
    batch = [fake.managers.LlmRequest(number, 20, 108) for number in range(4)]
    manager.prepare_resources(fake.managers.ScheduledRequests(batch, []))
    assert sum(manager.get_needed_resource_to_completion(request) for request in batch) > backed
    manager.free_resources(batch.pop())
    assert manager.get_max_resource_count() == backed
    assert manager.vattn.cache.budget_bytes == 110_000


def test_a_dummy_that_grew_leaves_the_count_as_it_was(executor: Any, fake: SimpleNamespace) -> None:
    """As attention data parallelism's dummies do, which take part in steps."""
    manager = executor.manager
    backed, free = manager.get_max_resource_count(), manager.get_num_free_blocks()
    (dummy,) = manager.add_dummy_requests([900], [16], is_gen=True)
    manager.prepare_resources(fake.managers.ScheduledRequests([], [dummy]))
    manager.free_resources(dummy)
    assert manager.get_max_resource_count() == backed
    assert manager.get_num_free_blocks() == free
    assert manager.add_dummy_requests([901], prepare_resource=False)
    assert manager.get_max_resource_count() == backed
