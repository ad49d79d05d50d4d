"""What breaks other users of capture: memory, streams, threads and other managers beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import sleep

import pytest
import torch

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import CaptureError
from trtllm_vattn.graphs.capture import captured, replays_ms
from trtllm_vattn.graphs.replay import GraphRunner
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.owners import Extent, Reservation
from trtllm_vattn.vmm.tensors import tensor_at

DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "misbehave",
    [
        pytest.param(lambda x: _on_another_stream(x), id="switches streams"),
        pytest.param(lambda x: torch.cuda.synchronize(), id="waits for the device"),
        pytest.param(lambda x: _allocate_outside_torch(), id="allocates outside torch"),
        pytest.param(lambda x: _allocate_outside_torch(mind=True), id="allocates outside torch, and minds"),
    ],
)
def test_what_other_users_of_capture_break_is_refused_and_leaves_capture_usable(
    misbehave: Callable[[torch.Tensor], object],
) -> None:
    x = torch.ones(4, device="cuda:0")
    misbehaving, behave = [False], [False]

    def step(bucket: int) -> tuple[torch.Tensor]:
        if torch.cuda.is_current_stream_capturing() and not behave[0]:
            misbehaving[0] = True
            misbehave(x)
        return (x[:bucket] + 1,)

    before = torch.cuda.current_stream()
    runner = GraphRunner(step, [4], [x], x.device)
    with pytest.raises(CaptureError, match=r"cannot be captured: .*; it may not .* allocate outside torch"):
        runner.capture()
    assert misbehaving[0]
    assert torch.cuda.current_stream() == before
    with pytest.raises(CaptureError, match=r"captured for \[\]"):
        runner.replay(4)
    # The same runner, its step mended, and another.
    behave[0] = True
    for usable in (runner, GraphRunner(lambda bucket: (x[:bucket] + 1,), [4], [x], x.device)):
        usable.capture()
        assert usable.replay(4)[0].tolist() == [2.0] * 4
        usable.close()


def _on_another_stream(x: torch.Tensor) -> None:
    """Starts work on a side stream that depends on the capture and never joins it again."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x + 1


def _allocate_outside_torch(mind: bool = False) -> None:
    """As a library with an allocator of its own does; CUDA refuses, and the capture is void, whoever minds."""
    from cuda.bindings import runtime

    error, _ = runtime.cudaMalloc(1 << 20)
    if mind and error != runtime.cudaError_t.cudaSuccess:
        raise RuntimeError(f"cudaMalloc answered {error.name}")


@pytest.mark.gpu
def test_a_step_may_switch_streams_if_it_comes_back_and_be_replayed_on_any() -> None:
    x = torch.zeros(1 << 20, device="cuda:0")
    side, other = torch.cuda.Stream(), torch.cuda.Stream()

    def step(bucket: int) -> tuple[torch.Tensor]:
        here = torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            doubled = x[:bucket] * 2
        here.wait_stream(side)
        x[:bucket].copy_(doubled + 1)
        return (x[:bucket].sum(),)

    runner = GraphRunner(step, [1 << 20], [x], x.device)
    runner.capture()
    for stream in (torch.cuda.current_stream(), other):
        for steps in (1, 3):
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                x.fill_(1)
                (total,) = runner.replay(1 << 20, steps)
                # On the stream it was launched on, so behind the replay.
                assert total.item() == (1 << 20) * (2.0 ** (steps + 1) - 1)
    runner.close()


@pytest.mark.parametrize("device", DEVICES)
def test_memory_allocated_while_capturing_is_the_graphs_and_stays_valid(device: str) -> None:
    size = 1 << 20 if device != "cpu" else 1 << 12
    x = torch.ones(size, device=device)

    def step(bucket: int) -> tuple[torch.Tensor]:
        return (torch.full_like(x[:bucket], 3.0) + x[:bucket],)

    runner = GraphRunner(step, [size], [x], x.device)
    runner.capture()
    others = [torch.full((size,), 9.0, device=device) for _ in range(8)]
    (out,) = runner.replay(size)
    assert out.eq(4).all()
    assert all(other.eq(9).all() for other in others)
    runner.close()


