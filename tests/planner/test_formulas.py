"""The formulas against the code that they describe, and against themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from trtllm_vattn.bench.cases.fragmentation import ModelledTiming, make, simulate
from trtllm_vattn.bench.cases.ledger import LedgerDriver
from trtllm_vattn.bench.harness.traces import Request
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.memory import lookahead, pool
from trtllm_vattn.planner import CostModel, Layout, Lengths, Load, ModelShape, memory
from trtllm_vattn.planner.calibration import Curve, named
from trtllm_vattn.runtime.models import SHAPES

PAGE = 2 << 20
LLAMA = ModelShape.from_config("llama-3-8b", SHAPES["llama-3-8b"])


@pytest.fixture(scope="module")
def model() -> CostModel:
    return CostModel(LLAMA, named("h200"))


def test_a_shape_has_the_bytes_of_the_model() -> None:
    # Parameters, less the table of embeddings, which no step reads, and the norms, which count for nothing.
    assert LLAMA.weight_bytes == 2 * (8_030_261_248 - 128_256 * 4096 - 65 * 4096)
    assert LLAMA.token_bytes == 131_072
    small = ModelShape.from_config("llama-3.2-1b", SHAPES["llama-3.2-1b"])
    assert (small.head_dim, small.layer_token_bytes) == (64, 2048)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_local_experts", 8, "mixture of experts"),
        ("kv_lora_rank", 512, "latent attention"),
        ("sliding_window", 4096, "a window of 4096 tokens"),
        ("num_hidden_layers", 0, "num_hidden_layers of x is 0"),
    ],
)
def test_models_that_no_plan_is_made_for_are_refused(key: str, value: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ModelShape.from_config("x", {**SHAPES["llama-3-8b"], key: value})


def test_defaults_are_those_of_the_code() -> None:
    assert memory.CLASSES == pool.CLASSES
    assert (memory.LEAST_AHEAD, memory.SAFETY) == (lookahead.LEAST, lookahead.SAFETY)


@pytest.mark.parametrize(("layers", "heads", "classes"), [(1, None, 8), (16, None, 8), (32, None, 3), (16, 2, 8)])
def test_bytes_and_handles_are_those_that_a_cache_maps(layers: int, heads: int | None, classes: int) -> None:
    layout = Layout(LLAMA, PAGE, layers, heads, classes)
    shape = CacheShape(32, 8, 128, torch.bfloat16, 4, 8192)
    config = CacheConfig(layers_per_range=layers, heads_per_range=heads, extent_classes=classes)
    prompts = np.array([1, 777, 2048, 5000])
    with KVCacheManager(shape, LedgerDriver(), 1 << 40, config=config) as cache:
        assert (layout.num_ranges, layout.row_bytes) == (cache.layout.num_ranges, cache.layout.row_bytes)
        assert layout.dummy_bytes == cache.layout.least_bytes
        for number, tokens in enumerate(prompts.tolist()):
            before = cache.stats()
            cache.admit(number, tokens)
            after = cache.stats()
            assert after.mapped_bytes - before.mapped_bytes == layout.needed_bytes(tokens)
            assert after.admission_maps - before.admission_maps == layout.handles(np.array([tokens]))[0]


def exact_mean(layout: Layout, lengths: Lengths, ahead: float) -> float:
    """Bytes mapped, mean over all steps, counted one by one."""
    found = [
        float(layout.needed_bytes(tokens + ahead))
        for prompt, output in zip(lengths.prompts.tolist(), lengths.outputs.tolist(), strict=True)
        for tokens in range(prompt + 1, prompt + output + 1)
    ]
    return float(np.mean(found))


def test_means_are_those_over_all_steps() -> None:
    layout = Layout(LLAMA, PAGE, 16)
    lengths = Lengths.of([5, 300, 31], [40, 7, 2])
    assert layout.mean_bytes(lengths, 3.0)[0] == pytest.approx(exact_mean(layout, lengths, 3.0))
    tokens = [n for p, o in ((5, 40), (300, 7), (31, 2)) for n in range(p + 1, p + o + 1)]
    assert lengths.mean_tokens == pytest.approx(np.mean(tokens))
    assert lengths.spread == pytest.approx(np.std(tokens))
    waste = 1 - np.mean(tokens) * LLAMA.token_bytes / exact_mean(layout, lengths, 3.0)
    assert layout.waste(lengths, 3.0) == pytest.approx(waste)


def test_waste_and_capacity_are_those_of_the_cache_in_virtual_time() -> None:
    """The cache's own code over a driver without memory: waste within a point, capacity within 2 %."""
    random = np.random.default_rng(5)
    prompts = np.minimum(np.maximum(1, random.lognormal(np.log(1469), 0.8, 1000)), 8000).astype(int)
    outputs = np.maximum(1, random.lognormal(np.log(28), 0.6, 1000)).astype(int)
    requests = [Request(0.0, int(p), int(o)) for p, o in zip(prompts, outputs, strict=True)]
    lengths, budget = Lengths.of(prompts, outputs), 5 << 30
    shape = CacheShape(32, 8, 128, torch.bfloat16, 40, 16384)
    layout = Layout(LLAMA, PAGE, 16)
    timing = ModelledTiming(shape.token_bytes)
    with make(CacheConfig(layers_per_range=16), shape, budget, timing) as cache:
        found = simulate(cache, requests, timing)
    assert found["kept_waiting_by_memory"]
    ahead = layout.ahead_tokens(timing.step_s, timing.mapping_s)
    assert layout.waste(lengths, ahead) == pytest.approx(found["waste_with_surplus"], abs=0.01)
    assert layout.capacity(lengths, ahead, budget) == pytest.approx(found["mean_sequences"], rel=0.02)


