"""Which fields of a model's configuration the built networks handle; all others must have their default values.

A network is built from a configuration and weights, not from the model's code, so a field that `build_decoder` does not
know would be ignored silently. Each known field is in one table, by what is done with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trtllm_vattn.errors import ConfigError

HANDLED = {
    "dtype": "weights and attention are of it",
    "head_dim": "DecoderSpec.head_dim",
    "hidden_size": "the weights' shapes",
    "intermediate_size": "the weights' shapes",
    "attention_bias": "biases are among the weights",
    "mlp_bias": "biases are among the weights",
    "num_attention_heads": "DecoderSpec.num_heads",
    "num_hidden_layers": "DecoderSpec.num_layers",
    "num_key_value_heads": "DecoderSpec.num_kv_heads",
    "max_position_embeddings": "shape_of bounds max_seq_len by it",
    "rms_norm_eps": "DecoderSpec.eps",
    "rope_parameters": "the model's own cosines and sines are used",
    "rope_scaling": "the model's own cosines and sines are used",
    "rope_theta": "the model's own cosines and sines are used",
    "tie_word_embeddings": "lm_head is among the weights, or the embeddings are taken",
    "vocab_size": "DecoderSpec.vocab_size",
    "layer_types": "shape_of refuses a window shorter than max_seq_len",
    "max_window_layers": "shape_of refuses a window shorter than max_seq_len",
    "sliding_window": "shape_of refuses a window shorter than max_seq_len",
    "use_sliding_window": "shape_of refuses a window shorter than max_seq_len",
    "model_type": "DecoderSpec.of takes FAMILIES alone",
}
"""Fields of transformers' configurations that change what is computed, with where each is handled."""

NO_EFFECT = """
    _attn_implementation _attn_implementation_internal _commit_hash _experts_implementation_internal _name_or_path
    _output_attentions architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward eos_token_id
    finetuning_task id2label initializer_range is_decoder label2id num_labels output_attentions output_hidden_states
    pad_token_id pretraining_tp problem_type return_dict task_specific_params tokenizer_class torch_dtype
    transformers_version use_cache
""".split()  # noqa: SIM905
"""Fields that change nothing between tokens and logits."""

ACCEPTED: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}
"""Fields of which only these values are served, whatever the default."""

TRTLLM_HANDLED = """
    architecture attention_multiplier attn_bias dtype embedding_sharding_dim head_size hidden_act hidden_size
    intermediate_size kv_dtype logits_dtype mapping max_position_embeddings mlp_bias moe norm_epsilon
    num_attention_heads num_hidden_layers num_key_value_heads qk_layernorm quantization remove_duplicated_kv_heads
    rotary_base rotary_scaling share_embedding_table tie_word_embeddings use_parallel_embedding vocab_size
""".split()  # noqa: SIM905
"""Fields of TensorRT-LLM's configurations that its own modules handle, of which the network is built, or our checks."""

TRTLLM_NO_EFFECT = """
    disable_weight_only_quant_plugin layer_idx_offset moe_intermediate_size moe_shared_expert_intermediate_size
    num_labels producer qwen_type runtime_defaults seq_length
""".split()  # noqa: SIM905

TRTLLM_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "embedding_multiplier": (1.0,),
    "fc_after_embed": (False,),
    "output_multiplier_scale": (1.0,),
    "position_embedding_type": ("rope_gpt_neox",),
    "residual_mlp": (False,),
    "residual_multiplier": (1.0,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "use_logn_attn": (False,),
}
"""Fields that the network ignores, so that only these values are served."""


def check_config(config: Any) -> None:
    """Raise ConfigError where a transformers configuration has a field that the network would ignore."""
    fields = {**config.to_dict(), **{name: getattr(config, name) for name in ACCEPTED if hasattr(config, name)}}
    default = type(config)().to_dict()
    wrong = _not_accepted(fields, ACCEPTED)
    unknown = sorted(fields.keys() - HANDLED.keys() - set(NO_EFFECT) - ACCEPTED.keys())
    wrong += [
        f"{name} {fields[name]!r} (by default {default.get(name)!r})"
        for name in unknown
        if fields[name] != default.get(name)
    ]
    _refuse(f"a {config.model_type} model", wrong)


def unsupported_trtllm_fields(fields: Mapping[str, Any], head_size: int | None) -> list[str]:
    """Descriptions of a TensorRT-LLM configuration's fields that the network would ignore."""
    plain = {name: getattr(value, "name", value) for name, value in fields.items() if not name.startswith("_")}
    accepted = {**TRTLLM_ACCEPTED, "rotary_embedding_dim": (None, 0, head_size), "rotary_pct": (None, 1.0)}
    wrong = _not_accepted(plain, accepted)
    unknown = plain.keys() - set(TRTLLM_HANDLED) - set(TRTLLM_NO_EFFECT) - accepted.keys()
    wrong += [f"{name} {plain[name]!r} (not known)" for name in sorted(unknown) if plain[name] not in (None, False)]
    return wrong


def check_weights(names: Iterable[str], layers: int) -> None:
    """Raise ConfigError where a model has tensors that the network has no place for, or lacks some that it needs."""
    both = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    needed = {"model.embed_tokens.weight", "model.norm.weight"}
    known = {"lm_head.weight", "lm_head.bias"}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        needed |= {f"{prefix}.{name}.weight" for name in (*both, "input_layernorm", "post_attention_layernorm")}
        known |= {f"{prefix}.{name}.bias" for name in both}
        known |= {f"{prefix}.self_attn.{name}.weight" for name in ("q_norm", "k_norm")}
    there = set(names)
    missing, left_out = sorted(needed - there), sorted(there - needed - known)
    wrong = [f"{len(missing)} tensors missing, {missing[0]} first"] if missing else []
    wrong += [f"{len(left_out)} tensors that the network has no place for, {left_out[0]} first"] if left_out else []
    _refuse("the model", wrong)


def _not_accepted(fields: Mapping[str, Any], accepted: Mapping[str, tuple[Any, ...]]) -> list[str]:
    return [
        f"{name} {fields[name]!r} (served: {' or '.join(map(repr, values))})"
        for name, values in accepted.items()
        if name in fields and fields[name] not in values
    ]


def _refuse(what: str, wrong: list[str]) -> None:
    if wrong:
        raise ConfigError(
            f"{what} has {'; '.join(wrong)}, which the network would leave out; serve it by Engine, which runs the "
            "model's own code"
        )
