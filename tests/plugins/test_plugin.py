"""The plugin's life and its layers, over memory of the host driver, where an unmapped page is a crash."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from layers import DIM, HEADS, KV_HEADS, LAYERS, TOKENS, Layer, expected, fields_of

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.graphs.host_graph import HostGraph
from trtllm_vattn.plugins import callback_errors, plain, registry
from trtllm_vattn.plugins.attend import attend
from trtllm_vattn.plugins.emulated import Constants, Desc, built_layer, describe
from trtllm_vattn.plugins.fields import Slots
from trtllm_vattn.plugins.plugin import NAME, VERSION, register
from trtllm_vattn.vmm.base import Driver

SLOTS = 4
Q, KV = HEADS * DIM, KV_HEADS * DIM


@pytest.fixture
def cache(driver: Driver) -> Iterator[KVCacheManager]:
    shape = CacheShape(LAYERS, KV_HEADS, DIM, torch.float32, SLOTS, TOKENS)
    with KVCacheManager(shape, driver, budget=1 << 26) as made:
        registry.attach("kv", made, "torch")
        yield made
        registry.detach("kv")


def rows(tokens: int, cache: KVCacheManager, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    widths = {"q": Q, "k": KV, "v": KV}
    return {name: torch.randn(tokens, width, generator=generator).to(cache.device) for name, width in widths.items()}


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_a_prompt_and_then_steps_are_attended(cache: KVCacheManager) -> None:
    layer = Layer(fields_of(), str(cache.device))
    for sequence in ("a", "b"):
        cache.admit(sequence, 11)
    slot = cache.slot_of("b")
    tokens = rows(16, cache)
    out = layer.call(tokens, [11], [slot], [11], most=16)
    for row in range(11):
        close(out[row], expected(tokens["q"][row], tokens["k"], tokens["v"], 0.3, visible=row + 1))
    kv = cache.layer(1)
    close(kv.k[slot, :11].reshape(11, KV), tokens["k"][:11])
    close(kv.v[slot, :11].reshape(11, KV), tokens["v"][:11])
    # A step: slot 0's lane is idle, slot 1 has its twelfth token.
    cache.extend("b", 1)
    step = rows(2, cache, seed=1)
    lengths = [0, 0]
    lengths[slot] = 12
    got = layer.call(step, lengths)
    k, v = (torch.cat([tokens[name][:11], step[name][slot : slot + 1]]) for name in ("k", "v"))
    close(got[slot], expected(step["q"][slot], k, v, 0.3))
    assert torch.isfinite(got).all()


def test_a_prompt_in_two_chunks_is_one_prompt(cache: KVCacheManager) -> None:
    cache.admit("a", 24)
    tokens = rows(24, cache)
    layer = Layer(fields_of(), str(cache.device))
    first = {name: tensor[:16] for name, tensor in tokens.items()}
    second = {name: torch.cat([tensor[16:], tensor[:8]]) for name, tensor in tokens.items()}
    layer.call(first, [16], [0], [16], most=16)
    out = layer.call(second, [24], [0], [8], most=40)
    for row in range(8):
        close(out[row], expected(second["q"][row], tokens["k"], tokens["v"], 0.3, visible=17 + row))


def test_chunks_of_several_lanes_in_one_call(cache: KVCacheManager) -> None:
    for sequence in "abc":
        cache.admit(sequence, 8)
    tokens = rows(16, cache)
    out = Layer(fields_of(), str(cache.device)).call(tokens, [8, 5], [2, 0], [8, 5], most=8)
    close(out[7], expected(tokens["q"][7], tokens["k"][:8], tokens["v"][:8], 0.3))
    close(out[12], expected(tokens["q"][12], tokens["k"][8:13], tokens["v"][8:13], 0.3))
    close(cache.layer(1).k[0, :5].reshape(5, KV), tokens["k"][8:13])


@pytest.mark.parametrize("slots", [[2, 0], [0, 3]])
def test_lanes_over_other_slots(cache: KVCacheManager, slots: list[int]) -> None:
    for sequence in "abcd":
        cache.admit(sequence, 1)
    layer = Layer(fields_of(slots=int(Slots.ALWAYS)), str(cache.device))
    tokens = rows(2, cache)
    got = layer.call(tokens, [1, 1], slots)
    for lane, slot in enumerate(slots):
        close(got[lane], tokens["v"][lane].view(KV_HEADS, DIM).repeat_interleave(2, 0).flatten())
        close(cache.layer(1).k[slot, 0].flatten(), tokens["k"][lane])


def test_packed_projections_and_no_slots(cache: KVCacheManager) -> None:
    cache.admit("a", 1)
    tokens = rows(1, cache)
    packed = {"qkv": torch.cat([tokens["q"], tokens["k"], tokens["v"]], dim=1)}
    layer = Layer(fields_of(packed_qkv=1, slots=0, context=0), str(cache.device))
    got = layer.call(packed, [1])
    close(got[0], tokens["v"][0].view(KV_HEADS, DIM).repeat_interleave(2, 0).flatten())
    assert len(registry.attached("kv").storages()) > len(registry.attached("kv").attentions[0].storages())


def test_an_idle_lane_writes_nothing_even_where_nothing_is_mapped(cache: KVCacheManager) -> None:
    """On the host a write to an unmapped slot would end the process."""
    got = Layer(fields_of(), str(cache.device)).call(rows(SLOTS, cache), [0] * SLOTS)
    assert torch.isfinite(got).all()


def test_clones_share_the_cache_and_nothing_else(cache: KVCacheManager) -> None:
    cache.admit("a", 2)
    built = built_layer(plain, fields_of())
    one, other = built.attach_to_context(None), built.attach_to_context(None)
    assert one is not other
    assert one.fields == other.fields == fields_of()
    assert not one.building
    layer, tokens = Layer(fields_of(), str(cache.device)), rows(2, cache)
    layer.plugin = one
    layer.call({name: tensor[:1] for name, tensor in tokens.items()}, [1])
    layer.plugin = other
    got = layer.call({name: tensor[1:] for name, tensor in tokens.items()}, [2])
    close(got[0], expected(tokens["q"][1], tokens["k"], tokens["v"], 0.3))


def test_a_captured_layer_stays_right_while_memory_is_replaced(host_driver: Driver) -> None:
    shape = CacheShape(LAYERS, KV_HEADS, DIM, torch.float32, SLOTS, TOKENS)
    with KVCacheManager(shape, host_driver, budget=1 << 26) as cache:
        attached = registry.attach("kv", cache, "torch")
        attached.attention(HEADS, fields_of().scale)
        cache.admit("a", 1)
        layer = Layer(fields_of()).plugin
        tensors = {**rows(1, cache), "out": torch.zeros(1, Q)}
        for name, value in (("lengths", 1), ("slots", 0), ("query_lengths", 0), ("extent", 0)):
            tensors[name] = torch.tensor([value], dtype=torch.int32)
        inputs, outputs = describe(plain, fields_of(), 1, 1, 1)
        addresses = [tensors[name].data_ptr() for name in fields_of().inputs]
        layer.on_shape_change(inputs, outputs)

        def step() -> None:
            layer.enqueue(inputs, outputs, addresses, [tensors["out"].data_ptr()], 0, 0)

        static = [*tensors.values(), *cache.storages(), *attached.storages()]
        graph = HostGraph.capture(step, static)
        history: dict[str, list[torch.Tensor]] = {"k": [], "v": []}
        for length in range(1, 40):
            if length > 1:
                cache.extend("a", 1)
            if length % 5 == 0:
                assert cache.replace("a")
            fresh = rows(1, cache, seed=length)
            for name in ("q", "k", "v"):
                tensors[name].copy_(fresh[name])
            tensors["lengths"].fill_(length)
            graph.replay()
            for name, kept in history.items():
                kept.append(fresh[name][0])
            k, v = torch.stack(history["k"]), torch.stack(history["v"])
            close(tensors["out"][0], expected(fresh["q"][0], k, v, 0.3))
        registry.detach("kv")


@pytest.mark.parametrize("attached", [False, True])
def test_a_builder_may_time_a_layer_on_anything(attached: bool, host_driver: Driver) -> None:
    """Also beside a cache that is in use: lengths and slots are whatever was in the builder's memory."""
    register(plain)
    creator = plain.get_plugin_registry().get_creator(NAME, VERSION, "")
    collection = built_layer(plain, fields_of()).get_fields_to_serialize()
    building = creator.create_plugin("layer", collection, plain.TensorRTPhase.BUILD).clone()
    inputs, outputs = describe(plain, fields_of(), 2, 2, 1)
    building.on_shape_change(inputs, outputs)
    out = torch.ones(2, Q)
    with KVCacheManager(CacheShape(LAYERS, KV_HEADS, DIM, torch.float32, 2, TOKENS), host_driver) as cache:
        if attached:
            registry.attach("kv", cache, "torch")
        building.enqueue(inputs, outputs, [0] * len(inputs), [out.data_ptr()], 0, 0)
        registry.detach("kv")
    assert (out == 1).all()


