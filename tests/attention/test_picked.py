"""Costs of kernels by lengths, and the kernel that is picked by them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from ties import by_request

from trtllm_vattn.attention import picked as picked_module
from trtllm_vattn.attention import trust
from trtllm_vattn.attention.base import Attention
from trtllm_vattn.attention.cost import Cost, CostFile, Load, calibration_lengths, cheapest
from trtllm_vattn.attention.picked import PickedAttention, measured_lanes
from trtllm_vattn.attention.prompts import PromptKernel
from trtllm_vattn.attention.reference import TorchAttention
from trtllm_vattn.attention.select import available, make_attention
from trtllm_vattn.cache.base import CacheShape, KVCache
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime import engine as engine_module
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.sampling import SamplingParams

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
    begun: list[Attention] = []
    monkeypatch.setattr(TorchAttention, "begin_step", lambda self: begun.append(self))
    with make_cache("vattn", CacheShape(1, 2, 64, torch.float32, 2, 32), "cpu") as cache:
        kernels = {name: TorchAttention(cache, 4) for name in ("a", "b")}
        PickedAttention(cache, 4, kernels=kernels).begin_step()
    # The reference that prompts go through on the host is told, too.
    assert [kernel for kernel in begun if kernel in kernels.values()] == list(kernels.values())
    assert len(begun) == 3


def generated(monkeypatch: pytest.MonkeyPatch, kernels: bool, **options: object) -> tuple[list[list[int]], set[str]]:
    """Tokens of some prompts, by prompt, and the kernels that steps were captured by; with `kernels` a long sequence
    picks another one than short sequences."""
    model = load_model("tiny-llama", "cpu", torch.float32)
    prompts = [np.random.default_rng(n).integers(0, model.config.vocab_size, n).tolist() for n in (3, 40, 1, 16, 5)]

    def make(
        name: str, cache: KVCache, heads: int, scale: float | None, deterministic: bool, **more: object
    ) -> Attention:
        made = PickedAttention(cache, heads, scale, deterministic=deterministic)
        by_longest = lambda lengths, *others: "shares" if lengths.max() > 30 else "torch"  # noqa: E731
        if not deterministic:
            monkeypatch.setattr(made, "pick", by_longest)
        return made

    if kernels:
        monkeypatch.setattr(engine_module, "make_attention", make)
    cache = make_cache("vattn", shape_of(model, 3, 128), "cpu")
    with Engine(model, cache, compile=False, **options) as engine:  # type: ignore[arg-type]
        params = [SamplingParams(max_tokens=12, temperature=n % 2, seed=n) for n in range(len(prompts))]
        numbers = [engine.submit(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        events = list(engine.run())
        engine.decode.audit().raise_if_foreign()
        used = {variant for (variant, _), runner in engine.decode._runners.items() if runner.captured}
        assert engine.startup.attention == engine.attention.describe()
    return [[event.token for event in each] for each in by_request(events, numbers)], used


@pytest.mark.parametrize("options", [{}, {"steps": 4}, {"steps": 4, "loop": True}, {"packed": True}])
def test_each_step_is_captured_for_the_kernels_that_are_picked(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    expected, alone = generated(monkeypatch, False, **options)
    tokens, used = generated(monkeypatch, True, **options)
    assert tokens == expected
    assert (alone, used) == ({"torch"}, {"torch", "shares"})


def test_an_engine_that_is_deterministic_captures_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    _, used = generated(monkeypatch, True, deterministic=True)
    assert used == {"torch"}
    assert PickedAttention.captures_prompts


def test_kernels_are_described(cache) -> None:  # type: ignore[no-untyped-def]
    assert PickedAttention(cache, 2).describe() == "decode: torch or shares by lengths; prompts: torch"
    assert PickedAttention(cache, 2, deterministic=True).describe() == "decode: torch; prompts: torch"
    torch_backend = TorchAttention(cache, 2)
    assert (torch_backend.describe(), torch_backend.variants) == ("torch", ("torch",))
    assert torch_backend.pick(np.array([4, 4, 4, 4])) == "torch"
    torch_backend.use("torch")
    with pytest.raises(ConfigError, match="no kernel 'shares' to pick from; there are torch"):
        torch_backend.use("shares")


def test_costs_are_measured_for_powers_of_two() -> None:
    assert [measured_lanes(lanes, 100) for lanes in (1, 2, 3, 8, 9, 64, 65, 100)] == [1, 2, 4, 8, 16, 64, 100, 100]


@pytest.mark.gpu
def test_kernels_are_measured_once_on_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if any(available()[name] != "yes" for name in ("cudnn", "shares")):
        pytest.skip("cuDNN and Triton are needed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape = CacheShape(2, 8, 128, torch.bfloat16, 64, 8192)
    with make_cache("vattn", shape, "cuda:0") as cache:
        attention = make_attention("auto", cache, 32)
        assert isinstance(attention, PickedAttention)
        attention.measure([1, 48, 64])
        assert attention.pick(np.where(np.arange(64) < 6, 8000, 200)) == "shares"
        measured: list[int] = []
        again = make_attention("auto", cache, 32)
        monkeypatch.setattr(PickedAttention, "learn", lambda self, *_, **__: measured.append(1))
        again.measure([1, 48, 64])
        assert not measured
        assert again.describe() == attention.describe()


def test_a_start_that_knows_all_costs_asks_for_no_library_but_the_one_that_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def why_not(name: str, *_: object) -> str:
        asked.append(name)
        return "yes"

    class Known:
        """A file of costs that has all."""

        provider: object = None

        def get(self, key: str) -> dict[str, Cost]:
            return {name: SHARES for name in attention.kernels}

        def read(self, key: str) -> object:
            return self.provider

    class Serving:
        def __init__(self, *_: object) -> None: ...

    monkeypatch.setattr(picked_module, "card_and_versions", lambda: "a card")
    monkeypatch.setattr(trust, "why_not", why_not)
    monkeypatch.setitem(trust.PROVIDERS, "vllm-fa3", (Serving, lambda _: "yes", ()))
    with make_cache("vattn", CacheShape(1, 2, 64, torch.float32, 2, 64), "cpu") as cache:
        attention = PickedAttention(cache, 4)
        known = Known()
        known.provider = PromptKernel.name
        attention._measure_here([1, 2], False, known)  # type: ignore[arg-type]
        assert asked == []
        assert attention.host_planned is None
        known.provider = "vllm-fa3"
        attention._measure_here([1, 2], False, known)  # type: ignore[arg-type]
        assert asked == ["vllm-fa3"]
        assert isinstance(attention.host_planned, Serving)
