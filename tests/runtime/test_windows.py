"""Sliding windows, eight-bit rows and latents through the engine: transformers' tokens, or a stated drift, in less
memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from sweep_families import tiny_config, tiny_model
from transformers import PreTrainedModel

from trtllm_vattn.attention.options import FP8
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.kv_dtype import KVScales
from trtllm_vattn.runtime.kv_scales import calibrated_scales
from trtllm_vattn.runtime.prefill import PromptChunk
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.swap_cost import SwapCost
from trtllm_vattn.vmm.host import HostDriver

W, LONGEST, NEW = 12, 96, 30
PROMPTS = ([3, 1, 4, 1, 5], [(n * 37 + 11) % 500 for n in range(40)], [9])


@pytest.fixture(scope="module")
def hybrid() -> PreTrainedModel:
    """Of two layers, one with a window."""
    fields = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": W}
    return tiny_model(tiny_config("gemma3_text", **fields))


@pytest.fixture(scope="module")
def expected(hybrid: PreTrainedModel) -> list[list[int]]:
    """Transformers' own tokens."""
    return [own_tokens(hybrid, prompt) for prompt in PROMPTS]


@torch.inference_mode()
def own_tokens(model: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def engine_over(model: PreTrainedModel, budget: int | None = None, slots: int = 4, **options: object) -> Engine:
    model = copy.deepcopy(model)
    host_memory = options.pop("host_memory", 0)
    cache = make_cache("vattn", shape_of(model, slots, LONGEST), "cpu", budget, lookahead=0, host_memory=host_memory)
    return Engine(model, cache, compile=False, **options)  # type: ignore[arg-type]


def run(engine: Engine, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[list[int]]:
    done = engine.generate([list(prompt) for prompt in prompts], SamplingParams(max_tokens=NEW))
    return [each.tokens for each in done]


def test_captured_passes_slide_and_are_captured_once(hybrid: PreTrainedModel, expected: list[list[int]]) -> None:
    with engine_over(hybrid, attention="shares", chunk=16, steps=3) as engine:
        assert run(engine, [PROMPTS[2]]) == [expected[2]]
        graphs = [set(engine.decode.runner.captured), set(engine.passes.graphs.runner.captured)]  # type: ignore[union-attr]
        assert run(engine) == expected
        assert [set(engine.decode.runner.captured), set(engine.passes.graphs.runner.captured)] == graphs  # type: ignore[union-attr]
        assert "1 of 2 layers keep a window" in engine.startup.attention


def test_a_window_takes_the_memory_of_a_window(hybrid: PreTrainedModel) -> None:
    shape = shape_of(hybrid, 2, LONGEST)
    assert shape.windows == (W, None)
    driver = HostDriver()
    with KVCacheManager(shape, driver, 1 << 22, lookahead=0) as cache:
        cache.admit(0, LONGEST)
        page = driver.granularity()
        assert cache.stats().mapped_bytes <= (W + LONGEST) * shape.layer_token_bytes + 2 * page
    driver.close()


def test_prefixes_under_windows_give_the_same_tokens(hybrid: PreTrainedModel, expected: list[list[int]]) -> None:
    with engine_over(hybrid, slots=8, max_running=3, capture=False) as engine:
        assert engine.generate([PROMPTS[1][:9]], SamplingParams(max_tokens=2))[0].cached_tokens == 0
        (short,) = engine.generate([list(PROMPTS[1])], SamplingParams(max_tokens=NEW))
        # What is kept of nine tokens is within the window; of the longer sequence, which went on, nothing is.
        assert (short.tokens, short.cached_tokens) == (expected[1], 0)
        (again,) = engine.generate([list(PROMPTS[1])], SamplingParams(max_tokens=NEW))
        assert (again.tokens, again.cached_tokens) == (expected[1], 0)
        assert run(engine) == expected
        engine.cache.check_integrity()


def test_branches_of_a_prompt_have_windows_of_their_own(hybrid: PreTrainedModel) -> None:
    params = SamplingParams(max_tokens=20, n=3, temperature=1.0, seed=7)
    with engine_over(hybrid, slots=8, max_running=4, capture=False) as engine:
        shared = sorted(each.tokens for each in engine.generate([list(PROMPTS[1])], params))
    with engine_over(hybrid, prefix_cache=False, capture=False) as engine:
        assert sorted(each.tokens for each in engine.generate([list(PROMPTS[1])], params)) == shared
    assert len({tuple(tokens) for tokens in shared}) == 3


def test_who_is_preempted_or_suspended_goes_on_right(hybrid: PreTrainedModel, expected: list[list[int]]) -> None:
    page = 4096
    with engine_over(hybrid, 9 * page, host_memory=64 * page, capture=False, swap_cost=SwapCost(0.0, 1e9)) as engine:
        assert run(engine) == expected
    with engine_over(hybrid, host_memory=64 * page, capture=False) as engine:
        first = engine.submit(list(PROMPTS[1]), SamplingParams(max_tokens=NEW))
        tokens: list[int] = []
        for number in range(200):
            tokens += [event.token for event in engine.step() if event.token is not None]
            if number == 5:
                engine.suspend(first)
                engine.resume(first)
        assert tokens == expected[1]


# -- eight bits ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    return tiny_model(tiny_config("llama", num_hidden_layers=2))


@pytest.fixture(scope="module")
def scales(plain: PreTrainedModel) -> KVScales:
    return calibrated_scales(copy.deepcopy(plain), PROMPTS)


def logits_of(model: PreTrainedModel, dtype: str, scales: KVScales | None = None) -> torch.Tensor:
    """Of a prompt in two chunks, so that the second one reads what was stored."""
    model = copy.deepcopy(model)
    with (
        make_cache("vattn", shape_of(model, 2, LONGEST, dtype), "cpu") as cache,
        Engine(model, cache, compile=False, capture=False, kv_scales=scales, prefix_cache=False) as engine,
    ):
        slot = cache.admit(0, 40)
        with torch.inference_mode():
            engine.prefill.run([PromptChunk(slot, PROMPTS[1][:30], 0)])
            return engine.prefill.run([PromptChunk(slot, PROMPTS[1][30:], 30)])[0].clone()


def test_rows_of_eight_bits_are_a_quarter_of_float32_and_drift_little(plain: PreTrainedModel, scales: KVScales) -> None:
    exact = logits_of(plain, "auto")

    def drift(given: KVScales | None) -> float:
        return float((logits_of(plain, "fp8", given) - exact).norm() / exact.norm())

    assert shape_of(plain, 2, LONGEST, "fp8").token_bytes * 4 == shape_of(plain, 2, LONGEST).token_bytes
    # e4m3 rounds by 2**-4 at most; this random model's sharp attention makes 11 % of logits' length of that. Scales far
    # too small cut keys and values off.
    found = drift(scales)
    assert 0.01 < found < 0.2
    assert found < 1.2 * drift(None)
    assert drift(KVScales(scales.k / 100, scales.v / 100)) > 0.5


def test_scales_are_what_was_seen(plain: PreTrainedModel, scales: KVScales) -> None:
    assert scales.k.shape == scales.v.shape == (2, 2)
    whole = calibrated_scales(copy.deepcopy(plain), PROMPTS, per_head=False)
    assert torch.equal(whole.k, scales.k.amax(dim=1, keepdim=True))
    with pytest.raises(ConfigError, match="0 prompts gave no keys of layers"):
        calibrated_scales(copy.deepcopy(plain), [])


def test_eight_bits_under_windows(hybrid: PreTrainedModel) -> None:
    """The same rows whether they are kept in a window or all, so the same tokens."""
    found = []
    for windows in (True, False):
        model = copy.deepcopy(hybrid)
        shape = shape_of(model, 4, LONGEST, "fp8")
        cache = make_cache("vattn", shape if windows else replace(shape, windows=()), "cpu")
        with Engine(model, cache, compile=False, capture=False) as engine:
            found.append(run(engine))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("dtype", "given", "why"),
    [
        ("fp9", None, "kv_cache_dtype is 'fp9'; give one of auto, fp8, fp8_e4m3"),
        ("auto", KVScales(torch.ones(2, 1), torch.ones(2, 1)), "this one is torch.float32; leave them out"),
        ("fp8", KVScales(torch.ones(3, 1), torch.ones(2, 1)), r"kv_scales.k is \[3, 1\]; give finite numbers above 0"),
        ("fp8", KVScales(torch.ones(2, 2), torch.zeros(2, 2)), "give finite numbers above 0"),
        ("fp8", [1.0], "give KVScales"),
    ],
)
def test_settings_of_eight_bits_are_checked(plain: PreTrainedModel, dtype: str, given: object, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        logits_of(plain, dtype, given)  # type: ignore[arg-type]


def test_a_named_shape_takes_the_setting() -> None:
    with Engine.from_pretrained(
        "tiny-llama", device="cpu", max_seqs=2, max_seq_len=64, kv_cache_dtype="fp8", capture=False, compile=False
    ) as engine:
        assert engine.cache.shape.dtype == FP8
        assert engine.generate([[1, 2, 3]], SamplingParams(max_tokens=3))[0].finish_reason == "length"


# -- latents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["auto", "latents"])
def test_latents_take_one_row_a_token(attention: str) -> None:
    model = tiny_model(tiny_config("deepseek_v3", num_hidden_layers=2))
    shape = shape_of(model, 2, LONGEST)
    assert (shape.num_kv_heads, shape.head_dim, shape.kv_factor) == (1, 16 + 8, 1)
    assert shape.token_bytes == 2 * 24 * 4
    cache = KVCacheManager(shape, driver := HostDriver(), 1 << 20, config=CacheConfig())
    capture = attention == "latents"
    with Engine(copy.deepcopy(model), cache, compile=False, attention=attention, capture=capture) as engine:
        assert run(engine, PROMPTS[:1]) == [own_tokens(model, PROMPTS[0])]
        done = engine.generate([list(PROMPTS[1])] * 2, SamplingParams(max_tokens=2))
        assert done[1].cached_tokens or done[0].tokens == done[1].tokens
    driver.close()