def test_a_plan_that_runs_needs_its_cache() -> None:
    with pytest.raises(ConfigError, match=r"no cache is attached as 'kv' in this process \(attached: none\); call"):
        Layer(fields_of()).call({"q": torch.zeros(1, Q), "k": torch.zeros(1, KV), "v": torch.zeros(1, KV)}, [1])
    assert "no cache is attached as 'kv'" in str(callback_errors.error_of("TensorRT failed"))


def test_what_does_not_fit_the_cache_is_refused(cache: KVCacheManager) -> None:
    tokens = rows(SLOTS + 1, cache)
    with pytest.raises(ConfigError, match="5 lanes, but the cache attached as 'kv' has 4 slots"):
        Layer(fields_of(), str(cache.device)).call(tokens, [0] * 5)
    with pytest.raises(ConfigError, match="the plan has a layer 7"):
        Layer(fields_of(layer=7), str(cache.device)).call(tokens, [0] * 5)
    with pytest.raises(ConfigError, match="5 tokens in 2 lanes at attention layer 1: each lane has"):
        Layer(fields_of(), str(cache.device)).call(tokens, [0, 0])
    with pytest.raises(ConfigError, match="there is no context phase"):
        Layer(fields_of(context=0), str(cache.device)).call(tokens, [0])
    # Half as many keys of two heads could be taken for keys of one.
    fewer = {"q": tokens["q"][:2], "k": tokens["k"][:1], "v": tokens["v"][:2]}
    lanes = {name: torch.zeros(2, dtype=torch.int32) for name in ("lengths", "slots", "query_lengths")}
    with pytest.raises(ConfigError, match="input k of attention layer 1 has 1 tokens, and q has 2"):
        attend(fields_of(), registry.attached("kv"), {**fewer, **lanes}, torch.zeros(2, Q))


