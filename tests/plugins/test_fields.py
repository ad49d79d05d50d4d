"""What a plan says of a layer, and what is refused."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.plugins import plain
from trtllm_vattn.plugins.fields import AttentionFields, Slots, from_collection, to_collection

FIELDS = AttentionFields("kv", 3, 8, 2, 16, 0.25, 0, "bfloat16", 0, Slots.CONTEXT, 1)


def test_fields_survive_serialisation() -> None:
    collection, _ = to_collection(plain, FIELDS)
    assert from_collection(collection) == FIELDS
    assert {field.name for field in collection} == set(asdict(FIELDS))


def test_no_field_is_wide_enough_for_an_address() -> None:
    collection, _ = to_collection(plain, FIELDS)
    numbers = [field.data for field in collection if not isinstance(field.data, bytes)]
    assert len(numbers) == 9
    assert all(number.dtype.itemsize == 4 and number.size == 1 for number in numbers)


def test_a_name_with_a_trailing_null_is_read() -> None:
    collection, _ = to_collection(plain, FIELDS)
    with_null = [
        plain.PluginField(
            f.name, np.frombuffer(f.data + b"\0", np.int8) if isinstance(f.data, bytes) else f.data, f.type
        )
        for f in collection
    ]
    assert from_collection(with_null) == FIELDS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": ""}, "the field cache is empty"),
        ({"num_kv_heads": 3}, "8 query heads over 3 kv heads"),
        ({"head_dim": 0}, "the field head_dim is 0"),
        ({"layer": -1}, "layer is -1"),
        ({"layer": 1.5}, "layer is 1.5; it is a whole number"),
        ({"num_heads": "8"}, "num_heads is '8'; it is a whole number from 1 to 2147483647"),
        ({"head_dim": 1 << 31}, "head_dim is 2147483648"),
        ({"window": None}, "window is None"),
        ({"scale": float("inf")}, "scale is inf; it is a finite number"),
        ({"scale": 1e39}, "scale is 1e\\+39, as float32 inf"),
        ({"scale": "x"}, "scale is 'x'"),
        ({"cache": "k\0v"}, r"cache is 'k\\x00v'; name the cache .* without NUL"),
        ({"cache": 7}, "the field cache is 7"),
        ({"dtype": []}, r"dtype is \[\]"),
        ({"packed_qkv": torch.tensor([1, 2])}, r"packed_qkv is tensor\(\[1, 2\]\)"),
        ({"scale": 0.0}, "the field scale is 0.0"),
        ({"dtype": "int8"}, "the field dtype is 'int8'; there are float32, float16, bfloat16"),
        ({"slots": 3}, "slots 3"),
    ],
)
def test_fields_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(FIELDS, **changes)


def test_missing_unknown_and_unreadable_fields_are_refused() -> None:
    collection, _ = to_collection(plain, FIELDS)
    with pytest.raises(ConfigError, match="was given no scale; its fields are cache, layer"):
        from_collection([field for field in collection if field.name != "scale"])
    stranger = plain.PluginField("alpha", np.zeros(1, np.float32), plain.PluginFieldType.FLOAT32)
    with pytest.raises(ConfigError, match="no field 'alpha'; there are cache"):
        from_collection([*collection, stranger])
    two = plain.PluginField("layer", np.zeros(2, np.int32), plain.PluginFieldType.INT32)
    with pytest.raises(ConfigError, match=r"the field layer is \[0, 0\] of int32; give one number"):
        from_collection([two if field.name == "layer" else field for field in collection])


def test_inputs_follow_the_fields() -> None:
    assert FIELDS.inputs == ("q", "k", "v", "lengths", "slots", "query_lengths", "extent")
    assert replace(FIELDS, packed_qkv=1, slots=0, context=0).inputs == ("qkv", "lengths")
    assert [FIELDS.width_of(name) for name in ("q", "k", "v", "qkv")] == [128, 32, 32, 192]


def test_shapes_are_checked() -> None:
    FIELDS.check_input("q", (-1, 128))
    FIELDS.check_input("lengths", (4,))
    with pytest.raises(
        ConfigError, match=r"input q of attention layer 3 has shape \[5, 64\]; it must be \[tokens, 128\]"
    ):
        FIELDS.check_input("q", (5, 64))
    with pytest.raises(ConfigError, match=r"input extent .* must be \[most\]"):
        FIELDS.check_input("extent", (4, 1))
    same = {"q": (6, 128), "k": (6, 32), "v": (6, 32), "lengths": (3,), "slots": (3,), "query_lengths": (3,)}
    FIELDS.check_inputs(same)
    for name, dims, message in (
        ("k", (3, 32), "input k of attention layer 3 has 3 tokens, and q has 6; give both the same"),
        ("v", (6, 33), "input v .* has shape"),
        ("slots", (4,), "input slots .* has 4 lanes, and lengths has 3"),
        ("query_lengths", (1,), "input query_lengths .* has 1 lanes"),
    ):
        with pytest.raises(ConfigError, match=message):
            FIELDS.check_inputs({**same, name: dims})


def test_a_cache_that_is_not_the_plans_is_refused() -> None:
    shape = CacheShape(4, 2, 16, torch.bfloat16, 2, 64)
    FIELDS.check_cache(shape)
    with pytest.raises(
        ConfigError, match=r"num_kv_heads is 4, the plan's 2; dtype is torch.float16, the plan's torch.bf"
    ):
        FIELDS.check_cache(replace(shape, num_kv_heads=4, dtype=torch.float16))
    with pytest.raises(ConfigError, match="num_layers is 3, the plan has a layer 3"):
        FIELDS.check_cache(replace(shape, num_layers=3))
    with pytest.raises(ConfigError, match="max_seq_len is 64, the plan's window 32 tokens"):
        replace(FIELDS, window=32).check_cache(shape)
    replace(FIELDS, window=64).check_cache(shape)
