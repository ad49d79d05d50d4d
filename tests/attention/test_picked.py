"""Costs of kernels by lengths, and the kernel that is picked by them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from trtllm_vattn.attention.cost import Cost, CostFile, Load, calibration_lengths, cheapest
from trtllm_vattn.attention.picked import PickedAttention
from trtllm_vattn.attention.reference import TorchAttention
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError

EVEN = Cost(fixed=8.0, per_token=0.00093, per_sequence=0.05, skew=16.0)
"""Fast where sequences are equal, slow where one is long."""
SHARES = Cost(fixed=9.0, per_token=0.00096, per_sequence=0.05, skew=0.0)


def test_a_cost_is_found_again_from_what_it_makes_of_the_calibration() -> None:
    for lanes in (4, 64, 256):
        batches = calibration_lengths(np.full(lanes, 8192))
        for cost in (SHARES, Cost(8.0, 0.00093, 0.05, float(np.geomspace(1, lanes, 16)[9]))):
            loads = [Load.of(batch) for batch in batches]
            fitted = Cost.fitted(loads, [cost.of(load) for load in loads], lanes)
            for lengths in (np.full(lanes, 3000), np.where(np.arange(lanes) == 1, 8000, 100)):
                load = Load.of(lengths)
                assert fitted.of(load) == pytest.approx(cost.of(load), rel=1e-3)


def test_even_batches_and_uneven_ones_get_different_kernels() -> None:
    costs = {"even": EVEN, "shares": SHARES}
    assert cheapest(costs, np.full(64, 2048)) == "even"
    assert cheapest(costs, np.where(np.arange(64) < 6, 8000, 200)) == "shares"
    assert cheapest({"a": EVEN, "b": EVEN}, np.zeros(4, np.int64)) == "a"


def test_calibration_asks_for_no_more_than_is_backed() -> None:
    backed = np.array([900, 40, 40, 3, 1])
    batches = calibration_lengths(backed)
    assert all((batch <= backed).all() and batch.any() for batch in batches)
    assert len({Load.of(batch) for batch in batches}) > 6


def test_costs_are_remembered_and_what_cannot_be_read_is_measured_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = CostFile(tmp_path / "cache" / "costs.json")
    assert file.get("H200") is None
    file.put("H200", {"shares": SHARES})
    file.put("H100", {"shares": EVEN})
    assert CostFile(file.path).get("H200") == {"shares": SHARES}
    assert [path.name for path in file.path.parent.iterdir()] == ["costs.json"]
    for broken in ("[1, 2", "[]", '{"H200": {"shares": {"fixed": 1}}}', '{"H200": 3}'):
        file.path.write_text(broken)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert file.get("H200") is None
        assert "measured again" in caplog.text
    file.path.write_text("[1, 2")
    file.put("H200", {"shares": SHARES})
    assert file.get("H200") == {"shares": SHARES}


def test_a_place_that_cannot_be_written_costs_only_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "costs").write_text("a file where a folder should be")
    with caplog.at_level(logging.WARNING):
        CostFile(tmp_path / "costs" / "costs.json").put("H200", {"shares": SHARES})
    assert "not stored" in caplog.text


@pytest.fixture
def cache():  # type: ignore[no-untyped-def]
    with make_cache("vattn", CacheShape(2, 1, 64, torch.float32, 4, 64), "cpu") as made:
        for lane in range(4):
            made.admit(lane, 64)
            for layer in (0, 1):
                kv = made.layer(layer)
                kv.k[lane, :64].normal_()
                kv.v[lane, :64].normal_()
        yield made


class Clock:
    """Says what `costs` would of the batch that was run last, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, work) -> float:  # type: ignore[no-untyped-def]
        kernel, lengths = work.__defaults__
        self.asked += 1
        work()
        cost = SHARES if kernel.name == "shares" else Cost(8.0, 0.0006, 0.05, 4.0)
        return 2 * cost.of(Load.of(lengths.numpy()))


def test_the_kernel_is_picked_by_what_was_measured_once(cache, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    attention, clock, file = PickedAttention(cache, 2), Clock(), CostFile(tmp_path / "costs.json")
    uneven = np.array([60000, 1, 1, 1])
    assert attention.pick(uneven) == "torch", "nothing was measured yet"
    attention.learn(np.full(4, 64), clock, file=file, card="host")
    asked = clock.asked
    assert asked == 2 * len(calibration_lengths(np.full(4, 64)))
    assert attention.pick(uneven) == "shares"
    assert attention.pick(np.full(4, 60000)) == "torch"
    assert attention.pick(uneven, anywhere=True) == attention.pick(uneven[:2]) == "torch"
    assert attention.pick(uneven[:3]) == "shares", "three lanes cost what the next power of two does"
    again = PickedAttention(cache, 2)
    again.learn(np.full(4, 64), clock, file=file, card="host")
    assert clock.asked == asked, "measured again though it was remembered"
    assert again.pick(uneven) == "shares"
    again.learn(np.full(4, 64), clock, file=file, card="another")
    assert clock.asked == 2 * asked


def test_every_kernel_gives_the_same_and_only_one_is_in_use(cache) -> None:  # type: ignore[no-untyped-def]
    attention = PickedAttention(cache, 2)
    q, lengths = torch.randn(4, 2, 64), torch.tensor([64, 3, 0, 17], dtype=torch.int32)
    outputs = []
    for kernel in attention.kernels:
        attention.use(kernel)
        outputs.append(attention.decode(1, q, lengths))
    torch.testing.assert_close(*outputs)
    assert list(attention.kernels) == ["torch", "shares"]
    with pytest.raises(ConfigError, match="no kernel 'flash' to pick from; there are torch, shares"):
        attention.use("flash")


def test_deterministic_keeps_one_kernel(cache) -> None:  # type: ignore[no-untyped-def]
    attention = PickedAttention(cache, 2, deterministic=True)
    assert list(attention.kernels) == ["torch"]
    attention.learn(np.full(4, 64), Clock())
    assert attention.pick(np.array([60000, 1, 1, 1])) == "torch"


def test_every_kernel_is_told_that_a_step_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    monkeypatch.setattr(TorchAttention, "begin_step", lambda self: begun.append(self.name))
    with make_cache("vattn", CacheShape(1, 2, 64, torch.float32, 2, 32), "cpu") as cache:
        PickedAttention(cache, 4, kernels={name: TorchAttention(cache, 4) for name in ("a", "b")}).begin_step()
    assert begun == ["torch", "torch"]
