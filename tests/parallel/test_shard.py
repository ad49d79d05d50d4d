"""A model divided among ranks: the parts of its weights, by transformers' plan."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.models import SHAPES
from trtllm_vattn.runtime.parallel.shard import shard_model


def model_of(name: str = "tiny-llama", **changes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(**{**SHAPES[name], "num_hidden_layers": 1, **changes})
    return AutoModelForCausalLM.from_config(config)


def parts_of(model: PreTrainedModel, size: int) -> list[PreTrainedModel]:
    parts = [copy.deepcopy(model) for _ in range(size)]
    for rank, part in enumerate(parts):
        shard_model(part, rank, size)
    return parts


def test_parts_together_are_the_whole_weights() -> None:
    model = model_of("tiny-qwen2")
    parts = parts_of(model, 2)
    of_whole = model.model.layers[0]
    layers = [part.model.layers[0] for part in parts]
    for name, dim in (("self_attn.q_proj", 0), ("self_attn.k_proj", 0), ("self_attn.o_proj", 1), ("mlp.down_proj", 1)):
        whole = of_whole.get_submodule(name)
        mine = [layer.get_submodule(name) for layer in layers]
        assert torch.equal(torch.cat([each.weight for each in mine], dim), whole.weight)
        if dim == 0:
            assert torch.equal(torch.cat([each.bias for each in mine]), whole.bias)
    assert torch.equal(torch.cat([part.lm_head.weight for part in parts]), model.lm_head.weight)
    assert torch.equal(parts[1].model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_kv_heads_fewer_than_ranks_are_replicated() -> None:
    parts = parts_of(model_of(num_key_value_heads=2), 4)
    weights = [part.model.layers[0].self_attn.k_proj.weight for part in parts]
    assert [(p.config.num_attention_heads, p.config.num_key_value_heads) for p in parts] == [(1, 1)] * 4
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[1], weights[2])


@pytest.mark.parametrize(
    ("changes", "size", "said"),
    [
        ({}, 3, "4 query heads"),
        ({"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}, 2, "3 KV heads for 2 ranks"),
        ({"intermediate_size": 161}, 2, "intermediate_size of 161"),
    ],
)
def test_what_ranks_do_not_divide_is_refused(changes: dict[str, Any], size: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        shard_model(model_of(**changes), 0, size)


def test_a_plan_that_is_not_applied_is_refused_by_name() -> None:
    config = AutoConfig.for_model(**{**SHAPES["tiny-llama"], "num_hidden_layers": 1, "model_type": "olmo2"})
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=r"Olmo2ForCausalLM .*q_proj is 'colwise_gather_output'"):
        shard_model(model, 0, 2)
    assert model.config.num_attention_heads == 4
