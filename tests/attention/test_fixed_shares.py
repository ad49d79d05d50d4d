"""Decode by fixed shares: bits of a lane that hang on nothing else, and what deterministic engines decode by."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from probing import probe, probe_on_card

from trtllm_vattn.attention import cudnn, picked, prompts, select
from trtllm_vattn.attention.cudnn import CudnnAttention
from trtllm_vattn.attention.options import FP8, Feature, LayerOptions, PrefixTables
from trtllm_vattn.attention.picked import PickedAttention
from trtllm_vattn.attention.prompts import PromptKernel
from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.attention.shares import HEAD_SIZES, FixedSharesAttention, SharesAttention
from trtllm_vattn.attention.shares_launch import (
    LEAST_PIECE,
    MOST_PIECES,
    MOST_PIECES_BYTES,
    Pieces,
    Rows,
    Workspace,
)
from trtllm_vattn.cache.base import CacheShape, FlatKV
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError

PROBE = Path(__file__).with_name("fixed_shares_probe.py")
SHAPE = CacheShape(1, 2, 64, torch.float32, 2, 32)


def test_bits_of_a_lane_are_the_same_in_any_batch_in_the_interpreter() -> None:
    probe(PROBE, "cpu", "launches", interpreted=True)


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["hopper", "plain"])
@pytest.mark.parametrize("case", ["launches", "captured"])
def test_bits_of_a_lane_are_the_same_in_any_batch_on_the_card(case: str, path: str) -> None:
    probe_on_card(PROBE, case, path)


def test_pieces_and_their_memory_are_bounded_by_the_caches_shape() -> None:
    for head_dim in HEAD_SIZES:
        for group, kv_heads, lanes in ((1, 32, 256), (4, 8, 1), (4, 8, 128), (8, 8, 1024), (71, 1, 64)):
            for longest in (1, 512, 513, 8192, 131072, 1 << 20):
                rows = Rows.of(group, 1, head_dim)
                pieces = Pieces.of(longest, lanes, kv_heads, rows, head_dim)
                assert pieces.tokens * pieces.most >= longest
                assert pieces.most <= MOST_PIECES
                assert pieces.tokens % 128 == 0
                made = Workspace(torch.device("meta"), 7, lanes, kv_heads, rows, head_dim, pieces)
                floats = sum(each.numel() for each in (made.tops, made.totals, made.outs))
                assert 4 * floats <= MOST_PIECES_BYTES
                parts, each = pieces.parts(lanes, kv_heads, rows)
                assert made.outs.shape[:2] == (parts, each)
    assert Pieces.of(8192, 128, 8, Rows.of(4, 1, 128), 128) == Pieces(LEAST_PIECE, 16)
    assert Pieces.of(131072, 1, 8, Rows.of(4, 1, 128), 128) == Pieces(4096, 32)


def test_what_the_kernel_does_not_compute_is_refused_by_name() -> None:
    with make_cache("vattn", SHAPE, "cpu") as cache:
        attention = FixedSharesAttention(cache, 4)
        assert attention.batch_invariant
        with pytest.raises(ConfigError, match="the fixed-shares backend cannot serve a window;"):
            attention.set_options([LayerOptions(window=8)])
        with pytest.raises(ConfigError, match=r"the fixed-shares backend cannot serve .*a soft cap"):
            attention.set_options([LayerOptions(softcap=5.0)])
        with pytest.raises(ConfigError, match=r"the fixed-shares backend cannot serve .*another slot"):
            attention.set_prefixes(PrefixTables.empty(2, 2, cache.device))
        with pytest.raises(ConfigError, match=r"2 lanes of 2 queries; there may be 2 lanes, .* of 1 to 1 queries"):
            attention.decode_queries(0, torch.randn(2, 2, 4, 64), None, torch.ones(2, dtype=torch.int32))
    eight_bits = CacheShape(1, 2, 64, FP8, 2, 32)
    with (
        make_cache("vattn", eight_bits, "cpu") as cache,
        pytest.raises(ConfigError, match=r"fixed-shares .* fp8 rows"),
    ):
        FixedSharesAttention(cache, 4)


def test_only_fixed_shares_say_that_a_lane_depends_on_no_other() -> None:
    assert FixedSharesAttention.batch_invariant
    assert not SharesAttention.batch_invariant
    assert not CudnnAttention.batch_invariant


class Chosen:
    """A backend that says how it was made."""

    name = "chosen"
    most_queries = 1
    features: frozenset[Feature] = frozenset()

    def __init__(self, *given: object, **options: object) -> None:
        self.given, self.options = given, options


@pytest.mark.parametrize("of_cudnn", ["yes", "nvidia-cudnn-frontend is not installed"])
def test_deterministic_engines_have_fixed_shares_on_a_gpu(monkeypatch: pytest.MonkeyPatch, of_cudnn: str) -> None:
    for name in ("SharesAttention", "FixedSharesAttention", "CudnnAttention"):
        monkeypatch.setattr(picked, name, type(name, (Chosen,), {"name": name, "features": frozenset()}))
    x = torch.empty(2, 8, 2, 64, dtype=torch.bfloat16)
    shape = CacheShape(1, 2, 64, torch.bfloat16, 2, 8)
    cache: Any = SimpleNamespace(
        device=torch.device("cuda:0"), shape=shape, length_deficits=None, head_groups=lambda layer: [FlatKV(x, x)]
    )
    backend: Any = SimpleNamespace(
        cache=cache, num_heads=4, scale=1.0, prompts="prompts", _needed_by_cache=lambda: set()
    )
    kernels = PickedAttention._usual(backend, True)
    assert [*kernels] == ["FixedSharesAttention"]
    assert kernels["FixedSharesAttention"].given == (cache, 4, 1.0, "prompts")  # type: ignore[attr-defined]
    assert [*PickedAttention._usual(backend, False)] == ["CudnnAttention", "shares"]
    monkeypatch.setattr(select, "availability", lambda: "yes")
    monkeypatch.setattr(cudnn, "availability", lambda: of_cudnn)
    monkeypatch.setattr(select, "PickedAttention", Chosen)
    made: Any = make_attention("auto", cache, 4, deterministic=True)
    assert (made.given, made.options) == ((cache, 4, None), {"deterministic": True})


def test_deterministic_engines_have_torch_where_fixed_shares_do_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "default_attention", Chosen)
    with make_cache("vattn", SHAPE, "cpu") as cache:
        assert make_attention("auto", cache, 4).name == "chosen"
        assert make_attention("auto", cache, 4, deterministic=True).name == "torch"


@pytest.mark.parametrize("fixed", [True, False])
def test_prompts_of_deterministic_engines_are_divided_for_a_fixed_number_of_programs(
    monkeypatch: pytest.MonkeyPatch, fixed: bool
) -> None:
    """The first launch finds out how many run at once, by which the others' keys are divided."""
    card = SimpleNamespace(multi_processor_count=10, shared_memory_per_multiprocessor=228 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    planned: list[int] = []

    def plan(
        descriptors: object, rows: int, keep: int, heads: int, kv_heads: int, settings: Any, programs: int, *_: Any
    ) -> Any:
        planned.append(programs)
        return SimpleNamespace(settings=settings)

    kernel = SimpleNamespace(n_regs=255, metadata=SimpleNamespace(num_warps=8, shared=200 << 10))
    monkeypatch.setattr(prompts, "plan", plan)
    monkeypatch.setattr(prompts, "attend", lambda *_: kernel)
    with make_cache("vattn", CacheShape(1, 2, 128, torch.bfloat16, 2, 32), "cpu") as cache:
        made = PromptKernel(cache, 4, 0.125, fixed)
        # On Hopper two are expected.
        made._hopper = True
        for _ in range(2):
            q = torch.empty(32, 4, 128)
            made.attend(0, q, q, made.plan(torch.zeros(1, 4), 32, 0))
    assert planned == ([20, 20] if fixed else [20, 10])
