"""Engines that evict tokens: the tokens that a reference gives which attends to the kept ones only."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from sweep_families import tiny_config, tiny_model
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from trtllm_vattn.attention.options import FP8
from trtllm_vattn.cache.compression import H2O, CompressionPolicy, FastGen, HeadsView
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.speculation import Speculation
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.wrappers import FaultyDriver

LONGEST, NEW = 128, 10
PROMPTS = ([(n * 37 + 11) % 500 for n in range(60)], [(n * n * 7 + 3) % 500 for n in range(33)])


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    """Two layers, two KV heads of two query heads each."""
    model = tiny_model(tiny_config("llama", num_hidden_layers=2))
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            # Attention that is not nearly uniform.
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def whole(llama: PreTrainedModel) -> list[list[int]]:
    """Tokens of an engine that keeps everything."""
    return generated(engine_over(llama, None, config=CacheConfig()))


def engine_over(model: PreTrainedModel, policy: CompressionPolicy | None, **options: Any) -> Engine:
    driver = options.pop("driver", None) or HostDriver()
    dtype = options.pop("dtype", model.dtype)
    heads = 1 if policy is not None and policy.by_head else None
    config = CacheConfig(own_lengths=True, heads_per_range=heads, layers_per_range=1, lookahead=0, extent_classes=1)
    config = options.pop("config", config)
    shape = replace(shape_of(model, 2, LONGEST), dtype=dtype)
    cache = KVCacheManager(shape, driver, 1 << 24, config=config)
    options = {"capture": False, "buckets": [2], **options}
    return Engine(copy.deepcopy(model), cache, compile=False, compression=policy, **options)


def generated(engine: Engine, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[list[int]]:
    with engine:
        done = engine.generate(prompts, SamplingParams(NEW, ignore_eos=True))
        engine.cache.check_integrity()
        return [each.tokens for each in done]


@torch.inference_mode()
def reference(model: PreTrainedModel, prompt: Sequence[int], policy: CompressionPolicy) -> list[int]:
    """Llama's own modules, one token at a time behind the prompt, each head over the keys and values that it kept, by a
    policy that runs at the end of the prompt and again as it says."""
    layers, config = model.model.layers, model.config
    kv_heads, dim = config.num_key_value_heads, config.head_dim
    group = config.num_attention_heads // kv_heads
    ids, chosen, since = list(prompt), [], 0
    held: list[list[dict[str, Any]]] = [
        [{"k": [], "v": [], "at": [], "carried": torch.zeros(0), "notes": {}} for _ in range(kv_heads)] for _ in layers
    ]
    asked: list[list[torch.Tensor]] = [[] for _ in layers]
    for start, stop in [(0, len(prompt)), *((at, at + 1) for at in range(len(prompt), len(prompt) + NEW - 1))]:
        hidden = model.model.embed_tokens(torch.tensor([ids[start:stop]]))
        positions = torch.arange(start, stop)[None]
        rotary = model.model.rotary_emb(hidden, positions)
        for number, layer in enumerate(layers):
            x, attention = layer.input_layernorm(hidden), layer.self_attn
            q, k, v = (
                proj(x).view(1, stop - start, -1, dim).transpose(1, 2)
                for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, *rotary)
            asked[number] += q[0].transpose(0, 1)
            outs = []
            for head in range(kv_heads):
                own = held[number][head]
                own["k"] += k[0, head]
                own["v"] += v[0, head]
                own["at"] += range(start, stop)
                mine = q[0, head * group : (head + 1) * group]
                scores = mine @ torch.stack(own["k"]).T * dim**-0.5
                hidden_from = torch.tensor(own["at"]) > positions[0][:, None]
                weights = scores.masked_fill(hidden_from, float("-inf")).softmax(-1)
                outs.append(weights @ torch.stack(own["v"]))
            out = torch.cat(outs).transpose(0, 1).reshape(1, stop - start, -1)
            hidden = hidden + attention.o_proj(out)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        chosen.append(int(model.lm_head(model.model.norm(hidden))[0, -1].argmax()))
        if start == 0 or (policy.every is not None and stop - since >= policy.every):
            first = max(since, 0 if policy.queries is None else stop - policy.queries)
            for number, heads in enumerate(held):
                for head, own in enumerate(heads):
                    queries = torch.stack(asked[number][first:stop]).unflatten(1, (kv_heads, group))[:, head : head + 1]
                    at = torch.tensor(own["at"])
                    carried = torch.cat((own["carried"], torch.zeros(len(at) - len(own["carried"]))))
                    keys, values = (torch.stack(own[name])[:, None] for name in "kv")
                    view = HeadsView(
                        number, head, stop, len(prompt), keys, values, at[None], torch.tensor(ids)[at][None], queries,
                        dim**-0.5, carried[None], own["notes"],
                    )  # fmt: skip
                    (kept,) = policy.keep(view)
                    own.update({name: [own[name][place] for place in kept.tolist()] for name in ("k", "v", "at")})
                    own["carried"] = view.mass[0, kept]
            since = stop
        ids.append(chosen[-1])
    return chosen


POLICIES = {
    "h2o": lambda: H2O(0.15, 0.1),
    "h2o a layer, all queries, again": lambda: H2O([9, 4], [5, 2], every=1, queries=None),
    "h2o again": lambda: H2O(8, 4, every=4, queries=16),
    "fastgen": lambda: FastGen((11, 3), range(40, 80), threshold=0.8, frequent=0.2, local=0.2),
    "fastgen again": lambda: FastGen(
        (11, 3), range(40, 80), threshold=0.7, frequent=0.2, local=0.1, every=4, queries=None
    ),
}


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_are_those_of_a_reference_over_what_is_kept(llama: PreTrainedModel, name: str) -> None:
    engine = engine_over(llama, POLICIES[name](), capture="again" in name)
    expected = [reference(llama, prompt, POLICIES[name]()) for prompt in PROMPTS]
    assert generated(engine) == expected
    assert engine.compression is not None
    assert engine.compression.runs >= len(PROMPTS) * (1 if engine.compression.policy.every is None else 3)
    assert engine.compression.evicted_bytes > 0
    assert engine.compression.failed == 0


def test_without_eviction_tokens_are_the_models(llama: PreTrainedModel, whole: list[list[int]]) -> None:
    assert generated(engine_over(llama, H2O(LONGEST, LONGEST, every=3))) == whole
    # And what is evicted makes a difference.
    assert generated(engine_over(llama, H2O(2, 2))) != whole


def test_prompts_in_chunks_and_several_steps_a_launch(llama: PreTrainedModel) -> None:
    expected = [reference(llama, prompt, POLICIES["h2o"]()) for prompt in PROMPTS]
    assert generated(engine_over(llama, POLICIES["h2o"](), max_step_tokens=24)) == expected
    assert generated(engine_over(llama, POLICIES["h2o"](), steps=4)) == expected
    assert generated(engine_over(llama, POLICIES["h2o"](), steps=4, loop=True)) == expected


def test_a_suspended_request_goes_on_as_it_was(llama: PreTrainedModel) -> None:
    config = CacheConfig(own_lengths=True, layers_per_range=1, lookahead=0, host_memory=1 << 22)
    expected = generated(engine_over(llama, H2O(8, 4, every=4)), PROMPTS[:1])
    with engine_over(llama, H2O(8, 4, every=4), config=config) as engine:
        number = engine.submit(PROMPTS[0], SamplingParams(NEW, ignore_eos=True))
        found: list[int] = []
        while engine.busy:
            found += [event.token for event in engine.step() if event.token is not None]
            if len(found) == 3:
                assert engine.suspend(number) > 0
                engine.resume(number)
    assert found == expected[0]


def test_rows_of_eight_bits_are_compacted(llama: PreTrainedModel) -> None:
    eight_bits = generated(engine_over(llama, None, dtype=FP8, config=CacheConfig()))
    assert generated(engine_over(llama, H2O(LONGEST, LONGEST), dtype=FP8)) == eight_bits
    engine = engine_over(llama, H2O(6, 4), dtype=FP8)
    assert len(generated(engine)[0]) == NEW
    assert engine.compression is not None
    assert engine.compression.evicted_bytes == sum(len(p) - 10 for p in PROMPTS) * engine.cache.shape.token_bytes


def test_a_compaction_that_fails_leaves_the_sequence_whole(llama: PreTrainedModel, whole: list[list[int]]) -> None:
    driver = FaultyDriver(HostDriver())
    with engine_over(llama, H2O(2, 2), driver=driver) as engine:
        engine.submit(PROMPTS[0], SamplingParams(NEW, ignore_eos=True))
        driver.fail("record")
        found = [event.token for event in engine.run()]
        assert engine.compression is not None
        assert (engine.compression.failed, engine.compression.runs) == (1, 0)
    assert found == whole[0]


def test_what_goes_back_lets_another_request_in(llama: PreTrainedModel) -> None:
    prompts = [[(n * step + 5) % 500 for n in range(100)] for step in (37, 41)]
    most = []
    for policy in (None, H2O(2, 2)):
        with engine_over(llama, policy) as engine:
            cache = engine.cache
            assert isinstance(cache, KVCacheManager)
            whole = cache.bytes_of(100 + NEW)
            assert whole >= 4 * cache.bytes_of(4 + NEW)
            engine.set_budget(cache.layout.least_bytes + whole + cache.bytes_of(4 + NEW))
            numbers = [engine.submit(prompt, SamplingParams(NEW, ignore_eos=True)) for prompt in prompts]
            tokens = dict.fromkeys(numbers, 0)
            most.append(0)
            while engine.busy:
                for event in engine.step():
                    tokens[event.request] += event.token is not None
                most[-1] = max(most[-1], len(engine.scheduler.decoding))
                cache.check_integrity()
            assert set(tokens.values()) == {NEW}
    assert most == [1, 2]


class Wrong(CompressionPolicy):
    """Keeps the first token alone."""

    def keep(self, view: HeadsView) -> Sequence[torch.Tensor]:
        return [torch.tensor([0])] * view.keys.shape[1]


def test_a_policy_that_chooses_wrongly_ends_its_request(llama: PreTrainedModel) -> None:
    with engine_over(llama, Wrong()) as engine:
        (done,) = engine.generate(PROMPTS[:1], SamplingParams(NEW))
        assert done.finish_reason == "error"
        assert "does not keep its newest token" in (done.error or "")
        engine.cache.check_integrity()


@pytest.mark.parametrize(
    ("policy", "options", "says"),
    [
        ("h2o", {}, "give a CompressionPolicy"),
        (H2O(), {"prefix_cache": True}, "prefix_cache=True"),
        (H2O(), {"speculation": Speculation("ngram", 2)}, "speculation"),
        (H2O(every=2), {"steps": 4}, "every beside steps above 1"),
        (H2O(every=2), {"loop": True}, "every beside loop"),
        (H2O([1, 2, 3]), {}, "heavy has 3 amounts for 2 layers"),
        (H2O(), {"config": CacheConfig()}, "own_lengths=True"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    llama: PreTrainedModel, policy: Any, options: dict[str, Any], says: str
) -> None:
    config = options.pop("config", CacheConfig(own_lengths=True))
    with (
        KVCacheManager(shape_of(llama, 2, LONGEST), HostDriver(), 1 << 22, config=config) as cache,
        pytest.raises(ConfigError, match=says),
    ):
        Engine(copy.deepcopy(llama), cache, compile=False, compression=policy, **options)


def test_windows_and_forks_are_refused(llama: PreTrainedModel) -> None:
    fields = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}
    hybrid = tiny_model(tiny_config("gemma3_text", **fields))
    shape = replace(shape_of(hybrid, 2, LONGEST), windows=())
    with (
        make_cache("vattn", shape, "cpu", own_lengths=True) as cache,
        pytest.raises(ConfigError, match="layers with windows"),
    ):
        Engine(hybrid, cache, compile=False, compression=H2O())
    with engine_over(llama, H2O()) as engine:
        number = engine.submit(PROMPTS[0])
        with pytest.raises(ConfigError, match="cannot be forked"):
            engine.fork(number)


def test_an_engine_builds_its_own_cache() -> None:
    options = {"device": "cpu", "max_seqs": 2, "max_seq_len": 96, "capture": False}
    with Engine.from_pretrained("tiny-llama", compression=FastGen(), **options) as engine:
        assert isinstance(engine.cache, KVCacheManager)
        assert engine.cache.layout.head_groups == engine.cache.shape.num_kv_heads
        assert engine.cache.shape.num_slots == 2
        assert engine.cache.layout.layers_per_range == 1
    with pytest.raises(ConfigError, match="compression is served on one rank"):
        Engine.from_pretrained("tiny-llama", device="cpu", tensor_parallel=2, compression=H2O())
    with pytest.raises(ConfigError, match="compression is for the vattn cache; the cache asked for is 'paged'"):
        Engine.from_pretrained("tiny-llama", device="cpu", cache="paged", compression=H2O())
