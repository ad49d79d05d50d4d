from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from trtllm_vattn.errors import CaptureError, ConfigError
from trtllm_vattn.graphs.replay import GraphRunner, default_buckets
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.owners import Extent, Reservation
from trtllm_vattn.vmm.tensors import tensor_at

DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


class Doubling:
    """A step over static buffers that notes the buckets it was run for."""

    def __init__(self, device: str) -> None:
        self.x = torch.zeros(8, 3, device=device)
        self.w = torch.eye(3, device=device) * 2
        self.ran: list[int] = []

    def step(self, bucket: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.ran.append(bucket)
        doubled = self.x[:bucket] @ self.w
        return doubled, doubled.argmax(dim=-1)

    def runner(self, buckets: list[int]) -> GraphRunner:
        return GraphRunner(self.step, buckets, [self.x, self.w], self.x.device)


@pytest.mark.parametrize("device", DEVICES)
def test_replays_give_what_eager_steps_give(device: str) -> None:
    it = Doubling(device)
    runner = it.runner([4, 1, 8])
    report = runner.capture()
    assert list(report.seconds) == [8, 4, 1]
    assert [bucket for i, bucket in enumerate(it.ran) if i == 0 or it.ran[i - 1] != bucket] == [8, 4, 1]
    ran = len(it.ran)
    generator = torch.Generator().manual_seed(1)
    for lanes in (3, 8, 1, 5, 4):
        it.x.copy_(torch.randn(8, 3, generator=generator))
        bucket = runner.bucket_for(lanes)
        assert bucket == min(size for size in (1, 4, 8) if size >= lanes)
        doubled, best = runner.replay(bucket)
        assert torch.equal(doubled, it.x[:bucket] * 2)
        assert torch.equal(best, it.x[:bucket].argmax(dim=-1))
    assert len(it.ran) == ran, "a replay ran Python"
    runner.close()


@pytest.mark.parametrize("device", DEVICES)
def test_what_cannot_be_replayed_is_refused(device: str) -> None:
    it = Doubling(device)
    runner = it.runner([2])
    with pytest.raises(CaptureError, match=r"no graph for 2 lanes: the runner is captured for \[\]"):
        runner.replay(2)
    runner.capture()
    with pytest.raises(ConfigError, match="3 lanes, but the largest bucket is 2"):
        runner.bucket_for(3)
    runner.close()
    runner.close()
    for steps in (1, 3):
        with pytest.raises(CaptureError, match="no graph for 2 lanes: the runner is closed"):
            runner.replay(2, steps)
    with pytest.raises(CaptureError, match="this runner is closed"):
        runner.capture()


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_composed_is_not_launched_after_closing_either(device: str) -> None:
    it = Counting(device)
    runner = it.runner(loop=True)
    runner.capture()
    it.restart(5)
    runner.replay(2, 3)
    runner.replay_while(2)
    count = it.count.item()
    runner.close()
    for launch in (lambda: runner.replay(2, 3), lambda: runner.replay_while(2)):
        with pytest.raises(CaptureError, match="no graph for 2 lanes: the runner is closed"):
            launch()
    assert it.count.item() == count


class Counting:
    """A step that counts on the device and says whether to go on."""

    def __init__(self, device: str) -> None:
        self.count, self.most = torch.zeros(2, 1, dtype=torch.int64, device=device)
        self.seen = torch.zeros(64, dtype=torch.int64, device=device)
        self.go = torch.zeros(1, dtype=torch.int32, device=device)

    def step(self, bucket: int) -> tuple[torch.Tensor]:
        self.seen.index_copy_(0, self.count, self.count * 10 + bucket)
        self.count.add_(1)
        self.go.copy_(self.count < self.most)
        return (self.seen[:bucket].sum(),)

    def runner(self, loop: bool) -> GraphRunner:
        static = [self.count, self.most, self.seen, self.go]
        return GraphRunner(self.step, [2, 1], static, self.count.device, self.go if loop else None)

    def restart(self, most: int = 0) -> None:
        self.count.zero_()
        self.seen.zero_()
        self.most.fill_(most)


@pytest.mark.parametrize("device", DEVICES)
def test_one_captured_step_is_replayed_many_times_over_in_one_launch(device: str) -> None:
    it = Counting(device)
    runner = it.runner(loop=False)
    runner.capture()
    for bucket, steps in ((2, 5), (1, 8), (2, 1), (2, 5)):
        it.restart()
        (total,) = runner.replay(bucket, steps)
        assert it.count.item() == steps
        assert it.seen[: steps + 1].tolist() == [10 * i + bucket for i in range(steps)] + [0]
        assert total.item() == it.seen[:bucket].sum().item()
    with pytest.raises(ConfigError, match="built without `go`"):
        runner.replay_while(2)
    runner.close()


@pytest.mark.parametrize("device", DEVICES)
def test_a_loop_ends_where_the_device_says(device: str) -> None:
    it = Counting(device)
    runner = it.runner(loop=True)
    runner.capture()
    for most in (7, 0, 1, 50):
        it.restart(most)
        runner.replay_while(2)
        taken = max(1, most)
        assert it.count.item() == taken
        assert it.seen[: taken + 1].tolist() == [10 * i + 2 for i in range(taken)] + [0]
    runner.close()


@pytest.mark.parametrize("device", DEVICES)
def test_buckets_may_be_captured_when_they_are_first_needed(device: str) -> None:
    it = Doubling(device)
    runner = it.runner([4, 1])
    report = runner.capture([1])
    assert list(report.seconds) == list(report.replay_s) == [1]
    assert runner.captured == {1}
    with pytest.raises(CaptureError, match=r"no graph for 4 lanes: the runner is captured for \[1\]"):
        runner.replay(4)
    # Its replays take time in which somebody may wait.
    assert runner.capture([4], timed=()).replay_s == {}
    it.x.fill_(2)
    assert runner.replay(4)[0].tolist() == [[4.0] * 3] * 4
    assert runner.replay(1)[0].tolist() == [[4.0] * 3]
    runner.close()


@pytest.mark.parametrize("device", DEVICES)
def test_two_runners_share_a_pool(device: str) -> None:
    one, other = Doubling(device), Doubling(device)
    first = one.runner([8])
    second = GraphRunner(other.step, [8], [other.x, other.w], other.x.device, pool=first.pool)
    first.capture()
    second.capture()
    one.x.fill_(1)
    other.x.fill_(2)
    assert first.replay(8)[0].tolist() == [[2.0] * 3] * 8
    assert second.replay(8)[0].tolist() == [[4.0] * 3] * 8
    first.close()
    assert second.replay(8)[0].tolist() == [[4.0] * 3] * 8
    second.close()


@pytest.mark.parametrize("buckets", [[], [0, 1], [2, 2]])
def test_buckets_must_make_sense(buckets: list[int]) -> None:
    with pytest.raises(ConfigError, match="different positive batch sizes"):
        Doubling("cpu").runner(buckets)


@pytest.mark.parametrize(
    ("most", "buckets"),
    [(1, [1]), (2, [1, 2]), (7, [1, 2, 4, 7]), (33, [1, 2, 4, 8, 16, 24, 32, 33]), (64, [1, 2, 4, *range(8, 65, 8)])],
)
def test_default_buckets_end_at_the_most(most: int, buckets: list[int]) -> None:
    assert default_buckets(most) == buckets
    assert default_buckets(600)[-3:] == [512, 576, 600]
    assert default_buckets(1100)[-3:] == [1024, 1088, 1100]


def test_default_buckets_stay_few_and_near_to_one_another() -> None:
    sizes = default_buckets(1 << 20)
    assert len(sizes) < 200
    assert all(after <= 1.063 * before for before, after in itertools.pairwise(sizes) if before >= 1024)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "misbehave",
    [
        pytest.param(lambda x: x * x.sum().item(), id="reads the device"),
        pytest.param(lambda x: x[x > 0], id="shape depends on data"),
    ],
)
def test_a_step_that_no_graph_can_hold_is_named_and_the_next_one_captured(
    device: str, misbehave: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    x = torch.ones(4, device=device)
    with pytest.raises(CaptureError):
        GraphRunner(lambda bucket: (misbehave(x[:bucket]),), [4], [x], x.device).capture()
    runner = GraphRunner(lambda bucket: (x[:bucket] + 1,), [4], [x], x.device)
    runner.capture()
    x.fill_(5)
    assert runner.replay(4)[0].tolist() == [6.0] * 4
    runner.close()


@pytest.mark.gpu
def test_what_torch_had_cached_is_not_taken_off_the_pools_bytes() -> None:
    it = Doubling("cuda:0")
    cached = torch.empty(256 << 20, dtype=torch.uint8, device="cuda:0")
    del cached
    runner = it.runner([8, 1])
    assert runner.capture().pool_bytes > 0
    runner.close()


@pytest.mark.gpu
def test_a_page_remapped_beneath_a_captured_graph_is_read() -> None:
    driver = open_driver("cuda:0")
    granularity = driver.granularity()
    reservation = Reservation(driver, granularity)
    pages = [Extent(driver, granularity) for _ in range(2)]
    window = tensor_at(reservation.base, granularity, driver.device)
    for value, page in ((3, pages[1]), (1, pages[0])):
        (mapping,) = reservation.map(0, [page])
        window.fill_(value)
        torch.cuda.synchronize()
        if page is pages[1]:
            mapping.close()
    runner = GraphRunner(lambda bucket: (window[:bucket].float() * 2,), [4], [window], torch.device("cuda:0"))
    runner.capture()
    seen = []
    for page in (pages[0], pages[1], pages[0]):
        mapping.close()
        (mapping,) = reservation.map(0, [page])
        seen.append(runner.replay(4)[0].tolist())
        torch.cuda.synchronize()
    mapping.close()
    assert seen == [[2.0] * 4, [6.0] * 4, [2.0] * 4]
    runner.close()
    for owner in (*pages, reservation):
        owner.close()
