"""Starts that take over what another process left, and fail: nothing of it is lost to the next one."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tenancy.lending import lending

from trtllm_vattn.errors import ConfigError, DriverError, KVCacheOutOfMemory
from trtllm_vattn.memory.pool import ExtentPool
from trtllm_vattn.runtime import borrowing
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.tenancy import protocol as say
from trtllm_vattn.tenancy.broker import Broker
from trtllm_vattn.tenancy.config import TenantConfig
from trtllm_vattn.tenancy.journal import KeptRequest, Sizes, State
from trtllm_vattn.tenancy.tenant import BrokerDriver, Client, Tenant
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.owners import Extent
from trtllm_vattn.vmm.wrappers import FaultyDriver

OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "max_seqs": 2,
    "max_seq_len": 64,
    "capture": False,
    "compile": False,
    "prefix_cache": False,
}
PROMPTS = [[*range(1, 30)], [*range(7, 20)]]
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """The tokens of an engine that nobody disturbs."""
    with Engine.from_pretrained("tiny-llama", **OPTIONS) as made:
        return [completion.tokens for completion in made.generate(PROMPTS, PARAMS)]


@pytest.fixture
def lent(tmp_path: Path) -> Iterator[Broker]:
    """A broker, and what an engine of two sequences left that ended in the middle of them."""
    with lending(tmp_path / "broker", 1 << 20, deadline_s=0.05) as broker:
        pid = os.fork()
        if not pid:
            made = engine(broker)
            for prompt in PROMPTS:
                made.submit(prompt, PARAMS)
            while min(len(each.chosen) for each in made.scheduler.requests.values()) < 3:
                made.step()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        yield broker


def engine(broker: Broker, budget: int | None = None, ceiling: int | None = None, **options: Any) -> Engine:
    config = TenantConfig(str(broker.path), "one", ceiling=ceiling, keep_s=60)
    return Engine.from_pretrained("tiny-llama", broker=config, budget=budget, **{**OPTIONS, **options})


def held(broker: Broker) -> int:
    with Client(broker.path) as client:
        (standing,) = client.standing().tenants
    return standing.lent


def finish(made: Engine) -> list[list[int | None]]:
    """All tokens, those that were left among them."""
    found: dict[int, list[int | None]] = {number: [*tokens] for number, tokens in made.survivors().items()}
    for event in made.run():
        assert event.error is None, event.error
        found[event.request].append(event.token)
    return list(found.values())


def memory_files() -> int:
    """Of host drivers, that this process has open."""
    there = (os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path))
    return sum(name.startswith("/memfd:vattn ") for name in there)


def test_who_fails_to_start_leaves_what_it_took_over(
    lent: Broker, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = held(lent)
    with pytest.raises(KVCacheOutOfMemory, match="a budget of 4,096 bytes"):
        engine(lent, budget=4096)
    with pytest.raises(ConfigError, match="no attention backend 'none'"):
        engine(lent, attention="none")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as once:
        once.setattr(Engine, "_go_on_with", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine(lent)
    with engine(lent) as made:
        assert made.prefilled_again == 0
        assert held(lent) == before
        assert finish(made) == alone


@pytest.mark.parametrize(("call", "skip"), [("import_fd", 2), ("map", 2), ("set_access", 2)])
def test_a_driver_call_that_fails_while_it_takes_over_leaves_no_memory(
    lent: Broker, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch, call: str, skip: int
) -> None:
    files, real, left = memory_files(), getattr(HostDriver, call), [skip]

    def failing(driver: HostDriver, *arguments: int) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise DriverError("CUDA_ERROR_UNKNOWN", call, arguments, "injected")
        return real(driver, *arguments)

    with monkeypatch.context() as once:
        once.setattr(HostDriver, call, failing)
        with pytest.raises(DriverError, match="injected"):
            engine(lent)
    # The broker's are in this process, too.
    assert memory_files() <= files
    with engine(lent) as made:
        assert made.prefilled_again == 0
        assert finish(made) == alone


def test_who_takes_over_with_a_ceiling_below_what_is_held_computes_the_youngest_anew(
    lent: Broker, alone: list[list[int]]
) -> None:
    ceiling = held(lent) - 4096
    with engine(lent, ceiling=ceiling) as made:
        assert made.prefilled_again == 1
        assert sorted(request.id for request in made.scheduler.decoding.values()) == [0]
        made.cache.check_integrity()
        assert held(lent) <= ceiling
        assert finish(made) == alone


def test_another_model_is_refused_before_anything_is_given_back(lent: Broker) -> None:
    before = held(lent)
    with pytest.raises(ConfigError, match="the process before this one had slots 2"):
        engine(lent, ceiling=8192, max_seqs=3)
    assert held(lent) == before


def test_who_fails_to_start_first_may_start_again_in_the_same_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ConfigError("injected")

    with lending(tmp_path / "broker", 1 << 20) as broker:
        with monkeypatch.context() as once:
            once.setattr(borrowing, "_take_over", refuse)
            with pytest.raises(ConfigError, match="injected"):
                engine(broker)
        with Client(broker.path) as client:
            assert client.standing().tenants == []
        with engine(broker) as made:
            assert made.survivors() == {}


def test_a_pool_that_takes_over_more_than_its_budget_says_so() -> None:
    driver = HostDriver()
    pool = ExtentPool(driver, 4096)
    extent = Extent(driver, 8192)
    pool.take_over([extent])
    # So a smaller budget that is asked for is another one, and is paid.
    assert (pool.held_bytes, pool.budget) == (8192, 8192)
    pool.release([extent])
    pool.set_budget(4096)
    assert pool.held_bytes == 0
    driver.close()


def test_memory_that_cannot_be_given_back_is_told_of_and_not_waited_for(tmp_path: Path) -> None:
    with lending(tmp_path / "broker", 20 * 4096, deadline_s=0.05) as broker, Client(broker.path) as client:
        config = TenantConfig(str(broker.path), "one")
        options = {"mapping": "between-steps", "host_memory": "1MiB", **OPTIONS}
        with Engine.from_pretrained("tiny-llama", broker=config, **options) as made:
            driver: Any = made.cache.driver  # type: ignore[attr-defined]
            while not isinstance(driver, BrokerDriver):
                driver = driver.inner
            faulty = driver.inner = FaultyDriver(driver.inner)
            whole = made.cache.bytes_for_sequences
            assert len(made.generate([PROMPTS[0]], PARAMS)[0].tokens) == 8
            # One mapping stays.
            faulty.fail("unmap")
            client.do(say.SetLimits("one", 0, 8192))
            made.step()
            client.do(say.SetLimits("one", 0, 20 * 4096))
            stuck = made.cache.arena.quarantined_bytes  # type: ignore[attr-defined]
            assert stuck > 0
            assert made.cache.bytes_for_sequences == whole - stuck
            made.cache.report_demand([], at_once=True)
            assert client.standing().tenants[0].needs == 4096 + stuck
            # One handle as well, in sleep; both count while it wakes, whatever the budget was before.
            client.do(say.SetLimits("one", 0, 4096 * 9 + stuck))
            made.submit(PROMPTS[0], SamplingParams(max_tokens=4, ignore_eos=True))
            made.step()
            made.step()
            faulty.fail("release")
            made.sleep(kv="keep")
            client.do(say.SetLimits("one", 0, 20 * 4096))
            made.wake()
            assert len(list(made.run())) >= 1
            made.cache.check_integrity()


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        (
            [1, 2],
            {"of_another_version": 1},
            "request 0 of the process before this one has parameters that this version",
        ),
        ([1, 5000], {}, "request 0 of the process before this one, whose model was another, has token ids outside"),
    ],
)
def test_requests_of_another_version_or_model_are_refused_and_kept(
    tmp_path: Path, prompt: list[int], params: dict[str, Any], message: str
) -> None:
    with lending(tmp_path / "broker", 1 << 20) as broker:
        pid = os.fork()
        if not pid:
            tenant = Tenant(TenantConfig(str(broker.path), "one", keep_s=60))
            kept = KeptRequest.of(prompt, 4, {"priority": 0, "params": params}, [7])
            tenant.open_journal(Sizes(2, 64, 4, 256)).begin(State(requests={0: kept}))
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        for _ in range(2):
            with pytest.raises(ConfigError, match=message):
                engine(broker)


def test_a_request_whose_text_is_none_is_refused_where_it_is_noted(tmp_path: Path) -> None:
    with lending(tmp_path / "broker", 1 << 20) as broker, engine(broker) as made:
        with pytest.raises(ConfigError, match="holds what is no text"):
            made.submit([1, 2], SamplingParams(max_tokens=2, cache_salt="\ud800"))
        assert not made.busy


def test_nobody_who_looks_waits_for_the_memory_that_waking_waits_for(tmp_path: Path) -> None:
    with lending(tmp_path / "broker", 1 << 20) as broker:
        config = TenantConfig(str(broker.path), "one")
        with Engine.from_pretrained("tiny-llama", broker=config, **OPTIONS) as made:
            made.sleep(kv="drop")
            driver: Any = made.cache.driver  # type: ignore[attr-defined]
            while not isinstance(driver, BrokerDriver):
                driver = driver.inner
            tenant, wait_for, seen = driver.tenant, driver.tenant.wait_for, []

            def waiting(budget: int, timeout_s: float) -> bool:
                looking = threading.Thread(target=lambda: seen.append(made.stats().is_asleep), daemon=True)
                looking.start()
                looking.join(5.0)
                assert seen == [True]
                return wait_for(budget, timeout_s)

            tenant.wait_for = waiting  # type: ignore[method-assign]
            made.wake()
            assert seen == [True]
            del tenant.wait_for
