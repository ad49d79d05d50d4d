"""What a drawn network makes of each field of a configuration: the model's tokens, or a refusal by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.plugins.networks.config_fields import ACCEPTED, HANDLED, NO_EFFECT, check_config
from trtllm_vattn.plugins.networks.spec import FAMILIES, DecoderSpec, PlanLimits
from trtllm_vattn.plugins.session import EngineSession, LoadedEngine
from trtllm_vattn.runtime import SamplingParams
from trtllm_vattn.runtime.models import SHAPES

LIMITS = PlanLimits(max_lanes=1, max_chunk=32, max_seq_len=64)
PROMPT = [5, 9, 200, 7, 31, 2]


def model_of(kind: str = "llama", **fields: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    sizes = {**SHAPES["tiny-llama"], "num_hidden_layers": 2, "eos_token_id": None, "model_type": kind}
    config = AutoConfig.for_model(**{**sizes, **fields})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # else zeros
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rms_norm_eps": 0.3},
        {"tie_word_embeddings": True},
        {"head_dim": 32},
        {"hidden_act": "swish"},
        {"kind": "qwen2"},
        {"kind": "mistral", "sliding_window": 64},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
        },
    ],
    ids=lambda fields: " ".join(fields),
)
@torch.inference_mode()
def test_fields_that_are_heeded_give_the_models_tokens(fields: dict[str, Any]) -> None:
    model = model_of(**fields)
    loaded = LoadedEngine.emulated(model, LIMITS)
    with EngineSession(loaded, make_cache("vattn", loaded.cache_shape(1), "cpu"), capture=False) as session:
        (done,) = session.generate([PROMPT], SamplingParams(max_tokens=6))
    logits = model(input_ids=torch.tensor([PROMPT + done.tokens])).logits[0, len(PROMPT) - 1 : -1]
    assert done.tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"hidden_act": "gelu"}, r"a llama model has hidden_act 'gelu' \(served: 'silu' or 'swish'\)"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"kind": "qwen3", "hidden_act": "gelu_pytorch_tanh"}, "a qwen3 model has hidden_act 'gelu_pytorch_tanh'"),
        ({"embedding_multiplier": 12.0}, r"embedding_multiplier 12\.0 \(by default None\)"),
        ({"residual_multiplier": 0.2}, r"residual_multiplier 0\.2"),
        ({"attention_multiplier": 0.1}, r"attention_multiplier 0\.1"),
        ({"logits_scaling": 8.0}, r"logits_scaling 8\.0"),
        ({"final_logit_softcapping": 30.0, "qk_norm": True}, r"final_logit_softcapping 30\.0 .*; qk_norm True"),
        ({"num_local_experts": 8}, "num_local_experts 8"),
        ({"kind": "granite"}, "no network for a granite model"),
        ({"kind": "mistral", "sliding_window": 32}, "a window of 32 tokens"),
    ],
)
def test_fields_that_would_be_left_out_are_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        DecoderSpec.of(model_of(**fields), 64)


def test_tensors_that_would_be_left_out_are_refused() -> None:
    model = model_of()
    model.model.layers[1].post_feedforward_layernorm = torch.nn.LayerNorm(64)
    with pytest.raises(ConfigError, match=r"2 tensors that the network has no place for, model\.layers\.1\.post_feed"):
        DecoderSpec.of(model, 64)
    model = model_of()
    del model.model.layers[0].self_attn.v_proj
    with pytest.raises(ConfigError, match=r"1 tensors missing, model\.layers\.0\.self_attn\.v_proj\.weight first"):
        DecoderSpec.of(model, 64)


def test_layers_that_scale_scores_differently_are_refused() -> None:
    model = model_of()
    model.model.layers[1].self_attn.scaling = 0.5
    with pytest.raises(ConfigError, match=r"different factors, \[0\.17677\d+, 0\.5\], by layer"):
        DecoderSpec.of(model, 64)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_field_of_a_familys_configuration_is_in_the_table(kind: str) -> None:
    config = CONFIG_MAPPING[kind]()
    check_config(config)
    assert set(config.to_dict()) - HANDLED.keys() - set(NO_EFFECT) - ACCEPTED.keys() <= {"is_encoder_decoder"}


def test_the_engine_keeps_what_ends_a_text() -> None:
    model = model_of()
    model.generation_config.eos_token_id, model.config.eos_token_id = [3, 4], 5
    loaded = LoadedEngine.emulated(model, LIMITS)
    assert loaded.config.eos_token_id == [3, 4]
    assert model.config.eos_token_id == 5
