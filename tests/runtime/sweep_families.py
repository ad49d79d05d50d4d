"""Every causal language model that transformers registers, tiny and random, over the engine: each must give
transformers' own tokens, or be refused by name before a token.

A sample of it is in test_families.py; the whole takes minutes: ``python tests/runtime/sweep_families.py [type ...]``.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import warnings
from typing import Any, NamedTuple

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams

VOCAB, LONGEST, NEW = 500, 96, 8
PROMPTS = ([3, 1, 4, 1, 5], [(n * 37 + 11) % VOCAB for n in range(70)], [9])

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "dim": 64,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "intermediate_size": 96,
    "shared_intermediate_size": 32,
    "n_inner": 96,
    "ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "decoder_layers": 4,
    "encoder_layers": 1,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "d_kv": 16,
    "kv_channels": 16,
    "attention_head_size": 16,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "max_seq_len": 256,
    "initializer_range": 0.16,
    "init_std": 0.16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "expert_intermediate_size": 32,
    "moe_ffn_hidden_size": 32,
    "ffn_hidden_size": 96,
    "expert_ffn_hidden_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "zero_expert_num": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "laurel_rank": 8,
    "lru_width": 64,
    "rotary_dim": 8,
    "n_shared_experts": 1,
    "mamba_d_ssm": 128,
    "num_heads": 8,
    "num_kv_shared_layers": 0,
    "num_encoder_layers": 1,
    "num_decoder_layers": 4,
    "qk_head_dim": 16,
    "hidden_dim": 96,
    "state_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
"""Sizes by the names that configurations give them."""

LATENT = {"head_dim": 8}
WINDOW = {"sliding_window": 16}
"""Shorter than one of the prompts."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bert-generation": {"is_decoder": True},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "gemma2": WINDOW,
    "gemma3_text": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3n_text": {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt_oss": WINDOW,
    "gpt_neo": {"attention_types": [[["global"], 4]]},
    "lfm2_moe": {"layer_types": ["full_attention"] * 4},
    "longcat_flash": LATENT,
    "mamba2": {"head_dim": 16},
    "mistral": WINDOW,
    "mpt": {},
    "phi3": WINDOW,
    "prophetnet": {"num_hidden_layers": None},
    "reformer": {"is_decoder": True},
    "xlm": {"causal": True},
    "youtu": LATENT,
    "zaya": {"num_experts_per_tok": 1},
}
"""Fields that a type needs beside, or by other values; None is the type's own."""


class Verdict(NamedTuple):
    """``right``, ``refused``, ``wrong``, ``crashed``, or ``unmade`` where no tiny configuration could be made."""

    what: str
    why: str = ""


def tiny_config(kind: str, **fields: Any) -> PreTrainedConfig:
    """A configuration of a model type with every size that it names made small."""
    made: Any = CONFIG_MAPPING[kind]
    default = made()
    values: dict[str, Any] = _small(default)
    for name in getattr(default, "sub_configs", None) or {}:
        inner = getattr(default, name, None)
        if isinstance(inner, PreTrainedConfig):
            values[name] = {**_small(inner), "model_type": inner.model_type}
    values |= {**DEFAULTS.get(kind, {}), **fields}
    absent = [
        name for name, value in values.items() if value is None and name not in ("eos_token_id", "sliding_window")
    ]
    config: PreTrainedConfig = made(**{name: value for name, value in values.items() if name not in absent})
    return config


def _small(default: PreTrainedConfig) -> dict[str, Any]:
    """The sizes that a configuration has and lets be set."""
    found = {}
    for name, value in SMALL.items():
        known = getattr(type(default), name, None)
        if isinstance(known, property) and known.fset is None:
            continue
        try:
            has = hasattr(default, name)
        except RuntimeError:  # a size by layer
            has = True
        if has:
            found[name] = value
    return found


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Its model with random weights."""
    with torch.device("meta"):
        count = sum(each.numel() for each in AutoModelForCausalLM.from_config(config).parameters())
    if count > 30_000_000:
        raise ValueError(f"{count:,} parameters are left; name more of its sizes in SMALL")
    torch.manual_seed(seed)
    # Two models of one configuration would have one attention implementation.
    model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    return model


@torch.inference_mode()
def disagreement(reference: PreTrainedModel, prompt: list[int], tokens: list[int]) -> str:
    """Where transformers' own pass over all tokens would have chosen another one; empty where nowhere."""
    logits = reference(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    best, chosen = logits.max(dim=-1).values, logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    apart = (best - chosen) / (best.abs() + 1e-6)
    if not bool(torch.isfinite(logits).all()):
        return "transformers' own logits are not finite"
    return f"{int((apart > 1e-4).sum())} of {len(tokens)} tokens" if bool((apart > 1e-4).any()) else ""


def verdict(config: PreTrainedConfig, capture: bool = True, device: str = "cpu", longest: int = LONGEST) -> Verdict:
    """How the engine takes a model of this configuration; refused is what a ConfigError that names its class says."""
    try:
        reference, model = tiny_model(config).to(device), tiny_model(config).to(device)
        disagreement(reference, [1, 2, 3], [4])
    except Exception as error:
        return Verdict("unmade", f"{type(error).__name__}: {error}")
    try:
        cache = make_cache("vattn", shape_of(model, 4, longest), device, None)
        with Engine(model, cache, capture=capture, compile=False, attention="torch") as engine:
            done = engine.generate(PROMPTS, SamplingParams(max_tokens=NEW))
    except ConfigError as error:
        return Verdict("refused" if type(model).__name__ in str(error) else "crashed", str(error))
    except Exception as error:
        return Verdict("crashed", f"{type(error).__name__}: {error}")
    for prompt, each in zip(PROMPTS, done, strict=True):
        if wrong := disagreement(reference, list(prompt), each.tokens):
            return Verdict("wrong", f"{wrong} after a prompt of {len(prompt)}")
    return Verdict("right")


def main(kinds: list[str]) -> int:
    """Print a verdict for each; the exit status is 1 where one is wrong or crashed."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(logging.CRITICAL)
    torch.set_num_threads(1)
    bad = 0
    for kind in kinds or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            found = verdict(tiny_config(kind))
            if "capture=False" in found.why:
                eager = verdict(tiny_config(kind), capture=False)
                found = Verdict(
                    found.what if eager.what == "right" else eager.what, f"(step by step: {eager.what}) {found.why}"
                )
        except Exception as error:
            found = Verdict("unmade", f"{type(error).__name__}: {error}")
        bad += found.what in ("wrong", "crashed")
        print(f"{kind:28} {found.what:8} {' '.join(found.why.split())[:230]}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    sys.exit(main(sys.argv[1:]))