def test_another_slot_count_is_another_cache_and_not_another_plan(host_driver: Driver) -> None:
    layer = Layer(fields_of())
    for count in (1, 3):
        shape = CacheShape(LAYERS, KV_HEADS, DIM, torch.float32, count, TOKENS)
        with KVCacheManager(shape, host_driver, budget=1 << 24) as cache:
            registry.attach("kv", cache, "torch")
            cache.admit("a", 1)
            tokens = rows(count, cache)
            got = layer.call(tokens, [1] + [0] * (count - 1))
            close(got[0], tokens["v"][0].view(KV_HEADS, DIM).repeat_interleave(2, 0).flatten())
            registry.detach("kv")


def test_names_are_given_once(cache: KVCacheManager, host_driver: Driver) -> None:
    again = registry.attach("kv", cache)
    assert again is registry.attached("kv")
    assert registry.attach("also", cache).cache is cache
    with KVCacheManager(cache.shape, host_driver) as other:
        with pytest.raises(ConfigError, match="another cache is attached as 'also'"):
            registry.attach("also", other)
        registry.detach("also")
        assert registry.attach("also", other).cache is other
        registry.detach("also")


def test_formats_and_types_are_negotiated() -> None:
    fields = fields_of(dtype="float16")
    layer = built_layer(plain, fields)
    inputs, outputs = describe(plain, fields, -1, -1, -1)
    both = [*inputs, *outputs]
    assert all(layer.supports_format_combination(i, both, len(inputs)) for i in range(len(both)))

    def with_one(position: int, **changes: Any) -> list[Desc]:
        values = {**vars(both[position]), **changes}
        return [Desc(**values) if i == position else each for i, each in enumerate(both)]

    assert not layer.supports_format_combination(0, with_one(0, format=plain.TensorFormat.CHW32), len(inputs))
    assert not layer.supports_format_combination(0, with_one(0, type=plain.DataType.FLOAT), len(inputs))
    assert not layer.supports_format_combination(3, with_one(3, type=plain.DataType.HALF), len(inputs))
    assert not layer.supports_format_combination(7, with_one(7, type=plain.DataType.BF16), len(inputs))


def test_shapes_and_types_are_refused_with_our_words() -> None:
    layer = built_layer(plain, fields_of())
    half, whole = plain.DataType.HALF, plain.DataType.INT32
    with pytest.raises(ConfigError, match=r"input q .* is DataType\.HALF; it must be DataType\.FLOAT"):
        layer.get_output_data_types([half] * 3 + [whole] * 4)
    with pytest.raises(ConfigError, match="was given 2 inputs; its fields ask for q, k, v, lengths, slots"):
        layer.get_output_data_types([half] * 2)
    with pytest.raises(ConfigError, match=r"input k .* has shape \[-1, -1, -1\]; it must be \[tokens, 32\]"):
        layer.get_output_shapes([[-1, Q], [-1, 2, 16], [-1, KV], *[[-1]] * 4], [], Constants())
    inputs, outputs = describe(plain, fields_of(head_dim=8), -1, -1, -1)
    with pytest.raises(ConfigError, match=r"input q .* has shape \[-1, 32\]; it must be \[tokens, 64\]"):
        layer.configure_plugin(inputs, outputs)
    assert layer.get_workspace_size(inputs, outputs) == 0