def test_lookahead_costs_memory_and_none_costs_steps(model: CostModel) -> None:
    lengths = Lengths.of([1000, 3000], [500, 500])
    automatic, none, far = (Layout(LLAMA, PAGE, 16, None, 8, each) for each in (None, 0, 256))
    wastes = [each.waste(lengths, each.ahead_tokens(8e-3, model.page_s())) for each in (none, automatic, far)]
    assert wastes == sorted(wastes)
    assert wastes[0] < wastes[2] / 3
    steps = [model.step_s(each, 64, 64 * 2000) for each in (automatic, none)]
    assert steps[0] < steps[1]
    assert model.parts(none, Load(64, 64 * 2000)).mapping > 0 == model.parts(automatic, Load(64, 64 * 2000)).mapping


def test_a_step_is_bound_by_what_takes_longest(model: CostModel) -> None:
    layout = Layout(LLAMA, PAGE, 16)
    assert model.parts(layout, Load(32, 32 * 2048)).binds == "bandwidth"
    tiny = CostModel(replace(LLAMA, num_layers=1, weight_bytes=1 << 20), model.card)
    assert tiny.parts(Layout(tiny.shape, PAGE, 1), Load(32, 32 * 20)).binds == "host"
    # Pages of a few tokens and short steps: mapping ahead cannot keep up.
    slow = replace(model.card, numbers={**model.card.numbers, "page_beside_us": 20_000.0})
    assert CostModel(LLAMA, slow).parts(layout, Load(64, 64 * 200)).binds == "driver calls"
    # A token a page, read by tiles of a head: each read misses.
    many = ModelShape("many small heads", 512, 64, 64, 16, 1 << 30)
    pages = CostModel(many, model.card)
    assert pages.parts(Layout(many, PAGE, 512), Load(8, 60_000)).binds == "TLB"
    assert pages.parts(Layout(many, PAGE, 8), Load(8, 60_000)).binds == "bandwidth"


def test_random_reads_miss_beyond_the_reach_alone(model: CostModel) -> None:
    reach = model.card["tlb_reach_bytes"]
    plain = 1e9 / model.card["read_bytes_per_s"]
    assert model.random_read_s(1e9, 512, 0.9 * reach, scattered=True) == plain
    assert model.random_read_s(1e9, 512, 1.8 * reach, scattered=True) > 1.5 * plain
    assert model.random_read_s(1e9, 4096, 1.8 * reach, scattered=True) == plain


def test_curves_between_and_beyond_their_points() -> None:
    curve = Curve(((2.0, 10.0), (8.0, 30.0)))
    assert [curve(x) for x in (1, 2, 4, 8, 99)] == [10, 10, 20, 30, 30]
    assert [curve.in_proportion(x) for x in (1, 5, 8, 16)] == [10, 20, 30, 60]
    assert curve.in_proportion(16, inverse=True) == 15


@pytest.mark.parametrize(
    ("prompts", "outputs", "said"),
    [
        ([], [], "give whole numbers, one at least"),
        ([1.5], [1], "give whole numbers"),
        ([1, 2], [1], "give one output for each prompt"),
        ([0], [1], "each has from 1"),
        ([1 << 25], [1], "each has from 1"),
    ],
)
def test_lengths_are_checked(prompts: list[float], outputs: list[int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Lengths.of(prompts, outputs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({"layers_per_range": 5}, "must divide the 32 layers"),
        ({"layers_per_range": 4, "heads_per_range": 3}, "must divide the 8 KV heads"),
        ({"layers_per_range": 4, "lookahead": -1}, "lookahead is -1"),
        ({"layers_per_range": 4, "extent_classes": 0}, "extent_classes is 0"),
    ],
)
def test_layouts_are_checked(layout: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Layout(LLAMA, PAGE, **layout)


def test_reading_by_many_sequences_takes_longer_by_its_factor(model: CostModel) -> None:
    layout, card = Layout(LLAMA, PAGE, 16), model.card
    curves = {**card.curves, "attention_batch_factor": Curve(((32.0, 1.0), (128.0, 0.8)))}
    slower = CostModel(LLAMA, replace(card, curves=curves))
    for sequences, factor in ((8, 1.0), (32, 1.0), (64, 0.9), (128, 0.8), (256, 0.8)):
        before, then = (each.attention_s(layout, 200_000, sequences)[0] for each in (model, slower))
        launches = 1e-6 * 32 * card["attention_us"]
        assert then - launches == pytest.approx((before - launches) / factor)
