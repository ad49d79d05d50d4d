"""What TensorRT's own KV-cache layers (10.15 and newer) would need of a cache; the README compares them with ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.memory.layout import SlotLayout
from trtllm_vattn.plugins.build import make_logger
from trtllm_vattn.vmm.host import HostDriver

BATCH, HEADS, TOKENS, DIM = 2, 2, 128, 64


def native(trt: Any, cache: tuple[int, ...], update: tuple[int, ...]) -> Any:
    """A plan with `add_kv_cache_update` and attention over its output by device-side lengths, or None."""
    builder = trt.Builder(make_logger(trt))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    half, whole = trt.DataType.HALF, trt.DataType.INT32
    held, new = network.add_input("cache", half, cache), network.add_input("update", half, update)
    where, lengths = network.add_input("where", whole, (BATCH,)), network.add_input("lengths", whole, (BATCH,))
    query = network.add_input("q", half, (BATCH, 2 * HEADS, 1, DIM))
    layer = network.add_kv_cache_update(held, new, where, trt.KVCacheMode.LINEAR)
    kept = layer.get_output(0)
    attention = network.add_attention_v2(
        query, kept, kept, trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE
    )
    attention.key_value_lengths, attention.decomposable = lengths, True
    for tensor, name in ((kept, "kept"), (attention.get_output(0), "out")):
        tensor.name = name
        network.mark_output(tensor)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    return builder.build_serialized_network(network, config)


def test_a_native_cache_is_head_major(rtx: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert list(rtx.KVCacheMode.__members__) == ["LINEAR"]
    assert native(rtx, (BATCH, HEADS, TOKENS, DIM), (BATCH, HEADS, 1, DIM)) is not None
    assert native(rtx, (BATCH, TOKENS, HEADS, DIM), (BATCH, HEADS, 1, DIM)) is None
    assert "must have the same number of heads and head size" in caplog.text


def test_what_a_head_major_sequence_would_take() -> None:
    """Every head's K and V of every layer grows apart, so its first token takes a page each."""
    shape = CacheShape(32, 8, 128, torch.bfloat16, 1, 8192)
    granularity = 2 << 20
    heads_apart = shape.num_layers * shape.kv_factor * shape.num_kv_heads
    driver = HostDriver(granularity=granularity)
    with KVCacheManager(shape, driver) as cache:
        ours: SlotLayout = cache.layout
        assert heads_apart * granularity == 1 << 30
        assert ours.num_ranges * granularity == 4 << 20
        assert granularity // (shape.head_dim * shape.dtype.itemsize) == 8192
    driver.close()