@pytest.mark.parametrize("device", DEVICES)
def test_two_managers_live_in_one_process_and_one_ends_before_the_other(device: str) -> None:
    shape = CacheShape(num_layers=2, num_kv_heads=2, head_dim=24, dtype=torch.float32, num_slots=2, max_seq_len=50)
    caches = [KVCacheManager(shape, open_driver(device), 64 << 20, lookahead=0) for _ in range(2)]
    value = torch.ones(1, device=device)
    views = [cache.layer(1).k for cache in caches]
    runners = []
    for cache, view in zip(caches, views, strict=True):
        cache.admit("a", 10)

        def step(bucket: int, view: torch.Tensor = view) -> tuple[torch.Tensor]:
            view[:bucket, :10] += value
            return (view[:bucket, :10].sum(),)

        view[0, :10] = 0.0
        runners.append(GraphRunner(step, [1], [*cache.storages(), value], value.device))
    for runner in runners:
        runner.capture()
    for view in views:
        view[0, :10] = 0.0
    numbers = 10 * 2 * 24
    # The same sequence, slot and layer of both, in turns, over memory that is moved beneath one of them.
    assert runners[0].replay(1)[0].item() == numbers
    assert [runners[1].replay(1)[0].item() for _ in range(3)] == [numbers, 2 * numbers, 3 * numbers]
    caches[0].replace("a")
    assert runners[0].replay(1)[0].item() == 2 * numbers
    first = {storage.untyped_storage().data_ptr() for storage in caches[0].storages()}
    assert not first & {storage.untyped_storage().data_ptr() for storage in caches[1].storages()}
    runners[0].close()
    caches[0].close()
    assert runners[1].replay(1)[0].item() == 4 * numbers
    caches[1].check_integrity()
    runners[1].close()
    caches[1].close()


@pytest.mark.parametrize("device", DEVICES)
def test_capture_while_another_thread_maps(device: str) -> None:
    driver = open_driver(device)
    granularity = driver.granularity()
    stop, started = threading.Event(), threading.Event()
    rounds = [0]

    def churn() -> None:
        reservation = Reservation(driver, granularity)
        window = tensor_at(reservation.base, granularity, driver.device)
        while not stop.is_set():
            extent = Extent(driver, granularity)
            (mapping,) = reservation.map(0, [extent])
            if device == "cpu":
                # What another thread does is not recorded, or a replay would write where nothing is mapped.
                window.fill_(7)
            mapping.close()
            extent.close()
            rounds[0] += 1
            started.set()
        reservation.close()

    thread = threading.Thread(target=churn)
    thread.start()
    x = torch.zeros(8, 3, device=device)
    runner = GraphRunner(lambda bucket: (x[:bucket] * 2,), [8, 4, 2, 1], [x], x.device)
    try:
        assert started.wait(60)
        before = rounds[0]
        runner.capture()
        while rounds[0] == before:
            sleep(0.001)
        x.fill_(3)
        results = [runner.replay(bucket)[0].tolist() for bucket in (1, 2, 4, 8)]
    finally:
        stop.set()
        thread.join()
    assert results == [[[6.0] * 3] * bucket for bucket in (1, 2, 4, 8)]
    assert runner.replay(8)[0].tolist() == [[6.0] * 3] * 8
    runner.close()


@pytest.mark.gpu
def test_work_that_is_timed_starts_behind_what_its_inputs_wait_for() -> None:
    """`captured` calls it on another stream: lengths that are still being written there would be any number."""
    lengths = torch.zeros(4, device="cuda")
    torch.cuda._sleep(100_000_000)
    lengths.fill_(7)
    seen: list[torch.Tensor] = []
    graph = captured(lambda: seen.append(lengths.clone()))
    assert seen[0].tolist() == [7] * 4
    assert len(replays_ms(graph, 2)) == 2
